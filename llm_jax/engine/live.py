"""What the engine knows of a request besides the scheduler, and what it tells the caller."""

import collections
import dataclasses
from collections.abc import Callable

import numpy as np

from llm_jax.engine.beams import Search
from llm_jax.engine.drafts import DraftLength, PromptLookup
from llm_jax.engine.plan import Row
from llm_jax.engine.structured import GrammarState
from llm_jax.engine.taps import Recorder
from llm_jax.infer.replies import Output, Reply
from llm_jax.ops.sampling import SamplingFeatures
from llm_jax.ops.sampling_params import SamplingParams
from llm_jax.ops.taps import Taps


@dataclasses.dataclass(frozen=True)
class Delta:
    """What a step added to one continuation of a request."""

    id: str  # of the request
    sample: int
    text: str  # may be empty: half a character, or what may become a stop string
    token_ids: tuple[int, ...]
    finish_reason: str | None  # set where it is the continuation's last
    output: Output  # the continuation, which grows


@dataclasses.dataclass
class Live:
    """What the engine knows of a request besides the scheduler."""

    params: SamplingParams
    tier: SamplingFeatures
    stop_ids: tuple[int, ...]
    stream: int  # names the random stream of a request without a seed
    shard: int
    replies: list[Reply]
    on_text: Callable[[Delta], None] | None
    left: int  # continuations that have not ended
    mask: np.ndarray | None  # [W] uint32, the tokens that may ever come
    grammars: list[GrammarState]  # of each continuation, if they are to have a form
    drafts: list[PromptLookup | DraftLength]  # likewise, if drafts are made
    search: Search | None  # its sequences are beams then, and its continuations what that finds
    taps: Taps | None
    recorders: list[Recorder]  # of each continuation, if something is recorded

    @property
    def asked(self) -> tuple[str, ...]:
        """What is not asked for by most requests; see `LiveRequests.some`."""
        given = {name: getattr(self, name) for name in ("grammars", "search", "taps")}
        given |= {"mask": self.mask is not None}
        given |= {"prompt_logprobs": self.params.prompt_logprobs is not None}
        return tuple(name for name, value in given.items() if value)

    def is_scored(self, row: Row) -> bool:
        """Whether log probabilities of a row's tokens are wanted: of its prompt's."""
        first = row.sequence.sample == 0 and row.start < len(row.sequence.request.prompt) - 1
        return first and self.params.prompt_logprobs is not None


class LiveRequests(dict[str, Live]):
    """By id. `some` says what any of them asks for, so that steps without it need not look for it."""

    def __init__(self):
        super().__init__()
        self._asked: collections.Counter[str] = collections.Counter()

    def __setitem__(self, id: str, live: Live) -> None:
        super().__setitem__(id, live)
        self._asked.update(live.asked)

    def __delitem__(self, id: str) -> None:
        self._asked.subtract(self[id].asked)
        super().__delitem__(id)

    def of(self, row: Row) -> Live:
        """The request of a row."""
        return self[row.sequence.request.id]

    def some(self, *names: str) -> bool:
        """Whether any request has one of these fields of `Live`, or "prompt_logprobs"."""
        return any(self._asked[name] > 0 for name in names)
