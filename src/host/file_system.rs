//! The kind and the features of the file system that a host file lies on.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

use rustix::fs::{FallocateFlags, Mode, OFlags, SeekFrom};

/// What a file system depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FsKind {
    /// A device of this machine. Queries about extents need no other process or host.
    Local,
    /// Memory: lost at a reboot, and counted as used memory.
    Memory,
    /// Another host or process, or unknown: every call may wait for ever.
    Remote,
    /// The kernel alone: its files are not stored anywhere.
    Pseudo,
}

/// The file system of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostFs {
    /// The name that mount(8) uses; `unknown` for an unlisted file system.
    pub name: &'static str,
    /// What the file system depends on.
    pub kind: FsKind,
}

/// Magic numbers of statfs(2), from linux/magic.h and the file systems' own headers.
const KNOWN_FILE_SYSTEMS: &[(u64, &str, FsKind)] = &[
    (0xef53, "ext4", FsKind::Local),
    (0x5846_5342, "xfs", FsKind::Local),
    (0x9123_683e, "btrfs", FsKind::Local),
    (0xf2f5_2010, "f2fs", FsKind::Local),
    (0x2fc1_2fc1, "zfs", FsKind::Local),
    (0xca45_1a4e, "bcachefs", FsKind::Local),
    (0x3153_464a, "jfs", FsKind::Local),
    (0x4d44, "vfat", FsKind::Local),
    (0x2011_bab0, "exfat", FsKind::Local),
    (0x7366_746e, "ntfs3", FsKind::Local),
    (0x9660, "iso9660", FsKind::Local),
    (0x7371_7368, "squashfs", FsKind::Local),
    (0xe0f5_e1e2, "erofs", FsKind::Local),
    (0x0102_1994, "tmpfs", FsKind::Memory),
    (0x8584_58f6, "ramfs", FsKind::Memory),
    // Its layers may lie on any file system.
    (0x794c_7630, "overlay", FsKind::Remote),
    (0x6573_5546, "fuse", FsKind::Remote),
    (0x6969, "nfs", FsKind::Remote),
    (0xff53_4d42, "cifs", FsKind::Remote),
    (0xfe53_4d42, "smb2", FsKind::Remote),
    (0x0102_1997, "9p", FsKind::Remote),
    (0x00c3_6400, "ceph", FsKind::Remote),
    (0x0116_1970, "gfs2", FsKind::Remote),
    (0x7461_636f, "ocfs2", FsKind::Remote),
    (0x9fa0, "proc", FsKind::Pseudo),
    (0x6265_6572, "sysfs", FsKind::Pseudo),
    (0x0027_e0eb, "cgroup", FsKind::Pseudo),
    (0x6367_7270, "cgroup2", FsKind::Pseudo),
    (0x6462_6720, "debugfs", FsKind::Pseudo),
    (0x7472_6163, "tracefs", FsKind::Pseudo),
    (0x7363_6673, "securityfs", FsKind::Pseudo),
    (0x6265_6570, "configfs", FsKind::Pseudo),
    (0x6165_676c, "pstore", FsKind::Pseudo),
    (0xde5e_81e4, "efivarfs", FsKind::Pseudo),
    (0xcafe_4a11, "bpf", FsKind::Pseudo),
    (0xf97c_ff8c, "selinuxfs", FsKind::Pseudo),
    (0x6573_5543, "fusectl", FsKind::Pseudo),
    (0x4249_4e4d, "binfmt_misc", FsKind::Pseudo),
    (0x1cd1, "devpts", FsKind::Pseudo),
];

impl HostFs {
    /// Determines the file system of an open file or directory.
    ///
    /// # Errors
    /// The errno of fstatfs(2).
    pub fn of(fd: impl AsFd) -> io::Result<Self> {
        let magic = rustix::fs::fstatfs(fd)?.f_type;
        // f_type is a word that some machines sign-extend; the magic numbers have 32 bits.
        #[allow(clippy::cast_sign_loss, clippy::unnecessary_cast)]
        let magic = magic as u64 & 0xffff_ffff;
        let known = KNOWN_FILE_SYSTEMS.iter().find(|known| known.0 == magic);
        Ok(known.map_or(Self { name: "unknown", kind: FsKind::Remote }, |&(_, name, kind)| Self {
            name,
            kind,
        }))
    }
}

/// The features of a file system that matter to an overlay or a base.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FsFeatures {
    /// The file system.
    pub fs: HostFs,
    /// `SEEK_HOLE` tells holes from data.
    pub seek_hole: bool,
    /// Holes can be punched, which frees the space of a part of a file.
    pub punch: bool,
    /// Files without a name can be created (`O_TMPFILE`).
    pub tmpfile: bool,
    /// Two files can share their blocks.
    pub reflink: bool,
    /// Free space available to this process, in bytes.
    pub free: u64,
}

impl FsFeatures {
    /// Lists the missing features in words for the user, a clause each.
    #[must_use]
    pub fn missing(&self) -> Vec<&'static str> {
        let mut missing = Vec::new();
        if !self.seek_hole {
            missing.push("it cannot tell holes: all counts as data");
        }
        if !self.punch {
            missing.push("it cannot punch holes: freed space is not given back");
        }
        if !self.tmpfile {
            missing.push("it has no O_TMPFILE: a crash may leave files behind");
        }
        if self.fs.kind == FsKind::Memory {
            missing.push("it is memory: what it holds uses RAM and ends with a reboot");
        }
        missing
    }
}

/// Length in bytes of the data and of the hole in the probe file: the largest block size of file
/// systems (64 KiB pages).
const PROBE_LEN: usize = 65536;

/// Probes the features of the file system of the directory `dir`, with temporary files that are
/// removed again.
///
/// # Errors
/// The host's errno when no file can be created or written there.
pub fn probe_features(dir: &Path) -> io::Result<FsFeatures> {
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    let nameless = rustix::fs::open(dir, flags, Mode::RUSR | Mode::WUSR);
    let tmpfile = nameless.is_ok();
    let file = match nameless {
        Ok(fd) => File::from(fd),
        Err(_) => tempfile::tempfile_in(dir)?,
    };
    let space = rustix::fs::fstatvfs(&file)?;
    file.set_len(2 * PROBE_LEN as u64)?;
    file.write_all_at(&[1; PROBE_LEN], 0)?;
    let hole = rustix::fs::seek(&file, SeekFrom::Hole(0));
    let copy = tempfile::tempfile_in(dir)?;
    let reflink = rustix::fs::ioctl_ficlone(&copy, &file).is_ok();
    let punching = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    let punch = rustix::fs::fallocate(&file, punching, 0, PROBE_LEN as u64).is_ok();
    Ok(FsFeatures {
        fs: HostFs::of(&file)?,
        seek_hole: hole == Ok(PROBE_LEN as u64),
        punch,
        tmpfile,
        reflink,
        free: space.f_bavail.saturating_mul(space.f_frsize),
    })
}

/// Whether the host shows the holes of `file`; `false` only if the file certainly has some and the
/// host shows none. The file is not changed. Compressed files take less space than their size as
/// well, so file systems with compression are assumed to show holes.
///
/// # Errors
/// The errno of fstat(2) or fstatfs(2).
pub fn shows_holes(file: &File) -> io::Result<bool> {
    let meta = file.metadata()?;
    let is_sparse = meta.blocks().saturating_mul(512) < meta.len();
    if !is_sparse || matches!(HostFs::of(file)?.name, "btrfs" | "zfs" | "f2fs" | "bcachefs") {
        return Ok(true);
    }
    Ok(rustix::fs::seek(file, SeekFrom::Hole(0)).is_ok_and(|hole| hole < meta.len()))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::host::testing::{LoopDevice, Mounted, run};

    #[test]
    fn probing_tells_the_features_of_ext4_and_xfs() {
        let dir = tempfile::tempdir_in("/var/tmp").unwrap();
        for (mkfs, name, reflink) in
            [(&["mkfs.ext4", "-q"][..], "ext4", false), (&["mkfs.xfs", "-q"], "xfs", true)]
        {
            let image = dir.path().join(name);
            File::create(&image).unwrap().set_len(400 << 20).unwrap();
            let line = format!("{} '{}'", mkfs.join(" "), image.display());
            run("sh", &[Path::new("-c"), Path::new(&line)]);
            let looped = LoopDevice::new(&image, &[]);
            let mounted = Mounted::new(looped.path(), &dir.path().join("mnt"));
            let found = probe_features(mounted.path()).unwrap();
            assert_eq!(found.fs.name, name);
            assert!(found.seek_hole && found.punch && found.tmpfile, "{found:?}");
            assert_eq!(found.reflink, reflink);
            assert!(found.free > 100 << 20 && found.free < 400 << 20, "{found:?}");
            assert!(found.missing().is_empty());
            assert_eq!(
                fs::read_dir(mounted.path())
                    .unwrap()
                    .flatten()
                    .filter(|entry| entry.file_name() != "lost+found")
                    .count(),
                0
            );
        }
    }

    #[test]
    fn a_tmpfs_is_reported_as_memory() {
        let found = probe_features(Path::new("/dev/shm")).unwrap();
        assert_eq!(found.fs.kind, FsKind::Memory);
        assert!(found.seek_hole && found.punch && found.tmpfile && !found.reflink);
        assert_eq!(found.missing().len(), 1);
    }

    #[test]
    fn visible_holes_of_a_sparse_file_are_detected() {
        let file = tempfile::tempfile_in("/var/tmp").unwrap();
        assert!(shows_holes(&file).unwrap());
        file.set_len(1 << 20).unwrap();
        assert!(shows_holes(&file).unwrap());
    }
}
