"""The ranks that a driver starts: both ends of the socket between a plain Python process and rank 0.

The driver listens on a Unix socket in a folder of its own and starts `mpiexec`, whose ranks run this module; rank 0
connects. Either side sends JSON, one object a line. Requests are answered one at a time; while an answer streams, the
driver may send `cancel`. When one side is gone, the other ends.
"""

import json
import os
import select
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tpcpu import errors
from tpcpu.engine.engine import Options
from tpcpu.engine.generation import Chunk, Completion
from tpcpu.engine.local import Info, Local, Score
from tpcpu.engine.progress import Progress, Silent
from tpcpu.errors import RankError, TpcpuError
from tpcpu.parallel import launcher
from tpcpu.parallel.communicator import AllReduceKind, connect
from tpcpu.sampling import SamplingParams
from tpcpu.text import Prompt

_CONNECT_SECONDS = 120
"""For `mpiexec` and the interpreters to start; a cluster's file system may be slow."""

_Message = dict[str, Any]


class _Lines:
    """JSON objects over a socket, one a line."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._file = connection.makefile("rb")

    def send(self, message: _Message) -> None:
        self._connection.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> _Message | None:
        """The next message; None when the other side is gone."""
        try:
            line = self._file.readline()
        except OSError:
            return None
        if not line.endswith(b"\n"):
            return None
        message: _Message = json.loads(line)
        return message

    def waiting(self) -> bool:
        """Whether something was sent, or the other side is gone. (Nothing is ever left in the file's buffer: the
        driver sends one line and waits.)"""
        return bool(select.select([self._connection], [], [], 0)[0])

    def close(self) -> None:
        self._file.close()
        self._connection.close()


class Remote:
    """The driver's end: starts the ranks, sends requests, gives what comes back."""

    is_root = True

    def __init__(
        self, path: str | Path, options: Options, ranks: int, all_reduce: AllReduceKind, progress: Progress | None
    ) -> None:
        self._lines: _Lines | None = None
        self._progress = progress or Silent()
        self._job: launcher.Job | None = None
        self._folder = tempfile.TemporaryDirectory(prefix="tpcpu-")
        try:
            self._open(path, options, ranks, all_reduce)
        except BaseException:
            self.close()
            raise

    def _open(self, path: str | Path, options: Options, ranks: int, all_reduce: AllReduceKind) -> None:
        address = os.path.join(self._folder.name, "ranks")
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(address)
            listener.listen(1)
            listener.settimeout(0.05)
            self._job = launcher.start(ranks, [sys.executable, "-m", "tpcpu.ranks", address, all_reduce])
            self._lines = _Lines(self._accept(listener))
        self._send({"path": str(path), "options": asdict(options)})
        while "ready" not in (message := self._receive()):
            if "say" in message:
                self._progress.say(message["say"])
            else:
                self._progress.advance(*message["advance"])
        self.info = Info(**message["ready"])

    def _accept(self, listener: socket.socket) -> socket.socket:
        assert self._job is not None
        deadline = time.monotonic() + _CONNECT_SECONDS
        while time.monotonic() < deadline:
            with suppress(TimeoutError):
                connection = listener.accept()[0]
                connection.settimeout(None)
                return connection
            if (code := self._job.poll()) is not None:
                raise RankError(f"the ranks ended while starting, with exit code {code}; what they said is above")
        raise RankError(f"the ranks did not start within {_CONNECT_SECONDS} s; does mpiexec work on this machine?")

    def stream(self, prompt: Prompt, params: SamplingParams) -> Iterator[Chunk]:
        self._send({"stream": _plain(prompt), "params": asdict(params)})
        finished = False
        try:
            while not finished:
                message = self._receive()
                finished = message["completion"] is not None
                completion = Completion(**message["completion"]) if finished else None
                yield Chunk(message["text"], message["id"], completion)
        except TpcpuError:
            finished = True
            raise
        finally:
            if not finished:
                self._cancel()

    def _cancel(self) -> None:
        """Ends an answer that nobody reads any more; what was already sent is passed over."""
        with suppress(TpcpuError):
            self._send({"cancel": True})
            while "cancelled" not in self._receive():
                pass

    def score(self, texts: Sequence[str], window: int | None) -> list[Score]:
        scores = []
        for text in texts:
            self._send({"score": text, "window": window})
            scores.append(Score(**self._receive()["scored"]))
        return scores

    def close(self) -> None:
        if self._lines is not None:
            with suppress(OSError):
                self._lines.send({"close": True})
            self._lines.close()
            self._lines = None
            if self._job is not None:
                with suppress(Exception):
                    self._job.wait(timeout=10)
        if self._job is not None:
            self._job.stop()
            self._job = None
        self._folder.cleanup()

    def _send(self, message: _Message) -> None:
        if self._lines is None:
            raise RankError("the model is closed")
        try:
            self._lines.send(message)
        except OSError:
            self._gone()

    def _receive(self) -> _Message:
        assert self._lines is not None
        message = self._lines.receive()
        if message is None:
            self._gone()
        elif "error" in message:
            kind = getattr(errors, message["error"], RankError)
            raise kind(message["message"])
        assert message is not None
        return message

    def _gone(self) -> None:
        assert self._job is not None
        code = self._job.stop()
        raise RankError(f"the ranks ended unexpectedly, with exit code {code}; what they said is above")


def _plain(prompt: Prompt) -> Any:
    """A prompt as JSON carries it; numpy's integers become Python's."""
    if isinstance(prompt, str):
        return prompt
    return [dict(part) if isinstance(part, Mapping) else int(part) for part in prompt]


class _Reporter:
    """Rank 0's progress, sent to the driver."""

    def __init__(self, lines: _Lines) -> None:
        self._lines = lines

    def say(self, line: str) -> None:
        self._lines.send({"say": line})

    def advance(self, done: int, total: int) -> None:
        self._lines.send({"advance": [done, total]})


def _error(problem: TpcpuError) -> _Message:
    return {"error": type(problem).__name__, "message": str(problem)}


def _serve(lines: _Lines, model: Local) -> None:
    """Rank 0: requests until the driver closes or is gone."""
    while (request := lines.receive()) is not None and "close" not in request:
        try:
            if "score" in request:
                lines.send({"scored": asdict(model.losses(request["score"], request["window"]))})
            elif "stream" in request:
                _stream(lines, model, request)
            else:
                # A cancel that crossed with the end of its answer.
                lines.send({"cancelled": True})
        except TpcpuError as problem:
            lines.send(_error(problem))


def _stream(lines: _Lines, model: Local, request: _Message) -> None:
    for chunk in model.answer(request["stream"], SamplingParams(**request["params"])):
        if lines.waiting():
            # The driver cancels, or is gone: `_serve` finds out which.
            return
        lines.send(
            {
                "text": chunk.text,
                "id": chunk.id,
                "completion": None if chunk.completion is None else asdict(chunk.completion),
            }
        )


def main(address: str, all_reduce: AllReduceKind) -> int:
    """What every started rank runs."""
    communicator = connect(all_reduce)
    lines = None
    try:
        request: _Message | None = None
        if communicator.is_root:
            connection = socket.socket(socket.AF_UNIX)
            connection.connect(address)
            lines = _Lines(connection)
            request = lines.receive()
        request = communicator.broadcast_object(request or {})
        if not request:
            return 0
        model = Local(
            request["path"], Options(**request["options"]), communicator, None if lines is None else _Reporter(lines)
        )
        if lines is None:
            model.follow()
        else:
            lines.send({"ready": asdict(model.info)})
            try:
                _serve(lines, model)
            finally:
                model.release()
        model.close()
        return 0
    except TpcpuError as problem:
        # Raised on all ranks together: the driver tells it.
        if lines is not None:
            lines.send(_error(problem))
        return problem.exit_code
    except (BrokenPipeError, ConnectionResetError):
        # The driver is gone; the other ranks were released.
        return 1
    except BaseException:
        # On this rank alone: the others wait for it, and would for ever.
        import traceback

        traceback.print_exc()
        communicator.abort(1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2]))  # type: ignore[arg-type]
