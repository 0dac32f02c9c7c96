"""Weights that cannot be meant: refused in one line that names the tensor, on one rank and on two, with nothing left.

On one rank in this process; on two as a person starts them, where often only one of the ranks reads the bad place.
"""

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (numpy learns bfloat16 from it, which safetensors asks for)
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.e2e.processes import environment
from tests.e2e.test_commands import LLAMA, TPCPU, YUAN, assert_refused
from tpcpu import LLM
from tpcpu.errors import CheckpointError
from tpcpu.formats.nf4 import STATE_KEY
from tpcpu.quantize import quantize

SECONDS = 60

Tensors = dict[str, np.ndarray[Any, Any]]
Change = Callable[[Tensors], None]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """The trained models as they are and quantised, by name."""
    root = tmp_path_factory.mktemp("quantised")
    for source, form in ((LLAMA, "nf4"), (LLAMA, "int8"), (YUAN, "nf4")):
        quantize(source, root / f"{source.name}-{form}", form)
    return {"llama-tiny": LLAMA, "yuan-tiny": YUAN, **{folder.name: folder for folder in root.iterdir()}}


def spoil(source: Path, target: Path, change: Change) -> Path:
    """A copy of a folder, the tensors of its last file changed."""
    shutil.copytree(source, target)
    file = sorted(target.glob("*.safetensors"))[-1]
    tensors = {name: values.copy() for name, values in load_file(file).items()}
    change(tensors)
    save_file(tensors, file)
    return target


def put(name: str, value: float) -> Change:
    """One value as the last of a tensor: the share of the last rank."""

    def change(tensors: Tensors) -> None:
        tensors[name].reshape(-1)[-1] = value

    return change


def put_first(name: str, value: float) -> Change:
    def change(tensors: Tensors) -> None:
        tensors[name].reshape(-1)[0] = value

    return change


def shorten(name: str) -> Change:
    def change(tensors: Tensors) -> None:
        tensors[name] = tensors[name].reshape(-1)[:-1].copy()

    return change


def drop(name: str) -> Change:
    def change(tensors: Tensors) -> None:
        del tensors[name]

    return change


def add(name: str) -> Change:
    def change(tensors: Tensors) -> None:
        tensors[name] = np.zeros((64, 64), np.float32)

    return change


def restate(name: str, **keys: object) -> Change:
    """Other entries in the JSON of a stored 4-bit tensor."""

    def change(tensors: Tensors) -> None:
        state = json.loads(bytes(tensors[f"{name}.{STATE_KEY}"]))
        tensors[f"{name}.{STATE_KEY}"] = np.frombuffer(json.dumps({**state, **keys}).encode(), np.uint8)

    return change


def garble(name: str) -> Change:
    def change(tensors: Tensors) -> None:
        tensors[f"{name}.{STATE_KEY}"][:] = 255

    return change


NAN, INFINITY = float("nan"), float("inf")
LAYER = "model.layers.5"
DOWN, UP = f"{LAYER}.mlp.down_proj.weight", f"{LAYER}.mlp.up_proj.weight"

CASES = [
    ("llama-tiny", put(DOWN, NAN), [DOWN, "nan"]),
    ("llama-tiny", put(UP, -INFINITY), [UP, "infinity"]),
    ("llama-tiny", put(f"{LAYER}.input_layernorm.weight", NAN), [f"{LAYER}.input_layernorm.weight", "nan"]),
    ("llama-tiny", put("model.norm.weight", INFINITY), ["model.norm.weight", "infinity"]),
    ("llama-tiny", put("lm_head.weight", NAN), ["lm_head.weight", "nan"]),
    ("llama-tiny", put("model.embed_tokens.weight", NAN), ["model.embed_tokens.weight", "nan"]),
    ("yuan-tiny", put(f"{LAYER}.self_attn.lf_gate.conv2.weight", NAN), ["conv2.weight", "nan"]),
    ("yuan-tiny", put(f"{LAYER}.self_attn.lf_gate.conv2.bias", NAN), ["conv2.bias", "nan"]),
    ("llama-tiny", shorten(f"{LAYER}.input_layernorm.weight"), [f"{LAYER}.input_layernorm.weight", "255", "256"]),
    ("llama-tiny", add(f"{LAYER}.self_attn.q_norm.weight"), [f"{LAYER}.self_attn.q_norm.weight"]),
    ("llama-tiny", add("model.layers.6.mlp.up_proj.weight"), ["model.layers.6.mlp.up_proj.weight"]),
    ("llama-tiny-nf4", garble(UP), [UP, "JSON"]),
    ("llama-tiny-nf4", restate(UP, blocksize=96), [UP, "blocksize", "96"]),
    ("llama-tiny-nf4", restate(UP, shape=[256, 704]), [UP, "[256, 704]", "[704, 256]"]),
    ("llama-tiny-nf4", restate(UP, nested_offset=INFINITY), [UP, "nested_offset"]),
    ("llama-tiny-nf4", restate(UP, dtype="float8"), [UP, "float8"]),
    ("llama-tiny-nf4", drop(f"{UP}.absmax"), [f"{UP}.absmax", "missing"]),
    ("llama-tiny-nf4", drop(f"{UP}.{STATE_KEY}"), [UP]),
    ("llama-tiny-nf4", shorten(f"{UP}.nested_absmax"), [f"{UP}.nested_absmax"]),
    ("llama-tiny-nf4", shorten(UP), [UP]),
    ("llama-tiny-nf4", put(f"{UP}.nested_absmax", NAN), [f"{UP}.nested_absmax", "nan"]),
    ("llama-tiny-nf4", put_first(f"{DOWN}.nested_quant_map", NAN), [f"{DOWN}.nested_quant_map", "nan"]),
    ("llama-tiny-nf4", put(f"{UP}.quant_map", 0.5), [f"{UP}.quant_map"]),
    ("yuan-tiny-nf4", put(f"{UP}.nested_absmax", INFINITY), [f"{UP}.nested_absmax", "infinity"]),
    ("llama-tiny-int8", put(f"{DOWN}.scale", NAN), [f"{DOWN}.scale", "nan"]),
    ("llama-tiny-int8", shorten(f"{DOWN}.scale"), [f"{DOWN}.scale"]),
]  # fmt: skip

ON_TWO = {DOWN, "model.embed_tokens.weight", "conv2.bias", f"{UP}.nested_absmax"}


def each(cases: list[tuple[str, Change, list[str]]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(
        ("folder", "change", "parts"), cases, ids=[f"{name} {'-'.join(parts)}" for name, _, parts in cases]
    )


@each(CASES)
def test_on_one_rank(folders, tmp_path, folder, change, parts):
    with pytest.raises(CheckpointError) as raised:
        LLM(spoil(folders[folder], tmp_path / "spoiled", change), ranks=1)
    message = str(raised.value)
    assert "\n" not in message
    assert [part for part in parts if part.lower() not in message.lower()] == [], message


@pytest.mark.parametrize("form", ["nf4", "int8", "float32"])
@pytest.mark.parametrize("name", [DOWN, "lm_head.weight", "model.embed_tokens.weight"])
def test_while_quantising_on_one_rank(folders, tmp_path, form, name):
    with pytest.raises(CheckpointError, match=f"{name}.*NaN"):
        LLM(spoil(folders["llama-tiny"], tmp_path / "spoiled", put(name, NAN)), ranks=1, format=form)


def leftovers() -> set[str]:
    return set(os.listdir("/dev/shm"))


@each([case for case in CASES if case[2][0] in ON_TWO])
def test_on_two_ranks(folders, tmp_path, folder, change, parts):
    """Said once, exit code 2, all ranks gone, nothing left in shared memory."""
    before = leftovers()
    spoiled = spoil(folders[folder], tmp_path / "spoiled", change)
    process = subprocess.Popen(
        [*TPCPU, "generate", "--model", str(spoiled), "--ranks", "2", "--prompt", "Once"],
        env=environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        start_new_session=True,
    )
    stdout, stderr = process.communicate(timeout=SECONDS)
    assert_refused(subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr), *parts)
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)
    assert leftovers() <= before


def test_under_a_launcher_while_quantising(folders, tmp_path):
    """Only the second rank quantises the bad place, while the first waits for its block maxima."""
    before = leftovers()
    spoiled = spoil(folders["llama-tiny"], tmp_path / "spoiled", put(DOWN, NAN))
    done = subprocess.run(
        ["mpiexec", "-n", "2", *TPCPU, "generate", "--model", str(spoiled), "--format", "nf4", "--prompt", "Once"],
        env=environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        timeout=SECONDS,
        check=False,
    )
    assert_refused(done, DOWN, "nan")
    assert leftovers() <= before
