"""A four-socket server as a virtual machine: builds its ramdisk and boots it with this machine's files as its root.

The guest sees this machine's file system read-only, its own tmpfs on SCRATCH (its TMPDIR and HOME) and /dev/shm, and
runs one script. Needs no hardware virtualisation, and Debian's packages: what is missing is installed or unpacked when
run as root.

    python tests/numa/machine.py SCRIPT      # boots, runs the file SCRIPT with sh and prints its output
"""

import argparse
import contextlib
import gzip
import lzma
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SOCKETS = 4
# not /tmp: the project under test may be there
SCRATCH = "/mnt"
# what mounts the host's root in the guest; what these need is found in the modules themselves
MODULES = ("virtio_pci", "9pnet_virtio", "9p")
BEGUN = "guest begins"
DONE = "guest ended with code "

INIT = """#!/bin/busybox sh
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sys /sys
for module in {modules}; do insmod /modules/$module.ko; done
mount -t 9p -o trans=virtio,version=9p2000.L,ro,msize=1048576,cache=loose host /host || echo "no root"
mount -t devtmpfs dev /dev
mkdir -p /dev/shm
for folder in /dev /proc /sys; do mount -o bind $folder /host$folder; done
mount -t tmpfs tmpfs /host{scratch}
cp /script /host{scratch}/script
export HOME={scratch} TMPDIR={scratch}
mount -t tmpfs tmpfs /host/dev/shm
ifconfig lo 127.0.0.1 up
hostname four-sockets
echo
echo "{begun}"
chroot /host /bin/sh {scratch}/script
echo "{done}$?"
poweroff -f
"""


class MachineError(Exception):
    """The virtual machine cannot be built or did not finish; says what is missing."""


@dataclass(frozen=True)
class Kernel:
    """A kernel image and the folder of its modules."""

    image: Path
    modules: Path


def cache_folder() -> Path:
    """Where the unpacked kernel is kept between runs."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tpcpu-tests" / "machine"


def prepare() -> Kernel:
    """Have qemu, busybox and a stock kernel at hand, installing what is missing; MachineError where that fails."""
    missing = [
        package
        for package, program in (("qemu-system-x86", "qemu-system-x86_64"), ("busybox-static", "busybox"))
        if shutil.which(program) is None
    ]
    if missing:
        if os.geteuid() != 0:
            raise MachineError(f"install {' and '.join(missing)} (only root can do it from here)")
        environ = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        _command(["apt-get", "update", "-q"], env=environ)
        _command(["apt-get", "install", "-q", "-y", "--no-install-recommends", *missing], env=environ)
    folder = cache_folder()
    if not list(folder.glob("boot/vmlinuz-*")):
        _unpack_kernel(folder)
    image = next(folder.glob("boot/vmlinuz-*"))
    return Kernel(image, folder / "lib" / "modules" / image.name.removeprefix("vmlinuz-") / "kernel")


def _unpack_kernel(folder: Path) -> None:
    """Download Debian's stock kernel as a package and unpack it: it is not installed."""
    listing = _command(["apt-cache", "depends", "linux-image-amd64"])
    names = [line.split()[-1] for line in listing.splitlines() if "Depends: linux-image-" in line]
    if not names:
        raise MachineError("apt knows no linux-image-amd64; run apt-get update")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        _command(["apt-get", "-q", "-o", "APT::Sandbox::User=root", "download", names[0]], cwd=scratch)
        package = next(Path(scratch).glob("*.deb"))
        _command(["dpkg-deb", "-x", str(package), scratch])
        # the image comes last: it is what says that the cache is complete
        shutil.rmtree(folder / "lib", ignore_errors=True)
        shutil.move(Path(scratch) / "lib", folder / "lib")
        (folder / "boot").mkdir(exist_ok=True)
        image = next(Path(scratch).glob("boot/vmlinuz-*"))
        shutil.move(image, folder / "boot" / image.name)


def build_ramdisk(kernel: Kernel, script: str, folder: Path) -> Path:
    """The initial ramdisk: busybox, the modules that mount the host's root, and an init that runs `script` there."""
    tree = folder / "ramdisk"
    for name in ("bin", "modules", "proc", "sys", "dev", "host"):
        (tree / name).mkdir(parents=True)
    busybox = shutil.which("busybox")
    assert busybox is not None
    shutil.copy(busybox, tree / "bin" / "busybox")
    modules = modules_in_order(kernel.modules)
    for name, content in modules.items():
        (tree / "modules" / f"{name}.ko").write_bytes(content)
    init = tree / "init"
    (tree / "script").write_text(script)
    init.write_text(INIT.format(modules=" ".join(modules), scratch=SCRATCH, begun=BEGUN, done=DONE))
    init.chmod(0o755)
    names = "\n".join(["."] + [str(path.relative_to(tree)) for path in sorted(tree.rglob("*"))])
    busybox_cpio = [busybox, "cpio", "-o", "-H", "newc"]
    archive = subprocess.run(busybox_cpio, cwd=tree, input=names.encode(), capture_output=True, check=True).stdout
    ramdisk = folder / "ramdisk.gz"
    ramdisk.write_bytes(gzip.compress(archive, 1))
    return ramdisk


def modules_in_order(folder: Path) -> dict[str, bytes]:
    """MODULES and what they depend on, in the order of insertion; what is built into the kernel is left out."""
    files = {path.name.partition(".")[0]: path for path in folder.rglob("*.ko*")}
    ordered: dict[str, bytes] = {}

    def add(name: str) -> None:
        if name in ordered or name not in files:
            return
        content = files[name].read_bytes()
        if files[name].suffix == ".xz":
            content = lzma.decompress(content)
        depends = content.partition(b"\0depends=")[2].partition(b"\0")[0].decode()
        for needed in filter(None, depends.split(",")):
            add(needed)
        ordered[name] = content

    for name in MODULES:
        add(name)
    return ordered


def qemu_command(kernel: Kernel, ramdisk: Path, memory_gb: int) -> list[str]:
    """Four sockets of one core, each with a quarter of the memory on a NUMA node of its own."""
    share = memory_gb * 1024 // SOCKETS
    nodes = []
    for node in range(SOCKETS):
        nodes += ["-object", f"memory-backend-ram,id=m{node},size={share}M"]
        nodes += ["-numa", f"node,nodeid={node},cpus={node},memdev=m{node}"]
    return [
        "qemu-system-x86_64", "-accel", "tcg,thread=multi", "-cpu", "max",
        "-smp", f"{SOCKETS},sockets={SOCKETS},cores=1,threads=1", "-m", f"{share * SOCKETS}M", *nodes,
        "-kernel", str(kernel.image), "-initrd", str(ramdisk), "-append", "console=ttyS0 panic=-1 quiet",
        "-virtfs", "local,path=/,mount_tag=host,security_model=none,readonly=on,multidevs=remap",
        "-nic", "none", "-nographic", "-no-reboot",
    ]  # fmt: skip


def run(script: str, timeout: float, memory_gb: int = 8) -> tuple[int, str]:
    """Boot, run the shell script `script` in the guest, and return its exit code and what was printed.

    MachineError if the machine cannot be built or does not finish within `timeout` seconds.
    """
    kernel = prepare()
    with _scratch() as folder:
        ramdisk = build_ramdisk(kernel, script, folder)
        arguments = qemu_command(kernel, ramdisk, memory_gb)
        try:
            # the console is a pipe, and nothing is typed
            done = subprocess.run(
                arguments, stdin=subprocess.DEVNULL, capture_output=True, timeout=timeout, check=False
            )
        except subprocess.TimeoutExpired as error:
            output = (error.stdout or b"").decode(errors="replace")
            raise MachineError(f"the guest did not end within {timeout:.0f} s:\n{output}") from error
    output = done.stdout.decode(errors="replace").replace("\r\n", "\n")
    before, found, code = output.rpartition(DONE)
    if not found:
        raise MachineError(f"the guest never ended:\n{output}\n{done.stderr.decode(errors='replace')}")
    # what the firmware and the kernel say first is no part of it
    return int(code.split()[0]), before.partition(BEGUN + "\n")[2]


@contextlib.contextmanager
def _scratch() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="tpcpu-machine-") as folder:
        yield Path(folder)


def _command(arguments: list[str], cwd: str | None = None, env: dict[str, str] | None = None) -> str:
    done = subprocess.run(arguments, cwd=cwd, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise MachineError(f"{' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Run a script in a four-socket virtual machine")
    parser.add_argument("script", type=Path)
    parser.add_argument("--timeout", type=float, default=300)
    options = parser.parse_args()
    ended, printed = run(options.script.read_text(), options.timeout)
    print(printed)
    sys.exit(ended)
