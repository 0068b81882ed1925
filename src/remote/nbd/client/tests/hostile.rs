//! Servers that lie, and the end of a client.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::super::*;
use crate::remote::nbd::testing::*;

const SIZE: u64 = 1 << 40;

/// A structured chunk (its last) with the payload `payload` and the length `len`.
fn chunk(kind: u16, cookie: u64, len: u32, payload: &[u8]) -> Vec<u8> {
    let mut bytes = 0x668e_33ef_u32.to_be_bytes().to_vec();
    bytes.extend(1_u16.to_be_bytes());
    bytes.extend(kind.to_be_bytes());
    bytes.extend(cookie.to_be_bytes());
    bytes.extend(len.to_be_bytes());
    bytes.extend(payload);
    bytes
}

#[test]
fn answers_that_make_no_sense_fail_requests_in_time() {
    type Lie = fn(u64) -> Vec<u8>;
    let lies: [Lie; 8] = [
        |_| b"HTTP/1.1 200 OK\r\n\r\n".to_vec(),
        |cookie| chunk(0, cookie + 1, 0, b""),
        |cookie| chunk(1, cookie, u32::MAX, &[0; 64]),
        |cookie| chunk(2, cookie, 12, &[0xff; 12]),
        |cookie| chunk(5, cookie, u32::MAX - 3, &[0; 64]),
        |cookie| chunk(0x8001, cookie, u32::MAX, &[0; 64]),
        |cookie| chunk(99, cookie, 0, b""),
        // Only a part, and the end.
        |cookie| chunk(1, cookie, 4104, &[0; 64]),
    ];
    for lie in lies {
        let image = Image::with_len(4096);
        let tries = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&tries);
        let _server = FakeServer::new(&image.socket(), move |mut stream, _| {
            if handshake(&mut stream, SIZE, 3).is_none() {
                return;
            }
            counted.fetch_add(1, Ordering::SeqCst);
            if let Some((0, cookie, ..)) = read_request(&mut stream) {
                let _ = stream.write_all(&lie(cookie));
            }
        });
        let io_timeout = Duration::from_millis(400);
        let client = open(&image.socket(), "", NbdOptions { io_timeout, ..options() });
        assert_eq!(read(&client, 0..4096).errno(), libc::ETIMEDOUT);
        let tries = tries.load(Ordering::SeqCst);
        assert!((2..40).contains(&tries), "{tries} connections");
    }
}

#[test]
fn a_server_that_is_being_shut_down_is_asked_again() {
    let image = Image::with_len(4096);
    let _server = FakeServer::new(&image.socket(), |mut stream, number| {
        if handshake(&mut stream, SIZE, 3).is_none() {
            return;
        }
        while let Some((0, cookie, offset, len)) = read_request(&mut stream) {
            let answer = match number {
                0 => chunk(0x8001, cookie, 6, &[0, 0, 0, 108, 0, 0]),
                _ => hole(cookie, offset, len),
            };
            let _ = stream.write_all(&answer);
        }
    });
    let client = open(&image.socket(), "", options());
    assert_eq!(read(&client, 4096..8192).wait().unwrap(), [0; 4096]);
}

/// The payload of an error at an offset: EIO, no text, at 0.
const ERROR: [u8; 14] = [0, 0, 0, 5, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

/// A chunk that others of its reply follow.
fn first_chunk(kind: u16, cookie: u64, len: u32, payload: &[u8]) -> Vec<u8> {
    let mut bytes = chunk(kind, cookie, len, payload);
    bytes[5] = 0;
    bytes
}

/// A reply to a read of zeros.
fn hole(cookie: u64, offset: u64, len: u32) -> Vec<u8> {
    chunk(2, cookie, 12, &[&offset.to_be_bytes()[..], &len.to_be_bytes()].concat())
}

/// Serves an image of zeros. The first connection passes its first read to `first`, and answers none.
fn zeros_but(
    image: &Image,
    first: impl Fn(&mut UnixStream, u64) + Send + Sync + 'static,
) -> FakeServer {
    FakeServer::new(&image.socket(), move |mut stream, number| {
        if handshake(&mut stream, SIZE, 3).is_none() {
            return;
        }
        while let Some((0, cookie, offset, len)) = read_request(&mut stream) {
            if number == 0 {
                return first(&mut stream, cookie);
            }
            let _ = stream.write_all(&hole(cookie, offset, len));
        }
    })
}

/// Sends `bytes`, and then `more` every 20 ms until the client ends the connection.
fn drip(stream: &mut UnixStream, bytes: &[u8], more: &[u8]) {
    let mut sent = stream.write_all(bytes);
    while sent.is_ok() {
        thread::sleep(Duration::from_millis(20));
        sent = stream.write_all(more);
    }
}

#[test]
fn a_reply_that_never_ends_fails_its_own_read_alone() {
    type Endless = fn(&mut UnixStream, u64);
    let endless: [Endless; 3] = [
        // A byte of the data at a time.
        |stream, cookie| drip(stream, &chunk(1, cookie, 8 + (1 << 20), &[0; 8]), &[7]),
        // One error after the other, and no end.
        |stream, cookie| drip(stream, b"", &first_chunk(0x8002, cookie, 14, &ERROR)),
        // A byte of a header at a time.
        |stream, cookie| drip(stream, &chunk(0x8001, cookie, 60_000, &[0; 5]), &[0]),
    ];
    for (at, endless) in endless.into_iter().enumerate() {
        let image = Image::with_len(4096);
        let _server = zeros_but(&image, endless);
        let io_timeout = Duration::from_secs(1);
        let client = open(&image.socket(), "", NbdOptions { io_timeout, ..options() });
        let first = read(&client, 0..1 << 20);
        thread::sleep(io_timeout / 2);
        // It waits on the same connection, and its time is not over when that ends.
        let second = read(&client, 4096..8192);
        assert_eq!(first.errno(), libc::ETIMEDOUT, "{at}");
        assert_eq!(second.wait().unwrap(), [0; 4096], "{at}");
        assert_eq!(read(&client, 0..1 << 20).wait().unwrap(), vec![0; 1 << 20], "{at}");
    }
}

#[test]
fn a_flood_of_errors_in_one_reply_ends_the_connection() {
    let image = Image::with_len(4096);
    let _server = zeros_but(&image, |stream, cookie| {
        let error = first_chunk(0x8002, cookie, 14, &ERROR);
        while stream.write_all(&error).is_ok() {}
    });
    // Long before its time is over it is asked again.
    let client = open(&image.socket(), "", options());
    let begun = Instant::now();
    assert_eq!(read(&client, 0..4096).wait().unwrap(), [0; 4096]);
    assert!(begun.elapsed() < LONG / 4);
}

#[test]
fn a_read_that_is_never_answered_leaves_a_connection_that_answers_others() {
    let image = Image::with_len(4096);
    let connections = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&connections);
    let _server = FakeServer::new(&image.socket(), move |mut stream, _| {
        counted.fetch_add(1, Ordering::SeqCst);
        if handshake(&mut stream, SIZE, 3).is_none() {
            return;
        }
        while let Some((0, cookie, offset, len)) = read_request(&mut stream) {
            if offset > 0 {
                // Slowly, in pieces: the connection receives nearly all the time.
                for byte in hole(cookie, offset, len) {
                    thread::sleep(Duration::from_millis(5));
                    let _ = stream.write_all(&[byte]);
                }
            }
        }
    });
    let io_timeout = Duration::from_secs(1);
    let client = open(&image.socket(), "", NbdOptions { io_timeout, ..options() });
    let never = read(&client, 0..4096);
    let begun = Instant::now();
    while begun.elapsed() < io_timeout * 2 {
        assert_eq!(read(&client, 4096..8192).wait().unwrap(), [0; 4096]);
    }
    assert_eq!(never.errno(), libc::ETIMEDOUT);
    assert_eq!(connections.load(Ordering::SeqCst), 1);
}

#[test]
fn a_caller_never_waits_for_a_server_that_does_not_read() {
    let image = Image::with_len(4096);
    let _server = FakeServer::new(&image.socket(), |mut stream, _| {
        let _ = handshake(&mut stream, SIZE, 0x0d);
        thread::sleep(Duration::from_secs(3));
    });
    let io_timeout = Duration::from_secs(1);
    let options = NbdOptions { io_timeout, access: Access::ReadWrite, ..options() };
    let client = open(&image.socket(), "", options);
    let begun = Instant::now();
    let writes: Vec<_> = (0..60).map(|at| write(&client, at << 20, &vec![1; 1 << 20])).collect();
    assert!(begun.elapsed() < io_timeout, "a write waited");
    for write in writes {
        assert_eq!(write.errno(), libc::ETIMEDOUT);
    }
}

#[test]
fn the_end_of_a_client_is_told_to_the_server_and_to_those_who_wait() {
    let image = Image::with_len(4096);
    let (sender, receiver) = std::sync::mpsc::channel();
    let sender = Mutex::new(sender);
    let _server = FakeServer::new(&image.socket(), move |mut stream, _| {
        if handshake(&mut stream, SIZE, 3).is_none() {
            return;
        }
        let mut seen = Vec::new();
        while let Some((kind, ..)) = read_request(&mut stream) {
            seen.push(kind);
            if kind == 2 {
                break;
            }
        }
        let rest = stream.read(&mut [0; 8]).unwrap_or(0);
        sender.lock().send((seen, rest)).unwrap();
    });
    let client = open(&image.socket(), "", options());
    let reads: Vec<_> = (0..3).map(|at| read(&client, at * 4096..at * 4096 + 4096)).collect();
    drop(client);
    for read in reads {
        assert_eq!(read.errno(), libc::ECANCELED);
    }
    assert_eq!(receiver.recv_timeout(LONG).unwrap(), (vec![0, 0, 0, 2], 0));
}

#[test]
fn the_receiver_of_a_read_may_hold_the_last_client() {
    let image = Image::new();
    let _server = image.nbdkit(&["-r"], &[]);
    let client = Arc::new(open(&image.socket(), "", options()));
    let (sender, receiver) = std::sync::mpsc::channel();
    let last = Arc::clone(&client);
    client.read(
        0..4096,
        Box::new(move |result| {
            // Until the other owner is gone.
            while Arc::strong_count(&last) > 1 {
                thread::sleep(Duration::from_millis(1));
            }
            drop(last);
            sender.send(result.is_ok()).unwrap();
        }),
    );
    drop(client);
    assert!(receiver.recv_timeout(LONG).unwrap());
}

#[test]
fn bytes_on_their_way_are_bounded() {
    let image = Image::with_len(4096);
    let (sender, receiver) = std::sync::mpsc::channel();
    let sender = Mutex::new(sender);
    let _server = FakeServer::new(&image.socket(), move |mut stream, _| {
        if handshake(&mut stream, SIZE, 3).is_none() {
            return;
        }
        let mut bytes = 0;
        stream.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
        while let Some((0, _, _, len)) = read_request(&mut stream) {
            bytes += u64::from(len);
        }
        let _ = sender.lock().send(bytes);
    });
    let client = open(&image.socket(), "", options());
    let reads: Vec<_> = (0..40).map(|at| read(&client, at << 22..(at + 1) << 22)).collect();
    assert_eq!(receiver.recv_timeout(LONG).unwrap(), 64 << 20);
    drop(client);
    assert_eq!(reads.into_iter().map(Waiting::errno).collect::<Vec<_>>(), [libc::ECANCELED; 40]);
}
