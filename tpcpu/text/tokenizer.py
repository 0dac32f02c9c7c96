"""Tokenizer: prompts to ids, ids to text, for one model folder.

Knows roles (BOS, end of sequence), chat templates and what a prompt may be. Knows neither files nor tokenizer
libraries: those are behind Vocabulary.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

from tpcpu.errors import PromptError, TextError
from tpcpu.text.chat_template import ChatTemplate
from tpcpu.text.detokenizer import IncrementalDetokenizer
from tpcpu.text.vocabulary import Vocabulary

Messages: TypeAlias = Sequence[Mapping[str, Any]]
Prompt: TypeAlias = str | bytes | Sequence[int] | Messages


class Tokenizer:
    """Built by `load_tokenizer`. Immutable; safe to share between threads.

    `size`: ids from here on are padding rows of the embedding and must never be sampled.
    `stop_ids`: ids that end an answer. `bos_id`: the id that `encode` puts first, None where it puts none.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        *,
        prefix: Iterable[int] = (),
        stop_ids: Iterable[int] = (),
        chat_template: ChatTemplate | None = None,
        rows: int | None = None,
    ) -> None:
        """`rows`: rows of the model's embedding; ids beyond them are never returned, whatever the files hold."""
        self._vocabulary = vocabulary
        self._prefix = tuple(prefix)
        self._chat_template = chat_template
        self.size = vocabulary.size if rows is None else min(vocabulary.size, rows)
        # an id that cannot be produced cannot stop anything: configs often keep the defaults of another model
        self.stop_ids: frozenset[int] = frozenset(number for number in stop_ids if 0 <= number < self.size)

    @property
    def bos_id(self) -> int | None:
        return self._prefix[0] if self._prefix else None

    @property
    def has_chat_template(self) -> bool:
        return self._chat_template is not None

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        """Ids of whatever a user may give: a text (special strings count), ids, or messages.

        Raises PromptError: not UTF-8, no tokens at all (BOS alone is a valid prompt), ids outside the vocabulary,
        messages of the wrong shape; TextError: no chat template, or one that fails.
        """
        if isinstance(prompt, (str, bytes)):
            ids = self.encode(prompt)
        elif isinstance(prompt, Sequence) and prompt and isinstance(prompt[0], Mapping):
            ids = self.encode_chat(prompt)  # type: ignore[arg-type]
        else:
            ids = self._check_ids(prompt)
        if not ids:
            raise PromptError(
                "prompt: holds no tokens, and this model adds none at the start; give it at least one word"
            )
        return ids

    def encode(self, text: str | bytes) -> list[int]:
        """Ids of `text`, special strings counting, BOS first where the model has one; [] for no text and no BOS.

        An end of sequence is never added, even where the files ask for it: a prompt is there to be continued.
        Raises PromptError where `text` is not UTF-8.
        """
        return [*self._prefix, *self._encode(check_text(text))]

    def encode_chat(self, messages: Messages) -> list[int]:
        """Ids of `messages` in the model's chat template, which writes BOS itself if it wants one."""
        return self._encode(check_text(self.render_chat(messages), "messages"))

    def render_chat(self, messages: Messages, add_generation_prompt: bool = True) -> str:
        """The prompt text of `messages`. Raises TextError without a template, PromptError for impossible messages."""
        if self._chat_template is None:
            raise TextError(
                "this model has no chat template (tokenizer_config.json has no chat_template, and there is no "
                "chat_template.jinja): give the text as the model was trained on it with --prompt"
            )
        return self._chat_template.render(messages, add_generation_prompt)

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """The text of `ids`, less one leading space where encoding puts one; broken characters become U+FFFD."""
        detokenizer = IncrementalDetokenizer(self._vocabulary, skip_special=skip_special)
        chunks = [detokenizer.push(self._check_id(number)) for number in ids]
        return "".join([*chunks, detokenizer.flush()])

    def detokenizer(self, stop: Iterable[str] = ()) -> IncrementalDetokenizer:
        """A fresh detokenizer for one answer, which ends before any of the strings `stop`."""
        return IncrementalDetokenizer(self._vocabulary, stop)

    def is_special(self, token_id: int) -> bool:
        """Whether `token_id` is a control token, which writes nothing into an answer."""
        return self._vocabulary.special(self._check_id(token_id)) is not None

    def _encode(self, text: str) -> list[int]:
        ids = self._vocabulary.encode(text)
        if ids and max(ids) >= self.size:
            number = max(ids)
            raise PromptError(
                f"prompt: {self._vocabulary.piece(number).decode(errors='replace')!r} is token {number}, but the model "
                f"has rows for {self.size} only; write it differently, or take the tokenizer that belongs to the model"
            )
        return ids

    def _check_ids(self, ids: object) -> list[int]:
        if not isinstance(ids, Iterable):
            raise PromptError(
                f"prompt: found {type(ids).__name__}, expected a text, a list of token ids or a list of messages"
            )
        return [self._check_id(number) for number in ids]

    def _check_id(self, number: object) -> int:
        if isinstance(number, bool) or not hasattr(number, "__index__"):
            raise PromptError(f"token ids: found {number!r}, expected a whole number from 0 to {self.size - 1}")
        index = int(number.__index__())
        if not 0 <= index < self.size:
            raise PromptError(f"token ids: {index} is outside the vocabulary, expected 0 to {self.size - 1}")
        return index


def check_text(text: str | bytes, what: str = "prompt") -> str:
    """`text` as a str that UTF-8 can hold. Raises PromptError with the place of the first byte that is not UTF-8.

    A command line argument that was not UTF-8 arrives as a str with surrogates in the place of its bytes (PEP 383).
    """
    if isinstance(text, str):
        try:
            text.encode()
            return text
        except UnicodeEncodeError as error:
            try:
                raw = text.encode(errors="surrogateescape")
            except UnicodeEncodeError:
                code = ord(text[error.start])
                raise PromptError(
                    f"{what}: U+{code:04X} at character {error.start} is half of a surrogate pair; "
                    "expected whole characters"
                ) from None
    else:
        raw = bytes(text)
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise PromptError(
            f"{what}: byte 0x{raw[error.start]:02x} at position {error.start} is not UTF-8 ({error.reason}); "
            "convert the text first, for example with iconv -t UTF-8"
        ) from None
