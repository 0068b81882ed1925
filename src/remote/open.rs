//! Opening: the address says by which protocol the server is asked, and the cache is made. Disks with the
//! same address and keys share one image.

use std::ffi::OsStr;
use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, LazyLock, Weak};
use std::time::Duration;

use parking_lot::Mutex;

use super::RemoteDisk;
use super::base::RemoteBase;
#[cfg(feature = "network")]
use super::bmap;
use super::cache::{Cache, CacheError, CacheRegistry, PlaceLock, PlaceUse};
use super::error::RemoteError;
#[cfg(feature = "network")]
use super::http::{HttpClient, HttpOptions};
use super::image::RemoteImage;
use super::nbd::{Access, NbdClient, NbdOptions, NbdTarget, ServerProgram};
use super::samples::{check_identity, identity_of};
use super::served::ServedImage;
use super::servers::with_server_keys;
use super::tls::TlsFiles;
use super::transport::{Transport, WritableTransport};
use super::writer_guard::{WriterGuard, check_not_written, place_of};
use crate::config::{Protocol, RemoteAddress, RemoteSpec};
use crate::formats::bmap::Bmap;
use crate::host::{is_out_of_space, os_message};
use crate::identity::Identity;

/// The seconds after which a request fails that no server answers; those of the mount.
static IO_TIMEOUT: AtomicU64 = AtomicU64::new(30);

/// Sets the time after which a request fails that no server answers, for the images that this process
/// opens from now on.
pub(crate) fn set_io_timeout(timeout: Duration) {
    IO_TIMEOUT.store(timeout.as_secs(), Ordering::Relaxed);
}

/// The time for which a mount waits for a server that is not up.
const OPEN_TIMEOUT: Duration = Duration::from_secs(3);

/// The time in which a program of this host must have opened its image.
const LOCAL_TIMEOUT: Duration = Duration::from_secs(10);

/// What was fetched, by directory and image.
static CACHES: LazyLock<CacheRegistry> = LazyLock::new(CacheRegistry::default);

/// An image that is open or being opened; locked while its server is asked.
type OpenImage = Arc<Mutex<Weak<RemoteBase>>>;

/// The images that are open.
static OPEN: Mutex<Vec<(RemoteSpec, OpenImage)>> = Mutex::new(Vec::new());

/// An image that is open for reading, and how it is known.
struct Opened {
    transport: Arc<dyn Transport>,
    identity: Identity,
    /// The first bytes, where they came with the answer that said what there is.
    head: Vec<u8>,
    /// The same transport, where the server takes changes.
    writable: Option<Arc<dyn WritableTransport>>,
    /// The map that the user named.
    bmap: Option<Bmap>,
}

/// Opens the image that `spec` describes; waits for the server.
///
/// # Errors
/// [`RemoteError`], for the user.
pub fn open(spec: &RemoteSpec) -> Result<RemoteImage, RemoteError> {
    let image = image_of(spec);
    // Of two disks that begin at once, the second waits for the image of the first.
    let mut image = image.lock();
    // Whoever is about to write to the image has said so, and waits for this lock to count its users.
    check_not_written(&spec.address)?;
    if let Some(base) = image.upgrade() {
        return Ok(RemoteImage::cached(base));
    }
    let base = Arc::new(open_cached(spec)?);
    *image = Arc::downgrade(&base);
    Ok(RemoteImage::cached(base))
}

/// Counts the disks of this process that read the image at `address`. Waits for those that are being
/// opened.
pub(super) fn count_users(address: &RemoteAddress) -> usize {
    let open = OPEN.lock().clone();
    let place = place_of(address);
    let images = open.iter().filter(|(spec, _)| place_of(&spec.address) == place);
    let bases = images.filter_map(|(_, image)| image.lock().upgrade());
    bases.map(|base| base.users.load(Ordering::SeqCst)).sum()
}

/// Returns the place of the image that `spec` describes. Waits for no server.
fn image_of(spec: &RemoteSpec) -> OpenImage {
    // Who gives no keys, and no query where one is not recorded, takes the image as it is.
    let has_no_keys = *spec == RemoteSpec::new(spec.address.clone());
    let takes_any = has_no_keys && spec.address.query().is_none();
    let is_same = |other: &RemoteSpec| {
        other == spec
            || (has_no_keys && other.address == spec.address)
            || (takes_any && other.address.is_same_place(&spec.address))
    };
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

/// Makes `base` the image that disks with `spec` share from now on.
pub(super) fn replace_open(spec: &RemoteSpec, base: &Arc<RemoteBase>) {
    let image = image_of(spec);
    *image.lock() = Arc::downgrade(base);
}

/// Opens the image that `spec` describes for changes; waits for the server.
///
/// # Errors
/// [`RemoteError`], for the user.
pub fn open_writable(spec: &RemoteSpec) -> Result<Arc<RemoteDisk>, RemoteError> {
    if spec.address.protocol() == Protocol::Http {
        let why = "an image behind HTTP is only read: take mode=ro or an overlay";
        return Err(refused(&spec.address, why));
    }
    let guard = WriterGuard::new(&spec.address)?;
    if count_users(&spec.address) > 0 {
        let why = "another disk of this mount has it as its base, and mode=rw would change that";
        return Err(RemoteError::Refused { address: spec.address.clone(), why: why.to_owned() });
    }
    let client = Arc::new(connect_nbd(spec, Access::ReadWrite)?);
    let place = match &spec.read_cache {
        Some(dir) => Some(discard_kept(spec, dir, &*client)?),
        None => None,
    };
    let disk = RemoteDisk::new(spec.clone(), client.clone(), Some(guard))
        .map_err(|error| unreadable(&spec.address, &error))?;
    disk.hold_place(place);
    client.set_identity_check(disk.identity_check());
    Ok(Arc::new(disk))
}

fn open_cached(spec: &RemoteSpec) -> Result<RemoteBase, RemoteError> {
    let Opened { transport, identity, head, writable, bmap } = match spec.address.protocol() {
        Protocol::Nbd => open_nbd(spec)?,
        Protocol::Http => open_http(spec)?,
    };
    let base = base_over(spec, identity, transport, bmap.as_ref())?;
    base.keep_head(head)
        .map_err(|_| refused(&spec.address, "its first bytes do not match what its bmap says"))?;
    let base = base.with_writable(writable);
    match &spec.trace {
        Some(file) => base.with_trace(file).map_err(|why| {
            let address = spec.address.clone();
            RemoteError::Refused { address, why: format!("its trace '{}': {why}", file.display()) }
        }),
        None => Ok(base),
    }
}

/// Discards what is kept in `dir` of the image behind `transport`, which is about to be changed. Returns
/// the lock under which nobody keeps it again.
fn discard_kept(
    spec: &RemoteSpec,
    dir: &Path,
    transport: &dyn Transport,
) -> Result<PlaceLock, RemoteError> {
    let address = &spec.address;
    let no_cache = |error: CacheError| refused(address, &format!("its read cache: {error}"));
    let lock = PlaceLock::take(dir, address.as_str(), PlaceUse::Change).map_err(no_cache)?;
    let lock = lock.ok_or_else(|| in_use(spec))?;
    let identity = identity_of(transport).map_err(|error| unreadable(address, &error))?;
    let no_place = |why: String| RemoteError::Cache { address: address.clone(), why };
    let (known_by, size) = (known_by(address, &identity, None), transport.size());
    let cache = CACHES.open(Some(dir), &known_by, size, spec.read_cache_size);
    let cache = cache.map_err(|error| no_place(error.to_string()))?;
    discard(spec, &cache)?;
    Ok(lock)
}

/// Takes `lock`, under which an image is kept, for who changes it.
///
/// # Errors
/// [`RemoteError::Refused`] while another mount keeps an image of the address.
pub(super) fn lock_for_change(spec: &RemoteSpec, lock: &PlaceLock) -> Result<(), RemoteError> {
    let is_ours = lock.change(PlaceUse::Change);
    if matches!(is_ours, Ok(true)) {
        return Ok(());
    }
    // The attempt has given up the old lock.
    match lock.change(PlaceUse::Keep) {
        Ok(true) => {}
        _ => log::warn!("'{}': what is kept of it is not locked any more", spec.address),
    }
    Err(in_use(spec))
}

/// Returns the error of a change while others keep the image.
fn in_use(spec: &RemoteSpec) -> RemoteError {
    let dir = spec.read_cache.as_deref().unwrap_or(Path::new("")).display();
    let why = format!(
        "its read cache '{dir}' cannot be emptied before the image is changed: another mount uses it, \
         or there is no room: unmount that"
    );
    RemoteError::Refused { address: spec.address.clone(), why }
}

/// Discards `cache`, the cache of the image that `spec` describes, which is about to be changed.
///
/// # Errors
/// [`RemoteError::Refused`] when what its directory holds may be found again.
pub(super) fn discard(spec: &RemoteSpec, cache: &Cache) -> Result<(), RemoteError> {
    let failed = |why| RemoteError::Refused { address: spec.address.clone(), why };
    if spec.read_cache.is_some() && !cache.is_persistent() {
        return Err(in_use(spec));
    }
    cache.discard().map_err(|error| {
        failed(format!("its read cache cannot be emptied: {}", os_message(&error)))
    })
}

/// Returns what the cache of an image is known by: the address as well, for the samples of two images may
/// be the same. What was compared with a bmap is kept apart.
fn known_by(address: &RemoteAddress, identity: &Identity, bmap: Option<&Bmap>) -> Vec<u8> {
    let mut known_by = format!("{address}\n{}", identity.hash).into_bytes();
    if let Some(bmap) = bmap {
        known_by.extend_from_slice(b"\nbmap ");
        known_by.extend_from_slice(&bmap.digest);
    }
    known_by
}

/// Makes the base of the image behind `transport`, which was opened with `spec`, and with `bmap` if that
/// names one.
pub(super) fn base_over(
    spec: &RemoteSpec,
    identity: Identity,
    transport: Arc<dyn Transport>,
    bmap: Option<&Bmap>,
) -> Result<RemoteBase, RemoteError> {
    let address = &spec.address;
    let no_place =
        |error: CacheError| RemoteError::Cache { address: address.clone(), why: error.to_string() };
    let known_by = known_by(address, &identity, bmap);
    let mut dir = spec.read_cache.as_deref();
    let mut lock = None;
    if let Some(kept) = dir {
        lock = lock_to_keep(kept, address).map_err(no_place)?;
        dir = dir.filter(|_| lock.is_some());
    }
    let cache = CACHES.open(dir, &known_by, transport.size(), spec.read_cache_size);
    let cache = cache.map_err(no_place)?;
    let base = RemoteBase::new(spec, identity, transport, cache, bmap);
    let base = base.map_err(|error| refused(address, &os_message(&error)))?;
    Ok(base.with_place_lock(lock))
}

/// Returns the lock under which `dir` keeps the image at `address`; `None`, with a warning, where it cannot
/// keep it.
fn lock_to_keep(dir: &Path, address: &RemoteAddress) -> Result<Option<PlaceLock>, CacheError> {
    let why = match PlaceLock::take(dir, address.as_str(), PlaceUse::Keep) {
        Err(CacheError::Dir { error, .. }) if is_out_of_space(&error) => os_message(&error),
        Ok(None) => format!("another mount changes the image '{address}'"),
        taken => return taken,
    };
    log::warn!("read cache '{}': {why}: a temporary file is used", dir.display());
    Ok(None)
}

fn open_nbd(spec: &RemoteSpec) -> Result<Opened, RemoteError> {
    let address = &spec.address;
    let client = connect_nbd(spec, Access::ReadOnly)?;
    let identity = identity_of(&client).map_err(|error| unreadable(&spec.address, &error))?;
    if client.tail() > 0 {
        let tail = client.tail();
        log::warn!(
            "'{address}': its server may refuse to read the last {tail} bytes: they are less than a block of it"
        );
    }
    client.set_identity_check(check_identity(&client, &identity));
    let client = Arc::new(client);
    let writable = client.is_writable().then(|| Arc::clone(&client) as Arc<dyn WritableTransport>);
    Ok(Opened { transport: client, identity, head: Vec::new(), writable, bmap: None })
}

#[cfg(not(feature = "network"))]
fn open_http(spec: &RemoteSpec) -> Result<Opened, RemoteError> {
    Err(refused(&spec.address, super::NO_NETWORK))
}

#[cfg(feature = "network")]
fn open_http(spec: &RemoteSpec) -> Result<Opened, RemoteError> {
    let spec = &with_server_keys(spec);
    let address = &spec.address;
    let (io_timeout, open_timeout) = timeouts();
    let options = HttpOptions {
        io_timeout,
        open_timeout,
        connections: spec.conns,
        tls: tls_files(spec),
        auth: spec.auth.clone(),
        dir: spec.dir.clone(),
    };
    let opened = HttpClient::open(address, &options);
    let (client, head) = opened.map_err(|error| refused(&spec.address, &error.to_string()))?;
    let load = |source| bmap::load(source, address, &options, client.size());
    let bmap = spec.bmap.as_ref().map(load).transpose();
    let bmap = bmap.map_err(|why| RemoteError::Refused { address: address.clone(), why })?;
    let mut identity = identity_of(&client).map_err(|error| unreadable(&spec.address, &error))?;
    if client.version().is_none() {
        identity.mtime = client.modified().map(|secs| crate::identity::Mtime { secs, nanos: 0 });
        let time = if identity.mtime.is_some() { "its time" } else { "no time" };
        log::warn!(
            "'{address}': its server names no version of the image (a strong ETag): another one is noticed \
             by its size, {time}, and samples when it is mounted"
        );
    }
    Ok(Opened { transport: Arc::new(client), identity, head, writable: None, bmap })
}

/// Starts `program`, which becomes the server of an image of this host, and opens that. `shown` is for
/// messages.
///
/// # Errors
/// Text without `shown`: what is wrong, or the last words of the program.
pub(crate) fn serve(program: ServerProgram, shown: &str) -> Result<ServedImage, String> {
    let (io_timeout, _) = timeouts();
    let options = NbdOptions {
        io_timeout,
        open_timeout: io_timeout.min(LOCAL_TIMEOUT),
        connections: 1,
        access: Access::ReadOnly,
        tls: TlsFiles::default(),
        dir: program.dir.clone(),
    };
    match NbdClient::start_program(program, shown, options) {
        Ok(client) => Ok(ServedImage::new(Box::new(client))),
        Err(error) => Err(error.cause.to_string()),
    }
}

fn connect_nbd(spec: &RemoteSpec, access: Access) -> Result<NbdClient, RemoteError> {
    let spec = &with_server_keys(spec);
    let address = &spec.address;
    let target = NbdTarget::parse(OsStr::new(address.as_str())).map_err(|error| {
        RemoteError::Address { address: address.clone(), why: error.to_string() }
    })?;
    let (io_timeout, open_timeout) = timeouts();
    let options = NbdOptions {
        io_timeout,
        open_timeout,
        connections: usize::try_from(spec.conns).unwrap_or(1),
        access,
        tls: tls_files(spec),
        dir: spec.dir.clone(),
    };
    NbdClient::open(&target, options)
        .map_err(|error| refused(&spec.address, &error.cause.to_string()))
}

/// Returns how long a request may take, and how long a server is waited for that is not up.
fn timeouts() -> (Duration, Duration) {
    let io_timeout = Duration::from_secs(IO_TIMEOUT.load(Ordering::Relaxed));
    (io_timeout, io_timeout.min(OPEN_TIMEOUT))
}

fn tls_files(spec: &RemoteSpec) -> TlsFiles {
    TlsFiles {
        authorities: spec.tls_ca.clone(),
        identity: spec.tls_cert.clone().zip(spec.tls_key.clone()),
    }
}

fn refused(address: &RemoteAddress, why: &str) -> RemoteError {
    RemoteError::Server { address: address.clone(), why: why.to_owned() }
}

/// Returns the error of an image that cannot be read.
pub(super) fn unreadable(address: &RemoteAddress, error: &io::Error) -> RemoteError {
    refused(address, &format!("it cannot be read: {}", os_message(error)))
}
