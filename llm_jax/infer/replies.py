"""From sampled tokens to what a caller sees: texts that end where they should.

A `Reply` follows one continuation: it decides where the text ends (a stop id, a stop string), holds text
back while it may still become a stop string, and keeps log probabilities.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from llm_jax.data.detokenize import StreamingDecoder
from llm_jax.ops.sampling_params import SamplingParams


@dataclasses.dataclass
class Output:
    """One generated continuation.

    token_ids include the id that ended it; text does not. logprobs are of the model's own distribution
    (natural log), one per token; top_logprobs holds {id: logprob} per token when asked for. Likewise of
    the prompt, where the first token, which nothing comes before, has None.
    """

    prompt: str | None
    prompt_ids: list[int]
    sample: int
    text: str = ""
    token_ids: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] | None = None
    top_logprobs: list[dict[int, float]] | None = None
    prompt_logprobs: list[float | None] | None = None
    prompt_top_logprobs: list[dict[int, float] | None] | None = None
    finish_reason: str | None = None  # "stop" (an end or stop id, a stop string) | "length"
    taps: dict[str, np.ndarray] | None = None  # at its end, what the request's `Taps` recorded
    score: float | None = None  # of beam search: sum of log-probabilities / length ** length_penalty


class Reply:
    """One continuation on its way into its `Output`."""

    def __init__(
        self,
        output: Output,
        params: SamplingParams,
        stop_ids: Sequence[int],
        decoder: StreamingDecoder | None,
    ):
        if params.stop and decoder is None:
            raise ValueError(f"stop={params.stop}: stop strings need a tokenizer; use stop_ids")
        self.output, self.params, self.stopped = output, params, False
        self._stop_ids, self._decoder, self._held = frozenset(stop_ids), decoder, ""
        if params.logprobs is not None:
            output.logprobs = []
            output.top_logprobs = [] if params.logprobs else None
        if params.prompt_logprobs is not None:
            output.prompt_logprobs = [None]
            output.prompt_top_logprobs = [None] if params.prompt_logprobs else None

    def take(self, token: int, found: Sequence[Any] | None = None) -> str:
        """Add a token; returns the text that may be shown now. `stopped` says if it was the last.

        found: the log probability of the token, ids of the likeliest and theirs, where asked for.
        """
        output, k = self.output, self.params.logprobs
        output.token_ids.append(token)
        if output.logprobs is not None:
            assert found is not None, "the step had no log probabilities"
            output.logprobs.append(float(found[0]))
            if output.top_logprobs is not None:
                pairs = zip(found[1][:k].tolist(), found[2][:k].tolist(), strict=True)
                output.top_logprobs.append(dict(pairs))
        self.stopped = token in self._stop_ids
        last = self.stopped or len(output.token_ids) >= self.params.max_new_tokens
        text = ""
        if self._decoder is not None:
            self._held += "" if self.stopped else self._decoder.push(token)
            text = self.end() if last else self._release(_overlap(self._held, self.params.stop))
        if last or self.stopped:
            output.finish_reason = "stop" if self.stopped else "length"
        return text

    def take_prompt(self, logprobs: Any, top_ids: Any, top_logprobs: Any) -> None:
        """Add log probabilities of the prompt's next tokens [T], [T, K], [T, K], if asked for."""
        output, k = self.output, self.params.prompt_logprobs
        if output.prompt_logprobs is not None:
            output.prompt_logprobs += logprobs.tolist()
        if output.prompt_top_logprobs is not None:
            pairs = zip(top_ids[:, :k].tolist(), top_logprobs[:, :k].tolist(), strict=True)
            output.prompt_top_logprobs += [dict(zip(*pair, strict=True)) for pair in pairs]

    def end(self) -> str:
        """The text that was held back, where no more tokens come."""
        if self._decoder is not None:
            self._held += self._decoder.flush()
        return self._release(0)

    def _release(self, keep: int) -> str:
        """The held text but for its last `keep` characters, or what comes before a stop string."""
        hits = [self._held.find(stop) for stop in self.params.stop if stop in self._held]
        if hits:
            text, self._held, self.stopped = self._held[: min(hits)], "", True
        else:
            cut = len(self._held) - keep
            text, self._held = self._held[:cut], self._held[cut:]
        self.output.text += text
        return text


def _overlap(text: str, stops: tuple[str, ...]) -> int:
    """Length of the longest end of `text` that begins a stop string."""
    longest = max(map(len, stops), default=1) - 1
    sizes = range(min(longest, len(text)), 0, -1)
    return next((n for n in sizes if any(stop.startswith(text[-n:]) for stop in stops)), 0)


def best_of(drawn: list[Output], params: SamplingParams) -> list[Output]:
    """The request's n of the outputs that were drawn for it, see `SamplingParams.best_of`."""
    if params.best_of is None:
        return drawn
    best = sorted(drawn, key=lambda output: -sum(output.logprobs or ()))[: params.n]
    for sample, output in enumerate(best):
        output.sample = sample
        if params.logprobs is None:
            output.logprobs = None
    return best
