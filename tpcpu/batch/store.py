"""What a job leaves on disk: OUT with the answers, OUT.errors.jsonl with the lines that have none, OUT.journal.

Opening it finds out how far an earlier run of the same job came, cuts off what it left torn, and refuses to mix jobs.
Afterwards `commit` makes things lasting, in the order answers, errors, journal; nothing counts before. A thread does
the writing, so that a slow disk holds up no answer.

Knows the three files and what stands in them. What the answers are, and when to commit, is for `runner`.
"""

import json
import stat
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tpcpu.batch import journal
from tpcpu.batch.appended import Appended, replace
from tpcpu.batch.journal import Begun
from tpcpu.batch.lock import Lock
from tpcpu.checkpoint.durable import NO_ROOM, sync
from tpcpu.errors import NoRoomError, OutputError, TpcpuError

_COMPACT_BYTES = 4 << 20
"""A journal is written anew when it has grown by so much, and to twice what it was."""


class Numbers:
    """A set of numbers of lines, a bit each: there may be millions."""

    def __init__(self) -> None:
        self._bits = bytearray()

    def add(self, number: int) -> None:
        """Puts one in."""
        place = number >> 3
        if place >= len(self._bits):
            self._bits.extend(bytes(max(place + 1 - len(self._bits), len(self._bits))))
        self._bits[place] |= 1 << (number & 7)

    def __contains__(self, number: int) -> bool:
        place = number >> 3
        return place < len(self._bits) and bool(self._bits[place] >> (number & 7) & 1)


class Store:
    """The files of one job, locked for this process.

    `done` are the numbers of the lines that are answered or known to be bad, `begun` the answers to go on with.
    `finished`: an earlier run left nothing to do. `context`: the one that answers were begun with, None at first.
    """

    def __init__(self, output: Path, job: Mapping[str, Any], *, restart: bool, wait_seconds: float) -> None:
        """`job` (JSON) tells what may not change between runs; `restart` forgets earlier runs.

        Raises OutputError for files of another job or none, a held lock, a place that cannot be written; NoRoomError.
        """
        self.output = output
        self.errors, self.journal = (output.with_name(output.name + end) for end in (".errors.jsonl", ".journal"))
        self.done = Numbers()
        self.begun: dict[int, Begun] = {}
        self.context: int | None = None
        self.finished = False
        self.answers = self.problems = 0
        """How many are on disk."""
        self._files: dict[str, Appended] = {}
        self._executor: ThreadPoolExecutor | None = None
        self._pending: Future[None] | None = None
        self._problem: TpcpuError | None = None
        self._journal_file: Appended | None = None
        self._journal_bytes = self._compacted = 0
        self._lock: Lock | None = None
        try:
            self._open(dict(job), restart, wait_seconds)
        except OSError as error:
            self.close()
            raise self.translated(error) from None
        except BaseException:
            self.close()
            raise

    def _open(self, job: dict[str, Any], restart: bool, wait_seconds: float) -> None:
        if self.output.exists() and not stat.S_ISREG(self.output.stat().st_mode):
            raise OutputError(f"--output {self.output}: is no regular file; name one that does not exist yet")
        self._lock = Lock(self.output.with_name(self.output.name + ".lock"), str(self.output), wait_seconds)
        if restart:
            # The journal first: without it, what is left counts as nobody's.
            for path in (self.journal, self.output, self.errors):
                path.unlink(missing_ok=True)
        content = journal.Content()
        if self.journal.exists():
            content = journal.read(self.journal.read_bytes())
        self._job = job
        if content.header is not None:
            self._compare(content.header)
            self.context = content.header["settings"]["context"]
            self._recover(content)
        else:
            for path in (self.output, self.errors):
                if path.exists() and path.stat().st_size:
                    raise OutputError(
                        f"{path}: exists, and {self.journal} does not tell that this job began it; "
                        "name another output, or add --restart to write it anew"
                    )

    def _compare(self, header: Mapping[str, Any]) -> None:
        """Refuses to go on with another job."""
        differing = []
        if header.get("version") != journal.VERSION:
            differing.append(f"the journal's version: {header.get('version')}, now {journal.VERSION}")
        for name in ("input", "model"):
            if header.get(name) != self._job[name]:
                differing.append(_difference(f"--{name}", header.get(name), self._job[name]))
        before, now = header.get("settings", {}), self._job["settings"]
        for name in now:
            # A context that is not asked for is the one of before.
            if before.get(name) != now[name] and (name != "context" or now[name] is not None):
                differing.append(_difference(name, before.get(name), now[name]))
        if differing:
            raise OutputError(
                f"{self.output} was begun as another job ({'; '.join(differing)}): run it as before, name another "
                "output, or add --restart to throw away what there is"
            )

    def _recover(self, content: journal.Content) -> None:
        for path in (self.output, self.errors):
            on_disk = path.stat().st_size if path.exists() else 0
            lasting = content.sizes.get(path.name, 0)
            if on_disk < lasting:
                raise OutputError(
                    f"{path}: has {on_disk} bytes, but {self.journal} tells of {lasting}: something took answers away; "
                    "put them back, or add --restart to begin anew"
                )
            if path == self.output or on_disk:
                self._files[path.name] = file = Appended(path)
                file.cut(self._count(path, lasting))
        self.finished = content.end is not None
        self.begun = {line: begun for line, begun in content.begun.items() if line not in self.done}

    def _count(self, path: Path, lasting: int) -> int:
        """Notes the lines of one of the files; how many bytes of it are whole."""
        size = 0
        with open(path, "rb") as file:
            for text in file:
                number = _line_number(text)
                if number is None or number in self.done:
                    if size >= lasting:
                        break  # torn
                    raise OutputError(
                        f"{path}: byte {size} begins no line of this job, though it was on disk once; "
                        "put the file back as it was, or add --restart to begin anew"
                    )
                self.done.add(number)
                if path == self.output:
                    self.answers += 1
                else:
                    self.problems += 1
                size += len(text)
        return size

    def begin(self, context: int) -> None:
        """From here on `commit` may be called. `context` is the one that answers are given with."""
        if self.context not in (None, context):
            raise OutputError(
                f"{self.output} was begun with a context of {self.context} tokens, and only {context} fit in memory "
                f"here; make room, or add --restart to begin anew with --context {context}"
            )
        self._job["settings"]["context"] = self.context = context
        try:
            self._files.setdefault(self.output.name, Appended(self.output))
            self._rewrite_journal(self.begun)
        except OSError as error:
            raise self.translated(error) from None
        self._executor = ThreadPoolExecutor(1, "tpcpu-journal")

    def commit(
        self, answers: list[bytes], problems: list[bytes], records: list[journal.Record],
        begun: Callable[[], Mapping[int, Begun]],
    ) -> bool:  # fmt: skip
        """Begins to write, unless something is being written still: False. `begun`: all that has begun and not ended.

        Raises what was wrong with writing before: OutputError, NoRoomError.
        """
        if self._problem is not None:
            raise self._problem  # something is missing on disk that would have to come before this
        if not self.check():
            return False
        assert self._executor is not None
        compact = None
        if self._journal_bytes > _COMPACT_BYTES and self._journal_bytes > 2 * self._compacted:
            compact = begun()
        self._pending = self._executor.submit(self._write, answers, problems, records, compact)
        return True

    def check(self) -> bool:
        """Whether nothing is being written. Raises what was wrong with writing: OutputError, NoRoomError."""
        if self._pending is None or not self._pending.done():
            return self._pending is None
        self.settle()
        return True

    def settle(self) -> None:
        """Waits until what was committed is on disk. Raises OutputError, NoRoomError."""
        if self._pending is None:
            return
        task, self._pending = self._pending, None
        try:
            task.result()
        except OSError as error:
            self._problem = self.translated(error)
            raise self._problem from None

    def _write(
        self, answers: list[bytes], problems: list[bytes], records: list[journal.Record],
        compact: Mapping[int, Begun] | None,
    ) -> None:  # fmt: skip
        """Counts lines when they are on disk: the next run finds them there, whether or not the journal has room."""
        if answers:
            self._files[self.output.name].append(b"".join(answers))
            self.answers += len(answers)
        if problems:
            if self.errors.name not in self._files:
                self._files[self.errors.name] = Appended(self.errors)
                sync(self.errors.parent)
            self._files[self.errors.name].append(b"".join(problems))
            self.problems += len(problems)
        if compact is not None:
            self._rewrite_journal(compact)
            return
        if answers or problems:
            records = [*records, journal.sizes(self._sizes())]
        data = b"".join(map(journal.encode, records))
        assert self._journal_file is not None
        self._journal_file.append(data)
        self._journal_bytes += len(data)

    def _rewrite_journal(self, begun: Mapping[int, Begun], end: Mapping[str, Any] | None = None) -> None:
        data = journal.whole(self._job, begun, self._sizes())
        if end is not None:
            data += journal.encode(journal.end(end))
        replace(self.journal, data)
        if self._journal_file is not None:
            self._journal_file.close()
        self._journal_file = Appended(self.journal)
        self._journal_bytes = self._compacted = len(data)

    def _sizes(self) -> dict[str, int]:
        return {name: file.size for name, file in self._files.items()}

    def end(self) -> None:
        """All lines are done: the journal shrinks to saying so. Everything was committed before."""
        self.settle()
        try:
            self._rewrite_journal({}, {"answers": self.answers, "errors": self.problems})
        except OSError as error:
            raise self.translated(error) from None
        self.finished = True

    def close(self) -> None:
        """Waits for what is being written, and gives files and lock back. May be called twice."""
        if self._executor is not None:
            self._executor.shutdown()
            self._executor = None
        for file in (*self._files.values(), self._journal_file):
            if file is not None:
                file.close()
        if self._lock is not None:
            self._lock.release()

    def translated(self, error: OSError) -> TpcpuError:
        """What is said of an error of the file system."""
        where = error.filename or self.output
        if error.errno in NO_ROOM:
            return NoRoomError(
                f"{where}: no room left ({error.strerror}): {self.answers} answers are safe; make room and run the "
                "same command again, it goes on where it stopped"
            )
        return OutputError(f"{where}: cannot be written: {error.strerror}")


def _line_number(text: bytes) -> int | None:
    """The number in a whole line of one of the files, None in any other."""
    if not text.endswith(b"\n"):
        return None
    try:
        entry = json.loads(text)
    except (ValueError, RecursionError):
        return None
    number = entry.get("line") if isinstance(entry, dict) else None
    return number if isinstance(number, int) and number > 0 else None


def _difference(name: str, before: object, now: object) -> str:
    if isinstance(before, str) and isinstance(now, str) and len(before) == len(now) == 64:
        return f"{name}: other contents"
    return f"{name}: {before}, now {now}"
