"""Which implementation of an operation runs."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Choice:
    """ "pallas" or "xla", and why. possible: whether the kernel could run all the same."""

    implementation: str
    reason: str
    possible: bool = False
