//! The client against an origin that does what no server should.

mod auth;
mod open;
mod origin;
mod reads;
mod redirects;

use std::io;
use std::ops::Range;
use std::time::Duration;

use self::origin::Origin;
use super::{HttpClient, HttpOptions};
use crate::config::{AuthSource, RemoteAddress};
use crate::remote::answer::answer_of;
use crate::remote::tls::TlsFiles;
use crate::remote::transport::Transport;

const MIB: u64 = 1 << 20;

/// Options with which a test is over soon.
fn options() -> HttpOptions {
    HttpOptions {
        io_timeout: Duration::from_secs(4),
        open_timeout: Duration::ZERO,
        connections: 4,
        tls: TlsFiles::default(),
        auth: None,
        dir: "/".into(),
    }
}

fn address(text: &str) -> RemoteAddress {
    RemoteAddress::parse(text).unwrap()
}

fn open(origin: &Origin) -> HttpClient {
    open_with(origin, &options())
}

fn open_with(origin: &Origin, options: &HttpOptions) -> HttpClient {
    HttpClient::open(&address(&origin.url("/a.img?sig=s3cret")), options).unwrap().0
}

/// Why an image cannot be opened: one line without secrets.
fn why(origin: &Origin, options: &HttpOptions) -> String {
    let opened = HttpClient::open(&address(&origin.url("/a.img?sig=s3cret")), options);
    let line = opened.err().expect("it was opened").to_string();
    assert!(!line.contains('\n') && !line.contains("s3cret"), "{line}");
    line
}

fn read(client: &HttpClient, range: Range<u64>) -> io::Result<Vec<u8>> {
    answer_of(|done| client.read(range, done)).wait()
}

fn errno(result: io::Result<Vec<u8>>) -> i32 {
    result.expect_err("it was read").raw_os_error().unwrap()
}

/// Bytes of an image, all different enough that a shifted block shows.
fn image(len: u64) -> Vec<u8> {
    crate::remote::testing::pattern(usize::try_from(len).unwrap())
}

fn span(range: &Range<u64>) -> Range<usize> {
    usize::try_from(range.start).unwrap()..usize::try_from(range.end).unwrap()
}
