"""What may come next, guessed without the model: what followed the same words before.

Prompt lookup (Saxena 2023): the last few tokens of a text are looked for earlier in it, and the tokens
that came after them there are proposed. `ops/speculation.py` keeps those that the model would choose.
"""

from collections.abc import Sequence

LONGEST = 3  # tokens that must have come before, at most
PATIENCE = 8  # steps without a proposal, after one of which nothing was right


class PromptLookup:
    """Proposals for one text that grows.

    How many tokens it proposes follows what became of the last ones: one more where all were right, half
    where some were not, none for a while where none was.
    """

    def __init__(self, most: int):
        self._most, self._limit, self._rest = most, most, 0
        self._seen: list[dict[tuple[int, ...], int]] = [{} for _ in range(LONGEST)]
        self._read = 0  # tokens whose ends are in _seen
        self.drafted = self.accepted = 0

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
        self.drafted += drafted
        self.accepted += accepted
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
