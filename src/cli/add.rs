//! `cowslip add`: adds a disk to an existing mount.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};

use clap::Args;

use super::client::{Endpoint, check_answers};
use super::mount::current_dir;
use super::plan;
use super::progress::{ProgressDisplay, Verbosity};
use super::{CliError, EXIT_OK, print_line};
use crate::config::{DiskSource, DiskSpec, Flow, SinkSpec, SourceSpec, without_queries};
use crate::control::api::{Lines, MountRequest};

#[derive(Debug, Args)]
pub(super) struct AddArgs {
    /// Use a base that changed under its overlay
    #[arg(long)]
    force: bool,
    /// Let an image have files that it names below DIR; those of a qcow2 image may lie beside it, too
    #[arg(long, value_name = "DIR")]
    allow_backing: Vec<PathBuf>,
    #[command(flatten)]
    trust: plan::TrustArgs,
    /// The mount
    mountpoint: PathBuf,
    /// What to show there, [NAME=]SOURCE[,KEY[=VALUE]]... with SOURCE a path, blank:SIZE or stream:SIZE
    #[arg(value_name = "DISK")]
    disk: OsString,
}

pub(super) fn run(args: &AddArgs) -> anyhow::Result<u8> {
    let dir = current_dir()?;
    let disk = plan::parse_disk_arg(&args.disk, &dir)?;
    check_stdio(&disk)?;
    // The daemon opens them, and would hang with them.
    disk.source.paths().chain(&disk.overlay).try_for_each(|path| check_answers(path))?;
    let mount = match Endpoint::of(&args.mountpoint) {
        Ok(mount) => mount,
        Err(error) => return Err(swapped_error(args).unwrap_or(error)),
    };
    if let Some(disk) = &mount.disk {
        anyhow::bail!(
            "'{disk}' is in the mount at '{at}': cowslip add '{at}' {}",
            args.disk.to_string_lossy(),
            at = mount.mountpoint.display()
        );
    }
    let request = request(args, &dir)?;
    let mut display = ProgressDisplay::new(Verbosity::default());
    let answer = mount.ask(&request, |progress| display.show(progress));
    display.end();
    let Lines { lines, .. } = answer?;
    lines.iter().for_each(|line| print_line(line));
    Ok(EXIT_OK)
}

/// Builds the request; relative paths start at `dir`.
fn request(args: &AddArgs, dir: &Path) -> anyhow::Result<MountRequest> {
    let below = |below: &PathBuf| Ok(utf8_arg(dir.join(below).as_os_str())?.into());
    Ok(MountRequest::Add {
        disk: utf8_arg(&args.disk)?.to_owned(),
        cwd: utf8_arg(dir.as_os_str())?.into(),
        force: args.force,
        allow_backing: args.allow_backing.iter().map(below).collect::<anyhow::Result<_>>()?,
        trust: args.trust.allow(dir)?,
    })
}

/// Returns an error if the disk and the mountpoint were given in the wrong order.
fn swapped_error(args: &AddArgs) -> Option<anyhow::Error> {
    let mount = Endpoint::of(Path::new(&args.disk)).ok()?;
    mount.disk.is_none().then(|| {
        let (mount, disk) = (args.disk.to_string_lossy(), args.mountpoint.to_string_lossy());
        let disk = without_queries(&disk);
        CliError::usage(format!("MOUNTPOINT comes first: cowslip add {mount} {disk}"))
    })
}

/// Refuses standard streams, which only the mounting command has.
fn check_stdio(disk: &DiskSpec) -> anyhow::Result<()> {
    let DiskSource::Stream(stream) = &disk.source else {
        return Ok(());
    };
    let what = match &stream.flow {
        Flow::Out(SinkSpec::Stdout) => "to=stdout",
        Flow::In { source: SourceSpec::Stdin, .. } => "from=stdin",
        _ => return Ok(()),
    };
    let remedy = "the mount that is there has another: name a fifo, a file or a command";
    Err(CliError::usage(format!("{what} cannot be added: {remedy}")))
}

/// Requires UTF-8, since a request is JSON.
fn utf8_arg(given: &OsStr) -> anyhow::Result<&str> {
    given.to_str().ok_or_else(|| {
        let shown = given.to_string_lossy();
        anyhow::anyhow!("'{shown}' is not UTF-8: rename it, or name it when mounting")
    })
}

#[cfg(test)]
mod tests {
    use super::super::{EXIT_USAGE, exit_code};
    use super::*;

    #[test]
    fn standard_streams_are_refused() {
        let refused = |text: &str| {
            let disk = plan::parse_disk_arg(OsStr::new(text), Path::new("/here")).unwrap();
            check_stdio(&disk).err().map(|error| (exit_code(&error), error.to_string()))
        };
        let (code, line) = refused("o=stream:1M,to=stdout").unwrap();
        assert_eq!(code, EXIT_USAGE);
        assert!(line.starts_with("to=stdout cannot be added"), "{line}");
        assert!(refused("i=stream:1M,from=stdin").unwrap().1.starts_with("from=stdin"));
        assert_eq!(refused("o=stream:1M,to=file:out"), None);
        assert_eq!(refused("vm.img"), None);
    }
}
