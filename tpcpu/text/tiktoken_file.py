"""tiktoken files: a byte-level BPE as lines of a token in base64 and its rank, which is its id.

The file says neither where a text is cut into words nor which tokens are special: `Words` says the first, a
publisher's rules the second. Text to ids is the tokenizers library's, for which every pair of tokens that makes up a
third is a merge. Where two such pairs of one token overlap, `aa a` and `a aa`, tiktoken takes the first in the text and
the library the one whose left part has the lower rank; ids of ordinary text are the same.
"""

import base64
import binascii
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from tpcpu.errors import TextError
from tpcpu.text.library_vocabulary import disguise

_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} [0-9]+")


@dataclass(frozen=True)
class Words:
    """How a publisher cuts texts: what a word is, and whether characters are composed (NFC) before."""

    pattern: str
    compose: bool = False


def is_tiktoken(path: Path) -> bool:
    """Whether the file begins with a line of a token and its rank."""
    try:
        with path.open("rb") as file:
            return _LINE.fullmatch(file.readline(1000).strip()) is not None
    except OSError:
        return False


def read_tiktoken(path: Path, words: Words) -> tokenizers.Tokenizer:
    """The vocabulary in `path`. Raises TextError, with the line, where it is none."""
    ranks = _read_ranks(path)
    missing = [byte for byte in range(256) if bytes((byte,)) not in ranks]
    if missing:
        raise TextError(f"{path}: has no token for the byte 0x{missing[0]:02x}; expected one for each of 256")
    names = {token: disguise(token) for token in ranks}
    merges = [(names[left], names[right]) for left, right in _merges(ranks)]
    vocabulary = {names[token]: rank for token, rank in ranks.items()}
    # a word that is a token as a whole is not merged at all, as in tiktoken
    model = models.BPE(vocab=vocabulary, merges=merges, fuse_unk=False, ignore_merges=True)
    library = tokenizers.Tokenizer(model)
    if words.compose:
        library.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(tokenizers.Regex(words.pattern), "isolated")
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.pre_tokenizer = pre_tokenizers.Sequence([split, as_bytes])
    library.decoder = decoders.ByteLevel()
    return library


def _read_ranks(path: Path) -> dict[bytes, int]:
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise TextError(f"{path}: cannot be read: {error.strerror}") from None
    ranks: dict[bytes, int] = {}
    seen: set[int] = set()
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            if not _LINE.fullmatch(line):
                raise ValueError
            text, rank = line.split()
            token, rank_number = base64.b64decode(text, validate=True), int(rank)
        except (ValueError, binascii.Error):
            raise TextError(
                f"{path}: line {number} is {line[:60]!r}; expected a token in base64 and its rank"
            ) from None
        if token in ranks or rank_number in seen:
            raise TextError(f"{path}: line {number}: token {token!r} or its rank {rank_number} stands there before")
        ranks[token] = rank_number
        seen.add(rank_number)
    gap = next((rank for rank in range(len(seen)) if rank not in seen), None)
    if gap is not None:
        raise TextError(f"{path}: has no token of rank {gap}, but of {max(seen)}; expected ranks without a gap")
    return ranks


def _merges(ranks: dict[bytes, int]) -> Iterator[tuple[bytes, bytes]]:
    """Every pair of tokens that is a token together, by the rank of that, then by those of the pair."""
    for token in sorted(ranks, key=ranks.__getitem__):
        pairs = []
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in ranks and right in ranks:
                pairs.append((ranks[left], ranks[right], left, right))
        for _, _, left, right in sorted(pairs):
            yield left, right
