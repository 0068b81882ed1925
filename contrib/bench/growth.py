"""Whether anything grows: disks that come and go in one mount, mounts of one overlay that come and go."""

import os
import time
from pathlib import Path

from figures import Row
from host import Place, mounts_in, progress, resident
from targets import Mount, quote

# Where programs leave what outlives them.
ROOMS = ("/tmp", "/var/tmp", "/dev/shm", "/run", os.environ.get("XDG_RUNTIME_DIR"))
KIB = 1024


def allocated(path: Path) -> int:
    """Bytes that a directory and all in it take on the device."""
    found = [path, *path.rglob("*")]
    return sum(entry.lstat().st_blocks * 512 for entry in found)


def log_size(overlay: Path) -> int:
    """Bytes of an overlay's log."""
    return sum(log.stat().st_size for log in overlay.rglob("log"))


def traces(place: Place) -> set[str]:
    """What cowslip has outside of the overlay: its mounts, its daemons, names in rooms that all share."""
    found = {f"mount {point}" for point in mounts_in(place.path)}
    for room in filter(None, ROOMS):
        found |= {str(path) for path in Path(room).glob("*cowslip*")}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes()
        except OSError:
            continue
        if os.fsencode(place.path) in words:
            found.add(f"process {process.name}")
    return found


def took(key: str, what: str, times: list[float]) -> list[Row]:
    """Milliseconds at the start and at the end, and in a note how long all of it took."""
    count, tenth = len(times), max(len(times) // 10, 1)
    return [
        Row(f"{key}-first", f"{what}, {count:,} times: one of the first tenth", "ms", "", times[:tenth],
            note=f"all of them took {sum(times) / 1e3:.0f} s"),
        Row(f"{key}-last", "one of the last tenth", "ms", "as at first", times[-tenth:]),
    ]


def disks(place: Place, program: Path, count: int) -> list[Row]:
    """Adds a disk to a mount and removes it, again and again."""
    mount = Mount(place, program, "coming", "blank:1G")
    mount.start()
    pid = mount.find_pid()
    before, times = resident(pid), []
    for number in range(count):
        if number % 100 == 0:
            progress(f"add and remove, {number:,} of {count:,}")
        start = time.perf_counter()
        mount.cowslip("add", mount.point, "more=blank:1G")
        mount.cowslip("remove", mount.point / "more")
        times.append((time.perf_counter() - start) * 1e3)
    after = resident(pid)
    mount.stop()
    memory = Row("rss-adds", f"what {count:,} add and remove of a disk add to resident memory", "MiB", "nothing",
                 [after - before], note=f"{before:.1f} MiB before, {after:.1f} MiB after")
    return [memory, *took("adds", "add and remove", times)]


def mounts(place: Place, program: Path, count: int) -> list[Row]:
    """Mounts a persistent overlay and unmounts it, again and again; nobody writes to it."""
    overlay = place.path / "going.cow"
    mount = Mount(place, program, "going", f"blank:1G,overlay={quote(overlay)}")
    there, times = traces(place), []
    # The first one creates the overlay, which is not what is asked.
    mount.start()
    mount.stop()
    before = allocated(overlay), log_size(overlay)
    for number in range(count):
        if number % 100 == 0:
            progress(f"mount and umount, {number:,} of {count:,}")
        start = time.perf_counter()
        mount.start()
        mount.stop()
        times.append((time.perf_counter() - start) * 1e3)
    after = allocated(overlay), log_size(overlay)
    left = sorted(traces(place) - there)
    sizes = [
        Row(key, f"{what} after {count:,} times", "KiB", "as after one", [new / KIB],
            note=f"{old / KIB:.1f} KiB after one, {new / KIB:.1f} KiB after {count:,}")
        for key, what, old, new in zip(
            ("mounts-directory", "mounts-log"), ("the overlay's directory", "its log"), before, after
        )
    ]
    remains = Row("mounts-left", "mounts, daemons and files left after them", "", "none", [len(left)])
    remains.note = ", ".join(left)
    return [*took("mounts", "mount and umount of one overlay", times), *sizes, remains]


def measure(place: Place, program: Path, count: int) -> list[Row]:
    """All of it, `count` times each."""
    rows = [*disks(place, program, count), *mounts(place, program, count)]
    progress("")
    return rows
