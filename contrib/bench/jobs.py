"""The jobs of fio and of plain tools: what they are, which caches are warm for each, and the rounds.

The targets take turns inside a round, job by job, and another one begins in each round: whatever
slows the machine for a while slows them all. Before every job the host writes back what the last
one left dirty, so no target pays for another.
"""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from statistics import median

import host
import tools
from host import Failed, drop_caches

# The slowest reader needs no longer for a figure; a write must do all of its work, or the second
# pass would touch blocks that the first has not.
READ_SECONDS = 5

# The names of the targets that jobs are made for.
HOST, OURS, WRITEBACK, READ_ONLY, IN_PLACE = "host file", "cowslip", "writeback", "mode=ro", "mode=rw"


class Caches(Enum):
    """What a job finds in the caches."""

    WARM = "warm: the whole disk was read through the same file just before"
    COLD = "cold: all caches of the host were dropped just before"
    KEPT = "as the job before left them"


class Begins(Enum):
    """The overlay a job begins with."""

    FRESH = "empty: every block is touched for the first time"
    AS_IT_IS = "as the job before left it"


class Section(Enum):
    """Jobs that may be compared with one another."""

    CACHED = "Cached reads: page cache warm, the disk's data lies in the base"
    COLD = "Cold reads: caches dropped before each, the disk's data lies in the base"
    DIRECT = "O_DIRECT, no fsync: all but the host file go through the host's page cache, where the base is warm"
    FSYNC = "Ends with fsync, or has one after each write: durable when it ends"
    WRITEBACK = "--cache writeback, ends with fsync"
    READ_ONLY = "mode=ro,passthrough, beside the file itself"
    IN_PLACE = "mode=rw,passthrough, beside a file like it"
    TOOLS = "Plain tools, seconds; nothing is made durable but by the unmount"


@dataclass(frozen=True)
class Job:
    """One job: of fio, by its options, or of a tool. `share` is the part of the disk fio moves.

    `floor` is the ratio to the host aimed at, `lead` that to the best peer. `ours` is the target
    it is made for; host file and peers run it as well.
    """

    key: str
    title: str
    section: Section
    caches: Caches
    options: tuple[str, ...] = ()
    share: float = 1
    floor: float | None = None
    lead: float | None = None
    begins: Begins = Begins.AS_IT_IS
    ours: str = OURS
    tool: Callable | None = None

    @property
    def unit(self) -> str:
        if self.tool is not None:
            return "s"
        return "MiB/s" if "--bs=1M" in self.options else "IOPS"

    def is_for(self, target) -> bool:
        """Whether a target takes part."""
        if target.name in (WRITEBACK, READ_ONLY, IN_PLACE):
            return self.ours == target.name
        has_peers = self.section not in (Section.READ_ONLY, Section.IN_PLACE)
        return target.name == HOST or self.ours == target.name or (has_peers and target.name != OURS)


def _sequential(way: str, *more: str) -> tuple[str, ...]:
    return (f"--rw={way}", "--bs=1M", "--ioengine=psync", *more)


def _random(way: str, size: str, *more: str) -> tuple[str, ...]:
    # The default seed, which is the same every time: two passes touch the same blocks.
    return (f"--rw=rand{way}", f"--bs={size}", *more)


# How deep O_DIRECT jobs are, in words of the title, of the key and of fio.
_DEPTHS = {
    "qd1": ("--ioengine=psync", "--direct=1"),
    "qd16": ("--ioengine=libaio", "--iodepth=16", "--direct=1"),
    "4 jobs": ("--ioengine=psync", "--direct=1", "--numjobs=4", "--size=25%", "--offset_increment=25%"),
}
# Ratios aimed at, to the host and to the best peer.
_READ_GOALS = {("4k", "qd1"): (2, 1.2), ("4k", "qd16"): (2.5, 4)}
_WRITE_GOALS = {("4k", "qd1"): (2, 2.5), ("4k", "qd16"): (2.5, 4)}
_NONE = (None, None)


def _reads() -> list[Job]:
    """Of what lies in the base."""
    warm, cold = Caches.WARM, Caches.COLD
    plain, sequential = "--ioengine=psync", _sequential("read")
    direct = _sequential("read", "--direct=1")
    jobs = [
        Job("seq-read-cached", "sequential read 1M", Section.CACHED, warm, sequential, 4, 0.95, 3),
        Job("rand-read-cached", "random read 4k", Section.CACHED, warm, _random("read", "4k", plain), 0.5, 0.95, 3),
        Job("seq-read-cold", "sequential read 1M", Section.COLD, cold, sequential, 1, 0.9, 1.3),
        Job("rand-read-cold", "random read 4k O_DIRECT qd16", Section.COLD, cold,
            _random("read", "4k", *_DEPTHS["qd16"]), 1 / 8),
        Job("seq-read-direct", "sequential read 1M", Section.DIRECT, warm, direct, 1),
    ]
    for size, share in (("4k", 1 / 8), ("64k", 1 / 2)):
        for depth, options in _DEPTHS.items():
            floor, lead = _READ_GOALS.get((size, depth), _NONE)
            key = f"rand-read-{size}-{depth}".replace(" ", "")
            jobs.append(Job(key, f"random read {size} {depth}", Section.DIRECT, warm,
                            _random("read", size, *options), share, floor, lead))
    return jobs


def _twice(key: str, title: str, section: Section, options: tuple[str, ...], share: float,
           first: tuple = _NONE, again: tuple = _NONE) -> list[Job]:
    """A writing job on an empty overlay, and the same blocks once more."""
    kept = Caches.KEPT
    return [
        Job(f"{key}-first", f"{title}, first touch", section, kept, options, share, *first, Begins.FRESH),
        Job(f"{key}-again", f"{title}, same blocks again", section, kept, options, share, *again),
    ]


def _writes() -> list[Job]:
    jobs = []
    for size, share in (("4k", 1 / 16), ("64k", 1 / 4)):
        for depth, options in _DEPTHS.items():
            goals = _WRITE_GOALS.get((size, depth), _NONE)
            key = f"rand-write-{size}-{depth}".replace(" ", "")
            jobs += _twice(key, f"random write {size} {depth}", Section.DIRECT,
                           _random("write", size, *options), share, _NONE, goals)
    jobs.append(Job("mixed-4k-qd16", "random 4k qd16, 70 % reads", Section.DIRECT, Caches.KEPT,
                    _random("rw", "4k", "--rwmixread=70", *_DEPTHS["qd16"]), 1 / 8))
    jobs += _twice("seq-write-direct", "sequential write 1M", Section.DIRECT,
                   _sequential("write", "--direct=1"), 1, _NONE, (0.5, 1))
    plain, end = "--ioengine=psync", "--end_fsync=1"
    small, each = _random("write", "4k", plain, end), _random("write", "4k", plain, "--fsync=1")
    jobs += _twice("rand-write-fsync", "random write 4k buffered, one fsync", Section.FSYNC, small, 1 / 8,
                   _NONE, (0.2, 2))
    jobs += _twice("write-fsync-each", "random write 4k, fsync after each", Section.FSYNC, each, 1 / 512,
                   (0.45, 1.5), (0.8, 1.5))
    jobs += _twice("seq-write-fsync", "sequential write 1M, one fsync", Section.FSYNC,
                   _sequential("write", end), 1, _NONE, (0.9, 1.1))
    jobs.append(Job("rand-write-writeback", "random write 4k buffered, one fsync", Section.WRITEBACK, Caches.KEPT,
                    small, 1 / 8, 0.4, 4, Begins.FRESH, WRITEBACK))
    return jobs


def _modes() -> list[Job]:
    """Disks without an overlay."""
    warm, kept = Caches.WARM, Caches.KEPT
    plain, end = "--ioengine=psync", "--end_fsync=1"
    kinds = [
        ("seq-read", "sequential read 1M, cached", warm, _sequential("read"), 4),
        ("rand-read", "random read 4k, cached", warm, _random("read", "4k", plain), 0.5),
        ("rand-read-qd16", "random read 4k O_DIRECT qd16", warm, _random("read", "4k", *_DEPTHS["qd16"]), 1 / 8),
        ("rand-write-qd16", "random write 4k O_DIRECT qd16", kept, _random("write", "4k", *_DEPTHS["qd16"]), 1 / 16),
        ("rand-write", "random write 4k buffered, one fsync", kept, _random("write", "4k", plain, end), 1 / 8),
        ("seq-write", "sequential write 1M, one fsync", kept, _sequential("write", end), 1),
    ]
    return [
        Job(f"{ours}-{key}", title, section, caches, options, share, 0.98, ours=ours)
        for ours, section, count in ((READ_ONLY, Section.READ_ONLY, 3), (IN_PLACE, Section.IN_PLACE, len(kinds)))
        for key, title, caches, options, share in kinds[:count]
    ]


def _tools(root: bool) -> list[Job]:
    warm, kept = Caches.WARM, Caches.KEPT
    jobs = [
        Job("convert-out", "qemu-img convert out of it", Section.TOOLS, warm, floor=0.8, lead=2,
            begins=Begins.FRESH, tool=tools.convert_out),
        Job("cp-out", "cp --sparse=always out of it", Section.TOOLS, warm, floor=0.8, lead=2, tool=tools.copy_out),
        Job("tar-out", "tar -S out of it, into a pipe", Section.TOOLS, warm, floor=0.8, lead=2, tool=tools.tar_out),
        Job("convert-in", "qemu-img convert into it", Section.TOOLS, kept, begins=Begins.FRESH, tool=tools.convert_in),
    ]
    if root:
        jobs += [
            Job("loop", "loop: mkfs.ext4, untar, umount", Section.TOOLS, kept, floor=0.7, lead=1.5,
                begins=Begins.FRESH, tool=tools.make_and_untar),
            Job("loop-git", "loop: git clone, umount", Section.TOOLS, kept, tool=tools.git_clone),
            Job("loop-sqlite", "loop: 2,000 inserts by sqlite, each durable", Section.TOOLS, kept,
                tool=tools.sqlite_inserts),
        ]
    return jobs


def all_jobs(parts: set[str], root: bool) -> list[Job]:
    """In the order they run in: reads before anything is written, first touch before second."""
    jobs = [*_reads(), *_writes(), *_modes()] if "jobs" in parts else []
    jobs += _tools(root) if "tools" in parts else []
    return [job for job in jobs if root or job.section is not Section.COLD]


@dataclass
class Results:
    """Every sample, by job and target."""

    jobs: list[Job]
    #: key of the job -> name of the target -> a figure a round
    samples: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    #: The targets that took part, the host file and cowslip first.
    names: list[str] = field(default_factory=list)
    #: Those whose fsync does nothing.
    hollow: set[str] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)

    def add(self, job: Job, name: str, value: float) -> None:
        self.samples.setdefault(job.key, {}).setdefault(name, []).append(value)

    def of(self, job: Job, name: str) -> list[float]:
        return self.samples.get(job.key, {}).get(name, [])

    def median(self, job: Job, name: str) -> float | None:
        values = self.of(job, name)
        return median(values) if values else None

    def ratio(self, job: Job, to: str | None) -> float | None:
        """Of the job's own target, median by median, above 1 when it is faster; None where one is missing."""
        ours, other = self.median(job, job.ours), self.median(job, to) if to else None
        if not ours or not other:
            return None
        return other / ours if job.unit == "s" else ours / other

    def peers(self) -> list[str]:
        return [name for name in self.names if name not in (HOST, OURS, WRITEBACK, READ_ONLY, IN_PLACE)]

    def best_peer(self, job: Job) -> str | None:
        """The fastest peer that does the same work: where fsync counts, only those that do it."""
        durable = job.section in (Section.FSYNC, Section.WRITEBACK)
        fit = [name for name in self.peers() if self.of(job, name) and not (durable and name in self.hollow)]
        best = min if job.unit == "s" else max
        return best(fit, key=lambda name: self.median(job, name) or 0, default=None)


def run_fio(job: Job, path, size: int) -> float:
    """One run; MiB/s or operations a second."""
    jobs = 4 if "--numjobs=4" in job.options else 1
    command = ["fio", f"--name={job.key}", f"--filename={path}", f"--size={size}", "--thread", "--group_reporting"]
    command += ["--output-format=json", "--allow_file_create=0", "--fallocate=none"]
    # fio would drop the file's cache before it starts; here `prepare` alone decides on that.
    command += ["--invalidate=0", f"--io_size={int(size * job.share / jobs) // 4096 * 4096}", *job.options]
    way = "write" if any("write" in option for option in job.options) else "read"
    if "--bs=1M" in job.options:
        # Whole pieces.
        command.append(f"--io_size={int(size * job.share) >> 20 << 20}")
    if job.options[0].endswith("read"):
        command.append(f"--runtime={READ_SECONDS}")
    output = host.run(*command)
    # fio may put a warning before the JSON.
    done = json.loads(output[output.index("{") :])["jobs"][0]
    if done["error"] != 0:
        raise Failed(f"fio: {os.strerror(done['error'])}")
    if job.unit == "MiB/s":
        return done[way]["bw_bytes"] / (1 << 20)
    return done["read"]["iops"] + done["write"]["iops"]


def read_through(path, size: int | None = None) -> None:
    """Reads all of a file, or its first `size` bytes, so that what can be cached is."""
    buffer, left = bytearray(1 << 20), size
    with open(path, "rb", buffering=0) as file:
        while got := file.readinto(buffer):
            if left is not None:
                left -= got
                if left <= 0:
                    break


def prepare(job: Job, target) -> None:
    """Leaves the caches as the job wants them."""
    if not target.is_up():
        # Its path may now name a plain file of the host.
        raise Failed("is not mounted any more")
    os.sync()
    if job.caches is Caches.COLD:
        drop_caches()
    elif job.caches is Caches.WARM:
        read_through(target.path)


def one(results: Results, job: Job, target, size: int) -> None:
    """One job on one target; a failure is noted and the run goes on."""
    try:
        if job.begins is Begins.FRESH:
            target.fresh()
        prepare(job, target)
        figure = job.tool(target.path, target.scratch) if job.tool else run_fio(job, target.path, size)
        results.add(job, target.name, figure)
    except (Failed, OSError) as error:
        results.notes.append(f"{target.name}, {job.key}: {error}")


def run_round(results: Results, targets: list, size: int, label: str) -> None:
    """All jobs on all targets, each of which begins with an empty overlay."""
    for target in list(targets):
        try:
            target.fresh()
        except (Failed, OSError) as error:
            if target.name in (HOST, OURS):
                raise
            results.notes.append(f"{target.name} left out from here on: {error}")
            target.stop()
            targets.remove(target)
    for job in results.jobs:
        for target in filter(job.is_for, targets):
            host.progress(f"{label}: {job.key}, {target.name}")
            one(results, job, target, size)


def run(results: Results, targets: list, size: int, rounds: int) -> None:
    """All jobs on all targets, `rounds` times."""
    results.names = [target.name for target in targets]
    results.hollow = {target.name for target in targets if not target.fsync_is_real}
    for number in range(rounds):
        run_round(results, targets, size, f"round {number + 1} of {rounds}")
        targets.append(targets.pop(0))
    for target in targets:
        target.stop()
    host.progress("")
