"""Beam search on the host: which extensions of a prompt's beams go on, and when it is over.

    rules = BeamRules(options, max_new_tokens, stop_ids)
    while rules.open:
        grown = rules.extend(candidates of each running beam)    [(parent, token) of each new beam]
    hypotheses = rules.found()

The rules are those of infer/beam.py (`generate(num_beams=K)` of transformers 5), in its float32 and with
its order of ties, so that both find the same. `Search` holds them to sequences of the scheduler: K rows
of a step, whose pages are shared as far as their tokens are the same.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from llm_jax.engine.request import Sequence as Running
from llm_jax.engine.scheduler import Scheduler
from llm_jax.infer.beam_options import BeamOptions, check_searchable
from llm_jax.ops.sampling_params import MAX_STOPS, SamplingParams


@dataclasses.dataclass(frozen=True)
class Candidates:
    """The C likeliest next tokens of a beam, likeliest first."""

    tokens: np.ndarray  # [C] int32
    logprobs: np.ndarray  # [C] float32, after penalties, bias and masks
    own: np.ndarray  # [C] float32, of the model's own distribution


@dataclasses.dataclass(frozen=True)
class Hypothesis:
    """A continuation."""

    tokens: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()  # of the model's own distribution
    score: np.float32 = np.float32(0)  # sum of log-probabilities; / length ** length_penalty at its end

    def __add__(self, extension: tuple[int, float, np.float32]) -> "Hypothesis":
        token, logprob, score = extension
        return Hypothesis((*self.tokens, token), (*self.logprobs, logprob), score)


class BeamRules:
    """The search of one prompt: K = num_beams running beams after the first step, and what has ended.

    Where fewer than K extensions are possible, beams with a score of -inf fill up their number.
    """

    def __init__(self, options: BeamOptions, max_new_tokens: int, stop_ids: Sequence[int]):
        self.options, self.budget, self.stop_ids = options, max_new_tokens, frozenset(stop_ids)
        # One beam is greedy search, which ends at its first end id whatever might follow it.
        self._early = options.early_stopping if options.num_beams > 1 else True
        self.running = [Hypothesis()]
        self.finished: list[Hypothesis] = []  # best first, at most K
        self.length, self.open = 0, True  # tokens of each running beam; whether beams may still win

    def extend(self, candidates: Sequence[Candidates]) -> list[tuple[int, int]]:
        """One more token in every beam: (which beam it continues, token) of each of the next ones."""
        count, self.length = self.options.num_beams, self.length + 1
        last = self.length >= self.budget
        tokens = np.stack([each.tokens for each in candidates])
        scores = np.array([beam.score for beam in self.running], np.float32)
        totals = scores[:, None] + np.stack([each.logprobs for each in candidates])
        before, grown, ended = self.running, [], []
        self.running = []
        for rank, flat in enumerate(np.argsort(-totals, axis=None, kind="stable").tolist()):
            parent, place = divmod(flat, tokens.shape[1])
            token, total = int(tokens[parent, place]), totals[parent, place]
            ends = last or token in self.stop_ids
            if (rank >= count or total == -math.inf) if ends else len(grown) == count:
                continue
            extension = before[parent] + (token, float(candidates[parent].own[place]), total)
            if ends:
                ended.append(self._normalized(extension, self.length))
            else:
                grown.append((parent, token))
                self.running.append(extension)
        self.finished = sorted(self.finished + ended, key=lambda x: -x.score)[:count]
        self.open = self._may_improve()
        if self.open:
            dead = dataclasses.replace(self.running[0], score=np.float32(-math.inf))
            self.running += [dead] * (count - len(grown))
            grown += grown[:1] * (count - len(grown))
        return grown

    def found(self) -> list[Hypothesis]:
        """The finished hypotheses, best first; of a search that was cut short its beams as well."""
        cut = [self._normalized(beam, self.length) for beam in self.running if self.open and beam.tokens]
        alive = [beam for beam in cut if beam.score > -math.inf]
        return sorted(self.finished + alive, key=lambda x: -x.score)

    def _may_improve(self) -> bool:
        """Whether a running beam may still end better than the worst of K finished ones."""
        full = len(self.finished) == self.options.num_beams
        if not self.running or (full and self._early is True):
            return False
        reach = self.length
        if self._early == "never" and self.options.length_penalty > 0:
            reach = self.budget
        worst = self.finished[-1].score if full else -math.inf
        return bool(self._normalized(self.running[0], reach).score > worst)

    def _normalized(self, beam: Hypothesis, length: int) -> Hypothesis:
        score = beam.score / np.float32(length) ** np.float32(self.options.length_penalty)
        return dataclasses.replace(beam, score=score)


def check_beams(
    beams: BeamOptions, params: SamplingParams, stop_ids: Sequence[int], max_beams: int
) -> None:
    """ValueError, naming the field, for a search that an engine cannot make."""
    if beams.num_beams > max_beams:
        raise ValueError(
            f"num_beams={beams.num_beams}: this engine was made for max_beams={max_beams}; search with "
            "fewer, or set EngineConfig.max_beams"
        )
    if len(stop_ids) > MAX_STOPS:
        raise ValueError(
            f"SamplingParams.stop_ids and the model's own are {len(stop_ids)} ids: a search takes "
            f"{MAX_STOPS}; leave some out, or set ignore_eos"
        )
    check_searchable([params])


class Search:
    """A request's search: its rules, and the sequence of each beam."""

    def __init__(self, rules: BeamRules):
        self.rules = rules
        self._beams: list[Running] = []
        self._latest: dict[Running, Candidates] = {}

    def take(self, sequence: Running, candidates: Candidates) -> None:
        """What a step found for one of the beams; a beam that was computed again has it anew."""
        self._beams = self._beams or [sequence]
        self._latest[sequence] = candidates

    def advance(self, scheduler: Scheduler) -> bool:
        """Extend all beams, if a step has brought the candidates of each; False when it is over."""
        known = bool(self._beams)  # else only a piece of the prompt was computed
        if known and all(beam.slot >= 0 and beam.computed == beam.length for beam in self._beams):
            grown = self.rules.extend([self._latest[beam] for beam in self._beams])
            if self.rules.open:
                parents = [(self._beams[parent], token) for parent, token in grown]
                self._beams = scheduler.extend(parents)
        return self.rules.open
