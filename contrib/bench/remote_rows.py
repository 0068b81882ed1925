"""The rows of `contrib/bench/remote`: what is measured on each target, and what is aimed at."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import host
from host import Failed, run
from origins import RANDOM, fio
from tools import loop_device, mounted
from turns import read_through

OURS, LINK, LOCAL = "cowslip", "link", "local base"
MIB = 1 << 20


@dataclass(frozen=True)
class Link:
    """A link: its round trip in seconds and its rate in bytes a second, 0 for no limit."""

    key: str
    title: str
    rtt: float
    rate: int


FAR = Link("far", "20 ms and 100 MB/s", 0.02, 100_000_000)
NEAR = Link("near", "0 ms, no limit", 0.0, 0)


@dataclass(frozen=True)
class Row:
    """One figure. `floor` is the ratio to `beside` aimed at, `lead` that to the best peer."""

    key: str
    title: str
    unit: str
    goal: str = ""
    beside: str | None = None
    floor: float | None = None
    lead: float | None = None

    @property
    def is_rate(self) -> bool:
        """Whether more is better."""
        return self.unit in ("MiB/s", "IOPS")


@dataclass(frozen=True)
class Job:
    """What is done on a target with the caches cold; gives a figure for each of its rows."""

    link: Link
    #: The image it is about: "disk", "cached" (with a cache of its own), "tree", "traced" or "huge".
    image: str
    run: Callable[["Bench", object], dict[str, float]]
    rows: tuple[Row, ...]


@dataclass
class Bench:
    """How much is done, on what, and what came of it."""

    place: host.Place
    protocol: str
    size: int
    seconds: float
    #: Files of the tree that are read.
    files: list[str]
    #: By image.
    targets: dict[str, list] = field(default_factory=dict)
    #: By link, row and target, a figure a round.
    samples: dict[tuple[str, str, str], list[float]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def peers(self) -> list[str]:
        names = [target.name for target in self.targets.get("disk", [])]
        return sorted(name for name in names if name not in (OURS, LINK, LOCAL))

    def of(self, job: Job, row: Row, name: str) -> list[float]:
        return self.samples.get((job.link.key, row.key, name), [])

    def median(self, job: Job, row: Row, name: str | None) -> float | None:
        values = self.of(job, row, name) if name else []
        return median(values) if values else None

    def ratio(self, job: Job, row: Row, to: str | None) -> float | None:
        """Of cowslip, median by median, above 1 when it is the better one; None where one is missing."""
        ours, other = self.median(job, row, OURS), self.median(job, row, to)
        if not ours or not other:
            return None
        return ours / other if row.is_rate else other / ours

    def best_peer(self, job: Job, row: Row) -> str | None:
        fit = [name for name in self.peers() if self.of(job, row, name)]
        return (max if row.is_rate else min)(fit, key=lambda name: self.median(job, row, name) or 0, default=None)


def counted(origin, work: Callable[[], None]) -> dict[str, float]:
    """Does `work`, and returns what went over the wire meanwhile, and the seconds that it took."""
    before, start = origin.wire.counts(), time.monotonic()
    work()
    took, after = time.monotonic() - start, origin.wire.counts()
    return {key: after[key] - before[key] for key in after} | {"s": took}


def read_at(path: Path, offset: int) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        if len(os.pread(fd, 4096, offset)) != 4096:
            raise Failed(f"{path}: a read came back short")
    finally:
        os.close(fd)


def first(bench: Bench, target) -> dict[str, float]:
    """A mount of a disk that nobody has mounted before, and its first read."""
    if target.name == LINK:
        # Of the link there is the round trip.
        return {"first-ms": FAR.rtt * 1e3}
    target.stop()
    mount = counted(target.origin, target.fresh)
    read = counted(target.origin, lambda: read_at(target.path, bench.size // 2 // 4096 * 4096))
    return {
        "mount-ms": mount["s"] * 1e3,
        "mount-turns": mount["turns"],
        "mount-requests": mount["requests"],
        "first-ms": read["s"] * 1e3,
        "first-requests": read["requests"],
    }


def known(key: str, figure: float | None) -> dict[str, float]:
    return {} if figure is None else {key: figure}


def direct_reads(bench: Bench, target, size: int, *options) -> dict:
    """Random reads of the mounted file, past the kernel's cache."""
    how = ("--ioengine=libaio", "--direct=1", f"--filename={target.path}")
    return fio(bench.seconds, size, *RANDOM, *how, *options)


def sequential(bench: Bench, target) -> dict[str, float]:
    """MiB/s of one reader, as long as the time or the disk lasts."""
    if target.name == LINK:
        return known("sequential", target.origin.sequential(bench.seconds, bench.size))
    target.fresh()
    with open(target.path, "rb", buffering=0) as file:
        buffer, moved, start = bytearray(MIB), 0, time.monotonic()
        while (took := time.monotonic() - start) < bench.seconds and (got := file.readinto(buffer)):
            moved += got
        took = time.monotonic() - start
    return {"sequential": moved / MIB / took}


def random_reads(bench: Bench, target) -> dict[str, float]:
    """4 KiB reads a second, 16 at a time, each place once."""
    if target.name == LINK:
        return known("random", target.origin.random(bench.seconds, bench.size))
    target.fresh()
    return {"random": direct_reads(bench, target, bench.size)["iops"]}


def whole(bench: Bench, target) -> dict[str, float]:
    """All of the disk: read through the mount, or copied to a file by a tool that knows the server."""
    if target.name == LINK:
        copy = bench.place.path / "copy"
        copy.unlink(missing_ok=True)
        took = counted(target.origin, lambda: target.origin.download(copy))["s"]
        copy.unlink()
    elif target.name == LOCAL:
        return {}
    else:
        target.forget()
        target.fresh()
        took = counted(target.origin, lambda: read_through(target.path))["s"]
    return {"whole": bench.size / MIB / took}


def warm(bench: Bench, target) -> dict[str, float]:
    """All of the disk again after a second mount: from the cache that the first one has left."""
    if target.name == LINK:
        return {}
    # Into the caches of this host: of the image, and of what was fetched where the row before has failed.
    target.fresh()
    read_through(target.path)
    target.stop()
    before = target.origin.wire.counts()["requests"]
    target.fresh()
    took = counted(target.origin, lambda: read_through(target.path))["s"]
    figures = {"warm": bench.size / MIB / took}
    if target.name == OURS:
        figures["warm-requests"] = target.origin.wire.counts()["requests"] - before
    return figures


def sectors_read(device: str) -> int:
    """The bytes that a block device has read."""
    return int(Path(f"/sys/block/{Path(device).name}/stat").read_text().split()[2]) * 512


def boot(bench: Bench, target) -> dict[str, float]:
    """A file system in the disk: mounted, listed, some of its files read."""
    if target.name == LINK:
        return {}
    target.fresh()
    moved, touched = read_tree(bench, target)
    return {"boot": moved["s"], "boot-fetched": moved["down"] / touched}


def traced(bench: Bench, target) -> dict[str, float]:
    """The same, with the trace of a mount before; what comes from the mount on counts."""
    if target.name == OURS:
        target.trace.unlink(missing_ok=True)
    target.fresh()
    read_tree(bench, target)
    target.stop()
    before = target.origin.wire.counts()["down"]
    target.fresh()
    moved, touched = read_tree(bench, target)
    figures = {"traced": moved["s"]}
    if target.name == OURS:
        figures["traced-fetched"] = (target.origin.wire.counts()["down"] - before) / touched
    return figures


def read_tree(bench: Bench, target) -> tuple[dict[str, float], int]:
    """Mounts the file system in the disk, lists it and reads files; what went over the wire, and the bytes read."""
    if os.geteuid() != 0:
        raise Failed("only root can set up a loop device")
    point = bench.place.path / "tree-mounted"
    point.mkdir(exist_ok=True)
    with loop_device(target.path, "-r") as device:
        touched = sectors_read(device)

        def work() -> None:
            with mounted(device, point, "-o", "ro"):
                run("ls", "-R", point)
                for name in bench.files:
                    (point / name).read_bytes()

        moved = counted(target.origin, work)
        touched = sectors_read(device) - touched
    if not touched:
        raise Failed("nothing was read through the loop device")
    return moved, touched


def memory(bench: Bench, target) -> dict[str, float]:
    """The most memory that a daemon takes while places of 1 TiB are read at random."""
    if target.name == LINK:
        return {}
    target.fresh()
    direct_reads(bench, target, 1 << 40, "--norandommap")
    for line in Path(f"/proc/{target.find_pid()}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return {"memory": int(line.split()[1]) / 1024}
    raise Failed("the daemon is gone")


FAR_SEQUENTIAL = Row("sequential", "sequential read 1M, cold", "MiB/s", beside=LINK, floor=0.9, lead=2)
FAR_RANDOM = Row("random", "random read 4k qd16, cold", "IOPS", "0.9 x 16/RTT = 720", beside=LINK, floor=0.9, lead=1)
JOBS = [
    Job(FAR, "disk", first, (
        Row("mount-ms", "mount of an untouched disk", "ms"),
        Row("mount-turns", "  its round trips, but for that of a connection", "", "<= 3 (http)"),
        Row("mount-requests", "  its messages to the server", "", "<= 2 (http)"),
        Row("first-ms", "first 4 KiB", "ms", "<= RTT + 15", LINK),
        Row("first-requests", "  its messages to the server", "", "<= 1"),
    )),
    Job(FAR, "disk", sequential, (FAR_SEQUENTIAL,)),
    Job(FAR, "disk", random_reads, (FAR_RANDOM,)),
    Job(FAR, "cached", whole, (
        Row("whole", "whole disk, read beside a parallel copy", "MiB/s", beside=LINK, floor=0.9),
    )),
    Job(FAR, "cached", warm, (
        Row("warm", "second mount with read-cache, whole disk", "MiB/s", beside=LOCAL, floor=0.95),
        Row("warm-requests", "  its messages to the server", "", "1 (http)"),
    )),
    Job(FAR, "tree", boot, (
        Row("boot", "loop mount, ls -R, 200 files", "s", lead=1),
        Row("boot-fetched", "  bytes fetched / touched", "", "<= 2.0"),
    )),
    Job(FAR, "traced", traced, (
        Row("traced", "  the same with a trace, beside a local base", "s", beside=LOCAL),
        Row("traced-fetched", "  bytes fetched from the mount on / touched", "", "<= 1.1"),
    )),
    Job(NEAR, "disk", sequential, (Row("sequential", "sequential read 1M, cold", "MiB/s", beside=LINK),)),
    Job(NEAR, "disk", random_reads, (
        Row("random", "random read 4k qd16, cold", "IOPS", ">= 1.5x nbdfuse", beside=LINK, lead=1),
    )),
    Job(NEAR, "huge", memory, (Row("memory", "memory, random reads of 1 TiB", "MiB", "<= 96"),)),
]
