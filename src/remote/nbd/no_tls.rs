//! What stands in for [TLS](super::tls) in a build without the feature `network`: there are no settings,
//! and so no sessions.

use std::convert::Infallible;
use std::io::{IoSlice, IoSliceMut, Read, Write};

use rustix::io::Errno;

use super::error::{NbdError, TakeError};
use crate::remote::NO_NETWORK;
use crate::remote::tls::TlsFiles;

/// Settings that cannot be.
#[derive(Clone, Debug)]
pub(super) struct TlsSettings(Infallible);

/// A session that cannot be.
#[derive(Debug)]
pub(super) struct TlsSession(Infallible);

impl TlsSettings {
    /// Refuses.
    pub(super) fn load(_files: &TlsFiles, _name: &str) -> Result<Self, NbdError> {
        Err(NbdError::TlsSettings(NO_NETWORK.to_owned()))
    }
}

impl TlsSession {
    pub(super) fn new(settings: &TlsSettings) -> Result<Self, NbdError> {
        match settings.0 {}
    }

    pub(super) fn is_handshaking(&self) -> bool {
        match self.0 {}
    }

    pub(super) fn wants_write(&self) -> bool {
        match self.0 {}
    }

    pub(super) fn flush(&mut self, _socket: &mut dyn Write) -> Result<(), Errno> {
        match self.0 {}
    }

    pub(super) fn send(
        &mut self,
        _parts: &[IoSlice<'_>],
        _socket: &mut dyn Write,
    ) -> Result<usize, Errno> {
        match self.0 {}
    }

    pub(super) fn take(&mut self, _socket: &mut dyn Read) -> Result<usize, TakeError> {
        match self.0 {}
    }

    pub(super) fn receive(
        &mut self,
        _parts: &mut [IoSliceMut<'_>],
        _socket: &mut dyn Read,
    ) -> Result<usize, Errno> {
        match self.0 {}
    }
}
