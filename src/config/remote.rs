//! Images on servers: the address, and the keys that say how much is fetched and kept.

use std::borrow::Cow;
use std::ffi::{OsStr, OsString};
use std::fmt;
use std::path::{Path, PathBuf};

use super::SpecError;
use super::error::escaped;
use super::raw_value::absolute;

/// The smallest amount that a read of another place fetches, by default: 256 KiB. At 20 ms a request
/// it costs a tenth of a second for 10 MB, and nothing that a server would notice.
const DEFAULT_FETCH: u64 = 256 << 10;
/// The largest read-ahead by default: 16 MiB, the bytes on their way at 800 MB/s and 20 ms.
const DEFAULT_AHEAD: u64 = 16 << 20;
/// The number of connections by default. NBD has many requests on each.
const DEFAULT_CONNS: u32 = 8;
/// That of HTTP, which has one request on each: as many as a reader with a queue of 16 needs to wait for one
/// round trip a read.
const DEFAULT_HTTP_CONNS: u32 = 16;
/// The most bytes that are kept by default: 4 GiB.
const DEFAULT_CACHE_SIZE: u64 = 4 << 30;

/// An image on a server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RemoteSpec {
    /// The address.
    pub address: RemoteAddress,
    /// The least that a read of another place fetches, in bytes: a power of two from 4 KiB to 4 MiB.
    pub fetch: u64,
    /// The most that is read ahead of a sequential reader, in bytes.
    pub ahead: u64,
    /// The most connections; over HTTP each has one request at a time.
    pub conns: u32,
    /// The directory in which what was fetched stays beyond the mount.
    pub read_cache: Option<PathBuf>,
    /// The most bytes that are kept.
    pub read_cache_size: u64,
    /// The file in which the first reads are recorded, or from which they are fetched ahead.
    pub trace: Option<PathBuf>,
    /// The most bytes a second of a trace, a prefetch and a hydration; 0 for no limit.
    pub prefetch_rate: u64,
    /// The authorities that are believed, a file in PEM; `None` for those of the system.
    pub tls_ca: Option<PathBuf>,
    /// The certificate by which this side is known, a file in PEM.
    pub tls_cert: Option<PathBuf>,
    /// The key of that certificate, a file in PEM.
    pub tls_key: Option<PathBuf>,
    /// Where the header lines come from by which an HTTP server knows this side.
    pub auth: Option<AuthSource>,
    /// The map of a raw image behind HTTP: where it has data, and its checksums.
    pub bmap: Option<BmapSource>,
    /// The working directory of a command: that of the address, or that of `auth`.
    pub dir: PathBuf,
}

/// Where header lines such as `Authorization: Bearer ...` come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AuthSource {
    /// A file that nobody else can read.
    File(PathBuf),
    /// What a program prints: its name and its arguments.
    Command(Vec<OsString>),
}

/// Where the bmap of an image is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BmapSource {
    /// A file of this host.
    File(PathBuf),
    /// Behind HTTP or HTTPS.
    Url(RemoteAddress),
}

impl BmapSource {
    /// Parses the value of `bmap=`; relative paths are joined to `dir`.
    pub(super) fn parse(text: &OsStr, dir: &Path) -> Result<Self, SpecError> {
        let Some(text) = text.to_str().filter(|text| RemoteAddress::is_one(text)) else {
            return Ok(Self::File(absolute(text, dir)?));
        };
        let address = RemoteAddress::parse(text)?;
        match address.protocol() {
            Protocol::Http => Ok(Self::Url(address)),
            Protocol::Nbd => {
                Err(SpecError::Missing("it is a file, or at an address http:// or https://"))
            }
        }
    }
}

impl fmt::Display for BmapSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(file) => file.display().fmt(f),
            Self::Url(address) => address.fmt(f),
        }
    }
}

impl RemoteSpec {
    /// Creates the spec of the image at `address`, all keys at their defaults. A command runs in `/`.
    #[must_use]
    pub fn new(address: RemoteAddress) -> Self {
        let conns = match address.protocol() {
            Protocol::Nbd => DEFAULT_CONNS,
            Protocol::Http => DEFAULT_HTTP_CONNS,
        };
        Self {
            address,
            fetch: DEFAULT_FETCH,
            ahead: DEFAULT_AHEAD,
            conns,
            read_cache: None,
            trace: None,
            prefetch_rate: 0,
            read_cache_size: DEFAULT_CACHE_SIZE,
            tls_ca: None,
            tls_cert: None,
            tls_key: None,
            auth: None,
            bmap: None,
            dir: PathBuf::from("/"),
        }
    }
}

/// The address of an image on a server. It holds no password, but may hold a signature: the query of an
/// address behind HTTP is neither displayed nor recorded.
#[derive(Clone, PartialEq, Eq)]
pub struct RemoteAddress {
    /// What is shown: all but the query of an address behind HTTP.
    text: String,
    query: Option<String>,
}

/// A protocol by which an image is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// NBD in all its forms.
    Nbd,
    /// HTTP and HTTPS.
    Http,
}

/// The protocols that are spoken, by the beginning of an address.
const PREFIXES: &[(&str, Protocol)] = &[
    ("nbd://", Protocol::Nbd),
    ("nbds://", Protocol::Nbd),
    ("nbd+unix://", Protocol::Nbd),
    ("nbds+unix://", Protocol::Nbd),
    (COMMAND_PREFIX, Protocol::Nbd),
    ("http://", Protocol::Http),
    ("https://", Protocol::Http),
];
/// The beginning of an address that is a command line.
const COMMAND_PREFIX: &str = "nbd+exec:";

/// Returns the protocol of a text that begins as an address does.
fn protocol_of(text: &str) -> Option<Protocol> {
    let found = PREFIXES.iter().find(|(prefix, _)| text.starts_with(prefix));
    found.map(|(_, protocol)| *protocol)
}

impl RemoteAddress {
    /// Whether `text` begins as an address does.
    pub(super) fn is_one(text: &str) -> bool {
        protocol_of(text).is_some()
    }

    /// Parses the beginning of an address; the module that speaks the protocol reads the rest.
    ///
    /// # Errors
    /// [`SpecError`] for another protocol, and for a password: others could read it in the list of
    /// processes.
    pub fn parse(text: &str) -> Result<Self, SpecError> {
        let shown = without_query(text);
        let refused = |why| Err(SpecError::Source { given: escaped(shown), why });
        let Some(protocol) = protocol_of(text) else {
            return refused(
                "is not the address of an image: write nbd://HOST/EXPORT or https://HOST/PATH",
            );
        };
        let authority = text.split_once("://").map_or("", |(_, rest)| rest);
        let authority = authority.split(['/', '?', '#']).next().unwrap_or_default();
        if authority.contains('@') {
            return Err(SpecError::Missing(match protocol {
                Protocol::Nbd => {
                    "a user or a password in an address can be read by everybody: leave it out"
                }
                Protocol::Http => {
                    "a user or a password in an address can be read by everybody: leave it out, and \
                     name a file with the line 'Authorization: ...' by auth=FILE"
                }
            }));
        }
        if text.chars().any(char::is_control) {
            return refused("holds a control character: leave it out, or write it as %XX");
        }
        let (text, query) = match (protocol, text.split_once('?')) {
            (Protocol::Http, Some((text, query))) => (text, Some(query.to_owned())),
            _ => (text, None),
        };
        Ok(Self { text: text.to_owned(), query })
    }

    /// Returns the protocol.
    #[must_use]
    pub fn protocol(&self) -> Protocol {
        protocol_of(&self.text).unwrap_or(Protocol::Nbd)
    }

    /// Whether the address is a command that is started as the server. No overlay or store may name
    /// one, only the user: it would be run by whoever looks at the overlay.
    #[must_use]
    pub fn is_command(&self) -> bool {
        self.text.starts_with(COMMAND_PREFIX)
    }

    /// Whether the connection is encrypted.
    #[must_use]
    pub fn is_encrypted(&self) -> bool {
        self.text.starts_with("nbds") || self.text.starts_with("https:")
    }

    /// Returns the text that may be shown and recorded: without the query of an address behind HTTP.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// Returns the query of an address behind HTTP, which may be a secret.
    pub(crate) fn query(&self) -> Option<&str> {
        self.query.as_deref()
    }

    /// Whether both lead to the same place, for all that may be shown of them.
    #[must_use]
    pub fn is_same_place(&self, other: &Self) -> bool {
        self.text == other.text
    }
}

impl fmt::Display for RemoteAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl fmt::Debug for RemoteAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let query = if self.query.is_some() { "?..." } else { "" };
        write!(f, "{:?}", format_args!("{}{query}", self.text))
    }
}

/// Returns `text`, a source as the user wrote it, without the query of an address behind HTTP.
pub(super) fn without_query(text: &str) -> &str {
    match (protocol_of(text), text.split_once('?')) {
        (Some(Protocol::Http), Some((shown, _))) => shown,
        _ => text,
    }
}

/// Returns `text`, a disk as the user wrote it, without the queries of addresses behind HTTP: they may
/// be signatures. A query ends at the comma before the next key; a doubled comma is part of it.
#[must_use]
pub(crate) fn without_queries(text: &str) -> Cow<'_, str> {
    let mut shown = String::new();
    let mut rest = text;
    // What is refused for its capitals is shown, too.
    let lower = text.to_ascii_lowercase();
    let start_of = |rest: &str| {
        let lower = &lower[text.len() - rest.len()..];
        ["http://", "https://"].iter().filter_map(|scheme| lower.find(scheme)).min()
    };
    while let Some(at) = start_of(rest) {
        let (before, address) = rest.split_at(at);
        let (address, after) = address.split_at(end_of_piece(address));
        shown.push_str(before);
        match address.split_once('?') {
            Some((address, _)) => shown.extend([address, "?..."]),
            None => shown.push_str(address),
        }
        rest = after;
    }
    if shown.is_empty() {
        return Cow::Borrowed(text);
    }
    shown.push_str(rest);
    Cow::Owned(shown)
}

/// Returns the offset of the first comma of `text` that is not doubled, or its length.
fn end_of_piece(text: &str) -> usize {
    let bytes = text.as_bytes();
    let mut at = 0;
    while let Some(byte) = bytes.get(at) {
        match (byte, bytes.get(at + 1)) {
            (b',', Some(b',')) => at += 2,
            (b',', _) => return at,
            _ => at += 1,
        }
    }
    at
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::{AuthSource, BmapSource, without_queries};
    use crate::config::{DiskMode, DiskSource, Format, SourcePart, parse_disk};

    fn parse(text: &str) -> Result<crate::config::DiskSpec, String> {
        parse_disk(text, Path::new("/home"), &|_| false).map_err(|error| error.to_string())
    }

    #[test]
    fn an_address_is_a_source_with_keys_of_its_own() {
        let disk = parse(
            "vm=nbds://h:10809/ex?port,overlay=o,format=qcow2,partition=2,fetch=64K,ahead=1M,\
             conns=2,read-cache=c,read-cache-size=1G,tls-ca=ca,tls-cert=me,tls-key=/k",
        )
        .unwrap();
        let DiskSource::Remote(remote) = &disk.source else { panic!("{disk:?}") };
        assert_eq!(remote.address.as_str(), "nbds://h:10809/ex?port");
        let files = [&remote.tls_ca, &remote.tls_cert, &remote.tls_key];
        let files = files.map(|file| file.as_deref().unwrap().to_str().unwrap());
        assert_eq!(files, ["/home/ca", "/home/me", "/k"]);
        assert_eq!((remote.fetch, remote.ahead, remote.conns), (64 << 10, 1 << 20, 2));
        assert_eq!(remote.read_cache.as_deref(), Some(Path::new("/home/c")));
        assert_eq!(remote.read_cache_size, 1 << 30);
        assert_eq!((disk.mode, disk.format), (DiskMode::Cow, Some(Format::Qcow2)));
        assert_eq!(disk.part, SourcePart::Partition(2));
        let disk = parse("vm=nbd+exec:qemu-nbd -f raw 'a,,b.img',mode=ro").unwrap();
        let DiskSource::Remote(remote) = &disk.source else { panic!("{disk:?}") };
        assert_eq!(remote.address.as_str(), "nbd+exec:qemu-nbd -f raw 'a,b.img'");
        parse("vm=nbd+unix:///?socket=/run/s").unwrap();
    }

    #[test]
    fn the_query_of_an_address_behind_http_is_kept_and_not_shown() {
        let disk = parse("vm=https://h/a,,b?sig=s3cret,,x&y,auth=cmd:token 'a b',mode=ro").unwrap();
        let DiskSource::Remote(remote) = &disk.source else { panic!("{disk:?}") };
        assert_eq!(remote.address.to_string(), "https://h/a,b");
        assert_eq!(remote.address.query(), Some("sig=s3cret,x&y"));
        assert!(!format!("{disk:?}").contains("s3cret"));
        let words = AuthSource::Command(vec!["token".into(), "a b".into()]);
        assert_eq!((remote.auth.as_ref(), &*remote.dir), (Some(&words), Path::new("/home")));
        assert!(remote.address.is_encrypted() && disk.format.is_none());
        let disk = parse("vm=http://h/a,auth=token").unwrap();
        let DiskSource::Remote(remote) = &disk.source else { panic!("{disk:?}") };
        assert_eq!(remote.auth, Some(AuthSource::File("/home/token".into())));
        for (text, shown) in [
            ("vm=https://h/a,,b?s,,t,mode=ro", "vm=https://h/a,,b?...,mode=ro"),
            ("http://h/?s", "http://h/?..."),
            ("ü=HTTPS://h/?s,len=3", "ü=HTTPS://h/?...,len=3"),
            ("http://h/a,len=3", "http://h/a,len=3"),
            ("a?b,c", "a?b,c"),
            ("x=http://h?s,y=https://i?t", "x=http://h?...,y=https://i?..."),
        ] {
            assert_eq!(without_queries(text), shown);
        }
    }

    #[test]
    fn a_bmap_is_a_file_or_behind_http() {
        let of = |text: &str| match parse(text).unwrap().source {
            DiskSource::Remote(remote) => remote.bmap.unwrap(),
            other => panic!("{other:?}"),
        };
        let file = BmapSource::File("/home/vm.bmap".into());
        assert_eq!(of("vm=http://h/e,bmap=vm.bmap,mode=ro"), file);
        let url = of("vm=http://h/e,format=raw,bmap=https://i/e.bmap?s3cret");
        assert_eq!(url.to_string(), "https://i/e.bmap");
        assert!(!format!("{url:?}").contains("s3cret"));
        let BmapSource::Url(address) = url else { panic!() };
        assert_eq!(address.query(), Some("s3cret"));
    }

    #[test]
    fn what_no_server_can_be_asked_for_is_refused() {
        for (text, hint) in [
            ("nbd://h/e", "needs a name: write NAME=nbd://h/e"),
            ("vm=nbd://me:pw@h/e", "can be read by everybody: leave it out"),
            ("vm=nbd://h/\n", "holds a control character"),
            ("vm=ftp://h/e", "is not a source"),
            ("vm=s3://h/e", "such sources are not in this version"),
            ("https://h/e?s3cret", "needs a name: write NAME=https://h/e"),
            (
                "vm=http://me:s3cret@h/e",
                "name a file with the line 'Authorization: ...' by auth=FILE",
            ),
            (
                "vm=https://h/e?s3cret,mode=rw",
                "'mode=rw' is not for https://h/e, which is only read",
            ),
            ("vm=https://h/e?s3cret,fech=64K", "unknown key 'fech'"),
            ("vm=https://h/e?s3cret,lock=off", "'lock' is for files of this host"),
            ("vm=http://h/e,tls-ca=x", "'tls-ca' is for nbds:// and https://"),
            ("vm=nbd://h/e,auth=x", "'auth' is for http:// and https://"),
            ("vm=nbd://h/e,bmap=x", "'bmap' is for http:// and https://"),
            ("vm=http://h/e,bmap=x,format=qcow2", "'bmap' is of a raw image, and this one is"),
            ("vm=http://h/e,bmap=nbd://h/b", "bmap: it is a file, or at an address http://"),
            ("vm=http://h/e,bmap=http://me:pw@h/b", "can be read by everybody"),
            ("vm=http://h/e,bmap=", "'bmap' needs a value: write bmap=FILE|URL"),
            ("v.img,bmap=x", "'bmap' is only for images on servers"),
            ("vm=http://h/e,auth=cmd:", "a program is missing"),
            ("vm=http://h/e,auth=cmd:a | b", "one program prints the header lines"),
            ("vm=http://h/e,auth=cmd:a $B", "cowslip runs no shell"),
            ("vm=nbd://h/e,lock=off", "'lock' is for files of this host"),
            ("vm=nbd://h/e,mode=ro,passthrough", "'passthrough' is for files of this host"),
            ("vm=nbd://h/e,direct", "'direct' is for files of this host"),
            ("vm=nbd://h/e,overlay=o,reflink", "'reflink' is for files of this host"),
            ("vm=nbd://h/e,fetch=3K", "fetch: '3072' is not an amount"),
            ("vm=nbd://h/e,fetch=8M", "fetch: '8388608' is not an amount"),
            ("vm=nbd://h/e,ahead=8G", "ahead: '8589934592' is not an amount"),
            ("vm=nbd://h/e,conns=0", "count from 1"),
            ("vm=nbd://h/e,conns=65", "is not a number of connections"),
            ("vm=nbd://h/e,read-cache-size=1M", "is not a size"),
            (
                "vm=nbd://h/e,tls-ca=x",
                "'tls-ca' is for nbds:// and https://, and this connection is not encrypted",
            ),
            ("vm=nbds://h/e,tls-cert=x", "'tls-cert' needs tls-key= beside it"),
            ("vm=nbds://h/e,tls-key=x", "'tls-key' needs tls-cert= beside it"),
            ("v.img,fetch=64K", "'fetch' is only for images on servers"),
            ("v=blank:1G,read-cache=c", "'read-cache' is only for images on servers"),
            ("v=stream:1G,to=measure:,conns=1", "'conns' is only for images on servers"),
            ("vm=nbd://h/e,window=1M", "is only for streams"),
        ] {
            let line = parse(text).unwrap_err();
            assert!(line.contains(hint) && !line.contains('\n'), "{text}: {line}");
            assert!(!line.contains("s3cret") || text.contains("me:"), "{line}");
        }
    }
}
