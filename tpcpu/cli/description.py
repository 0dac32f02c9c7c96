"""What a checkpoint holds, in words: the work of `tpcpu inspect`.

Knows how to put the answers of `checkpoint`, `formats` and `models` together. Reads headers, and the small JSON parts
of 4-bit tensors.
"""

import math
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from tpcpu import models
from tpcpu.checkpoint import Checkpoint
from tpcpu.cli.alike import together
from tpcpu.errors import ConfigError, LaunchError
from tpcpu.formats import fp8, int8, mxfp4, nf4
from tpcpu.parallel.partition import Share
from tpcpu.program import cost

_FLOATS = {"BF16": "bf16", "F16": "f16", "F32": "float32"}
_QUANTISED = ("nf4", "fp4", "mxfp4", "int8")


@dataclass
class Description:
    """What `inspect` says.

    `parameters_per_token`, those that one token needs, and `ranks`, the largest count that works, are None for a model
    that is not supported.
    """

    path: str
    architecture: str
    files: int
    tensors: int
    parameters: int
    total_bytes: int
    parameters_per_token: int | None = None
    bytes_by_format: dict[str, int] = field(default_factory=dict)
    parameters_by_format: dict[str, int] = field(default_factory=dict)
    not_quantized: dict[str, str] = field(default_factory=dict)  # multiplying tensors in a quantised folder, and why
    not_needed: list[str] = field(default_factory=list)
    ranks: int | None = None
    unsupported: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Logical:
    """A tensor as the model knows it, which may be stored in several parts."""

    format: str
    shape: tuple[int, ...]
    nbytes: int
    dequantised: bool = False  # at loading, as its blocks are too small


def describe(checkpoint: Checkpoint) -> Description:
    """Describe an open checkpoint. Raises CheckpointError where its tensors are damaged."""
    with suppress(ConfigError):
        checkpoint.take_apart(models.read_config(checkpoint.config).stacks)
    logical = _logical_tensors(checkpoint)
    config = checkpoint.config
    architectures = config.get("architectures")
    named = architectures[0] if isinstance(architectures, list) and architectures else "no architecture"
    found = Description(
        path=str(checkpoint.path),
        architecture=f"{config.get('model_type', 'no model_type')} ({named})",
        files=len(checkpoint.files),
        tensors=len(logical),
        parameters=sum(math.prod(tensor.shape) for tensor in logical.values()),
        total_bytes=sum(tensor.nbytes for tensor in checkpoint.tensors.values()),
    )
    for tensor in logical.values():
        for total, amount in (
            (found.bytes_by_format, tensor.nbytes),
            (found.parameters_by_format, math.prod(tensor.shape)),
        ):
            total[tensor.format] = total.get(tensor.format, 0) + amount
    _compare_with_model(checkpoint, logical, found)
    return found


def _logical_tensors(checkpoint: Checkpoint) -> dict[str, _Logical]:
    names = checkpoint.tensors
    parts: set[str] = set()
    logical: dict[str, _Logical] = {}
    for name, tensor in names.items():
        if nf4.is_stored(name, names):
            own = [part for part in nf4.part_names(name) if part in names]
            parts.update(own)
            nbytes = tensor.nbytes + sum(names[part].nbytes for part in own)
            stored = nf4.from_tensors(name, checkpoint.array, names)
            block = nf4.read_state(name, checkpoint.array, names).block
            form = stored.kind + ("" if stored.nested else ", float32 scales")
            form += f", blocks of {block}" if block != nf4.BLOCK else ""
            logical[name] = _Logical(form, stored.shape, nbytes, dequantised=stored.block != nf4.BLOCK)
        elif tensor.dtype == "F8_E4M3":
            fp8.layout(name, tensor.shape, lambda part: names[part].shape, names, fp8.block_of(checkpoint.config))
            own = [part for part in fp8.part_names(name) if part in names]
            parts.update(own)
            logical[name] = _Logical("fp8", tensor.shape, tensor.nbytes + sum(names[part].nbytes for part in own))
        elif mxfp4.is_stored(name, names):
            powers = names[mxfp4.scales_name(name)]
            parts.add(powers.name)
            dtypes = tensor.dtype, powers.dtype
            shape = mxfp4.shape(f"tensor {tensor.title} with {powers.title}", tensor.shape, powers.shape, dtypes)
            logical[name] = _Logical("mxfp4", shape, tensor.nbytes + powers.nbytes)
        elif tensor.dtype == "I8" and int8.is_stored(name, names):
            scales = int8.scale_name(name)
            parts.add(scales)
            logical[name] = _Logical("int8", tensor.shape, tensor.nbytes + names[scales].nbytes)
        else:
            logical[name] = _Logical(_FLOATS.get(tensor.dtype, tensor.dtype), tensor.shape, tensor.nbytes)
    return {name: tensor for name, tensor in logical.items() if name not in parts}


def _compare_with_model(checkpoint: Checkpoint, logical: dict[str, _Logical], found: Description) -> None:
    method = _quantization(checkpoint.config)
    is_gguf = checkpoint.path.suffix == ".gguf"
    if is_gguf:
        found.unsupported.append("GGUF files are not served: tpcpu quantize makes NF4, int8 or bf16 of them")
    formats = {tensor.format for tensor in logical.values()}
    known = ("fp8" in formats and method in fp8.METHODS) or ("mxfp4" in formats and method == mxfp4.METHOD)
    if not known and method not in (
        None,
        "bitsandbytes",
        int8.QUANTIZATION_CONFIG["quant_method"],
    ):
        found.unsupported.append(
            f"quantised with {method}: only bitsandbytes' 4 bits and {int8.QUANTIZATION_CONFIG} are read"
        )
    try:
        model = models.read_config(checkpoint.config)
        program = model.program(Share(0, 1))
        weights = program.weights
        found.ranks = model.max_ranks
        found.parameters_per_token = cost.parameters_of_token(program)
    except (ConfigError, LaunchError) as error:
        found.unsupported.append(str(error))
        return
    quantized = method is not None or any(t.format.startswith(_QUANTISED) for t in logical.values())
    for weight in weights:
        tensor = logical.get(weight.name)
        if tensor is None:
            found.unsupported.append(f"tensor {weight.name} is missing")
        elif tensor.shape != weight.full_shape:
            found.unsupported.append(
                f"tensor {weight.name} has the shape {list(tensor.shape)},"
                f" by config.json it is {list(weight.full_shape)}"
            )
        elif is_gguf:
            continue
        elif tensor.format not in (*_FLOATS.values(), "fp8") and not tensor.format.startswith(_QUANTISED):
            found.unsupported.append(f"tensor {weight.name} is stored as {tensor.format}, which is not supported")
        elif weight.kind.multiplies and quantized and tensor.format in _FLOATS.values():
            found.not_quantized[weight.name] = (
                f"rows of {weight.full_columns} values are no multiple of {nf4.BLOCK}"
                if weight.full_columns % nf4.BLOCK
                else f"stored as {tensor.format} by whoever wrote the folder"
            )
        elif tensor.dequantised:
            found.not_quantized[weight.name] = f"dequantised at loading: {tensor.format}"
        elif tensor.format.startswith(("nf4", "fp4", "mxfp4")) and weight.full_columns % nf4.BLOCK:
            found.not_quantized[weight.name] = (
                f"dequantised at loading: rows of {weight.full_columns} values cut blocks"
            )
    declared = {weight.name for weight in weights}
    for name in logical.keys() - declared:
        if model.is_optional(name):
            found.not_needed.append(name)
        else:
            found.unsupported.append(f"tensor {name} does not belong to a model of type {model.model_type}")
    found.not_needed.sort()


def _quantization(config: dict[str, Any]) -> str | None:
    section = config.get("quantization_config")
    if section is None:
        return None
    return str(section.get("quant_method", "an unnamed method")) if isinstance(section, dict) else str(section)


def text(found: Description) -> str:
    needed = found.parameters_per_token or found.parameters
    some = f", {needed:,} for a token," if needed < found.parameters else ""
    lines = [
        f"{found.path}: {found.architecture}, {found.parameters:,} parameters{some} in {found.tensors} tensors,"
        f" {_bytes(found.total_bytes)} in {found.files} file{'s' if found.files > 1 else ''}"
    ]
    for name, nbytes in sorted(found.bytes_by_format.items(), key=lambda item: -item[1]):
        parameters = found.parameters_by_format[name]
        bits = f", {8 * nbytes / parameters:.3f} bits each" if parameters else ""
        lines.append(f"  {name}: {parameters:,} parameters, {_bytes(nbytes)}{bits}")
    lines += together(f"not quantised: {name}: {reason}" for name, reason in found.not_quantized.items())
    lines += together(f"not needed: {name}" for name in found.not_needed)
    lines += together(f"not supported: {reason}" for reason in found.unsupported)
    if found.ranks is not None and not found.unsupported:
        lines.append(f"ranks: 1 to {found.ranks} work")
    return "\n".join(lines)


def _bytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"
