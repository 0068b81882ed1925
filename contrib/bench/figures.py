"""Memory and times that fio does not measure, each on a real mount with plain system calls."""

import ctypes
import os
import re
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from host import Failed, Place, is_alive, progress, resident, run, unmount, wait_until
from targets import Mount, quote

BLOCK = 4096
MIB = 1 << 20
TIB = 1 << 40
HUGE = 16 * TIB
# The block map is made of chunks of this many bytes of disk; one that is written into in places
# takes the same memory as one of which every other block is written.
CHUNK = 256 * MIB
# One write in each page of a chunk's bits, so that no page of them is memory never touched.
WRITES_A_CHUNK = 4

FALLOC_FL_KEEP_SIZE = 0x01
FALLOC_FL_PUNCH_HOLE = 0x02
FALLOC_FL_ZERO_RANGE = 0x10


@dataclass(frozen=True)
class Scale:
    """How much is measured."""

    rounds: int
    extents: int
    opens: int


@dataclass
class Row:
    """One figure: the median of its samples, and what is aimed at."""

    key: str
    title: str
    unit: str
    goal: str
    samples: list[float] = field(default_factory=list)
    #: The same on the bare host file, where that makes sense.
    host: list[float] = field(default_factory=list)
    note: str = ""

    @property
    def value(self) -> float | None:
        return median(self.samples) if self.samples else None


libc = ctypes.CDLL(None, use_errno=True)
# The name that takes 64-bit offsets on every machine.
libc.fallocate64.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


def fallocate(path: Path, mode: int, size: int) -> float:
    """fallocate(2) on the whole file; how long it took, in ms."""
    fd = os.open(path, os.O_RDWR)
    try:
        start = time.perf_counter()
        result = libc.fallocate64(fd, mode | FALLOC_FL_KEEP_SIZE, 0, size)
        took = time.perf_counter() - start
        if result != 0:
            raise Failed(f"fallocate {path}: {os.strerror(ctypes.get_errno())}")
        return took * 1e3
    finally:
        os.close(fd)


def write_at(path: Path, offsets) -> None:
    """Writes one block at each offset."""
    fd = os.open(path, os.O_WRONLY)
    try:
        for offset in offsets:
            os.pwrite(fd, b"\xa5" * BLOCK, offset)
    finally:
        os.close(fd)


def scatter(path: Path) -> None:
    """Writes into every chunk of the first TiB."""
    step = CHUNK // WRITES_A_CHUNK
    write_at(path, range(0, TIB, step))


def walk(path: Path, extents: int) -> float:
    """Walks all data with lseek; µs for one extent, that is for SEEK_DATA and SEEK_HOLE."""
    fd = os.open(path, os.O_RDONLY)
    try:
        size, at, found = os.fstat(fd).st_size, 0, 0
        start = time.perf_counter()
        while at < size:
            try:
                at = os.lseek(fd, at, os.SEEK_DATA)
            except OSError:
                break
            at = os.lseek(fd, at, os.SEEK_HOLE)
            found += 1
        took = time.perf_counter() - start
        if found != extents:
            raise Failed(f"{path}: {found} extents found where {extents} were written")
        return took * 1e6 / found
    finally:
        os.close(fd)


def seek_in_vain(path: Path, pairs: int) -> float:
    """Two seeks that end where they begin, as often as given; µs for two, what an extent takes of them."""
    fd = os.open(path, os.O_RDONLY)
    try:
        start = time.perf_counter()
        for at in range(0, pairs * BLOCK, BLOCK):
            os.lseek(fd, at, os.SEEK_HOLE)
            os.lseek(fd, at, os.SEEK_HOLE)
        return (time.perf_counter() - start) * 1e6 / pairs
    finally:
        os.close(fd)


def seek_data(path: Path, start: int, expected: int) -> float:
    """One SEEK_DATA, the median of many; µs."""
    fd = os.open(path, os.O_RDONLY)
    try:
        times = []
        for _ in range(200):
            begin = time.perf_counter()
            found = os.lseek(fd, start, os.SEEK_DATA)
            times.append((time.perf_counter() - begin) * 1e6)
            if found != expected:
                raise Failed(f"{path}: SEEK_DATA found {found}, not {expected}")
        return median(times)
    finally:
        os.close(fd)


def mounting(place: Place, program: Path, rounds: int) -> list[Row]:
    """From the start of `cowslip mount` to its end, when the mount answers."""
    overlay = quote(place.path / "untouched.cow")
    kinds = {"temporary": f"blank:{HUGE}", "persistent": f"blank:{HUGE},overlay={overlay}"}
    memory = Row("rss-untouched", "resident memory, untouched 16 TiB disk", "MiB", "< 32")
    end = Row("umount", "umount of it", "ms", "< 50")
    rows = []
    progress("mounts")
    for kind, source in kinds.items():
        row = Row(f"mount-{kind}", f"mount of an untouched 16 TiB disk, {kind} overlay", "ms", "< 50")
        mount = Mount(place, program, f"untouched-{kind}", source)
        # The first one creates the overlay, which is not what is asked.
        mount.start()
        mount.stop()
        for _ in range(rounds):
            start = time.perf_counter()
            mount.start()
            row.samples.append((time.perf_counter() - start) * 1e3)
            memory.samples.append(resident(mount.find_pid()))
            start = time.perf_counter()
            mount.stop()
            end.samples.append((time.perf_counter() - start) * 1e3)
        rows.append(row)
    return [*rows, end, memory]


def many_disks(place: Place, program: Path, scale: Scale) -> list[Row]:
    """Memory by the number of disks, and by how often they were opened."""
    rows = []
    for count in (1, 16, 256):
        progress(f"{count} disks")
        mount = Mount(place, program, f"many{count}", "blank:1G")
        mount.more = [f"d{number}=blank:1G" for number in range(count - 1)]
        mount.start()
        pid = mount.find_pid()
        rows.append(Row(f"rss-{count}", f"resident memory, {count} untouched disks", "MiB", "", [resident(pid)]))
        if count == 1:
            progress(f"{scale.opens:,} opens")
            before = resident(pid)
            for _ in range(scale.opens):
                os.close(os.open(mount.path, os.O_RDONLY))
            growth = Row("opens", f"what {scale.opens:,} opens add to it", "MiB", "nothing", [resident(pid) - before])
        mount.stop()
    return [*rows, growth]


def recovering(place: Place, program: Path, rounds: int) -> list[Row]:
    """Mounts of a disk whose map takes 64 MiB in memory: closed in order, and killed."""
    overlay = quote(place.path / "map.cow")
    mount = Mount(place, program, "map", f"blank:{HUGE},overlay={overlay}")
    mount.start()
    progress("a map of 64 MiB")
    write_at(mount.path, range(0, 2 * TIB, CHUNK // WRITES_A_CHUNK))
    opened = Row("mount-map", "mount of a disk with 64 MiB of map", "ms", "< 500")
    killed = Row("recovery", "mount of it after kill -9", "ms", "< 1000")
    for _ in range(rounds):
        for row in (opened, killed):
            if row is killed:
                os.kill(mount.find_pid(), signal.SIGKILL)
                wait_until("the end of the daemon", lambda: not is_alive(mount.pid))
                unmount(mount.point)
            else:
                mount.stop()
            start = time.perf_counter()
            mount.start()
            row.samples.append((time.perf_counter() - start) * 1e3)
    mount.stop()
    return [opened, killed]


def seeking(place: Place, program: Path, scale: Scale) -> list[Row]:
    """A walk along alternating data and holes, beside a host file of the same shape; and its requests alone."""
    size = scale.extents * 2 * BLOCK
    places = range(0, size, 2 * BLOCK)
    host = place.path / "extents.img"
    with open(host, "xb") as file:
        file.truncate(size)
    overlay = quote(place.path / "extents.cow")
    mount = Mount(place, program, "extents", f"blank:{size},overlay={overlay}")
    # A second disk, a second file: nothing but holes.
    mount.more = [f"holes=blank:{size}"]
    nothing = place.path / "nothing.img"
    with open(nothing, "xb") as file:
        file.truncate(size)
    mount.start()
    progress(f"writing {scale.extents:,} extents, twice")
    for path in (mount.path, host):
        write_at(path, places)
    os.sync()
    row = Row("seek-walk", f"SEEK_DATA/SEEK_HOLE walk, {scale.extents:,} extents, each", "µs", "<= 15")
    bound = Row("seek-bound", "two seeks on a disk of holes: no walk can be faster", "µs", "")
    for _ in range(scale.rounds):
        row.samples.append(walk(mount.path, scale.extents))
        row.host.append(walk(host, scale.extents))
        bound.samples.append(seek_in_vain(mount.point / "holes", scale.extents))
        bound.host.append(seek_in_vain(nothing, scale.extents))
    mount.stop()
    for path in (host, nothing):
        path.unlink()
    return [row, bound]


def whole_disk(place: Place, program: Path, rounds: int) -> list[Row]:
    """Nothing, and everything, on 16 TiB."""
    overlay = quote(place.path / "huge.cow")
    mount = Mount(place, program, "huge", f"blank:{HUGE},overlay={overlay}")
    mount.start()
    pid = mount.find_pid()
    last = HUGE - BLOCK
    progress("a disk of 16 TiB")
    write_at(mount.path, [last])
    across = Row("seek-across", "one SEEK_DATA across 16 TiB of nothing", "µs", "one step: as below")
    beside = Row("seek-beside", "one SEEK_DATA across 4 KiB of nothing", "µs", "")
    memory = Row("rss-scattered", "resident memory, every 256 MiB of 1 TiB written into", "MiB", "< 100")
    again = Row("rss-rewritten", "the same, freed and written again", "MiB", "< 100")
    punch = Row("punch", "punch that disk, all 16 TiB", "ms", "< 100")
    zero = Row("zero", "zero that disk, all 16 TiB", "ms", "< 100")
    for _ in range(rounds):
        across.samples.append(seek_data(mount.path, 0, last))
        beside.samples.append(seek_data(mount.path, last - BLOCK, last))
    for _ in range(rounds):
        for row, mode in ((punch, FALLOC_FL_PUNCH_HOLE), (zero, FALLOC_FL_ZERO_RANGE)):
            scatter(mount.path)
            # The first time the memory is that of this map; later also what freeing left behind.
            (again if memory.samples else memory).samples.append(resident(pid))
            row.samples.append(fallocate(mount.path, mode, HUGE))
    mount.stop()
    return [across, beside, memory, again, punch, zero]


def measure(place: Place, program: Path, scale: Scale) -> list[Row]:
    """All figures of real mounts."""
    rows = mounting(place, program, scale.rounds)
    rows += many_disks(place, program, scale)
    rows += recovering(place, program, scale.rounds)
    rows += seeking(place, program, scale)
    rows += whole_disk(place, program, scale.rounds)
    progress("")
    return rows


def map_memory(root: Path) -> Row:
    """The block map of 1 TiB with every other block written: benches/memory.rs builds just that.

    134 million blocks are 512 GiB of data; the map that they make does not depend on the data.
    """
    row = Row("map-alternating", "block map alone, every other block of 1 TiB written", "MiB", "< 100")
    try:
        output = run("cargo", "bench", "--locked", "--quiet", "--bench", "memory", cwd=root, timeout=None)
        found = re.search(r"every other block of 1 TiB: ([0-9.]+) MiB", output)
        if found:
            row.samples = [float(found.group(1))]
        else:
            row.note = "benches/memory.rs printed no figure"
    except Failed as error:
        row.note = str(error)
    return row
