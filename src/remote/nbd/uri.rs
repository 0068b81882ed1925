//! Where an NBD server is: `nbd:` URIs (doc/uri.md of the NBD project), and commands that are one.
//!
//! ```text
//!   nbd://HOST[:PORT]/EXPORT      nbd+unix:///EXPORT?socket=PATH      nbd+exec:COMMAND LINE
//!   nbds://HOST[:PORT]/EXPORT     nbds+unix:///EXPORT?socket=PATH
//! ```

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::net::Ipv6Addr;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;

use thiserror::Error;

use super::codec::handshake::Tls;
use super::codec::wire::MAX_STRING;
use crate::config::{CommandLineError, split_command};
use crate::printable;

/// The port that IANA assigned to NBD.
const DEFAULT_PORT: u16 = 10809;

/// The longest path of a Unix socket in bytes: `sun_path` of unix(7), without its last zero.
const MAX_SOCKET_PATH: usize = 107;

/// The address of a server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Address {
    /// A host name or an IP address, and a port.
    Tcp { host: String, port: u16 },
    /// The path of a Unix socket; one that begins with a zero byte has no file.
    Unix(PathBuf),
    /// A program, with its arguments, that becomes the server.
    Exec(Vec<OsString>),
}

/// An export on a server. Displayed without what may be secret.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct NbdTarget {
    /// The server.
    pub(crate) address: Address,
    /// The name of the export; empty for the server's default.
    pub(crate) export: String,
    /// Whether the connection must be encrypted.
    pub(crate) tls: Tls,
    /// The name that the server's certificate must have, when it is not that of the host.
    pub(crate) tls_name: Option<String>,
}

/// The reason why a source names no NBD server.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub(crate) enum NbdUriError {
    #[error("an NBD source begins with nbd://, nbds://, nbd+unix://, nbds+unix:// or nbd+exec:")]
    Scheme,
    #[error("a host is missing: write {0}://HOST[:PORT]/EXPORT")]
    NoHost(&'static str),
    #[error("a name or a password in a URI can be seen by everyone: remove what is before the '@'")]
    UserInfo,
    #[error("'{0}' is no port: take a number from 1 to 65535")]
    Port(String),
    #[error("an IPv6 address is written in brackets, like nbd://[::1]:10809/EXPORT")]
    Ipv6,
    #[error("'%' in a URI is followed by two hexadecimal digits")]
    Percent,
    #[error("the name of an export is UTF-8 without zero bytes, at most 4096 bytes")]
    Export,
    #[error("a URI of a Unix socket names no host: write {0}:///EXPORT?socket=PATH")]
    HostOfSocket(&'static str),
    #[error("a socket is missing: write {0}:///EXPORT?socket=PATH")]
    NoSocket(&'static str),
    #[error("the path of a Unix socket has at most 107 bytes")]
    SocketTooLong,
    #[error("tls-hostname= is the name in the certificate of the server")]
    TlsName,
    #[error(
        "'{0}' is no parameter of an NBD URI here: socket=PATH of a Unix socket and tls-hostname=NAME \
         with TLS are"
    )]
    Parameter(String),
    #[error("a URI has no part after '#': write %23 for that character")]
    Fragment,
    #[error("a program is missing: write nbd+exec:COMMAND [ARG]...")]
    NoProgram,
    #[error("one program becomes the server: write nbd+exec:sh -c '...' for several")]
    Pipe,
    #[error("cowslip runs no shell; write nbd+exec:sh -c '...'")]
    NeedsShell,
    #[error("a quote or a backslash has no end in the command")]
    Unterminated,
}

/// A kind of NBD source.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Tcp,
    Unix,
}

const SCHEMES: [(&str, Kind, Tls); 4] = [
    ("nbd", Kind::Tcp, Tls::No),
    ("nbds", Kind::Tcp, Tls::Required),
    ("nbd+unix", Kind::Unix, Tls::No),
    ("nbds+unix", Kind::Unix, Tls::Required),
];

const EXEC_SCHEME: &[u8] = b"nbd+exec:";

impl NbdTarget {
    /// Returns where the export is, the same for all spellings of one address: of the host's name, the
    /// port, the export, and the path of a socket.
    pub(crate) fn place(&self) -> String {
        let server = match &self.address {
            Address::Tcp { host, port } => format!("{}:{port}", host.to_lowercase()),
            Address::Unix(path) => {
                let real = path.canonicalize().unwrap_or_else(|_| path.clone());
                format!("unix:{}", real.display())
            }
            Address::Exec(words) => format!("exec:{words:?}"),
        };
        format!("{server}\n{}", self.export)
    }

    /// Reads a source.
    pub(crate) fn parse(source: &OsStr) -> Result<Self, NbdUriError> {
        let bytes = source.as_bytes();
        if let Some(line) = bytes.strip_prefix(EXEC_SCHEME) {
            let address = Address::Exec(parse_command(OsStr::from_bytes(line))?);
            return Ok(Self { address, export: String::new(), tls: Tls::No, tls_name: None });
        }
        let (scheme, kind, tls, rest) = scheme_of(bytes).ok_or(NbdUriError::Scheme)?;
        if rest.contains(&b'#') {
            return Err(NbdUriError::Fragment);
        }
        let (rest, query) = cut(rest, b'?');
        let (authority, path) = cut(rest, b'/');
        let export = String::from_utf8(decode(path.unwrap_or_default())?)
            .ok()
            .filter(|name| name.len() <= MAX_STRING && !name.contains('\0'))
            .ok_or(NbdUriError::Export)?;
        if authority.contains(&b'@') {
            return Err(NbdUriError::UserInfo);
        }
        let (socket, tls_name) = parameters(query, kind, tls)?;
        let address = match kind {
            Kind::Tcp => parse_authority(authority, scheme)?,
            Kind::Unix if !authority.is_empty() => return Err(NbdUriError::HostOfSocket(scheme)),
            Kind::Unix => Address::Unix(socket.ok_or(NbdUriError::NoSocket(scheme))?),
        };
        Ok(Self { address, export, tls, tls_name })
    }

    /// Returns the name that the server's certificate must have.
    pub(super) fn verified_name(&self) -> Option<&str> {
        match (&self.tls_name, &self.address) {
            (Some(name), _) => Some(name),
            (None, Address::Tcp { host, .. }) => Some(host),
            (None, Address::Unix(_) | Address::Exec(_)) => None,
        }
    }

    fn scheme(&self) -> &'static str {
        let kind = match self.address {
            Address::Exec(_) => return "nbd+exec",
            Address::Tcp { .. } => Kind::Tcp,
            Address::Unix(_) => Kind::Unix,
        };
        let scheme = SCHEMES.iter().find(|(_, of, tls)| (*of, *tls) == (kind, self.tls));
        scheme.map_or("nbd", |(name, ..)| name)
    }
}

impl fmt::Display for NbdTarget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let scheme = self.scheme();
        match &self.address {
            Address::Tcp { host, port } => {
                let is_ipv6 = host.contains(':');
                let (open, close) = if is_ipv6 { ("[", "]") } else { ("", "") };
                write!(f, "{scheme}://{open}{}{close}", encoded(host.as_bytes()))?;
                if *port != DEFAULT_PORT {
                    write!(f, ":{port}")?;
                }
                write!(f, "/{}", encoded(self.export.as_bytes()))?;
                match &self.tls_name {
                    Some(name) => write!(f, "?tls-hostname={}", encoded(name.as_bytes())),
                    None => Ok(()),
                }
            }
            Address::Unix(path) => {
                let path = encoded(path.as_os_str().as_bytes());
                write!(f, "{scheme}:///{}?socket={path}", encoded(self.export.as_bytes()))?;
                match &self.tls_name {
                    Some(name) => write!(f, "&tls-hostname={}", encoded(name.as_bytes())),
                    None => Ok(()),
                }
            }
            // Arguments may be passwords.
            Address::Exec(words) => {
                let program = words.first().map(|word| word.to_string_lossy()).unwrap_or_default();
                write!(f, "{scheme}:{}", printable::line(&program))?;
                f.write_str(if words.len() > 1 { " ..." } else { "" })
            }
        }
    }
}

fn scheme_of(bytes: &[u8]) -> Option<(&'static str, Kind, Tls, &[u8])> {
    SCHEMES.iter().find_map(|(name, kind, tls)| {
        // Schemes are written in letters of either case (RFC 3986, 3.1).
        let (scheme, rest) = bytes.split_at_checked(name.len())?;
        let rest = rest.strip_prefix(b"://")?;
        scheme.eq_ignore_ascii_case(name.as_bytes()).then_some((*name, *kind, *tls, rest))
    })
}

/// Cuts at the first `at`, which is in neither part.
fn cut(bytes: &[u8], at: u8) -> (&[u8], Option<&[u8]>) {
    match bytes.iter().position(|byte| *byte == at) {
        Some(found) => (&bytes[..found], Some(&bytes[found + 1..])),
        None => (bytes, None),
    }
}

/// Takes the parameters of a URI: the path of a socket, and the name to verify.
fn parameters(
    query: Option<&[u8]>,
    kind: Kind,
    tls: Tls,
) -> Result<(Option<PathBuf>, Option<String>), NbdUriError> {
    let (mut socket, mut tls_name) = (None, None);
    let is_pair = |parameter: &&[u8]| !parameter.is_empty();
    for parameter in query.unwrap_or_default().split(|byte| *byte == b'&').filter(is_pair) {
        match cut(parameter, b'=') {
            (b"socket", Some(path)) if kind == Kind::Unix && socket.is_none() => {
                let path = decode(path)?;
                if path.len() > MAX_SOCKET_PATH {
                    return Err(NbdUriError::SocketTooLong);
                }
                socket = Some(path).filter(|path| !path.is_empty());
            }
            (b"tls-hostname", Some(name)) if tls == Tls::Required && tls_name.is_none() => {
                let name = String::from_utf8(decode(name)?).ok();
                let is_name = |name: &String| !name.is_empty() && !name.contains(char::is_control);
                tls_name = Some(name.filter(is_name).ok_or(NbdUriError::TlsName)?);
            }
            // Only the name: the value may be a secret.
            (name, _) => {
                let name = String::from_utf8_lossy(name);
                return Err(NbdUriError::Parameter(printable::line(&name).into_owned()));
            }
        }
    }
    Ok((socket.map(|path| OsString::from_vec(path).into()), tls_name))
}

fn parse_authority(authority: &[u8], scheme: &'static str) -> Result<Address, NbdUriError> {
    let (host, port) = match authority.strip_prefix(b"[") {
        Some(rest) => {
            let (host, after) = cut(rest, b']');
            // A zone follows as %25ZONE (RFC 6874).
            let host = String::from_utf8(decode(host)?).map_err(|_| NbdUriError::Ipv6)?;
            let address = host.split('%').next().unwrap_or_default();
            address.parse::<Ipv6Addr>().map_err(|_| NbdUriError::Ipv6)?;
            match after.ok_or(NbdUriError::Ipv6)? {
                b"" => (host, None),
                [b':', port @ ..] => (host, Some(port)),
                _ => return Err(NbdUriError::Ipv6),
            }
        }
        None => {
            let (host, port) = cut(authority, b':');
            if port.is_some_and(|port| port.contains(&b':')) {
                return Err(NbdUriError::Ipv6);
            }
            let host = String::from_utf8(decode(host)?).map_err(|_| NbdUriError::NoHost(scheme))?;
            (host, port)
        }
    };
    if host.is_empty() || host.contains('\0') {
        return Err(NbdUriError::NoHost(scheme));
    }
    // An empty port is the default one (RFC 3986, 3.2.3).
    let port = match port.filter(|port| !port.is_empty()) {
        None => DEFAULT_PORT,
        Some(port) => {
            let text = String::from_utf8_lossy(port);
            let is_number = text.bytes().all(|byte| byte.is_ascii_digit());
            let number = text.parse().ok().filter(|port| *port != 0 && is_number);
            number.ok_or_else(|| NbdUriError::Port(printable::line(&text).into_owned()))?
        }
    };
    Ok(Address::Tcp { host, port })
}

fn parse_command(line: &OsStr) -> Result<Vec<OsString>, NbdUriError> {
    let programs = split_command(line).map_err(|fault| match fault {
        CommandLineError::NeedsShell => NbdUriError::NeedsShell,
        CommandLineError::Unterminated => NbdUriError::Unterminated,
        CommandLineError::NoProgram => NbdUriError::NoProgram,
    })?;
    let mut programs = programs.0;
    match (programs.pop(), programs.is_empty()) {
        (Some(words), true) => Ok(words),
        (Some(_), false) => Err(NbdUriError::Pipe),
        (None, _) => Err(NbdUriError::NoProgram),
    }
}

fn decode(text: &[u8]) -> Result<Vec<u8>, NbdUriError> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some((byte, after)) = rest.split_first() {
        rest = after;
        if *byte != b'%' {
            bytes.push(*byte);
            continue;
        }
        let (digits, after) = rest.split_at_checked(2).ok_or(NbdUriError::Percent)?;
        let digit = |at: usize| digits.get(at).and_then(|digit| char::from(*digit).to_digit(16));
        let value = digit(0).zip(digit(1)).ok_or(NbdUriError::Percent)?;
        bytes.push(u8::try_from(value.0 * 16 + value.1).map_err(|_| NbdUriError::Percent)?);
        rest = after;
    }
    Ok(bytes)
}

/// Encodes what a URI may not contain as it is (RFC 3986, 2.3 and 3.3).
fn encoded(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len());
    for byte in bytes {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' => text.push(char::from(*byte)),
            byte if b"-._~/:@!$'()*,;=".contains(byte) => text.push(char::from(*byte)),
            _ => text.push_str(&format!("%{byte:02X}")),
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn parse(text: &str) -> Result<NbdTarget, NbdUriError> {
        NbdTarget::parse(OsStr::new(text))
    }

    fn tcp(host: &str, port: u16, export: &str, tls: Tls) -> NbdTarget {
        let address = Address::Tcp { host: host.to_owned(), port };
        NbdTarget { address, export: export.to_owned(), tls, tls_name: None }
    }

    #[test]
    fn uris_of_the_specification_name_their_exports() {
        let named = |text: &str| parse(text).unwrap().export;
        assert_eq!(named("nbd://example.com/disk"), "disk");
        assert_eq!(named("nbd+unix:///disk?socket=sock"), "disk");
        assert_eq!(named("nbd://example.com/"), "");
        assert_eq!(named("nbd://example.com"), "");
        assert_eq!(named("nbd://example.com//disk"), "/disk");
        assert_eq!(named("nbd://example.com/hello%20world"), "hello world");
    }

    #[test]
    fn hosts_ports_and_encryption_are_told_apart() {
        assert_eq!(parse("nbd://h/e").unwrap(), tcp("h", 10809, "e", Tls::No));
        assert_eq!(parse("nbds://h:/e").unwrap(), tcp("h", 10809, "e", Tls::Required));
        assert_eq!(parse("NBD://10.0.0.2:99").unwrap(), tcp("10.0.0.2", 99, "", Tls::No));
        assert_eq!(parse("nbd://[::1]:7/a/b").unwrap(), tcp("::1", 7, "a/b", Tls::No));
        assert_eq!(
            parse("nbd://[fe80::1%25eth0]").unwrap(),
            tcp("fe80::1%eth0", 10809, "", Tls::No)
        );
    }

    #[test]
    fn sockets_are_paths_with_any_bytes() {
        let socket = |text| match parse(text).unwrap().address {
            Address::Unix(path) => path.into_os_string().into_vec(),
            other => panic!("{other:?}"),
        };
        assert_eq!(socket("nbd+unix:///?socket=/run/a%20b%ff"), b"/run/a b\xff");
        assert_eq!(socket("nbds+unix:///x?socket=%00abstract"), b"\0abstract");
        assert_eq!(parse("nbds+unix:///x?socket=s").unwrap().tls, Tls::Required);
    }

    #[test]
    fn a_command_becomes_words_and_is_shown_without_its_arguments() {
        let target = parse("nbd+exec:nbdkit curl 'https://u:secret@h/x y'").unwrap();
        let Address::Exec(words) = &target.address else { panic!("{target:?}") };
        assert_eq!(words, &["nbdkit", "curl", "https://u:secret@h/x y"]);
        assert_eq!(target.to_string(), "nbd+exec:nbdkit ...");
        assert_eq!(parse("nbd+exec:server").unwrap().to_string(), "nbd+exec:server");
    }

    #[test]
    fn each_mistake_has_its_line() {
        let why = |text: &str| parse(text).unwrap_err();
        assert_eq!(why("nbd:h"), NbdUriError::Scheme);
        assert_eq!(why("nbd:///e"), NbdUriError::NoHost("nbd"));
        assert_eq!(why("nbds://:5/e"), NbdUriError::NoHost("nbds"));
        assert_eq!(why("nbd://me:pw@h/e"), NbdUriError::UserInfo);
        assert_eq!(why("nbd://h:0/e"), NbdUriError::Port("0".to_owned()));
        assert_eq!(why("nbd://h:+1/e"), NbdUriError::Port("+1".to_owned()));
        assert_eq!(why("nbd://h:65536/e"), NbdUriError::Port("65536".to_owned()));
        assert_eq!(why("nbd://::1/e"), NbdUriError::Ipv6);
        assert_eq!(why("nbd://[::1/e"), NbdUriError::Ipv6);
        assert_eq!(why("nbd://[::1]x/e"), NbdUriError::Ipv6);
        assert_eq!(why("nbd://h/%zz"), NbdUriError::Percent);
        assert_eq!(why("nbd://h/%"), NbdUriError::Percent);
        assert_eq!(why("nbd://h/%00"), NbdUriError::Export);
        assert_eq!(why("nbd://h/%ff"), NbdUriError::Export);
        assert_eq!(why(&format!("nbd://h/{}", "x".repeat(4097))), NbdUriError::Export);
        assert_eq!(why("nbd+unix://h/e?socket=s"), NbdUriError::HostOfSocket("nbd+unix"));
        assert_eq!(why("nbd+unix:///e"), NbdUriError::NoSocket("nbd+unix"));
        assert_eq!(why("nbd+unix:///e?socket="), NbdUriError::NoSocket("nbd+unix"));
        let long = format!("nbd+unix:///e?socket={}", "x".repeat(108));
        assert_eq!(why(&long), NbdUriError::SocketTooLong);
        assert_eq!(why("nbd://h/e?socket=s"), NbdUriError::Parameter("socket".to_owned()));
        assert_eq!(why("nbd://h/e?tls-psk=s"), NbdUriError::Parameter("tls-psk".to_owned()));
        assert_eq!(
            why("nbd://h/e?tls-hostname=x"),
            NbdUriError::Parameter("tls-hostname".to_owned())
        );
        assert_eq!(why("nbds://h/e?tls-hostname="), NbdUriError::TlsName);
        assert_eq!(why("nbd://h/e#x"), NbdUriError::Fragment);
        assert_eq!(why("nbd+exec:"), NbdUriError::NoProgram);
        assert_eq!(why("nbd+exec:a | b"), NbdUriError::Pipe);
        assert_eq!(why("nbd+exec:a > b"), NbdUriError::NeedsShell);
        assert_eq!(why("nbd+exec:a 'b"), NbdUriError::Unterminated);
    }

    proptest! {
        #[test]
        fn what_is_shown_is_read_as_the_same_target(
            export in "[^\0]{0,20}", socket in prop::collection::vec(any::<u8>(), 1..20),
            host in "[a-z0-9.-]{1,12}", port in 1u16.., is_tcp in any::<bool>(), is_tls in any::<bool>(),
        ) {
            let address = match is_tcp {
                true => Address::Tcp { host, port },
                false => Address::Unix(OsString::from_vec(socket).into()),
            };
            let tls = if is_tls { Tls::Required } else { Tls::No };
            let tls_name = (is_tls && port % 2 == 0).then(|| format!("n{port}"));
            let target = NbdTarget { address, export, tls, tls_name };
            prop_assert_eq!(parse(&target.to_string()), Ok(target));
        }

        #[test]
        fn any_text_is_read_or_refused(text in ".{0,60}", at in 0usize..5) {
            let scheme = ["nbd://", "nbds://", "nbd+unix:///", "nbd+exec:", ""][at];
            let _ = parse(&format!("{scheme}{text}"));
        }
    }
}
