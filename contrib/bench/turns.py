"""The rounds: every job on every target, and what came of it.

The targets take turns inside a round, job by job, and another one begins in each round: whatever
slows the machine for a while slows them all. Before every job the host writes back what the last
one left dirty, so no target pays for another.
"""

import json
import os
from dataclasses import dataclass, field
from statistics import median

import host
from host import Failed, drop_caches
from jobs import HOST, OURS, OWN, Begins, Caches, Job, Section

# The slowest reader needs no longer for a figure; a write must do all of its work, or the second
# pass would touch blocks that the first has not.
READ_SECONDS = 5


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
        """Of the job's target, median by median, above 1 when it is faster; None where one is missing."""
        ours, other = self.median(job, job.ours), self.median(job, to) if to else None
        if not ours or not other:
            return None
        return other / ours if job.unit == "s" else ours / other

    def peers(self) -> list[str]:
        return [name for name in self.names if name not in OWN]

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
    output = host.run(*job.by, *command)
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
        # In a virtual machine the hypervisor has a cache as well, which favours whoever reads a file
        # second: now everybody does.
        read_through(target.below)
        drop_caches(target.below, target.path)
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
