"""Large language models on CPU servers: one MPI rank per socket, NF4 weights, numba kernels.

Importing this package starts no MPI and compiles nothing; `LLM` and what it needs are loaded when first asked for.
"""

__version__ = "0.1.0"
