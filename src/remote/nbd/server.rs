//! The server behind a client: how a connection to it is made, and whether it is still the same one.

use std::fmt;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::Duration;

use parking_lot::Mutex;

use super::codec::export::Export;
use super::codec::handshake::{Handshake, Tls};
use super::codec::replies::{Answer, Expected, Replies};
use super::codec::request::{Command, encode};
use super::error::NbdError;
use super::exec::{ExecServer, ServerProgram};
use super::link::{Deadline, Link};
use super::tls::TlsSettings;
use super::uri::{Address, NbdTarget};
use crate::host::{os_error, os_message};
use crate::program::stop::Stop;
use crate::remote::tls::TlsFiles;
use crate::remote::transport::IdentityCheck;

/// A connection after its handshake.
pub(super) struct Opened {
    pub(super) link: Link,
    pub(super) export: Export,
}

/// A server. Displayed without secrets.
pub(super) struct Server {
    shown: String,
    place: Place,
    export: String,
    is_encrypted: Tls,
    tls: Option<TlsSettings>,
    stop: Stop,
}

/// Where a server is.
enum Place {
    Tcp { host: String, port: u16 },
    Unix(PathBuf),
    Program(Mutex<ExecServer>),
}

impl Server {
    /// Names the server `target`; a program is run in `dir`.
    pub(super) fn new(
        target: &NbdTarget,
        dir: &Path,
        tls: &TlsFiles,
        stop: Stop,
    ) -> Result<Self, NbdError> {
        let place = match &target.address {
            Address::Tcp { host, port } => Place::Tcp { host: host.clone(), port: *port },
            Address::Unix(path) => Place::Unix(path.clone()),
            Address::Exec(words) => {
                let (words, dir) = (words.clone(), dir.to_owned());
                let program = ServerProgram { file: None, words, dir, jail: None };
                Place::Program(Mutex::new(ExecServer::new(program)))
            }
        };
        let tls = match (&target.verified_name(), target.tls) {
            (_, Tls::No) => None,
            (Some(name), Tls::Required) => Some(TlsSettings::load(tls, name)?),
            (None, Tls::Required) => {
                let text = "the name in the server's certificate is missing: add tls-hostname=NAME";
                return Err(NbdError::TlsSettings(text.to_owned()));
            }
        };
        let (shown, export) = (target.to_string(), target.export.clone());
        Ok(Self { shown, place, export, is_encrypted: target.tls, tls, stop })
    }

    /// Names the server that `program` becomes.
    pub(super) fn of_program(program: ServerProgram, shown: String, stop: Stop) -> Self {
        let place = Place::Program(Mutex::new(ExecServer::new(program)));
        Self { shown, place, export: String::new(), is_encrypted: Tls::No, tls: None, stop }
    }

    /// Opens a connection within `time`.
    pub(super) fn open(&self, time: Duration) -> Result<Opened, NbdError> {
        let deadline = Deadline::after(time, &self.stop);
        let mut link = match &self.place {
            Place::Tcp { host, port } => Link::tcp(host, *port, &deadline)?,
            Place::Unix(path) => Link::unix(path, &deadline)?,
            Place::Program(program) => {
                let socket = program.lock().start().map_err(NbdError::Program)?;
                Link::unix(&socket, &deadline).map_err(|error| self.explain(error))?
            }
        };
        let handshake = Handshake::new(&self.export, self.is_encrypted);
        let export = link
            .negotiate(handshake, self.tls.as_ref(), &deadline)
            .map_err(|error| self.explain(error))?;
        if let Place::Program(program) = &self.place {
            program.lock().check_files()?;
        }
        Ok(Opened { link, export })
    }

    /// A program that has ended says more than its connection.
    fn explain(&self, error: NbdError) -> NbdError {
        let Place::Program(program) = &self.place else { return error };
        if error == NbdError::Stopped {
            return error;
        }
        let mut program = program.lock();
        let failure = program.failure();
        if matches!(error, NbdError::Timeout(_)) && failure.is_none() {
            program.end_if_locked_in();
        }
        failure.map_or(error, NbdError::Program)
    }

    /// Opens a connection within `time`, and makes sure that it leads to the image of `first`.
    pub(super) fn open_same(
        &self,
        first: &Export,
        check: Option<&IdentityCheck>,
        time: Duration,
    ) -> Result<Opened, NbdError> {
        let opened = self.open(time)?;
        let export = &opened.export;
        if export.size != first.size {
            let text = format!("it had {} bytes, and now has {}", first.size, export.size);
            return Err(NbdError::Changed(text));
        }
        if !export.is_like(first) || export.headers != first.headers {
            let text = "flags, block sizes or extensions are others".to_owned();
            return Err(NbdError::Differs(text));
        }
        if let Some(check) = check {
            let deadline = Deadline::after(time, &self.stop);
            let mut read = |ranges: &[Range<u64>]| read_ranges(&opened, ranges, &deadline);
            match check(&mut read) {
                Ok(true) => {}
                Ok(false) => return Err(NbdError::Changed("its content differs".to_owned())),
                Err(error) => return Err(NbdError::Broken(os_message(&error))),
            }
        }
        Ok(opened)
    }
}

impl fmt::Display for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.shown)
    }
}

/// Reads `ranges` on a connection that nobody else uses yet. The requests go in one message.
fn read_ranges(
    opened: &Opened,
    ranges: &[Range<u64>],
    deadline: &Deadline,
) -> io::Result<Vec<Vec<u8>>> {
    let Opened { link, export } = opened;
    let broken = |error: NbdError| io::Error::other(error.to_string());
    let mut replies = Replies::new(export.headers, export.allocation);
    let mut requests = Vec::new();
    // Cookies from the end, which the client will not come to.
    let cookie_of = |number: usize| u64::MAX - number as u64;
    for (number, range) in ranges.iter().enumerate() {
        let is_valid = !range.is_empty()
            && range.end <= export.size
            && range.end - range.start <= u64::from(export.limits().max_len);
        let len = range.end.saturating_sub(range.start);
        let cookie = cookie_of(number);
        let request = encode(export.headers, Command::Read, cookie, range.start, len);
        let request = request.filter(|_| is_valid).ok_or_else(|| os_error(libc::EINVAL))?;
        replies.expect(cookie, Expected::Bytes(range.clone()));
        requests.extend(request);
    }
    link.send_all(&requests, deadline).map_err(broken)?;
    let mut found: Vec<Vec<u8>> = vec![Vec::new(); ranges.len()];
    let mut left = ranges.len();
    let mut buf = vec![0; 64 << 10];
    let mut events = Vec::new();
    while left > 0 {
        let received = match link.receive_some(&mut buf, deadline).map_err(broken)? {
            0 => return Err(os_error(libc::ECONNRESET)),
            len => buf.get(..len).unwrap_or_default(),
        };
        replies.feed(received, &mut events).map_err(io::Error::other)?;
        for event in events.drain(..) {
            let answer = event.result.map_err(|failure| os_error(failure.errno))?;
            let number = usize::try_from(u64::MAX - event.cookie).unwrap_or(usize::MAX);
            if let (Answer::Bytes(bytes), Some(place)) = (answer, found.get_mut(number)) {
                *place = bytes;
                left -= 1;
            }
        }
    }
    Ok(found)
}
