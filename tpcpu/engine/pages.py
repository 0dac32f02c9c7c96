"""Which page of the cache belongs to whom: reference counts, and pages that are kept because of what is in them.

Knows numbers of pages and the tokens in them; nothing of memory, models and requests. A page is free, in use (by one
sequence or by several that begin alike), or idle: nobody's, but its contents are known, and it is used again by a
sequence that begins with the same tokens. A page's contents depend on every token before it, so it is found by the
page before it and its own tokens, which are compared token by token: a chain from the start of the sequence. Idle
pages leave in the order of their last use, and no page leaves before those that follow it in a chain.
"""

from collections import OrderedDict
from collections.abc import Sequence

START = -1
"""Stands for the page before the first one."""

Name = tuple[int, tuple[int, ...]]
"""The page before, and the tokens of a whole page."""


class Pages:
    """`count` pages, numbered from 0, of `page_tokens` tokens each."""

    def __init__(self, count: int, page_tokens: int) -> None:
        self.count, self.page_tokens = count, page_tokens
        self.users = [0] * count
        """By page: how many sequences hold it."""
        self._names: list[Name | None] = [None] * count
        """By page: what is in it, once it is whole. All else that is known of contents follows from this."""
        self._found: dict[Name, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()
        """In the order in which they leave."""
        self._free = list(range(count - 1, -1, -1))
        self.releases = 0
        """How often a page has come back: whoever waits for one need not look again before this has changed."""

    @property
    def available(self) -> int:
        """Pages that can be taken."""
        return len(self._free) + len(self._idle)

    def take(self) -> int:
        """A page for new contents; there must be one available."""
        if not self._free:
            self._forget(next(iter(self._idle)))
        page = self._free.pop()
        self.users[page] = 1
        return page

    def match(self, tokens: Sequence[int]) -> list[int]:
        """Takes the pages that hold the beginning of `tokens`, whole ones, and leaves at least one token over."""
        found: list[int] = []
        page, size = START, self.page_tokens
        for first in range(0, len(tokens) - size, size):
            following = self._found.get((page, tuple(tokens[first : first + size])))
            if following is None:
                break
            page = following
            found.append(page)
        for page in found:
            self._use(page)
        return found

    def name(self, page: int, before: int, tokens: Sequence[int]) -> int:
        """Makes known that a page in use holds these tokens behind the page `before`, itself known or `START`.

        Gives the page to go on with: another one where these contents are known already; this one is free then.
        """
        name = before, tuple(tokens)
        known = self._found.get(name)
        if known is not None:
            self._use(known)
            self.release([page])
            return known
        self._names[page] = name
        self._found[name] = page
        return page

    def release(self, pages: Sequence[int]) -> None:
        """One of the users of these pages, in the order of a sequence, needs them no more."""
        self.releases += 1
        # From behind: what follows leaves before what it follows.
        for page in reversed(pages):
            self.users[page] -= 1
            if not self.users[page]:
                if self._names[page] is None:
                    self._free.append(page)
                else:
                    self._idle[page] = None

    def recover(self) -> None:
        """Makes all pages idle or free, after an interrupt anywhere in the methods above; contents stay known."""
        self.releases += 1
        self._found = {name: page for page, name in enumerate(self._names) if name is not None}
        self.users = [0] * self.count
        order = [page for page in self._idle if self._names[page] is not None]
        listed = set(order)
        # Those that were in use were used last. Of these, too, what follows leaves first.
        depths = {page: len(self._chain(page)) for page in self._found.values() if page not in listed}
        order += sorted(depths, key=lambda page: (-depths[page], page))
        self._idle = OrderedDict.fromkeys(order)
        self._free = [page for page in range(self.count - 1, -1, -1) if self._names[page] is None]

    def check(self, holdings: Sequence[Sequence[int]]) -> None:
        """Asserts that no page is lost or used twice, given the pages that each sequence holds."""
        users = [0] * self.count
        for pages in holdings:
            assert len(set(pages)) == len(pages), "a sequence holds a page twice"
            for page in pages:
                users[page] += 1
        assert users == self.users, "reference counts are those of the sequences"
        in_use = {page for page in range(self.count) if users[page]}
        assert len(set(self._free)) == len(self._free), "a page is free once"
        assert sorted([*self._free, *self._idle, *in_use]) == list(range(self.count)), "a page is in one place"
        assert all(self._names[page] is None for page in self._free), "what is free is forgotten"
        assert self._found == {name: page for page, name in enumerate(self._names) if name is not None}
        order = {page: place for place, page in enumerate(self._idle)}
        for page in self._found.values():
            before = (self._names[page] or (START,))[0]
            if before != START:
                assert self._names[before] is not None, "what is before a known page is known"
                assert users[before] or page in order, "what is in use has its whole beginning in use"
                assert users[before] or order[page] < order[before], "what follows leaves first"
        assert all(self._names[page] is not None for page in self._idle), "what is idle is known"
        for pages in holdings:
            for before, page in zip([START, *pages], pages, strict=False):
                name = self._names[page]
                # A shared page is a known one, and sequences that share it share all before it.
                assert name is not None or users[page] == 1, "only known pages are shared"
                assert name is None or name[0] == before, "a sequence's known pages are a chain"

    def _use(self, page: int) -> None:
        if not self.users[page]:
            self._idle.pop(page, None)
        self.users[page] += 1

    def _forget(self, page: int) -> None:
        # The name first: an interrupt must find the page either known with its contents whole, or not known.
        name = self._names[page]
        assert name is not None
        self._names[page] = None
        del self._found[name]
        del self._idle[page]
        self._free.append(page)

    def _chain(self, page: int) -> list[int]:
        chain = []
        while page != START:
            chain.append(page)
            page = (self._names[page] or (START,))[0]
        return chain
