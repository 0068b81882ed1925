//! A proxy between clients and a server: a link with a round trip and a rate, faults, and counts.
//!
//! The rate is that of the whole link, in each direction, shared by all connections. The delay is
//! half of the round trip each way, and opening a connection takes a whole one. Without a delay a
//! thread reads and writes in turn, so that the proxy moves gigabytes a second; with one, a second
//! thread writes what is due.

use std::collections::BTreeMap;
use std::io;
use std::net::{Ipv4Addr, Shutdown, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use super::requests::{Protocol, RequestCounter};
use super::stream::{Endpoint, Listener, Stream};

/// The most bytes that are read at a time.
const CHUNK: usize = 256 << 10;
/// The same where there is a rate: 64 KiB, which 100 MB/s take 0.7 ms for.
const PACED_CHUNK: usize = 64 << 10;
/// How far a link that was idle, or slept too long, may catch up.
const BURST: Duration = Duration::from_millis(2);
/// The most chunks in a queue of one direction of a connection; a sender then waits.
const QUEUE_LEN: usize = 256;

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What a proxy does to connections, and what it has counted.
pub(crate) struct Control {
    /// Connections end after so many bytes of the server; 0 for never.
    pub(crate) cut_after: AtomicU64,
    /// A bit of this byte of the server, counted from 1 on each connection, is flipped; 0 for none.
    pub(crate) flip_at: AtomicU64,
    /// Nothing passes on the connections before this number.
    pub(crate) stalled_below: AtomicUsize,
    /// Connections are closed at once.
    pub(crate) refuses: AtomicBool,
    /// Connections so far.
    pub(crate) connections: AtomicUsize,
    /// What clients have asked for, as [`Protocol`] counts it.
    pub(crate) requests: AtomicU64,
    /// How often a client spoke after the server did: with one connection the round trips.
    pub(crate) turns: AtomicU64,
    /// Bytes from clients.
    pub(crate) up: AtomicU64,
    /// Bytes from the server.
    pub(crate) down: AtomicU64,
    /// The round trip in nanoseconds.
    rtt: AtomicU64,
    /// Bytes a second in each direction; 0 for no limit.
    rate: AtomicU64,
    /// When the link is free again, upwards and downwards.
    free: [Mutex<Instant>; 2],
    protocol: Protocol,
    live: Mutex<BTreeMap<usize, [Arc<Stream>; 2]>>,
    stop: AtomicBool,
}

impl Control {
    fn new(protocol: Protocol) -> Self {
        Self {
            cut_after: AtomicU64::new(0),
            flip_at: AtomicU64::new(0),
            stalled_below: AtomicUsize::new(0),
            refuses: AtomicBool::new(false),
            connections: AtomicUsize::new(0),
            requests: AtomicU64::new(0),
            turns: AtomicU64::new(0),
            up: AtomicU64::new(0),
            down: AtomicU64::new(0),
            rtt: AtomicU64::new(0),
            rate: AtomicU64::new(0),
            free: [Mutex::new(Instant::now()), Mutex::new(Instant::now())],
            protocol,
            live: Mutex::default(),
            stop: AtomicBool::new(false),
        }
    }

    /// Makes the link one with the round trip `rtt`, for connections from now on, and with `rate`
    /// bytes a second in each direction, 0 for no limit.
    pub(crate) fn set_link(&self, rtt: Duration, rate: u64) {
        self.rtt.store(u64::try_from(rtt.as_nanos()).unwrap_or(u64::MAX), Ordering::SeqCst);
        self.rate.store(rate, Ordering::SeqCst);
    }

    /// Ends all connections there are.
    pub(crate) fn cut_all(&self) {
        locked(&self.live).values().flatten().for_each(|stream| stream.shut(Shutdown::Both));
    }

    fn is_stopped(&self) -> bool {
        self.stop.load(Ordering::SeqCst)
    }

    /// Sends `len` bytes over the link: waits until the last of them has left, and returns when that
    /// was.
    fn send(&self, way: Way, len: usize) -> Instant {
        let (now, rate) = (Instant::now(), self.rate.load(Ordering::Relaxed));
        if rate == 0 {
            return now;
        }
        let takes = Duration::from_secs_f64(len as f64 / rate as f64);
        let left = {
            let mut free = locked(&self.free[way as usize]);
            *free = (*free).max(now.checked_sub(BURST).unwrap_or(now)) + takes;
            *free
        };
        thread::sleep(left.saturating_duration_since(now));
        // What catches up has not left earlier than it came.
        left.max(now)
    }
}

/// A proxy, until dropped.
pub(crate) struct Proxy {
    /// Where clients connect to.
    pub(crate) endpoint: Endpoint,
    /// What it does.
    pub(crate) control: Arc<Control>,
    thread: Option<JoinHandle<()>>,
}

impl Proxy {
    /// Starts a proxy at a free port of this host, before `server`.
    ///
    /// # Errors
    /// The host's errno from listening.
    pub(crate) fn tcp(server: Endpoint, protocol: Protocol) -> io::Result<Self> {
        Self::start(&Endpoint::Tcp(SocketAddr::from((Ipv4Addr::LOCALHOST, 0))), server, protocol)
    }

    /// Starts a proxy at the Unix socket `proxy` beside the server's, `server`.
    ///
    /// # Errors
    /// The host's errno from listening.
    pub(crate) fn unix(server: &Path, protocol: Protocol) -> io::Result<Self> {
        let at = Endpoint::Unix(server.with_file_name("proxy"));
        Self::start(&at, Endpoint::Unix(server.to_owned()), protocol)
    }

    fn start(at: &Endpoint, server: Endpoint, protocol: Protocol) -> io::Result<Self> {
        let (listener, endpoint) = Listener::bind(at)?;
        let control = Arc::new(Control::new(protocol));
        let shared = Arc::clone(&control);
        let thread = thread::spawn(move || accept_all(&listener, &server, &shared));
        Ok(Self { endpoint, control, thread: Some(thread) })
    }

    /// Returns the path of the Unix socket; empty for a proxy at a port.
    pub(crate) fn socket(&self) -> PathBuf {
        match &self.endpoint {
            Endpoint::Unix(path) => path.clone(),
            Endpoint::Tcp(_) => PathBuf::new(),
        }
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.control.stop.store(true, Ordering::SeqCst);
        self.control.cut_all();
        // The listener waits for one more connection.
        let _ = Stream::connect(&self.endpoint);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        if let Endpoint::Unix(path) = &self.endpoint {
            let _ = std::fs::remove_file(path);
        }
    }
}

fn accept_all(listener: &Listener, server: &Endpoint, control: &Arc<Control>) {
    let mut threads: Vec<JoinHandle<()>> = Vec::new();
    while let Ok(client) = listener.accept() {
        if control.is_stopped() {
            break;
        }
        let number = control.connections.fetch_add(1, Ordering::SeqCst);
        if control.refuses.load(Ordering::SeqCst) {
            // Dropping a connection closes it.
            continue;
        }
        let (control, server) = (Arc::clone(control), server.clone());
        threads.retain(|thread| !thread.is_finished());
        threads.push(thread::spawn(move || serve(client, number, &server, control)));
    }
    control.cut_all();
    for thread in threads {
        let _ = thread.join();
    }
}

/// Connects a client with the server until one of them ends.
fn serve(client: Stream, number: usize, server: &Endpoint, control: Arc<Control>) {
    let rtt = Duration::from_nanos(control.rtt.load(Ordering::SeqCst));
    let usable = Instant::now() + rtt;
    // The server hears of the client after half of a round trip, and the client of it after another.
    thread::sleep(rtt / 2);
    let Ok(server) = Stream::connect(server) else { return };
    let (client, server) = (Arc::new(client), Arc::new(server));
    let both = [Arc::clone(&client), Arc::clone(&server)];
    locked(&control.live).insert(number, both);
    if control.is_stopped() {
        control.cut_all();
    }
    let connection = Arc::new(Connection { number, rtt, usable, is_asking: false.into(), control });
    let (from, to, up) = (Arc::clone(&client), Arc::clone(&server), Arc::clone(&connection));
    let thread = thread::spawn(move || carry(&from, &to, Way::Up, &up));
    carry(&server, &client, Way::Down, &connection);
    let _ = thread.join();
    locked(&connection.control.live).remove(&number);
}

/// A direction.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    /// From the client to the server.
    Up = 0,
    Down = 1,
}

struct Connection {
    number: usize,
    rtt: Duration,
    /// When the client's first bytes can leave.
    usable: Instant,
    /// Whether the client was the last to speak.
    is_asking: AtomicBool,
    control: Arc<Control>,
}

impl Connection {
    fn count(&self, way: Way, requests: &mut RequestCounter, bytes: &[u8]) {
        let (control, len) = (&self.control, bytes.len() as u64);
        if way == Way::Down {
            self.is_asking.store(false, Ordering::SeqCst);
            control.down.fetch_add(len, Ordering::SeqCst);
            return;
        }
        if !self.is_asking.swap(true, Ordering::SeqCst) {
            control.turns.fetch_add(1, Ordering::SeqCst);
        }
        control.requests.fetch_add(requests.add(bytes), Ordering::SeqCst);
        control.up.fetch_add(len, Ordering::SeqCst);
    }

    fn wait_while_stalled(&self) {
        let control = &self.control;
        while self.number < control.stalled_below.load(Ordering::SeqCst) && !control.is_stopped() {
            thread::sleep(Duration::from_millis(5));
        }
    }
}

/// Passes on what comes, until the sender ends or the connection is cut.
fn carry(from: &Arc<Stream>, to: &Arc<Stream>, way: Way, connection: &Connection) {
    let control = &connection.control;
    let mut requests = RequestCounter::new(control.protocol);
    let mut out = Out::new(to, connection.rtt);
    let mut buf = vec![0; CHUNK];
    let mut passed = 0;
    let mut is_cut = false;
    while !is_cut {
        let is_paced = control.rate.load(Ordering::Relaxed) != 0;
        let most = if is_paced { PACED_CHUNK } else { CHUNK };
        let Ok(len @ 1..) = from.read(&mut buf[..most]) else { break };
        connection.wait_while_stalled();
        let mut bytes = &mut buf[..len];
        if way == Way::Down {
            let limit = control.cut_after.load(Ordering::SeqCst);
            is_cut = limit != 0 && passed + len as u64 >= limit;
            let kept = usize::try_from(limit.saturating_sub(passed)).unwrap_or(usize::MAX);
            bytes = if is_cut { &mut bytes[..kept] } else { bytes };
            let flipped = control.flip_at.load(Ordering::SeqCst).checked_sub(passed + 1);
            let flipped = flipped.and_then(|at| bytes.get_mut(usize::try_from(at).ok()?));
            flipped.into_iter().for_each(|byte| *byte ^= 1);
        }
        passed += bytes.len() as u64;
        connection.count(way, &mut requests, bytes);
        let mut left = control.send(way, bytes.len());
        if way == Way::Up {
            left = left.max(connection.usable);
        }
        if out.write(bytes, left + connection.rtt / 2).is_err() {
            is_cut = true;
        }
    }
    out.finish();
    // What the other side still has to say is passed on after an end, and lost after a cut.
    to.shut(if is_cut { Shutdown::Both } else { Shutdown::Write });
    if is_cut {
        from.shut(Shutdown::Both);
    }
}

/// Where bytes go to, at once or when they are due.
enum Out<'a> {
    Direct(&'a Stream),
    Queue { queue: mpsc::SyncSender<(Instant, Vec<u8>)>, thread: JoinHandle<()> },
}

impl<'a> Out<'a> {
    fn new(to: &'a Arc<Stream>, rtt: Duration) -> Self {
        if rtt.is_zero() {
            return Self::Direct(to);
        }
        let (queue, chunks) = mpsc::sync_channel::<(Instant, Vec<u8>)>(QUEUE_LEN);
        let to = Arc::clone(to);
        let thread = thread::spawn(move || {
            for (due, bytes) in chunks {
                thread::sleep(due.saturating_duration_since(Instant::now()));
                if to.write_all(&bytes).is_err() {
                    break;
                }
            }
        });
        Self::Queue { queue, thread }
    }

    /// Writes `bytes` when they are `due`.
    ///
    /// # Errors
    /// The connection has ended.
    fn write(&mut self, bytes: &[u8], due: Instant) -> io::Result<()> {
        match self {
            Self::Direct(to) => to.write_all(bytes),
            Self::Queue { queue, .. } => {
                queue.send((due, bytes.to_vec())).map_err(|_| io::ErrorKind::BrokenPipe.into())
            }
        }
    }

    /// Waits until all is written.
    fn finish(self) {
        if let Self::Queue { queue, thread } = self {
            drop(queue);
            let _ = thread.join();
        }
    }
}
