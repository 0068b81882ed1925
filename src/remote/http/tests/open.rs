//! Opening: what is no image is refused with one line, in time.

use std::io::Write;
use std::net::{TcpListener, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use super::origin::{Origin, Then};
use super::*;

#[test]
fn one_request_tells_all_that_is_to_be_known() {
    let bytes = image(3 * MIB + 5);
    let served = bytes.clone();
    let origin = Origin::writing(move |request| request.part(&served, "ETag: \"v1\"\r\n"));
    let opened = HttpClient::open(&address(&origin.url("/a.img?sig=s3cret")), &options()).unwrap();
    let (client, head) = opened;
    assert_eq!((origin.count(), client.size()), (1, 3 * MIB + 5));
    assert_eq!(head, bytes[..65_536]);
    assert_eq!(client.version().as_deref(), Some("etag:\"v1\""));
    let request = &origin.requests()[0];
    assert_eq!(request.target, "/a.img?sig=s3cret");
    assert_eq!(request.header("range"), Some("bytes=0-65535"));
    assert_eq!(request.header("accept-encoding"), Some("identity"));
    assert_eq!(request.header("if-range"), None);
    assert!(request.header("user-agent").unwrap().starts_with("cowslip/"));
    assert_eq!(read(&client, MIB + 3..2 * MIB).unwrap(), bytes[span(&(MIB + 3..2 * MIB))]);
    assert_eq!(origin.requests()[1].header("if-range"), Some("\"v1\""));
    assert_eq!(origin.count(), 2);
}

#[test]
fn a_small_image_is_one_answer() {
    let origin = Origin::writing(|request| request.part(b"tiny", ""));
    let opened = HttpClient::open(&address(&origin.url("/")), &options()).unwrap();
    assert_eq!((opened.0.size(), &*opened.1), (4, &b"tiny"[..]));
    assert_eq!((opened.0.version(), opened.0.modified()), (None, None));
}

#[test]
fn what_is_no_part_of_an_image_is_refused_with_one_line() {
    let part = "HTTP/1.1 206 Partial Content\r\n";
    for (answer, hint) in [
        ("HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc".to_owned(), "serves no ranges"),
        (
            "HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: 3\r\n\r\n<p>".to_owned(),
            "web page (text/html)",
        ),
        (
            format!(
                "{part}Content-Type: text/html\r\nContent-Range: bytes 0-5/6\r\nContent-Length: 6\r\n\r\n <html"
            ),
            "web page (text/html)",
        ),
        (
            "HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 3\r\n\r\nabc".to_owned(),
            "encodes what it sends ('gzip')",
        ),
        (
            format!("{part}Content-Encoding: br\r\nContent-Range: bytes 0-2/3\r\n\r\nabc"),
            "encodes what it sends ('br')",
        ),
        (
            "HTTP/1.1 404 Not Found\r\nContent-Length: 2\r\n\r\nno".to_owned(),
            "'404 Not Found': there is no such image",
        ),
        ("HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n".to_owned(), "may have expired"),
        ("HTTP/1.1 418 x\r\nContent-Length: 0\r\n\r\n".to_owned(), "'418 I'm a teapot'"),
        ("HTTP/1.1 999 x\r\nContent-Length: 0\r\n\r\n".to_owned(), "'999'"),
        (
            "HTTP/1.1 416 x\r\nContent-Range: bytes */0\r\nContent-Length: 0\r\n\r\n".to_owned(),
            "the image is empty",
        ),
        (format!("{part}Content-Length: 3\r\n\r\nabc"), "it has no Content-Range"),
        (
            format!("{part}Content-Range: bytes 0-2/*\r\nContent-Length: 3\r\n\r\nabc"),
            "0-2 for 0-65535",
        ),
        (
            format!("{part}Content-Range: bytes 0-65535/*\r\nContent-Length: 65536\r\n\r\n"),
            "does not say how large",
        ),
        (
            format!("{part}Content-Range: bytes 0-65535/9223372036854775808\r\n\r\n"),
            "9223372036854775808 bytes, more than",
        ),
        (format!("{part}Content-Range: bytes 0-2/-3\r\n\r\nabc"), "is 'bytes 0-2/-3'"),
        (format!("{part}Content-Range: bytes 1-3/4\r\n\r\nabc"), "bytes 1-3 for 0-3"),
        (format!("{part}Content-Range: bytes 0-2/9\r\n\r\nabc"), "bytes 0-2 for 0-8"),
        (
            format!("{part}Content-Range: bytes 0-2/3\r\nContent-Length: 9\r\n\r\nabc"),
            "its Content-Length is 9, for 3 bytes",
        ),
        (
            format!(
                "{part}Content-Range: bytes 0-2/3\r\nContent-Length: 18446744073709551615\r\n\r\nabc"
            ),
            "the connection broke",
        ),
        (
            format!(
                "{part}Content-Range: bytes 0-2/3\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nabcd\r\n0\r\n\r\n"
            ),
            "longer than the range",
        ),
        (
            format!(
                "{part}Content-Range: bytes 0-2/3\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n0\r\n\r\n"
            ),
            "ended after 2 of 3 bytes",
        ),
        ("SSH-2.0-OpenSSH_9.2\r\n\r\n".to_owned(), "the connection broke"),
        ("HTTP/1.1 206 \u{1b}[2J\r\n\0: x\r\n\r\n".to_owned(), "the connection broke"),
        ("HTTP/1.1 302 x\r\nContent-Length: 0\r\n\r\n".to_owned(), "leads to no address"),
        (
            "HTTP/1.1 302 x\r\nLocation: ftp://h/?s3cret\r\nContent-Length: 0\r\n\r\n".to_owned(),
            "leads to no address: 'ftp://h/'",
        ),
    ] {
        let origin = Origin::start(move |_, stream| {
            let _ = stream.write_all(answer.as_bytes());
            Then::Close
        });
        let line = why(&origin, &options());
        assert!(line.contains(hint), "{hint}: {line}");
    }
}

#[test]
fn servers_that_never_end_are_given_up_in_time() {
    let options = HttpOptions { io_timeout: Duration::from_secs(1), ..options() };
    type Lie = fn(&mut std::net::TcpStream) -> std::io::Result<()>;
    let lies: [(Lie, &str); 6] = [
        // It says nothing.
        (
            |_| {
                thread::sleep(Duration::from_secs(5));
                Ok(())
            },
            "did not answer within",
        ),
        // Headers without an end, fast and slow.
        (
            |stream| {
                stream.write_all(b"HTTP/1.1 206 x\r\n")?;
                loop {
                    stream.write_all(format!("X: {}\r\n", "x".repeat(4000)).as_bytes())?;
                }
            },
            "connection broke",
        ),
        (
            |stream| {
                stream.write_all(b"HTTP/1.1 206 x\r\n")?;
                loop {
                    stream.write_all(b"X: y\r\n")?;
                    thread::sleep(Duration::from_millis(50));
                }
            },
            "did not answer within",
        ),
        // Interim answers without an end.
        (
            |stream| loop {
                stream.write_all(b"HTTP/1.1 103 Early Hints\r\n\r\n")?;
                thread::sleep(Duration::from_millis(5));
            },
            "did not answer within",
        ),
        // A body that drips.
        (
            |stream| {
                stream
                    .write_all(b"HTTP/1.1 206 x\r\nContent-Range: bytes 0-65535/1000000\r\n\r\n")?;
                loop {
                    stream.write_all(b"x")?;
                    thread::sleep(Duration::from_millis(20));
                }
            },
            "did not answer within",
        ),
        // A body without an end.
        (
            |stream| {
                stream
                    .write_all(b"HTTP/1.1 206 x\r\nContent-Range: bytes 0-65535/1000000\r\n\r\n")?;
                loop {
                    stream.write_all(&[7; 65_536])?;
                }
            },
            "longer than the range",
        ),
    ];
    thread::scope(|scope| {
        for (lie, hint) in lies {
            let options = &options;
            scope.spawn(move || {
                let origin = Origin::start(move |_, stream| {
                    let _ = lie(stream);
                    Then::Close
                });
                let begun = Instant::now();
                let line = why(&origin, options);
                assert!(line.contains(hint), "{hint}: {line}");
                assert!(begun.elapsed() < Duration::from_secs(4), "{hint}: {:?}", begun.elapsed());
            });
        }
    });
}

#[test]
fn nobody_who_answers_is_one_line() {
    let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let line = |text: &str| {
        let opened = HttpClient::open(&address(text), &options());
        opened.err().unwrap().to_string()
    };
    let refused = line(&format!("http://{free}/"));
    assert_eq!(refused, "cannot connect: Connection refused");
    let unknown = line("http://no-such-host.invalid/");
    assert!(unknown.contains("cannot find the host: "), "{unknown}");
    // A server that closes at once, and one that speaks plainly where TLS is expected.
    let origin = Origin::start(|_, _| Then::Close);
    let closed = line(&origin.url("/"));
    assert!(closed.contains("connection broke"), "{closed}");
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let plain = listener.local_addr().unwrap();
    let speaking = thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        stream.write_all(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n").unwrap();
        let _ = std::io::copy(&mut stream, &mut std::io::sink());
    });
    let told = line(&format!("https://{plain}/"));
    // A bare system has no list of authorities, and then nobody is asked.
    let is_bare = told.contains("no list of authorities");
    assert!(is_bare || told.contains("TLS failed"), "{told}");
    if is_bare {
        drop(TcpStream::connect(plain).unwrap());
    }
    speaking.join().unwrap();
}

#[test]
fn a_server_that_is_not_up_is_waited_for() {
    let place = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    let options = HttpOptions { open_timeout: Duration::from_secs(8), ..options() };
    let text = format!("http://{place}/");
    thread::scope(|scope| {
        let opening = scope.spawn(|| HttpClient::open(&address(&text), &options).unwrap().0.size());
        thread::sleep(Duration::from_millis(300));
        let origin = Origin::on(&place, |request, stream| {
            let busy = b"HTTP/1.1 503 x\r\nRetry-After: 1\r\nContent-Length: 0\r\n\r\n".to_vec();
            let answer = if request.number == 0 { busy } else { request.part(b"here", "") };
            stream.write_all(&answer).unwrap();
            Then::Keep
        });
        assert_eq!(opening.join().unwrap(), 4);
        assert_eq!(origin.count(), 2);
    });
}
