//! One connected socket, which never blocks, and the handshake on it.

use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::net::{SocketAddr, ToSocketAddrs};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use rustix::event::{PollFlags, Timespec};
use rustix::io::Errno;
use rustix::net::addr::SocketAddrArg;
use rustix::net::{
    AddressFamily, SendAncillaryBuffer, SendFlags, Shutdown, SocketAddrUnix, SocketFlags,
    SocketType, connect, sendmsg, shutdown, socket_with, sockopt,
};

use super::codec::export::Export;
use super::codec::handshake::{Handshake, Progress};
use super::error::{NbdError, TakeError};
use super::tls::{TlsSession, TlsSettings};
use crate::program::stop::Stop;

/// A peer that vanished without a word is found after 10 s + 3 probes of 5 s when nothing is sent,
/// and after 20 s when what was sent is not acknowledged (tcp(7)). The I/O timeout of requests may be
/// shorter, and then ends the connection itself.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(10);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(5);
const KEEPALIVE_PROBES: u32 = 3;
const USER_TIMEOUT_MS: u32 = 20_000;

/// The interval of a second try where the queue of a Unix socket is full (connect(2), EAGAIN), and
/// of the look whether a wait for a name is over.
const RETRY: Duration = Duration::from_millis(20);

/// A time until which something may take, unless it is stopped.
#[derive(Clone, Debug)]
pub(super) struct Deadline {
    until: Instant,
    time: Duration,
    stop: Stop,
}

impl Deadline {
    pub(super) fn after(time: Duration, stop: &Stop) -> Self {
        Self { until: Instant::now() + time, time, stop: stop.clone() }
    }

    fn left(&self) -> Result<Duration, NbdError> {
        if self.stop.is_stopped() {
            return Err(NbdError::Stopped);
        }
        let left = self.until.saturating_duration_since(Instant::now());
        if left.is_zero() { Err(NbdError::Timeout(self.time)) } else { Ok(left) }
    }

    /// Waits until `fd` is ready for `what`.
    fn wait_for(&self, fd: BorrowedFd<'_>, what: PollFlags) -> Result<(), NbdError> {
        loop {
            let left = Timespec::try_from(self.left()?).ok();
            match self.stop.wait_for(fd, what, left) {
                Ok(ready) if !ready.is_empty() => return Ok(()),
                // `left` says whether it is the time or the stop.
                Ok(_) => {}
                Err(_) if self.stop.is_stopped() => return Err(NbdError::Stopped),
                Err(error) => return Err(NbdError::connect(&error)),
            }
        }
    }

    fn sleep(&self, time: Duration) -> Result<(), NbdError> {
        let time = Timespec::try_from(time.min(self.left()?)).ok();
        let _ = self.stop.wait_for(self.stop.fd(), PollFlags::IN, time);
        self.left().map(|_| ())
    }
}

/// A connected socket, encrypted or not.
#[derive(Debug)]
pub(super) struct Link {
    socket: OwnedFd,
    /// Locked while the socket takes or gives bytes, which never waits.
    tls: Option<Mutex<TlsSession>>,
}

impl Link {
    /// Connects to the first address of `host` that answers.
    pub(super) fn tcp(host: &str, port: u16, deadline: &Deadline) -> Result<Self, NbdError> {
        let addresses = resolve(host, port, deadline)?;
        let mut failed = None;
        let mut left = u32::try_from(addresses.len()).unwrap_or(u32::MAX);
        for address in addresses {
            // One address that does not answer leaves time for the others.
            let share = Deadline::after(deadline.left()? / left.max(1), &deadline.stop);
            left -= 1;
            let family = match address {
                SocketAddr::V4(_) => AddressFamily::INET,
                SocketAddr::V6(_) => AddressFamily::INET6,
            };
            match open_socket(family, &address, &share) {
                Ok(fd) => {
                    // Without them the connection is only slower, or dies later.
                    let _ = set_tcp_options(&fd);
                    return Ok(Self { socket: fd, tls: None });
                }
                Err(NbdError::Stopped) => return Err(NbdError::Stopped),
                Err(error) => failed = Some(error),
            }
        }
        let nothing = || NbdError::Resolve { host: host.to_owned(), why: "no address".to_owned() };
        Err(failed.unwrap_or_else(nothing))
    }

    /// Connects to the Unix socket at `path`; one that begins with a zero byte has no file.
    pub(super) fn unix(path: &Path, deadline: &Deadline) -> Result<Self, NbdError> {
        use std::os::unix::ffi::OsStrExt;
        let address = match path.as_os_str().as_bytes().strip_prefix(b"\0") {
            Some(name) => SocketAddrUnix::new_abstract_name(name),
            None => SocketAddrUnix::new(path),
        };
        let address = address.map_err(|error| NbdError::connect(&error.into()))?;
        let socket = open_socket(AddressFamily::UNIX, &address, deadline)?;
        Ok(Self { socket, tls: None })
    }

    /// Sends as much of `parts` as the socket takes now. With TLS, some of it may wait for
    /// [`finish_send`](Self::finish_send).
    ///
    /// # Errors
    /// `EAGAIN` when that is nothing; the errno of sendmsg(2).
    pub(super) fn send(&self, parts: &[IoSlice<'_>]) -> Result<usize, Errno> {
        match &self.tls {
            None => send_to(&self.socket, parts),
            Some(tls) => tls.lock().send(parts, &mut Raw(&self.socket)),
        }
    }

    /// Sends what TLS still holds of what was sent.
    ///
    /// # Errors
    /// `EAGAIN` when some is left; the errno of sendmsg(2).
    pub(super) fn finish_send(&self) -> Result<(), Errno> {
        match &self.tls {
            None => Ok(()),
            Some(tls) => tls.lock().flush(&mut Raw(&self.socket)),
        }
    }

    /// Takes what has come into `parts`; 0 at the end of the connection.
    ///
    /// # Errors
    /// `EAGAIN` when that is nothing; `EPROTO` when it is not what TLS expects; the errno of readv(2).
    pub(super) fn receive(&self, parts: &mut [IoSliceMut<'_>]) -> Result<usize, Errno> {
        match &self.tls {
            None => rustix::io::retry_on_intr(|| rustix::io::readv(&self.socket, parts)),
            Some(tls) => tls.lock().receive(parts, &mut Raw(&self.socket)),
        }
    }

    /// Encrypts the connection.
    fn start_tls(&mut self, settings: &TlsSettings, deadline: &Deadline) -> Result<(), NbdError> {
        let mut session = TlsSession::new(settings)?;
        let mut raw = Raw(&self.socket);
        while session.is_handshaking() || session.wants_write() {
            match session.flush(&mut raw) {
                Ok(()) => {}
                Err(Errno::AGAIN) => deadline.wait_for(self.socket.as_fd(), PollFlags::OUT)?,
                Err(error) => return Err(broken(error)),
            }
            if !session.is_handshaking() {
                continue;
            }
            match session.take(&mut raw) {
                Ok(0) => return Err(NbdError::Tls("the server closed the connection".to_owned())),
                Ok(_) => {}
                Err(TakeError::Socket(Errno::AGAIN)) => {
                    deadline.wait_for(self.socket.as_fd(), PollFlags::IN)?;
                }
                Err(TakeError::Socket(error)) => return Err(broken(error)),
                Err(TakeError::Tls(text)) => {
                    // The server is told why, if it listens.
                    let _ = session.flush(&mut raw);
                    return Err(NbdError::Tls(text));
                }
            }
        }
        self.tls = Some(Mutex::new(session));
        Ok(())
    }

    /// Ends the connection, so that every wait for it ends.
    pub(super) fn shut_down(&self) {
        // It may have ended already.
        let _ = shutdown(&self.socket, Shutdown::Both);
    }

    /// Does the handshake; with TLS where it asks for that.
    pub(super) fn negotiate(
        &mut self,
        mut handshake: Handshake,
        tls: Option<&TlsSettings>,
        deadline: &Deadline,
    ) -> Result<Export, NbdError> {
        let mut buf = [0; 4096];
        loop {
            self.send_all(&handshake.take_output(), deadline)?;
            let received = match self.receive_some(&mut buf, deadline)? {
                0 => return Err(handshake.end_of_input().into()),
                len => buf.get(..len).unwrap_or_default(),
            };
            match handshake.feed(received)? {
                Progress::MoreInput => {}
                Progress::Done(export) => return Ok(*export),
                Progress::StartTls => {
                    let missing = || NbdError::TlsSettings("there are no settings".to_owned());
                    self.start_tls(tls.ok_or_else(missing)?, deadline)?;
                    handshake.start_options();
                }
            }
        }
    }

    /// Sends all of `bytes`.
    pub(super) fn send_all(&self, mut bytes: &[u8], deadline: &Deadline) -> Result<(), NbdError> {
        while !bytes.is_empty() {
            match self.send(&[IoSlice::new(bytes)]) {
                Ok(sent) => bytes = bytes.get(sent..).unwrap_or_default(),
                Err(Errno::AGAIN) => deadline.wait_for(self.socket.as_fd(), PollFlags::OUT)?,
                // The server's last words may still be there to be read.
                Err(Errno::PIPE | Errno::CONNRESET) => return Ok(()),
                Err(error) => return Err(broken(error)),
            }
        }
        loop {
            match self.finish_send() {
                Ok(()) | Err(Errno::PIPE | Errno::CONNRESET) => return Ok(()),
                Err(Errno::AGAIN) => deadline.wait_for(self.socket.as_fd(), PollFlags::OUT)?,
                Err(error) => return Err(broken(error)),
            }
        }
    }

    /// Receives some bytes; 0 at the end of the connection.
    pub(super) fn receive_some(
        &self,
        buf: &mut [u8],
        deadline: &Deadline,
    ) -> Result<usize, NbdError> {
        loop {
            match self.receive(&mut [IoSliceMut::new(buf)]) {
                Ok(received) => return Ok(received),
                Err(Errno::AGAIN) => deadline.wait_for(self.socket.as_fd(), PollFlags::IN)?,
                Err(Errno::CONNRESET) => return Ok(0),
                Err(error) => return Err(broken(error)),
            }
        }
    }
}

impl AsFd for Link {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

fn send_to(socket: &OwnedFd, parts: &[IoSlice<'_>]) -> Result<usize, Errno> {
    let mut nothing = SendAncillaryBuffer::default();
    rustix::io::retry_on_intr(|| sendmsg(socket, parts, &mut nothing, SendFlags::NOSIGNAL))
}

/// The socket below TLS.
struct Raw<'a>(&'a OwnedFd);

impl Read for Raw<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        Ok(rustix::io::retry_on_intr(|| rustix::io::read(self.0, &mut *buf))?)
    }
}

impl Write for Raw<'_> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        Ok(send_to(self.0, &[IoSlice::new(buf)])?)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn broken(error: Errno) -> NbdError {
    NbdError::Broken(crate::host::os_message(&error.into()))
}

fn open_socket(
    family: AddressFamily,
    address: &impl SocketAddrArg,
    deadline: &Deadline,
) -> Result<OwnedFd, NbdError> {
    let failed = |error: Errno| NbdError::connect(&error.into());
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let fd = socket_with(family, SocketType::STREAM, flags, None).map_err(failed)?;
    loop {
        match connect(&fd, address) {
            Ok(()) => return Ok(fd),
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => deadline.sleep(RETRY)?,
            Err(Errno::INPROGRESS | Errno::ALREADY) => {
                deadline.wait_for(fd.as_fd(), PollFlags::OUT)?;
                return match sockopt::socket_error(&fd).map_err(failed)? {
                    Ok(()) => Ok(fd),
                    Err(error) => Err(failed(error)),
                };
            }
            Err(error) => return Err(failed(error)),
        }
    }
}

fn set_tcp_options(fd: &OwnedFd) -> rustix::io::Result<()> {
    // Requests are small and wait for nothing.
    sockopt::set_tcp_nodelay(fd, true)?;
    sockopt::set_socket_keepalive(fd, true)?;
    sockopt::set_tcp_keepidle(fd, KEEPALIVE_IDLE)?;
    sockopt::set_tcp_keepintvl(fd, KEEPALIVE_INTERVAL)?;
    sockopt::set_tcp_keepcnt(fd, KEEPALIVE_PROBES)?;
    sockopt::set_tcp_user_timeout(fd, USER_TIMEOUT_MS)
}

/// Returns the addresses of `host`. The system's resolver has its own, longer timeouts: it runs on a
/// thread that is left behind when the time is over.
fn resolve(host: &str, port: u16, deadline: &Deadline) -> Result<Vec<SocketAddr>, NbdError> {
    if let Ok(address) = host.parse() {
        return Ok(vec![SocketAddr::new(address, port)]);
    }
    let (sender, receiver) = mpsc::channel();
    let name = host.to_owned();
    let failed = |why: String| NbdError::Resolve { host: host.to_owned(), why };
    thread::Builder::new()
        .name("cowslip-resolve".to_owned())
        .spawn(move || {
            let found = (name.as_str(), port).to_socket_addrs().map(Iterator::collect);
            // Nobody may be waiting any more.
            let _ = sender.send(found);
        })
        .map_err(|error| failed(crate::host::os_message(&error)))?;
    loop {
        match receiver.recv_timeout(RETRY.min(deadline.left()?)) {
            Ok(Ok(addresses)) => return Ok(addresses),
            Ok(Err(error)) => {
                let text = error.to_string();
                let why = text.strip_prefix("failed to lookup address information: ");
                return Err(failed(why.unwrap_or(&text).to_owned()));
            }
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return Err(failed("no answer".to_owned())),
        }
    }
}
