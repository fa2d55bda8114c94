"""What a beam search is asked for, and what it refuses: host only, no arrays.

The search of a fixed batch is infer/beam.py, that of the engine engine/beams.py.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal

from llm_jax.ops.sampling_params import SamplingParams


@dataclasses.dataclass(frozen=True)
class BeamOptions:
    """How to search.

    Attributes:
        num_beams: K, continuations kept at each step; 1 is greedy search.
        num_return: hypotheses wanted of each prompt, at most num_beams.
        length_penalty: above 0 favours long continuations, below 0 short ones; 0 takes plain sums.
        early_stopping: True ends a prompt as soon as K hypotheses are finished; False when the best
            beam, scored at its present length, does not pass the worst of them; "never" when it
            could not at any length up to max_new_tokens.

    Raises:
        ValueError: a field is out of its range; the message names it.
    """

    num_beams: int
    num_return: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False

    def __post_init__(self):
        if not isinstance(self.num_beams, int) or self.num_beams < 1:
            raise ValueError(
                f"num_beams={self.num_beams!r}: expected an integer of at least 1 (greedy search)"
            )
        if not 1 <= self.num_return <= self.num_beams:
            raise ValueError(
                f"num_return={self.num_return}: expected 1 to num_beams={self.num_beams}; "
                "widen the search for more"
            )
        if not isinstance(self.length_penalty, int | float) or not math.isfinite(self.length_penalty):
            raise ValueError(
                f"length_penalty={self.length_penalty!r}: expected a finite number; 0 is off"
            )
        if not isinstance(self.early_stopping, bool) and self.early_stopping != "never":
            raise ValueError(f"early_stopping={self.early_stopping!r}: expected True, False or 'never'")


def check_searchable(sampling: Sequence[SamplingParams]) -> None:
    """Refuse requests for what `generate` can do and a search cannot; ValueError names the field."""
    ids_only = "beam search ends at ids only; use stop_ids"
    chosen_only = "beam search gives those of the chosen tokens, without alternatives; use 0"
    for p in sampling:
        for refused, name, reason in (
            (not p.greedy, "temperature", "beam search does not sample; use 0"),
            (p.top_k > 0, "top_k", "beam search does not sample; use 0"),
            (p.top_p < 1, "top_p", "beam search does not sample; use 1"),
            (p.min_p > 0, "min_p", "beam search does not sample; use 0"),
            (p.typical_p < 1, "typical_p", "beam search does not sample; use 1"),
            (p.n > 1, "n", "beam search does not sample; use num_return"),
            (p.best_of is not None, "best_of", "beam search does not sample; use num_beams"),
            (p.stop, "stop", ids_only),
            (p.logprobs, "logprobs", chosen_only),
            (p.prompt_logprobs is not None, "prompt_logprobs", "beam search does not give them"),
            (p.structured, "structured", "beam search keeps to no form; use None"),
        ):
            if refused:
                raise ValueError(f"SamplingParams.{name} is {getattr(p, name)!r}: {reason}")
