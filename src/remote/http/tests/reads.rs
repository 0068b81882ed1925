//! Reads: what goes wrong is asked for again, and nothing but the bytes of the image comes of it.

use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use super::origin::{Origin, Then};
use super::*;

const TAG: &str = "ETag: \"v1\"\r\n";

#[test]
fn a_kept_connection_that_is_closed_as_we_send_is_no_failure() {
    let bytes = image(MIB);
    let served = bytes.clone();
    let answered = parking_lot::Mutex::new(std::collections::HashSet::new());
    let origin = Origin::start(move |request, stream| {
        // Each connection answers once, and does not say that it will not again.
        if !answered.lock().insert(request.connection) {
            return Then::Close;
        }
        stream.write_all(&request.part(&served, TAG)).unwrap();
        Then::Keep
    });
    let client = open(&origin);
    for at in 0..30 {
        assert_eq!(read(&client, at..at + 4096).unwrap(), bytes[span(&(at..at + 4096))]);
    }
    // Those that were closed were sent again.
    assert!(origin.count() > 31, "{}", origin.count());
    assert!(client.outage().is_none());
}

#[test]
fn a_short_body_is_continued_where_it_ended() {
    let bytes = image(MIB);
    let served = bytes.clone();
    let origin = Origin::start(move |request, stream| {
        let answer = request.part(&served, TAG);
        // All but the first answer bring a head and some 100 kB.
        let len = if request.number == 0 { answer.len() } else { answer.len().min(100_000) };
        let _ = stream.write_all(&answer[..len]);
        if len < answer.len() { Then::Close } else { Then::Keep }
    });
    let client = open(&origin);
    assert_eq!(read(&client, 5..900_000).unwrap(), bytes[5..900_000]);
    let requests = origin.requests();
    let starts: Vec<_> = requests.iter().skip(1).map(|request| request.range(MIB).start).collect();
    assert!(starts.len() >= 9 && starts.is_sorted(), "{starts:?}");
    assert!(starts[1] > 90_000);
    assert!(requests.iter().skip(1).all(|request| request.header("if-range") == Some("\"v1\"")));
}

#[test]
fn a_busy_server_is_left_alone_for_as_long_as_it_asks() {
    let bytes = image(MIB);
    let served = bytes.clone();
    let origin = Origin::writing(move |request| match request.number {
        1 => b"HTTP/1.1 503 x\r\nRetry-After: 1\r\nContent-Length: 2\r\n\r\nno".to_vec(),
        2 => b"HTTP/1.1 429 x\r\nContent-Length: 0\r\n\r\n".to_vec(),
        3 => b"HTTP/1.1 500 x\r\nContent-Length: 0\r\n\r\n".to_vec(),
        _ => request.part(&served, TAG),
    });
    let client = open(&origin);
    let begun = Instant::now();
    assert_eq!(read(&client, 0..4096).unwrap(), bytes[..4096]);
    assert!(begun.elapsed() >= Duration::from_secs(1), "{:?}", begun.elapsed());
    // Its connection was kept; one more may have been begun while that was put back.
    assert_eq!(origin.count(), 5);
    assert!(origin.connections() <= 2, "{}", origin.connections());
}

#[test]
fn at_most_conns_requests_are_in_flight() {
    let (now, most) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let (counted, reached) = (Arc::clone(&now), Arc::clone(&most));
    let bytes = image(MIB);
    let served = bytes.clone();
    let origin = Origin::writing(move |request| {
        reached.fetch_max(counted.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
        thread::sleep(Duration::from_millis(20));
        counted.fetch_sub(1, Ordering::SeqCst);
        request.part(&served, TAG)
    });
    let client = open(&origin);
    let asked: Vec<_> = (0..40_u64)
        .map(|at| answer_of(|done| client.read(at * 4096..at * 4096 + 4096, done)))
        .collect();
    for (at, answer) in asked.into_iter().enumerate() {
        assert_eq!(answer.wait().unwrap(), bytes[at * 4096..][..4096]);
    }
    assert_eq!(most.load(Ordering::SeqCst), 4);
    assert!(origin.connections() <= 5, "{}", origin.connections());
}

#[test]
fn another_version_ends_all_reads_for_good() {
    type Change = fn(&super::origin::Request, &[u8]) -> Vec<u8>;
    let changes: [(&str, Change); 4] = [
        ("another ETag", |request, bytes| request.part(bytes, "ETag: \"v2\"\r\n")),
        ("another size", |request, bytes| request.part(&bytes[..800_000], TAG)),
        ("the whole of it", |_, bytes| {
            let head = format!(
                "HTTP/1.1 200 OK\r\nETag: \"v2\"\r\nContent-Length: {}\r\n\r\n",
                bytes.len()
            );
            [head.as_bytes(), bytes].concat()
        }),
        ("too short", |_, _| {
            b"HTTP/1.1 416 x\r\nContent-Range: bytes */9\r\nContent-Length: 0\r\n\r\n".to_vec()
        }),
    ];
    for (what, change) in changes {
        let is_changed = Arc::new(AtomicBool::new(false));
        let changed = Arc::clone(&is_changed);
        let bytes = image(MIB);
        let served = bytes.clone();
        let origin = Origin::writing(move |request| match changed.load(Ordering::SeqCst) {
            false => request.part(&served, TAG),
            true => change(request, &served),
        });
        let client = open(&origin);
        assert_eq!(read(&client, 0..10).unwrap(), bytes[..10]);
        is_changed.store(true, Ordering::SeqCst);
        assert_eq!(errno(read(&client, 10..20)), libc::ESTALE, "{what}");
        // It stays that way, without asking again.
        is_changed.store(false, Ordering::SeqCst);
        let count = origin.count();
        assert_eq!(errno(read(&client, 0..10)), libc::ESTALE, "{what}");
        assert_eq!(origin.count(), count);
    }
}

#[test]
fn without_a_strong_etag_time_and_weak_etag_tell() {
    for (was, now) in [
        ("ETag: W/\"1\"\r\n", "ETag: W/\"2\"\r\n"),
        (
            "Last-Modified: Sun, 06 Nov 1994 08:49:37 GMT\r\n",
            "Last-Modified: Sun, 06 Nov 1994 08:49:39 GMT\r\n",
        ),
    ] {
        let bytes = image(MIB);
        let origin =
            Origin::writing(move |it| it.part(&bytes, if it.number < 2 { was } else { now }));
        let client = open(&origin);
        assert_eq!(client.version(), None);
        read(&client, 0..10).unwrap();
        assert_eq!(origin.requests()[1].header("if-range"), None);
        assert_eq!(errno(read(&client, 0..10)), libc::ESTALE);
    }
}

#[test]
fn wrong_answers_are_no_bytes_and_pass() {
    let bytes = image(MIB);
    let served = bytes.clone();
    let origin = Origin::writing(move |request| {
        let part = |lines: &str| request.part(&served, lines);
        let whole = |lines: &str| {
            let head =
                format!("HTTP/1.1 200 OK\r\n{lines}Content-Length: {}\r\n\r\n", served.len());
            [head.as_bytes(), &served].concat()
        };
        match request.number {
            1 => whole(TAG),
            2 => whole("Content-Type: text/html\r\nETag: \"portal\"\r\n"),
            3 => part(&format!("{TAG}Content-Encoding: gzip\r\n")),
            4 => part(""),
            5 => b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n".to_vec(),
            6 => b"HTTP/1.1 206 x\r\nETag: \"v1\"\r\nContent-Range: bytes 0-9/1048576\r\nContent-Length: 10\r\n\r\n0123456789".to_vec(),
            _ => part(TAG),
        }
    });
    let client =
        open_with(&origin, &HttpOptions { io_timeout: Duration::from_secs(20), ..options() });
    assert_eq!(read(&client, 4096..8192).unwrap(), bytes[4096..8192]);
    assert_eq!(origin.count(), 8);
}

#[test]
fn an_outage_is_waited_for_fails_in_time_and_heals() {
    let bytes = image(MIB);
    let served = bytes.clone();
    let is_down = Arc::new(AtomicBool::new(false));
    let down = Arc::clone(&is_down);
    let origin = Origin::start(move |request, stream| {
        if down.load(Ordering::SeqCst) {
            return Then::Close;
        }
        stream.write_all(&request.part(&served, TAG)).unwrap();
        Then::Keep
    });
    let options = HttpOptions { io_timeout: Duration::from_secs(2), ..options() };
    let client = open_with(&origin, &options);
    is_down.store(true, Ordering::SeqCst);
    let asked = answer_of(|done| client.read(0..10, done));
    thread::sleep(Duration::from_millis(500));
    let (lasted, reason) = client.outage().unwrap();
    assert!(lasted < Duration::from_secs(1) && reason.contains("broke"), "{lasted:?} {reason}");
    is_down.store(false, Ordering::SeqCst);
    assert_eq!(asked.wait().unwrap(), bytes[..10]);
    assert!(client.outage().is_none());

    is_down.store(true, Ordering::SeqCst);
    let begun = Instant::now();
    assert_eq!(errno(read(&client, 0..10)), libc::ETIMEDOUT);
    let took = begun.elapsed();
    assert!((1900..3500).contains(&took.as_millis()), "{took:?}");
    is_down.store(false, Ordering::SeqCst);
    assert_eq!(read(&client, 0..10).unwrap(), bytes[..10]);
}

#[test]
fn a_connection_that_hangs_is_left_for_another() {
    let bytes = image(MIB);
    let served = bytes.clone();
    let origin = Origin::start(move |request, stream| {
        let answer = request.part(&served, TAG);
        if request.number == 1 {
            let _ = stream.write_all(&answer[..answer.len() - 5]);
            thread::sleep(Duration::from_secs(8));
            return Then::Close;
        }
        stream.write_all(&answer).unwrap();
        Then::Keep
    });
    let client = open(&origin);
    let begun = Instant::now();
    assert_eq!(read(&client, 0..100_000).unwrap(), bytes[..100_000]);
    assert!(begun.elapsed() < Duration::from_millis(3500), "{:?}", begun.elapsed());
    assert_eq!(origin.requests()[2].range(MIB), 99_995..100_000);
}

#[test]
fn dropping_the_client_ends_its_reads() {
    let bytes = image(MIB);
    let origin = Origin::start(move |request, stream| {
        if request.number > 0 {
            thread::sleep(Duration::from_secs(3));
        }
        let _ = stream.write_all(&request.part(&bytes, TAG));
        Then::Keep
    });
    let client = open(&origin);
    let asked: Vec<_> = (0..9).map(|_| answer_of(|done| client.read(0..10, done))).collect();
    let begun = Instant::now();
    drop(client);
    for answer in asked {
        assert_eq!(answer.wait().unwrap_err().raw_os_error(), Some(libc::ECANCELED));
    }
    assert!(begun.elapsed() < Duration::from_secs(1), "{:?}", begun.elapsed());
}

#[test]
fn ranges_outside_the_image_are_not_asked_for() {
    let origin = Origin::writing(|request| request.part(&image(10), TAG));
    let client = open(&origin);
    for range in [5..5, 5..11, 0..5 * MIB] {
        assert_eq!(errno(read(&client, range)), libc::EINVAL);
    }
    assert_eq!(origin.count(), 1);
}

#[test]
fn what_is_late_is_asked_for_twice_if_somebody_waits_for_it() {
    let bytes = image(MIB);
    let served = bytes.clone();
    let origin = Origin::start(move |request, stream| {
        // The tail of a distribution: two answers that take their time.
        if matches!(request.number, 20 | 30) {
            thread::sleep(Duration::from_secs(2));
        }
        let _ = stream.write_all(&request.part(&served, TAG));
        Then::Keep
    });
    let options = HttpOptions { io_timeout: Duration::from_secs(20), ..options() };
    let client = open_with(&origin, &options);
    let quick = |count: usize| (0..count).for_each(|_| drop(read(&client, 0..4096).unwrap()));
    quick(19);
    let begun = Instant::now();
    let waited_for = answer_of(|done| client.read(8192..12_288, done));
    client.hurry(8192);
    assert_eq!(waited_for.wait().unwrap(), bytes[8192..12_288]);
    assert!(begun.elapsed() < Duration::from_millis(1900), "{:?}", begun.elapsed());
    assert_eq!((origin.requests()[20].range(MIB), origin.count()), (8192..12_288, 22));
    assert_eq!(origin.requests()[21].range(MIB), 8192..12_288);
    quick(8);
    // Nobody waits for this one.
    let begun = Instant::now();
    assert_eq!(read(&client, 8192..12_288).unwrap(), bytes[8192..12_288]);
    assert!(begun.elapsed() > Duration::from_millis(1900), "{:?}", begun.elapsed());
    let requests = origin.requests();
    assert_eq!(requests.len(), 31, "{requests:?}");
    assert!(client.outage().is_none());
}

/// A random number generator with the same numbers each time.
struct Dice(u64);

impl Dice {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit
    }
}

#[test]
fn reads_are_right_whatever_goes_wrong() {
    let bytes = image(2 * MIB);
    let served = bytes.clone();
    let origin = Origin::start(move |request, stream| {
        let answer = request.part(&served, TAG);
        let mut dice = Dice(request.number as u64 * 7919 + 1);
        let cut = usize::try_from(dice.below(answer.len() as u64)).unwrap();
        let cut = |stream: &mut std::net::TcpStream| {
            let _ = stream.write_all(&answer[..cut]);
            Then::Close
        };
        let busy = b"HTTP/1.1 503 x\r\nContent-Length: 0\r\n\r\n";
        match if request.number == 0 { 99 } else { dice.below(12) } {
            0 => return Then::Close,
            1 | 2 => return cut(stream),
            3 => drop(stream.write_all(busy)),
            4 => {
                let _ = stream.write_all(&served[..5000]);
                return Then::Close;
            }
            5 => {
                thread::sleep(Duration::from_millis(30));
                let _ = stream.write_all(&answer);
            }
            6 => {
                for piece in answer.chunks(10_000) {
                    let _ = stream.write_all(piece);
                }
            }
            _ => drop(stream.write_all(&answer)),
        }
        Then::Keep
    });
    let options = HttpOptions { io_timeout: Duration::from_secs(60), connections: 8, ..options() };
    let client = open_with(&origin, &options);
    thread::scope(|scope| {
        for reader in 1..9 {
            let (client, bytes) = (&client, &bytes);
            scope.spawn(move || {
                let mut dice = Dice(reader);
                for _ in 0..150 {
                    let start = dice.below(2 * MIB);
                    let range = start..(start + 1 + dice.below(200_000)).min(2 * MIB);
                    let answer = answer_of(|done| client.read(range.clone(), done));
                    client.hurry(range.start);
                    assert!(answer.wait().unwrap() == bytes[span(&range)], "{range:?}");
                }
            });
        }
    });
    assert!(origin.count() > 1400, "{}", origin.count());
}
