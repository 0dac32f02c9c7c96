"""What a Tokenizer needs of a tokenizer file, whatever its kind.

A token stands for a run of bytes that does not depend on its neighbours. That holds for every kind of file read here
(byte-level BPE, SentencePiece with byte fallback) and is what makes exact incremental decoding simple: bytes are
joined, and UTF-8 says where characters end.
"""

import re
from abc import ABC, abstractmethod

_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Vocabulary(ABC):
    """A tokenizer file: text to ids, ids to bytes. Knows no BOS, no roles and no chat."""

    size: int
    """One more than the largest id that has a token."""

    strips_leading_space: bool
    """Whether a decoded text loses one leading space, the dummy prefix that encoding put there."""

    default_prefix: tuple[int, ...]
    """Ids that the file itself says begin every text."""

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Ids of `text`, in which the strings of added tokens count; nothing is put at either end."""

    @abstractmethod
    def piece(self, token_id: int) -> bytes:
        """The UTF-8 bytes that `token_id`, 0 <= token_id < size, adds to a text; b"" for an id without a token."""

    @abstractmethod
    def special(self, token_id: int) -> str | None:
        """The string of a special token (nothing of it is shown in an answer), None for any other token."""

    @abstractmethod
    def id_of(self, token: str) -> int | None:
        """The id of a whole token, None where there is none."""


def byte_of(piece: str) -> bytes | None:
    """The byte that a byte-fallback piece such as `<0x0A>` stands for, None for any other piece."""
    match = _BYTE_PIECE.fullmatch(piece)
    return bytes((int(match[1], 16),)) if match else None
