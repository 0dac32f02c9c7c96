"""Where the weights of a model come from, as the engine sees it; and the usual answer, a folder.

Opening and binding find every mistake that one rank can find by itself; loading is collective.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from tpcpu.checkpoint import Checkpoint
from tpcpu.engine.binding import Binding, bind
from tpcpu.engine.copies import check_read, is_read_together
from tpcpu.engine.loader import Loader
from tpcpu.engine.parts import needed
from tpcpu.engine.progress import Progress
from tpcpu.models import Model
from tpcpu.parallel.communicator import Communicator
from tpcpu.parallel.numa import Arena
from tpcpu.parallel.team import Team
from tpcpu.program.operations import Program, Weight
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

    def __init__(self, path: str | Path, read: str | None = None) -> None:
        """`read`: shared, where the hosts of a job see one folder, or local, where each has its own; else found out."""
        self._path, self._read = path, read
        self._bindings: list[Binding] = []
        self._weights: tuple[Weight, ...] = ()
        self.checkpoint: Checkpoint | None = None
        self.loaded_bytes = self.packed_bytes = 0

    def open(self) -> dict[str, Any]:
        check_read(self._read)
        self.checkpoint = Checkpoint.open(self._path)
        # Binding looks at a few values here and there. What lies around them may be for others to read.
        self.checkpoint.expect_scattered_reads(True)
        return self.checkpoint.config

    def bind(self, model: Model, program: Program, format: str | None, lm_head: str | None) -> None:  # noqa: A002
        assert self.checkpoint is not None
        self.checkpoint.take_apart(model.stacks)
        self._bindings = bind(self.checkpoint, model, program, format, lm_head)
        self.packed_bytes = sum(binding.packed_bytes for binding in self._bindings)
        self._weights = program.weights

    def load(
        self, communicator: Communicator, team: Team, cpus: Sequence[int], progress: Progress
    ) -> tuple[Weights, Arena]:
        assert self.checkpoint is not None
        together = is_read_together(self.checkpoint, communicator, self._read)
        weights = {communicator.rank: self._weights}
        if together:
            # What a rank reads is for all of them: it has to know what each needs.
            weights = dict(enumerate(communicator.all_gather_object(self._weights)))
        loader = Loader(self.checkpoint, communicator, team, cpus, progress, together)
        loaded = loader.load(needed(self._bindings, weights, self.checkpoint))
        self.loaded_bytes = loader.nbytes
        return loaded

    def close(self) -> None:
        if self.checkpoint is not None:
            self.checkpoint.close()
