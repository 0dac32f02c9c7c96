"""How much memory a process takes: anonymous and shared, without mapped files. The kernel keeps no peak of these."""

import threading
from pathlib import Path
from types import TracebackType
from typing import Self

_SECONDS = 0.02


def resident_bytes() -> int:
    """Anonymous and shared memory of this process now."""
    total = 0
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(("RssAnon:", "RssShmem:")):
            total += int(line.split()[1]) << 10
    return total


class Peak:
    """Inside, a thread looks every so often; outside, `look` does. `nbytes` is the most that was seen."""

    def __init__(self) -> None:
        self.nbytes = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="tpcpu-memory")

    def look(self) -> None:
        self.nbytes = max(self.nbytes, resident_bytes())

    def _watch(self) -> None:
        while not self._done.wait(_SECONDS):
            self.look()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()
        self.look()
