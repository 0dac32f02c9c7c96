"""Folders of weights: what is in them, lazily; writing them, atomically. The only package that knows safetensors."""

from tpcpu.checkpoint.folder import Checkpoint
from tpcpu.checkpoint.header import StoredTensor, read_header
from tpcpu.checkpoint.stacks import Stack
from tpcpu.checkpoint.writer import FolderWriter, Planned, WeightsWriter

__all__ = ["Checkpoint", "FolderWriter", "Planned", "Stack", "StoredTensor", "WeightsWriter", "read_header"]
