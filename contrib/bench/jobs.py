"""The jobs of fio and of plain tools: what they are, and which caches are warm for each."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

import tools

# The names of the targets that jobs are made for.
HOST, SPARSE = "host file", "sparse host file"
OURS, WRITEBACK, READ_ONLY, IN_PLACE = "cowslip", "writeback", "mode=ro", "mode=rw"
HOLES, USER = "disk of holes", "mount of a user"
# All but the peers.
OWN = (HOST, SPARSE, OURS, WRITEBACK, READ_ONLY, IN_PLACE, HOLES, USER)
# What runs a command as a user who may nothing, from root.
AS_USER = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")


class Caches(Enum):
    """What a job finds in the caches."""

    WARM = "warm: the whole disk was read through the same file just before"
    COLD = "cold: what lies below was read once, then dropped from the host's caches, just before"
    KEPT = "as the job before left them"


class Begins(Enum):
    """The overlay a job begins with."""

    FRESH = "empty: every block is touched for the first time"
    AS_IT_IS = "as the job before left it"


class Section(Enum):
    """Jobs that may be compared with one another."""

    CACHED = "Cached reads: page cache warm, the disk's data lies in the base"
    COLD = "Cold reads: caches dropped before each, the disk's data lies in the base"
    DIRECT = "O_DIRECT, no fsync: all but the host file go through the host's page cache, so they can exceed its device"
    HOLES = "The bound of the 4k reads above: a disk of holes, answered from memory; what is left is the request itself"
    FSYNC = "Ends with fsync, or has one after each write: durable when it ends"
    SPARSE = "The same, first touch, beside a host file that is sparse as well and has to allocate, too"
    WRITEBACK = "--cache writeback, ends with fsync"
    READ_ONLY = "mode=ro,passthrough, beside the file itself"
    IN_PLACE = "mode=rw,passthrough, beside a file like it"
    TOOLS = "Plain tools, seconds; nothing is made durable but by the unmount"


@dataclass(frozen=True)
class Job:
    """One job: of fio, by its options, or of a tool. `share` is the part of the disk fio moves.

    `floor` is the ratio to the host aimed at, `lead` that to the best peer. `ours` is the target
    it is made for, `beside` the one that stands in the host file's column; where the two are the
    usual ones, the peers run it as well. `by` are the words that its commands are run by.
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
    beside: str = HOST
    by: tuple[str, ...] = ()
    tool: Callable | None = None

    @property
    def unit(self) -> str:
        if self.tool is not None:
            return "s"
        return "MiB/s" if "--bs=1M" in self.options else "IOPS"

    def is_for(self, target) -> bool:
        """Whether a target takes part."""
        if target.name in OWN:
            return target.name in (self.ours, self.beside)
        return self.ours in (OURS, WRITEBACK) and self.beside == HOST


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


def _reads(root: bool) -> list[Job]:
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
        *([Job("seq-read-cold-user", "sequential read 1M, mounted by a user who cannot raise read-ahead", Section.COLD,
               cold, sequential, 1, ours=USER, by=AS_USER)] if root else []),
        Job("seq-read-direct", "sequential read 1M", Section.DIRECT, warm, direct, 1),
    ]
    for size, share in (("4k", 1 / 8), ("64k", 1 / 2)):
        for depth, options in _DEPTHS.items():
            floor, lead = _READ_GOALS.get((size, depth), _NONE)
            key = f"rand-read-{size}-{depth}".replace(" ", "")
            jobs.append(Job(key, f"random read {size} {depth}", Section.DIRECT, warm,
                            _random("read", size, *options), share, floor, lead))
            # At once, so that a machine that is slow for a while is slow for both.
            if size == "4k":
                key = f"holes-read-{size}-{depth}".replace(" ", "")
                jobs.append(Job(key, f"random read {size} {depth}", Section.HOLES, Caches.KEPT,
                                _random("read", size, *options), share, ours=HOLES))
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
    jobs += _twice("write-fsync-each", "random write 4k, fsync after each", Section.FSYNC, each, 1 / 64,
                   (0.45, 1.5), (0.8, 1.5))
    large = _sequential("write", end)
    jobs += _twice("seq-write-fsync", "sequential write 1M, one fsync", Section.FSYNC, large, 1, _NONE, (0.9, 1.1))
    jobs += [
        Job(f"sparse-{key}", title, Section.SPARSE, Caches.KEPT, options, share, begins=Begins.FRESH, beside=SPARSE)
        for key, title, options, share in (
            ("rand-write-fsync", "random write 4k buffered, one fsync", small, 1 / 8),
            ("write-fsync-each", "random write 4k, fsync after each", each, 1 / 64),
            ("seq-write-fsync", "sequential write 1M, one fsync", large, 1),
        )
    ]
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
    jobs = [*_reads(root), *_writes(), *_modes()] if "jobs" in parts else []
    return jobs + (_tools(root) if "tools" in parts else [])
