"""Stop strings: where an answer ends because of what it says. Knows only text."""

from collections.abc import Iterable


class StopStrings:
    """Cuts a stream of text before the first stop string, and holds back what may still become one.

    The first is the one that is complete first, so the result does not depend on how the text is divided into chunks;
    of two that are complete at the same character the longer counts.
    """

    def __init__(self, strings: Iterable[str]) -> None:
        self.strings = tuple(dict.fromkeys(strings))
        self.found: str | None = None
        self._held = ""
        self._beginnings = {string[:length] for string in self.strings for length in range(1, len(string))}
        self._longest = max(map(len, self.strings), default=0)

    def push(self, text: str) -> str:
        """Takes the next text, returns what may be shown now. Costs the length of `text` and of the stop strings."""
        if self.found is not None:
            return ""
        if not self.strings:
            return text
        text = self._held + text
        ends = [(start + len(string), start, string) for string in self.strings if (start := text.find(string)) >= 0]
        if ends:
            _, start, self.found = min(ends)
            self._held = ""
            return text[:start]
        hold = min(self._longest - 1, len(text))
        while hold and text[len(text) - hold :] not in self._beginnings:
            hold -= 1
        self._held = text[len(text) - hold :]
        return text[: len(text) - hold]

    def flush(self) -> str:
        """What was held back, at the end of the stream."""
        text, self._held = self._held, ""
        return text
