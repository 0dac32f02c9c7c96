"""Drafted tokens: what followed the last time that a text said what it says now.

Knows tokens only. A draft is verified in one step with the token before it, and kept as far as the sampler chooses the
same; so it changes how long an answer takes, never the answer. Looking up costs a few dictionary entries a token.
"""

from collections.abc import Iterable

LONGEST, SHORTEST = 4, 2
"""Tokens at the end of a text that have to agree with an earlier place, the longest agreement first."""

MOST_DRAFTED = 15
"""At a time; what a cache can take back."""


class Lookup:
    """A text, and where each run of two to four tokens stands in it, the latest place but the end itself."""

    def __init__(self, tokens: Iterable[int] = ()) -> None:
        self._tokens: list[int] = []
        # By length of run: the place behind it.
        self._places: list[dict[tuple[int, ...], int]] = [{} for _ in range(SHORTEST, LONGEST + 1)]
        self._match = self.agreeing = 0
        """`agreeing`: how many tokens at the end agree with an earlier place, as far as that is looked at; or 0."""
        for token in tokens:
            self.push(token)

    def push(self, token: int) -> None:
        """The next token of the text."""
        tokens = self._tokens
        tokens.append(token)
        end = len(tokens)
        self.agreeing = 0
        for length, places in enumerate(self._places, SHORTEST):
            if length > end:
                break
            run = tuple(tokens[-length:])
            place = places.get(run)
            if place is not None:
                self._match, self.agreeing = place, length
            places[run] = end

    def propose(self, count: int) -> list[int]:
        """Up to `count` tokens that may follow; none where nothing agrees.

        Where the earlier place is so near that its continuation runs into the end, it goes on with the draft itself.
        """
        if not self.agreeing:
            return []
        draft = self._tokens[self._match : self._match + count]
        period = len(draft)
        while len(draft) < count:
            draft.append(draft[-period])
        return draft


_WORTH = 0.4
"""Drafts have to bring so many tokens a step, on average, to go on: a step of a few tokens takes so much longer."""

_HOPE = 1.0
"""What a first draft is expected to bring."""

_CHEAP = 7
"""Drafts that a step takes beside its token while reading weights is most of its time; more must be nearly certain."""

_PATIENCE, _MOST_PATIENCE = 8, 128
"""Chances that are let go by before drafts that did not pay are tried again, at first and at most."""


class Drafter:
    """Drafts for one request, more of them where they pay and few where they do not.

    For each length of agreement it keeps a moving average of the tokens that a draft brought. A draft is a little
    longer than what is expected of it, up to `most`.
    """

    def __init__(self, most: int, tokens: Iterable[int] = ()) -> None:
        self.most = most
        self.lookup = Lookup(tokens)
        self.drafted = self.accepted = 0
        """Tokens so far."""
        self._expected = [_HOPE] * (LONGEST + 1)
        self._pause = [0] * (LONGEST + 1)
        self._patience = [_PATIENCE] * (LONGEST + 1)
        self._agreeing = 0

    def push(self, token: int) -> None:
        """The next token of the text."""
        self.lookup.push(token)

    def propose(self, most: int) -> list[int]:
        """Up to `most` tokens that may follow, none where that would not pay. `verified` must be told of them."""
        agreeing = self.lookup.agreeing
        most = min(most, self.most)
        if not agreeing or most < 1:
            return []
        if self._pause[agreeing]:
            self._pause[agreeing] -= 1
            return []
        self._agreeing = agreeing
        expected = self._expected[agreeing]
        return self.lookup.propose(min(most if expected > _CHEAP - 1 else _CHEAP, most, 1 + round(2 * expected)))

    def verified(self, drafted: int, accepted: int) -> None:
        """So many of the tokens proposed last were looked at, and so many of these were right."""
        self.drafted += drafted
        self.accepted += accepted
        agreeing = self._agreeing
        expected = self._expected[agreeing]
        expected += (accepted - expected) * (0.5 if accepted > expected else 0.25)
        if expected >= _WORTH:
            self._patience[agreeing] = _PATIENCE
        else:
            # One short draft after the pause decides whether it goes on.
            self._pause[agreeing] = self._patience[agreeing]
            self._patience[agreeing] = min(2 * self._patience[agreeing], _MOST_PATIENCE)
            expected = min(expected, _WORTH / 2)
        self._expected[agreeing] = expected
