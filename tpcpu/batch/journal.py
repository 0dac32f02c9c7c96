"""The journal: which answers have begun, with what seed, and which tokens they have so far.

A file of records, one a line, each behind the checksum of its bytes. The first one says which job this is. Records are
only ever appended; whatever is torn or wrong at the end (a process killed, power lost) is cut off with all that
follows, and costs the tokens of that moment, which are chosen again. Now and then what is over is left out, in a new
file that takes the place of the old one whole.

Knows records and bytes. What writes and syncs them is `store`.
"""

import json
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tpcpu.sampling import Sampled

Record = Mapping[str, Any]

VERSION = 1


@dataclass
class Begun:
    """An answer that has begun: the seed that it was given, and what was chosen so far."""

    seed: int
    answered: list[Sampled] = field(default_factory=list)


@dataclass
class Content:
    """What a journal tells."""

    header: Mapping[str, Any] | None = None
    begun: dict[int, Begun] = field(default_factory=dict)
    """By number of line."""
    sizes: Mapping[Any, Any] = field(default_factory=dict)
    """Bytes of the other files that were on disk, at least."""
    end: Mapping[Any, Any] | None = None
    """Said when all was done."""


def encode(record: Record) -> bytes:
    """A record as it stands in the file."""
    text = json.dumps(record, separators=(",", ":")).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def decode(data: bytes) -> list[dict[str, Any]]:
    """The records at the beginning of `data`, up to the first that is not whole."""
    records = []
    start = 0
    while (end := data.find(b"\n", start)) >= 0:
        checksum, _, text = data[start:end].partition(b" ")
        if checksum != b"%08x" % zlib.crc32(text):
            break
        records.append(json.loads(text))
        start = end + 1
    return records


def header(job: Record) -> dict[str, Any]:
    """The first record."""
    return {"tpcpu": "batch", "version": VERSION, **job}


def begun(line: int, seed: int) -> dict[str, Any]:
    """The answer to a line has begun."""
    return {"begun": line, "seed": seed}


def chosen(line: int, at: int, tokens: Sequence[Sampled]) -> dict[str, Any]:
    """Tokens of an answer, the first of which is its token number `at`, from 0."""
    record: dict[str, Any] = {"line": line, "at": at, "ids": [token.id for token in tokens]}
    if any(token.logprob is not None for token in tokens):
        record["logprobs"] = [[token.logprob, token.top_logprobs] for token in tokens]
    return record


def sizes(files: Mapping[str, int]) -> dict[str, Any]:
    """So many bytes of each file are on disk."""
    return {"sizes": dict(files)}


def end(figures: Mapping[str, Any]) -> dict[str, Any]:
    """All is done."""
    return {"end": dict(figures)}


def read(data: bytes) -> Content:
    """What the whole records of `data` tell. Without a header there is nothing."""
    content = Content()
    records = decode(data)
    if not records or records[0].get("tpcpu") != "batch":
        return content
    content.header = records[0]
    if records[0].get("version") != VERSION:
        return content
    for record in records[1:]:
        match record:
            case {"begun": int(line), "seed": int(seed)}:
                content.begun[line] = Begun(seed)
            case {"line": int(line), "at": int(at), "ids": [*ids]}:
                # A checksum that is right by chance, or a file that was edited: what follows is not to be trusted.
                if line not in content.begun or at != len(content.begun[line].answered):
                    break
                content.begun[line].answered += _sampled(ids, record.get("logprobs"))
            case {"sizes": {**files}}:
                content.sizes = files
            case {"end": {**figures}}:
                content.end = figures
            case _:
                break
    return content


def whole(job: Record, begun_answers: Mapping[int, Begun], files: Mapping[str, int]) -> bytes:
    """A new journal that tells of these answers."""
    records: list[Record] = [header(job), sizes(files)]
    for line, answer in begun_answers.items():
        records.append(begun(line, answer.seed))
        if answer.answered:
            records.append(chosen(line, 0, answer.answered))
    return b"".join(map(encode, records))


def _sampled(ids: Iterable[int], logprobs: Sequence[Any] | None) -> list[Sampled]:
    if logprobs is None:
        return [Sampled(number) for number in ids]
    return [
        Sampled(number, logprob, tuple((other, value) for other, value in top))
        for number, (logprob, top) in zip(ids, logprobs, strict=True)
    ]
