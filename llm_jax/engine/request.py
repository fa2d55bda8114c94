"""What a caller asks for, and what the scheduler knows of each sample of it.

A `Request` is fixed; it becomes `n` `Sequence`s, which the scheduler moves between its queue and the
rows of the device, and which end with a `Reason`.
"""

import dataclasses
import enum
from typing import Any


class Reason(enum.StrEnum):
    """Why a sequence ended."""

    STOP = "stop"  # a stop id or stop string
    LENGTH = "length"  # max_new_tokens
    CANCELLED = "cancelled"
    DEADLINE = "deadline"
    ERROR = "error"


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt and what to make of it. The scheduler checks it (`Scheduler.add`)."""

    id: str
    prompt: tuple[int, ...]
    max_new_tokens: int
    n: int = 1  # independent samples, or the beams of a search
    priority: int = 0  # higher is sooner
    deadline: float | None = None  # seconds, on the scheduler's clock
    adapter: str | None = None  # prefixes are shared only within one adapter
    reuse_prefix: bool = True  # False: neither takes pages from the prefix cache nor leaves any there
    search: bool = False  # its sequences go on together, by `Scheduler.extend`
    params: Any = None  # the engine's own (sampling and so on); the scheduler does not look


@dataclasses.dataclass(slots=True, eq=False)
class Sequence:
    """One sample of a request on its way. Changed by the scheduler alone, but for `draft`."""

    request: Request
    sample: int  # 0..n-1
    rank: tuple[float, int, int]  # lower goes first: see Scheduler
    tokens: list[int]  # the prompt and the generated tokens known to the host
    pages: list[list[int]]  # ids by pool, in order of position; -1: slid out of the pool's window
    pending: int = 0  # tokens at most that planned steps sample and no commit has brought
    computed: int = 0  # tokens whose keys and values are in pages, or will be after the planned steps
    slot: int = -1  # row of per-sequence device state; -1 when not running
    draft: list[int] = dataclasses.field(default_factory=list)  # for the next step, by the engine
    finished: Reason | None = None
    # The scheduler's own:
    fresh: bool = True  # no row of it was planned in this slot yet
    verifying: Any = None  # the planned row with drafts whose commit is awaited
    node: Any = None  # where the prefix cache goes on from for it
    kept: int = 0  # its leading pages that the prefix cache has seen
    host: list[list[int]] = dataclasses.field(default_factory=list)  # `pages` while offloaded
    siblings: list["Sequence"] = dataclasses.field(default_factory=list)  # begin when its prompt is done
    spare: list[int] = dataclasses.field(default_factory=list)  # slots held for the siblings

    @property
    def length(self) -> int:
        """Tokens, known or pending."""
        return len(self.tokens) + self.pending

    @property
    def key(self) -> tuple[str, int]:
        """Its name among the live ones: the request's id, the sample."""
        return self.request.id, self.sample

    @property
    def generated(self) -> list[int]:
        """The known tokens after the prompt."""
        return self.tokens[len(self.request.prompt) :]
