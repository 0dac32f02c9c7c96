"""What a slow phase tells about itself. The engine speaks; commands decide how it looks."""

from typing import Protocol


class Progress(Protocol):
    """Told of slow phases on rank 0; `Silent` says nothing."""

    def say(self, line: str) -> None:
        """One line about what happens now."""

    def advance(self, done: int, total: int) -> None:
        """Bytes of weights read so far, and all there are to read."""


class Silent:
    """Says nothing: for libraries, and for ranks other than 0."""

    def say(self, line: str) -> None:
        pass

    def advance(self, done: int, total: int) -> None:
        pass
