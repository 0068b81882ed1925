//! The wire that tests and benchmarks put between a client and a server does what it says.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use crate::common::support::{Endpoint, Protocol, Proxy};

/// A proxy before a server that sends back what it gets, until dropped with it.
fn echo(protocol: Protocol) -> Proxy {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let server = Endpoint::Tcp(listener.local_addr().unwrap());
    // It ends with the test's process.
    thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            thread::spawn(move || {
                let mut reader = stream.try_clone().unwrap();
                std::io::copy(&mut reader, &mut stream).ok();
            });
        }
    });
    Proxy::tcp(server, protocol).unwrap()
}

fn connect(proxy: &Proxy) -> TcpStream {
    let Endpoint::Tcp(address) = &proxy.endpoint else { panic!("{:?}", proxy.endpoint) };
    let stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    stream
}

/// Sends `bytes`, and returns what comes back.
fn exchange(stream: &mut TcpStream, bytes: &[u8]) -> std::io::Result<Vec<u8>> {
    let mut back = vec![0; bytes.len()];
    stream.write_all(bytes)?;
    stream.read_exact(&mut back)?;
    Ok(back)
}

#[test]
fn an_exchange_takes_a_round_trip_and_opening_a_connection_another() {
    let proxy = echo(Protocol::Opaque);
    let rtt = Duration::from_millis(60);
    // A rate that takes no time for a few bytes.
    proxy.control.set_link(rtt, 1 << 30);
    let begun = Instant::now();
    let mut stream = connect(&proxy);
    for trips in 2..5 {
        assert_eq!(exchange(&mut stream, b"hello").unwrap(), b"hello");
        assert!(begun.elapsed() >= rtt * trips, "{trips}: {:?}", begun.elapsed());
    }
    assert_eq!(proxy.control.turns.load(Ordering::SeqCst), 3);
    assert_eq!(proxy.control.connections.load(Ordering::SeqCst), 1);
}

#[test]
fn the_rate_is_that_of_all_connections() {
    let proxy = echo(Protocol::Opaque);
    proxy.control.set_link(Duration::from_millis(1), 20_000_000);
    let begun = Instant::now();
    let threads = [1_u8, 2].map(|fill| {
        let mut stream = connect(&proxy);
        thread::spawn(move || {
            // Smaller than what sockets hold, as nobody reads meanwhile.
            for _ in 0..10 {
                let sent = vec![fill; 100_000];
                assert!(exchange(&mut stream, &sent).unwrap() == sent);
            }
        })
    });
    threads.into_iter().for_each(|thread| thread.join().unwrap());
    // 2 MB, but for what may catch up after an idle moment.
    assert!(begun.elapsed() >= Duration::from_millis(90), "{:?}", begun.elapsed());
    assert_eq!(proxy.control.down.load(Ordering::SeqCst), 2_000_000);
    assert_eq!(proxy.control.up.load(Ordering::SeqCst), 2_000_000);
}

#[test]
fn a_connection_is_cut_after_so_many_bytes_and_a_bit_is_flipped_where_it_is_asked() {
    for rtt in [0, 5] {
        let proxy = echo(Protocol::Opaque);
        proxy.control.set_link(Duration::from_millis(rtt), 0);
        proxy.control.flip_at.store(7, Ordering::SeqCst);
        assert_eq!(exchange(&mut connect(&proxy), &[4; 9]).unwrap(), [4, 4, 4, 4, 4, 4, 5, 4, 4]);
        proxy.control.flip_at.store(0, Ordering::SeqCst);
        proxy.control.cut_after.store(70_001, Ordering::SeqCst);
        let (mut stream, mut found) = (connect(&proxy), Vec::new());
        stream.write_all(&[8; 100_000]).unwrap();
        // The end may be told as a reset; what came before counts.
        let _ = stream.read_to_end(&mut found);
        assert!(found == vec![8; 70_001], "{} bytes", found.len());
    }
}

#[test]
fn what_is_stalled_or_refused_goes_on_later() {
    let proxy = echo(Protocol::Opaque);
    let mut stream = connect(&proxy);
    assert_eq!(exchange(&mut stream, b"a").unwrap(), b"a");
    proxy.control.stalled_below.store(usize::MAX, Ordering::SeqCst);
    stream.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
    assert!(exchange(&mut stream, b"b").is_err());
    stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    proxy.control.stalled_below.store(0, Ordering::SeqCst);
    let mut late = [0; 1];
    stream.read_exact(&mut late).unwrap();
    assert_eq!(&late, b"b");
    proxy.control.refuses.store(true, Ordering::SeqCst);
    assert!(exchange(&mut connect(&proxy), b"c").is_err());
    assert_eq!(exchange(&mut stream, b"d").unwrap(), b"d", "the others go on");
    proxy.control.refuses.store(false, Ordering::SeqCst);
    proxy.control.cut_all();
    assert!(exchange(&mut stream, b"e").is_err());
    assert_eq!(exchange(&mut connect(&proxy), b"f").unwrap(), b"f");
}

#[test]
fn what_one_side_says_before_its_end_arrives() {
    for rtt in [0, 20] {
        let proxy = echo(Protocol::Http);
        proxy.control.set_link(Duration::from_millis(rtt), 0);
        let (mut stream, mut found) = (connect(&proxy), Vec::new());
        stream.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        stream.read_to_end(&mut found).unwrap();
        assert_eq!(found, b"GET / HTTP/1.1\r\n\r\n");
        assert_eq!(proxy.control.requests.load(Ordering::SeqCst), 1);
    }
}
