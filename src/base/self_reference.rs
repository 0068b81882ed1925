//! Detection of paths inside the mount that they would serve.
//!
//! A base, overlay, sink or spill inside the mount it serves waits for itself for ever, and so does
//! one on a loop device over a disk of that mount:
//!
//! ```text
//!   path ─▶ file system ─▶ device ─▶ partition of ─▶ loop device ─▶ backing file ─▶ …
//!                            └─▶ device mapper, RAID: each of its slaves
//! ```
//!
//! The chain is followed through sysfs. Nothing in the mount itself is ever looked up: a lookup
//! there would be the very wait that is to be refused.

use std::collections::VecDeque;
use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path, PathBuf};

use rustix::fs::{AtFlags, CWD, FileType, StatxFlags, major, makedev, minor};

use crate::host::mountinfo;

/// Longest chain of symbolic links or devices: the kernel's own limit on links in a path.
const MAX_STEPS: u32 = 40;

/// The reason why a path cannot be used for a disk of this mount.
#[derive(Debug, thiserror::Error)]
pub enum SelfReferenceError {
    /// The path lies in the mount.
    #[error(
        "'{}' lies in the mount '{}' that would need it: use a path outside the mount",
        path.display(), mountpoint.display()
    )]
    Inside {
        /// The path as given.
        path: PathBuf,
        /// The mount.
        mountpoint: PathBuf,
    },
    /// The path lies on a device whose bytes are in the mount.
    #[error(
        "'{}' is on a loop device over '{}', which lies in the mount '{}' that would need it: use a path outside the mount",
        path.display(), backing.display(), mountpoint.display()
    )]
    OnLoop {
        /// The path as given.
        path: PathBuf,
        /// The file in the mount.
        backing: PathBuf,
        /// The mount.
        mountpoint: PathBuf,
    },
}

/// Refuses `path` if it lies in the mount, or on a device that is backed by the mount.
///
/// `path` need not exist yet; its nearest existing parent counts then. `mountpoint` must be
/// canonical: it is compared, never looked up. `mount_dev` is the mount's `st_dev` once it is
/// mounted; it finds the mount under other names (bind mounts) too. A path whose device cannot be
/// determined is accepted.
///
/// # Errors
/// [`SelfReferenceError`], worded for the user.
pub fn check_self_reference(
    path: &Path,
    mountpoint: &Path,
    mount_dev: Option<u64>,
) -> Result<(), SelfReferenceError> {
    let mount = OwnMount { mountpoint, dev: mount_dev };
    match mount.locate(path) {
        PathLocation::Outside => Ok(()),
        PathLocation::Inside => Err(SelfReferenceError::Inside {
            path: path.to_owned(),
            mountpoint: mountpoint.to_owned(),
        }),
        PathLocation::OnLoop(backing) => Err(SelfReferenceError::OnLoop {
            path: path.to_owned(),
            backing,
            mountpoint: mountpoint.to_owned(),
        }),
    }
}

/// The mount in which none of its own files may lie.
struct OwnMount<'a> {
    mountpoint: &'a Path,
    dev: Option<u64>,
}

/// The location of a path relative to the mount.
enum PathLocation {
    Outside,
    Inside,
    /// On a device whose backing file in the mount is this one.
    OnLoop(PathBuf),
}

/// The outcome of a walk along a path.
enum WalkEnd {
    Inside,
    /// The path, or its nearest existing parent.
    At(PathStat),
    Unknown,
}

impl OwnMount<'_> {
    /// Follows `path` to its device, the device to its backing file, and so on.
    fn locate(&self, path: &Path) -> PathLocation {
        let mut files = vec![path.to_owned()];
        for step in 0..MAX_STEPS {
            let Some(file) = files.pop() else { break };
            match self.walk(&file) {
                WalkEnd::Inside if step == 0 => return PathLocation::Inside,
                WalkEnd::Inside => return PathLocation::OnLoop(file),
                WalkEnd::At(found) => devices_of(&found)
                    .into_iter()
                    .for_each(|dev| backing_files(&sysfs_dir(dev), &mut files)),
                WalkEnd::Unknown => {}
            }
        }
        PathLocation::Outside
    }

    /// Resolves `path` one name at a time, and stops before a step into the mount.
    fn walk(&self, path: &Path) -> WalkEnd {
        let Ok(path) = std::path::absolute(path) else {
            return WalkEnd::Unknown;
        };
        let mut todo: VecDeque<OsString> = path_names(&path).collect();
        let mut here = PathBuf::from("/");
        let mut links = 0;
        while let Some(name) = todo.pop_front() {
            if name == ".." {
                here.pop();
                continue;
            }
            here.push(name);
            if here == self.mountpoint && todo.front().is_some_and(|next| next == "..") {
                continue; // Enters the mount by one name and leaves it by the next.
            }
            if here.starts_with(self.mountpoint) {
                return WalkEnd::Inside;
            }
            // A name that does not exist (yet) is no symbolic link.
            let Some(stat) = stat_no_follow(&here) else { continue };
            if self.dev == Some(stat.dev) {
                return WalkEnd::Inside;
            }
            if stat.kind != FileType::Symlink {
                continue;
            }
            links += 1;
            let (Ok(target), true) = (fs::read_link(&here), links <= MAX_STEPS) else {
                return WalkEnd::Unknown;
            };
            here.pop();
            if target.is_absolute() {
                here = PathBuf::from("/");
            }
            for name in path_names(&target).collect::<Vec<_>>().into_iter().rev() {
                todo.push_front(name);
            }
        }
        let nearest = here.ancestors().find_map(stat_no_follow);
        nearest.map_or(WalkEnd::Unknown, WalkEnd::At)
    }
}

/// The components of a path that change its location.
fn path_names(path: &Path) -> impl Iterator<Item = OsString> + '_ {
    path.components().filter_map(|part| match part {
        Component::Normal(name) => Some(name.to_owned()),
        Component::ParentDir => Some("..".into()),
        Component::RootDir | Component::CurDir | Component::Prefix(_) => None,
    })
}

/// The result of a stat.
#[derive(Clone, Copy)]
struct PathStat {
    kind: FileType,
    /// The number of the device itself, for a device node.
    rdev: u64,
    /// The device of the file system.
    dev: u64,
    mount_id: u64,
}

/// Stats `path` without following a link at its end. `DONT_SYNC`: the root of a FUSE mount is
/// answered from the kernel's memory, without a request to its server.
fn stat_no_follow(path: &Path) -> Option<PathStat> {
    let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::STATX_DONT_SYNC | AtFlags::NO_AUTOMOUNT;
    let mask = StatxFlags::TYPE | StatxFlags::MNT_ID;
    let stat = rustix::fs::statx(CWD, path, flags, mask).ok()?;
    Some(PathStat {
        kind: FileType::from_raw_mode(stat.stx_mode.into()),
        rdev: makedev(stat.stx_rdev_major, stat.stx_rdev_minor),
        dev: makedev(stat.stx_dev_major, stat.stx_dev_minor),
        mount_id: stat.stx_mnt_id,
    })
}

/// The devices that a path depends on: the path itself if it is a device, and its file system's
/// device.
fn devices_of(found: &PathStat) -> Vec<u64> {
    let mut devices = Vec::new();
    if found.kind == FileType::BlockDevice {
        devices.push(found.rdev);
    }
    if major(found.dev) != 0 {
        devices.push(found.dev);
    } else if let Some(source) = mount_source(found.mount_id) {
        // btrfs invents its device numbers; the mount table has the real device. (Files in /dev
        // come here too, and have no such source.)
        devices.extend(fs::metadata(&source).map(|device| device.rdev()));
    }
    devices
}

/// Returns the device of a mount. Other entries in the mount table, whatever their names, do not
/// affect the result.
fn mount_source(mount_id: u64) -> Option<PathBuf> {
    let entry = mountinfo::mounts().ok()?.into_iter().find(|entry| entry.id == mount_id)?;
    let source = PathBuf::from(entry.source);
    source.starts_with("/dev").then_some(source)
}

fn sysfs_dir(dev: u64) -> PathBuf {
    format!("/sys/dev/block/{}:{}", major(dev), minor(dev)).into()
}

/// Adds the files that back the device at `sysfs`, directly or through partitions and slaves.
fn backing_files(sysfs: &Path, files: &mut Vec<PathBuf>) {
    let mut devices = vec![sysfs.to_owned()];
    for _ in 0..MAX_STEPS {
        let Some(device) = devices.pop() else { return };
        let Ok(mut device) = device.canonicalize() else {
            continue;
        };
        if device.join("partition").exists() {
            device.pop();
        }
        if let Ok(file) = fs::read(device.join("loop/backing_file")) {
            files.push(backing_path(&file));
        }
        if let Ok(slaves) = fs::read_dir(device.join("slaves")) {
            devices.extend(slaves.flatten().map(|slave| slave.path()));
        }
    }
}

/// Parses the path of a backing file. sysfs ends it with a line feed, and adds a note when the file
/// has been unlinked.
fn backing_path(line: &[u8]) -> PathBuf {
    use std::os::unix::ffi::OsStrExt;

    let line = line.strip_suffix(b"\n").unwrap_or(line);
    let line = line.strip_suffix(b" (deleted)").unwrap_or(line);
    std::ffi::OsStr::from_bytes(line).into()
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::fs::symlink;

    use super::*;
    use crate::host::testing::{LoopDevice, Mounted, run};

    /// A directory that stands for the mount, with a disk in it, and a directory beside it.
    struct Scene {
        _dir: tempfile::TempDir,
        mount: PathBuf,
        disk: PathBuf,
        outside: PathBuf,
    }

    impl Scene {
        fn new() -> Self {
            let dir = tempfile::tempdir_in("/var/tmp").unwrap();
            let root = dir.path().canonicalize().unwrap();
            let (mount, outside) = (root.join("m"), root.join("o"));
            fs::create_dir(&mount).unwrap();
            fs::create_dir(&outside).unwrap();
            let disk = mount.join("vm.img");
            File::create(&disk).unwrap().set_len(32 << 20).unwrap();
            Self { _dir: dir, mount, disk, outside }
        }

        fn search(&self, path: impl AsRef<Path>) -> Result<(), SelfReferenceError> {
            check_self_reference(path.as_ref(), &self.mount, None)
        }

        fn assert_inside(&self, path: impl AsRef<Path>) {
            let answer = self.search(path);
            assert!(matches!(answer, Err(SelfReferenceError::Inside { .. })), "{answer:?}");
        }

        fn assert_on_loop(&self, path: impl AsRef<Path>) {
            let answer = self.search(path);
            let Err(SelfReferenceError::OnLoop { backing, .. }) = answer else {
                panic!("{answer:?}");
            };
            assert_eq!(backing, self.disk);
        }
    }

    #[test]
    fn a_path_in_the_mount_is_refused_under_any_name() {
        let scene = Scene::new();
        scene.assert_inside(&scene.mount);
        scene.assert_inside(&scene.disk);
        scene.assert_inside(scene.mount.join("not/there/yet"));
        scene.assert_inside(scene.outside.join("../m/vm.img"));
        scene.assert_inside(scene.outside.join("no/../../m/vm.img"));
        symlink("../m", scene.outside.join("link")).unwrap();
        scene.assert_inside(scene.outside.join("link/vm.img"));
        symlink(&scene.disk, scene.outside.join("far")).unwrap();
        scene.assert_inside(scene.outside.join("far"));

        scene.search(&scene.outside).unwrap();
        scene.search(scene.outside.join("not/there/yet")).unwrap();
        // Enters the mount by one name and leaves it by the next.
        scene.search(scene.outside.join("link/../../o")).unwrap();
        scene.search(scene.mount.with_file_name("m2")).unwrap();
        let text = scene.search(&scene.disk).unwrap_err().to_string();
        let (disk, mount) = (scene.disk.display(), scene.mount.display());
        let want = format!(
            "'{disk}' lies in the mount '{mount}' that would need it: use a path outside the mount"
        );
        assert_eq!(text, want);
    }

    #[test]
    fn a_link_to_itself_ends_the_walk() {
        let scene = Scene::new();
        let link = scene.outside.join("link");
        symlink(&link, &link).unwrap();
        scene.search(&link).unwrap();
    }

    #[test]
    fn the_mount_is_recognized_by_its_device_too() {
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let dev = fs::metadata(dir.path()).unwrap().dev();
        let mountpoint = Path::new("/nowhere");
        check_self_reference(&dir.path().join("x"), mountpoint, Some(dev)).unwrap_err();
        check_self_reference(Path::new("/var/tmp"), mountpoint, Some(dev)).unwrap();
    }

    #[test]
    fn a_loop_device_over_the_mount_and_everything_on_it_is_refused() {
        let scene = Scene::new();
        let looped = LoopDevice::new(&scene.disk, &[]);
        scene.assert_on_loop(looped.path());

        run("mkfs.ext4", &[Path::new("-q"), looped.path()]);
        let mounted = Mounted::new(looped.path(), &scene.outside.join("fs"));
        scene.assert_on_loop(mounted.path().join("new.img"));
        scene.assert_on_loop(mounted.path().join("new/er.img"));
        scene.search(mounted.path().join("../new.img")).unwrap();

        let inner = mounted.path().join("inner.img");
        File::create(&inner).unwrap().set_len(1 << 20).unwrap();
        let second = LoopDevice::new(&inner, &[]);
        scene.assert_on_loop(second.path());
    }

    #[test]
    fn a_loop_device_over_another_file_is_accepted() {
        let scene = Scene::new();
        let other = scene.outside.join("other.img");
        File::create(&other).unwrap().set_len(1 << 20).unwrap();
        scene.search(LoopDevice::new(&other, &[]).path()).unwrap();
    }

    #[test]
    fn a_partition_is_followed_to_its_loop_device() {
        let scene = Scene::new();
        let looped = LoopDevice::new(&scene.disk, &["-P"]);
        scene.assert_on_loop(looped.add_partition(1, 1 << 20..17 << 20));
    }

    #[test]
    fn a_mapped_device_is_followed_through_its_slaves() {
        // Built as in sysfs; not every machine that runs the tests has the device mapper.
        let dir = tempfile::tempdir().unwrap();
        let sys = dir.path();
        for folder in ["dm-1/slaves", "dm-0/slaves", "loop0/loop", "loop0/loop0p1"] {
            fs::create_dir_all(sys.join(folder)).unwrap();
        }
        fs::write(sys.join("loop0/loop/backing_file"), "/m/vm.img\n").unwrap();
        fs::write(sys.join("loop0/loop0p1/partition"), "1\n").unwrap();
        symlink("../../dm-0", sys.join("dm-1/slaves/dm-0")).unwrap();
        symlink("../../loop0/loop0p1", sys.join("dm-0/slaves/loop0p1")).unwrap();
        let mut files = Vec::new();
        backing_files(&sys.join("dm-1"), &mut files);
        assert_eq!(files, [Path::new("/m/vm.img")]);
    }

    #[test]
    fn a_btrfs_over_the_mount_is_found_despite_its_invented_device_number() {
        let scene = Scene::new();
        let file = File::options().write(true).open(&scene.disk).unwrap();
        file.set_len(128 << 20).unwrap();
        let looped = LoopDevice::new(&scene.disk, &[]);
        run("mkfs.btrfs", &[Path::new("-q"), looped.path()]);
        let mounted = Mounted::new(looped.path(), &scene.outside.join("fs"));
        scene.assert_on_loop(mounted.path().join("new.img"));
    }

    #[test]
    fn a_backing_path_is_parsed_as_sysfs_writes_it() {
        for (line, path) in
            [(&b"/m/a b.img\n"[..], "/m/a b.img"), (b"/m/x (deleted)\n", "/m/x"), (b"/m/x", "/m/x")]
        {
            assert_eq!(backing_path(line), Path::new(path));
        }
    }

    #[test]
    fn a_mountpoint_that_is_not_utf8_does_not_hide_the_device() {
        use std::os::unix::ffi::OsStrExt;

        let dir = tempfile::tempdir().unwrap();
        // Not UTF-8: any user who may mount can choose such a name for a mountpoint.
        let odd = dir.path().join(std::ffi::OsStr::from_bytes(b"odd \xff\xfe"));
        fs::create_dir(&odd).unwrap();
        let mounted =
            std::process::Command::new("mount").args(["-t", "tmpfs", "tmpfs"]).arg(&odd).status();
        assert!(mounted.unwrap().success());
        let entry = mountinfo::mounts()
            .unwrap()
            .into_iter()
            .find(|entry| entry.source.as_bytes().starts_with(b"/dev/"));
        let found = entry.as_ref().map(|entry| mount_source(entry.id));
        let unmounted = std::process::Command::new("umount").arg(&odd).status();
        assert!(unmounted.unwrap().success());
        assert_eq!(found, entry.map(|entry| Some(PathBuf::from(entry.source))));
    }
}
