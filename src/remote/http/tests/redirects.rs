//! Redirects: where they may lead, what goes with them, and how long they are believed.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use super::origin::Origin;
use super::*;

const TAG: &str = "ETag: \"v1\"\r\n";

fn redirect(to: &str, lines: &str) -> Vec<u8> {
    format!("HTTP/1.1 302 Found\r\nLocation: {to}\r\n{lines}Content-Length: 4\r\n\r\ngone")
        .into_bytes()
}

/// A store whose signatures hold until its `epoch` changes, and a gate that leads to it.
fn signed(bytes: &[u8], lines: &'static str) -> (Origin, Arc<Origin>, Arc<AtomicUsize>) {
    let epoch = Arc::new(AtomicUsize::new(0));
    let (now, served) = (Arc::clone(&epoch), bytes.to_vec());
    let store = Arc::new(Origin::writing(move |request| {
        match request.target == format!("/x?sig={}", now.load(Ordering::SeqCst)) {
            true => request.part(&served, TAG),
            false => b"HTTP/1.1 403 Forbidden\r\nContent-Length: 3\r\n\r\nold".to_vec(),
        }
    }));
    let (now, url) = (Arc::clone(&epoch), store.url("/x"));
    let gate = Origin::writing(move |_| {
        redirect(&format!("{url}?sig={}", now.load(Ordering::SeqCst)), lines)
    });
    (gate, store, epoch)
}

#[test]
fn the_target_is_reused_until_it_refuses_and_then_asked_for_once() {
    let bytes = image(MIB);
    let (gate, store, epoch) = signed(&bytes, "");
    let client = open(&gate);
    for at in 0..5 {
        assert_eq!(read(&client, at..at + 9).unwrap(), bytes[span(&(at..at + 9))]);
    }
    assert_eq!((gate.count(), store.count()), (1, 6));
    epoch.store(1, Ordering::SeqCst);
    let asked: Vec<_> =
        (0..20_u64).map(|at| answer_of(|done| client.read(at..at + 9, done))).collect();
    for (at, answer) in asked.into_iter().enumerate() {
        assert_eq!(answer.wait().unwrap(), bytes[at..at + 9]);
    }
    assert_eq!(gate.count(), 2);
    assert!(client.outage().is_none());
}

#[test]
fn a_target_is_not_reused_after_its_time() {
    let bytes = image(MIB);
    let (gate, store, _) = signed(&bytes, "Cache-Control: max-age=1\r\n");
    let client = open(&gate);
    read(&client, 0..9).unwrap();
    assert_eq!(gate.count(), 1);
    std::thread::sleep(Duration::from_millis(1100));
    read(&client, 0..9).unwrap();
    assert_eq!((gate.count(), store.count()), (2, 3));
}

#[test]
fn credentials_stay_with_the_host_that_they_are_for() {
    let room = tempfile::tempdir().unwrap();
    let file = super::auth::secret(room.path(), "Authorization: Bearer s3cret\nX-Token: s3cret\n");
    let options = HttpOptions { auth: Some(AuthSource::File(file)), ..options() };
    let bytes = image(MIB);
    let (gate, store, _) = signed(&bytes, "");
    let client = open_with(&gate, &options);
    read(&client, 0..9).unwrap();
    assert_eq!(gate.requests()[0].header("authorization"), Some("Bearer s3cret"));
    for request in store.requests() {
        assert_eq!((request.header("authorization"), request.header("x-token")), (None, None));
    }
    // On the same host they go along.
    let bytes = image(MIB);
    let origin = Origin::writing(move |request| match request.target.as_str() {
        "/b.img" => request.part(&bytes, TAG),
        _ => redirect("b.img", ""),
    });
    open_with(&origin, &options);
    let requests = origin.requests();
    assert_eq!((requests.len(), requests[1].target.as_str()), (2, "/b.img"));
    assert_eq!(requests[1].header("authorization"), Some("Bearer s3cret"));
    assert!(origin.connections() <= 2, "{}", origin.connections());
}

#[test]
fn ten_redirects_are_followed_and_no_more() {
    let bytes = image(MIB);
    let origin = Origin::writing(move |request| {
        let left: usize = request.target[1..].parse().unwrap_or(11);
        match left {
            0 => request.part(&bytes, TAG),
            left => redirect(&format!("/{}", left - 1), ""),
        }
    });
    let opened = HttpClient::open(&address(&origin.url("/10")), &options());
    assert_eq!((opened.unwrap().0.size(), origin.count()), (MIB, 11));
    let line = why(&origin, &options());
    assert_eq!(line, "more than 10 redirects");
    let around = Origin::writing(|_| redirect("/a.img?sig=s3cret", ""));
    assert_eq!(why(&around, &options()), "more than 10 redirects");
    assert_eq!(around.count(), 11);
}

#[test]
fn errors_of_another_host_name_it() {
    let nobody = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let gate = Origin::writing(move |_| redirect(&format!("http://{nobody}/?sig=s3cret"), ""));
    let line = why(&gate, &options());
    assert_eq!(line, format!("redirected to {nobody}: cannot connect: Connection refused"));
    let store = Origin::writing(|_| b"HTTP/1.1 404 x\r\nContent-Length: 0\r\n\r\n".to_vec());
    let (to, host) = (store.url("/?sig=s3cret"), store.address());
    let gate = Origin::writing(move |_| redirect(&to, ""));
    let line = why(&gate, &options());
    assert!(
        line.starts_with(&format!("redirected to {host}: the server answered '404 ")),
        "{line}"
    );
}
