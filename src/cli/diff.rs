//! `cowslip diff`: the changes of a mounted disk as a file that other tools take.
//!
//! The daemon freezes the disk (`moment.rs`). What is written, and where to, is done here, with the
//! rights of who asked.

use std::fs::{self, File};
use std::io::{self, BufWriter, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use clap::{Args, ValueEnum};
use serde_json::Value;

use super::client::Place;
use super::moment::Moment;
use super::progress::Progress;
use super::{DONE, Failure, die_of_a_closed_pipe, say};
use crate::export::bmap::Mapped;
use crate::export::qcow2::Backing;
use crate::export::{self, Run};
use crate::spec::format_size;

/// How often is shown how far it is.
const SHOWN: Duration = Duration::from_secs(1);

/// What is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
enum Output {
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
    output: Output,
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
}

/// A frozen disk and what is to be written of it.
struct Frozen {
    file: File,
    size: u64,
    runs: Vec<Run>,
    /// Its base and the format of that.
    base: Option<Backing>,
}

pub(super) fn run(args: &DiffArgs) -> anyhow::Result<u8> {
    let place = Place::of_disk(&args.file)?;
    let to_stdout = args.out == Path::new("-");
    match (args.output, to_stdout) {
        (Output::Qcow2, true) => {
            return Err(Failure::usage("a qcow2 image is written here and there: -o FILE"));
        }
        (Output::Rbd | Output::AndroidSparse, true) if io::stdout().is_terminal() => {
            return Err(Failure::usage("a diff is no text for a terminal: -o FILE, or a pipe"));
        }
        _ => {}
    }
    if args.backing.is_some() && args.output != Output::Qcow2 {
        return Err(Failure::usage("-b: only a qcow2 image names a backing file"));
    }
    if let (Output::Qcow2, Some(name), None) = (args.output, &args.since, &args.backing) {
        return Err(Failure::usage(format!(
            "the backing file has to hold what snapshot '{name}' holds: name it with -b FILE -F FORMAT"
        )));
    }
    if let Some(format) = args.backing_format.as_deref()
        && !matches!(format, "raw" | "qcow2")
    {
        return Err(Failure::usage(format!("-F {format}: a backing file is raw or qcow2")));
    }
    if !to_stdout && !args.overwrite && fs::symlink_metadata(&args.out).is_ok() {
        anyhow::bail!(
            "'{}' is there already: name another, or use --overwrite",
            args.out.display()
        );
    }
    let frozen = freeze(&place, args)?;
    if to_stdout {
        die_of_a_closed_pipe();
        let mut out = BufWriter::new(io::stdout().lock());
        write_plainly(&mut out, &frozen, args).context("cannot print")?;
        return Ok(DONE);
    }
    let out = absolute(&args.out)?;
    let failed = || format!("cannot write '{}'", args.out.display());
    let dir = out.parent().unwrap_or(Path::new("/"));
    // Whole under its name, or not there.
    let part =
        tempfile::Builder::new().prefix(".cowslip-").tempfile_in(dir).with_context(failed)?;
    if args.output == Output::Qcow2 {
        write_qcow2(part.as_file(), &frozen, args).with_context(failed)?;
    } else {
        let mut to = BufWriter::with_capacity(1 << 20, part.as_file());
        write_plainly(&mut to, &frozen, args).with_context(failed)?;
    }
    part.as_file().sync_all().with_context(failed)?;
    set_mode(part.as_file()).with_context(failed)?;
    match args.overwrite {
        true => part.persist(&out).map_err(|error| error.error),
        false => part.persist_noclobber(&out).map_err(|error| error.error),
    }
    .and_then(|_| File::open(dir)?.sync_all())
    .with_context(failed)?;
    let bytes: u64 = frozen.runs.iter().map(|run| run.range.end - run.range.start).sum();
    say(&format!("{}: {} of changes written", args.out.display(), format_size(bytes)));
    Ok(DONE)
}

/// Has the daemon freeze the disk, and finds out what has changed.
fn freeze(place: &Place, args: &DiffArgs) -> anyhow::Result<Frozen> {
    let (since, until) = (args.since.as_deref(), args.until.as_deref());
    let Moment { file, changed, base: found } = Moment::freeze(place, &args.file, since, until)?;
    let failed = || format!("cannot read '{}'", args.file.display());
    let size = file.metadata().with_context(failed)?.len();
    let changed = (!args.full).then_some(&changed);
    let runs = export::plan(&file, changed, size).with_context(failed)?;
    let text = |key: &str| found[key].as_str().map(str::to_owned);
    let base = text("path").zip(text("format"));
    let base = base.map(|(name, format)| Backing { name, format });
    if found == "part" && args.output == Output::Qcow2 && args.backing.is_none() && !args.full {
        anyhow::bail!(
            "its base is a part of a file, which a qcow2 image has no name for: --full writes all of it"
        );
    }
    Ok(Frozen { file, size, runs, base })
}

fn write_qcow2(out: &File, frozen: &Frozen, args: &DiffArgs) -> io::Result<()> {
    let given = args.backing.clone().zip(args.backing_format.clone());
    let given = given.map(|(name, format)| Backing { name, format });
    let backing = given.or_else(|| frozen.base.clone()).filter(|_| !args.full);
    let mut shown = Shown::new();
    let mut watch = |done, total| shown.at(done, total);
    let Frozen { file, size, runs, .. } = frozen;
    let written = export::qcow2::write(out, file, runs, *size, backing.as_ref(), &mut watch);
    shown.progress.end();
    written
}

/// Writes what leaves from its first byte to its last.
fn write_plainly(out: &mut dyn Write, frozen: &Frozen, args: &DiffArgs) -> io::Result<()> {
    let mut shown = Shown::new();
    let mut watch = |done, total| shown.at(done, total);
    let Frozen { file, size, runs, .. } = frozen;
    let written = match args.output {
        Output::Bmap => {
            let mapped = if args.full { Mapped::Data } else { Mapped::All };
            export::bmap::write(out, file, runs, *size, mapped, &mut watch)
        }
        Output::AndroidSparse => export::android::write(out, file, runs, *size, &mut watch),
        Output::Rbd => export::rbd::write(out, file, runs, *size, &mut watch),
        // It is written here and there.
        Output::Qcow2 => Err(io::ErrorKind::NotSeekable.into()),
    };
    shown.progress.end();
    written
}

/// Shows how far it is, once a second.
struct Shown {
    progress: Progress,
    last: Instant,
}

impl Shown {
    fn new() -> Self {
        Self { progress: Progress::new(), last: Instant::now() }
    }

    fn at(&mut self, done: u64, total: u64) {
        if self.last.elapsed() >= SHOWN {
            self.last = Instant::now();
            self.progress.show(&Value::from_iter([("done", done), ("total", total)]));
        }
    }
}

fn absolute(path: &Path) -> anyhow::Result<PathBuf> {
    Ok(super::mount::current_dir()?.join(path))
}

/// The mode of any new file, which a temporary one does not have.
fn set_mode(file: &File) -> io::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    let mask = rustix::process::umask(rustix::fs::Mode::empty());
    rustix::process::umask(mask);
    let mode = 0o666 & !mask.bits();
    file.set_permissions(fs::Permissions::from_mode(mode))
}
