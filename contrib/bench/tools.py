"""What plain tools do with a disk, each timed as a whole, in seconds.

The source of what is written is made once, beside the disks. File systems in a disk go over a loop
device, which only root can set up; they never discard, so that the host file keeps its blocks.
"""

import os
import sqlite3
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path

from host import Failed, run

# A tree like that of sources: many small files, a few large ones.
DIRECTORIES, FILES, LARGE = 60, 50, 20
INSERTS = 2000


class Scratch:
    """Where the tools find their sources and put what they make."""

    def __init__(self, path: Path, size: int):
        path.mkdir()
        self.path = path
        self.size = size
        self.point = path / "m"
        self.point.mkdir()
        self.image, self.tree, self.repository = path / "source.img", path / "tree.tar", path / "repository"
        self._make_tree()
        self._make_image()

    def _make_tree(self) -> None:
        tree = self.path / "tree"
        for directory in range(DIRECTORIES):
            (tree / f"d{directory}").mkdir(parents=True)
            for number in range(FILES):
                line = f"{directory} {number} {os.urandom(16).hex()}\n".encode()
                size = 500_000 if number == 0 and directory < LARGE else 200 + (number * 977) % 12_000
                (tree / f"d{directory}" / f"f{number}.c").write_bytes((line * (size // len(line) + 1))[:size])
        run("tar", "-cf", self.tree, "-C", tree, ".")
        git = ("git", "-C", tree, "-c", "user.name=bench", "-c", "user.email=bench@localhost")
        run(*git, "init", "-q")
        run(*git, "add", ".")
        run(*git, "commit", "-q", "-m", "tree")
        run("git", "clone", "-q", "--bare", tree, self.repository)
        run("rm", "-rf", tree)

    def _make_image(self) -> None:
        """Half data and half holes, in pieces of 1 MiB."""
        with open(self.image, "xb", buffering=0) as file:
            file.truncate(self.size)
            for at in range(0, self.size, 2 << 20):
                os.pwrite(file.fileno(), os.urandom(1 << 20), at)
            os.fsync(file.fileno())

    def out(self) -> Path:
        """The name of a file that is not there."""
        path = self.path / "out"
        path.unlink(missing_ok=True)
        return path


def timed(*command) -> float:
    start = time.monotonic()
    run(*command)
    return time.monotonic() - start


def convert_out(disk: Path, scratch: Scratch) -> float:
    return timed("qemu-img", "convert", "-f", "raw", "-O", "raw", disk, scratch.out())


def convert_in(disk: Path, scratch: Scratch) -> float:
    return timed("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", scratch.image, disk)


def copy_out(disk: Path, scratch: Scratch) -> float:
    return timed("cp", "--sparse=always", disk, scratch.out())


def tar_out(disk: Path, scratch: Scratch) -> float:
    # GNU tar reads nothing when it sees that its output is /dev/null, and takes a file for a hole
    # when stat(2) says that it has no blocks: all of what was read before has to come.
    start = time.monotonic()
    got = int(run("sh", "-c", 'tar -S -cf - -C "$1" "$2" | wc -c', "-", disk.parent, disk.name))
    took = time.monotonic() - start
    if got < scratch.size:
        raise Failed(f"tar -S took {got} bytes of {scratch.size}: the rest is lost")
    return took


@contextmanager
def loop_device(disk: Path, *options):
    device = run("losetup", *options, "-f", "--show", disk).strip()
    try:
        yield device
    finally:
        run("losetup", "-d", device)


@contextmanager
def mounted(device: str, point: Path, *options):
    run("mount", *options, device, point)
    try:
        yield
    except BaseException:
        subprocess.run(["umount", point], capture_output=True, check=False)
        raise
    run("umount", point)


def make_and_untar(disk: Path, scratch: Scratch) -> float:
    """A new file system, with a tree in it, unmounted."""
    start = time.monotonic()
    with loop_device(disk) as device:
        run("mkfs.ext4", "-q", "-F", "-E", "nodiscard", device)
        with mounted(device, scratch.point):
            run("tar", "-xf", scratch.tree, "-C", scratch.point)
    return time.monotonic() - start


def git_clone(disk: Path, scratch: Scratch) -> float:
    """A clone in the file system that `make_and_untar` left."""
    with loop_device(disk) as device:
        start = time.monotonic()
        with mounted(device, scratch.point):
            run("git", "clone", "-q", "--no-local", scratch.repository, scratch.point / "clone")
        return time.monotonic() - start


def sqlite_inserts(disk: Path, scratch: Scratch) -> float:
    """Transactions of one insert, in the file system that `make_and_untar` left."""
    with loop_device(disk) as device:
        start = time.monotonic()
        with mounted(device, scratch.point):
            base = sqlite3.connect(scratch.point / "base.db", isolation_level=None)
            try:
                base.execute("PRAGMA journal_mode = WAL")
                base.execute("PRAGMA synchronous = FULL")
                base.execute("CREATE TABLE t (id INTEGER PRIMARY KEY, name TEXT, value INTEGER)")
                for number in range(INSERTS):
                    base.execute("INSERT INTO t (name, value) VALUES (?, ?)", (f"name {number}", number * 7))
            except sqlite3.Error as error:
                raise Failed(f"sqlite: {error}") from error
            finally:
                base.close()
        return time.monotonic() - start
