//! Reading the files of TLS.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ClientConfig, ConfigBuilder, RootCertStore, WantsVerifier};

use super::TlsFiles;
use crate::confined::{self, FileAccess};
use crate::host::os_message;
use crate::trusted_path;

/// Where systems keep the authorities that they trust.
const SYSTEM_AUTHORITIES: [&str; 4] = [
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/cert.pem",
];

/// The longest file of certificates or keys in bytes; a system's list of authorities has 250 KiB.
const MAX_FILE_LEN: u64 = 4 << 20;

/// The reason why the files of TLS cannot be used; one line.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub(in crate::remote) struct TlsFileError(String);

impl TlsFiles {
    /// Reads the files.
    ///
    /// # Errors
    /// [`TlsFileError`].
    pub(in crate::remote) fn load(&self) -> Result<ClientConfig, TlsFileError> {
        let failed = |text: String| TlsFileError(text);
        let builder = builder()?.with_root_certificates(self.roots()?);
        let Some((certificate, key)) = &self.identity else {
            return Ok(builder.with_no_client_auth());
        };
        let chain = certificates(certificate, Place::Named)?;
        let key_der = PrivateKeyDer::from_pem_slice(&read_pem(key, Place::Named)?)
            .map_err(|error| failed(format!("the key '{}': {error}", key.display())))?;
        builder.with_client_auth_cert(chain, key_der).map_err(|error| {
            failed(format!("the certificate '{}': {error}", certificate.display()))
        })
    }

    /// Returns settings for what is not encrypted: no certificate is trusted.
    ///
    /// # Errors
    /// [`TlsFileError`].
    pub(in crate::remote) fn trust_nobody() -> Result<ClientConfig, TlsFileError> {
        Ok(builder()?.with_root_certificates(RootCertStore::empty()).with_no_client_auth())
    }

    fn roots(&self) -> Result<RootCertStore, TlsFileError> {
        let system = || SYSTEM_AUTHORITIES.iter().map(PathBuf::from).find(|path| path.exists());
        let nothing = "this system has no list of authorities: name one with tls-ca=";
        let named = self.authorities.clone().map(|path| (path, Place::Named));
        let file = named.or_else(|| Some((system()?, Place::OfSystem)));
        let (file, place) = file.ok_or_else(|| TlsFileError(nothing.to_owned()))?;
        let mut roots = RootCertStore::empty();
        let (added, _) = roots.add_parsable_certificates(certificates(&file, place)?);
        match added {
            0 => Err(TlsFileError(format!("'{}' has no authority", file.display()))),
            _ => Ok(roots),
        }
    }
}

fn builder() -> Result<ConfigBuilder<ClientConfig, WantsVerifier>, TlsFileError> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| TlsFileError(error.to_string()))
}

/// Where a file was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    /// Where the user has named it: it is a secret, or decides whom to trust, so no other user must
    /// have made it what it is.
    Named,
    /// Where the system has its own; in a user namespace these seem to be nobody's.
    OfSystem,
}

/// Reads a regular file of at most [`MAX_FILE_LEN`] bytes, which is never waited for. One without a
/// length is refused, since those of /proc have none and may wait.
fn read_pem(file: &Path, place: Place) -> Result<Vec<u8>, TlsFileError> {
    let failed = |error: io::Error| {
        TlsFileError(format!("the file '{}': {}", file.display(), os_message(&error)))
    };
    let opened = match place {
        Place::Named => trusted_path::open_input(file),
        Place::OfSystem => confined::open_input(file, FileAccess::Read),
    };
    let opened = opened.map_err(failed)?;
    if place == Place::Named {
        trusted_path::check_file(&opened).map_err(failed)?;
    }
    if opened.metadata().map_err(failed)?.len() == 0 {
        return Err(TlsFileError(format!("the file '{}' is empty", file.display())));
    }
    confined::read_to_limit(&opened, MAX_FILE_LEN).map_err(failed)
}

fn certificates(file: &Path, place: Place) -> Result<Vec<CertificateDer<'static>>, TlsFileError> {
    let failed = |error| TlsFileError(format!("the file '{}': {error}", file.display()));
    let bytes = read_pem(file, place)?;
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&bytes).collect();
    let found = found.map_err(failed)?;
    match found.is_empty() {
        true => Err(TlsFileError(format!("'{}' has no certificate", file.display()))),
        false => Ok(found),
    }
}
