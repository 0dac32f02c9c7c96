"""A vocabulary that the tokenizers library holds: byte-level BPE, and what is like SentencePiece.

Text to ids is the library's. Ids to bytes is read from its `decoder`, because a library decoder works on whole
lists: a token of a ByteLevel decoder is bytes in a disguise of printable characters, a token of a
Replace/ByteFallback/Metaspace decoder is text in which U+2581 stands for a space, or one byte. Other decoders are
refused, with their names.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import tokenizers

from tpcpu.errors import TextError
from tpcpu.text.added_tokens import AddedToken
from tpcpu.text.vocabulary import Vocabulary, byte_of


def read_tokenizer_json(path: Path) -> tokenizers.Tokenizer:
    """The file tokenizer.json, the library's own format. Raises TextError."""
    try:
        library = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise TextError(f"{path}: cannot be read: {error.strerror}") from None
    except Exception as error:  # the library raises bare Exception
        raise TextError(f"{path}: is no tokenizer that the tokenizers library reads: {error}") from None
    # a file written by a training script may cut or fill: a prompt is never cut in silence
    library.no_truncation()
    library.no_padding()
    return library


class LibraryVocabulary(Vocabulary):
    """What `path` holds, with the added tokens that tokenizer_config.json declares beyond it."""

    def __init__(self, library: tokenizers.Tokenizer, path: Path, added: Iterable[AddedToken] = ()) -> None:
        """Raises TextError, which names `path`, where the decoder is of an unknown kind or `added` contradicts it."""
        self._library = library
        # what pickling writes is the file's own JSON of the decoder: no second parse of some megabytes
        decoder = self._library.decoder
        self._read_decoder(None if decoder is None else json.loads(decoder.__getstate__()), path)
        self._add_missing(added, path)
        self._added = self._library.get_added_tokens_decoder()
        self.size = 1 + max(max(self._library.get_vocab().values(), default=-1), max(self._added, default=-1))
        if self.size == 0:
            raise TextError(f"{path}: holds no tokens; expected a vocabulary")
        self.default_prefix = self._probe_prefix()

    def _add_missing(self, added: Iterable[AddedToken], path: Path) -> None:
        known: dict[str, int | None] = {
            token.content: number for number, token in self._library.get_added_tokens_decoder().items()
        }
        for token in added:
            if token.content not in known and token.behind is not None:
                continue  # of a SentencePiece file
            if token.content not in known:
                library_token = tokenizers.AddedToken(
                    token.content,
                    single_word=token.single_word,
                    lstrip=token.lstrip,
                    rstrip=token.rstrip,
                    normalized=token.normalized,
                )
                if token.special:
                    self._library.add_special_tokens([library_token])
                else:
                    self._library.add_tokens([library_token])
                known[token.content] = self._library.token_to_id(token.content)
            if token.id is not None and known[token.content] != token.id:
                raise TextError(
                    f"{path}: {token.content!r} is token {known[token.content]}, but tokenizer_config.json says "
                    f"{token.id}: take both files from the same place"
                )

    def _probe_prefix(self) -> tuple[int, ...]:
        """What the file's post-processor puts before a text, found by trying."""
        plain = self._library.encode("a", add_special_tokens=False).ids
        dressed = self._library.encode("a").ids
        for start in range(len(dressed) - len(plain) + 1):
            if dressed[start : start + len(plain)] == plain:
                return tuple(dressed[:start])
        return ()

    def _read_decoder(self, decoder: Any, path: Path) -> None:
        self._byte_level = self._byte_fallback = self.strips_leading_space = False
        self._replacements: list[tuple[str, str]] = []
        for step in _flatten(decoder):
            match step:
                case {"type": "ByteLevel"}:
                    self._byte_level = True
                case {"type": "ByteFallback"}:
                    self._byte_fallback = True
                case {"type": "Fuse"}:
                    pass
                case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)}:
                    self._replacements.append((old, new))
                case {"type": "Metaspace", "replacement": str(old)}:
                    self._replacements.append((old, " "))
                    self.strips_leading_space = step.get("prepend_scheme", "always") != "never"
                case {"type": "Strip", "content": " ", "start": 0 | 1 as start, "stop": 0}:
                    self.strips_leading_space = start == 1
                case _:
                    raise TextError(
                        f"{path}: decoder {json.dumps(step, ensure_ascii=False)[:80]} is not supported; expected "
                        "ByteLevel, or Replace, ByteFallback, Fuse, Strip of one leading space, Metaspace; if "
                        "the model has a tokenizer.model, remove tokenizer.json"
                    )
        if not (self._byte_level or self._replacements):
            raise TextError(
                f"{path}: has no decoder that says how tokens become text; expected ByteLevel, Replace or Metaspace"
            )

    def encode(self, text: str) -> list[int]:
        return list(self._library.encode(text, add_special_tokens=False).ids)

    def piece(self, token_id: int) -> bytes:
        added = self._added.get(token_id)
        if added is not None:
            return str(added.content).encode()
        token = self._library.id_to_token(token_id)
        if token is None:
            return b""
        if self._byte_level and all(character in _BYTES for character in token):
            return bytes(_BYTES[character] for character in token)
        if self._byte_fallback and (byte := byte_of(token)) is not None:
            return byte
        for old, new in self._replacements:
            token = token.replace(old, new)
        return str(token).encode()

    def special(self, token_id: int) -> str | None:
        added = self._added.get(token_id)
        return str(added.content) if added is not None and added.special else None

    def id_of(self, token: str) -> int | None:
        found = self._library.token_to_id(token)
        return None if found is None else int(found)


def _flatten(decoder: Any) -> list[Any]:
    if isinstance(decoder, dict) and decoder.get("type") == "Sequence":
        return [step for part in decoder.get("decoders", []) for step in _flatten(part)]
    return [] if decoder is None else [decoder]


def disguise(token: bytes) -> str:
    """A token of a byte-level vocabulary as the library holds it."""
    return "".join(map(_CHARACTERS.__getitem__, token))


def _printable_bytes() -> dict[str, int]:
    """GPT-2's disguise: bytes that print stand for themselves, the others get U+0100 and on, in order."""
    printing = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printing]
    return {chr(byte): byte for byte in printing} | {chr(0x100 + place): byte for place, byte in enumerate(others)}


_BYTES = _printable_bytes()
_CHARACTERS = {byte: character for character, byte in _BYTES.items()}
