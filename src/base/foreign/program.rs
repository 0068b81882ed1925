//! The program: where it is, what it is told, and what it may do.

use std::ffi::OsString;
use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::super::file::BaseFile;
use super::super::raw::HostKind;
use super::error::ForeignError;
use super::files::OpenedFiles;
use crate::config::{Format, Locking};
use crate::confined;
use crate::remote::{IMAGE_PATH, Jail, SHELL, ServerProgram};
use crate::sandbox::{Access, Limits, Sandbox, SandboxError, open_for_rule};
use crate::trusted_path;

const PROGRAM: &str = "qemu-nbd";

/// Memory for the tables of an image of 64 TiB, for what is on its way, and for the stacks of 64 threads;
/// libraries take some 200 MiB of addresses more. An hour of CPU time is some ten terabytes; the program
/// is started again when it was that much. A VMDK image of 2 TiB may be cut into 1,024 files.
const LIMITS: Limits = Limits {
    data: 1 << 30,
    address_space: 3 << 29,
    stack: 2 << 20,
    cpu_time: 3600,
    open_files: 1100,
};

/// What a program and its libraries are installed in; what is not there is left out.
const INSTALLED: &[&str] = &[
    "/lib",
    "/lib32",
    "/lib64",
    "/usr/lib",
    "/usr/lib32",
    "/usr/lib64",
    "/usr/local/lib",
    "/usr/local/lib64",
    "/nix/store",
    "/gnu/store",
];

/// The directories in which an image may name files.
pub(super) struct Allowed {
    paths: Vec<PathBuf>,
    dirs: Vec<File>,
}

impl Allowed {
    /// Opens the directories that the user `named`; those that are not there are left out.
    pub(super) fn find(named: &[PathBuf]) -> Self {
        let open = |path: &PathBuf| {
            let dir = trusted_path::open_dir(path).ok()?;
            Some((confined::real_path(&dir).ok()?, dir))
        };
        let (paths, dirs) = named.iter().filter_map(open).unzip();
        Self { paths, dirs }
    }

    /// Returns the paths, absolute and without links.
    pub(super) fn dirs(&self) -> &[PathBuf] {
        &self.paths
    }
}

/// Makes the program that reads `file`, an image in `format` which messages call `path`. Its files are
/// judged by `files`.
pub(super) fn make(
    path: &Path,
    file: &BaseFile,
    format: Format,
    locking: Locking,
    allowed: &Allowed,
    files: &Arc<OpenedFiles>,
) -> Result<ServerProgram, ForeignError> {
    let named = || (path.to_owned(), format);
    let program = trusted_path::find_program(PROGRAM).ok_or_else(|| {
        let (path, format) = named();
        ForeignError::NoProgram { path, format }
    })?;
    let locked_in = |error: SandboxError| {
        let (path, format) = named();
        ForeignError::Sandbox { path, format, why: error.to_string() }
    };
    let image = confined::open_path(&*file.file);
    let image = image.map_err(|error| locked_in(SandboxError::Rules(error.to_string())))?;
    let sandbox = sandbox(&program, &image, file.raw.kind(), allowed).map_err(locked_in)?;
    let (dir, name) = name_for_program(file, allowed);
    let judge = Arc::clone(files);
    let jail = Jail { sandbox, image, check: Arc::new(move |files| judge.check(files)) };
    let options = image_options(format, file.raw.kind(), &name, locking);
    // A connection that is lost and made again may be noticed late.
    let words = ["--read-only", "--persistent", "--shared=4", "--image-opts"].map(OsString::from);
    let words = [OsString::from(PROGRAM)].into_iter().chain(words).chain([options]).collect();
    Ok(ServerProgram { file: Some(program), words, dir, jail: Some(Arc::new(jail)) })
}

/// Returns the working directory and the name by which the program opens the image. Where other files
/// are allowed, it is the path, from which the names in an image are followed; else a descriptor,
/// which stays what it is.
fn name_for_program(file: &BaseFile, allowed: &Allowed) -> (PathBuf, OsString) {
    let path = &file.real_path;
    match (path.parent(), path.file_name()) {
        (Some(dir), Some(name)) if file.has_real_path && !allowed.paths.is_empty() => {
            let mut relative = OsString::from("./");
            relative.push(name);
            (dir.to_owned(), relative)
        }
        _ => ("/".into(), IMAGE_PATH.into()),
    }
}

/// Returns the options by which QEMU opens the image (qemu-nbd(8), `--image-opts`).
fn image_options(format: Format, kind: HostKind, name: &OsString, locking: Locking) -> OsString {
    let driver = if kind == HostKind::BlockDevice { "host_device" } else { "file" };
    let locking = if locking == Locking::Off { "off" } else { "auto" };
    let start =
        format!("driver={format},file.driver={driver},file.locking={locking},file.filename=");
    let mut options = start.into_bytes();
    // A comma in a value is written twice.
    for byte in name.as_bytes() {
        options.push(*byte);
        if *byte == b',' {
            options.push(b',');
        }
    }
    OsString::from_vec(options)
}

/// Makes the rules: the image, what the user allows, and what `program` needs to run.
fn sandbox(
    program: &Path,
    image: &impl AsFd,
    kind: HostKind,
    allowed: &Allowed,
) -> Result<Sandbox, SandboxError> {
    let missing = |path: &Path| SandboxError::Rules(format!("{} is missing", path.display()));
    let run = |path: &Path| path.to_str().and_then(open_for_rule).ok_or_else(|| missing(path));
    let mut run = vec![run(program)?, run(Path::new(SHELL))?];
    run.extend(INSTALLED.iter().filter_map(|path| open_for_rule(path)));
    let read: Vec<_> =
        ["/etc/ld.so.cache", "/dev/urandom"].into_iter().filter_map(open_for_rule).collect();
    let null: Option<File> = open_for_rule("/dev/null");
    let of_image = match kind {
        HostKind::File => Access::Read,
        HostKind::BlockDevice => Access::ReadDevice,
    };
    let mut rules = vec![(image.as_fd(), of_image)];
    rules.extend(run.iter().map(|file| (file.as_fd(), Access::Run)));
    rules.extend(read.iter().chain(&allowed.dirs).map(|file| (file.as_fd(), Access::Read)));
    rules.extend(null.iter().map(|file| (file.as_fd(), Access::ReadWrite)));
    Sandbox::new(&rules, LIMITS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_one_value_of_the_options() {
        let name = OsString::from("./a,file.filename=b");
        let options = image_options(Format::Vhd, HostKind::File, &name, Locking::Off);
        assert_eq!(
            options.to_str().unwrap(),
            "driver=vpc,file.driver=file,file.locking=off,file.filename=./a,,file.filename=b"
        );
    }
}
