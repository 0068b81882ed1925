"""Whether cost follows the work, not the size: the same jobs on more disks, more layers, larger disks, more extents."""

import ctypes
import os
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import jobs
from figures import BLOCK, FALLOC_FL_KEEP_SIZE, FALLOC_FL_ZERO_RANGE, MIB, TIB, libc
from host import Failed, Place, progress, run
from targets import Mount, fill, quote
from turns import read_through, run_fio

# What a layer holds of the disk, in pieces that alternate with those of the others.
PIECE = 64 << 10


@dataclass
class Variant:
    """A mount, and the disks of it that the jobs run on together."""

    group: str
    title: str
    mount: Mount
    paths: list[Path]
    #: By the key of the job, a figure a round.
    samples: dict[str, list[float]] = field(default_factory=dict)

    def median(self, key: str) -> float | None:
        return median(self.samples[key]) if key in self.samples else None


@dataclass
class Table:
    """Every variant, and the jobs they ran."""

    jobs: list[jobs.Job]
    variants: list[Variant]

    def ratio(self, variant: Variant, key: str) -> float | None:
        """To the first of its group."""
        first = next(other for other in self.variants if other.group == variant.group)
        ours, other = variant.median(key), first.median(key)
        return ours / other if ours and other else None


class Maker:
    """Sets up the variants, all over one base."""

    def __init__(self, place: Place, program: Path, size: int):
        self.place, self.program, self.size = place, program, size
        self.base = fill(place.path / "scale.img", size)

    def mount(self, name: str, *sources: str) -> tuple[Mount, list[Path]]:
        mount = Mount(self.place, self.program, name, sources[0])
        mount.more = [f"more{number}={source}" for number, source in enumerate(sources[1:])]
        mount.start()
        return mount, [mount.path, *(mount.point / f"more{number}" for number in range(len(sources) - 1))]

    def source(self, name: str, *keys: str) -> str:
        overlay = quote(self.place.path / f"{name}.cow")
        return ",".join([quote(self.base), f"overlay={overlay}", *keys])

    def disks(self, count: int) -> Variant:
        name = f"disks{count}"
        mount, paths = self.mount(name, *(self.source(f"{name}-{number}") for number in range(count)))
        return Variant("disks", f"{count} disks" if count > 1 else "one disk", mount, paths)

    def layers(self, count: int) -> Variant:
        name = f"layers{count}"
        mount, paths = self.mount(name, self.source(name))
        piece = os.urandom(PIECE)
        for layer in range(count):
            with open(paths[0], "r+b", buffering=0) as disk:
                for at in range(layer * PIECE, self.size, count * PIECE):
                    os.pwrite(disk.fileno(), piece, at)
            if layer < count - 1:
                run(self.program, "snapshot", paths[0], f"s{layer}")
        return Variant("layers", f"{count} layers" if count > 1 else "one layer", mount, paths)

    def sizes(self, size: int, title: str) -> Variant:
        name = f"size{size}"
        mount, paths = self.mount(name, self.source(name, f"size={size}"))
        return Variant("size", title, mount, paths)

    def extents(self, count: int) -> Variant:
        name = f"extents{count}"
        mount, paths = self.mount(name, self.source(name, f"size={2 * TIB}"))
        step = TIB // count // MIB * MIB or MIB
        with open(paths[0], "r+b", buffering=0) as disk:
            for number in range(count):
                mode = FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE
                if libc.fallocate64(disk.fileno(), mode, TIB + number * step, BLOCK) != 0:
                    raise Failed(f"fallocate {paths[0]}: {os.strerror(ctypes.get_errno())}")
        return Variant("extents", f"{count:,} extents" if count > 1 else "one extent", mount, paths)


def make_all(maker: Maker, quick: bool) -> list[Variant]:
    variants = []
    for count in (1, 4) if quick else (1, 4, 16):
        progress(f"scale: {count} disks")
        variants.append(maker.disks(count))
    for count in (1, 8) if quick else (1, 8, 64):
        progress(f"scale: {count} layers")
        variants.append(maker.layers(count))
    for size, title in ((maker.size, f"{maker.size >> 20} MiB"), (TIB, "1 TiB"), (15 * TIB, "15 TiB")):
        variants.append(maker.sizes(size, title))
    for count in (1, 1000) if quick else (1, 10_000, 1_000_000):
        progress(f"scale: {count:,} extents")
        variants.append(maker.extents(count))
    return variants


def measure(place: Place, program: Path, size: int, rounds: int, quick: bool) -> Table:
    """All jobs on all variants, in turn."""
    chosen = ("seq-read-cached", "rand-read-4k-qd16", "rand-write-4k-qd16-again")
    table = Table([job for job in jobs.all_jobs({"jobs"}, root=True) if job.key in chosen], [])
    table.variants = make_all(Maker(place, program, size), quick)
    try:
        for number in range(rounds + 1):
            for job in table.jobs:
                for variant in table.variants:
                    progress(f"scale, round {number} of {rounds}: {job.key}, {variant.title}")
                    os.sync()
                    # The first who writes has the kernel drop what it cached, whatever he writes.
                    if "write" in job.key:
                        for path in variant.paths:
                            os.close(os.open(path, os.O_RDWR))
                    if job.caches is jobs.Caches.WARM:
                        for path in variant.paths:
                            read_through(path, size)
                    # fio goes around several files by itself.
                    names = ":".join(str(path) for path in variant.paths)
                    figure = run_fio(job, names, size)
                    # The first round touches blocks for the first time.
                    if number > 0:
                        variant.samples.setdefault(job.key, []).append(figure)
    finally:
        for variant in table.variants:
            variant.mount.stop()
    progress("")
    return table
