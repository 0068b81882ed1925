//! TLS on a connection: whom to believe, and the bytes in between.
//!
//! The server's certificate must lead to a known authority and name the host; there is no way around
//! that. Keys that both sides share beforehand (PSK) are not possible with this library.

use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::io::Errno;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore};

use super::error::NbdError;
use crate::confined::{self, FileAccess};
use crate::host::os_message;

/// Where systems keep the authorities that they believe.
const SYSTEM_AUTHORITIES: [&str; 4] = [
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/cert.pem",
];

/// The longest file of certificates or keys in bytes; a system's list of authorities has 250 KiB.
const MAX_FILE_LEN: u64 = 4 << 20;

/// The most plaintext that is encrypted at a time: the socket takes about as much.
const MAX_PLAINTEXT: usize = 256 << 10;

/// The files of TLS, in PEM.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct TlsFiles {
    /// The authorities that are believed; `None` for those of the system.
    pub(crate) authorities: Option<PathBuf>,
    /// Our certificate, with those between it and the authority, and its key.
    pub(crate) identity: Option<(PathBuf, PathBuf)>,
}

/// Whom to believe, and who we are.
#[derive(Clone, Debug)]
pub(super) struct TlsSettings {
    config: Arc<ClientConfig>,
    name: ServerName<'static>,
}

/// The state of one encrypted connection.
#[derive(Debug)]
pub(super) struct TlsSession(ClientConnection);

impl TlsFiles {
    /// Reads the files. `name` is the host that the server's certificate must name.
    pub(super) fn load(&self, name: &str) -> Result<TlsSettings, NbdError> {
        let failed = |text: String| NbdError::TlsSettings(text);
        let name = ServerName::try_from(name.to_owned())
            .map_err(|_| failed(format!("no certificate can name '{name}'")))?;
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|error| failed(error.to_string()))?
            .with_root_certificates(self.roots()?);
        let config = match &self.identity {
            None => builder.with_no_client_auth(),
            Some((certificate, key)) => {
                let chain = certificates(certificate)?;
                let key_der = PrivateKeyDer::from_pem_slice(&read_pem(key)?)
                    .map_err(|error| failed(format!("the key '{}': {error}", key.display())))?;
                builder.with_client_auth_cert(chain, key_der).map_err(|error| {
                    failed(format!("the certificate '{}': {error}", certificate.display()))
                })?
            }
        };
        Ok(TlsSettings { config: Arc::new(config), name })
    }

    fn roots(&self) -> Result<RootCertStore, NbdError> {
        let system = || SYSTEM_AUTHORITIES.iter().map(PathBuf::from).find(|path| path.exists());
        let nothing = "this system has no list of authorities: name one with tls-ca=";
        let file = self.authorities.clone().or_else(system);
        let file = file.ok_or_else(|| NbdError::TlsSettings(nothing.to_owned()))?;
        let mut roots = RootCertStore::empty();
        let (added, _) = roots.add_parsable_certificates(certificates(&file)?);
        match added {
            0 => Err(NbdError::TlsSettings(format!("'{}' has no authority", file.display()))),
            _ => Ok(roots),
        }
    }
}

/// Reads a file that the user has named: a regular one of at most [`MAX_FILE_LEN`] bytes, which is
/// never waited for. One without a length is refused, since those of /proc have none and may wait.
fn read_pem(file: &Path) -> Result<Vec<u8>, NbdError> {
    let failed = |error: io::Error| {
        NbdError::TlsSettings(format!("the file '{}': {}", file.display(), os_message(&error)))
    };
    let opened = confined::open_input(file, FileAccess::Read).map_err(failed)?;
    if opened.metadata().map_err(failed)?.len() == 0 {
        return Err(NbdError::TlsSettings(format!("the file '{}' is empty", file.display())));
    }
    confined::read_to_limit(&opened, MAX_FILE_LEN).map_err(failed)
}

fn certificates(file: &Path) -> Result<Vec<CertificateDer<'static>>, NbdError> {
    let failed = |error| NbdError::TlsSettings(format!("the file '{}': {error}", file.display()));
    let bytes = read_pem(file)?;
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&bytes).collect();
    let found = found.map_err(failed)?;
    match found.is_empty() {
        true => Err(NbdError::TlsSettings(format!("'{}' has no certificate", file.display()))),
        false => Ok(found),
    }
}

impl TlsSession {
    pub(super) fn new(settings: &TlsSettings) -> Result<Self, NbdError> {
        let session = ClientConnection::new(Arc::clone(&settings.config), settings.name.clone());
        session.map(Self).map_err(|error| NbdError::Tls(error.to_string()))
    }

    /// Whether the certificates have not been exchanged yet.
    pub(super) fn is_handshaking(&self) -> bool {
        self.0.is_handshaking()
    }

    /// Whether there are encrypted bytes to be sent.
    pub(super) fn wants_write(&self) -> bool {
        self.0.wants_write()
    }

    /// Sends the encrypted bytes that `socket` takes now.
    ///
    /// # Errors
    /// `EAGAIN` when some are left; the errno of `socket`.
    pub(super) fn flush(&mut self, socket: &mut dyn Write) -> Result<(), Errno> {
        while self.0.wants_write() {
            self.0.write_tls(socket).map_err(|error| errno_of(&error))?;
        }
        Ok(())
    }

    /// Encrypts and sends a beginning of `parts`; returns its length. The rest of what is encrypted is
    /// sent by [`flush`](Self::flush).
    ///
    /// # Errors
    /// Those of [`flush`](Self::flush), when nothing was taken.
    pub(super) fn send(
        &mut self,
        parts: &[IoSlice<'_>],
        socket: &mut dyn Write,
    ) -> Result<usize, Errno> {
        self.flush(socket)?;
        let mut taken = 0;
        for part in parts {
            let len = part.len().min(MAX_PLAINTEXT - taken);
            let now = part.get(..len).unwrap_or_default();
            let written = self.0.writer().write(now).map_err(|error| errno_of(&error))?;
            taken += written;
            if written < part.len() {
                break;
            }
        }
        match self.flush(socket) {
            Ok(()) | Err(Errno::AGAIN) => Ok(taken),
            Err(error) => Err(error),
        }
    }

    /// Takes encrypted bytes from `socket`, once.
    pub(super) fn take(&mut self, socket: &mut dyn Read) -> Result<usize, TakeError> {
        let len = self.0.read_tls(socket).map_err(|error| TakeError::Socket(errno_of(&error)))?;
        self.0.process_new_packets().map_err(|error| TakeError::Tls(error.to_string()))?;
        Ok(len)
    }

    /// Takes decrypted bytes into `parts`; 0 at the end of the connection.
    ///
    /// # Errors
    /// `EAGAIN` when there are none; `EPROTO` when the peer's bytes cannot be decrypted; the errno of
    /// `socket`.
    pub(super) fn receive(
        &mut self,
        parts: &mut [IoSliceMut<'_>],
        socket: &mut dyn Read,
    ) -> Result<usize, Errno> {
        loop {
            let mut total = 0;
            for part in parts.iter_mut().filter(|part| !part.is_empty()) {
                match self.0.reader().read(part) {
                    Ok(0) => return Ok(total),
                    Ok(len) => total += len,
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                    // The end without a word of it.
                    Err(_) => return Ok(total),
                }
            }
            if total > 0 {
                return Ok(total);
            }
            match self.take(socket) {
                Ok(_) => {}
                Err(TakeError::Socket(errno)) => return Err(errno),
                Err(TakeError::Tls(_)) => return Err(Errno::PROTO),
            }
        }
    }
}

/// Why encrypted bytes could not be taken.
#[derive(Debug)]
pub(super) enum TakeError {
    Socket(Errno),
    Tls(String),
}

fn errno_of(error: &io::Error) -> Errno {
    match error.kind() {
        io::ErrorKind::WouldBlock => Errno::AGAIN,
        _ => Errno::from_io_error(error).unwrap_or(Errno::IO),
    }
}
