//! Real devices and mounts for tests; they need root.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::Duration;

/// Runs a program that must succeed and returns its output.
pub(crate) fn run(program: &str, args: &[impl AsRef<OsStr>]) -> String {
    let out = Command::new(program).args(args).output().unwrap();
    let said = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "{program}: {said}");
    String::from_utf8_lossy(&out.stdout).trim().to_owned()
}

/// A loop device, attached until dropped.
pub(crate) struct LoopDevice(PathBuf);

impl LoopDevice {
    pub(crate) fn new(file: &Path, flags: &[&str]) -> Self {
        let mut args = ["-f", "--show"].map(OsStr::new).to_vec();
        args.extend(flags.iter().map(OsStr::new));
        args.push(file.as_os_str());
        Self(run("losetup", &args).into())
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }

    /// Adds a partition to the kernel's view of the device and returns its device path. Not
    /// every kernel reads partition tables, and no release of util-linux has all the tools that
    /// could add one.
    pub(crate) fn add_partition(&self, number: i32, bytes: Range<i64>) -> PathBuf {
        let partition = BlkpgPartition {
            start: bytes.start,
            length: bytes.end - bytes.start,
            number,
            device: [0; 64],
            volume: [0; 64],
        };
        let len = i32::try_from(size_of::<BlkpgPartition>()).unwrap();
        let order = BlkpgIoctlArg { operation: 1, flags: 0, len, data: &raw const partition };
        let device = File::open(&self.0).unwrap();
        // SAFETY: BLKPG reads the order, and `len` bytes at its `data`; both outlive the call.
        let done = unsafe { libc::ioctl(device.as_raw_fd(), BLKPG, &raw const order) };
        assert_eq!(done, 0, "BLKPG: {}", io::Error::last_os_error());
        let mut name = self.0.clone().into_os_string();
        name.push(format!("p{number}"));
        name.into()
    }
}

/// `_IO(0x12, 105)` of `linux/blkpg.h`.
const BLKPG: libc::Ioctl = 0x1269;

/// `struct blkpg_ioctl_arg`; operation 1 adds a partition.
#[repr(C)]
struct BlkpgIoctlArg {
    operation: i32,
    flags: i32,
    len: i32,
    data: *const BlkpgPartition,
}

/// `struct blkpg_partition`.
#[repr(C)]
struct BlkpgPartition {
    start: i64,
    length: i64,
    number: i32,
    device: [u8; 64],
    volume: [u8; 64],
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        run("losetup", &[Path::new("-d"), &self.0]);
    }
}

/// A mount of `device` on a directory, until dropped.
pub(crate) struct Mounted(PathBuf);

impl Mounted {
    pub(crate) fn new(device: &Path, on: &Path) -> Self {
        fs::create_dir_all(on).unwrap();
        run("mount", &[device, on]);
        Self(on.to_owned())
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        // Another process in search of a free loop device may have this one open just now; the
        // loop device releases its file only after that.
        let is_busy = || {
            let unmounted = Command::new("umount").arg("-q").arg(&self.0).status();
            !unmounted.unwrap().success()
        };
        for _ in 0..600 {
            if !is_busy() {
                return;
            }
            thread::sleep(Duration::from_millis(100));
        }
        run("umount", &[&self.0]);
    }
}
