//! TLS on a connection: whom to trust, and the bytes in between.
//!
//! The server's certificate must lead to a known authority and name the host; there is no way around
//! that. Keys that both sides share beforehand (PSK) are not possible with this library.

use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::sync::Arc;

use rustix::io::Errno;
use rustls::pki_types::ServerName;
use rustls::{ClientConfig, ClientConnection};

use super::error::{NbdError, TakeError};
use crate::remote::tls::TlsFiles;

/// The most plaintext that is encrypted at a time: the socket takes about as much.
const MAX_PLAINTEXT: usize = 256 << 10;

/// Whom to trust, and who we are.
#[derive(Clone, Debug)]
pub(super) struct TlsSettings {
    config: Arc<ClientConfig>,
    name: ServerName<'static>,
}

/// The state of one encrypted connection.
#[derive(Debug)]
pub(super) struct TlsSession(ClientConnection);

impl TlsSettings {
    /// Reads `files`. `name` is the host that the server's certificate must name.
    pub(super) fn load(files: &TlsFiles, name: &str) -> Result<Self, NbdError> {
        let name = ServerName::try_from(name.to_owned())
            .map_err(|_| NbdError::TlsSettings(format!("no certificate can name '{name}'")))?;
        let config = files.load().map_err(|error| NbdError::TlsSettings(error.to_string()))?;
        Ok(Self { config: Arc::new(config), name })
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

fn errno_of(error: &io::Error) -> Errno {
    match error.kind() {
        io::ErrorKind::WouldBlock => Errno::AGAIN,
        _ => Errno::from_io_error(error).unwrap_or(Errno::IO),
    }
}
