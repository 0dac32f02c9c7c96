"""Whether the hosts of a job read one copy of a checkpoint together or each its own, and whether all copies are equal.

Knows hosts and files. How either is then read is in `supply`.
"""

from tpcpu.checkpoint import Checkpoint
from tpcpu.checkpoint.marks import Mark, is_on_network
from tpcpu.errors import CheckpointError, UsageError
from tpcpu.parallel.communicator import Communicator

READS = ("shared", "local")

_SAMPLES = 16
"""Of each file. Copies that differ in a few places only are taken for equal; those of another training never are."""


def check_read(read: str | None) -> None:
    """Raises UsageError for a way to read that does not exist."""
    if read not in (None, *READS):
        raise UsageError(f"--read {read} is unknown; {' and '.join(READS)} are, or leave it out")


def is_read_together(checkpoint: Checkpoint, communicator: Communicator, read: str | None) -> bool:
    """Whether each byte is to be read by one rank of the job; as `read` says, else as it is found. Collective.

    It is if the folder lies in a network's file system, or if several hosts see the very same files. Raises
    CheckpointError, on all ranks together, where hosts' copies are not equal.
    """
    error, found = None, None
    if communicator.host_rank == 0:
        try:
            found = _look(checkpoint, len(communicator.hosts) > 1)
        except CheckpointError as problem:
            error = problem
    communicator.raise_together(error)
    every = communicator.all_gather_object(found)
    firsts = [communicator.host_of.index(host) for host in range(len(communicator.hosts))]
    seen = [each for first in firsts if (each := every[first]) is not None]
    networks, marks = [network for network, _ in seen], [marks for _, marks in seen]
    for host, others in zip(communicator.hosts[1:], marks[1:], strict=True):
        _refuse_other_contents(communicator.hosts[0], marks[0], host, others)
    if read is not None:
        return read == "shared"
    same = all(ours.is_same_file(theirs) for others in marks[1:] for ours, theirs in zip(marks[0], others, strict=True))
    return any(networks) or (same and len(marks) > 1)


def _look(checkpoint: Checkpoint, mark: bool) -> tuple[bool, list[Mark]]:
    """Whether the weights lie in a network's file system, and, if asked for, what the files are known by."""
    layouts: dict[object, list[object]] = {}
    if mark:
        for tensor in checkpoint.tensors.values():
            place = checkpoint.place(tensor.name)
            layout = tensor.name, tensor.dtype, tensor.shape, place and place[1]
            layouts.setdefault(tensor.file, []).append(layout)
    files = [file for file in (checkpoint.path / "config.json", *checkpoint.files) if mark and file.is_file()]
    return (
        any(is_on_network(file) for file in checkpoint.files),
        [Mark.of(file, repr(layouts.get(file)), _SAMPLES) for file in files],
    )


def _refuse_other_contents(host: str, ours: list[Mark], other_host: str, theirs: list[Mark]) -> None:
    advice = f"all hosts need the same model: copy the folder of {host} to {other_host} anew"
    names = [[mark.file.name for mark in marks] for marks in (ours, theirs)]
    if names[0] != names[1]:
        differing = sorted(set(names[0]) ^ set(names[1]))
        raise CheckpointError(
            f"{theirs[0].file.parent} on {other_host} and on {host}: only one has {differing}; {advice}"
        )
    for mark, other in zip(ours, theirs, strict=True):
        if not other.is_copy(mark):
            what = "contents" if other.nbytes == mark.nbytes else f"{other.nbytes} and {mark.nbytes} bytes"
            raise CheckpointError(
                f"{other.file} on {other_host} differs from {mark.file.name} on {host} ({what}); {advice}"
            )
