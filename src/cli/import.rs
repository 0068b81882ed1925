//! `cowslip import`: an image that holds changes becomes an overlay over its backing file.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context as _;
use clap::Args;
use rustix::fs::{CWD, RenameFlags, rename, renameat_with};
use rustix::io::Errno;

use super::mount::current_dir;
use super::plan::TrustArgs;
use super::{DONE, say, tidy};
use crate::base::qcow2;
use crate::disk::{self, Change, Disk, Keep, Setting};
use crate::extents::Kind;
use crate::host::sync_dir_of;
use crate::layer::{Layer, Wait};
use crate::overlay::Usage;
use crate::overlay::persist;
use crate::part::path_for;
use crate::spec::{DiskSpec, Format, Source, format_size, format_zeroed};

/// How long requests under way are waited for at the end; there are none.
const PATIENCE: Duration = Duration::from_secs(5);
/// How much is read and written at a time.
const PIECE: u64 = 1 << 20;

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
    // Without a `/` at its end, which would not be part of the name.
    let dir: PathBuf = here.join(&args.overlay).components().collect();
    if dir.exists() {
        anyhow::bail!("'{}' is there already: name a new directory", args.overlay.display());
    }
    let dir = persist::real_place(&dir)
        .map_err(|error| anyhow::anyhow!("overlay '{}' {error}", dir.display()))?;
    // Whole under its name, or not there: half of it would be mounted as if it were all.
    let part = path_for(&dir);
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
            Some((path, _)) => Source::File(path.clone()),
            None => Source::Blank(top.image.size()),
        },
    );
    spec.format = top.backing.as_ref().map(|(_, format)| *format);
    spec.overlay = Some(part.clone());
    let failed = || format!("overlay '{}'", args.overlay.display());
    tidy::remove_on_signal(part.clone()).with_context(failed)?;
    let setting = Setting { allow_backing, ..Setting::unmounted() };
    let disk = disk::open(&spec, &setting)?.disk;
    // What was allowed must be what was opened: the path may lead elsewhere by now.
    let taken = match &top.backing {
        Some((path, _)) if disk.base_path().as_ref() != Some(path) => Err(std::io::Error::other(
            format!("'{}' changed its place meanwhile: try again", path.display()),
        )),
        _ => take(&disk, top.image.as_ref()),
    };
    let taken = match taken {
        Ok(taken) => taken,
        Err(error) => {
            // What is half done is of no use to anybody: it was made for this.
            disk.abandon();
            tidy::remove(&part);
            return Err(error).with_context(failed);
        }
    };
    disk.close(PATIENCE).with_context(failed)?;
    let named = renameat_with(CWD, &part, CWD, &dir, RenameFlags::NOREPLACE);
    let named = match named {
        // The file system cannot; it was not there before.
        Err(Errno::INVAL | Errno::NOSYS) => rename(&part, &dir),
        named => named,
    };
    named.map_err(std::io::Error::from).and_then(|()| sync_dir_of(&dir)).with_context(failed)?;
    let (_, format) = top.backing.map_or((PathBuf::new(), Format::Raw), |backing| backing);
    let mount = match (&spec.source, format) {
        (Source::File(path), Format::Raw) => {
            format!("NAME={},overlay={}", path.display(), args.overlay.display())
        }
        (Source::File(path), format) => {
            format!("NAME={},format={format},overlay={}", path.display(), args.overlay.display())
        }
        _ => format!("NAME=blank:{},overlay={}", top.image.size(), args.overlay.display()),
    };
    let shown = args.overlay.display();
    let (data, zeroed) = (format_size(taken.data), format_zeroed(taken.zero));
    say(&format!("{shown}: holds {data} of changes{zeroed}: mount it as {mount}"));
    Ok(DONE)
}

/// Takes over what `image` itself holds, and tells how much that is.
fn take(disk: &Disk, image: &dyn Layer) -> std::io::Result<Usage> {
    let size = image.size();
    disk.set_size(size, Wait::Yes)?;
    let mut buf = vec![0; usize::try_from(PIECE).unwrap_or(0)];
    let (mut at, mut taken) = (0, Usage { data: 0, zero: 0 });
    while at < size {
        let len = usize::try_from((size - at).min(PIECE)).unwrap_or(0);
        let found = image.read_at(&mut buf[..len], at, Wait::Yes)?;
        let range = found.range;
        match found.kind {
            Kind::Data => {
                let len = usize::try_from(range.end - range.start).unwrap_or(0);
                disk.write(&buf[..len], at, Wait::Yes)?;
                taken.data += range.end - range.start;
            }
            Kind::Zero => {
                disk.change(range.clone(), Change::Punch, Keep::Size, Wait::Yes)?;
                taken.zero += range.end - range.start;
            }
            Kind::Hole | Kind::Lower => {}
        }
        at = range.end;
    }
    disk.sync()?;
    Ok(taken)
}
