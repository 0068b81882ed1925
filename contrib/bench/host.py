"""The host: running programs, the temporary directory everything happens in, what machine it is."""

import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# Longer than any one command here takes; a hang is told and not waited for.
PATIENCE = 600


class Failed(Exception):
    """What failed, on what, what to do: one line."""


def run(*command, timeout=PATIENCE, **more) -> str:
    """Runs a program and returns what it printed; `Failed` with its last line when it fails."""
    command = [str(word) for word in command]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=timeout, check=False, **more
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Failed(f"{command[0]}: {error}") from error
    if done.returncode != 0:
        lines = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()
        raise Failed(f"{' '.join(command[:2])}: {lines[-1]}")
    return done.stdout


def wait_until(what: str, is_so, timeout: float = 20.0) -> None:
    """Waits for a thing to be so; `Failed` when it never is."""
    deadline = time.monotonic() + timeout
    while not is_so():
        if time.monotonic() > deadline:
            raise Failed(f"waited {timeout:.0f} s in vain: {what}")
        time.sleep(0.01)


def is_alive(pid: int) -> bool:
    """Whether a thread of it still has files open.

    The first thread may be a zombie while others are on their way out, and a zombie is not alive:
    somebody else has to reap it.
    """
    for stat in Path(f"/proc/{pid}/task").glob("*/stat"):
        try:
            if stat.read_text().rsplit(")", 1)[1].split()[0] not in "ZX":
                return True
        except (OSError, IndexError):
            continue
    return False


def end(pid: int) -> None:
    """Ends a process that should be gone by now, politely first."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.kill(pid, number)
            wait_until(f"the end of process {pid}", lambda: not is_alive(pid), 10)
            return
        except ProcessLookupError:
            return
        except Failed:
            continue


def mounts_in(path: Path) -> list[str]:
    """The mountpoints at and below `path`, innermost first."""
    points = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    points = [point.encode().decode("unicode_escape") for point in points]
    return [point for point in reversed(points) if Path(point).is_relative_to(path)]


def unmount(point: str | Path) -> None:
    """Takes a mount away at once, whoever uses it; silent when there is none."""
    subprocess.run(["fusermount3", "-uz", str(point)], capture_output=True, check=False)


def progress(text: str) -> None:
    """What is being done, in one line of a terminal that is written over; nowhere else."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


class Place:
    """The temporary directory. Whatever is `kept` is stopped on the way out, last first."""

    def __init__(self, where: Path):
        self.where = where

    def __enter__(self):
        self.path = Path(tempfile.mkdtemp(prefix="cowslip-bench-", dir=self.where)).resolve()
        self.kept = []
        return self

    def keep(self, thing) -> None:
        """Has `thing.stop()` called at the end. Stopping twice must do nothing."""
        self.kept.append(thing)

    def __exit__(self, *_) -> None:
        # A second ^C must not leave half of it behind.
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        for thing in reversed(self.kept):
            try:
                thing.stop()
            except (Failed, OSError) as error:
                print(f"{sys.argv[0]}: cleaning up: {error}", file=sys.stderr)
        for point in mounts_in(self.path):
            unmount(point)
        # Never into something that is still mounted.
        if mounts_in(self.path):
            print(f"contrib/bench/run: {self.path} is still mounted: unmount and remove it", file=sys.stderr)
        else:
            shutil.rmtree(self.path, ignore_errors=True)


def drop_caches(*files: Path) -> None:
    """Drops all caches of the host; of these files alone when only root could do more."""
    os.sync()
    if os.geteuid() == 0:
        Path("/proc/sys/vm/drop_caches").write_text("3")
        return
    for path in files:
        fd = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


def resident(pid: int) -> float:
    """Resident memory of a process in MiB."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise Failed(f"process {pid} is gone")


def parse_size(text: str) -> int:
    """Bytes: 512M, 1G, as cowslip takes them."""
    units = {"K": 10, "M": 20, "G": 30}
    number, shift = (text[:-1], units[text[-1]]) if text[-1:] in units else (text, 0)
    return int(number) << shift


def prepare_program(root: Path, given: Path | None) -> Path:
    """The program to measure: the one given, or a release build of these sources."""
    if given is not None:
        if not os.access(given, os.X_OK):
            raise Failed(f"'{given}' is no program: check --cowslip")
        return given.resolve()
    print("building cowslip (a few minutes the first time)", file=sys.stderr)
    run("cargo", "build", "--release", "--locked", "--quiet", cwd=root, timeout=None)
    return root / os.environ.get("CARGO_TARGET_DIR", "target") / "release/cowslip"


def version(*command) -> str | None:
    """The first line of what a program says of itself, or None without it."""
    try:
        return run(*command).splitlines()[0].strip()
    except (Failed, IndexError):
        return None


def environment(root: Path, program: Path, where: Path) -> dict:
    """What the figures depend on."""
    programs = [
        version(program, "--version"),
        version("git", "-C", root, "describe", "--always", "--dirty"),
        version("fio", "--version"),
        version("qemu-storage-daemon", "--version"),
        version("nbdkit", "--version"),
        version("nbdfuse", "--version"),
    ]
    memory = Path("/proc/meminfo").read_text().split()[1]
    return {
        "programs": [text for text in programs if text],
        "kernel": platform.release(),
        "cpus": os.cpu_count(),
        "memory_mib": int(memory) >> 10,
        "filesystem": (version("findmnt", "-no", "FSTYPE,SOURCE", "-T", where) or "unknown").split()[0],
        "directory": str(where),
        "load_before": os.getloadavg()[0],
    }
