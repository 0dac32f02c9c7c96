"""Incremental detokenising: ids one by one to text that can be printed at once.

A token is bytes (`Vocabulary.piece`), and a character may need several tokens: Chinese and emoji written as single
bytes, or byte-level tokens that end inside a character. Bytes go through an incremental UTF-8 decoder, which keeps an
unfinished character back; bytes that can never become one turn into U+FFFD. So a token costs its own length, and the
chunks join to what decoding the whole list gives: `Tokenizer.decode` is this class.
"""

import codecs
from collections.abc import Iterable

from tpcpu.text.stop_strings import StopStrings
from tpcpu.text.vocabulary import Vocabulary

_utf8 = codecs.getincrementaldecoder("utf-8")


class IncrementalDetokenizer:
    """The text of one answer, in chunks. Not to be shared between requests."""

    def __init__(self, vocabulary: Vocabulary, stop: Iterable[str] = (), skip_special: bool = True) -> None:
        """`stop`: strings before which the text ends. With `skip_special`, special tokens write nothing."""
        self._vocabulary = vocabulary
        self._skip_special = skip_special
        self._decoder = _utf8(errors="replace")
        self._at_start = vocabulary.strips_leading_space
        self._stop = StopStrings(stop)

    @property
    def stopped(self) -> str | None:
        """The stop string that ended the text, None while there is none."""
        return self._stop.found

    def push(self, token_id: int) -> str:
        """The text that `token_id` makes certain, perhaps none. After a stop string: nothing more.

        A stop string that is the string of a special token is found in that token too, though the token is not shown.
        """
        if self._stop.found is not None:
            return ""
        if self._skip_special and (special := self._vocabulary.special(token_id)) is not None:
            if special not in self._stop.strings:
                return ""
            text = self.flush()
            self._stop.found = self._stop.found or special
            return text
        return self._emit(self._decoder.decode(self._vocabulary.piece(token_id)))

    def flush(self) -> str:
        """The rest, when no more tokens come: text held back for a stop string; an unfinished character as U+FFFD."""
        return self._emit(self._decoder.decode(b"", final=True)) + self._stop.flush()

    def _emit(self, text: str) -> str:
        if self._at_start and text:
            self._at_start = False
            text = text.removeprefix(" ")
        return self._stop.push(text) if text else ""
