"""What a checkpoint holds against what a program declares: every weight once, in its shape, nothing left over.

Decides, before any memory is taken, in which format each weight will be held. Knows formats by their names and by how
they are stored; reads no values.
"""

from dataclasses import dataclass

import numpy as np

from tpcpu.checkpoint import Checkpoint
from tpcpu.checkpoint.header import NUMPY_DTYPES
from tpcpu.errors import CheckpointError, UsageError
from tpcpu.formats import floats, fp8, int8, mxfp4, nf4
from tpcpu.formats.floats import FLOATS
from tpcpu.kernels import record as R
from tpcpu.models import Model
from tpcpu.program.operations import BLOCK, Kind, Program, Weight
from tpcpu.program.weights import packed_bytes

FORMATS = ("nf4", "int8", "bf16", "float32")
"""Formats that weights can be held in. float16 weights stay float16 unless another is asked for."""

HEAD_FORMATS = ("int8", "bf16", "nf4")

STORED = {"BF16": "bf16", "F16": "f16", "F32": "float32"}
"""Formats by the names of safetensors' dtypes."""

FORMS = {
    "nf4": R.NF4, "int8": R.INT8, "mxfp4": R.MXFP4, "bf16": R.BF16, "f16": R.F16, "float32": R.FLOAT32,
}  # fmt: skip
"""Formats as kernels number them."""

QUANTISED = ("nf4", "int8", "mxfp4")
"""What is held as it is stored, or not at all."""

_TENSOR_DTYPES = {"bfloat16": "bf16", "float16": "f16", "float32": "float32"}


@dataclass(frozen=True)
class Binding:
    """One weight: how it is stored, and the format it will be held in.

    `nf4` stands for all 4-bit tensors of bitsandbytes, FP4 among them: `state` says which this is. A tensor in fp8 is
    one in `bf16` here, and `scaled` says how.
    """

    weight: Weight
    stored: str
    held: str
    state: nf4.State | None = None
    scaled: fp8.Layout | None = None

    @property
    def nested(self) -> bool:
        """Whether the scales of 4-bit codes are quantised too."""
        return self.state is None or self.state.nested

    @property
    def form(self) -> int:
        return R.NF4_SINGLE if self.held == "nf4" and not self.nested else FORMS[self.held]

    @property
    def packed_bytes(self) -> int:
        """Bytes of memory that the packed weight takes; 0 for one that is not packed."""
        if self.weight.kind in (Kind.VECTOR, Kind.EMBEDDING):
            return 0
        return packed_bytes(len(self.weight.rows), len(self.weight.columns), self.form)


def bind(
    checkpoint: Checkpoint,
    model: Model,
    program: Program,
    format: str | None,  # noqa: A002
    lm_head: str | None,
) -> list[Binding]:
    """Raises CheckpointError for tensors that are missing, misshapen or unknown, UsageError for impossible formats."""
    if format is not None and format not in FORMATS:
        raise UsageError(f"--format {format} is unknown; the formats are {', '.join(FORMATS)}")
    if lm_head is not None and lm_head not in HEAD_FORMATS:
        raise UsageError(f"--lm-head {lm_head} is unknown; the formats of the head are {', '.join(HEAD_FORMATS)}")
    stored = {weight.name: _stored(checkpoint, weight) for weight in program.weights}
    quantised = {form for form, _ in stored.values()} & {"nf4", "int8"}
    if format is None and quantised:
        format = "nf4" if "nf4" in quantised else "int8"  # noqa: A001
    bindings = [_binding(checkpoint, weight, *stored[weight.name], format, lm_head) for weight in program.weights]
    _nothing_left_over(checkpoint, model, {weight.name for weight in program.weights})
    return bindings


def _binding(
    checkpoint: Checkpoint,
    weight: Weight,
    stored: str,
    state: nf4.State | None,
    wanted: str | None,
    lm_head: str | None,
) -> Binding:
    held = stored
    match weight.kind:
        case Kind.VECTOR | Kind.EMBEDDING:
            if stored in QUANTISED:
                raise CheckpointError(
                    f"{checkpoint.path}: tensor {weight.name} is stored as {stored}; norms, biases and the embedding "
                    f"are expected as {', '.join(STORED.values())}"
                )
            return Binding(weight, stored, "float32" if weight.kind is Kind.VECTOR else stored)
        case Kind.ROUTER:
            # Choices are made in float32, of what the model has.
            if stored in QUANTISED:
                held = "float32" if state is None else _TENSOR_DTYPES[state.dtype]
            return Binding(weight, stored, held, state)
        case Kind.HEAD:
            # Read for every token: 8 bits beside quantised weights, as it is beside others.
            held = lm_head or ("int8" if wanted in ("nf4", "int8") and stored in STORED.values() else stored)
        case Kind.MATRIX | Kind.CONV | Kind.EXPERT:
            held = wanted or stored
    if stored in QUANTISED and held != stored and not (weight.kind.multiplies and wanted in ("nf4", "int8")):
        raise UsageError(
            f"{checkpoint.path} is stored as {stored}: it cannot be held as {held}; "
            f"start from the unquantised checkpoint, or leave --format and --lm-head out"
        )
    if stored in QUANTISED:
        held = stored
    if held in QUANTISED and (weight.full_columns % BLOCK or (state is not None and state.block % BLOCK)):
        # Blocks of 64 would cross rows, or are not there: held in the floats that it is made of.
        held = "bf16" if stored == "mxfp4" else stored if state is None else _TENSOR_DTYPES[state.dtype]
    if weight.unit_rows and held == "nf4":
        raise UsageError("--lm-head nf4: this model's head is divided row by row by its length; int8 and bf16 work")
    if weight.unit_rows and held != "int8":
        # What they are divided by leaves no short floats.
        held = "float32"
    return Binding(weight, stored, held, state, _scaled(checkpoint, weight))


def _stored(checkpoint: Checkpoint, weight: Weight) -> tuple[str, nf4.State | None]:
    """The format of a stored weight, and what it says of itself in 4 bits; its shape is the declared one."""
    name = weight.name
    tensor = checkpoint[name]
    shape: tuple[int, ...] = tuple(tensor.shape)
    form, state = STORED.get(tensor.dtype, ""), None
    if nf4.is_stored(name, checkpoint.tensors):
        nf4.from_tensors(name, checkpoint.array, checkpoint.tensors)
        state = nf4.read_state(name, checkpoint.array, checkpoint.tensors)
        form, shape = "nf4", state.shape
    elif tensor.dtype == "F8_E4M3" and weight.kind not in (Kind.VECTOR, Kind.EMBEDDING):
        form = "bf16"  # that is what it stands for; see `formats.fp8`
    elif tensor.dtype == "U8" and (tensor.inside or mxfp4.is_stored(name, checkpoint.tensors)):
        scales = checkpoint[mxfp4.scales_name(name)]
        title = f"{tensor.file}: tensor {tensor.title} with {scales.title}"
        form, shape = "mxfp4", mxfp4.shape(title, shape, scales.shape, (tensor.dtype, scales.dtype))
    elif int8.is_stored(name, checkpoint.tensors):
        form = "int8"
        int8.from_tensors(name, checkpoint.array, checkpoint.tensors)
    if not form:
        raise CheckpointError(
            f"{tensor.file}: tensor {tensor.title} is {tensor.dtype}; "
            f"expected one of {', '.join(STORED)}, NF4, FP4, MXFP4, fp8 or int8"
        )
    if weight.unit_rows and form not in STORED.values():
        raise CheckpointError(
            f"{tensor.file}: tensor {name} is stored as {form}, but its rows are divided by their lengths as they are "
            f"loaded; expected one of {', '.join(STORED.values())}"
        )
    if shape != weight.full_shape:
        raise CheckpointError(
            f"{tensor.file}: tensor {tensor.title} has shape {list(shape)}, but config.json describes "
            f"{list(weight.full_shape)}: the config does not belong to these weights"
        )
    return form, state


def _scaled(checkpoint: Checkpoint, weight: Weight) -> fp8.Layout | None:
    """Where the scales of a tensor in fp8 are, all finite; None of others."""
    tensor = checkpoint[weight.name]
    if tensor.dtype != "F8_E4M3":
        return None
    layout = fp8.layout(
        weight.name, tensor.shape, lambda name: checkpoint[name].shape, checkpoint.tensors,
        fp8.block_of(checkpoint.config),
    )  # fmt: skip
    if NUMPY_DTYPES[checkpoint[layout.scales].dtype] not in floats.FLOATS.values():
        fp8.read_scales(layout, checkpoint.array)  # says what is wrong
    return layout


def _nothing_left_over(checkpoint: Checkpoint, model: Model, declared: set[str]) -> None:
    parts = {part for name in declared for part in (*nf4.part_names(name), int8.scale_name(name))}
    parts |= {mxfp4.scales_name(name) for name in declared}
    parts |= {part for name in declared if checkpoint[name].dtype == "F8_E4M3" for part in fp8.part_names(name)}
    unknown = [
        name
        for name in checkpoint.tensors
        if name not in declared and name not in parts and not model.is_optional(name)
    ]
    if unknown:
        more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
        raise CheckpointError(
            f"{checkpoint.path}: tensors that no {model.model_type} model has: {', '.join(unknown[:3])}{more}; "
            f"leaving them out would change its answers"
        )


def float_dtype(held: str) -> np.dtype[np.generic]:
    """The numpy dtype of a float format."""
    return FLOATS[{short: name for name, short in _TENSOR_DTYPES.items()}[held]]
