"""What the fio jobs run on: the host file, cowslip, and the peers, each over a file of one kind.

A target has a `path` to open, and is `below` in a file of the host; no two of those that are read
cold share that one. `fresh` gives it an empty overlay over the base, so that every block
is a first touch again; `stop` takes down whatever is up. Peers run with the defaults they ship.
"""

import json
import os
import shutil
import signal
import subprocess
from pathlib import Path

import jobs
from host import Failed, Place, end, mounts_in, run, unmount, wait_until

CHUNK = 1 << 20


def fill(path: Path, size: int) -> Path:
    """Writes a file whose every block is allocated and unlike the others."""
    noise = bytearray(os.urandom(CHUNK))
    with open(path, "xb", buffering=0) as file:
        for index in range(size // CHUNK):
            for at in range(0, CHUNK, 4096):
                noise[at : at + 8] = (index * CHUNK + at).to_bytes(8, "little")
            file.write(noise)
        os.fsync(file.fileno())
        # Whatever the umask: a user who may nothing reads some of them.
        os.fchmod(file.fileno(), 0o644)
    return path


def quote(path: Path) -> str:
    """A path as part of a disk: commas doubled."""
    return str(path).replace(",", ",,")


class HostFile:
    """The bare file. It is overwritten in place; there is nothing to be fresh."""

    name = jobs.HOST
    fsync_is_real = True

    def __init__(self, place: Place, size: int):
        self.path = self.below = fill(place.path / "host.img", size)

    def is_up(self) -> bool:
        return True

    def fresh(self) -> None:
        pass

    def stop(self) -> None:
        pass


class SparseHost:
    """A file of the host that has no block until it is written, made anew each time."""

    name = jobs.SPARSE
    fsync_is_real = True

    def __init__(self, place: Place, size: int):
        self.path = place.path / "sparse.img"
        self.size = size

    def is_up(self) -> bool:
        return True

    def fresh(self) -> None:
        self.path.unlink(missing_ok=True)
        with open(self.path, "xb") as file:
            file.truncate(self.size)

    def stop(self) -> None:
        pass


class Mount:
    """A cowslip mount of one disk, `disk` in the mount."""

    fsync_is_real = True
    #: The words that cowslip's commands are run by.
    by: tuple[str, ...] = ()

    def __init__(self, place: Place, program: Path, name: str, source: str, *options: str):
        self.program = program
        self.options = options
        self.point = place.path / name
        self.path = self.point / "disk"
        self.disk = f"disk={source}"
        #: Other disks of the mount.
        self.more = []
        self.pid = None
        self.point.mkdir()
        place.keep(self)

    def cowslip(self, *words, **more) -> str:
        """Runs cowslip, as whoever mounts."""
        return run(*self.by, self.program, *words, **more)

    def start(self) -> None:
        self.cowslip("mount", *self.options, self.point, self.disk, *self.more)
        # Nobody but the user who mounts may look into it.
        if not self.by:
            self.path.stat()

    def fresh(self) -> None:
        """Mounted; there is no overlay to be empty."""
        if not self.is_up():
            self.start()
            self.find_pid()

    def is_up(self) -> bool:
        return bool(mounts_in(self.point))

    def find_pid(self) -> int:
        status = json.loads(self.cowslip("status", "--json", self.point))
        self.pid = status["mounts"][0]["pid"]
        return self.pid

    def stop(self) -> None:
        if not self.is_up():
            return
        try:
            self.cowslip("umount", self.point, timeout=120)
        except Failed:
            unmount(self.point)
            if self.pid is not None:
                end(self.pid)
            raise


class Cowslip(Mount):
    """cowslip with a persistent overlay, so fsync has something to make durable."""

    name = jobs.OURS
    options: tuple[str, ...] = ()

    def __init__(self, place: Place, base: Path, program: Path):
        self.below = base
        self.overlay = place.path / f"{self.name}.cow"
        source = f"{quote(base)},overlay={quote(self.overlay)}"
        super().__init__(place, program, self.name, source, *self.options)

    def fresh(self) -> None:
        self.stop()
        shutil.rmtree(self.overlay, ignore_errors=True)
        self.start()
        self.find_pid()


class Writeback(Cowslip):
    """The same, with the kernel holding writes back."""

    name = jobs.WRITEBACK
    options = ("--cache", "writeback")


class Plain(Mount):
    """A disk without an overlay, in the mode that it is named after, passed through (root)."""

    def __init__(self, place: Place, file: Path, program: Path, name: str):
        self.name = name
        super().__init__(place, program, name.replace("=", "-"), f"{quote(file)},{name},passthrough")


class Holes(Mount):
    """A disk that has no data: every read is answered from memory, the host is not asked."""

    name = jobs.HOLES

    def __init__(self, place: Place, size: int, program: Path):
        super().__init__(place, program, "holes", f"blank:{size}")


class User(Mount):
    """cowslip with a persistent overlay, mounted by a user who may nothing; nobody else can look into it."""

    name = jobs.USER
    by = jobs.AS_USER

    def __init__(self, place: Place, base: Path, program: Path):
        self.below = base
        home = place.path / "home"
        home.mkdir()
        # That user can get here, and need not get to where the program lies.
        place.path.chmod(0o711)
        program = Path(shutil.copy(program, home / "cowslip"))
        program.chmod(0o755)
        super().__init__(place, program, "home/m", f"{quote(base)},overlay={quote(home / 'user.cow')}")
        for path in (home, self.point):
            os.chown(path, 65534, 65534)


class Peer:
    """Another program that shows a copy-on-write disk as a file: a child with a mount."""

    #: The programs it takes.
    programs: tuple[str, ...]

    def __init__(self, place: Place, base: Path):
        self.base = self.below = base
        self.dir = place.path / self.name
        self.dir.mkdir()
        self.child = None
        place.keep(self)

    @classmethod
    def missing(cls) -> str | None:
        """The first of its programs that is not installed."""
        return next((name for name in cls.programs if shutil.which(name) is None), None)

    def size(self) -> int:
        """The size of the disk in bytes."""
        return self.base.stat().st_size

    def launch(self, *command) -> None:
        """Starts it and waits until the disk is there."""
        with open(self.dir / "messages", "wb") as messages:
            # A session of its own: ^C is for this program, which then unmounts in order.
            self.child = subprocess.Popen(
                [str(word) for word in command],
                stdin=subprocess.DEVNULL,
                stdout=messages,
                stderr=messages,
                start_new_session=True,
            )
        wait_until(f"the disk of {self.name}", self.is_ready)

    def is_up(self) -> bool:
        return self.child is not None and self.child.poll() is None and bool(mounts_in(self.dir))

    def is_ready(self) -> bool:
        if self.child.poll() is not None:
            lines = (self.dir / "messages").read_text().split("\n")
            raise Failed(f"{self.name} ended at once: {lines[0]}")
        return self.is_up() and self.path.stat().st_size == self.size()

    def stop(self) -> None:
        for point in mounts_in(self.dir):
            unmount(point)
        if self.child is None:
            return
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                # With the server that nbdfuse has started: they are one session.
                os.killpg(self.child.pid, number)
                self.child.wait(20)
                break
            except ProcessLookupError:
                self.child.wait()
                break
            except subprocess.TimeoutExpired:
                continue
        self.child = None


class Qemu(Peer):
    """qemu-storage-daemon's FUSE export of a qcow2 overlay over the raw base."""

    name = "qemu"
    fsync_is_real = True
    programs = ("qemu-storage-daemon", "qemu-img")

    def fresh(self) -> None:
        self.stop()
        overlay = self.dir / "overlay.qcow2"
        overlay.unlink(missing_ok=True)
        run("qemu-img", "create", "-q", "-f", "qcow2", "-b", self.base, "-F", "raw", overlay)
        # The export takes the place of a file.
        self.path = self.dir / "disk"
        self.path.touch()
        escaped = quote(self.path)
        self.launch(
            *("qemu-storage-daemon", "--blockdev", f"file,node-name=file,filename={quote(overlay)}"),
            *("--blockdev", "qcow2,node-name=disk,file=file"),
            *("--export", f"fuse,id=export,node-name=disk,mountpoint={escaped},writable=on"),
        )


class Nbdkit(Peer):
    """nbdkit's cow filter over the raw base, through nbdfuse."""

    name = "nbdkit"
    # The filter drops its overlay at exit and answers a flush without doing anything.
    fsync_is_real = False
    programs = ("nbdkit", "nbdfuse")

    def fresh(self) -> None:
        self.stop()
        point = self.dir / "m"
        point.mkdir(exist_ok=True)
        self.path = point / "disk"
        self.launch("nbdfuse", self.path, "[", "nbdkit", "--filter=cow", "file", self.base, "]")


class Xmount(Peer):
    """xmount over the raw base with a cache file. It goes into the background by itself."""

    name = "xmount"
    fsync_is_real = False
    programs = ("xmount",)

    def fresh(self) -> None:
        self.stop()
        point, cache = self.dir / "m", self.dir / "cache"
        point.mkdir(exist_ok=True)
        cache.unlink(missing_ok=True)
        run("xmount", "--in", "raw", self.base, "--out", "raw", "--cache", cache, point)
        self.path = point / f"{self.base.stem}.dd"
        wait_until(f"the disk of {self.name}", self.path.exists)

    def is_up(self) -> bool:
        return bool(mounts_in(self.dir))


PEERS = [Qemu, Nbdkit, Xmount]
