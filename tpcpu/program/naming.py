"""What a step is doing, in words that a person can look up: `layer 3 all_reduce`, `layer 3 self_attn.o_proj`.

Knows programs and their stages; nothing of kernels.
"""

import re
from collections.abc import Sequence

from tpcpu.program.lowering import Stage
from tpcpu.program.operations import AllReduce, Experts, Operation, Program, Weight, weights


def stage_names(program: Program, stages: Sequence[Stage]) -> list[str]:
    """The name of each stage; one that joins ranks is called after that, whatever is joined with it."""
    layer_of = {id(op): layer for op, layer in zip(program.operations, program.layer_of, strict=True)}
    names = []
    for stage in stages:
        found = next((op for op in stage.operations if isinstance(op, AllReduce | Experts)), stage.operations[0])
        layer = layer_of.get(id(found), -1)
        names.append(_name(found) if layer < 0 else f"layer {layer} {_name(found)}")
    return names


def exchanges(stages: Sequence[Stage]) -> list[int]:
    """The numbers of the stages that wait for other ranks."""
    return [number for number, stage in enumerate(stages) if any(isinstance(op, AllReduce) for op in stage.operations)]


def _name(operation: Operation) -> str:
    """The weights of an operation, of the first of several experts; its kind where there is none."""
    named = shown(operation)
    return joined(named) if named else re.sub(r"(?<!^)(?=[A-Z])", "_", type(operation).__name__).lower()


def shown(operation: Operation) -> tuple[Weight, ...]:
    """The weights that stand for an operation: of experts the first one's."""
    return operation.experts[0].matrices if isinstance(operation, Experts) else weights(operation)


def joined(named: Sequence[Weight]) -> str:
    """Weights in a few words, without the layer's own prefix, such as `self_attn.q_proj + k_proj`."""
    names = [re.sub(r"^(.*?\.\d+\.|model\.|transformer\.)|\.weight$", "", weight.name) for weight in named]
    names = list(dict.fromkeys(names))  # of a tensor that holds several weights once
    return " + ".join([names[0], *(name.rpartition(".")[2] for name in names[1:])])
