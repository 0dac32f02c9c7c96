"""The cache of compiled kernels, seen from outside: processes that share a folder, and what the folder depends on."""

import json
import os
import re
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from tpcpu.errors import UsageError
from tpcpu.kernels import attention, attention_blocks, attention_pieces
from tpcpu.kernels import compile as compiling
from tpcpu.kernels import record as R

ROOT = Path(__file__).parents[2]

COLD_SECONDS = 60
"""Of a core, for each of two processes that share the work: what starting with nothing compiled may take, with all that
Yuan needs in NF4."""

FIRST_STEP = """
import json, time
import numpy as np
from tpcpu.engine.engine import Engine, Options
from tpcpu.kernels import compile as compiling
from tpcpu.parallel.communicator import Solo
from tpcpu.program.batch import Batch
class Told:
    lines = []
    def say(self, line): self.lines.append(line)
    def advance(self, done, total): pass
compiled, inner = [], compiling.Kernel._compile
def compile_one(kernel, **options):
    ours = inner(kernel, **options)
    if ours and not kernel._compiled.cache_hits:
        compiled.append(kernel.name)
    return ours
compiling.Kernel._compile = compile_one
logits = []
engine = Engine("tests/data/yuan-tiny", Solo(), Options(format="nf4", threads=2), Told())
sequence = engine.cache.begin()
engine.cache.reserve(sequence, 12)
for tokens, position in (([1, 2, 3], 0), ([4], 3), ([5, 6], 4)):
    part = (tokens, position, sequence.state, sequence.pages)
    batch = Batch.build([part], [len(tokens) - 1], candidates=0, vocabulary=9999)
    logits.append(engine.step(batch)[0].logits)
engine.close()
print(json.dumps({
    "seconds": time.process_time(), "lines": Told.lines, "compiled": compiled,
    "logits": np.concatenate(logits).tobytes().hex(),
}))
"""


def start(folder, script=FIRST_STEP):
    """A process that loads a model and runs a few steps, or another script, with its kernels in `folder`."""
    environment = {**os.environ, "TPCPU_CACHE_DIR": str(folder)}
    command = [sys.executable, "-c", script]
    return subprocess.Popen(
        command, env=environment, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def finish(process):
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    return json.loads(out)


def contents(folder):
    """Every file in the cache with its time and size, but what is renamed while we look."""
    found = {}
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):
            if path.is_file():
                status = path.stat()
                found[str(path.relative_to(folder))] = status.st_mtime_ns, status.st_size
    return found


def copy_what_stays(source, target):
    """Another process may be compiling, and what it has renamed meanwhile is compiled again."""
    with suppress(FileNotFoundError):
        shutil.copy2(source, target)


def test_processes_share_what_one_of_them_compiled(tmp_path):
    """Two first starts at once, then a third process that finds everything: all with the same logits."""
    folder = tmp_path
    results = [finish(process) for process in [start(folder), start(folder)]]
    assert max(result["seconds"] for result in results) < COLD_SECONDS
    assert all(any("compiling" in line for line in result["lines"]) for result in results)
    names = [name for result in results for name in result["compiled"]]
    assert len(names) == len(set(names)) > 15, "each kernel was compiled once"
    assert all(len(result["compiled"]) > 5 for result in results), "both processes compiled their part"
    filled = contents(folder)
    assert any(name.endswith(".nbc") for name in filled)
    third = finish(start(folder))
    assert not any("compil" in line for line in third["lines"])
    assert not third["compiled"]
    assert contents(folder) == filled
    assert len({result["logits"] for result in (*results, third)}) == 1


def test_a_command_that_finds_the_kernels_compiles_nothing(tmp_path):
    """Seen by the compiler itself, whatever is told: no function is lowered, and no file of the cache is touched."""
    folder, ours = tmp_path, compiling.folder()
    shutil.copytree(ours, folder / ours.name, copy_function=copy_what_stays)
    finish(start(folder, GENERATE))
    lost = [path for path in folder.rglob("*") if "rms" in path.name]
    assert len(lost) >= 3, "a marker, an index, and code"
    for path in lost:
        path.unlink()
    results = [finish(start(folder, GENERATE)) for _ in range(2)]
    filled = contents(folder)
    assert results[0]["lowered"] > 1
    again = finish(start(folder, GENERATE))
    assert results[1]["lowered"] == again["lowered"] == 0
    assert results[0]["text"] == results[1]["text"] == again["text"]
    assert contents(folder) == filled


GENERATE = """
import json
from numba.core import lowering
count, lower = [0], lowering.BaseLower.lower
def counted(self):
    count[0] += 1
    lower(self)
lowering.BaseLower.lower = counted
from tpcpu import LLM, SamplingParams
with LLM("tests/data/yuan-tiny", ranks=1, format="nf4") as llm:
    (answer,) = llm.generate(["Once upon a time"], SamplingParams(max_tokens=8, temperature=0))
print(json.dumps({"lowered": count[0], "text": answer.text}))
"""

SOME_KERNELS = """
import json
from tpcpu.kernels import activations
from tpcpu.kernels.compile import prepare
told, kernels = [], [activations.add, activations.glu, activations.quantise, activations.rms_norm]
prepare(kernels, told.append)
print(json.dumps({"lines": told, "addresses": [kernel.address for kernel in kernels]}))
"""


def test_what_a_killed_process_left_is_completed(tmp_path):
    """A process that dies while it compiles leaves no lock, and nothing that is taken for whole."""
    process = start(tmp_path, SOME_KERNELS)
    while not any(name.endswith("add.compiled") and size for name, (_, size) in contents(tmp_path).items()):
        assert process.poll() is None, process.communicate()
    process.kill()
    process.communicate()
    second, third = [finish(start(tmp_path, SOME_KERNELS)) for _ in range(2)]
    assert re.match("compiling [123] kernels", second["lines"][0])
    assert third["lines"] == []
    assert all(second["addresses"] + third["addresses"])


def test_any_change_of_any_source_changes_the_folder(tmp_path, monkeypatch):
    """numba looks at the file of a function only, and kernels are made of helpers from other files."""
    sources = compiling._sources()
    assert {"linear.py", "memory.py", "emit.py", "avx2.py", "record.py"} <= {path.name for path in sources}
    copy = tmp_path / "kernels"
    shutil.copytree(Path(compiling.__file__).parent, copy, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(compiling, "__file__", str(copy / "compile.py"))
    monkeypatch.setenv("TPCPU_CACHE_DIR", str(tmp_path / "cache"))
    folder = compiling.folder.__wrapped__
    seen = [folder()]
    assert folder() == seen[0]
    for path in sorted(copy.rglob("*.py")):
        path.write_text(path.read_text() + "\n")
        seen.append(folder())
    assert len(set(seen)) == len(seen) == len(sources) + 1


def test_the_folder_knows_cpu_and_set(tmp_path, monkeypatch):
    monkeypatch.setenv("TPCPU_CACHE_DIR", str(tmp_path))
    folder = compiling.folder.__wrapped__
    here = folder()
    assert here.parent == tmp_path
    assert compiling._chosen.name in here.name
    monkeypatch.setattr(compiling, "_host", lambda: ("another-cpu", "+fewer,-features"))
    assert folder() != here


def test_the_users_own_cache_is_left_alone(tmp_path):
    """numba's setting is the user's again after an import and after compiling, also where it was set on purpose."""
    environment = {**os.environ, "TPCPU_CACHE_DIR": str(tmp_path / "ours"), "NUMBA_CACHE_DIR": str(tmp_path / "users")}
    (tmp_path / "mine.py").write_text(OWN_FUNCTION)
    environment["PYTHONPATH"] = str(ROOT)
    run = subprocess.run(
        [sys.executable, tmp_path / "mine.py"], env=environment, capture_output=True, text=True, timeout=100
    )
    assert run.returncode == 0, run.stderr
    ours, users = (list((tmp_path / name).rglob("*.nbi")) for name in ("ours", "users"))
    assert sorted(path.name.split("-")[0] for path in users) == ["mine.double", "mine.triple"]
    assert ours
    assert not any("mine" in path.name for path in ours)


OWN_FUNCTION = """
import os
import re
import numba

@numba.njit("int64(int64)", cache=True)
def double(x):
    return 2 * x

from tpcpu.kernels import quantize, team
from tpcpu.kernels.compile import prepare
prepare([team.wake])
assert numba.config.CACHE_DIR == os.environ["NUMBA_CACHE_DIR"]

@numba.njit("int64(int64)", cache=True)
def triple(x):
    return 3 * x

assert double(2) + triple(2) == 10
"""


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TPCPU_CACHE_DIR", str(tmp_path / "file" / "inside"))
    with pytest.raises(UsageError, match="TPCPU_CACHE_DIR"):
        compiling.folder.__wrapped__()


def test_variants_of_a_closure_have_names_of_their_own():
    """A process that found one variant in the cache and compiled the other ran the cached one for both: attention over
    a float32 cache gave NaN, as it read bfloat16. LLVM had taken the two for one function, by their name."""
    kinds = [(form, shared) for form in (R.FLOAT32, R.BF16, R.INT8) for shared in (False, True)]
    makers = (attention_blocks._piece, attention_blocks._block_piece, attention_blocks._block, attention_blocks._apart)
    variants = [make(*kind) for make in makers for kind in kinds]
    variants += [attention_blocks._heads(heads, *kind) for heads in (4, 2, 1) for kind in kinds]
    for rows in (4, 2):
        for packed in (False, True):
            variants += [attention_pieces.score_rows(rows, form, packed, shared) for form, shared in kinds]
            variants += [attention_pieces.add_rows(rows, form, packed) for form, shared in kinds if shared]
    names = [variant.py_func.__qualname__ for variant in variants]
    kernels = [
        make(*kind) for make in (attention.attend_one, attention.attend_few, attention.attend_many) for kind in kinds
    ]
    names += [kernel._function.__qualname__ for kernel in kernels]
    assert len(set(names)) == len(names) == 6 * (4 + 3 + 4 + 3) + 3 * 4
