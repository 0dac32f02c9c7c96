"""Large language models on CPU servers: one MPI rank per socket, NF4 weights, numba kernels.

Importing this package starts no MPI and compiles nothing; `LLM` and what it needs are loaded when first asked for.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from tpcpu.llm import LLM, Chunk, Completion
    from tpcpu.sampling import SamplingParams

_HOMES = {
    "LLM": "tpcpu.llm",
    "Chunk": "tpcpu.llm",
    "Completion": "tpcpu.llm",
    "SamplingParams": "tpcpu.sampling",
}

__all__ = ["LLM", "Chunk", "Completion", "SamplingParams"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
