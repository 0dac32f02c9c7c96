"""Folders of random NF4 weights in the shapes of a config: too large to be bundled, or to be quantised each time.

Matrices have every code as often as any other, and a standard deviation that keeps activations near 1; so has the
embedding, beside which the attention of random weights, a mean of all that came before, says little. Answers vary
where the head is a matrix of its own: a tied one favours the token that was given, which then comes again and again.
"""

import shutil
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from tpcpu.checkpoint import FolderWriter, StoredTensor, WeightsWriter
from tpcpu.formats import nf4
from tpcpu.formats.tables import DYNAMIC_MAP, NF4_CODE
from tpcpu.models import read_config
from tpcpu.parallel.partition import Share
from tpcpu.program.operations import Kind
from tpcpu.quantize.plan import Treatment, new_config, parts

_SCALE_SPREAD = 0.2  # scales lie so far, in parts of their mean, to either side of it
_PIECE = 1 << 24


def write_nf4(folder: Path, config: dict[str, Any], tokenizer: Path, seed: int = 0) -> int:
    """The folder, with the tokenizer's files of the folder `tokenizer`; returns the bytes of its weights."""
    declared = read_config(config).program(Share(0, 1)).weights
    kinds = {weight.name: weight.kind for weight in reversed(declared)}  # a tied embedding is declared as head, later
    treatments = [
        Treatment(
            StoredTensor(name, "BF16", shape, 2 * int(np.prod(shape)), folder),
            "nf4" if kinds[name].multiplies else "bfloat16",
        )
        for name, shape in {weight.name: weight.full_shape for weight in declared}.items()
    ]
    planned = [part for treatment in treatments for part in parts(treatment)]
    random = np.random.default_rng(seed)
    with FolderWriter(folder, {"seed": seed}) as writer:
        with writer.weights("model.safetensors", planned) as weights:
            for treatment in treatments:
                name, shape = treatment.source.name, treatment.source.shape
                if treatment.into == "nf4":
                    _write_matrix(weights, name, shape, random)
                else:
                    weights.write(name, _floats(name, kinds[name], shape, random))
            weights.finish()
        writer.write_json("config.json", new_config(config, "nf4", []))
        writer.finish()
    for file in tokenizer.iterdir():
        if "token" in file.name:
            shutil.copy(file, folder)
    return sum(part.nbytes for part in planned if not part.late)


def _write_matrix(weights: WeightsWriter, name: str, shape: tuple[int, ...], random: np.random.Generator) -> None:
    elements = int(np.prod(shape))
    blocks = elements // nf4.BLOCK
    deviation = (elements // shape[0]) ** -0.5
    mean = np.float32(deviation / np.sqrt(np.mean(np.square(NF4_CODE))))
    for start in range(0, elements // 2, _PIECE):
        size = min(_PIECE, elements // 2 - start)
        weights.write(name, np.frombuffer(random.bytes(size), np.uint8), start)
    weights.write(f"{name}.absmax", np.frombuffer(random.bytes(blocks), np.uint8))
    groups = np.full(-(-blocks // nf4.GROUP), _SCALE_SPREAD * mean, np.float32)
    weights.write(f"{name}.nested_absmax", groups)
    weights.write(f"{name}.nested_quant_map", DYNAMIC_MAP)
    weights.write(f"{name}.quant_map", NF4_CODE)
    weights.write_late(f"{name}.{nf4.STATE_KEY}", nf4.pack_state(shape, "bfloat16", mean))


def _floats(name: str, kind: Kind, shape: tuple[int, ...], random: np.random.Generator) -> np.ndarray[Any, Any]:
    values = random.standard_normal(shape, dtype=np.float32)
    if kind is Kind.VECTOR:
        values = np.float32(0.1) * values + np.float32("norm" in name)
    elif kind is not Kind.EMBEDDING:
        values *= np.float32(shape[1] ** -0.5)
    return values.astype(ml_dtypes.bfloat16)
