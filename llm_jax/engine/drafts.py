"""How much to draft of a text, and drafts that need no model: what followed the same words before.

`ops/speculation.py` keeps those tokens of a draft that the model would choose. A text has one of these
to itself, which learns what became of its drafts.
"""

from collections.abc import Sequence

ON_DEVICE = -1  # stands for a token that the device will have drafted
LONGEST = 3  # tokens that must have come before, at most
PATIENCE = 8  # steps without a draft, after those of which nothing was right
MEMORY = 0.9  # weight of the drafts before, at each step


class PromptLookup:
    """The last few tokens of the text are looked for earlier in it, and what came after them there is
    proposed (prompt lookup, Saxena 2023).

    How many tokens it proposes follows what became of the last ones: one more where all were right, half
    where some were not, none for a while where none was.
    """

    def __init__(self, most: int):
        self._most, self._limit, self._rest = most, most, 0
        self._seen: list[dict[tuple[int, ...], int]] = [{} for _ in range(LONGEST)]
        self._read = 0  # tokens whose ends are in _seen

    def propose(self, tokens: Sequence[int], most: int) -> list[int]:
        """Up to `most` tokens that may follow; none where nothing alike came before."""
        self._index(tokens)
        if self._rest:
            self._rest -= 1
            return []
        count = min(most, self._limit)
        for size in range(LONGEST, 0, -1):
            place = self._seen[size - 1].get(tuple(tokens[-size:]))
            if place is not None and len(tokens) >= size and count > 0:
                period = len(tokens) - place  # past the text's end it goes on with what it proposes
                return [tokens[place + i % period] for i in range(count)]
        return []

    def learn(self, drafted: int, accepted: int) -> None:
        """What became of a proposal of so many tokens."""
        if accepted == drafted:
            self._limit = min(self._limit + 1, self._most)
        else:
            self._limit = max(self._limit // 2, accepted, 1)
            self._rest = PATIENCE if accepted == 0 else 0

    def _index(self, tokens: Sequence[int]) -> None:
        """Note what follows each run of tokens; not yet of the last ones, which nothing follows."""
        for end in range(max(self._read, 1), len(tokens)):
            for size in range(1, min(LONGEST, end) + 1):
                self._seen[size - 1][tuple(tokens[end - size : end])] = end
        self._read = len(tokens)


class DraftLength:
    """How many tokens a model on the device should draft: what brings most tokens for the time.

    Drafts of n tokens of which each is right with probability a bring (1 - a^(n + 1)) / (1 - a) tokens
    for 1 + c n, where c is what a drafted token costs in steps of the model (Leviathan et al.,
    arXiv:2211.17192). a is estimated from the drafts of this text, the newest of which count most.
    """

    def __init__(self, most: int, cost: float):
        self._most, self._cost, self._rest = most, cost, 0
        self._right, self._judged = 2.0, 3.0  # to begin with

    def propose(self, tokens: Sequence[int], most: int) -> list[int]:
        """Places for up to `most` tokens; none where drafting does not pay."""
        if self._rest:
            self._rest -= 1
            return []
        best = max(range(min(most, self._most) + 1), key=self._gain)
        if not best:
            self._rest = PATIENCE
            best = min(most, 1)  # to see whether that is still so
        return [ON_DEVICE] * best

    def learn(self, drafted: int, accepted: int) -> None:
        """What became of a draft of so many tokens: those after the first wrong one say nothing."""
        self._right = MEMORY * self._right + accepted
        self._judged = MEMORY * self._judged + min(accepted + 1, drafted)

    def _gain(self, count: int) -> float:
        rate = self._right / self._judged
        return sum(rate**n for n in range(count + 1)) / (1 + self._cost * count)
