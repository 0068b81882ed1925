//! `cowslip check`: checks an overlay that is not mounted, and whether its base is unchanged.
//!
//! Every layer is read as the next mount would read it. Without `--repair` nothing is changed. With
//! it, the recovery of the next mount is done now, and unneeded files are removed. A store is
//! checked disk by disk. Exit code 0: everything is well; 3: something is damaged, or the base is
//! missing or has changed; 1: the check itself failed.

use std::io;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use clap::Args;

use super::mount::current_dir;
use super::plan::TrustArgs;
use super::table::{Align, Table};
use super::target::{OverlayTarget, is_store, overlay_targets};
use super::{EXIT_OK, EXIT_UNHEALTHY, print, restore_sigpipe};
use crate::base::identity::Identity;
use crate::config::{SourcePart, format_size};
use crate::confined::{self, FileAccess};
use crate::overlay::error::{LogError, OverlayError};
use crate::overlay::persist::{self, LockedOverlay};
use crate::overlay::recover::Recovered;
use crate::overlay::stack::{BaseRecord, FileRecord};
use crate::overlay::verify::{LayerCheck, LayerSummary, contradictions, short_uuid};
use crate::printable;
use crate::store::StoreDirs;

#[derive(Debug, Args)]
pub(super) struct CheckArgs {
    /// The directory of an overlay, of a store, or of one of its disks (STORE/names/NAME)
    overlay: PathBuf,
    /// Recover what was not closed, and remove what nothing needs
    #[arg(long)]
    repair: bool,
    #[command(flatten)]
    trust: TrustArgs,
}

/// Reaction of a check to its findings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum CheckMode {
    /// Report only.
    Report,
    /// Repair whatever is safe to repair.
    Repair,
}

pub(super) fn run(args: &CheckArgs) -> anyhow::Result<u8> {
    args.trust.allow(&current_dir()?)?;
    let manner = if args.repair { CheckMode::Repair } else { CheckMode::Report };
    if manner == CheckMode::Report {
        restore_sigpipe();
    }
    let dir = &args.overlay;
    let is_store = is_store(dir);
    // Keep the store locked to the end, so that nobody adds or removes a disk meanwhile.
    let store = if is_store { Some(StoreDirs::open(dir)?) } else { None };
    let (mut text, mut damaged) = (Vec::new(), false);
    if let Some(store) = &store {
        let (shown, is_damaged) = check_store(store, dir, manner)?;
        damaged |= is_damaged;
        text.extend(shown);
    }
    for target in overlay_targets(dir)? {
        let findings = check(&target, manner)?;
        damaged |= !findings.damage.is_empty();
        text.push(findings.show(&target.display_name));
    }
    if text.is_empty() {
        text.push(format!("the store '{}' holds no disks\n", dir.display()));
    }
    print(&text.join("\n"))?;
    Ok(if damaged { EXIT_UNHEALTHY } else { EXIT_OK })
}

/// Finds entries of a store that belong to no disk, and returns the text and whether some are
/// damage. A repair removes them first, so that nameless disks are not checked.
fn check_store(
    store: &StoreDirs,
    dir: &Path,
    manner: CheckMode,
) -> anyhow::Result<(Option<String>, bool)> {
    let at = || format!("cannot sweep the store '{}'", dir.display());
    let left = store.leftovers().with_context(at)?;
    let mut text = String::new();
    let mut tell = |kind: &str, name: &str, why: &str, next: &str, removed: io::Result<()>| {
        let shown = printable::line(name);
        text += &match (manner, removed) {
            (CheckMode::Repair, Ok(())) => {
                format!("repair   removed the {kind} '{shown}': {why}\n")
            }
            (CheckMode::Repair, Err(error)) if error.kind() == io::ErrorKind::Other => {
                format!("unknown  {}\n", printable::line(&error.to_string()))
            }
            (CheckMode::Repair, Err(error)) => return Err(error).with_context(at),
            (CheckMode::Report, _) if kind == "name" => {
                format!("damage   the name '{shown}': {why}, {next}\n")
            }
            (CheckMode::Report, _) => format!("unused   the {kind} '{shown}': {why}, {next}\n"),
        };
        Ok(())
    };
    let is_repair = manner == CheckMode::Repair;
    let done = |remove: &dyn Fn() -> io::Result<()>| if is_repair { remove() } else { Ok(()) };
    for name in &left.names {
        let removed = done(&|| store.remove_name(name));
        tell("name", name, "it leads nowhere", "--repair removes it", removed)?;
    }
    for name in &left.disks {
        let removed = done(&|| store.remove_disk(name));
        tell("disk", name, "it has no name", "the next mount removes it", removed)?;
    }
    for uuid in &left.layers {
        let removed = done(&|| store.remove_layer(*uuid));
        let name = uuid.to_string();
        tell("layer", &name, "no disk needs it", "the next mount removes it", removed)?;
    }
    for name in &left.foreign {
        text +=
            &format!("unknown  '{}' is not cowslip's: it is left alone\n", printable::line(name));
    }
    if is_repair && text.is_empty() {
        text = "repair   nothing to do\n".to_owned();
    }
    let is_damaged = manner == CheckMode::Report && !left.names.is_empty();
    let heading = format!("store    {}\n", dir.display());
    Ok(((!text.is_empty()).then(|| heading + &text), is_damaged))
}

/// The findings of a check.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct CheckReport {
    /// Facts about the overlay, each with its heading.
    facts: Vec<(&'static str, String)>,
    /// A table with a row for each layer.
    table: Option<String>,
    /// Parts that could be removed without loss.
    unused: Vec<String>,
    /// Repairs done.
    repair: Vec<String>,
    /// Damage found.
    damage: Vec<String>,
}

impl CheckReport {
    fn add_fact(&mut self, heading: &'static str, text: impl Into<String>) {
        self.facts.push((heading, text.into()));
    }

    fn show(&self, name: &str) -> String {
        // Keep each item on one line, whatever it contains.
        let mut text = format!("overlay  {}\n", printable::line(name));
        for (heading, fact) in &self.facts {
            text += &format!("{heading:<7}  {}\n", printable::line(fact));
        }
        let lines = [("unused", &self.unused), ("repair", &self.repair), ("damage", &self.damage)];
        if let Some(table) = &self.table {
            let has_more = lines.iter().any(|(_, lines)| !lines.is_empty());
            text += &format!("\n{table}{}", if has_more { "\n" } else { "" });
        }
        for (heading, lines) in lines {
            for line in lines {
                text += &format!("{heading:<7}  {}\n", printable::line(line));
            }
        }
        text
    }
}

/// Checks one overlay, and repairs it first if `manner` allows.
///
/// # Errors
/// A line for the user when the overlay could not be checked: it is in use, has another version, or
/// the host failed.
fn check(target: &OverlayTarget, manner: CheckMode) -> anyhow::Result<CheckReport> {
    let mut findings = CheckReport::default();
    let found = match persist::lock_overlay(target.overlay_path()) {
        Ok(found) => found,
        Err(error) => {
            findings.damage.push(damage_line(target, &error)?);
            return Ok(findings);
        }
    };
    findings.add_fact("format", found.stack.version.to_string());
    check_base(&found, &mut findings)?;
    let layers = found.stack.layers.iter();
    let layers: Vec<String> = layers.map(|layer| layer.uuid.to_string()).collect();
    findings.add_fact("layers", layers.join(", "));
    let mut looks = found.check_layers();
    let mut damage = layer_damage(target, &found, &looks)?;
    if manner == CheckMode::Repair {
        if damage.is_empty() {
            repair(target, &found, &looks, &mut findings)?;
            looks = found.check_layers();
            damage = layer_damage(target, &found, &looks)?;
        } else {
            // An unneeded layer may be the source for a rescue of the lost part.
            findings.repair.push("nothing was touched: a damaged overlay stays as it is".into());
        }
    }
    add_top_facts(&found, &looks, &mut findings);
    findings.table = Some(layer_table(&found, &looks).to_string());
    findings.unused.extend(unused_lines(target, &found)?);
    findings.damage.extend(damage);
    Ok(findings)
}

/// Does the recovery that the next mount would do, and removes unneeded layers and files.
fn repair(
    target: &OverlayTarget,
    found: &LockedOverlay,
    looks: &[LayerCheck],
    findings: &mut CheckReport,
) -> anyhow::Result<()> {
    let at = || format!("overlay '{}'", target.dir.display());
    let mut done = Vec::new();
    for look in looks {
        let is_open = |sound: &LayerSummary| sound.recovered != Recovered::Clean;
        if look.summary.as_ref().is_ok_and(is_open) {
            let recovered = found.recover(&look.record).with_context(at)?;
            let what = match recovered {
                Recovered::Vouched { lost } if lost > 0 => {
                    format!("as after a power cut, {lost} changes since the last sync are lost")
                }
                _ => "nothing is lost".to_owned(),
            };
            done.push(format!("recovered layer {}: {what}", short_uuid(look.record.uuid)));
        }
    }
    if target.layers.is_none() {
        for layer in found.unused_layers().with_context(at)? {
            found.remove_unused(layer).with_context(at)?;
            let (uuid, bytes) = (layer.uuid, format_size(layer.bytes));
            done.push(format!("removed layer {uuid}, which nothing needs: {bytes}"));
        }
    }
    for name in found.remove_leftovers().with_context(at)? {
        done.push(format!("removed '{name}', left behind by a mount that was killed"));
    }
    if done.is_empty() {
        done.push("nothing to do".to_owned());
    }
    findings.repair = done;
    Ok(())
}

/// Describes unneeded layers, which are no damage. In a store, `check_store` reports them.
fn unused_lines(target: &OverlayTarget, found: &LockedOverlay) -> anyhow::Result<Vec<String>> {
    if target.layers.is_some() {
        return Ok(Vec::new());
    }
    let at = || format!("overlay '{}'", target.dir.display());
    let line = |uuid, bytes| {
        format!(
            "layer {uuid}: nothing needs it, the next mount removes it ({})",
            format_size(bytes)
        )
    };
    let layers = found.unused_layers().with_context(at)?;
    Ok(layers.iter().map(|layer| line(layer.uuid, layer.bytes)).collect())
}

/// Returns the description of `error` if it means damage.
///
/// # Errors
/// A line for the user when `error` means that the check failed.
fn damage_line(target: &OverlayTarget, error: &OverlayError) -> anyhow::Result<String> {
    let is_missing = |error: &io::Error| error.kind() == io::ErrorKind::NotFound;
    // The overlay exists, so the missing file belongs to it; in a store, its name exists.
    let is_inside = || target.layers.is_some() || target.dir.is_dir();
    match error {
        OverlayError::Damaged | OverlayError::Syntax(_) => Ok(error.to_string()),
        OverlayError::Log { error: LogError::Damaged { .. }, .. } => Ok(error.to_string()),
        OverlayError::Io { error: cause, .. } if is_missing(cause) && is_inside() => {
            Ok(error.to_string())
        }
        // A name in a store, or the layers, show that there was an overlay.
        OverlayError::NotAnOverlay => Ok("its 'stack' is missing: restore it from a backup".into()),
        OverlayError::Io { .. } => anyhow::bail!("overlay '{}': {error}", target.dir.display()),
        _ => anyhow::bail!("overlay '{}' {error}", target.dir.display()),
    }
}

/// Checks that the base exists, and is unchanged or partly overwritten by a commit.
fn check_base(overlay: &LockedOverlay, findings: &mut CheckReport) -> anyhow::Result<()> {
    let (path, format, identity, needs) = match &overlay.stack.base {
        BaseRecord::Blank { size } => {
            findings.add_fact("base", format!("blank, {}", format_size(*size)));
            return Ok(());
        }
        BaseRecord::File { path, format, identity, needs, .. } => (path, format, identity, needs),
    };
    let shown = path.display();
    let unreadable = || format!("cannot read the base '{shown}'");
    let found = match confined::open_input(path, FileAccess::Read) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        file => Some(Identity::of(&file.with_context(unreadable)?).with_context(unreadable)?),
    };
    let (verdict, damage) = match found {
        None => (
            "missing",
            Some(format!(
                "the base '{shown}' is missing: put it back, or use cowslip rebase if it was moved"
            )),
        ),
        // A log that cannot be read is reported as damage elsewhere.
        Some(_) if overlay.is_committing().unwrap_or(false) => {
            ("a commit into it was cut short: cowslip commit finishes it", None)
        }
        Some(now) => match identity.differences(&now) {
            None => ("unchanged", None),
            Some(what) => (
                "changed",
                Some(match identity.differences_of_copy(&now) {
                    Some(_) => {
                        format!("the base '{shown}' has changed: {what}: put the old one back")
                    }
                    None => format!(
                        "the base '{shown}' has changed: {what}: if it is a copy, use cowslip rebase"
                    ),
                }),
            ),
        },
    };
    let size = format_size(identity.size);
    let part = match overlay.stack.base.part() {
        SourcePart::Bytes { offset, len: Some(len) } => {
            format!("bytes {offset}..{} of ", offset.saturating_add(len))
        }
        _ => String::new(),
    };
    findings.add_fact("base", format!("{part}{shown}, {format}, {size}, {verdict}"));
    findings.damage.extend(damage);
    for FileRecord { path, identity } in needs {
        let shown = path.display();
        let now = confined::open_input(path, FileAccess::Read).and_then(|file| Identity::of(&file));
        let what = match now {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Some("is missing".to_owned()),
            now => {
                let now = now.with_context(|| format!("cannot read '{shown}'"))?;
                identity.differences(&now).map(|what| format!("has changed: {what}"))
            }
        };
        let verdict = if what.is_some() { "not as it was" } else { "unchanged" };
        findings.add_fact("below", format!("{shown}, {}, {verdict}", format_size(identity.size)));
        findings.damage.extend(
            what.map(|what| {
                format!("'{shown}', which the base needs, {what}: put the old one back")
            }),
        );
    }
    Ok(())
}

/// Describes the damage of each layer, and contradictions between layers.
fn layer_damage(
    target: &OverlayTarget,
    found: &LockedOverlay,
    looks: &[LayerCheck],
) -> anyhow::Result<Vec<String>> {
    let tree = found.stack.tree();
    let mut lines = Vec::new();
    for look in looks {
        let uuid = look.record.uuid;
        let which = match tree.name_of(uuid) {
            // A single layer needs no name.
            None if looks.len() == 1 => String::new(),
            Some(name) => format!("layer {} (snapshot '{}'): ", short_uuid(uuid), name),
            None => format!("layer {}: ", short_uuid(uuid)),
        };
        match &look.summary {
            Ok(sound) => lines.extend(sound.misplaced.iter().map(|line| format!("{which}{line}"))),
            Err(OverlayError::Log { error: error @ LogError::Damaged { .. }, .. })
                if !which.is_empty() =>
            {
                lines.push(format!("{which}{error}"));
            }
            Err(error) => lines.push(which + &damage_line(target, error)?),
        }
    }
    lines.extend(contradictions(looks));
    Ok(lines)
}

/// Adds facts about the top layer, which is written to, and about all layers together.
fn add_top_facts(found: &LockedOverlay, looks: &[LayerCheck], findings: &mut CheckReport) {
    let Some(top) = looks.last().and_then(|look| look.summary.as_ref().ok()) else {
        return;
    };
    let (size, block) = (format_size(top.size), format_size(found.block_size().into()));
    findings.add_fact("disk", format!("{size}, blocks of {block}"));
    let (data, zero) = (format_size(top.data), format_size(top.zero));
    findings.add_fact("changed", format!("{data} of data, {zero} zeroed"));
    findings.add_fact(
        "log",
        format!("{} records, {} of them count", top.good_records, top.trusted_records),
    );
    let sound = looks.iter().filter_map(|look| look.summary.as_ref().ok());
    let all = sound.map(|sound| sound.recovered).reduce(Recovered::combine);
    findings.add_fact("state", recovery_text(all.unwrap_or(top.recovered)));
}

/// Builds the table of layers, the lowest layer first.
fn layer_table(found: &LockedOverlay, looks: &[LayerCheck]) -> Table<6> {
    let (left, right) = (Align::Left, Align::Right);
    let mut table = Table::new([
        ("NAME", left),
        ("LAYER", left),
        ("DATA", right),
        ("ZEROED", right),
        ("RECORDS", right),
        ("STATE", left),
    ]);
    let tree = found.stack.tree();
    for look in looks {
        let uuid = look.record.uuid;
        let is_top = tree.top().is_some_and(|top| top.uuid == uuid);
        let name = if is_top { "now" } else { tree.name_of(uuid).unwrap_or("-") };
        let none = || "-".to_owned();
        let [data, zero, records, state] = match &look.summary {
            Err(_) => [none(), none(), none(), "damaged".to_owned()],
            Ok(sound) => [
                format_size(sound.data),
                format_size(sound.zero),
                sound.good_records.to_string(),
                layer_state(sound),
            ],
        };
        table.add_row([name.to_owned(), short_uuid(uuid), data, zero, records, state]);
    }
    table
}

/// Describes the state of one layer in a few words.
fn layer_state(sound: &LayerSummary) -> String {
    if !sound.misplaced.is_empty() {
        return "damaged".to_owned();
    }
    match sound.recovered {
        Recovered::New | Recovered::Clean => "clean".to_owned(),
        Recovered::Vouched { lost } if lost > 0 => format!("needs recovery, {lost} changes lost"),
        Recovered::All | Recovered::Vouched { .. } => "needs recovery".to_owned(),
    }
}

/// Describes the recovery that the next mount will do.
fn recovery_text(recovered: Recovered) -> String {
    match recovered {
        Recovered::New | Recovered::Clean => "clean".to_owned(),
        Recovered::All => "needs recovery: nothing is lost (the next mount does it)".to_owned(),
        Recovered::Vouched { lost: 0 } => {
            "as after a power cut: all that was synced is there".to_owned()
        }
        Recovered::Vouched { lost } => {
            format!("as after a power cut: {lost} changes since the last sync are lost")
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File};

    use super::*;
    use crate::config::OverlayKind;
    use crate::confined::open_dir;
    use crate::overlay::FORMAT_VERSION;
    use crate::overlay::persist::{NewOverlay, OverlayPath};
    use crate::overlay::record::LayerMap;
    use crate::overlay::stack::{LayerRecord, SnapshotRecord, Stack};
    use crate::overlay::state::{BlockIndex, BlockState};
    use uuid::Uuid;

    /// Creates an overlay at `dir` over `base`, left open as by a killed daemon.
    fn make(dir: &Path, base: BaseRecord) {
        let stack = Stack {
            version: FORMAT_VERSION,
            uuid: Uuid::new_v4(),
            uid: 0,
            gid: 0,
            perm: 0o600,
            kind: OverlayKind::Blocks,
            base,
            layers: vec![LayerRecord { uuid: Uuid::new_v4(), block: 4096, parent: None }],
            snapshots: Vec::new(),
        };
        let mut image = LayerMap::new(1 << 20, 1 << 20);
        image.blocks.set(BlockIndex(0)..BlockIndex(2), BlockState::Data);
        let new = NewOverlay { stack, map: &image, limit: None };
        drop(persist::create(OverlayPath { dir, layers: None }, new).unwrap());
    }

    fn checked(dir: &Path) -> CheckReport {
        check(&overlay_targets(dir).unwrap()[0], CheckMode::Report).unwrap()
    }

    fn layer(dir: &Path) -> PathBuf {
        fs::read_dir(dir.join("layers")).unwrap().next().unwrap().unwrap().path()
    }

    #[test]
    fn intact_overlay_is_healthy_and_its_facts_are_shown() {
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
    fn changed_or_missing_base_is_damage() {
        let home = tempfile::tempdir().unwrap();
        let (dir, path) = (home.path().join("o"), home.path().join("vm.img"));
        fs::write(&path, [7; 9000]).unwrap();
        let identity = Identity::of(&File::open(&path).unwrap()).unwrap();
        let base = BaseRecord::File {
            path: path.clone(),
            format: "raw".into(),
            offset: None,
            len: None,
            identity,
            needs: Vec::new(),
        };
        make(&dir, base);
        assert!(checked(&dir).damage.is_empty());
        fs::write(&path, [7; 100]).unwrap();
        assert!(checked(&dir).damage[0].contains("has changed: size 8.8 KiB -> 100 bytes"));
        fs::remove_file(&path).unwrap();
        assert!(checked(&dir).damage[0].contains("is missing"));
    }

    #[test]
    fn missing_data_is_damage() {
        let home = tempfile::tempdir().unwrap();
        let dir = home.path().join("o");
        make(&dir, BaseRecord::Blank { size: 1 << 20 });
        let data = File::options().write(true).open(layer(&dir).join("data")).unwrap();
        data.set_len(4096).unwrap();
        let damage = checked(&dir).damage;
        assert!(damage[0].starts_with("4 KiB of data from byte 4096 on are missing"), "{damage:?}");
    }

    #[test]
    fn damaged_stack_or_log_is_damage_and_not_a_failure() {
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
    fn contradictory_stack_is_damage() {
        let home = tempfile::tempdir().unwrap();
        let dir = home.path().join("o");
        make(&dir, BaseRecord::Blank { size: 1 << 20 });
        let open = open_dir(&dir).unwrap();
        let good = Stack::read(&open).unwrap();
        let mut stack = good.clone();
        stack.layers[0].parent = Some(Uuid::from_u128(1));
        stack.write(&open).unwrap();
        assert!(checked(&dir).damage[0].contains("what is below layer"));
        let layer = good.layers[0].uuid;
        let name = "clean".to_owned();
        let snapshots = vec![SnapshotRecord { name, layer, taken: 0 }];
        Stack { snapshots, ..good }.write(&open).unwrap();
        assert!(checked(&dir).damage[0].contains("the layer of snapshot 'clean' is missing"));
    }

    #[test]
    fn repair_recovers_open_layers_and_reports_it() {
        let home = tempfile::tempdir().unwrap();
        let dir = home.path().join("o");
        make(&dir, BaseRecord::Blank { size: 1 << 20 });
        let targets = overlay_targets(&dir).unwrap();
        let repaired = || check(&targets[0], CheckMode::Repair).unwrap();
        assert!(repaired().repair[0].starts_with("recovered layer "));
        assert_eq!(repaired().repair, ["nothing to do"]);
        assert!(checked(&dir).show("o").contains("\nstate    clean\n"));
    }

    #[test]
    fn overlay_that_cannot_be_checked_is_an_error() {
        let home = tempfile::tempdir().unwrap();
        let dir = home.path().join("o");
        let error = |dir: &Path| {
            check(&overlay_targets(dir).unwrap()[0], CheckMode::Report).unwrap_err().to_string()
        };
        assert!(error(&dir).contains("No such file"));
        let line = overlay_targets(home.path()).unwrap_err().to_string();
        assert!(line.contains("no overlay and no store"), "{line}");
        make(&dir, BaseRecord::Blank { size: 1 });
        let held = persist::lock_overlay(OverlayPath { dir: &dir, layers: None }).unwrap();
        assert!(error(&dir).contains("is in use"));
        drop(held);
    }
}
