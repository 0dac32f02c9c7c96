"""What becomes of each tensor of a checkpoint, and of its config, when it is quantised.

What multiplies is quantised, embedding and head stay as given, and so do vectors in NF4; elsewhere they become float32.
The model itself says which tensor is which. Knows shapes and names; reads and writes no weights.
"""

import math
import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from tpcpu import models
from tpcpu.checkpoint import Checkpoint, Planned, StoredTensor
from tpcpu.errors import CheckpointError
from tpcpu.formats import floats, fp8, int8, mxfp4, nf4
from tpcpu.parallel.partition import Share
from tpcpu.program.operations import BLOCK, Kind
from tpcpu.quantize.values import DTYPE_NAMES

_STORED_NAMES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}

_LONGEST_STATE = 512  # bytes of the JSON part of an NF4 tensor; its eight dimensions and numbers cannot fill them
_PIECE = 1 << 22


@dataclass(frozen=True)
class Treatment:
    """What becomes of one tensor; `reason` says why one that multiplies is not quantised.

    `routes`: it chooses between experts, and stays as given where others are quantised.
    """

    source: StoredTensor
    into: str  # nf4, int8, bfloat16, float16 or float32
    reason: str = ""
    routes: bool = False


def plan(checkpoint: Checkpoint, target: str) -> tuple[list[Treatment], tuple[str, ...]]:
    """What becomes of each tensor, in the order of the source, and the names of those that are not needed.

    Raises ConfigError for a model that is not supported, CheckpointError for tensors that do not fit it or are
    quantised already.
    """
    method = checkpoint.config.get("quantization_config")
    method = method.get("quant_method", "an unnamed method") if isinstance(method, dict) else method
    if method == mxfp4.METHOD:
        raise CheckpointError(f"{checkpoint.path}: its experts have 4 bits already (mxfp4): it is served as it is")
    if method is not None and method not in fp8.METHODS:
        raise CheckpointError(f"{checkpoint.path}: is quantised already ({method}); start from the model as published")
    model = models.read_config(checkpoint.config)
    checkpoint.take_apart(model.stacks)
    declared = model.program(Share(0, 1)).weights  # a tied embedding is declared twice: it is the head as well
    weights = {weight.name: weight for weight in declared}
    for name, weight in weights.items():
        if (shape := checkpoint[name].shape) != weight.full_shape:
            raise CheckpointError(
                f"{checkpoint[name].file}: tensor {name} has the shape {list(shape)},"
                f" but by config.json it is {list(weight.full_shape)}"
            )
    of_fp8 = [name for name in weights if checkpoint[name].dtype == "F8_E4M3"]
    parts_of_others = {part for name in of_fp8 for part in fp8.part_names(name)}
    treatments, dropped = [], []
    for name, tensor in checkpoint.tensors.items():
        if name not in weights:
            if name in parts_of_others:
                continue
            if not model.is_optional(name):
                raise CheckpointError(
                    f"{tensor.file}: tensor {name} does not belong to a model of type {model.model_type}"
                )
            dropped.append(name)
            continue
        if tensor.dtype not in DTYPE_NAMES:
            raise CheckpointError(
                f"{tensor.file}: tensor {name} is {tensor.dtype}; weights are expected as {', '.join(DTYPE_NAMES)}"
            )
        treatments.append(_treatment(tensor, weights[name].kind, target))
    _check_tied_heads(checkpoint, [weight.name for weight in declared if weight.kind is Kind.EMBEDDING], dropped)
    return treatments, tuple(dropped)


def _treatment(tensor: StoredTensor, kind: Kind, target: str) -> Treatment:
    given = DTYPE_NAMES[tensor.dtype]
    if kind is Kind.VECTOR:
        # transformers takes the dtypes of a quantised folder as they stand, and cannot mix them in one pass
        return Treatment(tensor, given if target == "nf4" else "float32")
    if target in ("bf16", "float32"):
        return Treatment(tensor, {"bf16": "bfloat16"}.get(target, target))
    if not kind.multiplies:
        return Treatment(tensor, given, routes=kind is Kind.ROUTER)
    if (columns := math.prod(tensor.shape[1:])) % BLOCK:
        return Treatment(tensor, given, f"rows of {columns} values are no multiple of {BLOCK}")
    return Treatment(tensor, target)


def _check_tied_heads(checkpoint: Checkpoint, embeddings: list[str], dropped: list[str]) -> None:
    """A head beside a tied embedding is left out; one that is not its copy would be lost in silence."""
    for name in dropped:
        if not name.endswith("lm_head.weight") or not embeddings:
            continue
        head, embedding = checkpoint.array(name).reshape(-1), checkpoint.array(embeddings[0]).reshape(-1)
        same = head.dtype == embedding.dtype and head.size == embedding.size
        for start in range(0, head.size if same else 0, _PIECE):
            piece = slice(start, start + _PIECE)
            same = same and np.array_equal(head[piece].view(np.uint8), embedding[piece].view(np.uint8))
        checkpoint.release(name)
        checkpoint.release(embeddings[0])
        if not same:
            raise CheckpointError(
                f"{checkpoint[name].file}: {name} differs from {embeddings[0]},"
                " but config.json ties them; one of the two is wrong"
            )


def parts(treatment: Treatment) -> list[Planned]:
    """The tensors that one source tensor becomes."""
    name, shape = treatment.source.name, treatment.source.shape
    blocks = math.prod(shape) // BLOCK
    match treatment.into:
        case "nf4":
            return [
                Planned(name, "U8", (blocks * BLOCK // 2, 1)),
                Planned(f"{name}.absmax", "U8", (blocks,)),
                Planned(f"{name}.nested_absmax", "F32", (-(-blocks // nf4.GROUP),)),
                Planned(f"{name}.nested_quant_map", "F32", (256,)),
                Planned(f"{name}.quant_map", "F32", (16,)),
                Planned(f"{name}.{nf4.STATE_KEY}", "U8", (_LONGEST_STATE,), late=True),
            ]
        case "int8":
            scales = (shape[0], math.prod(shape[1:]) // BLOCK)
            return [Planned(name, "I8", shape), Planned(int8.scale_name(name), "F32", scales)]
        case into:
            return [Planned(name, _STORED_NAMES[into], shape)]


def output_files(treatments: list[Treatment]) -> dict[str, list[Treatment]]:
    """The weights files to write, in order, and what goes into each: as in the source, as safetensors."""
    files: dict[str, list[Treatment]] = {}
    for treatment in treatments:
        file = treatment.source.file
        name = file.stem.replace("pytorch_model", "model", 1) + ".safetensors"
        if file.suffix == ".gguf":
            split = re.search(r"-\d{5}-of-\d{5}$", file.stem)
            name = f"model{split[0] if split else ''}.safetensors"
        files.setdefault(name, []).append(treatment)
    return files


def new_config(config: dict[str, Any], target: str, kept: list[str]) -> dict[str, Any]:
    """The config of a folder quantised to `target`; `kept` names the multiplying tensors that stay as given."""
    config = {key: value for key, value in config.items() if key != "quantization_config"}
    key = "dtype" if "dtype" in config else "torch_dtype"
    match target:
        case "nf4":
            compute = config.get(key)
            # unless told, transformers leaves only the head alone
            modules = ["lm_head", *(name.removesuffix(".weight") for name in kept)] if kept else None
            config["quantization_config"] = {
                "_load_in_4bit": True,
                "_load_in_8bit": False,
                "bnb_4bit_compute_dtype": compute if compute in floats.FLOATS else "bfloat16",
                "bnb_4bit_quant_storage": "uint8",
                "bnb_4bit_quant_type": "nf4",
                "bnb_4bit_use_double_quant": True,
                "llm_int8_enable_fp32_cpu_offload": False,
                "llm_int8_has_fp16_weight": False,
                "llm_int8_skip_modules": modules,
                "llm_int8_threshold": 6.0,
                "load_in_4bit": True,
                "load_in_8bit": False,
                "quant_method": "bitsandbytes",
            }
        case "int8":
            config["quantization_config"] = dict(int8.QUANTIZATION_CONFIG)
        case _:
            config[key] = {"bf16": "bfloat16"}.get(target, target)
    return config
