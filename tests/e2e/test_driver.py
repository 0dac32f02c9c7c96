"""launch/driver.py as it is shipped, and how people use a model from Python: threads, forks, notebooks."""

import sys
import textwrap
import threading

import pytest

from tests.e2e.processes import PROJECT, eventually, family
from tpcpu import LLM, SamplingParams
from tpcpu.errors import UsageError

DATA = PROJECT / "tests" / "data"
YUAN, STORIES = DATA / "yuan-tiny", DATA / "stories260k"
DRIVER = PROJECT / "launch" / "driver.py"
SHORT = SamplingParams(max_tokens=16, ignore_eos=True)


def test_the_driver_says_the_same_by_itself_and_under_mpiexec(tmp_path):
    said = []
    for name, command in (
        ("plain", [sys.executable, DRIVER, YUAN, "--ranks", "2"]),
        ("mpiexec", ["mpiexec", "-n", "2", sys.executable, DRIVER, YUAN]),
    ):
        folder = tmp_path / name
        folder.mkdir()
        with family(command, folder) as started:
            code, out, err = started.end()
            assert code == 0, err
            started.assert_nothing_left()
        # the last line ends with a speed
        said.append(out.rpartition(", ")[0])
        assert "refused: prompt: holds no tokens" in out
        assert "'The big dog' -> '" in out
    assert said[0] == said[1]


@pytest.mark.parametrize("ranks", [1, 3])
def test_a_model_survives_an_exception_in_the_users_code(ranks):
    def wrong() -> None:
        for _ in llm.stream("Once", SHORT):
            raise ValueError("mine")

    with LLM(STORIES, ranks=ranks) as llm:
        (before,) = llm.generate("Once", SHORT)
        with pytest.raises(ValueError, match="mine"):
            wrong()
        assert llm.generate("Once", SHORT)[0].ids == before.ids


@pytest.mark.parametrize("ranks", [1, 2])
def test_threads_share_a_model(ranks):
    """Two requests at a time used to mix: an assertion, or the other thread's answer."""
    models: list[LLM] = []
    maker = threading.Thread(target=lambda: models.append(LLM(STORIES, ranks=ranks)))
    maker.start()
    maker.join()
    (llm,) = models
    (alone,) = llm.generate("Once", SHORT)
    seen: list[list[int]] = []

    def ask() -> None:
        for _ in range(10):
            seen.append(llm.generate("Once", SHORT)[0].ids)

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert seen == [alone.ids] * 30
    # The next request ends an answer, whichever thread asks.
    stream = llm.stream("Once", SHORT)
    next(stream)
    asking = threading.Thread(target=ask)
    asking.start()
    asking.join(120)
    with pytest.raises(UsageError, match="next request"):
        next(stream)
    closing = threading.Thread(target=llm.close)
    closing.start()
    closing.join(60)
    with pytest.raises(UsageError, match="closed"):
        llm.generate("Once")


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_fork_leaves_the_model_to_its_parent(tmp_path, ranks):
    text = f"""
        import os, sys
        from tpcpu import LLM, SamplingParams
        from tpcpu.errors import UsageError
        with LLM({str(STORIES)!r}, ranks={ranks}) as llm:
            if os.fork() == 0:
                try:
                    llm.generate("Once")
                except UsageError as problem:
                    print(problem, flush=True)
                sys.exit(7)
            assert os.waitstatus_to_exitcode(os.wait()[1]) == 7
            print(len(llm.generate("Once", SamplingParams(max_tokens=5, ignore_eos=True))[0].ids))
    """
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(text))
    with family([sys.executable, script], tmp_path) as started:
        code, out, err = started.end()
        assert code == 0, err
        told, count = out.splitlines()
        assert "belongs to the process that forked" in told
        assert count == "5"
        started.assert_nothing_left()


def test_a_main_thread_that_ends_while_another_asks(tmp_path):
    text = f"""
        import threading, time
        from tpcpu import LLM, SamplingParams
        llm = LLM({str(STORIES)!r}, ranks=2)
        def ask():
            while True:
                llm.generate(["Once"] * 40, SamplingParams(max_tokens=400, ignore_eos=True))
        threading.Thread(target=ask, daemon=True).start()
        time.sleep(0.5)
    """
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(text))
    with family([sys.executable, script], tmp_path) as started:
        assert started.end()[0] == 0
        started.assert_nothing_left()


NOTEBOOK = """
import nbclient, nbformat, sys
book = nbformat.v4.new_notebook()
book.cells = [nbformat.v4.new_code_cell(cell) for cell in open(sys.argv[1]).read().split("# cell")]
nbclient.NotebookClient(book, timeout=200, kernel_name="python3").execute()
for cell in book.cells:
    print("|", "".join(output["text"] for output in cell.outputs if output["name"] == "stdout").strip())
"""
CELLS = f"""
from tpcpu import LLM, SamplingParams
llm = LLM({str(STORIES)!r}, ranks=2)
# cell
import asyncio
asyncio.get_running_loop()
for chunk in llm.stream("Once", SamplingParams(max_tokens=8)):
    print(chunk.text, end="")
# cell
import signal
try:
    for chunk in llm.stream("Once", SamplingParams(max_tokens=300, ignore_eos=True)):
        signal.raise_signal(signal.SIGINT)
except KeyboardInterrupt:
    print("interrupted")
# cell
print(len(llm.generate("Once", SamplingParams(max_tokens=5, ignore_eos=True))[0].ids))
"""


def test_a_notebook(tmp_path):
    """A kernel has a running event loop, and output and signals of its own."""
    script, cells = tmp_path / "notebook.py", tmp_path / "cells.py"
    script.write_text(NOTEBOOK)
    cells.write_text(CELLS)
    with family([sys.executable, "-W", "ignore", script, cells], tmp_path) as started:
        code, out, err = started.end()
        assert code == 0, err
        streamed, interrupted, count = out.splitlines()[-3:]
        assert len(streamed) > 5
        assert (interrupted, count) == ("| interrupted", "| 5")
        # Nothing was closed: the kernel's end takes the ranks along.
        eventually(lambda: started.members() == {}, 10, lambda: f"still there: {started.members()}")
