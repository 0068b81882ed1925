//! `cowslip diff`: the changes of a mounted disk as a file that other tools take.
//!
//! The daemon freezes the disk (`moment.rs`). What is written, and where to, is done here, with the
//! rights of who asked.

use std::fs::{File, Permissions};
use std::io::{self, BufWriter, IsTerminal, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use clap::{Args, ValueEnum};
use serde_json::Value;

use super::client::Place;
use super::moment::Moment;
use super::progress::{Progress, Verbosity};
use super::{DONE, Failure, die_of_a_closed_pipe, say, tidy};
use crate::confined::Located;
use crate::export::bmap::Mapped;
use crate::export::qcow2::Backing;
use crate::export::{self, Kind, Run};
use crate::part::Fresh;
use crate::spec::{Overwrite, format_size, format_zeroed};

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
    #[command(flatten)]
    verbosity: Verbosity,
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
    let (out, mode) = if to_stdout { (PathBuf::new(), None) } else { aim(args)? };
    let frozen = freeze(&place, args)?;
    if to_stdout {
        die_of_a_closed_pipe();
        let mut out = BufWriter::new(io::stdout().lock());
        write_plainly(&mut out, &frozen, args).context("cannot print")?;
        return Ok(DONE);
    }
    let failed = || format!("cannot write '{}'", args.out.display());
    // Whole under its name, or not there.
    let fresh = Fresh::create(&out, if mode.is_some() { 0o600 } else { 0o666 })?;
    if let Some(part) = fresh.path() {
        tidy::remove_on_signal(part.to_owned()).with_context(failed)?;
    }
    let written = if args.output == Output::Qcow2 {
        write_qcow2(fresh.file(), &frozen, args)
    } else {
        let mut to = BufWriter::with_capacity(1 << 20, fresh.file());
        write_plainly(&mut to, &frozen, args).and_then(|()| to.flush())
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
    fresh.commit(overwrite).map_err(anyhow::Error::msg)?;
    let (mut data, mut zeroed) = (0, 0);
    for run in &frozen.runs {
        let sum = if run.kind == Kind::Data { &mut data } else { &mut zeroed };
        *sum += run.range.end - run.range.start;
    }
    let (data, zeroed) = (format_size(data), format_zeroed(zeroed));
    say(&format!("{}: {data} of changes{zeroed} written", args.out.display()));
    Ok(DONE)
}

/// Has the daemon freeze the disk, and finds out what has changed.
fn freeze(place: &Place, args: &DiffArgs) -> anyhow::Result<Frozen> {
    let (since, until) = (args.since.as_deref(), args.until.as_deref());
    let Moment { file, changed, base: found } =
        Moment::freeze(place, &args.file, since, until, args.verbosity)?;
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
    let mut shown = Shown::new(args.verbosity);
    let mut watch = |done, total| shown.at(done, total);
    let Frozen { file, size, runs, .. } = frozen;
    let written = export::qcow2::write(out, file, runs, *size, backing.as_ref(), &mut watch);
    shown.progress.end();
    written
}

/// Writes what leaves from its first byte to its last.
fn write_plainly(out: &mut dyn Write, frozen: &Frozen, args: &DiffArgs) -> io::Result<()> {
    let mut shown = Shown::new(args.verbosity);
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
    fn new(verbosity: Verbosity) -> Self {
        Self { progress: Progress::new(verbosity), last: Instant::now() }
    }

    fn at(&mut self, done: u64, total: u64) {
        if self.last.elapsed() >= SHOWN {
            self.last = Instant::now();
            self.progress.show(&Value::from_iter([("done", done), ("total", total)]));
        }
    }
}

/// Where the diff goes, and the mode of the file that it replaces there.
fn aim(args: &DiffArgs) -> anyhow::Result<(PathBuf, Option<Permissions>)> {
    let shown = args.out.display();
    let out = super::mount::current_dir()?.join(&args.out);
    let failed = || format!("cannot write '{shown}'");
    match Located::at(&out) {
        Ok(found) if !found.metadata().is_file() => {
            anyhow::bail!("'{shown}' is no file: name a file, or - for stdout")
        }
        Ok(_) if !args.overwrite => {
            anyhow::bail!("'{shown}' is there already: name another, or use --overwrite")
        }
        // What a link leads to is replaced, not the link.
        Ok(found) => {
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
