//! The processes, loop devices and mounts that keep a mount busy, for the message that says so.
//!
//! Everything is read from `/proc` and `/sys`; no path is followed, so a hung mount is never
//! entered. A process counts when an open file, its working directory, its root or a mapping lies
//! in the mount. Descriptors are matched by mount ID, which is exact: a file hidden under the
//! mountpoint does not count, and a file that a container opened through its own copy of the mount
//! does. A loop device holds a file without any process.
//!
//! Processes that the caller may not inspect (those of other users, unless root) are left out.

use std::collections::{HashMap, HashSet};
use std::ffi::OsStr;
use std::fmt;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use crate::host::mountinfo::{self, MountEntry};

/// Kind of a process's hold on the mount.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum HoldKind {
    /// An open file or directory.
    File,
    /// The working directory.
    WorkingDirectory,
    /// The root directory.
    Root,
    /// A mapping of a file that is closed.
    Mapping,
}

/// A process, loop device or mount that holds a mount. Displays as one line for the user. Paths are
/// relative to the mount, without a leading `/`, and empty for the mount's own directory.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Opener {
    /// A process.
    Process {
        /// Process ID.
        pid: u32,
        /// Short name of the process, as ps shows it (15 bytes at most).
        command: String,
        /// The file or directory that the process holds.
        path: PathBuf,
        /// Kind of the hold.
        hold: HoldKind,
    },
    /// A loop device.
    Loop {
        /// Path of the device, such as `/dev/loop3`.
        device: PathBuf,
        /// The file that the device is attached to.
        path: PathBuf,
    },
    /// Another mount: one mounted inside this one, or a bind mount of it.
    Mount {
        /// Mountpoint of that other mount.
        mountpoint: PathBuf,
    },
}

impl Opener {
    /// Returns the file held, relative to the mount; `None` for a user of the mount as a whole.
    pub(crate) fn path(&self) -> Option<&Path> {
        match self {
            Self::Process { path, .. } | Self::Loop { path, .. } => Some(path),
            Self::Mount { .. } => None,
        }
    }
}

impl fmt::Display for Opener {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Process { pid, command, path, hold } => {
                write!(f, "{command} (pid {pid}) ")?;
                let name = match path.as_os_str().is_empty() {
                    true => Path::new("the mount").display(),
                    false => path.display(),
                };
                match hold {
                    HoldKind::File => write!(f, "has {name}"),
                    HoldKind::WorkingDirectory => write!(f, "has its working directory in {name}"),
                    HoldKind::Root => write!(f, "has its root directory in {name}"),
                    HoldKind::Mapping => write!(f, "has mapped {name}"),
                }
            }
            Self::Loop { device, path } => {
                write!(f, "{} is attached to {}", device.display(), path.display())
            }
            Self::Mount { mountpoint } => {
                write!(f, "the mount at {} uses it", mountpoint.display())
            }
        }
    }
}

/// A process with the file system mounted in its own mount namespace, where the file system stays
/// mounted after an unmount in this one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct NamespaceCopy {
    /// Process ID of one of the processes in that namespace.
    pub pid: u32,
    /// Short name of the process.
    pub command: String,
    /// The mountpoint in that namespace.
    pub mountpoint: PathBuf,
}

impl fmt::Display for NamespaceCopy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { pid, command, mountpoint } = self;
        let at = mountpoint.display();
        write!(
            f,
            "{command} (pid {pid}) has a copy of it at '{at}' in a mount namespace of its own"
        )
    }
}

/// Finds another mount namespace with the file system `dev`, among those that may be inspected.
pub(crate) fn find_namespace_copy(dev: (u32, u32)) -> Option<NamespaceCopy> {
    let ours = fs::read_link("/proc/self/ns/mnt").ok()?;
    let mut seen = HashSet::from([ours]);
    other_processes().into_iter().find_map(|pid| {
        let proc = PathBuf::from(format!("/proc/{pid}"));
        let is_new = seen.insert(fs::read_link(proc.join("ns/mnt")).ok()?);
        let table = fs::read(proc.join("mountinfo")).ok().filter(|_| is_new)?;
        let mounts = NamespaceMounts::of(&mountinfo::parse_mountinfo(&table), dev).mounts;
        let mountpoint = mounts.into_iter().find(MountEntry::is_cowslip)?.mountpoint;
        Some(NamespaceCopy { pid, command: process_name(&proc), mountpoint })
    })
}

/// Returns the short name of the process at `proc`, as ps shows it.
fn process_name(proc: &Path) -> String {
    let command = fs::read(proc.join("comm")).unwrap_or_default();
    String::from_utf8_lossy(command.trim_ascii_end()).into_owned()
}

/// Returns everything that holds `mount`, except this process. A process appears once per file,
/// however often it has the file open.
pub(crate) fn find_openers(mount: &MountEntry) -> Vec<Opener> {
    let entries = mountinfo::mounts_or_empty();
    let mut scan = ProcessScan { dev: mount.dev, own: None, views: HashMap::new() };
    // Use our view whatever the root of a process here: links in /proc are shown relative to our
    // root.
    if let Ok(own) = fs::read_link("/proc/self/ns/mnt") {
        scan.own = Some((own, NamespaceMounts::of(&entries, mount.dev)));
    }
    let mut found: Vec<Opener> =
        other_processes().into_iter().flat_map(|pid| scan.scan_process(pid)).collect();
    found.extend(loop_devices(&NamespaceMounts::of(&entries, mount.dev)));
    found.extend(
        entries
            .into_iter()
            .filter(|entry| entry.id != mount.id)
            .filter(|entry| entry.dev == mount.dev || entry.parent == mount.id)
            .map(|entry| Opener::Mount { mountpoint: entry.mountpoint }),
    );
    let mut seen = HashSet::new();
    found.retain(|opener| seen.insert(opener.clone()));
    found
}

/// Returns the IDs of all processes except this one.
fn other_processes() -> Vec<u32> {
    let Ok(entries) = fs::read_dir("/proc") else {
        return Vec::new();
    };
    let mut pids: Vec<u32> =
        entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect();
    pids.retain(|&pid| pid != std::process::id());
    pids.sort_unstable();
    pids
}

/// Mounts of the file system in one mount namespace; most namespaces have none.
#[derive(Clone, Debug, Default)]
struct NamespaceMounts {
    mounts: Vec<MountEntry>,
}

impl NamespaceMounts {
    fn of(entries: &[MountEntry], dev: (u32, u32)) -> Self {
        Self { mounts: entries.iter().filter(|entry| entry.dev == dev).cloned().collect() }
    }

    /// Converts `target`, a path from `/proc` or `/sys`, to a path inside the file system, if it
    /// can lie there.
    fn inner_path(&self, target: &Path) -> Option<PathBuf> {
        self.mounts.iter().find_map(|mount| inner_path_in(mount, target))
    }

    /// Converts `target` like [`inner_path`](Self::inner_path), for a file opened through the mount
    /// `id`.
    fn inner_path_by_id(&self, id: u64, target: &Path) -> Option<PathBuf> {
        inner_path_in(self.mounts.iter().find(|mount| mount.id == id)?, target)
    }
}

fn inner_path_in(mount: &MountEntry, target: &Path) -> Option<PathBuf> {
    // Suffix of an unlinked file; a name that really ends so is only shortened in the message.
    let bytes = target.as_os_str().as_bytes();
    let name = Path::new(OsStr::from_bytes(bytes.strip_suffix(b" (deleted)").unwrap_or(bytes)));
    let below = name.strip_prefix(&mount.mountpoint).ok()?;
    let root = mount.root.strip_prefix("/").ok()?;
    Some(root.iter().chain(below.iter()).collect())
}

/// One pass over the processes.
struct ProcessScan {
    dev: (u32, u32),
    /// The name of our mount namespace, such as `mnt:[4026531841]`, and our view.
    own: Option<(PathBuf, NamespaceMounts)>,
    /// The views of other namespaces, by namespace and root directory: the mountinfo of a process
    /// leaves out mounts outside its root.
    views: HashMap<(PathBuf, PathBuf), NamespaceMounts>,
}

impl ProcessScan {
    /// Returns everything that the process `pid` holds; empty if it has exited or may not be
    /// inspected.
    fn scan_process(&mut self, pid: u32) -> Vec<Opener> {
        let proc = PathBuf::from(format!("/proc/{pid}"));
        let Ok(namespace) = fs::read_link(proc.join("ns/mnt")) else {
            return Vec::new();
        };
        let dev = self.dev;
        let view = match &self.own {
            Some((own, view)) if *own == namespace => view,
            _ => {
                let root = fs::read_link(proc.join("root")).unwrap_or_default();
                self.views.entry((namespace, root)).or_insert_with(|| {
                    let text = fs::read(proc.join("mountinfo")).unwrap_or_default();
                    NamespaceMounts::of(&mountinfo::parse_mountinfo(&text), dev)
                })
            }
        };
        if view.mounts.is_empty() {
            return Vec::new();
        }
        let mut held = open_files(&proc, view);
        for (link, hold) in [("cwd", HoldKind::WorkingDirectory), ("root", HoldKind::Root)] {
            let target = fs::read_link(proc.join(link)).ok();
            held.extend(
                target.and_then(|target| view.inner_path(&target)).map(|path| (path, hold)),
            );
        }
        // Read maps last, and only if needed: of all these files only maps takes a lock of the
        // process.
        if held.is_empty() {
            held = mappings(&fs::read(proc.join("maps")).unwrap_or_default(), dev, view);
        }
        let command = process_name(&proc);
        let opener = |(path, hold)| Opener::Process { pid, command: command.clone(), path, hold };
        held.into_iter().map(opener).collect()
    }
}

fn open_files(proc: &Path, view: &NamespaceMounts) -> Vec<(PathBuf, HoldKind)> {
    let Ok(fds) = fs::read_dir(proc.join("fd")) else {
        return Vec::new();
    };
    let open = fds.flatten().filter_map(|fd| {
        let target = fs::read_link(fd.path()).ok()?;
        view.inner_path(&target)?;
        let info = fs::read_to_string(proc.join("fdinfo").join(fd.file_name())).ok()?;
        Some((view.inner_path_by_id(mount_id(&info)?, &target)?, HoldKind::File))
    });
    open.collect()
}

/// Parses the `mnt_id` line of a fdinfo file.
fn mount_id(info: &str) -> Option<u64> {
    info.lines().find_map(|line| line.strip_prefix("mnt_id:")?.trim().parse().ok())
}

/// Returns the files of file system `dev` in a maps file (proc_pid_maps(5)), whose lines are
/// `address perms offset major:minor inode   path`, with device numbers in hexadecimal.
fn mappings(maps: &[u8], dev: (u32, u32), view: &NamespaceMounts) -> Vec<(PathBuf, HoldKind)> {
    let wanted = format!("{:02x}:{:02x}", dev.0, dev.1);
    let mapped = maps.split(|&byte| byte == b'\n').filter_map(|line| {
        let mut fields = line.splitn(6, |&byte| byte == b' ');
        (fields.nth(3)? == wanted.as_bytes()).then_some(())?;
        let path = Path::new(OsStr::from_bytes(fields.nth(1)?.trim_ascii_start()));
        // The device matches already, so even a path from elsewhere is worth reporting.
        Some((view.inner_path(path).unwrap_or_else(|| path.to_owned()), HoldKind::Mapping))
    });
    mapped.collect()
}

fn loop_devices(view: &NamespaceMounts) -> Vec<Opener> {
    let Ok(devices) = fs::read_dir("/sys/block") else {
        return Vec::new();
    };
    let attached = devices.flatten().filter_map(|device| {
        let name = device.file_name();
        name.as_bytes().starts_with(b"loop").then_some(())?;
        let file = fs::read(device.path().join("loop/backing_file")).ok()?;
        let file = Path::new(OsStr::from_bytes(file.strip_suffix(b"\n").unwrap_or(&file)));
        Some(Opener::Loop { device: Path::new("/dev").join(name), path: view.inner_path(file)? })
    });
    attached.collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    fn view(lines: &str) -> NamespaceMounts {
        NamespaceMounts::of(&mountinfo::parse_mountinfo(lines.as_bytes()), (0, 53))
    }

    #[test]
    fn opener_displays_as_one_line() {
        let opener = |command: &str, pid, path: &str, hold| {
            let (command, path) = (command.to_owned(), path.into());
            Opener::Process { pid, command, path, hold }.to_string()
        };
        assert_eq!(
            opener("qemu-system-x86", 4711, "vm1.img", HoldKind::File),
            "qemu-system-x86 (pid 4711) has vm1.img"
        );
        assert_eq!(
            opener("bash", 7, "", HoldKind::WorkingDirectory),
            "bash (pid 7) has its working directory in the mount"
        );
        let attached = Opener::Loop { device: "/dev/loop3".into(), path: "vm1.img".into() };
        assert_eq!(attached.to_string(), "/dev/loop3 is attached to vm1.img");
    }

    #[test]
    fn path_is_converted_to_a_path_inside_the_mount() {
        let view = view(
            "9 1 0:53 / /m rw - fuse.cowslip s rw\n\
             8 1 0:53 /vm2.img /etc/disk rw - fuse.cowslip s rw\n\
             7 1 0:54 / /n rw - tmpfs s rw\n",
        );
        let inner = |path: &str| view.inner_path(Path::new(path));
        assert_eq!(inner("/m/a/vm1.img"), Some("a/vm1.img".into()));
        assert_eq!(inner("/m"), Some("".into()));
        assert_eq!(inner("/m/vm1.img (deleted)"), Some("vm1.img".into()));
        assert_eq!(inner("/etc/disk"), Some("vm2.img".into()));
        assert_eq!(inner("/mm/vm1.img"), None);
        assert_eq!(inner("/n/vm1.img"), None);
        assert_eq!(inner("socket:[1]"), None);
        assert_eq!(view.inner_path_by_id(7, Path::new("/m/vm1.img")), None);
    }

    #[test]
    fn mappings_are_matched_by_device() {
        let maps = b"7f0-7f1 r--p 00000000 00:35 12                         /m/a b.img\n\
                     7f1-7f2 r--p 00000000 00:36 12                         /m/c.img\n\
                     7f2-7f3 rw-p 00000000 00:00 0 \n";
        let found = mappings(maps, (0, 0x35), &view("9 1 0:53 / /m rw - fuse.cowslip s rw"));
        assert_eq!(found, [("a b.img".into(), HoldKind::Mapping)]);
    }

    #[test]
    fn the_mount_id_is_read_from_fdinfo() {
        assert_eq!(mount_id("pos:\t0\nflags:\t0100000\nmnt_id:\t29\nino:\t5\n"), Some(29));
        assert_eq!(mount_id("pos:\t0\n"), None);
    }

    #[test]
    fn process_with_an_open_file_is_found() {
        // /dev/shm is a mount of its own everywhere, so it can stand in for a cowslip mount.
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let path = dir.path().join("vm1.img");
        let file = fs::File::create(&path).unwrap();
        let mut cat = Command::new("sleep").arg("60").stdin(file).spawn().unwrap();
        let found = find_openers(&mountinfo::entry_at(Path::new("/dev/shm")).unwrap());
        cat.kill().unwrap();
        cat.wait().unwrap();
        let inner = path.strip_prefix("/dev/shm").unwrap();
        let is_it =
            |opener: &&Opener| matches!(opener, Opener::Process { pid, .. } if *pid == cat.id());
        let found: Vec<_> = found.iter().filter(is_it).collect();
        let [Opener::Process { path, hold: HoldKind::File, .. }] = found[..] else {
            panic!("{found:?}")
        };
        assert_eq!(path, inner);
    }
}
