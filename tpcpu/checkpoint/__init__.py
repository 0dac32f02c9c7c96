"""Folders of weights: what is in them, lazily; writing them, atomically. The only package that knows safetensors."""

from tpcpu.checkpoint.folder import Checkpoint
from tpcpu.checkpoint.header import StoredTensor

__all__ = ["Checkpoint", "StoredTensor"]
