//! What is to be known of a server, apart from the disks that are on it.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use super::disk_parser::{RawSpec, split_commas};
use super::error::escaped;
use super::raw_value::RawValue;
use super::remote::without_queries;
use super::{DiskSource, RemoteAddress, RemoteSpec, SpecError};

/// The keys by which a server is known, and this side to it.
const SERVER_KEYS: [&str; 4] = ["auth", "tls-ca", "tls-cert", "tls-key"];

/// The keys of all images whose addresses begin alike: `https://host/images,auth=token`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServerSpec(RemoteSpec);

impl ServerSpec {
    /// Parses the beginning of addresses, and the keys after it. Relative paths are joined to `dir`.
    ///
    /// # Errors
    /// [`SpecError`] for what is no address, and for other keys.
    pub fn parse(text: &OsStr, dir: &Path) -> Result<Self, SpecError> {
        Self::parse_pieces(&split_commas(text.as_bytes()), dir).map_err(|error| {
            let shown = text.to_string_lossy();
            error.within(format!("server '{}'", escaped(&*without_queries(&shown))))
        })
    }

    fn parse_pieces(pieces: &[OsString], dir: &Path) -> Result<Self, SpecError> {
        // Its keys are those of a disk, so it is parsed as one.
        let raw = RawSpec::from_pieces(Some(OsStr::new("server")), pieces)?;
        let is_other = |(key, _): &&(String, RawValue)| !SERVER_KEYS.contains(&key.as_str());
        if let Some((key, _)) = raw.keys.iter().find(is_other) {
            let why = "is no key of a server: it has auth=, tls-ca=, tls-cert= and tls-key=";
            return Err(SpecError::key(escaped(key), why));
        }
        if raw.keys.is_empty() {
            let why = "has no keys: write ADDRESS,auth=FILE or ADDRESS,tls-ca=FILE";
            return Err(SpecError::Missing(why));
        }
        match raw.build(dir)?.source {
            DiskSource::Remote(remote) if is_prefix(&remote.address) => Ok(Self(*remote)),
            _ => Err(SpecError::Missing(
                "is no beginning of addresses: write https://HOST/ or nbds://HOST/ before the keys",
            )),
        }
    }

    /// Returns the beginning of the addresses.
    #[must_use]
    pub fn prefix(&self) -> &str {
        self.0.address.as_str()
    }

    /// Returns the keys.
    #[must_use]
    pub fn keys(&self) -> &RemoteSpec {
        &self.0
    }

    /// Whether the keys are for the image at `address`: it begins with all of the prefix, which ends
    /// with a component of it.
    #[must_use]
    pub fn is_for(&self, address: &RemoteAddress) -> bool {
        let prefix = self.prefix();
        address
            .as_str()
            .strip_prefix(prefix)
            .is_some_and(|rest| prefix.ends_with('/') || rest.is_empty() || rest.starts_with('/'))
    }
}

/// Whether other addresses can begin with `address`.
fn is_prefix(address: &RemoteAddress) -> bool {
    !address.is_command() && address.query().is_none()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::AuthSource;

    fn parse(text: &str) -> Result<ServerSpec, String> {
        ServerSpec::parse(OsStr::new(text), Path::new("/home")).map_err(|error| error.to_string())
    }

    #[test]
    fn keys_are_for_addresses_below_the_prefix() {
        let is_for = |prefix: &str, address: &str| {
            let server = parse(&format!("{prefix},tls-ca=ca")).unwrap();
            server.is_for(&RemoteAddress::parse(address).unwrap())
        };
        for (prefix, address) in [
            ("https://h", "https://h/a"),
            ("https://h/", "https://h/a?signature"),
            ("https://h/a", "https://h/a/b"),
            ("https://h/a", "https://h/a"),
            ("nbds://h:1/", "nbds://h:1/x"),
        ] {
            assert!(is_for(prefix, address), "{prefix} {address}");
        }
        for (prefix, address) in [
            ("https://h", "https://h.evil/a"),
            ("https://h", "https://h:8443/a"),
            ("https://h", "https://hh"),
            ("https://h/a", "https://h/ab"),
            ("https://h/", "http://h/a"),
            ("nbds://h/x", "nbds://h/y"),
        ] {
            assert!(!is_for(prefix, address), "{prefix} {address}");
        }
        let server = parse("https://h/a,,b,auth=cmd:token x,tls-ca=ca").unwrap();
        assert_eq!(server.prefix(), "https://h/a,b");
        let words = AuthSource::Command(vec!["token".into(), "x".into()]);
        assert_eq!(server.keys().auth, Some(words));
        assert_eq!(server.keys().tls_ca.as_deref(), Some(Path::new("/home/ca")));
    }

    #[test]
    fn what_is_no_server_is_refused() {
        for (text, why) in [
            ("https://h/,auth=a,mode=ro", "'mode' is no key of a server"),
            ("https://h/", "has no keys"),
            ("/a/file,auth=t", "auth"),
            ("https://h/?s3cret,auth=t", "is no beginning of addresses"),
            ("nbd+exec:x,tls-ca=t", "tls-ca"),
            ("http://h/,tls-ca=t", "is for nbds:// and https://"),
            ("nbds://h/,auth=t", "is for http:// and https://"),
            ("https://h/,tls-cert=t", "needs tls-key="),
            ("", "has no keys"),
        ] {
            let line = parse(text).unwrap_err();
            assert!(line.contains(why) && !line.contains("s3cret"), "{text}: {line}");
        }
    }
}
