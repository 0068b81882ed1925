//! A server whose answers are written by the test.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};

use super::LONG;

/// A server at a Unix socket, until dropped. Each connection is passed to a function, with its
/// number, on a thread of its own.
pub(in crate::remote::nbd) struct FakeServer {
    socket: PathBuf,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl FakeServer {
    pub(in crate::remote::nbd) fn new(
        socket: &Path,
        serve: impl Fn(UnixStream, usize) + Send + Sync + 'static,
    ) -> Self {
        let listener = UnixListener::bind(socket).unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let (stopped, serve) = (Arc::clone(&stop), Arc::new(serve));
        let thread = thread::spawn(move || {
            for (number, stream) in listener.incoming().enumerate() {
                if stopped.load(Ordering::SeqCst) {
                    break;
                }
                let (stream, serve) = (stream.unwrap(), Arc::clone(&serve));
                stream.set_read_timeout(Some(LONG)).unwrap();
                stream.set_write_timeout(Some(LONG)).unwrap();
                // It ends with its connection.
                thread::spawn(move || serve(stream, number));
            }
        });
        Self { socket: socket.to_owned(), stop, thread: Some(thread) }
    }
}

impl Drop for FakeServer {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        let _ = UnixStream::connect(&self.socket);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn take<const N: usize>(stream: &mut UnixStream) -> Option<[u8; N]> {
    let mut bytes = [0; N];
    stream.read_exact(&mut bytes).ok()?;
    Some(bytes)
}

/// Does the handshake of a server with structured replies and `base:allocation` (context 7), for an
/// image of `size` bytes. `None` when the client went away.
pub(in crate::remote::nbd) fn handshake(
    stream: &mut UnixStream,
    size: u64,
    flags: u16,
) -> Option<()> {
    stream.write_all(b"NBDMAGICIHAVEOPT\0\x03").ok()?;
    take::<4>(stream)?;
    loop {
        take::<8>(stream)?;
        let option = u32::from_be_bytes(take(stream)?);
        let len = u32::from_be_bytes(take(stream)?);
        let mut data = vec![0; usize::try_from(len).unwrap()];
        stream.read_exact(&mut data).ok()?;
        let mut reply = |kind: u32, data: &[u8]| {
            let len = u32::try_from(data.len()).unwrap();
            let mut bytes = 0x0003_e889_0455_65a9_u64.to_be_bytes().to_vec();
            for field in [option, kind, len] {
                bytes.extend(field.to_be_bytes());
            }
            bytes.extend(data);
            stream.write_all(&bytes).ok()
        };
        match option {
            7 => {
                let info = [&[0, 0], &size.to_be_bytes()[..], &flags.to_be_bytes()].concat();
                reply(3, &info)?;
                return reply(1, &[]);
            }
            8 => reply(1, &[])?,
            10 => {
                reply(4, b"\0\0\0\x07base:allocation")?;
                reply(1, &[])?;
            }
            _ => reply(0x8000_0001, &[])?,
        }
    }
}

/// Reads a request with compact headers and no payload: its type, its cookie, offset and length.
pub(in crate::remote::nbd) fn read_request(
    stream: &mut UnixStream,
) -> Option<(u16, u64, u64, u32)> {
    let request: [u8; 28] = take(stream)?;
    let field = |at: usize, len: usize| {
        request[at..at + len].iter().fold(0_u64, |value, byte| value << 8 | u64::from(*byte))
    };
    assert_eq!(field(0, 4), 0x2560_9513);
    let kind = u16::try_from(field(6, 2)).unwrap();
    Some((kind, field(8, 8), field(16, 8), u32::try_from(field(24, 4)).unwrap()))
}
