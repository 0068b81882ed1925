//! `cowslip keep`: makes a temporary overlay persistent.

use std::path::{Path, PathBuf};

use clap::Args;

use super::client::{Endpoint, check_answers};
use super::long_request::LongRequest;
use super::mount::current_dir;
use super::plan::TrustArgs;
use super::progress::Verbosity;
use super::request::ask_long;
use crate::control::api::DiskRequest;

#[derive(Debug, Args)]
pub(super) struct KeepArgs {
    /// The mounted disk
    file: PathBuf,
    /// A new directory for its changes; what it is made in must be there
    dir: PathBuf,
    #[command(flatten)]
    trust: TrustArgs,
    #[command(flatten)]
    verbosity: Verbosity,
}

pub(super) fn run(args: &KeepArgs) -> anyhow::Result<u8> {
    let disk = Endpoint::of_disk(&args.file)?;
    let here = current_dir()?;
    check_answers(&args.dir)?;
    let (dir, trust) = (destination(&here, &args.dir)?, args.trust.allow(&here)?);
    ask_long(&disk, &DiskRequest::Keep { dir, trust }, LongRequest::Keep, args.verbosity)
}

/// Converts `given` for the daemon: an absolute path, in a directory that exists.
fn destination(here: &Path, given: &Path) -> anyhow::Result<PathBuf> {
    let dir: PathBuf = here.join(given).components().collect();
    let parent = dir.parent().unwrap_or(Path::new("/"));
    if !parent.is_dir() {
        anyhow::bail!(
            "there is no directory '{}' to make '{}' in: create it with mkdir",
            parent.display(),
            given.display()
        );
    }
    if dir.to_str().is_none() {
        anyhow::bail!("'{}' is not UTF-8: name another directory", given.display());
    }
    Ok(dir)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn destination_is_relative_to_the_callers_directory() {
        let here = tempfile::tempdir().unwrap();
        let made = |given: &str| destination(here.path(), Path::new(given));
        assert_eq!(made("./vm.cow").unwrap(), here.path().join("vm.cow"));
        assert_eq!(made("/tmp/vm.cow").unwrap(), Path::new("/tmp/vm.cow"));
        let line = made("none/vm.cow").unwrap_err().to_string();
        assert!(line.contains("create it with mkdir"), "{line}");
    }
}
