"""By what a file of a checkpoint is known on another host: whether it is the very same, or a copy, or something else.

Knows files and file systems; nothing of hosts and of what is in the files.
"""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tpcpu.errors import CheckpointError

_SAMPLE_BYTES = 4096

_NETWORKS = frozenset(
    "9p afs beegfs beegfs_nodev ceph cifs gfs2 glusterfs gpfs lustre nfs nfs4 ocfs2 orangefs panfs pvfs2 smb3 smbfs "
    "vboxsf virtiofs wekafs".split()
)
"""File systems that several hosts see, as the kernel names them; and those that a program serves, which begin so:"""
_SERVED = "fuse."


@dataclass(frozen=True)
class Mark:
    """What is known of a file without reading it."""

    file: Path
    nbytes: int
    inode: int
    modified_ns: int
    digest: str
    """Of its layout and of samples of its contents."""

    @classmethod
    def of(cls, file: Path, layout: str, count: int) -> "Mark":
        """`layout`: what was made out about the file already. Raises CheckpointError where it cannot be read."""
        digest = hashlib.sha256(layout.encode())
        try:
            status = file.stat()
            for sample in samples(file, count):
                digest.update(sample)
        except OSError as error:
            raise CheckpointError(f"{file}: cannot be read: {error.strerror}") from None
        return cls(file, status.st_size, status.st_ino, status.st_mtime_ns, digest.hexdigest())

    def is_same_file(self, other: "Mark") -> bool:
        """Whether this is most likely the file that the other is, seen from another host."""
        return (self.nbytes, self.inode, self.modified_ns) == (other.nbytes, other.inode, other.modified_ns)

    def is_copy(self, other: "Mark") -> bool:
        """Whether it most likely holds what the other does."""
        return (self.nbytes, self.digest) == (other.nbytes, other.digest)


def samples(file: Path, count: int) -> Iterator[bytes]:
    """That many short pieces of a file, spread evenly from its beginning to its end."""
    size = file.stat().st_size
    # Unbuffered: a buffer would read on behind each of them.
    with open(file, "rb", buffering=0) as opened:
        for i in range(count):
            opened.seek(max(size - _SAMPLE_BYTES, 0) * i // (count - 1))
            yield opened.read(_SAMPLE_BYTES)


def is_on_network(file: Path) -> bool:
    """Whether the file lies in a file system that other hosts may see too."""
    kind = _file_system(os.stat(file).st_dev, Path("/proc/self/mountinfo").read_text("utf-8", "replace"))
    return kind in _NETWORKS or kind.startswith(_SERVED)


def _file_system(device: int, mounts: str) -> str:
    """The type of the file system with that device number, as mountinfo has it; empty if it does not say."""
    number = f"{os.major(device)}:{os.minor(device)}"
    for line in mounts.splitlines():
        fields, _, behind = line.partition(" - ")
        if fields.split()[2] == number:
            return behind.split()[0]
    return ""
