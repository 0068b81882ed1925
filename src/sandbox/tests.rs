//! Programs that are locked in: what they can do, and how they try to get out.

#[cfg(target_arch = "x86_64")]
mod escape;

use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use super::*;

const LIMITS: Limits = Limits {
    data: 256 << 20,
    address_space: 768 << 20,
    stack: 2 << 20,
    cpu_time: 60,
    open_files: 64,
};

/// The sandbox of a program that may run what is installed, and read `image`.
fn sandbox(image: &File) -> Sandbox {
    let installed = ["/usr", "/lib", "/lib64", "/bin", "/etc/ld.so.cache"].map(open_for_rule);
    let mut rules: Vec<_> =
        installed.iter().flatten().map(|file| (file.as_fd(), Access::Run)).collect();
    rules.push((image.as_fd(), Access::Read));
    Sandbox::new(&rules, LIMITS).unwrap()
}

/// Runs `program` locked in, with `image` and what comes from `input`.
fn run(program: &str, args: &[&str], image: &Path, input: &str) -> Output {
    let sandbox = sandbox(&File::open(image).unwrap());
    let mut command = Command::new(program);
    command.args(args).env_clear().env("LC_ALL", "C").current_dir("/");
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    // SAFETY: `enter` makes only system calls.
    unsafe { command.pre_exec(move || sandbox.enter()) };
    let mut child = command.spawn().unwrap();
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    child.wait_with_output().unwrap()
}

/// A directory with an image and a secret.
fn place() -> tempfile::TempDir {
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    std::fs::write(dir.path().join("image"), "the image").unwrap();
    std::fs::write(dir.path().join("secret"), "the secret").unwrap();
    dir
}

#[test]
fn the_image_is_read_and_nothing_beside_it() {
    let dir = place();
    let image = dir.path().join("image");
    let cat = |path: &Path| run("/bin/cat", &[path.to_str().unwrap()], &image, "");
    assert_eq!(cat(&image).stdout, b"the image");
    for path in ["secret", "image/../secret", "./secret"] {
        let refused = cat(&dir.path().join(path));
        assert!(refused.stdout.is_empty() && !refused.status.success(), "{refused:?}");
    }
    let said = String::from_utf8(cat(&dir.path().join("secret")).stderr).unwrap();
    assert!(said.contains("Permission denied"), "{said}");
    // Another file under the name of the image is another file.
    let other = dir.path().join("other");
    std::fs::rename(&image, &other).unwrap();
    std::fs::write(&image, "in its place").unwrap();
    let cat = |path: &Path| run("/bin/cat", &[path.to_str().unwrap()], &other, "");
    assert_eq!(cat(&other).stdout, b"the image");
    assert!(cat(&image).stdout.is_empty());
}

#[test]
fn a_descriptor_is_opened_again_whatever_the_name_of_its_file() {
    let dir = place();
    let path = dir.path().join("image");
    // As root opens the images of others.
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o000)).unwrap();
    let image = File::open(&path).unwrap();
    std::fs::remove_file(&path).unwrap();
    let (sandbox, file) = (sandbox(&image), image.try_clone().unwrap());
    let mut command = Command::new("/bin/cat");
    command.arg("/proc/self/fd/0").stdin(file).stdout(Stdio::piped());
    // SAFETY: `enter` makes only system calls.
    unsafe { command.pre_exec(move || sandbox.enter()) };
    assert_eq!(command.output().unwrap().stdout, b"the image");
}

#[test]
fn what_is_inherited_can_be_used() {
    let dir = place();
    let (mut ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
    let image = File::open(dir.path().join("image")).unwrap();
    let secret = File::open(dir.path().join("secret")).unwrap();
    let sandbox = sandbox(&image);
    let mut command = Command::new("/bin/cat");
    command.stdin(Stdio::from(secret)).stdout(Stdio::from(std::os::fd::OwnedFd::from(theirs)));
    // SAFETY: `enter` makes only system calls.
    unsafe { command.pre_exec(move || sandbox.enter()) };
    assert!(command.status().unwrap().success());
    drop(command);
    let mut read = String::new();
    ours.read_to_string(&mut read).unwrap();
    assert_eq!(read, "the secret");
}
