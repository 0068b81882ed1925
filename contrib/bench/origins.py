"""Images on a server of this host, behind the wire: who serves them, and who else can mount them.

To add a protocol: an `Origin` with its server (`of_file`, `of_pattern`), its address for cowslip and peers, its
peers, what reads it without a mount (`sequential`, `random`, `download`), and its name in `ORIGINS`. All rows are
measured over each, and the wire counts the requests of NBD and of HTTP.
"""

import http.client
import json
import os
import random
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path

import targets
from host import PATIENCE, Failed, Place, run, wait_until


def launch(*command, **more) -> subprocess.Popen:
    """Starts a program in a session of its own, so that ^C is for this one, which then ends it in order."""
    return subprocess.Popen([str(word) for word in command], start_new_session=True, **more)


def end(child: subprocess.Popen) -> None:
    """Ends a child, politely first."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        child.send_signal(number)
        try:
            child.wait(10)
            return
        except subprocess.TimeoutExpired:
            continue


class Wire:
    """The proxy of `tests/support` before one server: a link with a delay and a rate, and its counts."""

    def __init__(self, place: Place, program: Path, protocol: str, server: str | Path):
        pipe = subprocess.PIPE
        self.child = launch(program, protocol, server, stdin=pipe, stdout=pipe, text=True)
        place.keep(self)
        self.address = self.child.stdout.readline().strip()
        if not self.address:
            raise Failed(f"{program} ended at once")

    def ask(self, line: str) -> str:
        try:
            self.child.stdin.write(f"{line}\n")
            self.child.stdin.flush()
        except OSError as error:
            raise Failed(f"the wire: {error}") from error
        answer = self.child.stdout.readline().strip()
        if not answer or answer.startswith("not understood"):
            raise Failed(f"the wire: {answer or 'it has ended'}")
        return answer

    def set_link(self, rtt: float, rate: int) -> None:
        """The round trip in seconds, for new connections, and bytes a second; 0 is no limit."""
        self.ask(f"link {round(rtt * 1e6)} {rate}")
        self.rtt = rtt

    def counts(self) -> dict[str, int]:
        return json.loads(self.ask("counts"))

    def stop(self) -> None:
        if self.child is not None:
            child, self.child = self.child, None
            end(child)


def fio(seconds: float, size: int, *options) -> dict:
    """A run of fio that reads, and ends when its time does, or the disk."""
    command = ["fio", "--name=job", f"--size={size}", "--thread", "--output-format=json", "--invalidate=0"]
    command += ["--allow_file_create=0", f"--runtime={seconds:g}", "--randseed=1", *options]
    output = run(*command)
    # fio may put a warning before the JSON.
    done = json.loads(output[output.index("{") :])["jobs"][0]
    if done["error"] != 0:
        raise Failed(f"fio: {os.strerror(done['error'])}")
    return done["read"]


#: Random reads, each place once; not how.
RANDOM = ("--rw=randread", "--bs=4k", "--iodepth=16")


class Origin:
    """One image on a server, reached through a wire."""

    #: As the wire and `--only` call it.
    protocol: str
    #: The programs that it takes.
    programs: tuple[str, ...]
    peers: list

    def __init__(self, place: Place, wire: Path, name: str, *command):
        self.socket = place.path / f"{name}.sock"
        self.messages = place.path / f"{name}.messages"
        with open(self.messages, "wb") as messages:
            words = [self.socket if word is None else word for word in command]
            self.child = launch(*words, stdin=subprocess.DEVNULL, stdout=messages, stderr=messages)
        place.keep(self)
        wait_until(f"the server {command[0]}", self.is_ready)
        self.wire = Wire(place, wire, self.protocol, self.socket)

    @classmethod
    def missing(cls) -> str | None:
        return next((name for name in cls.programs if shutil.which(name) is None), None)

    def is_ready(self) -> bool:
        if self.child.poll() is not None:
            lines = self.messages.read_text().splitlines() or ["no message"]
            raise Failed(f"{self.child.args[0]} ended at once: {lines[0]}")
        return self.socket.exists()

    def stop(self) -> None:
        if self.child is not None:
            child, self.child = self.child, None
            end(child)


class Remote(targets.Mount):
    """cowslip over an image on a server, without an overlay."""

    name = "cowslip"

    def __init__(
        self, place: Place, program: Path, origin: "Origin", name: str,
        cache: Path | None = None, trace: Path | None = None,
    ):
        self.origin, self.cache, self.trace = origin, cache, trace
        keys = ",mode=ro"
        if trace is not None:
            keys += f",trace={targets.quote(trace)}"
        if cache is not None:
            keys += f",read-cache={targets.quote(cache)},read-cache-size=64G"
        super().__init__(place, program, f"{name}-mount", f"{origin.source.replace(',', ',,')}{keys}")

    def fresh(self) -> None:
        """A new mount. What was fetched before is forgotten, but for what is in the cache."""
        self.stop()
        self.start()
        self.find_pid()

    def forget(self) -> None:
        """Has nothing in the cache."""
        self.stop()
        shutil.rmtree(self.cache, ignore_errors=True)
        self.cache.mkdir()


class Local(Remote):
    """cowslip over the same image as a file of this host."""

    name = "local base"

    def __init__(self, place: Place, program: Path, origin: "Origin", name: str, base: Path):
        self.origin = origin
        targets.Mount.__init__(self, place, program, f"{name}-mount", f"{targets.quote(base)},mode=ro")


class Bare:
    """The server itself, asked through the same link by tools that know its protocol."""

    name = "link"

    def __init__(self, origin: "Origin"):
        self.origin = origin

    def stop(self) -> None:
        pass


class RemotePeer(targets.Peer):
    """Another program that shows an image on a server as a file, read-only."""

    fsync_is_real = True

    def __init__(self, place: Place, origin: Origin, size: int, name: str):
        self.origin, self.bytes = origin, size
        # Peers of several images are beside each other.
        self.dir = place.path / f"{name}-{self.name}"
        self.dir.mkdir()
        self.child = None
        place.keep(self)

    def size(self) -> int:
        return self.bytes

    def find_pid(self) -> int:
        return self.child.pid


class NbdFuse(RemotePeer):
    name = "nbdfuse"
    programs = ("nbdfuse",)

    def words(self) -> list[str]:
        """What it is told to show."""
        return [self.origin.source]

    def fresh(self) -> None:
        self.stop()
        point = self.dir / "m"
        point.mkdir(exist_ok=True)
        self.path = point / "disk"
        self.launch("nbdfuse", "-r", self.path, *self.words())


class NbdkitCurl(NbdFuse):
    """nbdkit's curl plugin through nbdfuse."""

    programs = ("nbdfuse", "nbdkit")

    def words(self) -> list[str]:
        return ["[", "nbdkit", "-r", "curl", f"url={self.origin.source}", "]"]


class QemuExport(RemotePeer):
    """qemu-storage-daemon's FUSE export of the image."""

    name = "qemu"
    programs = ("qemu-storage-daemon",)

    def fresh(self) -> None:
        self.stop()
        # The export takes the place of a file.
        self.path = self.dir / "disk"
        self.path.touch()
        escaped = targets.quote(self.path)
        self.launch(
            *("qemu-storage-daemon", "--blockdev", f"{self.origin.qemu},node-name=disk,read-only=on"),
            *("--export", f"fuse,id=export,node-name=disk,mountpoint={escaped},writable=off"),
        )


class Nbd(Origin):
    """qemu-nbd, which allows several connections to what is only read."""

    protocol = "nbd"
    programs = ("qemu-nbd",)
    peers = [NbdFuse, QemuExport]

    @classmethod
    def of_file(cls, place: Place, wire: Path, name: str, file: Path) -> "Nbd":
        return cls(place, wire, name, "qemu-nbd", "--persistent", "--shared=0", "-r", "-f", "raw", "-k", None, file)

    @classmethod
    def of_pattern(cls, place: Place, wire: Path, name: str, size: int) -> "Nbd":
        """An image that takes no space: all of it data, each word its own offset."""
        if shutil.which("nbdkit") is None:
            raise Failed("no nbdkit")
        return cls(place, wire, name, "nbdkit", "-f", "-r", "-U", None, "pattern", size)

    @property
    def source(self) -> str:
        """The address, for cowslip, libnbd and fio."""
        return f"nbd://{self.wire.address}/"

    @property
    def qemu(self) -> str:
        """The address, for QEMU."""
        host, port = self.wire.address.rsplit(":", 1)
        return f"nbd,server.type=inet,server.host={host},server.port={port}"

    def download(self, to: Path | str) -> None:
        """Copies all of the image, in parallel, by a tool of the protocol."""
        if shutil.which("nbdcopy") is None:
            raise Failed("no nbdcopy")
        run("nbdcopy", self.source, to)

    def sequential(self, seconds: float, size: int) -> float | None:
        """MiB/s that the server gives."""
        done = fio(seconds, size, "--ioengine=nbd", f"--uri={self.source}", "--rw=read", "--bs=1M", "--iodepth=16")
        return done["bw_bytes"] / (1 << 20)

    def random(self, seconds: float, size: int) -> float | None:
        """Reads of 4 KiB a second that the server answers, 16 at a time."""
        return fio(seconds, size, "--ioengine=nbd", f"--uri={self.source}", *RANDOM)["iops"]


NGINX = """
daemon off; master_process off; user root; pid {dir}/pid; error_log {dir}/error.log;
events {{ worker_connections 256; }}
http {{
  client_body_temp_path {dir}/tmp; proxy_temp_path {dir}/tmp; fastcgi_temp_path {dir}/tmp;
  uwsgi_temp_path {dir}/tmp; scgi_temp_path {dir}/tmp; access_log off; sendfile on;
  server {{ listen unix:{socket}; location = /image {{ alias {file}; }} }}
}}
"""


class Http(Origin):
    """nginx, with the settings it ships for connections."""

    protocol = "http"
    programs = ("nginx", "curl")
    peers = [NbdkitCurl, QemuExport]
    #: Ranges at a time: as many as cowslip has connections.
    PARTS = 8

    @classmethod
    def of_file(cls, place: Place, wire: Path, name: str, file: Path) -> "Http":
        directory = place.path / f"{name}.nginx"
        (directory / "tmp").mkdir(parents=True)
        text = NGINX.format(dir=directory, socket=place.path / f"{name}.sock", file=file)
        (directory / "conf").write_text(text)
        origin = cls(place, wire, name, "nginx", "-c", directory / "conf")
        origin.bytes = file.stat().st_size
        return origin

    @classmethod
    def of_pattern(cls, place: Place, wire: Path, name: str, size: int) -> "Http":
        """A file that is one hole, which no HTTP server tells."""
        file = place.path / f"{name}.img"
        with open(file, "xb") as out:
            out.truncate(size)
        return cls.of_file(place, wire, name, file)

    @property
    def source(self) -> str:
        return f"http://{self.wire.address}/image"

    @property
    def qemu(self) -> str:
        return f"http,url={self.source}"

    def download(self, to: Path) -> None:
        step = -(-self.bytes // self.PARTS)
        command = ["curl", "-sf", "-o"]
        parts = [(to.with_suffix(f".{at}"), at) for at in range(0, self.bytes, step)]
        children = [launch(*command, part, "-r", f"{at}-{at + step - 1}", self.source) for part, at in parts]
        failed = [child.args for child in children if child.wait(PATIENCE) != 0]
        for part, _ in parts:
            part.unlink(missing_ok=True)
        if failed:
            raise Failed(f"curl failed: {' '.join(failed[0])}")
        to.touch()

    def sequential(self, seconds: float, size: int) -> float | None:
        told = "%{size_download} %{time_total}"
        done = subprocess.run(
            ["curl", "-s", "-o", "/dev/null", "-w", told, "--max-time", f"{seconds:g}", self.source],
            capture_output=True, text=True, check=False, timeout=seconds + 60,
        )
        # 28: the time is over.
        if done.returncode not in (0, 28):
            raise Failed(f"curl ended with exit status {done.returncode}")
        moved, took = done.stdout.split()
        return int(moved) / (1 << 20) / float(took)

    def random(self, seconds: float, size: int) -> float | None:
        # Not without a delay: this is Python, and would be the bound itself.
        if not self.wire.rtt:
            return None
        until, counts = time.monotonic() + seconds, [0] * 16

        def read(number: int) -> None:
            client, chance = http.client.HTTPConnection(self.wire.address, timeout=60), random.Random(number)
            while time.monotonic() < until:
                at = chance.randrange(size // 4096) * 4096
                client.request("GET", "/image", headers={"Range": f"bytes={at}-{at + 4095}"})
                if len(client.getresponse().read()) == 4096:
                    counts[number] += 1

        threads = [threading.Thread(target=read, args=(number,)) for number in range(len(counts))]
        begun = time.monotonic()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return sum(counts) / (time.monotonic() - begun)


ORIGINS = {"nbd": Nbd, "http": Http}
