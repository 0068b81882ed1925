//! Reading the file of a bmap, from this host or from a server.

use std::path::Path;

use crate::config::{BmapSource, RemoteAddress, RemoteSpec};
use crate::formats::bmap::{Bmap, MAX_FILE_LEN};
use crate::host::os_message;
use crate::remote::http::{HttpOptions, is_same_origin, read_file};
use crate::remote::servers::with_server_keys;
use crate::remote::tls::TlsFiles;
use crate::{confined, trusted_path};

/// Reads the bmap at `source` of the image of `size` bytes at `image`, which is opened with `options`.
///
/// # Errors
/// A line for the user, without the image.
pub(in crate::remote) fn load(
    source: &BmapSource,
    image: &RemoteAddress,
    options: &HttpOptions,
    size: u64,
) -> Result<Bmap, String> {
    let bytes = match source {
        BmapSource::File(file) => read_local(file),
        BmapSource::Url(address) => {
            let options = options_for(address, image, options);
            read_file(address, &options, MAX_FILE_LEN).map_err(|error| error.to_string())
        }
    };
    let map = bytes.and_then(|bytes| Bmap::parse(&bytes).map_err(|error| error.to_string()));
    let map = map.map_err(|why| format!("its bmap '{source}': {why}"))?;
    match map.image_size == size {
        true => Ok(map),
        false => Err(format!(
            "its bmap '{source}' is of another image: of {} bytes, and this one has {size}",
            map.image_size
        )),
    }
}

/// Reads a file of this host. It decides which bytes are taken for right, so no other user must have made
/// it what it is.
fn read_local(file: &Path) -> Result<Vec<u8>, String> {
    let read = || {
        let opened = trusted_path::open_input(file)?;
        if !opened.metadata()?.is_file() {
            return Err(confined::invalid_input("it is no regular file"));
        }
        trusted_path::check_file(&opened)?;
        confined::read_to_limit(&opened, MAX_FILE_LEN)
    };
    read().map_err(|error| match error.raw_os_error() {
        Some(libc::EFBIG) => format!("it has more than {} MiB", MAX_FILE_LEN >> 20),
        _ => os_message(&error),
    })
}

/// Returns how `address` is asked: as the image is, without what makes us known where that is another host.
fn options_for(
    address: &RemoteAddress,
    image: &RemoteAddress,
    options: &HttpOptions,
) -> HttpOptions {
    if is_same_origin(address, image) {
        return options.clone();
    }
    let known = with_server_keys(&RemoteSpec::new(address.clone()));
    let authorities = known.tls_ca.or_else(|| options.tls.authorities.clone());
    let tls = TlsFiles { authorities, identity: known.tls_cert.zip(known.tls_key) };
    HttpOptions { auth: known.auth, dir: known.dir, tls, ..options.clone() }
}
