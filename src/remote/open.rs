//! Opening: the address is parsed, the server asked, and the cache made. Disks with the same address
//! and keys share one image.

use std::ffi::OsStr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, LazyLock, Weak};
use std::time::Duration;

use parking_lot::Mutex;

use super::RemoteDisk;
use super::base::RemoteBase;
use super::cache::{CacheError, CacheRegistry};
use super::error::RemoteError;
use super::image::{check_identity, identity_of};
use super::nbd::{Access, NbdClient, NbdOptions, NbdTarget, TlsFiles};
use super::transport::Transport;
use crate::config::{RemoteAddress, RemoteSpec};

/// The seconds after which a request fails that no server answers; those of the mount.
static IO_TIMEOUT: AtomicU64 = AtomicU64::new(30);

/// Sets the time after which a request fails that no server answers, for the images that this process
/// opens from now on.
pub(crate) fn set_io_timeout(timeout: Duration) {
    IO_TIMEOUT.store(timeout.as_secs(), Ordering::Relaxed);
}

/// The time for which a mount waits for a server that is not up.
const OPEN_TIMEOUT: Duration = Duration::from_secs(3);

/// What was fetched, by directory and image.
static CACHES: LazyLock<CacheRegistry> = LazyLock::new(CacheRegistry::default);

/// An image that is open or being opened; locked while its server is asked.
type OpenImage = Arc<Mutex<Weak<RemoteBase>>>;

/// The images that are open.
static OPEN: Mutex<Vec<(RemoteSpec, OpenImage)>> = Mutex::new(Vec::new());

/// Opens the image that `spec` describes; waits for the server.
///
/// # Errors
/// [`RemoteError`], for the user.
pub fn open(spec: &RemoteSpec) -> Result<Arc<RemoteBase>, RemoteError> {
    let image = image_of(spec);
    // Of two disks that begin at once, the second waits for the image of the first.
    let mut image = image.lock();
    if let Some(base) = image.upgrade() {
        return Ok(base);
    }
    let base = Arc::new(open_cached(spec)?);
    *image = Arc::downgrade(&base);
    Ok(base)
}

/// Returns the place of the image that `spec` describes. Waits for no server.
fn image_of(spec: &RemoteSpec) -> OpenImage {
    // Who gives no keys takes the image as it is.
    let has_no_keys = *spec == RemoteSpec::new(spec.address.clone());
    let is_same =
        |other: &RemoteSpec| other == spec || (has_no_keys && other.address == spec.address);
    let is_used = |image: &OpenImage| {
        let is_open = |image: &Weak<RemoteBase>| image.strong_count() > 0;
        Arc::strong_count(image) > 1 || image.try_lock().is_none_or(|image| is_open(&image))
    };
    let mut open = OPEN.lock();
    open.retain(|(_, image)| is_used(image));
    if let Some((_, image)) = open.iter().find(|(other, _)| is_same(other)) {
        return Arc::clone(image);
    }
    let image = OpenImage::default();
    open.push((spec.clone(), Arc::clone(&image)));
    image
}

/// Opens the image that `spec` describes for changes; waits for the server.
///
/// # Errors
/// [`RemoteError`], for the user.
pub fn open_writable(spec: &RemoteSpec) -> Result<Arc<RemoteDisk>, RemoteError> {
    let client = Arc::new(connect(spec, Access::ReadWrite)?);
    let disk = RemoteDisk::new(spec.address.clone(), client.clone())
        .map_err(|error| unreadable(&spec.address, &error))?;
    client.set_identity_check(disk.identity_check());
    Ok(Arc::new(disk))
}

fn open_cached(spec: &RemoteSpec) -> Result<RemoteBase, RemoteError> {
    let address = &spec.address;
    let client = connect(spec, Access::ReadOnly)?;
    let identity = identity_of(&client).map_err(|error| unreadable(address, &error))?;
    if client.tail() > 0 {
        let tail = client.tail();
        log::warn!(
            "'{address}': its server may refuse to read the last {tail} bytes: they are less than a block of it"
        );
    }
    client.set_identity_check(check_identity(&client, &identity));
    let no_place =
        |error: CacheError| RemoteError::Cache { address: address.clone(), why: error.to_string() };
    // The address as well: the samples of two images may be the same.
    let known_by = format!("{address}\n{}", identity.hash);
    let dir = spec.read_cache.as_deref();
    let cache = CACHES.open(dir, known_by.as_bytes(), client.size(), spec.read_cache_size);
    Ok(RemoteBase::new(spec, identity, Arc::new(client), cache.map_err(no_place)?))
}

fn unreadable(address: &RemoteAddress, error: &std::io::Error) -> RemoteError {
    let why = format!("it cannot be read: {}", crate::host::os_message(error));
    RemoteError::Server { address: address.clone(), why }
}

fn connect(spec: &RemoteSpec, access: Access) -> Result<NbdClient, RemoteError> {
    let address = &spec.address;
    let target = NbdTarget::parse(OsStr::new(address.as_str())).map_err(|error| {
        RemoteError::Address { address: address.clone(), why: error.to_string() }
    })?;
    let io_timeout = Duration::from_secs(IO_TIMEOUT.load(Ordering::Relaxed));
    let options = NbdOptions {
        io_timeout,
        open_timeout: io_timeout.min(OPEN_TIMEOUT),
        connections: usize::try_from(spec.conns).unwrap_or(1),
        access,
        tls: TlsFiles {
            authorities: spec.tls_ca.clone(),
            identity: spec.tls_cert.clone().zip(spec.tls_key.clone()),
        },
        dir: spec.dir.clone(),
    };
    NbdClient::open(&target, options).map_err(|error| RemoteError::Server {
        address: address.clone(),
        why: error.cause.to_string(),
    })
}
