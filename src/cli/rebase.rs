//! `cowslip rebase`: records the new location of the base of an overlay that is not mounted.
//!
//! An overlay over another base is garbage, so the new base must match the record of the old one:
//! the size and a hash of samples. The inode and the modification time may differ, as for a copy.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Context as _;
use clap::Args;

use super::mount::current_dir;
use super::plan::TrustArgs;
use super::target::{is_store, single_target};
use super::{EXIT_OK, print_line};
use crate::base::identity::Identity;
use crate::base::{self, BaseAccess, BaseError, BaseOptions};
use crate::config::{DirectIo, DiskSource, Format, Locking, Passthrough, SourcePart};
use crate::overlay::error::OverlayError;
use crate::overlay::persist;
use crate::overlay::stack::{BaseRecord, FileRecord, Stack};

#[derive(Debug, Args)]
pub(super) struct RebaseArgs {
    /// The directory of an overlay, or of one disk of a store (STORE/names/NAME)
    overlay: PathBuf,
    /// Where its base is now
    #[arg(long, value_name = "FILE")]
    base: PathBuf,
    /// Also to one that is not what the base was: what the overlay holds may be nonsense there
    #[arg(long)]
    force: bool,
    /// Let an image have its backing files below DIR, besides its own directory
    #[arg(long, value_name = "DIR")]
    allow_backing: Vec<PathBuf>,
    #[command(flatten)]
    trust: TrustArgs,
}

/// Policy for a base that does not match.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum OnMismatch {
    Refuse,
    Accept,
}

pub(super) fn run(args: &RebaseArgs) -> anyhow::Result<u8> {
    args.trust.allow(&current_dir()?)?;
    let unlike = if args.force { OnMismatch::Accept } else { OnMismatch::Refuse };
    print_line(&rebase(&args.overlay, &args.base, unlike, &args.allow_backing)?);
    Ok(EXIT_OK)
}

/// Makes `new` the base of the overlay at `dir`, and describes what was done.
fn rebase(
    dir: &Path,
    new: &Path,
    unlike: OnMismatch,
    allow_backing: &[PathBuf],
) -> anyhow::Result<String> {
    let shown = dir.display();
    if is_store(dir) {
        anyhow::bail!("'{shown}' is a store: name one of its disks, '{shown}/names/NAME'");
    }
    let target = single_target(dir)?;
    let found = persist::lock_overlay(target.overlay_path()).map_err(|error| match error {
        OverlayError::Io { .. } => anyhow::anyhow!("overlay '{shown}': {error}"),
        error => anyhow::anyhow!("overlay '{shown}' {error}"),
    })?;
    let is_committing = found.is_committing();
    let is_committing =
        is_committing.map_err(|error| anyhow::anyhow!("overlay '{shown}': {error}"))?;
    let part = found.stack.base.part();
    let BaseRecord::File { path: old, format, offset, len, identity: was, needs } =
        found.stack.base.clone()
    else {
        anyhow::bail!("overlay '{shown}' is over a blank disk: there is no base that could move");
    };
    let known = format.parse::<Format>().ok().filter(|format| format.is_supported());
    let Some(known) = known else {
        anyhow::bail!("overlay '{shown}' has a base of format {format}: use a newer cowslip");
    };
    // Use the recorded format: if the contents match, there is nothing to detect.
    let NewBase { path, identity: now, needs: needed } =
        inspect_base(new, Some(known), part, allow_backing)?;
    let of_needs = || match needs.len() == needed.len() {
        true => needs.iter().zip(&needed).find_map(|(was, is)| {
            let what = was.identity.differences_of_copy(&is.identity)?;
            Some(format!("its backing file '{}': {what}", is.path.display()))
        }),
        false => Some("it needs other files".to_owned()),
    };
    let difference = match is_committing {
        // The contents are neither old nor new, so only the file itself can be compared.
        true => was.file_difference(&now).map(|what| {
            format!("{what}, and a commit was cut short that cowslip commit '{shown}' finishes")
        }),
        false => was.differences_of_copy(&now).or_else(of_needs),
    };
    if let Some(what) = &difference {
        // If the file looks like another format, that is the clearer error.
        if known == Format::Raw {
            inspect_base(new, None, part, &[])?;
        }
        if unlike == OnMismatch::Refuse {
            anyhow::bail!(
                "'{}' is not the base of overlay '{shown}' ({what}): name the right one, or use --force and risk nonsense",
                new.display()
            );
        }
    }
    if path == old && now == was && needs == needed {
        return Ok(format!("{shown}: its base is '{}' already", path.display()));
    }
    let base =
        BaseRecord::File { path: path.clone(), format, offset, len, identity: now, needs: needed };
    let stack = Stack { base, ..found.stack.clone() };
    let mut home = found.into_dir();
    home.replace_stack(stack).map_err(|error| anyhow::anyhow!("overlay '{shown}': {error}"))?;
    let line = format!("{shown}: its base is now '{}', was '{}'", path.display(), old.display());
    Ok(match difference {
        None => line,
        Some(what) => format!("{line}; forced, it is not the same ({what})"),
    })
}

/// The candidate for the new base.
struct NewBase {
    path: PathBuf,
    identity: Identity,
    needs: Vec<FileRecord>,
}

/// Opens the base at `path`, and returns its real path, its identity and its backing files.
fn inspect_base(
    path: &Path,
    format: Option<Format>,
    part: SourcePart,
    allow_backing: &[PathBuf],
) -> anyhow::Result<NewBase> {
    let source = DiskSource::File(path.to_owned());
    let (access, locking, passthrough) = (BaseAccess::Read, Locking::Qemu, Passthrough::Off);
    let direct = DirectIo::Off;
    let how = BaseOptions { format, part, access, locking, passthrough, direct, allow_backing };
    let base = base::open(&source, how)?;
    let unreadable = || format!("cannot read the base '{}'", path.display());
    let identity = base.identity().with_context(unreadable)?;
    let record = |(path, file): &(PathBuf, Arc<File>)| {
        Ok(FileRecord { path: path.clone(), identity: Identity::of(file)? })
    };
    let needs = base.needs.iter().map(record).collect::<io::Result<_>>();
    let missing = || BaseError::Missing(path.to_owned());
    Ok(NewBase {
        path: base.path.clone().ok_or_else(missing)?,
        identity: identity.ok_or_else(missing)?,
        needs: needs.with_context(unreadable)?,
    })
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use uuid::Uuid;

    use super::*;
    use crate::config::OverlayKind;
    use crate::confined::open_dir;
    use crate::overlay::FORMAT_VERSION;
    use crate::overlay::persist::{NewOverlay, OverlayPath};
    use crate::overlay::record::LayerMap;
    use crate::overlay::stack::LayerRecord;

    /// Creates an overlay `o` over the file `a`, in a temporary directory.
    fn make(format: &str) -> tempfile::TempDir {
        let home = tempfile::tempdir().unwrap();
        let path = home.path().join("a");
        fs::write(&path, [7; 9000]).unwrap();
        let identity = inspect_base(&path, None, SourcePart::Whole, &[]).unwrap().identity;
        put(
            home.path(),
            BaseRecord::File {
                path,
                format: format.to_owned(),
                offset: None,
                len: None,
                identity,
                needs: Vec::new(),
            },
        );
        home
    }

    fn put(home: &Path, base: BaseRecord) {
        let stack = Stack {
            version: FORMAT_VERSION,
            uuid: Uuid::new_v4(),
            uid: 0,
            gid: 0,
            perm: 0o600,
            base,
            kind: OverlayKind::Blocks,
            layers: vec![LayerRecord { uuid: Uuid::new_v4(), block: 4096, parent: None }],
            snapshots: Vec::new(),
        };
        let new = NewOverlay { stack, map: &LayerMap::new(9000, 9000), limit: None };
        drop(persist::create(OverlayPath { dir: &home.join("o"), layers: None }, new).unwrap());
    }

    fn tried(home: &Path, name: &str, unlike: OnMismatch) -> Result<String, String> {
        rebase(&home.join("o"), &home.join(name), unlike, &[]).map_err(|error| format!("{error:#}"))
    }

    fn looked(path: &Path) -> (PathBuf, Identity) {
        let NewBase { path, identity, .. } =
            inspect_base(path, None, SourcePart::Whole, &[]).unwrap();
        (path, identity)
    }

    fn base_of(home: &Path) -> (PathBuf, Identity) {
        let stack = Stack::read(&open_dir(&home.join("o")).unwrap()).unwrap();
        let BaseRecord::File { path, identity, .. } = stack.base else { panic!("blank") };
        (path, identity)
    }

    #[test]
    fn copy_becomes_the_base_under_its_real_path() {
        let home = make("raw");
        let home = home.path();
        fs::write(home.join("copy"), [7; 9000]).unwrap();
        symlink("copy", home.join("link")).unwrap();
        let line = tried(home, "link", OnMismatch::Refuse).unwrap();
        assert!(line.contains("/copy', was '") && !line.contains("forced"), "{line}");
        assert_eq!(base_of(home), looked(&home.join("copy")));
        assert!(tried(home, "copy", OnMismatch::Refuse).unwrap().ends_with("already"));
    }

    #[test]
    fn different_base_is_accepted_only_by_force() {
        let home = make("raw");
        let home = home.path();
        fs::write(home.join("other"), [8; 9000]).unwrap();
        let before = base_of(home);
        let line = tried(home, "other", OnMismatch::Refuse).unwrap_err();
        assert!(line.contains("is not the base") && line.contains("its contents differ"), "{line}");
        assert_eq!(base_of(home), before);
        let line = tried(home, "other", OnMismatch::Accept).unwrap();
        assert!(line.contains("; forced, it is not the same (its contents differ)"), "{line}");
        assert_eq!(base_of(home), looked(&home.join("other")));
    }

    #[test]
    fn unusable_base_is_refused_even_by_force() {
        let home = make("raw");
        let home = home.path();
        fs::write(home.join("qcow2"), [b"QFI\xfb\0\0\0\x03".as_slice(), &[0; 8992]].concat())
            .unwrap();
        for (name, why) in [
            ("none", "does not exist"),
            ("o", "is a directory"),
            ("qcow2", "looks like a qcow2 image"),
        ] {
            let line = tried(home, name, OnMismatch::Accept).unwrap_err();
            assert!(line.contains(why) && !line.contains('\n'), "{line}");
        }
    }

    #[test]
    fn error_says_why_an_overlay_cannot_be_rebased() {
        let home = tempfile::tempdir().unwrap();
        put(home.path(), BaseRecord::Blank { size: 9000 });
        fs::write(home.path().join("a"), [7; 9000]).unwrap();
        assert!(
            tried(home.path(), "a", OnMismatch::Accept).unwrap_err().contains("over a blank disk")
        );
        let home = make("vhdx");
        assert!(
            tried(home.path(), "a", OnMismatch::Accept).unwrap_err().contains("of format vhdx")
        );
        let home = make("raw");
        let dir = home.path().join("o");
        let held = persist::lock_overlay(OverlayPath { dir: &dir, layers: None }).unwrap();
        assert!(tried(home.path(), "a", OnMismatch::Accept).unwrap_err().contains("is in use"));
        drop(held);
        fs::create_dir(home.path().join("names")).unwrap();
        let line = rebase(home.path(), &dir, OnMismatch::Accept, &[]).unwrap_err().to_string();
        assert!(line.contains("is a store: name one of its disks"), "{line}");
    }
}
