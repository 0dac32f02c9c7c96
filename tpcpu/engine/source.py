"""Where the weights of a model come from, as the engine sees it; and the usual answer, a folder.

Opening and binding find every mistake that one rank can find by itself; loading is collective.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from tpcpu.checkpoint import Checkpoint
from tpcpu.engine.binding import Binding, bind
from tpcpu.engine.loader import Loader
from tpcpu.engine.progress import Progress
from tpcpu.models import Model
from tpcpu.parallel.communicator import Communicator
from tpcpu.parallel.numa import Arena
from tpcpu.parallel.team import Team
from tpcpu.program.operations import Program
from tpcpu.program.products import Weights


class Source(Protocol):
    """A config, and the weights that go with it. Called in this order, each once."""

    loaded_bytes: int
    """Bytes that `load` read, or made, on this rank."""

    packed_bytes: int
    """Bytes of memory that the packed weights take on this rank; known once bound."""

    def open(self) -> dict[str, Any]:
        """The config. Raises UserErrors."""

    def bind(self, model: Model, program: Program, format: str | None, lm_head: str | None) -> None:  # noqa: A002
        """Decides the format in which each weight will be held. Raises UserErrors."""

    def load(
        self, communicator: Communicator, team: Team, cpus: Sequence[int], progress: Progress
    ) -> tuple[Weights, Arena]:
        """The weights by name and kind, and the arena of the packed ones. Collective."""

    def close(self) -> None:
        """Lets go of what is open."""


class Folder:
    """A checkpoint on disk."""

    def __init__(self, path: str | Path) -> None:
        self._path = path
        self._bindings: list[Binding] = []
        self.checkpoint: Checkpoint | None = None
        self.loaded_bytes = self.packed_bytes = 0

    def open(self) -> dict[str, Any]:
        self.checkpoint = Checkpoint.open(self._path)
        return self.checkpoint.config

    def bind(self, model: Model, program: Program, format: str | None, lm_head: str | None) -> None:  # noqa: A002
        assert self.checkpoint is not None
        self._bindings = bind(self.checkpoint, model, program, format, lm_head)
        self.packed_bytes = sum(binding.packed_bytes for binding in self._bindings)

    def load(
        self, communicator: Communicator, team: Team, cpus: Sequence[int], progress: Progress
    ) -> tuple[Weights, Arena]:
        assert self.checkpoint is not None
        loader = Loader(self.checkpoint, communicator, team, cpus, progress)
        loaded = loader.load(self._bindings)
        self.loaded_bytes = loader.nbytes
        return loaded

    def close(self) -> None:
        if self.checkpoint is not None:
            self.checkpoint.close()
