//! Images on servers: the address, and the keys that say how much is fetched and kept.

use std::fmt;
use std::path::PathBuf;

use super::SpecError;
use super::error::escaped;

/// The smallest amount that a read of another place fetches, by default: 256 KiB. At 20 ms a request
/// it costs a tenth of a second for 10 MB, and nothing that a server would notice.
const DEFAULT_FETCH: u64 = 256 << 10;
/// The largest read-ahead by default: 16 MiB, the bytes on their way at 800 MB/s and 20 ms.
const DEFAULT_AHEAD: u64 = 16 << 20;
/// The number of connections, or of requests at a time, by default.
const DEFAULT_CONNS: u32 = 8;
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
    /// The most connections.
    pub conns: u32,
    /// The directory in which what was fetched stays beyond the mount.
    pub read_cache: Option<PathBuf>,
    /// The most bytes that are kept.
    pub read_cache_size: u64,
    /// The authorities that are believed, a file in PEM; `None` for those of the system.
    pub tls_ca: Option<PathBuf>,
    /// The certificate by which this side is known, a file in PEM.
    pub tls_cert: Option<PathBuf>,
    /// The key of that certificate, a file in PEM.
    pub tls_key: Option<PathBuf>,
    /// The working directory of a command that is the server.
    pub dir: PathBuf,
}

impl RemoteSpec {
    /// Creates the spec of the image at `address`, all keys at their defaults. A command runs in `/`.
    #[must_use]
    pub fn new(address: RemoteAddress) -> Self {
        Self {
            address,
            fetch: DEFAULT_FETCH,
            ahead: DEFAULT_AHEAD,
            conns: DEFAULT_CONNS,
            read_cache: None,
            read_cache_size: DEFAULT_CACHE_SIZE,
            tls_ca: None,
            tls_cert: None,
            tls_key: None,
            dir: PathBuf::from("/"),
        }
    }
}

/// The address of an image on a server, as the user wrote it. It holds no password.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RemoteAddress(String);

/// The protocols that are spoken, by the beginning of an address.
const PREFIXES: &[&str] = &["nbd://", "nbds://", "nbd+unix://", "nbds+unix://", COMMAND_PREFIX];
/// The beginning of an address that is a command line.
const COMMAND_PREFIX: &str = "nbd+exec:";

impl RemoteAddress {
    /// Whether `text` begins as an address does.
    pub(super) fn is_one(text: &str) -> bool {
        PREFIXES.iter().any(|prefix| text.starts_with(prefix))
    }

    /// Parses the beginning of an address; the module that speaks the protocol reads the rest.
    ///
    /// # Errors
    /// [`SpecError`] for another protocol, and for a password: others could read it in the list of
    /// processes.
    pub fn parse(text: &str) -> Result<Self, SpecError> {
        let refused = |why| Err(SpecError::Source { given: escaped(text), why });
        if !Self::is_one(text) {
            return refused("is not the address of an image: write nbd://HOST/EXPORT");
        }
        let authority = text.split_once("://").map_or("", |(_, rest)| rest);
        let authority = authority.split(['/', '?']).next().unwrap_or_default();
        if authority.contains('@') {
            return Err(SpecError::Missing(
                "a user or a password in an address can be read by everybody: leave it out",
            ));
        }
        if text.chars().any(char::is_control) {
            return refused("holds a control character: leave it out, or write it as %XX");
        }
        Ok(Self(text.to_owned()))
    }

    /// Whether the address is a command that is started as the server. No overlay or store may name
    /// one, only the user: it would be run by whoever looks at the overlay.
    #[must_use]
    pub fn is_command(&self) -> bool {
        self.0.starts_with(COMMAND_PREFIX)
    }

    /// Whether the connection is encrypted.
    #[must_use]
    pub fn is_encrypted(&self) -> bool {
        self.0.starts_with("nbds")
    }

    /// The text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for RemoteAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

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
    fn what_no_server_can_be_asked_for_is_refused() {
        for (text, hint) in [
            ("nbd://h/e", "needs a name: write NAME=nbd://h/e"),
            ("vm=nbd://me:pw@h/e", "can be read by everybody: leave it out"),
            ("vm=nbd://h/\n", "holds a control character"),
            ("vm=ftp://h/e", "is not a source"),
            ("vm=https://h/e", "such sources are not in this version"),
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
                "'tls-ca' is for nbds://, and this connection is not encrypted",
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
        }
    }
}
