//! A program that was taken over. The numbers of system calls are those of x86_64.

use std::io::Write;
use std::net::TcpListener;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Command, Stdio};

use super::{place, run};

/// What a program that was taken over would try, one a line: a name, and a Python expression that must
/// fail. PLACE is the directory of the image, PORT a port at which somebody listens, PID another process.
/// These do no harm where they succeed.
const HARMLESS: &str = r"
read the secret: open('PLACE/secret').read()
read the password file: open('/etc/shadow').read()
list the directory: os.listdir('PLACE')
open the image to write: os.open('PLACE/image', os.O_WRONLY | os.O_APPEND)
make a file: open('PLACE/new', 'w')
make a directory: os.makedirs('PLACE/dir', exist_ok=True)
change a mode: os.chmod('PLACE/secret', 0o600)
change a mode by a descriptor: os.fchmod(image, 0o600)
change an owner: os.chown('PLACE/secret', -1, 0)
change a time: os.utime('PLACE/secret')
set the size of the image: os.truncate('PLACE/image', 9)
connect by TCP: socket.create_connection(('127.0.0.1', PORT))
make a socket of TCP6: socket.socket(socket.AF_INET6)
make a socket of UDP: socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
connect to a Unix socket: socket.socket(socket.AF_UNIX).connect('PLACE/socket')
listen: socket.create_server(('127.0.0.1', 0))
open netlink: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)
start a process: os.fork() or os._exit(0)
start a program: os.posix_spawn('/bin/true', ['true'], {})
look into another process: open('/proc/PID/mem', 'rb')
read the environment of another process: open('/proc/PID/environ', 'rb').read()
signal another process: os.kill(PID, 0)
limit another process: resource.prlimit(PID, resource.RLIMIT_NOFILE)
take a descriptor of another process: os.pidfd_open(PID)
slow another process: os.setpriority(os.PRIO_PROCESS, PID, 19)
pin another process: os.sched_setaffinity(PID, os.sched_getaffinity(PID))
leave the group: os.setsid()
share memory: call(29, 0, 4096, 0o600)
take memory and make it look read: hide()
take a stack without an end: resource.setrlimit(resource.RLIMIT_STACK, (-1, -1))
share memory with itself: call(9, None, 4096, 3, 0x21, -1, 0)
share it with a longer number: call(9, None, 4096, 3, ctypes.c_ulong(0x100000021), -1, 0)
make memory that grows downwards: call(9, None, 4096, 3, 0x122, -1, 0)
make a file of memory: os.memfd_create('x')
make a pair of sockets: socket.socketpair()
make a pipe: os.pipe()
make a pipe by the older call: call(22, ctypes.create_string_buffer(8))
";

/// These would.
const HARMFUL: &str = r"
make a file in /tmp: open('/tmp/cowslip-escaped', 'x')
make a link: os.link('PLACE/secret', 'PLACE/link')
rename the image: os.rename('PLACE/image', 'PLACE/moved')
remove the image: os.unlink('PLACE/image')
set an attribute: os.setxattr('PLACE/image', 'user.x', b'y')
open a raw socket: socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
trace another process: call(101, 16, PID)
become somebody: os.setuid(1)
become root of a namespace: call(272, 0x10000000)
mount: call(165, b'none', b'/mnt', b'tmpfs', 0, 0)
make a device: os.mknod('PLACE/device', 0o60600, os.makedev(7, 0))
change the root: os.chroot('/usr')
set up io_uring: call(425, 8, ctypes.create_string_buffer(120))
load a program into the kernel: call(321, 0, ctypes.create_string_buffer(120), 120)
start a process by clone: call(56, 17, 0, 0, 0, 0)
start a process by clone3: call(435, ctypes.create_string_buffer(88), 88)
use the numbers of x32: call(0x40000000 + 41, 1, 1, 0)
set the time: time.clock_settime(time.CLOCK_REALTIME, 0)
restart the host: call(169, 0xfee1dead, 672274793, 0x1234567)
take much memory: bytearray(1 << 30)
raise a limit: resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))
";

/// These must be refused by the filter itself: here another rule, the file system or the owner of a file
/// may be in the way, and on another host nothing is.
const FILTERED: &str = r"
set flags of the image: fcntl.ioctl(image, 0x40086602, flags)
set flags of a library: fcntl.ioctl(library, 0x40086602, flags)
set flags with a longer number: call(16, image, ctypes.c_ulong(0x140086602), flags)
set flags by XFS's request: fcntl.ioctl(image, 0x401c5820, bytes(28))
set the version of the image: fcntl.ioctl(image, 0x40087602, bytes(8))
seal the image: fcntl.ioctl(image, 0x40806685, bytes(128))
make a subvolume: call(16, image, 0x5000940e, bytes(4096))
share the blocks of a file: fcntl.ioctl(image, 0x40049409, library)
type into a terminal: fcntl.ioctl(0, 0x5412, b'x')
have another process signalled: fcntl.fcntl(image, fcntl.F_SETOWN, PID)
have it signalled with a longer number: call(72, image, ctypes.c_ulong(0x100000008), PID)
have a thread signalled: fcntl.fcntl(image, 15, struct.pack('ii', 0, PID))
have it signalled by a request: fcntl.ioctl(image, 0x8901, struct.pack('i', PID))
choose the signal: fcntl.fcntl(image, fcntl.F_SETSIG, 9)
be told of who opens the image: fcntl.fcntl(image, 1024, fcntl.F_RDLCK)
be told of changes in a directory: fcntl.fcntl(usr, 1026, 1)
watch files: call(294, 0)
lock the image: fcntl.flock(image, fcntl.LOCK_EX | fcntl.LOCK_NB)
empty the image by opening it: os.open('PLACE/image', os.O_RDONLY | os.O_TRUNC)
empty it by the older call: call(2, b'PLACE/image', os.O_TRUNC)
empty it by creating it: call(85, b'PLACE/image', 0o600)
empty it by the newer call: call(437, -100, b'PLACE/image', struct.pack('QQQ', os.O_TRUNC, 0, 0), 24)
read an attribute: os.getxattr('PLACE/secret', 'user.x')
list the attributes: os.listxattr('PLACE/secret')
make a file of secret memory: call(447, 0)
";

/// Prints the names of the attempts that succeeded. `image` is a descriptor of the image.
const TRY_ALL: &str = r#"
import ctypes, errno, fcntl, os, resource, socket, struct, sys, time
libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = libc.mmap.restype = ctypes.c_ssize_t
def hide():
    # What is written to counts as data as long as it can be written to.
    taken = []
    try:
        for _ in range(64):
            at = libc.mmap(None, 16 << 20, 3, 0x22, -1, 0)
            if at == -1:
                raise MemoryError
            taken.append(ctypes.c_void_p(at))
            if libc.mprotect(taken[-1], 16 << 20, 1) != 0:
                raise MemoryError
    finally:
        for at in taken:
            libc.munmap(at, 16 << 20)
def call(number, *args):
    if libc.syscall(number, *args) < 0:
        raise OSError(ctypes.get_errno(), "refused")
image = os.open("PLACE/image", os.O_RDONLY)
assert os.read(image, 100) == b"the image"
library, usr = os.open(os.__file__, os.O_RDONLY), os.open("/usr/lib", os.O_RDONLY)
# What files of ext4 have.
flags = struct.pack("Q", 0x80000)
tried = 0
for line in (ATTEMPTS.strip() + "\n" + FILTERED.strip()).strip().splitlines():
    name, what = line.split(": ", 1)
    tried += 1
    try:
        eval(what)
        print("done:", name)
    except (OSError, MemoryError, ValueError) as error:
        is_filter = getattr(error, "errno", None) in (errno.EPERM, errno.ENOSYS)
        if line in FILTERED and not is_filter:
            print("not refused by the filter:", name, error)
print("tried", tried)
"#;

/// The script that makes `attempts`, and those of which the filter must refuse each.
fn script(attempts: &str, filtered: &str, dir: &Path, port: u16, pid: u32) -> String {
    format!("ATTEMPTS = r'''{attempts}'''\nFILTERED = r'''{filtered}'''\n{TRY_ALL}")
        .replace("PLACE", dir.to_str().unwrap())
        .replace("PORT", &port.to_string())
        .replace("(PID", &format!("({pid}"))
        .replace(", PID", &format!(", {pid}"))
        .replace("/PID/", &format!("/{pid}/"))
}

#[test]
fn a_program_that_was_taken_over_gets_nowhere() {
    let dir = place();
    let image = dir.path().join("image");
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let _unix = UnixListener::bind(dir.path().join("socket")).unwrap();
    let mut other = Command::new("sleep").arg("1000").spawn().unwrap();
    let python = ["-I", "-S", "-"];
    let all = HARMLESS.trim_end().to_owned() + HARMFUL;
    let all = script(&all, FILTERED, dir.path(), port, other.id());
    let tried = run("/usr/bin/python3", &python, &image, &all);
    let left = std::fs::read_dir(dir.path()).unwrap().count();
    // Where nothing is locked in, they succeed.
    let harmless = script(HARMLESS, "", dir.path(), port, other.id());
    let mut free = Command::new("/usr/bin/python3");
    free.args(python).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut free = free.spawn().unwrap();
    free.stdin.take().unwrap().write_all(harmless.as_bytes()).unwrap();
    let free = free.wait_with_output().unwrap();
    let _ = other.kill();
    let _ = other.wait();

    let count = |lines: &str| lines.trim().lines().count();
    let said = String::from_utf8_lossy(&tried.stdout);
    let want = format!("tried {}", count(HARMLESS) + count(HARMFUL) + count(FILTERED));
    assert_eq!(said.trim(), want, "{tried:?}");
    assert_eq!(left, 3);
    assert_eq!(std::fs::read(&image).unwrap(), b"the image");
    let said = String::from_utf8_lossy(&free.stdout);
    let done = said.lines().filter(|line| line.starts_with("done: ")).count();
    assert_eq!(done, count(HARMLESS), "{free:?}");
}
