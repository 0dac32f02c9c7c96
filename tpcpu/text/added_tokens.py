"""Added tokens: strings that are one token whatever the merges say, and cutting a text at them.

Knows where a folder declares them: `added_tokens_decoder`, the roles (`bos_token`, ...) and
`additional_special_tokens` of tokenizer_config.json, and the older special_tokens_map.json and added_tokens.json.
Knows nothing of merges or files.

The flags mean what they mean in transformers' slow tokenizers: `lstrip` and `rstrip` take the white space beside the
token away, `single_word` keeps it from being found inside a word. `normalized` chooses whether it is searched for
before or after normalisation; SentencePiece texts are cut before SentencePiece normalises them, so it changes nothing
there.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from tpcpu.errors import TextError

ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True)
class AddedToken:
    """A string that is cut out of every text before anything else looks at it.

    `id` None: the id that the string has in the vocabulary, or the next free one.
    """

    content: str
    id: int | None = None
    special: bool = True
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    normalized: bool = False
    cuts: bool = True
    """Whether texts are cut at it; else it is a name of an id, which only a prefix writes."""
    behind: int | None = None
    """Its place among tokens that follow a SentencePiece file's own, whatever pieces are called like it."""


def added_token(value: object, where: str, token_id: int | None = None, special: bool = True) -> AddedToken:
    """An AddedToken from a string or from the dict form that transformers writes. Raises TextError."""
    if isinstance(value, str):
        value = {"content": value}
    if not isinstance(value, Mapping) or not isinstance(value.get("content"), str) or not value["content"]:
        raise TextError(f"{where}: found {value!r}, expected a token: a string, or an object with a 'content' string")
    flags = {}
    for flag in ("special", "lstrip", "rstrip", "single_word", "normalized"):
        flags[flag] = value.get(flag, special if flag == "special" else False)
        if not isinstance(flags[flag], bool):
            raise TextError(f"{where}: '{flag}' of {value['content']!r} is {flags[flag]!r}, expected true or false")
    return AddedToken(value["content"], token_id, **flags)


@dataclass(frozen=True)
class Declarations:
    """Every added token of a folder, in order of registration, and which string plays which role."""

    tokens: tuple[AddedToken, ...]
    roles: Mapping[str, str]

    def declares(self, strings: Iterable[str]) -> bool:
        """Whether any of `strings` is among the added tokens."""
        return not {token.content for token in self.tokens}.isdisjoint(strings)


def read_declarations(
    tokenizer_config: Mapping[str, Any], special_tokens_map: Mapping[str, Any], added_tokens: Mapping[str, Any]
) -> Declarations:
    """Declarations from the three JSON objects ({} where the file is missing), in the order of registration.

    special_tokens_map.json and added_tokens.json count only where tokenizer_config.json has no
    `added_tokens_decoder`: newer folders keep them for older readers. Raises TextError.
    """
    tokens: dict[str, AddedToken] = {}
    decoder = tokenizer_config.get("added_tokens_decoder")
    overrides: Mapping[str, Any] = {}
    if decoder is not None:
        where = "tokenizer_config.json, added_tokens_decoder"
        if not isinstance(decoder, Mapping):
            raise TextError(f"{where}: found {type(decoder).__name__}, expected an object of token ids")
        for key, value in sorted(decoder.items(), key=lambda item: _id(item[0], where)):
            # in this form a token is special only if it says so
            token = added_token(value, where, _id(key, where), special=False)
            tokens[token.content] = token
    else:
        overrides = special_tokens_map
        for content, number in sorted(added_tokens.items(), key=lambda item: _id(item[1], "added_tokens.json")):
            tokens[content] = added_token(content, "added_tokens.json", _id(number, "added_tokens.json"), special=False)

    roles: dict[str, str] = {}
    for role in ROLES:
        value = overrides.get(role, tokenizer_config.get(role))
        if value is not None:
            token = added_token(value, role)
            roles[role] = token.content
            _make_special(tokens, token)
    additional = overrides.get("additional_special_tokens", tokenizer_config.get("additional_special_tokens")) or []
    if not isinstance(additional, list):
        raise TextError(f"additional_special_tokens: found {type(additional).__name__}, expected a list of tokens")
    for value in additional:
        _make_special(tokens, added_token(value, "additional_special_tokens"))
    return Declarations(tuple(tokens.values()), roles)


def _make_special(tokens: dict[str, AddedToken], token: AddedToken) -> None:
    known = tokens.get(token.content)
    if known is None:
        tokens[token.content] = token
    elif not known.special:
        flags = (token.lstrip, token.rstrip, token.single_word, token.normalized)
        tokens[token.content] = AddedToken(token.content, known.id, True, *flags)


def _id(value: object, where: str) -> int:
    try:
        if isinstance(value, bool) or (number := int(value)) < 0:  # type: ignore[call-overload]
            raise ValueError
    except (TypeError, ValueError):
        raise TextError(f"{where}: found {value!r}, expected a token id") from None
    return int(number)


class Cutter:
    """Cuts texts at added tokens: leftmost first, longest at the same place."""

    def __init__(self, tokens: Iterable[AddedToken]) -> None:
        self._tokens = {token.content: token for token in tokens if token.cuts}
        longest_first = sorted(self._tokens, key=lambda content: (-len(content), content))
        self._pattern = re.compile("|".join(map(re.escape, longest_first))) if longest_first else None

    def cut(self, text: str) -> list[str | AddedToken]:
        """The parts of `text` in order, added tokens as AddedToken; no part is empty."""
        if self._pattern is None:
            return [text] if text else []
        parts: list[str | AddedToken] = []
        start = 0
        skip_space = False
        for match in self._pattern.finditer(text):
            token = self._tokens[match.group()]
            if token.single_word and not self._stands_alone(text, match.start(), match.end()):
                continue
            self._append(parts, text[start : match.start()], skip_space, token.lstrip)
            parts.append(token)
            start, skip_space = match.end(), token.rstrip
        self._append(parts, text[start:], skip_space, False)
        return parts

    @staticmethod
    def _append(parts: list[str | AddedToken], text: str, left: bool, right: bool) -> None:
        text = text.lstrip() if left else text
        text = text.rstrip() if right else text
        if text:
            parts.append(text)

    @staticmethod
    def _stands_alone(text: str, start: int, end: int) -> bool:
        return (start == 0 or text[start - 1] == " ") and (end == len(text) or text[end] == " ")
