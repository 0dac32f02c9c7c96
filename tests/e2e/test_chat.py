"""`tpcpu chat` at a terminal, typed at and interrupted as a person does it, and behind a pipe."""

import fcntl
import json
import os
import re
import select
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.e2e.processes import SECONDS, environment, family

DATA = Path(__file__).parents[1] / "data"
YUAN = DATA / "yuan-tiny"
STORIES = DATA / "stories260k"
QUESTION = "How many legs have two cats?"
CHAT = [sys.executable, "-m", "tpcpu", "chat", "--model", YUAN, "--format", "nf4"]
CTRL_C, CTRL_D = "\x03", "\x04"

_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")


class Screen:
    """A terminal's other side: what was printed, and a keyboard."""

    def __init__(self, master: int) -> None:
        self._master = master
        self._seen = ""

    def type(self, keys: str) -> None:
        os.write(self._master, keys.encode())

    def until(self, word: str) -> str:
        """What is printed up to and with `word`."""
        deadline = time.monotonic() + SECONDS
        while word not in self._seen:
            assert time.monotonic() < deadline, f"no {word!r} in {self._seen!r}"
            if select.select([self._master], [], [], 0.2)[0]:
                self._seen += self._read()
        before, _, self._seen = self._seen.partition(word)
        return before + word

    def rest(self) -> str:
        """What is printed until the program ends."""
        while part := self._read():
            self._seen += part
        return self._seen

    def _read(self) -> str:
        try:
            part = os.read(self._master, 4096).decode(errors="replace")
        except OSError:  # the other side is closed
            return ""
        return _ESCAPES.sub("", part).replace("\r", "")


@contextmanager
def chat(folder: Path, *flags: str, stdout: int | None = None) -> Iterator[tuple[Screen, subprocess.Popen[str]]]:
    """`tpcpu chat` at a terminal of its own, at its first prompt."""
    master, terminal = os.openpty()

    def take_terminal() -> None:
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    streams = {"stdin": terminal, "stdout": terminal if stdout is None else stdout, "stderr": terminal}
    with family([*CHAT, *flags], folder, **streams, preexec_fn=take_terminal) as started:
        os.close(terminal)
        screen = Screen(master)
        try:
            screen.until("> ")
            yield screen, started.process
            screen.rest()
            started.process.wait(30)
            started.assert_nothing_left()
        finally:
            os.close(master)


def piped(text: str | bytes, *flags: str) -> subprocess.CompletedProcess[bytes]:
    given = text.encode() if isinstance(text, str) else text
    command = [str(part) for part in (*CHAT, "--ranks", "1", *flags)]
    return subprocess.run(command, input=given, capture_output=True, env=environment(), timeout=SECONDS, check=False)


@pytest.mark.parametrize("ranks", ["1", "2"])
def test_a_conversation(tmp_path, ranks):
    file = (tmp_path / "out.json").open("w+")
    with chat(tmp_path, "--ranks", ranks, "--max-tokens", "12", "--json", stdout=file.fileno()) as (screen, process):
        screen.type(f"{QUESTION}\n")
        first = screen.until("> ")
        screen.type("\n")
        screen.until("> ")
        screen.type("And three cats?\n")
        screen.until("> ")
        screen.type("/clear\n")
        assert "forgotten" in screen.until("> ")
        screen.type(f"{QUESTION}\n")
        again = screen.until("> ")
        screen.type("/exit\n")
    assert process.returncode == 0
    assert first == again
    echo, answer, note, prompt = first.split("\n")
    assert (echo, prompt) == (QUESTION, "> ")
    assert note == "tpcpu: the answer was cut after 12 tokens; --max-tokens allows more"
    file.seek(0)
    lines = file.read().splitlines()
    messages = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": answer}]
    assert [json.loads(line) for line in lines] == [{"messages": messages}]
    file.close()


@pytest.mark.parametrize("ranks", ["1", "2"])
def test_ctrl_c_ends_an_answer_and_not_the_program(tmp_path, ranks):
    # Many threads on few cores make the answer take seconds instead of a tenth of one, which no keyboard could end.
    flags = ("--ranks", ranks, "--max-tokens", "450", "--ignore-eos", "--exact", "--threads", "6")
    with chat(tmp_path, *flags) as (screen, process):
        screen.type(f"{QUESTION}\n")
        screen.until("The total")
        screen.type(CTRL_C)
        assert "\ntpcpu: answer ended\n> " in screen.until("> ")
        screen.type("half a line")
        screen.until("half a line")
        # Between an echo and its next select() Python's readline sleeps through a signal: no hand is as quick.
        time.sleep(0.2)
        screen.type(CTRL_C)
        assert "(Ctrl-D or /exit ends)\n> " in screen.until("\n> ")
        screen.type("/clear\n")
        screen.until("> ")
        screen.type(f"{QUESTION}\n")
        screen.until("The total")
        screen.type(CTRL_C)
        screen.until("> ")
        screen.type("/help\n")
        assert "/help is no command" in screen.until("\n> ")
        screen.type(CTRL_D)
    assert process.returncode == 0


def test_a_conversation_that_outgrows_the_context_goes_on(tmp_path):
    with chat(tmp_path, "--ranks", "1", "--context", "24", "--ignore-eos") as (screen, process):
        screen.type(f"{QUESTION}\n")
        assert "the context of 24 tokens is full; /clear begins anew" in screen.until("\n> ")
        screen.type(f"{QUESTION}\n")
        told = screen.until("\n> ")
        assert "not sent: " in told
        assert "context of 24" in told
        screen.type("/clear\n")
        screen.until("\n> ")
        screen.type(f"{QUESTION}\n")
        assert "The total" in screen.until("\n> ")
        screen.type("/exit\n")
    assert process.returncode == 0


def test_behind_a_pipe_there_are_answers_only():
    done = piped(f"{QUESTION}\n\n/clear\n{QUESTION}\n".encode() + b"caf\xe9\n", "--max-tokens", "12")
    first, again, end = done.stdout.decode().split("\n")
    assert (done.returncode, end) == (0, "")
    assert first == again
    assert first.startswith("The total")
    assert "not sent: messages: byte 0xe9" in done.stderr.decode()
    assert "> " not in done.stderr.decode()


def test_a_conversation_of_nothing_is_one():
    done = piped("", "--json")
    assert (done.returncode, json.loads(done.stdout)) == (0, {"messages": []})


def test_a_model_without_a_chat_template_is_refused_at_once():
    done = piped("Hello\n", "--model", str(STORIES))
    assert (done.returncode, done.stdout) == (2, b"")
    assert b"no chat template" in done.stderr
