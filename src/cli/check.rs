//! `cowslip check`: is an overlay that is not mounted whole, and is its base the one it knows?
//!
//! Looks only, and repairs nothing. A store is checked disk by disk. Exit 0: all is well; 3:
//! something is damaged, or the base is gone or has changed; 1: it could not be looked at.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use clap::Args;

use super::table::printable;
use super::{DONE, UNHEALTHY, die_of_a_closed_pipe, print};
use crate::base::identity::Identity;
use crate::overlay::blocks::{BlockIndex, State};
use crate::overlay::data::SEGMENT;
use crate::overlay::persist::{self, Found, Place};
use crate::overlay::record::Image;
use crate::overlay::recover::{LogError, Recovered, Trusted};
use crate::overlay::stack::{BaseRecord, StackError};
use crate::spec::format_size;

#[derive(Debug, Args)]
pub(super) struct CheckArgs {
    /// The directory of an overlay, or of a store
    overlay: PathBuf,
}

pub(super) fn run(args: &CheckArgs) -> anyhow::Result<u8> {
    die_of_a_closed_pipe();
    let dir = &args.overlay;
    let targets = targets(dir)?;
    if targets.is_empty() {
        print(format!("the store '{}' holds no disks\n", dir.display()).as_bytes())?;
    }
    let mut worst = DONE;
    for (index, target) in targets.iter().enumerate() {
        if index > 0 {
            print(b"\n")?;
        }
        let findings = check(target)?;
        print(findings.show(&target.shown).as_bytes())?;
        if !findings.damage.is_empty() {
            worst = UNHEALTHY;
        }
    }
    Ok(worst)
}

/// One overlay to be checked.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Target {
    dir: PathBuf,
    /// Where its layers are, unless inside `dir`.
    layers: Option<PathBuf>,
    /// Its name for people.
    shown: String,
}

/// The overlay at `dir`, or those of the store there that have a name: what has none is swept at
/// the next mount.
fn targets(dir: &Path) -> anyhow::Result<Vec<Target>> {
    let names = dir.join("names");
    let has = |name: &str| dir.join(name).exists();
    if dir.is_dir() && !has("stack") && !has("layers") && !has("names") {
        anyhow::bail!(
            "'{}' is no overlay and no store: it holds neither 'stack' nor 'names'",
            dir.display()
        );
    }
    if has("stack") || !names.is_dir() {
        return Ok(vec![Target {
            dir: dir.to_owned(),
            layers: None,
            shown: dir.display().to_string(),
        }]);
    }
    let reading = || format!("cannot read the store '{}'", dir.display());
    let mut found = Vec::new();
    for entry in fs::read_dir(&names).with_context(reading)? {
        let entry = entry.with_context(reading)?;
        // What is not a link to a disk is a name that was being made.
        let Ok(link) = fs::read_link(entry.path()) else {
            continue;
        };
        found.push(Target {
            dir: dir.join("disks").join(link.file_name().unwrap_or_default()),
            layers: Some(dir.join("layers")),
            shown: printable(&entry.file_name().to_string_lossy()),
        });
    }
    found.sort_by(|a, b| a.shown.cmp(&b.shown));
    Ok(found)
}

/// What a check found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Findings {
    /// What there is, each with its heading.
    facts: Vec<(&'static str, String)>,
    /// What is wrong.
    damage: Vec<String>,
}

impl Findings {
    fn fact(&mut self, heading: &'static str, text: impl Into<String>) {
        self.facts.push((heading, text.into()));
    }

    fn show(&self, name: &str) -> String {
        let mut text = format!("overlay  {name}\n");
        for (heading, fact) in &self.facts {
            text += &format!("{heading:<7}  {fact}\n");
        }
        for damage in &self.damage {
            text += &format!("damage   {damage}\n");
        }
        text
    }
}

/// Looks at one overlay.
///
/// # Errors
/// When it could not be looked at: it is in use, of another version, or the host said no.
fn check(target: &Target) -> anyhow::Result<Findings> {
    let mut findings = Findings::default();
    let place = Place { dir: &target.dir, layers: target.layers.as_deref() };
    let found = match persist::find(place) {
        Ok(found) => found,
        Err(error) => {
            findings.damage.push(damage(target, &error)?);
            return Ok(findings);
        }
    };
    findings.fact("format", found.stack.version.to_string());
    check_base(&found.stack.base, &mut findings)?;
    let layers = found.stack.layers.iter();
    let layers: Vec<String> = layers.map(|layer| layer.uuid.to_string()).collect();
    findings.fact("layers", layers.join(", "));
    match found.examine() {
        Ok((trusted, image)) => check_layer(&found, &trusted, &image, &mut findings)?,
        Err(error) => findings.damage.push(damage(target, &error)?),
    }
    Ok(findings)
}

/// `error` as damage, if that is what it tells.
///
/// # Errors
/// A line when it tells that nothing could be learnt.
fn damage(target: &Target, error: &StackError) -> anyhow::Result<String> {
    let is_missing = |error: &io::Error| error.kind() == io::ErrorKind::NotFound;
    // The overlay is there, so what is missing was in it; in a store its name is there.
    let is_inside = || target.layers.is_some() || target.dir.is_dir();
    match error {
        StackError::Damaged | StackError::Syntax(_) => Ok(error.to_string()),
        StackError::Log { error: LogError::Damaged { .. }, .. } => Ok(error.to_string()),
        StackError::Io { error: cause, .. } if is_missing(cause) && is_inside() => {
            Ok(error.to_string())
        }
        // Something led here: a name in a store, or the layers.
        StackError::NotAnOverlay => Ok("its 'stack' is missing: restore it from a backup".into()),
        StackError::Io { .. } => anyhow::bail!("overlay '{}': {error}", target.dir.display()),
        _ => anyhow::bail!("overlay '{}' {error}", target.dir.display()),
    }
}

/// Whether the base is there, and is what it was.
fn check_base(base: &BaseRecord, findings: &mut Findings) -> anyhow::Result<()> {
    let (path, format, identity) = match base {
        BaseRecord::Blank { size } => {
            findings.fact("base", format!("blank, {}", format_size(*size)));
            return Ok(());
        }
        BaseRecord::File { path, format, identity } => (path, format, identity),
    };
    let shown = path.display();
    let unreadable = || format!("cannot read the base '{shown}'");
    let found = match File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        file => Some(Identity::of(&file.with_context(unreadable)?).with_context(unreadable)?),
    };
    let (verdict, damage) = match found {
        None => {
            ("missing", Some(format!("the base '{shown}' is missing: put it back in its place")))
        }
        Some(now) => match identity.differences(&now) {
            None => ("unchanged", None),
            Some(what) => (
                "changed",
                Some(format!("the base '{shown}' has changed: {what}: put the old one back")),
            ),
        },
    };
    let size = format_size(identity.size);
    findings.fact("base", format!("{shown}, {format}, {size}, {verdict}"));
    findings.damage.extend(damage);
    Ok(())
}

/// What the log says, and whether the data is there for it.
fn check_layer(
    found: &Found,
    trusted: &Trusted,
    image: &Image,
    findings: &mut Findings,
) -> anyhow::Result<()> {
    let block = u64::from(found.block());
    let size = format_size(image.size);
    findings.fact("disk", format!("{size}, blocks of {}", format_size(block)));
    let bytes = |blocks: u64| format_size(blocks.saturating_mul(block));
    let (data, zero) = (image.blocks.data_blocks(), image.blocks.zero_blocks());
    findings.fact("changed", format!("{} of data, {} zeroed", bytes(data), bytes(zero)));
    let (good, count) = (trusted.scan.good, trusted.count);
    findings.fact("log", format!("{good} records, {count} of them count"));
    findings.fact("state", state(trusted.recovered));
    let ends = segment_ends(found).context("cannot look at the overlay's data")?;
    findings.damage.extend(misplaced(image, block, &ends));
    Ok(())
}

/// What the next mount will have to do.
fn state(recovered: Recovered) -> String {
    match recovered {
        Recovered::New | Recovered::Clean => "clean".to_owned(),
        Recovered::All => "needs recovery: nothing is lost (the next mount does it)".to_owned(),
        Recovered::Vouched { lost: 0 } => "as after a power cut: nothing is lost".to_owned(),
        Recovered::Vouched { lost } => {
            format!("as after a power cut: {lost} records since the last sync are lost")
        }
    }
}

/// Where each segment of the data file ends, in bytes of the disk, by its index.
fn segment_ends(found: &Found) -> io::Result<HashMap<u64, u64>> {
    let Some(data) = found.data().host_file() else {
        return Ok(HashMap::new());
    };
    let mut ends = HashMap::new();
    for (index, file) in data.segments()? {
        let index = index as u64;
        ends.insert(index, index * SEGMENT + file.metadata()?.len());
    }
    Ok(ends)
}

/// Data blocks that cannot be: past the disk's size, or where the data file holds nothing.
fn misplaced(image: &Image, block: u64, ends: &HashMap<u64, u64>) -> Vec<String> {
    let (mut outside, mut missing) = (Sum::default(), Sum::default());
    let all = BlockIndex(0)..BlockIndex(u64::MAX);
    for run in image.blocks.runs(all).filter(|run| run.state == State::Data) {
        let bytes = run.range.start.0.saturating_mul(block)..run.range.end.0.saturating_mul(block);
        // The last block may reach over the end of the disk, and is stored as far as that.
        let size = image.size;
        outside.add(bytes.start.max(size.next_multiple_of(block))..bytes.end);
        for part in by_segment(bytes.start..bytes.end.min(size)) {
            let end = ends.get(&(part.start / SEGMENT)).copied().unwrap_or(0);
            missing.add(part.start.max(end)..part.end);
        }
    }
    let line = |sum: Sum, what: &str| {
        let first = sum.first?;
        let size = format_size(sum.bytes);
        Some(format!("{size} of data from byte {first} on {what}"))
    };
    let lines = [
        line(outside, "lie past the end of the disk"),
        line(missing, "are missing: the data file is too short, restore it from a backup"),
    ];
    lines.into_iter().flatten().collect()
}

/// `range` cut at the borders of segments.
fn by_segment(range: Range<u64>) -> impl Iterator<Item = Range<u64>> {
    let mut at = range.start;
    std::iter::from_fn(move || {
        let start = at;
        at = range.end.min((start / SEGMENT + 1).saturating_mul(SEGMENT));
        (start < range.end).then_some(start..at)
    })
}

/// Bytes that were found, and the first of them.
#[derive(Default)]
struct Sum {
    first: Option<u64>,
    bytes: u64,
}

impl Sum {
    fn add(&mut self, range: Range<u64>) {
        if !range.is_empty() {
            self.first.get_or_insert(range.start);
            self.bytes += range.end - range.start;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::overlay::persist::New;
    use crate::overlay::stack::{LayerRecord, Stack, VERSION};
    use crate::spec::OverlayKind;
    use uuid::Uuid;

    fn image(size: u64, data: Range<u64>) -> Image {
        let mut image = Image::new(size, size);
        image.blocks.set(BlockIndex(data.start)..BlockIndex(data.end), State::Data);
        image
    }

    /// Makes an overlay at `dir` over `base`, closed only as far as a daemon that was killed.
    fn make(dir: &Path, base: BaseRecord) {
        let stack = Stack {
            version: VERSION,
            uuid: Uuid::new_v4(),
            uid: 0,
            gid: 0,
            perm: 0o600,
            kind: OverlayKind::Blocks,
            base,
            layers: vec![LayerRecord { uuid: Uuid::new_v4(), block: 4096, parent: None }],
            snapshots: Vec::new(),
        };
        let image = &image(1 << 20, 0..2);
        let new = New { stack, image, limit: None };
        drop(persist::create(Place { dir, layers: None }, new).unwrap());
    }

    fn checked(dir: &Path) -> Findings {
        check(&targets(dir).unwrap()[0]).unwrap()
    }

    fn layer(dir: &Path) -> PathBuf {
        fs::read_dir(dir.join("layers")).unwrap().next().unwrap().unwrap().path()
    }

    #[test]
    fn a_whole_overlay_is_healthy_and_its_facts_are_shown() {
        let home = tempfile::tempdir().unwrap();
        let dir = home.path().join("o");
        make(&dir, BaseRecord::Blank { size: 1 << 20 });
        let findings = checked(&dir);
        assert_eq!(findings.damage, Vec::<String>::new());
        let text = findings.show("o");
        assert!(text.starts_with("overlay  o\nformat   1\nbase     blank, 1 MiB\n"), "{text}");
        assert!(text.contains("\ndisk     1 MiB, blocks of 4 KiB\n"), "{text}");
        assert!(text.contains("\nchanged  8 KiB of data, 0 bytes zeroed\n"), "{text}");
        assert!(text.contains("\nstate    needs recovery: nothing is lost"), "{text}");
    }

    #[test]
    fn a_base_that_changed_or_is_gone_is_damage() {
        let home = tempfile::tempdir().unwrap();
        let (dir, path) = (home.path().join("o"), home.path().join("vm.img"));
        fs::write(&path, [7; 9000]).unwrap();
        let identity = Identity::of(&File::open(&path).unwrap()).unwrap();
        let base = BaseRecord::File { path: path.clone(), format: "raw".into(), identity };
        make(&dir, base);
        assert!(checked(&dir).damage.is_empty());
        fs::write(&path, [7; 100]).unwrap();
        assert!(checked(&dir).damage[0].contains("has changed: size 8.8 KiB -> 100 bytes"));
        fs::remove_file(&path).unwrap();
        assert!(checked(&dir).damage[0].contains("is missing"));
    }

    #[test]
    fn data_that_is_not_there_is_damage() {
        let home = tempfile::tempdir().unwrap();
        let dir = home.path().join("o");
        make(&dir, BaseRecord::Blank { size: 1 << 20 });
        let data = File::options().write(true).open(layer(&dir).join("data")).unwrap();
        data.set_len(4096).unwrap();
        let damage = checked(&dir).damage;
        assert!(damage[0].starts_with("4 KiB of data from byte 4096 on are missing"), "{damage:?}");
    }

    #[test]
    fn a_damaged_stack_log_or_layer_is_damage_and_not_a_failure() {
        let home = tempfile::tempdir().unwrap();
        let dir = home.path().join("o");
        make(&dir, BaseRecord::Blank { size: 1 << 20 });
        let log = layer(&dir).join("log");
        let good = fs::read(&log).unwrap();
        let mut bad = good.clone();
        bad[40] ^= 1;
        fs::write(&log, &bad).unwrap();
        assert!(checked(&dir).damage[0].contains("the log is damaged"));
        fs::remove_file(&log).unwrap();
        assert!(checked(&dir).damage[0].starts_with("opening its log"));
        fs::write(&log, good).unwrap();
        fs::write(dir.join("stack"), "x\n").unwrap();
        assert!(checked(&dir).damage[0].contains("its 'stack' is damaged"));
        fs::remove_file(dir.join("stack")).unwrap();
        assert!(checked(&dir).damage[0].contains("its 'stack' is missing"));
    }

    #[test]
    fn what_cannot_be_looked_at_is_an_error() {
        let home = tempfile::tempdir().unwrap();
        let dir = home.path().join("o");
        let error = |dir: &Path| check(&targets(dir).unwrap()[0]).unwrap_err().to_string();
        assert!(error(&dir).contains("No such file"));
        let line = targets(home.path()).unwrap_err().to_string();
        assert!(line.contains("no overlay and no store"), "{line}");
        make(&dir, BaseRecord::Blank { size: 1 });
        let held = persist::find(Place { dir: &dir, layers: None }).unwrap();
        assert!(error(&dir).contains("is in use"));
        drop(held);
    }

    #[test]
    fn data_past_the_end_of_the_disk_is_found() {
        let ends = HashMap::from([(0, 1 << 20)]);
        assert_eq!(misplaced(&image(5000, 0..2), 4096, &ends), Vec::<String>::new());
        let lines = misplaced(&image(5000, 0..4), 4096, &ends);
        assert_eq!(lines, ["8 KiB of data from byte 8192 on lie past the end of the disk"]);
    }

    #[test]
    fn every_segment_has_an_end_of_its_own() {
        let block = 1 << 20;
        let border = SEGMENT / block;
        let image = image(2 * SEGMENT, border - 1..border + 2);
        let whole = HashMap::from([(0, SEGMENT), (1, SEGMENT + 2 * block)]);
        assert_eq!(misplaced(&image, block, &whole), Vec::<String>::new());
        let short = HashMap::from([(0, SEGMENT), (1, SEGMENT + block)]);
        assert!(misplaced(&image, block, &short)[0].starts_with("1 MiB of data"));
        let parts: Vec<_> = by_segment(SEGMENT - 1..SEGMENT + 1).collect();
        assert_eq!(parts, [SEGMENT - 1..SEGMENT, SEGMENT..SEGMENT + 1]);
    }
}
