//! Servers that lie, and the end of a client.

use std::io::{Read, Write};
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
                _ => {
                    let hole = [&offset.to_be_bytes()[..], &len.to_be_bytes()].concat();
                    chunk(2, cookie, 12, &hole)
                }
            };
            let _ = stream.write_all(&answer);
        }
    });
    let client = open(&image.socket(), "", options());
    assert_eq!(read(&client, 4096..8192).wait().unwrap(), [0; 4096]);
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
