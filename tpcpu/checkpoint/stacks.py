"""Tensors that hold one matrix, or one bias, of every expert: each as a tensor of its own, with a name of its own.

`….experts.down_proj` (experts, …) becomes `….experts.0.down_proj.weight` and so on; where the rows of two matrices
alternate, both are taken out. A part is a view of its stack's pages, which may lie apart in the file.

Knows shapes and places. Which model has which stacks is the model's to say.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy.typing as npt

from tpcpu.checkpoint.header import StoredTensor
from tpcpu.errors import CheckpointError


@dataclass(frozen=True)
class Stack:
    """One kind of stacks: those that are called `stored` in their module, and what of each expert they hold.

    `parts`: names of what alternates, row by row. `turned`: what is stored of an expert has to be transposed first.
    `dims`: of the stacked tensor. Dimensions behind a part's rows are taken together.
    """

    stored: str
    parts: tuple[str, ...]
    dims: int
    turned: bool = False


class Owner(Protocol):
    """The file of a stack."""

    @property
    def path(self) -> Path: ...
    def array(self, tensor: StoredTensor) -> npt.NDArray[Any]: ...
    def is_mapped(self, tensor: StoredTensor) -> bool: ...
    def offset(self, tensor: StoredTensor) -> int | None: ...
    def advise(self, tensor: StoredTensor, start: int, stop: int, advice: int) -> None: ...


class StackedTensor:
    """One stack, in the place of the file of its parts."""

    def __init__(self, owner: Owner, tensor: StoredTensor, stack: Stack) -> None:
        """Raises CheckpointError naming the tensor for a shape that no such stack has."""
        self._owner, self._tensor, self._stack = owner, tensor, stack
        self.path = owner.path
        count, shape = len(stack.parts), tensor.shape
        if len(shape) != stack.dims or 0 in shape or shape[-1 if stack.turned else 1] % count:
            rows = "" if count == 1 else f", {count} rows of each expert in turn"
            raise CheckpointError(
                f"{tensor.file}: tensor {tensor.name} has shape {list(shape)}; "
                f"expected {stack.dims} dimensions, experts first{rows}"
            )
        whole = (shape[2], shape[1]) if stack.turned else (shape[1], math.prod(shape[2:]))
        self._expert_bytes = tensor.nbytes // shape[0]
        part_shape = (whole[0] // count, whole[1]) if stack.dims > 2 else (shape[1] // count,)
        module = tensor.name.removesuffix(stack.stored)
        self._places = {
            f"{module}{expert}.{part}": (expert, first)
            for expert in range(shape[0])
            for first, part in enumerate(stack.parts)
        }
        nbytes = self._expert_bytes // count
        self.tensors = tuple(
            StoredTensor(name, tensor.dtype, part_shape, nbytes, tensor.file, tensor.name) for name in self._places
        )

    @property
    def _is_together(self) -> bool:
        """Whether a part's values follow one another in the file."""
        return not self._stack.turned and len(self._stack.parts) == 1

    def array(self, tensor: StoredTensor) -> npt.NDArray[Any]:
        """A part, as a view of its stack; as rows of bytes where its file gives those."""
        expert, first = self._places[tensor.name]
        whole, shape = self._owner.array(self._tensor), self._tensor.shape
        values: npt.NDArray[Any] = whole.reshape(*shape[:2], -1)[expert]
        values = (values.T if self._stack.turned else values)[first :: len(self._stack.parts)]
        return values.reshape(tensor.shape) if whole.shape == shape else values

    def is_mapped(self, tensor: StoredTensor) -> bool:
        """Whether `array` is a row of pages of the file; else whoever reads rows in order copies them."""
        return tensor.name in self._places and self._is_together and self._owner.is_mapped(self._tensor)

    def neighbours(self, tensor: StoredTensor) -> str:
        """The same for all parts whose values lie between one another: what is read of one is read of all."""
        return f"{self._tensor.name} {self._places[tensor.name][0]}"

    def offset(self, tensor: StoredTensor) -> int | None:
        """Where in the file the part begins, if its values follow one another there."""
        start = self._owner.offset(self._tensor) if self._is_together else None
        return None if start is None else start + self._places[tensor.name][0] * self._expert_bytes

    def advise(self, tensor: StoredTensor, start: int, stop: int, advice: int) -> None:
        """Advice for the bytes `start` to `stop` of a part, and for what lies between them."""
        first = self._places[tensor.name][0] * self._expert_bytes
        if self._stack.turned:
            start, stop = 0, self._expert_bytes if stop > start else 0
        else:
            count = len(self._stack.parts)
            start, stop = start * count, stop * count
        if stop > start:
            self._owner.advise(self._tensor, first + start, first + stop, advice)
