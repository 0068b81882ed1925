#!/usr/bin/env python3
"""What was written to a stream, in order: reading it from a log, its bound, and doing it again.

Under RUST_LOG=cowslip::stream::output=trace a stream logs every request as its window sees it:

    o: write at 4096, changes 4100: d8192 z4096      8 KiB of data, 4 KiB of zeros; bytes change from 4100 on
    o: discard 0..1048576                            a punched hole, or a truncation

Run as a program it writes the same again: traces.py LOG FILE
"""

import ctypes
import mmap
import os
import re
import sys
from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from pathlib import Path

WRITE = re.compile(r": write at (\d+), changes (\d+|-):((?: [dz]\d+)*)$")
DISCARD = re.compile(r": discard (\d+)\.\.(\d+)$")
# FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE (linux/falloc.h).
PUNCH = 1 | 2
# The largest request of the kernel's.
LARGEST = 1 << 20


@dataclass
class Request:
    """One request: its pieces, (start, end, is data), and the first byte it changes."""

    pieces: list[tuple[int, int, bool]]
    changes: int | None
    discards: bool


def read(log: Path) -> list[Request]:
    """All requests of a log, oldest first."""
    requests = []
    with log.open(errors="replace") as lines:
        for line in lines:
            line = line.rstrip("\n")
            if found := WRITE.search(line):
                at, pieces = int(found[1]), []
                for word in found[3].split():
                    pieces.append((at, at + int(word[1:]), word[0] == "d"))
                    at = pieces[-1][1]
                changes = None if found[2] == "-" else int(found[2])
                requests.append(Request(pieces, changes, False))
            elif found := DISCARD.search(line):
                requests.append(Request([(int(found[1]), int(found[2]), False)], None, True))
    return requests


class Bytes:
    """A set of bytes as sorted ranges that do not touch each other, and how many there are."""

    def __init__(self):
        self.starts, self.ends, self.count = [], [], 0

    def _cut(self, start: int, end: int) -> tuple[int, list[int], list[int]]:
        """Which ranges touch start..end: the first one's index, and what sticks out of it."""
        first, last = bisect_left(self.ends, start), bisect_right(self.starts, end)
        return first, self.starts[first:last], self.ends[first:last]

    def add(self, start: int, end: int) -> None:
        first, starts, ends = self._cut(start, end)
        before = sum(ends) - sum(starts)
        low, high = min([start, *starts[:1]]), max([end, *ends[-1:]])
        self.starts[first : first + len(starts)] = [low]
        self.ends[first : first + len(ends)] = [high]
        self.count += high - low - before

    def remove(self, start: int, end: int) -> None:
        first, starts, ends = self._cut(start, end)
        left = []
        if starts and starts[0] < start:
            left.append((starts[0], min(ends[0], start)))
        if starts and ends[-1] > end:
            left.append((max(starts[-1], end), ends[-1]))
        before = sum(ends) - sum(starts)
        self.starts[first : first + len(starts)] = [low for low, _ in left]
        self.ends[first : first + len(ends)] = [high for _, high in left]
        self.count += sum(high - low for low, high in left) - before

    def first_in(self, start: int, end: int) -> int | None:
        first = bisect_right(self.ends, start)
        if first < len(self.starts) and self.starts[first] < end:
            return max(self.starts[first], start)
        return None


def bound(requests: list[Request]) -> int:
    """The most bytes that a policy holds at once which knows the whole future and lets every byte
    leave as soon as nothing at or before it changes any more. No policy can hold fewer."""
    changes, data = [], Bytes()
    for request in requests:
        changed = request.changes
        if request.discards and (start := data.first_in(*request.pieces[0][:2])) is not None:
            changed = start
        changes.append(changed)
        for start, end, is_data in request.pieces:
            (data.add if is_data else data.remove)(start, end)
    # Nothing changes before this byte once the request is done.
    settled, lowest = [], sys.maxsize
    for changed in reversed(changes):
        settled.append(lowest)
        lowest = lowest if changed is None else min(lowest, changed)
    held, most = Bytes(), 0
    for request, frontier in zip(requests, reversed(settled)):
        for start, end, is_data in request.pieces:
            (held.add if is_data else held.remove)(start, end)
        held.remove(0, frontier)
        most = max(most, held.count)
    return most


def replay(requests: list[Request], path: str) -> None:
    """Writes the same pieces in the same order: ones for data, zeros for zeros."""
    libc = ctypes.CDLL(None, use_errno=True)
    punch = libc.fallocate
    punch.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    # On a page of its own, so that the kernel makes one request of it.
    buffer = mmap.mmap(-1, LARGEST)
    view = memoryview(buffer)
    fd = os.open(path, os.O_WRONLY)
    for request in requests:
        start, end = request.pieces[0][0], request.pieces[-1][1]
        if request.discards:
            if end > start and punch(fd, PUNCH, start, end - start) != 0:
                raise OSError(ctypes.get_errno(), "fallocate")
            continue
        for low, high, is_data in request.pieces:
            view[low - start : high - start] = (b"\1" if is_data else b"\0") * (high - low)
            # A page of data may begin with zeros where zeros were.
            quiet = min(high, request.changes or low) - low
            if is_data and quiet > 0:
                view[low - start : low - start + quiet] = bytes(quiet)
        written = os.pwrite(fd, view[: end - start], start)
        if written != end - start:
            raise OSError(f"{written} of {end - start} bytes written at {start}")
    os.close(fd)


if __name__ == "__main__":
    try:
        replay(read(Path(sys.argv[1])), sys.argv[2])
    except OSError as error:
        sys.exit(f"traces.py: {error}")
