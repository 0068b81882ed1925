//! `cowslip import`: converts an image with changes into an overlay over its backing file.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context as _;
use clap::Args;
use rustix::fs::{CWD, RenameFlags, rename, renameat_with};
use rustix::io::Errno;

use super::mount::current_dir;
use super::plan::TrustArgs;
use super::{EXIT_OK, cleanup, print_line};
use crate::base::qcow2;
use crate::config::{DiskSource, DiskSpec, Format, format_size, format_zeroed};
use crate::disk::{self, Disk, FallocateMode, OpenContext, SizeMode};
use crate::extents::ExtentKind;
use crate::host::sync_parent_dir;
use crate::layer::{Layer, Wait};
use crate::overlay::Usage;
use crate::overlay::persist;
use crate::part_file::part_path;

/// Time limit for running requests when the disk is closed; there are none.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(5);
/// Size in bytes of one read and write.
const COPY_CHUNK: u64 = 1 << 20;

#[derive(Debug, Args)]
pub(super) struct ImportArgs {
    /// A qcow2 image
    image: PathBuf,
    /// Where to make the overlay
    #[arg(long, value_name = "DIR")]
    overlay: PathBuf,
    /// Let the image have its backing files below DIR, besides its own directory
    #[arg(long, value_name = "DIR")]
    allow_backing: Vec<PathBuf>,
    #[command(flatten)]
    trust: TrustArgs,
}

pub(super) fn run(args: &ImportArgs) -> anyhow::Result<u8> {
    let here = current_dir()?;
    args.trust.allow(&here)?;
    // Without a trailing `/`, which would not be part of the name.
    let dir: PathBuf = here.join(&args.overlay).components().collect();
    if dir.exists() {
        anyhow::bail!("'{}' is there already: name a new directory", args.overlay.display());
    }
    let dir = persist::resolve_overlay_path(&dir)
        .map_err(|error| anyhow::anyhow!("overlay '{}' {error}", dir.display()))?;
    // Rename only a complete overlay: a partial one would be mounted like a complete one.
    let part = part_path(&dir);
    if part.symlink_metadata().is_ok() {
        anyhow::bail!("'{}' is left of an import that was cut short: remove it", part.display());
    }
    let allow_backing: Vec<PathBuf> =
        args.allow_backing.iter().map(|below| here.join(below)).collect();
    let image = here.join(&args.image);
    let top = qcow2::open_top(&image, &allow_backing)?;
    let mut spec = DiskSpec::new(
        "import".to_owned(),
        match &top.backing {
            Some((path, _)) => DiskSource::File(path.clone()),
            None => DiskSource::Blank(top.image.size()),
        },
    );
    spec.format = top.backing.as_ref().map(|(_, format)| *format);
    spec.overlay = Some(part.clone());
    let failed = || format!("overlay '{}'", args.overlay.display());
    cleanup::remove_on_signal(part.clone()).with_context(failed)?;
    let setting = OpenContext { allow_backing, ..OpenContext::unmounted() };
    let disk = disk::open(&spec, &setting)?.disk;
    // The file opened must be the file that was checked: the path may lead elsewhere by now.
    let taken = match &top.backing {
        Some((path, _)) if disk.base_path().as_ref() != Some(path) => Err(std::io::Error::other(
            format!("'{}' changed its place meanwhile: try again", path.display()),
        )),
        _ => copy_changes(&disk, top.image.as_ref()),
    };
    let taken = match taken {
        Ok(taken) => taken,
        Err(error) => {
            // A partial overlay is useless, and was created by this command.
            disk.abandon();
            cleanup::remove_path(&part);
            return Err(error).with_context(failed);
        }
    };
    disk.close(CLOSE_TIMEOUT).with_context(failed)?;
    let named = renameat_with(CWD, &part, CWD, &dir, RenameFlags::NOREPLACE);
    let named = match named {
        // The file system does not support NOREPLACE; the directory did not exist before.
        Err(Errno::INVAL | Errno::NOSYS) => rename(&part, &dir),
        named => named,
    };
    named
        .map_err(std::io::Error::from)
        .and_then(|()| sync_parent_dir(&dir))
        .with_context(failed)?;
    let (_, format) = top.backing.map_or((PathBuf::new(), Format::Raw), |backing| backing);
    let mount = match (&spec.source, format) {
        (DiskSource::File(path), Format::Raw) => {
            format!("NAME={},overlay={}", path.display(), args.overlay.display())
        }
        (DiskSource::File(path), format) => {
            format!("NAME={},format={format},overlay={}", path.display(), args.overlay.display())
        }
        _ => format!("NAME=blank:{},overlay={}", top.image.size(), args.overlay.display()),
    };
    let shown = args.overlay.display();
    let (data, zeroed) = (format_size(taken.data), format_zeroed(taken.zero));
    print_line(&format!("{shown}: holds {data} of changes{zeroed}: mount it as {mount}"));
    Ok(EXIT_OK)
}

/// Copies the changes in `image` itself to `disk`, and returns the number of bytes.
fn copy_changes(disk: &Disk, image: &dyn Layer) -> std::io::Result<Usage> {
    let size = image.size();
    disk.set_size(size, Wait::Yes)?;
    let mut buf = vec![0; usize::try_from(COPY_CHUNK).unwrap_or(0)];
    let (mut at, mut taken) = (0, Usage { data: 0, zero: 0 });
    while at < size {
        let len = usize::try_from((size - at).min(COPY_CHUNK)).unwrap_or(0);
        let found = image.read_at(&mut buf[..len], at, Wait::Yes)?;
        let range = found.range;
        match found.kind {
            ExtentKind::Data => {
                let len = usize::try_from(range.end - range.start).unwrap_or(0);
                disk.write(&buf[..len], at, Wait::Yes)?;
                taken.data += range.end - range.start;
            }
            ExtentKind::Zero => {
                disk.fallocate(range.clone(), FallocateMode::Punch, SizeMode::Keep, Wait::Yes)?;
                taken.zero += range.end - range.start;
            }
            ExtentKind::Hole | ExtentKind::Lower => {}
        }
        at = range.end;
    }
    disk.sync()?;
    Ok(taken)
}
