"""The fio jobs: what they are, which caches are warm for each, and the rounds they are run in.

The targets take turns inside a round, job by job, and another one begins in each round: whatever
slows the machine for a while slows them all. Before every job the host writes back what the last
one left dirty, so no target pays for another.
"""

import json
import os
from dataclasses import dataclass, field
from enum import Enum
from statistics import median

import host
from host import Failed, drop_caches

# The slowest reader needs no longer for a figure; a write must do all of its work, or the second
# pass would touch blocks that the first has not.
READ_SECONDS = 10


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
    DIRECT = "O_DIRECT, queue depth 16: the base is warm in the host's page cache; no fsync"
    FSYNC = "Ends with fsync, which counts"
    COLD = "Cold reads: caches dropped before each, the disk's data lies in the base"


@dataclass(frozen=True)
class Job:
    """One fio job. `share` is the part of the disk it moves; `floor` the ratio to the host aimed at."""

    key: str
    title: str
    section: Section
    caches: Caches
    options: tuple[str, ...]
    share: float = 1
    floor: float | None = None
    begins: Begins = Begins.AS_IT_IS

    @property
    def unit(self) -> str:
        return "MiB/s" if "--bs=1M" in self.options else "IOPS"


def _sequential(way: str, *more: str) -> tuple[str, ...]:
    return (f"--rw={way}", "--bs=1M", "--ioengine=psync", *more)


def _random(way: str, *more: str) -> tuple[str, ...]:
    # The default seed, which is the same every time: two passes touch the same blocks.
    return (f"--rw=rand{way}", "--bs=4k", *more)


def all_jobs(root: bool) -> list[Job]:
    """In the order they run in: reads before anything is written, first touch before second."""
    queue = ("--ioengine=libaio", "--iodepth=16", "--direct=1")
    plain = ("--ioengine=psync",)
    small = _random("write", *plain, "--end_fsync=1")
    read, write = _sequential("read"), _sequential("write", "--end_fsync=1")
    cached, direct, fsync, cold_reads = Section
    warm, cold_caches, kept = Caches
    fresh = Begins.FRESH
    read_4k = _random("read", *plain)
    read_queue, write_queue = _random("read", *queue), _random("write", *queue)
    jobs = [
        Job("seq-read-cached", "sequential read 1M", cached, warm, read, 4, 0.85),
        Job("rand-read-cached", "random read 4k", cached, warm, read_4k, 1, 0.8),
        Job("rand-read-direct", "random read 4k", direct, warm, read_queue, 0.25, 1.0),
        Job("seq-read-cold", "sequential read 1M", cold_reads, cold_caches, read),
        Job("rand-read-cold", "random read 4k O_DIRECT qd16", cold_reads, cold_caches, read_queue, 0.25),
        Job("rand-write-first", "random write 4k, first touch", direct, kept, write_queue, 0.25, 1.0, fresh),
        Job("rand-write-again", "random write 4k, same blocks again", direct, kept, write_queue, 0.25, 1.0),
        Job("rand-write-fsync", "random write 4k buffered, same blocks", fsync, kept, small, 0.25),
        Job("seq-write-first", "sequential write 1M, first touch", fsync, kept, write, 1, 0.8, fresh),
        Job("seq-write-again", "sequential write 1M, same blocks again", fsync, kept, write, 1, 0.8),
    ]
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

    def ratio(self, job: Job, name: str, to: str | None) -> float | None:
        """Median by median; None where one is missing."""
        top, bottom = self.median(job, name), self.median(job, to) if to else None
        return top / bottom if top is not None and bottom else None

    def best_peer(self, job: Job) -> str | None:
        """The fastest peer that does the same work: where fsync counts, only those that do it."""
        fit = [
            name
            for name in self.names[2:]
            if self.of(job, name) and not (job.section is Section.FSYNC and name in self.hollow)
        ]
        return max(fit, key=lambda name: self.median(job, name) or 0, default=None)


def run_fio(job: Job, path, size: int) -> float:
    """One run; MiB/s or operations a second."""
    command = ["fio", f"--name={job.key}", f"--filename={path}", f"--size={size}", "--thread"]
    command += ["--output-format=json", "--allow_file_create=0", "--fallocate=none"]
    # fio would drop the file's cache before it starts; here `prepare` alone decides on that.
    command += ["--invalidate=0", f"--io_size={int(size * job.share)}", *job.options]
    way = "write" if any("write" in option for option in job.options) else "read"
    if way == "read":
        command.append(f"--runtime={READ_SECONDS}")
    output = host.run(*command)
    # fio may put a warning before the JSON.
    done = json.loads(output[output.index("{") :])["jobs"][0]
    if done["error"] != 0:
        raise Failed(f"fio: {os.strerror(done['error'])}")
    return done[way]["bw_bytes"] / (1 << 20) if job.unit == "MiB/s" else done[way]["iops"]


def read_through(path) -> None:
    """Reads all of a file, so that what can be cached is."""
    buffer = bytearray(1 << 20)
    with open(path, "rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


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
        results.add(job, target.name, run_fio(job, target.path, size))
    except (Failed, OSError) as error:
        results.notes.append(f"{target.name}, {job.key}: {error}")


def run_round(results: Results, targets: list, size: int, label: str) -> None:
    """All jobs on all targets, each of which begins with an empty overlay."""
    for target in list(targets):
        try:
            target.fresh()
        except (Failed, OSError) as error:
            if target.name in results.names[:2]:
                raise
            results.notes.append(f"{target.name} left out from here on: {error}")
            target.stop()
            targets.remove(target)
    for job in results.jobs:
        for target in targets:
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
