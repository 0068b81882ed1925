//! A proxy between the client and a real server that cuts, stalls and refuses.

use std::fs;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

/// What the proxy does to connections.
pub(in crate::remote::nbd) struct Control {
    /// Connections end after so many bytes of the server; 0 for never.
    pub(in crate::remote::nbd) cut_after: AtomicU64,
    /// Nothing passes on the connections before this number.
    pub(in crate::remote::nbd) stalled_below: AtomicUsize,
    /// Connections are closed at once.
    pub(in crate::remote::nbd) refuses: AtomicBool,
    /// Connections so far.
    pub(in crate::remote::nbd) connections: AtomicUsize,
    stop: AtomicBool,
}

/// A proxy at a Unix socket, until dropped.
pub(in crate::remote::nbd) struct Proxy {
    pub(in crate::remote::nbd) socket: PathBuf,
    pub(in crate::remote::nbd) control: Arc<Control>,
    thread: Option<JoinHandle<()>>,
}

impl Proxy {
    /// Starts a proxy before the server at the Unix socket `server`.
    pub(in crate::remote::nbd) fn new(server: &Path) -> Self {
        let socket = server.with_file_name("proxy");
        let listener = UnixListener::bind(&socket).unwrap();
        let control = Arc::new(Control {
            cut_after: AtomicU64::new(0),
            stalled_below: AtomicUsize::new(0),
            refuses: AtomicBool::new(false),
            connections: AtomicUsize::new(0),
            stop: AtomicBool::new(false),
        });
        let (shared, server) = (Arc::clone(&control), server.to_owned());
        let thread = thread::spawn(move || {
            let mut threads = Vec::new();
            for client in listener.incoming() {
                if shared.stop.load(Ordering::SeqCst) {
                    break;
                }
                let number = shared.connections.fetch_add(1, Ordering::SeqCst);
                let Ok(client) = client else { continue };
                // Dropping a connection closes it, also when the server is not there.
                let Ok(server) = UnixStream::connect(&server) else { continue };
                if shared.refuses.load(Ordering::SeqCst) {
                    continue;
                }
                let both = || (client.try_clone().unwrap(), server.try_clone().unwrap());
                let ((from, to), shared_up) = (both(), Arc::clone(&shared));
                threads.push(thread::spawn(move || copy(from, to, number, &shared_up, false)));
                let ((to, from), shared_down) = (both(), Arc::clone(&shared));
                threads.push(thread::spawn(move || copy(from, to, number, &shared_down, true)));
            }
            for thread in threads {
                thread.join().unwrap();
            }
        });
        Self { socket, control, thread: Some(thread) }
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.control.stop.store(true, Ordering::SeqCst);
        let _ = UnixStream::connect(&self.socket);
        let _ = fs::remove_file(&self.socket);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn copy(mut from: UnixStream, mut to: UnixStream, number: usize, control: &Control, is_down: bool) {
    from.set_read_timeout(Some(Duration::from_millis(10))).unwrap();
    let mut buf = [0; 16 << 10];
    let mut passed = 0;
    while !control.stop.load(Ordering::SeqCst) {
        let mut len = match from.read(&mut buf) {
            Ok(0) => break,
            Ok(len) => len,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
            Err(_) => break,
        };
        while number < control.stalled_below.load(Ordering::SeqCst)
            && !control.stop.load(Ordering::SeqCst)
        {
            thread::sleep(Duration::from_millis(5));
        }
        let limit = control.cut_after.load(Ordering::SeqCst);
        let is_cut = is_down && limit != 0 && passed + len as u64 >= limit;
        if is_cut {
            len = usize::try_from(limit - passed).unwrap();
        }
        passed += len as u64;
        if to.write_all(&buf[..len]).is_err() || is_cut {
            break;
        }
    }
    let _ = from.shutdown(Shutdown::Both);
    let _ = to.shutdown(Shutdown::Both);
}
