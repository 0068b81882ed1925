//! A short file beside an image, read as a whole.

use super::client::{HttpClient, HttpOptions};
use super::error::HttpError;
use super::url::HttpUrl;
use crate::config::RemoteAddress;
use crate::host::os_message;
use crate::remote::answer::read_range;
use crate::remote::transport::Transport;

/// Reads the file at `address`, of at most `limit` bytes, by ranges as an image is read.
///
/// # Errors
/// [`HttpError`].
pub(crate) fn read_file(
    address: &RemoteAddress,
    options: &HttpOptions,
    limit: u64,
) -> Result<Vec<u8>, HttpError> {
    let (client, mut bytes) = HttpClient::open(address, options)?;
    let size = client.size();
    if size > limit {
        return Err(HttpError::LongFile { size, limit });
    }
    let rest = bytes.len() as u64..size;
    if !rest.is_empty() {
        let more = read_range(&client, &rest);
        bytes.extend(more.map_err(|error| HttpError::Broken(os_message(&error)))?);
    }
    Ok(bytes)
}

/// Whether two addresses have the same scheme, host and port, so that what makes us known at one of them
/// may be sent to the other.
pub(crate) fn is_same_origin(one: &RemoteAddress, other: &RemoteAddress) -> bool {
    match (HttpUrl::parse(one), HttpUrl::parse(other)) {
        (Ok(one), Ok(other)) => one.is_same_origin(&other),
        _ => false,
    }
}
