"""The tokenizer that a GGUF file carries, as the files that a Hugging Face folder has.

SentencePiece vocabularies become `tokenizer.model`, byte-pair ones `tokenizer.json`. How a text is cut before pairs are
merged has only a name in GGUF: the names of `_CUTS` are known, and others are refused. A tokenizer beside the GGUF file
counts before the one in it.
"""

import json
import struct
from pathlib import Path
from typing import Any

from tpcpu.errors import CheckpointError

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
_BESIDE = ("tokenizer.json", "tokenizer.model")
_SIDE_FILES = (*_BESIDE, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
               "generation_config.json")  # fmt: skip

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CUTS = {
    "gpt-2": None, "gpt2": None,
    "llama-bpe": _LLAMA3, "llama3": _LLAMA3, "llama-v3": _LLAMA3, "smaug-bpe": _LLAMA3,
    "qwen2": _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}"),
}  # fmt: skip
"""Where texts are cut, by GGUF's names; None: as GPT-2 did."""


def files(path: Path, metadata: dict[str, Any]) -> dict[str, bytes]:
    """The tokenizer's files of the GGUF file `path`. Raises CheckpointError for what is missing or not known."""
    if any((path.parent / name).is_file() for name in _BESIDE):
        return {name: (path.parent / name).read_bytes() for name in _SIDE_FILES if (path.parent / name).is_file()}
    return _Carried(path, metadata).files()


class _Carried:
    def __init__(self, path: Path, metadata: dict[str, Any]) -> None:
        self._path, self._metadata = path, metadata
        self.kind = self._get("model", str)
        self.tokens: list[str] = self._list("tokens", str)
        self.types: list[int] = self._list("token_type", int, [_NORMAL] * len(self.tokens))

    def files(self) -> dict[str, bytes]:
        made = {"tokenizer_config.json": json.dumps(self._settings(), indent=2, ensure_ascii=False).encode()}
        match self.kind:
            case "llama":
                made["tokenizer.model"] = self._sentencepiece()
            case "gpt2":
                made["tokenizer.json"] = json.dumps(self._byte_pairs(), ensure_ascii=False).encode()
            case _:
                raise self._fault(f"model is {self.kind!r:.80}; read are llama and gpt2")
        return made

    def _fault(self, what: str) -> CheckpointError:
        return CheckpointError(
            f"{self._path}: tokenizer.ggml.{what}: put the tokenizer.json of the published model beside the file"
        )

    def _get(self, key: str, kind: type, default: Any = None) -> Any:
        value = self._metadata.get(f"tokenizer.ggml.{key}", default)
        if type(value) is not kind:
            raise self._fault(f"{key} is {'missing' if value is None else f'{value!r:.80}'}")
        return value

    def _list(self, key: str, kind: type, default: Any = None) -> list[Any]:
        values: list[Any] = self._get(key, list, default)
        if key != "merges" and key != "tokens" and len(values) != len(self.tokens):
            raise self._fault(f"{key} has {len(values)} entries for {len(self.tokens)} tokens")
        if not all(type(value) is kind for value in values):
            raise self._fault(f"{key} holds other things than {kind.__name__}")
        return values

    def _role(self, key: str) -> str | None:
        number = self._metadata.get(f"tokenizer.ggml.{key}_token_id")
        return self.tokens[number] if type(number) is int and 0 <= number < len(self.tokens) else None

    def _special(self) -> dict[int, str]:
        return {i: self.tokens[i] for i, kind in enumerate(self.types) if kind in (_CONTROL, _USER_DEFINED)}

    def _settings(self) -> dict[str, Any]:
        spm = self.kind == "llama"
        settings: dict[str, Any] = {
            "tokenizer_class": "LlamaTokenizer" if spm else "PreTrainedTokenizerFast",
            "added_tokens_decoder": {
                str(number): {
                    "content": content, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False,
                    "special": self.types[number] == _CONTROL,
                }
                for number, content in self._special().items()
            },
            "add_bos_token": self._get("add_bos_token", bool, spm),
            "clean_up_tokenization_spaces": False,
        }  # fmt: skip
        if spm:
            settings |= {"legacy": True, "add_prefix_space": self._get("add_space_prefix", bool, True)}
        for role, key in (
            ("bos_token", "bos"),
            ("eos_token", "eos"),
            ("unk_token", "unknown"),
            ("pad_token", "padding"),
        ):
            if (content := self._role(key)) is not None:
                settings[role] = content
        if isinstance(template := self._metadata.get("tokenizer.chat_template"), str):
            settings["chat_template"] = template
        return settings

    def _sentencepiece(self) -> bytes:
        """ModelProto, as protobuf writes it: pieces, trainer_spec and normalizer_spec."""
        scores: list[float] = self._list("scores", float)
        pieces = b"".join(
            _field(1, _field(1, token.encode("utf-8", "surrogateescape")) + b"\x15" + struct.pack("<f", score)
                   + _number(3, kind))
            for token, score, kind in zip(self.tokens, scores, self.types, strict=True)
        )  # fmt: skip
        roles = ((40, "unknown", 0), (41, "bos", 1), (42, "eos", 2), (43, "padding", -1))
        numbers = [(field, self._metadata.get(f"tokenizer.ggml.{key}_token_id", usual)) for field, key, usual in roles]
        trainer = _number(3, 2) + _number(35, 1) + b"".join(_number(field, int(number)) for field, number in numbers)
        prefix = self._get("add_space_prefix", bool, True)
        normalizer = _field(1, b"identity") + _number(3, prefix) + _number(4, 0) + _number(5, 1)
        return pieces + _field(2, trainer) + _field(3, normalizer)

    def _byte_pairs(self) -> dict[str, Any]:
        cut = self._get("pre", str)
        if cut not in _CUTS:
            raise self._fault(f"pre is {cut!r:.80}; known are {', '.join(_CUTS)}")
        regex, level = _CUTS[cut], {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
        split = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
        return {
            "version": "1.0",
            "added_tokens": [
                {
                    "id": number, "content": content, "single_word": False, "lstrip": False, "rstrip": False,
                    "normalized": False, "special": self.types[number] == _CONTROL,
                }
                for number, content in self._special().items()
            ],
            "normalizer": {"type": "NFC"} if cut == "qwen2" else None,
            "pre_tokenizer": {**level, "use_regex": True}
            if regex is None
            else {"type": "Sequence", "pretokenizers": [split, {**level, "use_regex": False}]},
            "post_processor": None,
            "decoder": {**level, "use_regex": True},
            "model": {
                "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
                "ignore_merges": regex is _LLAMA3,
                "vocab": {token: number for number, token in enumerate(self.tokens)},
                "merges": self._list("merges", str),
            },
        }  # fmt: skip


def _varint(value: int) -> bytes:
    value &= (1 << 64) - 1  # negative numbers are written as 64 bits
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _field(field: int, content: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(content)) + content
