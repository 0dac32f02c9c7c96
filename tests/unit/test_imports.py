"""The table of imports: which part may import which, and the one door of each dependency.

Reads the package's text and runs none of it. Every import statement counts, also inside functions and under
TYPE_CHECKING: knowing a type from above is knowing what is above.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "tpcpu"

# From the bottom up. A part imports from the rows below its own; parts of one row do not import each other.
ROWS = (
    {"errors"},
    {"kernels"},
    {"checkpoint", "formats", "sampling", "text"},
    {"parallel"},
    {"program"},
    {"models"},
    {"engine"},
    {"ranks", "bench", "batch"},
    {"llm", "quantize"},
    {"cli", "server"},
    {"__main__"},
)
LEVEL = {part: level for level, row in enumerate(ROWS) for part in row}

# Which part may import a package from outside; None: any part.
DOORS = {
    "numpy": None,
    "ml_dtypes": None,
    "numba": {"kernels"},
    "llvmlite": {"kernels"},
    "mpi4py": {"parallel"},
    "safetensors": {"checkpoint"},
    "torch": {"checkpoint"},
    "tokenizers": {"text"},
    "sentencepiece": {"text"},
    "jinja2": {"text"},
    "rich": {"cli"},
}


def imported(path: Path, module: str) -> Iterator[tuple[int, str]]:
    """(line, full name) of everything that a file imports; a from-import of the package's root names what it takes."""
    is_package = path.name == "__init__.py"
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                here = module.split(".")
                above = here[: len(here) - node.level + is_package]
                base = ".".join([*above, *filter(None, [base])])
            if base == "tpcpu":
                yield from ((node.lineno, f"tpcpu.{alias.name}") for alias in node.names)
            else:
                yield node.lineno, base
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", None)
            if called in ("import_module", "__import__"):
                yield node.lineno, str(node.args[0].value)


def violations(package: Path) -> list[str]:
    """One line for each import in `package` (a folder named tpcpu) that the tables above do not allow."""
    found = []
    for path in sorted(package.rglob("*.py")):
        inside = path.relative_to(package).with_suffix("")
        parts = [part for part in inside.parts if part != "__init__"]
        module = ".".join(["tpcpu", *parts])
        part = parts[0] if parts else ""
        if part and part not in LEVEL:
            found.append(f"{module}: {part} has no row in the table")
            continue
        for line, name in imported(path, module):
            complaint = _complaint(part, name)
            if complaint:
                found.append(f"{module} line {line}: {complaint}")
    return found


def _complaint(part: str, name: str) -> str | None:
    first, _, rest = name.partition(".")
    if first != "tpcpu":
        if first in sys.stdlib_module_names:
            return None
        if first not in DOORS:
            return f"{first} has no door in the table"
        doors = DOORS[first]
        return None if doors is None or part in doors else f"{first} belongs in {' and '.join(sorted(doors))} only"
    target = rest.split(".")[0]
    if target in ("", part) or (target.startswith("__") and target not in LEVEL):
        return None  # the root, whose own imports come when they are asked for; its version
    if target not in LEVEL:
        target = "llm"  # the interface, by the names that the root lends it
    if not part or LEVEL[target] < LEVEL[part]:
        return None
    return f"imports {target}, which stands {'beside' if LEVEL[target] == LEVEL[part] else 'above'} {part}"


def test_the_package_keeps_to_the_table():
    assert violations(PACKAGE) == []


def test_the_package_is_there_to_be_read():
    names = {path.stem if path.is_file() else path.name for path in PACKAGE.iterdir()}
    assert names >= {"errors", "kernels", "checkpoint", "formats", "sampling", "text", "parallel", "program", "cli"}


@pytest.mark.parametrize(
    ("file", "text", "complaint"),
    [
        ("formats/nf4.py", "import numba", "numba belongs in kernels only"),
        ("formats/nf4.py", "from numba import njit", "numba belongs in kernels only"),
        ("cli/chat.py", "def run():\n    from mpi4py import MPI", "mpi4py belongs in parallel only"),
        ("llm.py", "import importlib\nimportlib.import_module('torch')", "torch belongs in checkpoint only"),
        ("kernels/simd/avx2.py", "import tpcpu.models.llama", "imports models, which stands above kernels"),
        ("kernels/simd/avx2.py", "from ...models import llama", "imports models, which stands above kernels"),
        ("kernels/simd/__init__.py", "from ..simd import avx2\nfrom ...text import x", "imports text, which stands"),
        ("models/llama.py", "from tpcpu.engine import cache", "imports engine, which stands above models"),
        ("models/llama.py", "from tpcpu import engine", "imports engine, which stands above models"),
        ("models/llama.py", "from .. import engine", "imports engine, which stands above models"),
        ("engine/step.py", "from tpcpu import LLM", "imports llm, which stands above engine"),
        (
            "program/cost.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from tpcpu.models import yuan",
            "imports models, which stands above program",
        ),
        ("checkpoint/folder.py", "from tpcpu.formats import nf4", "imports formats, which stands beside checkpoint"),
        ("quantize.py", "import tpcpu.llm", "imports llm, which stands beside quantize"),
        ("errors.py", "import requests", "requests has no door in the table"),
        ("helpers.py", "", "helpers has no row in the table"),
    ],
)
def test_a_breach_is_found(tmp_path, file, text, complaint):
    """The table is worth what it can refuse."""
    package = tmp_path / "tpcpu"
    path = package / file
    path.parent.mkdir(parents=True)
    path.write_text(text)
    (line,) = violations(package)
    assert complaint in line


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("kernels/gemv.py", "import numba\nimport llvmlite.ir\nimport numpy as np\nfrom tpcpu.errors import UserError"),
        ("kernels/simd/avx2.py", "from . import types\nfrom ..cache import folder\nfrom tpcpu import errors"),
        ("parallel/team.py", "from mpi4py import MPI\nfrom tpcpu.kernels import walk\nimport ml_dtypes"),
        (
            "cli/version.py",
            "from tpcpu import __version__, LLM\nfrom tpcpu.cli.output import Output\nimport rich.progress",
        ),
        ("__init__.py", "def __getattr__(name):\n    from tpcpu.llm import LLM\n    return LLM"),
        ("__main__.py", "from tpcpu.cli import main"),
    ],
)
def test_what_is_allowed_is_not_complained_of(tmp_path, file, text):
    path = tmp_path / "tpcpu" / file
    path.parent.mkdir(parents=True)
    path.write_text(text)
    assert violations(tmp_path / "tpcpu") == []


def test_import_is_light():
    """Under 0.3 s in the best of three processes, with none of the packages loaded that stand behind a door."""
    code = (
        "import sys, time\n"
        "start = time.perf_counter()\n"
        "import tpcpu\n"
        "print(time.perf_counter() - start, *sys.modules)\n"
    )
    seconds = []
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
        elapsed, *modules = done.stdout.split()
        seconds.append(float(elapsed))
        assert {name for name, doors in DOORS.items() if doors}.isdisjoint(modules)
    assert min(seconds) < 0.3
