"""tokenizer.model: SentencePiece with special strings, as transformers' slow Llama tokenizer reads it.

The special strings live beside or even inside the SentencePiece model, but no merge reaches them: a text is cut at
them first and SentencePiece sees each remaining part alone. `legacy` decides what it does with the dummy prefix (the
space that SentencePiece puts before a text): legacy, each part gets one; otherwise only the first part of the text
does. Token 0 of the published models is `<unk>`, which no text reaches, because unknown characters fall back to
bytes.
"""

from collections.abc import Iterable
from pathlib import Path

import sentencepiece

from tpcpu.errors import TextError
from tpcpu.text.added_tokens import AddedToken, Cutter
from tpcpu.text.vocabulary import Vocabulary, byte_of

_SPACE = "▁"
# ModelProto.normalizer_spec.add_dummy_prefix = false, serialised. Appended to a serialised model it overrides that
# one field: protobuf merges repeated messages, and the last value of a scalar wins. It saves a dependency on
# protobuf.
_NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"


class SentencePieceModel(Vocabulary):
    """The file tokenizer.model with its added tokens."""

    default_prefix = ()

    def __init__(self, path: Path, added: Iterable[AddedToken], legacy: bool, add_prefix_space: bool = True) -> None:
        """Reads `path`. Added tokens without an id keep the id of their piece, or get the next free one, in order.

        Raises TextError where the file is no SentencePiece model or an id is given twice.
        """
        try:
            model = path.read_bytes()
        except OSError as error:
            raise TextError(f"{path}: cannot be read: {error.strerror}") from None
        self._processor = _load(path, model if legacy else model + _NO_DUMMY_PREFIX)
        self._pieces = self._processor.get_piece_size()
        self._legacy = legacy
        self._prefix_space = add_prefix_space and not legacy
        self._unknown = self._processor.id_to_piece(max(self._processor.unk_id(), 0))
        self._unknown_length = len(self._processor.encode(self._unknown)) if not legacy else 0
        self._added: dict[int, AddedToken] = {}
        self._ids: dict[str, int] = {}
        self.size = self._pieces
        for token in added:
            self._register(token, path)
        self._cutter = Cutter(self._added.values())
        dummy_prefix = self._processor.encode("a", out_type=str)[:1]
        self.strips_leading_space = self._prefix_space or any(piece.startswith(_SPACE) for piece in dummy_prefix)

    def _register(self, token: AddedToken, path: Path) -> None:
        token_id = token.id
        if token_id is None and token.behind is not None:
            token_id = self._pieces + token.behind
        if token_id is None:
            token_id = self._piece_id(token.content)
        if token_id is None:
            token_id = self.size
        known = self._added.get(token_id)
        if known is not None and known.content != token.content:
            raise TextError(
                f"{path}: token id {token_id} is both {known.content!r} and {token.content!r}: expected one"
            )
        self._added[token_id] = token
        self._ids[token.content] = token_id
        self.size = max(self.size, token_id + 1)

    def _piece_id(self, piece: str) -> int | None:
        found = self._processor.piece_to_id(piece)
        return found if 0 <= found < self._pieces and self._processor.id_to_piece(found) == piece else None

    def encode(self, text: str) -> list[int]:
        if self._prefix_space and text:
            text = _SPACE + text.replace(_SPACE, " ")
        parts = self._cutter.cut(text)
        if self._prefix_space and len(parts) > 1 and parts[0] == _SPACE and isinstance(parts[1], AddedToken):
            # a text that begins with a special string has no first part to carry the dummy prefix
            parts = parts[1:] if parts[1].special else parts
        ids: list[int] = []
        for part in parts:
            if isinstance(part, AddedToken):
                ids.append(self._ids[part.content])
            else:
                ids.extend(self._encode_part(part))
        return ids

    def _encode_part(self, part: str) -> list[int]:
        if self._legacy or not part.startswith((_SPACE, " ")):
            return list(self._processor.encode(part))
        # SentencePiece may treat a leading space specially; behind another token it is an ordinary one
        return list(self._processor.encode(self._unknown + part))[self._unknown_length :]

    def piece(self, token_id: int) -> bytes:
        added = self._added.get(token_id)
        if added is not None:
            return added.content.encode()
        if token_id >= self._pieces or self._processor.is_control(token_id):
            return b""
        piece = str(self._processor.id_to_piece(token_id))
        if self._processor.is_byte(token_id) and (byte := byte_of(piece)) is not None:
            return byte
        return piece.replace(_SPACE, " ").encode()

    def special(self, token_id: int) -> str | None:
        added = self._added.get(token_id)
        if added is not None:
            return added.content if added.special else None
        if token_id < self._pieces and (self._processor.is_control(token_id) or self._processor.is_unknown(token_id)):
            return str(self._processor.id_to_piece(token_id))
        return None

    def id_of(self, token: str) -> int | None:
        found = self._ids.get(token)
        return self._piece_id(token) if found is None else found


def _load(path: Path, model: bytes) -> sentencepiece.SentencePieceProcessor:
    processor = sentencepiece.SentencePieceProcessor()
    try:
        # an empty file is a valid empty message: SentencePiece would load nothing and say nothing
        if len(model) > len(_NO_DUMMY_PREFIX):
            processor.LoadFromSerializedProto(model)
            pieces = processor.get_piece_size()
            # a damaged file may load and hold pieces that are no text: reading all takes 23 ms for 135,000
            if pieces and processor.id_to_piece(list(range(pieces))):
                return processor
    except (RuntimeError, ValueError):
        pass
    raise TextError(
        f"{path}: {len(model)} bytes that are no SentencePiece model; expected the published tokenizer.model "
        "(a file of some hundred bytes is often a Git LFS pointer: fetch the real one)"
    )
