"""From sampled tokens to what a caller sees: texts that end where they should.

A `Reply` follows one sequence: it decides where the text ends (a stop id, a stop string), holds text
back while it may still become a stop string, and keeps log probabilities.
"""

import dataclasses
from collections.abc import Sequence

from llm_jax.data.detokenize import StreamingDecoder
from llm_jax.infer.llm import Output
from llm_jax.ops.sampling_params import SamplingParams


@dataclasses.dataclass(frozen=True)
class Delta:
    """What a step added to one continuation of a request."""

    id: str  # of the request
    sample: int
    text: str  # may be empty: half a character, or what may become a stop string
    token_ids: tuple[int, ...]
    finish_reason: str | None  # set where it is the continuation's last
    output: Output  # the continuation, which grows


class Reply:
    """One continuation on its way into its `Output`."""

    def __init__(
        self,
        output: Output,
        params: SamplingParams,
        stop_ids: Sequence[int],
        decoder: StreamingDecoder | None,
    ):
        self.output, self.params, self.stopped = output, params, False
        self._stop_ids, self._decoder, self._held = frozenset(stop_ids), decoder, ""
        if params.logprobs is not None:
            output.logprobs = []
            output.top_logprobs = [] if params.logprobs else None
        if params.prompt_logprobs is not None:
            output.prompt_logprobs = [None]
            output.prompt_top_logprobs = [None] if params.prompt_logprobs else None

    def take(self, token: int, logprob: float | None = None, top: dict[int, float] | None = None) -> str:
        """Add a token; returns the text that may be shown now. `stopped` says if it was the last."""
        output = self.output
        output.token_ids.append(token)
        if output.logprobs is not None:
            assert logprob is not None, "the step had no log probabilities"
            output.logprobs.append(logprob)
        if output.top_logprobs is not None:
            assert top is not None, "the step had no log probabilities"
            output.top_logprobs.append(top)
        self.stopped = token in self._stop_ids
        if self._decoder is None:
            return ""
        if not self.stopped:
            self._held += self._decoder.push(token)
        if self.stopped or len(output.token_ids) >= self.params.max_new_tokens:
            return self.end()
        return self._release(_overlap(self._held, self.params.stop))

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
