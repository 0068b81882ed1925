//! Real servers, a server that lies, and a proxy that breaks connections, for tests. Whatever is
//! started here ends with its value.

mod fake;
#[allow(dead_code, unused_imports, reason = "benchmarks and other tests use the rest")]
#[path = "../../../../tests/support/mod.rs"]
mod wire;

pub(super) use fake::{FakeServer, handshake, read_request};

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io;
use std::net::TcpListener;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use tempfile::TempDir;

use self::wire::{Protocol, Proxy};
use super::client::{Access, NbdClient, NbdOptions};
use super::uri::NbdTarget;
use crate::extents::{Extent, ExtentKind};
use crate::remote::tls::TlsFiles;
use crate::remote::transport::{Transport, WritableTransport};

/// Starts a proxy before the server at the Unix socket `server`.
pub(super) fn proxy(server: &Path) -> Proxy {
    Proxy::unix(server, Protocol::Nbd).unwrap()
}

/// The longest wait of a test for anything.
pub(super) const LONG: Duration = Duration::from_secs(60);

/// Waits until `what` is so.
pub(super) fn eventually(what: impl Fn() -> bool) {
    let until = Instant::now() + LONG;
    while !what() {
        assert!(Instant::now() < until, "it never came");
        thread::sleep(Duration::from_millis(2));
    }
}

/// A directory with an image: data, holes, and an end in the middle of a block.
pub(super) struct Image {
    pub(super) dir: TempDir,
    pub(super) bytes: Vec<u8>,
    data: Vec<Range<usize>>,
}

impl Image {
    pub(super) fn new() -> Self {
        // Whole sectors: QEMU rounds up to them.
        Self::with_len((3 << 20) + 5120)
    }

    pub(super) fn with_len(len: usize) -> Self {
        let dir = TempDir::new().unwrap();
        let mut bytes = vec![0; len];
        let mut data = vec![
            0..65_536,
            1 << 20..(1 << 20) + 200_704,
            2 << 20..(2 << 20) + 4096,
            len - len % 4096..len,
        ];
        data.retain(|range| range.end <= len);
        let file = File::create(dir.path().join("image")).unwrap();
        file.set_len(len as u64).unwrap();
        for range in &data {
            for at in range.clone() {
                bytes[at] = u8::try_from(at * 31 % 251 + 1).unwrap();
            }
            file.write_all_at(&bytes[range.clone()], range.start as u64).unwrap();
        }
        file.sync_all().unwrap();
        Self { dir, bytes, data }
    }

    pub(super) fn path(&self) -> PathBuf {
        self.dir.path().join("image")
    }

    pub(super) fn socket(&self) -> PathBuf {
        self.dir.path().join("socket")
    }

    pub(super) fn slice(&self, range: Range<u64>) -> &[u8] {
        &self.bytes[usize::try_from(range.start).unwrap()..usize::try_from(range.end).unwrap()]
    }

    pub(super) fn size(&self) -> u64 {
        self.bytes.len() as u64
    }

    /// Whether the file has data anywhere in `range`.
    pub(super) fn has_data(&self, range: &Range<u64>) -> bool {
        self.data
            .iter()
            .any(|data| (data.start as u64) < range.end && range.start < data.end as u64)
    }

    /// Starts nbdkit's file plugin at the socket, after `args`, before `last`.
    pub(super) fn nbdkit(&self, args: &[&str], last: &[&str]) -> TestServer {
        let file = format!("file={}", self.path().display());
        let socket = self.socket();
        let _ = fs::remove_file(&socket);
        let mut all: Vec<OsString> =
            ["nbdkit", "-f", "--exit-with-parent", "-U"].map(Into::into).into();
        all.push(socket.clone().into());
        all.extend(args.iter().map(Into::into));
        all.extend(["file".into(), file.into()]);
        all.extend(last.iter().map(Into::into));
        TestServer::start(&all, &socket)
    }

    /// Starts qemu-nbd at the socket, with an export named `vm`.
    pub(super) fn qemu_nbd(&self, args: &[&str]) -> TestServer {
        let socket = self.socket();
        let _ = fs::remove_file(&socket);
        let mut all: Vec<OsString> =
            ["qemu-nbd", "-f", "raw", "-x", "vm", "-k"].map(Into::into).into();
        all.push(socket.clone().into());
        all.extend(args.iter().map(Into::into));
        all.push(self.path().into());
        TestServer::start(&all, &socket)
    }

    /// Starts nbd-server with an export named `vm`; returns its port too.
    pub(super) fn nbd_server(&self) -> (NbdServer, u16) {
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let conf = self.dir.path().join("conf");
        let text = format!(
            "[generic]\nlistenaddr = 127.0.0.1\nport = {port}\n[vm]\nexportname = {}\nreadonly = true\n",
            self.path().display()
        );
        fs::write(&conf, text).unwrap();
        let pid = self.dir.path().join("pid");
        let args = [OsStr::new("-C"), conf.as_os_str(), OsStr::new("-p"), pid.as_os_str()];
        let status = Command::new("nbd-server").args(args).stderr(Stdio::null()).status();
        assert!(status.expect("nbd-server is installed").success());
        eventually(|| fs::read_to_string(&pid).is_ok_and(|text| text.ends_with('\n')));
        (NbdServer(fs::read_to_string(&pid).unwrap().trim().to_owned()), port)
    }
}

/// Whether somebody listens at `socket`. A socket is there before that, and refuses connections; and some
/// servers take one connection alone.
fn is_listening(socket: &Path) -> bool {
    // The flags of a socket that listens: proc(5), `__SO_ACCEPTCON`.
    let listens = |line: &str| {
        let words: Vec<_> = line.split_whitespace().collect();
        words.get(3) == Some(&"00010000") && words.last().map(Path::new) == Some(socket)
    };
    fs::read_to_string("/proc/net/unix").is_ok_and(|sockets| sockets.lines().any(listens))
}

/// A server in the background.
pub(super) struct TestServer(Child);

impl TestServer {
    fn start(words: &[OsString], socket: &Path) -> Self {
        let mut command = Command::new(&words[0]);
        command.args(&words[1..]).stdin(Stdio::null()).stdout(Stdio::null());
        let server = Self(command.spawn().unwrap_or_else(|error| panic!("{words:?}: {error}")));
        eventually(|| is_listening(socket));
        server
    }
}

impl Drop for TestServer {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// nbd-server, which is no child.
pub(super) struct NbdServer(String);

impl Drop for NbdServer {
    fn drop(&mut self) {
        let _ = Command::new("kill").arg(&self.0).status();
    }
}

pub(super) fn target(text: &str) -> NbdTarget {
    NbdTarget::parse(OsStr::new(text)).unwrap()
}

pub(super) fn unix_target(socket: &Path, export: &str) -> NbdTarget {
    target(&format!("nbd+unix:///{export}?socket={}", socket.display()))
}

pub(super) fn options() -> NbdOptions {
    NbdOptions {
        io_timeout: LONG,
        open_timeout: LONG,
        connections: 1,
        access: Access::ReadOnly,
        tls: TlsFiles::default(),
        dir: "/".into(),
    }
}

pub(super) fn open(socket: &Path, export: &str, options: NbdOptions) -> NbdClient {
    NbdClient::open(&unix_target(socket, export), options).unwrap()
}

/// A result that is waited for.
pub(super) struct Waiting<T>(mpsc::Receiver<io::Result<T>>);

impl<T> Waiting<T> {
    pub(super) fn wait(self) -> io::Result<T> {
        self.0.recv_timeout(LONG).expect("every request is answered")
    }

    pub(super) fn errno(self) -> i32 {
        self.wait().err().and_then(|error| error.raw_os_error()).unwrap_or(0)
    }
}

type Done<T> = Box<dyn FnOnce(io::Result<T>) + Send>;

fn waiting<T: Send + 'static>(begin: impl FnOnce(Done<T>)) -> Waiting<T> {
    let (sender, receiver) = mpsc::channel();
    // A failed test may have stopped waiting.
    begin(Box::new(move |result| drop(sender.send(result))));
    Waiting(receiver)
}

pub(super) fn read(client: &NbdClient, range: Range<u64>) -> Waiting<Vec<u8>> {
    waiting(|done| client.read(range, done))
}

pub(super) fn extents(client: &NbdClient, range: Range<u64>) -> Waiting<Vec<Extent>> {
    waiting(|done| client.extents(range, done))
}

pub(super) fn write(client: &NbdClient, offset: u64, bytes: &[u8]) -> Waiting<()> {
    waiting(|done| client.write(offset, bytes.to_vec(), done))
}

pub(super) fn zero(client: &NbdClient, range: Range<u64>, punch: bool) -> Waiting<()> {
    waiting(|done| client.zero(range, punch, done))
}

pub(super) fn flush(client: &NbdClient) -> Waiting<()> {
    waiting(|done| client.flush(done))
}

/// Reads the whole image, in aligned pieces of `step` that are all asked for at once.
pub(super) fn read_all(client: &NbdClient, step: u64) -> Vec<u8> {
    let size = client.size();
    let starts = (0..size).step_by(usize::try_from(step).unwrap());
    let reads: Vec<_> = starts.map(|at| read(client, at..(at + step).min(size))).collect();
    reads.into_iter().flat_map(|read| read.wait().unwrap()).collect()
}

/// Asks for the extents of the whole image, answer after answer.
pub(super) fn all_extents(client: &NbdClient) -> Vec<Extent> {
    let mut found: Vec<Extent> = Vec::new();
    let mut at = 0;
    while at < client.size() {
        let some = extents(client, at..client.size()).wait().unwrap();
        assert!(some.iter().all(|extent| extent.kind != ExtentKind::Lower));
        for extent in some {
            assert_eq!(extent.range.start, at);
            assert!(!extent.is_empty());
            at = extent.range.end;
            found.push(extent);
        }
    }
    found
}
