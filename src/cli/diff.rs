//! `cowslip diff`: the changes of a mounted disk as a file that other tools take.
//!
//! The daemon freezes the disk (`point_in_time.rs`). What is written, and where to, is done here, with the
//! rights of who asked.

use std::fs::{File, Permissions};
use std::io::{self, BufWriter, IsTerminal, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use clap::{Args, ValueEnum};

use super::client::{Endpoint, check_answers};
use super::point_in_time::PointInTime;
use super::progress::{ProgressDisplay, Verbosity};
use super::{CliError, EXIT_OK, cleanup, print_line, restore_sigpipe};
use crate::base::lock;
use crate::config::{Overwrite, format_size, format_zeroed};
use crate::control::api::{DiffBaseRecord, Progress};
use crate::export::{self, BmapScope, Export};
use crate::formats::ImageRun;
use crate::formats::qcow2::BackingFile;
use crate::part_file::UnnamedFile;
use crate::trusted_path;

/// How often is shown how far it is.
const PROGRESS_INTERVAL: Duration = Duration::from_secs(1);

/// What is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
enum DiffFormat {
    /// An image with the base as its backing file
    #[default]
    Qcow2,
    /// Records as `rbd import-diff` takes them
    Rbd,
    /// An Android sparse image: what has not changed is not in it (sizes of whole 4 KiB)
    AndroidSparse,
    /// The block map by which `bmaptool copy` writes and verifies what has changed
    Bmap,
}

#[derive(Debug, Args)]
pub(super) struct DiffArgs {
    /// The mounted disk
    file: PathBuf,
    /// What has changed since this snapshot (since the base)
    #[arg(long, value_name = "SNAPSHOT")]
    since: Option<String>,
    /// The disk as it was at this snapshot (as it is now)
    #[arg(long, value_name = "SNAPSHOT")]
    until: Option<String>,
    /// All of the disk, not only what has changed
    #[arg(long, conflicts_with = "since")]
    full: bool,
    /// The format
    #[arg(short = 'O', value_enum, default_value_t, value_name = "FORMAT")]
    output: DiffFormat,
    /// The file to write (- is stdout, but for qcow2)
    #[arg(short = 'o', value_name = "OUT")]
    out: PathBuf,
    /// Write over OUT if it is there
    #[arg(long)]
    overwrite: bool,
    /// What a qcow2 image says it is a difference to (the disk's base)
    #[arg(short = 'b', long, value_name = "FILE", requires = "backing_format")]
    backing: Option<String>,
    /// The format of that: raw or qcow2
    #[arg(short = 'F', long, value_name = "FORMAT", requires = "backing")]
    backing_format: Option<String>,
    #[command(flatten)]
    verbosity: Verbosity,
}

/// A frozen disk and what is to be written of it.
struct DiffInput {
    file: File,
    size: u64,
    runs: Vec<ImageRun>,
    /// Its base and the format of that.
    base: Option<BackingFile>,
}

impl DiffInput {
    fn export(&self) -> Export<'_> {
        Export { file: &self.file, size: self.size, runs: &self.runs }
    }
}

pub(super) fn run(args: &DiffArgs) -> anyhow::Result<u8> {
    let place = Endpoint::of_disk(&args.file)?;
    let to_stdout = args.out == Path::new("-");
    check_usage(args, to_stdout)?;
    if to_stdout {
        let input = freeze_disk(&place, args)?;
        restore_sigpipe();
        let mut out = BufWriter::new(io::stdout().lock());
        write_sequential(&mut out, &input, args).context("cannot print")?;
        return Ok(EXIT_OK);
    }
    let (out, mode) = resolve_output(args)?;
    let input = freeze_disk(&place, args)?;
    write_file(&out, mode, &input, args)?;
    let (mut data, mut zeroed) = (0, 0);
    for run in &input.runs {
        data += run.data_len();
        zeroed += run.range.end - run.range.start - run.data_len();
    }
    let (data, zeroed) = (format_size(data), format_zeroed(zeroed));
    print_line(&format!("{}: {data} of changes{zeroed} written", args.out.display()));
    Ok(EXIT_OK)
}

/// Checks that the options go together.
fn check_usage(args: &DiffArgs, to_stdout: bool) -> anyhow::Result<()> {
    match (args.output, to_stdout) {
        (DiffFormat::Qcow2, true) => {
            return Err(CliError::usage("a qcow2 image is written here and there: -o FILE"));
        }
        (DiffFormat::Rbd | DiffFormat::AndroidSparse, true) if io::stdout().is_terminal() => {
            return Err(CliError::usage("a diff is no text for a terminal: -o FILE, or a pipe"));
        }
        _ => {}
    }
    if args.backing.is_some() && args.output != DiffFormat::Qcow2 {
        return Err(CliError::usage("-b: only a qcow2 image names a backing file"));
    }
    if let (DiffFormat::Qcow2, Some(name), None) = (args.output, &args.since, &args.backing) {
        return Err(CliError::usage(format!(
            "the backing file has to hold what snapshot '{name}' holds: name it with -b FILE -F FORMAT"
        )));
    }
    if let Some(format) = args.backing_format.as_deref()
        && !matches!(format, "raw" | "qcow2")
    {
        return Err(CliError::usage(format!("-F {format}: a backing file is raw or qcow2")));
    }
    Ok(())
}

/// Writes the diff to the file `out`, whole under its name or not at all. `mode` is that of the file
/// which it replaces there.
fn write_file(
    out: &Path,
    mode: Option<Permissions>,
    input: &DiffInput,
    args: &DiffArgs,
) -> anyhow::Result<()> {
    let failed = || format!("cannot write '{}'", args.out.display());
    let fresh = UnnamedFile::create(out, if mode.is_some() { 0o600 } else { 0o666 })?;
    if let Some(part) = fresh.path() {
        cleanup::remove_on_signal(part.to_owned()).with_context(failed)?;
    }
    let written = if args.output == DiffFormat::Qcow2 {
        write_qcow2(fresh.file(), input, args)
    } else {
        let mut to = BufWriter::with_capacity(1 << 20, fresh.file());
        write_sequential(&mut to, input, args).and_then(|()| to.flush())
    };
    let written = written.and_then(|()| match mode {
        // Its successor is readable for nobody else.
        Some(mode) => fresh.file().set_permissions(mode),
        None => Ok(()),
    });
    if let Err(error) = written {
        fresh.discard();
        return Err(error).with_context(failed);
    }
    let overwrite = if args.overwrite { Overwrite::Yes } else { Overwrite::No };
    fresh.commit(overwrite).map_err(anyhow::Error::msg)
}

/// Has the daemon freeze the disk, and finds out what has changed.
fn freeze_disk(place: &Endpoint, args: &DiffArgs) -> anyhow::Result<DiffInput> {
    let (since, until) = (args.since.as_deref(), args.until.as_deref());
    let PointInTime { file, changed, base: found } =
        PointInTime::freeze(place, &args.file, since, until, args.verbosity)?;
    let failed = || format!("cannot read '{}'", args.file.display());
    let size = file.metadata().with_context(failed)?.len();
    let changed = (!args.full).then_some(&changed);
    let runs = export::find_runs(&file, changed, size).with_context(failed)?;
    let is_unnamed = found == Some(DiffBaseRecord::Part);
    let base = match found {
        Some(DiffBaseRecord::File { path, format }) => Some(BackingFile { name: path, format }),
        Some(DiffBaseRecord::Part) | None => None,
    };
    if is_unnamed && args.output == DiffFormat::Qcow2 && args.backing.is_none() && !args.full {
        anyhow::bail!(
            "a qcow2 image cannot name its base, which is a part of a file or has a path that is not UTF-8: --full writes all of it"
        );
    }
    Ok(DiffInput { file, size, runs, base })
}

fn write_qcow2(out: &File, frozen: &DiffInput, args: &DiffArgs) -> io::Result<()> {
    let given = args.backing.clone().zip(args.backing_format.clone());
    let given = given.map(|(name, format)| BackingFile { name, format });
    let backing = given.or_else(|| frozen.base.clone()).filter(|_| !args.full);
    let mut shown = DiffProgress::new(args.verbosity);
    let mut watch = |done, total| shown.update(done, total);
    let written = frozen.export().write_qcow2(out, backing.as_ref(), &mut watch);
    shown.progress.end();
    written
}

/// Writes what leaves from its first byte to its last.
fn write_sequential(out: &mut dyn Write, frozen: &DiffInput, args: &DiffArgs) -> io::Result<()> {
    let mut shown = DiffProgress::new(args.verbosity);
    let mut watch = |done, total| shown.update(done, total);
    let export = frozen.export();
    let written = match args.output {
        DiffFormat::Bmap => {
            let mapped = if args.full { BmapScope::Data } else { BmapScope::All };
            export.write_bmap(out, mapped, &mut watch)
        }
        DiffFormat::AndroidSparse => export.write_android(out, &mut watch),
        DiffFormat::Rbd => export.write_rbd(out, &mut watch),
        // It is written here and there.
        DiffFormat::Qcow2 => Err(io::ErrorKind::NotSeekable.into()),
    };
    shown.progress.end();
    written
}

/// Shows how far it is, once a second.
struct DiffProgress {
    progress: ProgressDisplay,
    last: Instant,
}

impl DiffProgress {
    fn new(verbosity: Verbosity) -> Self {
        Self { progress: ProgressDisplay::new(verbosity), last: Instant::now() }
    }

    fn update(&mut self, done: u64, total: u64) {
        if self.last.elapsed() >= PROGRESS_INTERVAL {
            self.last = Instant::now();
            self.progress.show(Progress::new(done, total));
        }
    }
}

/// Where the diff goes, and the mode of the file that it replaces there.
fn resolve_output(args: &DiffArgs) -> anyhow::Result<(PathBuf, Option<Permissions>)> {
    let shown = args.out.display();
    let out = super::mount::current_dir()?.join(&args.out);
    let failed = || format!("cannot write '{shown}'");
    check_answers(&out)?;
    match trusted_path::locate(&out) {
        Ok(found) if !found.metadata().is_file() => {
            anyhow::bail!("'{shown}' is no file: name a file, or - for stdout")
        }
        Ok(_) if !args.overwrite => {
            anyhow::bail!("'{shown}' is there already: name another, or use --overwrite")
        }
        // What a link leads to is replaced, not the link.
        Ok(found) => {
            lock::check_unused(&found, &args.out)?;
            let mode = found.metadata().mode() & 0o777;
            Ok((found.real_path().with_context(failed)?, Some(Permissions::from_mode(mode))))
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            if out.is_symlink() {
                anyhow::bail!("'{shown}' is a link to nothing: remove it");
            }
            if !out.parent().is_some_and(Path::is_dir) {
                anyhow::bail!("cannot write '{shown}': its directory must exist");
            }
            Ok((out, None))
        }
        Err(error) => Err(error).with_context(failed),
    }
}
