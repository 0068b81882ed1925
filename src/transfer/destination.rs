//! The path at which a file is to be received: nothing, a file or a device.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use super::TransferError;
use crate::base::lock;
use crate::trusted_path;

/// The file that is at a path before anything is received there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Destination {
    /// Nothing yet.
    Missing(PathBuf),
    /// A file, with its owner and mode. The path is the target of a link.
    File(PathBuf, FileOwner),
    /// A block device.
    Device(PathBuf),
}

/// The owner and the permission bits of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct FileOwner {
    mode: u32,
    uid: u32,
    gid: u32,
}

impl Destination {
    /// Examines `path`.
    ///
    /// # Errors
    /// A line for the user if nothing can be received there.
    pub(super) fn of(path: &Path) -> Result<Self, TransferError> {
        let failed = |error: io::Error| TransferError::host("write", path, &error);
        let refused = |what: &str| {
            let path = path.display();
            let remedy = "name a file or a block device";
            Err(TransferError::Refused(format!("'{path}' is {what}: {remedy}")))
        };
        let located = match trusted_path::locate(path) {
            Ok(located) => located,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return match fs::symlink_metadata(path) {
                    Ok(_) => refused("a link to nothing"),
                    Err(_) if path.file_name().is_none() => refused("no name of a file"),
                    Err(_) if path.as_os_str().as_encoded_bytes().ends_with(b"/") => {
                        refused("the name of a directory")
                    }
                    Err(_) => Ok(Self::Missing(path.to_owned())),
                };
            }
            Err(error) => return Err(failed(error)),
        };
        let meta = located.metadata();
        let kind = meta.file_type();
        let real = located.real_path().map_err(failed)?;
        if kind.is_block_device() {
            return Ok(Self::Device(real));
        }
        if kind.is_file() {
            let unused = lock::check_unused(&located, path);
            unused.map_err(|error| TransferError::Refused(error.to_string()))?;
            let owner = FileOwner { mode: meta.mode() & 0o777, uid: meta.uid(), gid: meta.gid() };
            return Ok(Self::File(real, owner));
        }
        refused(if kind.is_dir() { "a directory" } else { "no file" })
    }
}

impl FileOwner {
    /// Returns those of `file`.
    ///
    /// # Errors
    /// The errno of fstat(2).
    pub(super) fn of(file: &File) -> io::Result<Self> {
        let meta = file.metadata()?;
        Ok(Self { mode: meta.mode() & 0o777, uid: meta.uid(), gid: meta.gid() })
    }

    /// Gives `file` this owner, as far as this process may, and this mode.
    ///
    /// # Errors
    /// The errno of fchmod(2).
    pub(super) fn apply_to(self, file: &File) -> io::Result<()> {
        // Only root can give files away. Otherwise the mode alone is kept.
        let _ = std::os::unix::fs::fchown(file, Some(self.uid), Some(self.gid));
        file.set_permissions(fs::Permissions::from_mode(self.mode))
    }
}
