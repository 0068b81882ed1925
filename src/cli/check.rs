//! `cowslip check`: checks an overlay that is not mounted, and whether its base is unchanged.
//!
//! Every layer is read as the next mount would read it. Without `--repair` nothing is changed. With
//! it, the recovery of the next mount is done now, and unneeded files are removed. A store is
//! checked disk by disk. Exit code 0: everything is well; 3: something is damaged, or the base is
//! missing or has changed; 1: the check itself failed.

use std::path::{Path, PathBuf};

use clap::Args;

use super::client::check_answers;
use super::mount::current_dir;
use super::plan::{ServerArgs, TrustArgs};
use super::table::{Align, Table};
use super::{EXIT_OK, EXIT_UNHEALTHY, print, restore_sigpipe};
use crate::config::{SourcePart, format_size};
use crate::offline::check::{
    BaseReport, BaseState, CheckMode, CheckReport, LayerReport, OverlayReport, Repair, check,
};
use crate::offline::{
    StoreFinding, StoreFindingKind, StoreOutcome, check_store, is_store, overlay_targets,
};
use crate::overlay::recover::Recovered;
use crate::overlay::verify::{LayerSummary, short_uuid};
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
    servers: ServerArgs,
    #[command(flatten)]
    trust: TrustArgs,
}

pub(super) fn run(args: &CheckArgs) -> anyhow::Result<u8> {
    check_answers(&args.overlay)?;
    args.trust.allow(&current_dir()?)?;
    args.servers.apply(&current_dir()?)?;
    let mode = if args.repair { CheckMode::Repair } else { CheckMode::Report };
    if mode == CheckMode::Report {
        restore_sigpipe();
    }
    let dir = &args.overlay;
    // Keep the store locked to the end, so that nobody adds or removes a disk meanwhile.
    let store = if is_store(dir) { Some(StoreDirs::open(dir)?) } else { None };
    let (mut text, mut is_damaged) = (Vec::new(), false);
    if let Some(store) = &store {
        let findings = check_store(store, dir, mode)?;
        is_damaged |= findings.iter().any(is_damage);
        text.extend(store_text(dir, mode, &findings));
    }
    for target in overlay_targets(dir)? {
        let report = check(&target, mode)?;
        is_damaged |= !report.damage.is_empty();
        text.push(report_text(&target.display_name, &report));
    }
    if text.is_empty() {
        text.push(format!("the store '{}' holds no disks\n", dir.display()));
    }
    print(&text.join("\n"))?;
    Ok(if is_damaged { EXIT_UNHEALTHY } else { EXIT_OK })
}

fn is_damage(finding: &StoreFinding) -> bool {
    finding.kind == StoreFindingKind::Name && finding.outcome == StoreOutcome::Reported
}

/// Describes what belongs to no disk; `None` if there is nothing to tell.
fn store_text(dir: &Path, mode: CheckMode, findings: &[StoreFinding]) -> Option<String> {
    let mut text: String = findings.iter().map(|finding| finding_line(finding) + "\n").collect();
    if mode == CheckMode::Repair && text.is_empty() {
        text = "repair   nothing to do\n".to_owned();
    }
    (!text.is_empty()).then(|| format!("store    {}\n{text}", dir.display()))
}

fn finding_line(StoreFinding { kind, name, outcome }: &StoreFinding) -> String {
    let name = printable::line(name);
    let (kind, reason) = match kind {
        StoreFindingKind::Name => ("name", "it leads nowhere"),
        StoreFindingKind::Disk => ("disk", "it has no name"),
        StoreFindingKind::Layer => ("layer", "no disk needs it"),
        StoreFindingKind::Foreign => {
            return format!("unknown  '{name}' is not cowslip's: it is left alone");
        }
    };
    match outcome {
        StoreOutcome::Removed => format!("repair   removed the {kind} '{name}': {reason}"),
        StoreOutcome::Kept(error) => format!("unknown  {}", printable::line(error)),
        StoreOutcome::Reported if kind == "name" => {
            format!("damage   the name '{name}': {reason}, --repair removes it")
        }
        StoreOutcome::Reported => {
            format!("unused   the {kind} '{name}': {reason}, the next mount removes it")
        }
    }
}

/// Describes one overlay: facts, the table of layers, then what is to be done.
fn report_text(name: &str, report: &CheckReport) -> String {
    let mut text = String::new();
    // Keep each item on one line, whatever it contains.
    let add = |text: &mut String, heading: &str, line: &str| {
        *text += &format!("{heading:<7}  {}\n", printable::line(line));
    };
    add(&mut text, "overlay", name);
    let mut items = String::new();
    let unused = report.overlay.iter().flat_map(|overlay| &overlay.unused);
    for layer in unused {
        let size = format_size(layer.bytes);
        let line =
            format!("layer {}: nothing needs it, the next mount removes it ({size})", layer.uuid);
        add(&mut items, "unused", &line);
    }
    report.repairs.iter().for_each(|repair| add(&mut items, "repair", &repair_text(repair)));
    report.damage.iter().for_each(|line| add(&mut items, "damage", line));
    if let Some(overlay) = &report.overlay {
        for (heading, fact) in facts(overlay) {
            add(&mut text, heading, &fact);
        }
        text += &format!(
            "\n{}{}",
            layer_table(&overlay.layers),
            if items.is_empty() { "" } else { "\n" }
        );
    }
    text + &items
}

/// Lists the facts about an overlay, each with its heading.
fn facts(overlay: &OverlayReport) -> Vec<(&'static str, String)> {
    let mut facts =
        vec![("format", overlay.version.to_string()), ("base", base_text(&overlay.base))];
    for (path, size, is_unchanged) in &overlay.backing_files {
        let verdict = if *is_unchanged { "unchanged" } else { "not as it was" };
        facts.push(("below", format!("{}, {}, {verdict}", path.display(), format_size(*size))));
    }
    let uuids = overlay.layers.iter().map(|layer| layer.check.record.uuid.to_string());
    facts.push(("layers", uuids.collect::<Vec<_>>().join(", ")));
    let summaries = overlay.layers.iter().filter_map(|layer| layer.check.summary.as_ref().ok());
    let top = overlay.layers.last().and_then(|top| top.check.summary.as_ref().ok());
    if let Some(top) = top {
        let (size, block) = (format_size(top.size), format_size(overlay.block_size.into()));
        facts.push(("disk", format!("{size}, blocks of {block}")));
        let (data, zero) = (format_size(top.data), format_size(top.zero));
        facts.push(("changed", format!("{data} of data, {zero} zeroed")));
        let (good, trusted) = (top.good_records, top.trusted_records);
        let unreadable = match top.unreadable_records {
            0 => String::new(),
            count => format!(", {count} unreadable at the end"),
        };
        facts.push(("log", format!("{good} records, {trusted} of them count{unreadable}")));
        let all = summaries.map(|summary| summary.recovered).reduce(Recovered::combine);
        facts.push(("state", recovery_text(all.unwrap_or(top.recovered))));
    }
    facts
}

fn base_text(base: &BaseReport) -> String {
    match base {
        BaseReport::Blank { size } => format!("blank, {}", format_size(*size)),
        BaseReport::Source { location, format, size, part, state } => {
            let part = match part {
                SourcePart::Bytes { offset, len: Some(len) } => {
                    format!("bytes {offset}..{} of ", offset.saturating_add(*len))
                }
                _ => String::new(),
            };
            let state = match state {
                BaseState::Unchanged => "unchanged",
                BaseState::Changed => "changed",
                BaseState::Missing => "missing",
                BaseState::Unreachable => "not compared",
                BaseState::Committing => {
                    "a commit into it was cut short: cowslip commit finishes it"
                }
            };
            format!("{part}{location}, {format}, {}, {state}", format_size(*size))
        }
    }
}

fn repair_text(repair: &Repair) -> String {
    match repair {
        Repair::Recovered { layer, recovered } => {
            let layer = short_uuid(*layer);
            match recovered {
                Recovered::Vouched { lost } if *lost > 0 => format!(
                    "recovered layer {layer}: as after a power cut, {lost} changes since the last sync are lost"
                ),
                Recovered::Damaged => {
                    format!("recovered layer {layer}: what the last record of its log said is lost")
                }
                _ => format!("recovered layer {layer}: nothing is lost"),
            }
        }
        Repair::RemovedLayer(layer) => {
            let size = format_size(layer.bytes);
            format!("removed layer {}, which nothing needs: {size}", layer.uuid)
        }
        Repair::RemovedFile(name) => {
            format!("removed '{name}', left behind by a mount that was killed")
        }
        Repair::Nothing => "nothing to do".to_owned(),
        Repair::Damaged => "nothing was touched: a damaged overlay stays as it is".to_owned(),
    }
}

/// Builds the table of layers, the lowest layer first.
fn layer_table(layers: &[LayerReport]) -> Table<6> {
    let (left, right) = (Align::Left, Align::Right);
    let mut table = Table::new([
        ("NAME", left),
        ("LAYER", left),
        ("DATA", right),
        ("ZEROED", right),
        ("RECORDS", right),
        ("STATE", left),
    ]);
    for LayerReport { check, snapshot, is_top } in layers {
        let name = if *is_top { "now" } else { snapshot.as_deref().unwrap_or("-") };
        let none = || "-".to_owned();
        let [data, zero, records, state] = match &check.summary {
            Err(_) => [none(), none(), none(), "damaged".to_owned()],
            Ok(summary) => [
                format_size(summary.data),
                format_size(summary.zero),
                summary.good_records.to_string(),
                layer_state(summary),
            ],
        };
        table.add_row([name.to_owned(), short_uuid(check.record.uuid), data, zero, records, state]);
    }
    table
}

/// Describes the state of one layer in a few words.
fn layer_state(summary: &LayerSummary) -> String {
    if !summary.misplaced.is_empty() {
        return "damaged".to_owned();
    }
    match summary.recovered {
        Recovered::New | Recovered::Clean => "clean".to_owned(),
        Recovered::Vouched { lost } if lost > 0 => format!("needs recovery, {lost} changes lost"),
        Recovered::Damaged => "needs recovery, its last record is damaged".to_owned(),
        Recovered::All | Recovered::Vouched { .. } => "needs recovery".to_owned(),
    }
}

/// Describes the recovery that the next mount will do.
fn recovery_text(recovered: Recovered) -> String {
    match recovered {
        Recovered::New | Recovered::Clean => "clean".to_owned(),
        Recovered::All => "needs recovery: nothing is lost (the next mount does it)".to_owned(),
        Recovered::Damaged => {
            "needs recovery: all but the damaged last record of a log is there".to_owned()
        }
        Recovered::Vouched { lost: 0 } => {
            "as after a power cut: all that was synced is there".to_owned()
        }
        Recovered::Vouched { lost } => {
            format!("as after a power cut: {lost} changes since the last sync are lost")
        }
    }
}
