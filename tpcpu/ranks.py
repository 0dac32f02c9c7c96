"""The ranks that a driver starts: both ends of the socket between a plain Python process and rank 0.

The driver listens at an abstract Unix socket, which leaves no file behind, and starts `mpiexec`, whose ranks run this
module; rank 0 connects. Either side sends JSON, one object a line. Requests are numbered and answered one at a time;
whatever the driver sends while an answer streams ends that answer, and what had been sent of it is passed over. When
one side is gone, the other ends.
"""

import json
import operator
import os
import secrets
import select
import socket
import subprocess
import sys
import time
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

from tpcpu import errors
from tpcpu.engine.engine import Options
from tpcpu.engine.local import Info, Local, Score
from tpcpu.engine.pace import Slow
from tpcpu.engine.progress import Progress, Silent
from tpcpu.engine.requests import Chunk, Completion
from tpcpu.errors import PromptError, RankError, TpcpuError
from tpcpu.parallel import launcher
from tpcpu.parallel.communicator import AllReduceKind, connect
from tpcpu.parallel.outcry import Outcry
from tpcpu.parallel.processes import user
from tpcpu.sampling import SamplingParams
from tpcpu.text import Prompt, check_text

_CONNECT_SECONDS = 120
"""For `mpiexec` and the interpreters to start; a cluster's file system may be slow."""

_CLOSE_SECONDS = 10
"""For the ranks to end by themselves, after the step that they are in."""

_PART = 1 << 12
"""Bytes that are asked for at a time, at least."""

_PACKAGE_PARENT = str(Path(__file__).parents[1])
_STANDARD_ERROR = 2

_Message = dict[str, Any]


class _Lines:
    """JSON objects over a socket, one a line. An interrupted `receive` loses nothing."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._received = bytearray()
        """What has come and was not taken yet, then zeros, which JSON has none of.

        So what has come is known from itself: an interrupt may take away what `recv_into` returns.
        """

    def send(self, message: _Message) -> None:
        self._connection.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> _Message | None:
        """The next message; None when the other side is gone."""
        while (end := self._received.find(b"\n")) < 0:
            filled = len(self._received.rstrip(b"\0"))
            if len(self._received) - filled < _PART:
                self._received = self._received[:filled] + bytes(max(_PART, filled))
            try:
                with memoryview(self._received)[filled:] as room:
                    if not self._connection.recv_into(room):
                        return None
            except OSError:
                return None
        line = bytes(self._received[:end])
        self._received = self._received[end + 1 :]
        message: _Message = json.loads(line)
        return message

    def waiting(self) -> bool:
        """Whether something was sent, or the other side is gone."""
        return any(self._received[:1]) or bool(select.select([self._connection], [], [], 0)[0])

    def close(self) -> None:
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
        self._outcry: Outcry | None = None
        self._number = 0
        self.slow_ranks: list[Slow] = []
        """Ranks that the others have been seen to wait for."""
        try:
            self._open(path, options, ranks, all_reduce)
        except BaseException:
            self.close()
            raise

    def _open(self, path: str | Path, options: Options, ranks: int, all_reduce: AllReduceKind) -> None:
        name = f"tpcpu-{secrets.token_hex(16)}"
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(f"\0{name}")
            listener.listen(1)
            listener.settimeout(0.05)
            # The ranks read nothing: mpiexec would take what is typed for the driver. What MPI has to say belongs
            # beside the answer. -P: a file in this folder must not stand in for a module that the ranks import.
            code = f"import sys; sys.path.insert(0, {_PACKAGE_PARENT!r}); from tpcpu import ranks; ranks.run()"
            argv = [sys.executable, "-P", "-c", code, name, all_reduce, str(options.fault_timeout)]
            self._job = launcher.start(
                ranks, argv, stdin=subprocess.DEVNULL, stdout=_STANDARD_ERROR, stderr=subprocess.PIPE
            )
            # An error of the ranks is raised here, and told by whoever catches it: once.
            self._outcry = Outcry(self._job.process.stderr, withhold=True)
            self._lines = _Lines(self._accept(listener))
        self._send({"path": str(path), "options": asdict(options)})
        while "ready" not in (message := self._receive()):
            self._progress.advance(*message["advance"])
        self.info = Info(**message["ready"])

    def _accept(self, listener: socket.socket) -> socket.socket:
        assert self._job is not None
        deadline = time.monotonic() + _CONNECT_SECONDS
        while time.monotonic() < deadline:
            with suppress(TimeoutError):
                connection = listener.accept()[0]
                # an abstract name is there for all users of the host
                if user(connection) == os.getuid():
                    connection.settimeout(None)
                    return connection
                connection.close()
            if (code := self._job.poll()) is not None:
                raise self._error(f"the ranks ended while starting, with exit code {code}")
        raise RankError(f"the ranks did not start within {_CONNECT_SECONDS} s; does mpiexec work on this machine?")

    def stream(self, prompt: Prompt, params: SamplingParams) -> Generator[Chunk, None, None]:
        self._send({"stream": _plain(prompt), "params": asdict(params)})
        finished = False
        try:
            while not finished:
                message = self._receive()
                finished = message["completion"] is not None
                yield Chunk(message["text"], message["id"], _completion(message["completion"]) if finished else None)
        except TpcpuError:
            finished = True
            raise
        finally:
            if not finished:
                with suppress(TpcpuError):
                    self._send({"cancel": True})

    def generate(self, prompts: Sequence[Prompt], params: Sequence[SamplingParams]) -> list[Completion]:
        self._send({"generate": [_plain(prompt) for prompt in prompts], "params": [asdict(each) for each in params]})
        try:
            return [_completion(fields) for fields in self._receive()["completions"]]
        except KeyboardInterrupt:
            with suppress(TpcpuError):
                self._send({"cancel": True})
            raise

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
                with suppress(subprocess.TimeoutExpired):
                    self._job.wait(timeout=_CLOSE_SECONDS)
        if self._job is not None:
            self._job.stop()
            self._job = None
        if self._outcry is not None:
            # What came after the last request, and so was never raised.
            for line in self._outcry.errors():
                sys.stderr.write(f"tpcpu: error: {line}\n")

    def _send(self, message: _Message) -> None:
        assert self._lines is not None
        self._number += 1
        try:
            self._lines.send({**message, "number": self._number})
        except OSError:
            self._gone()

    def _receive(self) -> _Message:
        """The next message of the answer to what was sent last; passes on what rank 0 says. Raises what it raised."""
        assert self._lines is not None
        message = self._lines.receive()
        while message is not None and (message["number"] != self._number or "say" in message):
            if "say" in message:
                self._progress.say(message["say"])
            message = self._lines.receive()  # what is passed over is the rest of an answer that was given up
        if message is None:
            self._gone()
        if "error" in message:
            raise getattr(errors, message["error"], RankError)(message["message"])
        if "slow_ranks" in message:
            self.slow_ranks = [Slow(**each) for each in message["slow_ranks"]]
        return message

    def _gone(self) -> NoReturn:
        assert self._job is not None
        code = self._job.stop()
        raise self._error(f"the ranks ended unexpectedly, with exit code {code}")

    def _error(self, otherwise: str) -> RankError:
        """What the ranks that have ended said was wrong."""
        said = dict.fromkeys(self._outcry.errors()) if self._outcry is not None else {}
        return RankError("; ".join(said) or f"{otherwise}; what they said is above")


def _completion(fields: _Message) -> Completion:
    """As a rank in this process would give it: JSON has no tuples."""
    pairs = fields["top_logits"]
    fields["top_logits"] = None if pairs is None else [[tuple(pair) for pair in step] for step in pairs]
    for step in fields["logprobs"] or ():
        step["top"] = [tuple(pair) for pair in step["top"]]
    return Completion(**fields)


def _plain(prompt: Prompt) -> Any:
    """A prompt as JSON carries it; numpy's integers become Python's. Rank 0 judges what is in it."""
    if isinstance(prompt, (str, bytes)):
        return check_text(prompt)
    if isinstance(prompt, Iterable):
        plain: Any = [
            dict(part) if isinstance(part, Mapping) else operator.index(part) if _is_integer(part) else part
            for part in prompt
        ]
    else:
        plain = prompt
    try:
        json.dumps(plain)
    except (TypeError, ValueError):
        raise PromptError(
            f"prompt: found {type(prompt).__name__} of what is neither text nor numbers, expected a text, a list of "
            f"token ids or a list of messages"
        ) from None
    return plain


def _is_integer(part: object) -> bool:
    return hasattr(part, "__index__") and not isinstance(part, bool)


class _Root:
    """Rank 0's end."""

    def __init__(self, lines: _Lines) -> None:
        self._lines = lines
        self._number = 0

    def receive(self) -> _Message | None:
        """The next request; None when there will be none."""
        request = self._lines.receive()
        if request is None or "close" in request:
            return None
        self._number = request["number"]
        return request

    def answer(self, message: _Message) -> None:
        self._lines.send({**message, "number": self._number})

    def fail(self, problem: TpcpuError) -> None:
        self.answer({"error": type(problem).__name__, "message": str(problem)})

    def say(self, line: str) -> None:
        """Progress of loading, and what is to be told of ranks while they work."""
        self.answer({"say": line})

    def advance(self, done: int, total: int) -> None:
        """Progress of loading."""
        self.answer({"advance": [done, total]})

    def serve(self, model: Local) -> None:
        """Requests until the driver closes or is gone."""
        while (request := self.receive()) is not None:
            try:
                if "score" in request:
                    self.answer({"scored": asdict(model.losses(request["score"], request["window"]))})
                elif "generate" in request:
                    self._generate(model, request)
                elif "stream" in request:
                    self._stream(model, request)
            except TpcpuError as problem:
                self.fail(problem)

    def _generate(self, model: Local, request: _Message) -> None:
        params = [SamplingParams(**each) for each in request["params"]]
        # Whatever the driver sends in the meantime ends these answers.
        answers = model.answers(request["generate"], params, given_up=self._lines.waiting)
        if answers is not None:
            self.answer({"completions": [asdict(each) for each in answers], "slow_ranks": _slow(model)})

    def _stream(self, model: Local, request: _Message) -> None:
        for chunk in model.answer(request["stream"], SamplingParams(**request["params"])):
            if self._lines.waiting():
                # The driver wants something else, or is gone: `serve` finds out which.
                return
            completion = None if chunk.completion is None else asdict(chunk.completion)
            slow = {} if completion is None else {"slow_ranks": _slow(model)}
            self.answer({"text": chunk.text, "id": chunk.id, "completion": completion, **slow})


def _slow(model: Local) -> list[_Message]:
    return [asdict(each) for each in model.slow_ranks]


def main(address: str, all_reduce: AllReduceKind, fault_timeout: float) -> int:
    """What every started rank runs."""
    communicator = connect(all_reduce, fault_timeout=fault_timeout)
    root = None
    try:
        request: _Message | None = None
        if communicator.is_root:
            connection = socket.socket(socket.AF_UNIX)
            connection.connect(f"\0{address}")
            root = _Root(_Lines(connection))
            request = root.receive()
        request = communicator.broadcast_object(request or {})
        if not request:
            return 0
        model = Local(request["path"], Options(**request["options"]), communicator, root)
        if root is None:
            model.follow()
        else:
            root.answer({"ready": asdict(model.info)})
            try:
                root.serve(model)
            finally:
                model.release()
        model.close()
        return 0
    except TpcpuError as problem:
        # Raised on all ranks together: the driver tells it.
        if root is not None:
            root.fail(problem)
        return problem.exit_code
    except (BrokenPipeError, ConnectionResetError):
        # The driver is gone; the other ranks were released.
        return 1
    except BaseException as error:
        # On this rank alone: the others wait for it, and would for ever.
        import traceback

        traceback.print_exc()
        where = communicator.pulse.where() if communicator.pulse is not None else ""
        what = f"rank {communicator.rank} on {communicator.host} raised {type(error).__name__}: {error}"
        sys.stderr.write(f"tpcpu: error: {what} {where}\n")
        communicator.abort(1)


def run() -> NoReturn:
    """The program of a started rank."""
    sys.exit(main(sys.argv[1], sys.argv[2], float(sys.argv[3])))  # type: ignore[arg-type]
