//! Boot tags, which distinguish a daemon that died from a power cut.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use uuid::Uuid;

use super::record::BootTag;
use crate::host::file_system::HostFs;

/// The bit that marks a tag made from a mount id, so that it never equals one made from an inode.
const MOUNT_ID_BIT: u64 = 1 << 63;

/// Returns the current tag for files on the file system of `dir`.
///
/// The tag is the boot id mixed with the device number and the superblock's instance: the inode
/// number of `/sys/fs/{ext4,xfs}/DEV` or `/sys/fs/btrfs/FSID`, which is new for every superblock
/// and the same in every mount namespace. On other file systems the instance is the unique id of
/// the mount (statx(2), `STATX_MNT_ID_UNIQUE`), which is new for every mount: a remount is then
/// treated as a power cut, which is safe.
///
/// # Errors
/// The host's errno when `/proc`, `/sys` or `dir` cannot be read: a tag of another kind would make a
/// power cut of every kill, and recovery would drop what was not synced.
pub fn current(dir: &File) -> io::Result<BootTag> {
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
    let boot = Uuid::parse_str(boot.trim()).map_err(io::Error::other)?;
    let (high, low) = boot.as_u64_pair();
    let dev = dir.metadata()?.dev();
    let instance = match superblock_inode(dir, dev)? {
        Some(inode) => inode,
        None => mount_id(dir)? | MOUNT_ID_BIT,
    };
    Ok(BootTag([high ^ dev, low ^ instance]))
}

/// Returns the inode number of the file system's directory in sysfs.
fn superblock_inode(dir: &File, dev: u64) -> io::Result<Option<u64>> {
    let path = match sysfs_name(dir)? {
        None => return Ok(None),
        Some("btrfs") => match if_supported(btrfs_uuid(dir))? {
            Some(uuid) => PathBuf::from(format!("/sys/fs/btrfs/{uuid}")),
            None => return Ok(None),
        },
        Some(name) => {
            let (major, minor) = (rustix::fs::major(dev), rustix::fs::minor(dev));
            let link = if_supported(fs::read_link(format!("/sys/dev/block/{major}:{minor}")))?;
            match link.as_deref().and_then(Path::file_name) {
                Some(device) => Path::new("/sys/fs").join(name).join(device),
                None => return Ok(None),
            }
        }
    };
    Ok(if_supported(fs::metadata(path))?.map(|found| found.ino()))
}

/// Returns `None` for an error by which the kernel says that it has no such thing, now or later. Any
/// other error may be gone with the next call.
fn if_supported<T>(result: io::Result<T>) -> io::Result<Option<T>> {
    match result.map_err(|error| (error.raw_os_error(), error)) {
        Ok(value) => Ok(Some(value)),
        Err((Some(libc::ENOENT | libc::ENOTDIR | libc::ENOTTY), _))
        | Err((Some(libc::EOPNOTSUPP | libc::EINVAL | libc::ENOSYS), _)) => Ok(None),
        Err((_, error)) => Err(error),
    }
}

/// Returns the name of the directory in sysfs for the file system type of `dir`, if there is one.
fn sysfs_name(dir: &File) -> io::Result<Option<&'static str>> {
    let name = HostFs::of(dir)?.name;
    Ok(matches!(name, "ext4" | "xfs" | "btrfs").then_some(name))
}

/// Returns the file system's uuid by `BTRFS_IOC_FS_INFO` (linux/btrfs.h): two u64, then its 16
/// bytes.
fn btrfs_uuid(dir: &File) -> io::Result<Uuid> {
    const BTRFS_IOC_FS_INFO: libc::c_ulong = 0x8400_941F;
    let mut info = [0u8; 1024];
    // SAFETY: the ioctl fills at most 1,024 bytes, the size of `info`.
    let done =
        unsafe { libc::ioctl(dir.as_fd().as_raw_fd(), BTRFS_IOC_FS_INFO, info.as_mut_ptr()) };
    if done != 0 {
        return Err(io::Error::last_os_error());
    }
    Uuid::from_slice(&info[16..32]).map_err(io::Error::other)
}

/// Returns the mount's id, unique since boot (Linux 6.8), or its reusable id on older kernels.
fn mount_id(dir: &File) -> io::Result<u64> {
    const STATX_MNT_ID_UNIQUE: u32 = 0x4000;
    for mask in [STATX_MNT_ID_UNIQUE, libc::STATX_MNT_ID] {
        // SAFETY: `statx` is a plain C struct for which all zeros is a valid value.
        let mut found: libc::statx = unsafe { std::mem::zeroed() };
        // SAFETY: the path is an empty C string and `found` outlives the call.
        let done = unsafe {
            libc::statx(dir.as_raw_fd(), c"".as_ptr(), libc::AT_EMPTY_PATH, mask, &raw mut found)
        };
        if done != 0 {
            return Err(io::Error::last_os_error());
        }
        if found.stx_mask & mask != 0 {
            return Ok(found.stx_mnt_id);
        }
    }
    Err(io::Error::from(io::ErrorKind::Unsupported))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tag_stays_the_same_within_one_boot_and_mount() {
        let dir = tempfile::tempdir().unwrap();
        let dir = File::open(dir.path()).unwrap();
        assert_eq!(current(&dir).unwrap(), current(&dir).unwrap());
    }

    #[test]
    fn another_file_system_has_another_tag() {
        let here = File::open("/").unwrap();
        let there = File::open("/dev/shm").unwrap();
        assert_ne!(current(&here).unwrap(), current(&there).unwrap());
    }
}
