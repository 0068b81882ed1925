//! `cowslip recv` killed at every change that it makes to files: the target is complete or absent,
//! and a part holds what its state promises.
//!
//! The receiver has two threads: one writes the data, the other makes it durable and records this.
//! The position of one thread when the other is killed is random, so the kills do not all hit the
//! same states; the checks hold for any state. A kill is not a power cut, so for power cuts the
//! order of syncs is checked.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::process::{Output, Stdio};

use crate::common::mount::*;
use crate::common::strace::{self, Call, Seen, kill_at};
use cowslip::formats::rbd;
use cowslip::formats::rbd::checkpoint::{Checkpoint, CheckpointKind, HashChain};

/// Distance in bytes between two checkpoints: small, so that there are many.
const PIECE: u64 = 64 * KIB;
const SIZE: u64 = 16 * PIECE;
/// Identity of the source, as reported by its sender.
const IDENTITY: u64 = 77;

/// Returns the image that is sent: every other piece begins with a hole, the others are all data.
fn image() -> Vec<u8> {
    let mut bytes = noise(SIZE, 5);
    for piece in bytes.chunks_mut(2 * PIECE as usize) {
        piece[..20 * KIB as usize].fill(0);
    }
    bytes
}

/// Returns the stream that sends `image` from `origin` on, with a checkpoint after every piece.
fn stream(image: &[u8], origin: u64) -> Vec<u8> {
    let (mut wire, mut chain) = (Vec::new(), HashChain::default());
    let put = |wire: &mut Vec<u8>, chain: &mut HashChain, bytes: &[u8]| {
        chain.update(bytes);
        wire.extend(bytes);
    };
    put(&mut wire, &mut chain, &rbd::v2::preamble(SIZE));
    let mut mark = Checkpoint { start: origin, end: origin, identity: IDENTITY, origin };
    wire.extend(chain.checkpoint_record(&mark, CheckpointKind::Middle));
    while mark.end < SIZE {
        mark = Checkpoint { start: mark.end, end: mark.end + PIECE, ..mark };
        let mut at = mark.start;
        if at.is_multiple_of(2 * PIECE) {
            put(&mut wire, &mut chain, &rbd::v2::zeros_record(&(at..at + 20 * KIB)));
            at += 20 * KIB;
        }
        put(&mut wire, &mut chain, &rbd::v2::data_header(&(at..mark.end)));
        put(&mut wire, &mut chain, &image[at as usize..mark.end as usize]);
        wire.extend(chain.checkpoint_record(&mark, CheckpointKind::Middle));
    }
    mark.start = SIZE;
    wire.extend(chain.checkpoint_record(&mark, CheckpointKind::Last));
    wire.extend(rbd::END_RECORD);
    wire
}

fn recv(lab: &Lab, words: &str, wire: &[u8]) -> Output {
    put(&lab.path("again"), wire);
    let mut command = lab.command(COWSLIP);
    command.arg("recv").args(words.split_whitespace());
    command.stdin(File::open(lab.path("again")).unwrap());
    command.stdout(Stdio::piped()).stderr(Stdio::piped()).output().unwrap()
}

/// Creates the state before each run: optionally an old file, and a part with `begun` verified
/// bytes.
#[track_caller]
fn prepare(lab: &Lab, old: Option<&[u8]>, begun: u64) {
    lab.sh("rm -f out out.part out.part.state out.part.state.new");
    if begun > 0 {
        let sent = stream(&image(), 0);
        // Cut in the middle of the following piece.
        let end = sent.len() as u64 * (2 * begun + PIECE) / (2 * SIZE);
        one_line(1, &recv(lab, "out", &sent[..end as usize]), "a cut stream");
        assert_eq!(lab.ok("recv out --resume-offset").trim(), begun.to_string());
    }
    if let Some(old) = old {
        put(&lab.path("out"), old);
    }
}

/// Checks the state after a kill: the target is unchanged or complete, the part holds all bytes
/// that its state promises, and the transfer can be resumed. Returns the offset it was resumed
/// from, or `SIZE` if it was complete.
#[track_caller]
fn look(lab: &Lab, image: &[u8], old: Option<&[u8]>, words: &str, at: &str) -> u64 {
    let now = fs::read(lab.path("out")).ok();
    let is_whole = now.as_deref() == Some(image);
    assert!(is_whole || now.as_deref() == old, "{at}: it is neither");
    let said: u64 = lab.ok("recv out --resume-offset").trim().parse().unwrap();
    if is_whole {
        assert_eq!(said, 0, "{at}: something is left to resume");
        assert!(!lab.path("out.part").exists(), "{at}");
        return SIZE;
    }
    if said > 0 {
        let part = fs::read(lab.path("out.part")).unwrap();
        assert!(part[..said as usize] == image[..said as usize], "{at}: {said} bytes are promised");
    }
    let output = recv(lab, &format!("{words} --resume"), &stream(image, said));
    assert!(output.status.success(), "{at}: from {said}\n{}", show(&output));
    assert!(fs::read(lab.path("out")).unwrap() == image, "{at}: from {said}");
    let mut left = fs::read_dir(lab.dir()).unwrap().flatten().map(|entry| entry.file_name());
    assert!(!left.any(|name| name.to_string_lossy().contains(".part")), "{at}: something is left");
    said
}

/// Returns the path of the received file as strace prints it.
fn target(lab: &Lab) -> String {
    format!("{}/out", lab.dir().canonicalize().unwrap().display())
}

/// Kills at every change, given by the call's name and its number in the first thread that reaches
/// it. `begun` is the number of bytes received before, which must survive every kill.
fn kill_everywhere(old: Option<&[u8]>, flags: &str, begun: u64) {
    let lab = Lab::new();
    let words = format!("{} {flags}", target(&lab));
    let first = if begun > 0 { format!("{words} --resume") } else { words.clone() };
    let image = image();
    put(&lab.path("wire"), &stream(&image, begun));
    let receive = |kills: &[String]| {
        prepare(&lab, old, begun);
        strace::run_on(&lab, &format!("recv {first}"), "wire", kills)
    };
    let (output, plain) = receive(&[]);
    assert!(output.status.success() && !plain.killed, "{}", show(&output));
    assert!(fs::read(lab.path("out")).unwrap() == image);
    let points: BTreeSet<(String, u32)> =
        plain.calls.iter().map(|call| (call.name.clone(), call.nth)).collect();
    let (mut kills, mut resumed, mut whole) = (0, BTreeSet::new(), 0);
    for (name, nth) in points {
        let (_, seen) = receive(&[kill_at(&name, nth)]);
        kills += u32::from(seen.killed);
        let at = format!("killed at {name} {nth}\n{}", seen.text);
        match look(&lab, &image, old, &words, &at) {
            SIZE => whole += 1,
            from => drop(resumed.insert(from)),
        }
    }
    println!("{kills} kills, resumed from {resumed:?}, {whole} whole");
    // The writer alone makes this many changes; the number of states recorded in the meantime
    // varies.
    assert!(kills > 10, "{kills} kills");
    assert_eq!(resumed.first(), Some(&begun), "{resumed:?}");
    assert!(whole > 0, "none was after the rename");
}

#[test]
fn receiver_killed_at_any_change_leaves_no_target_and_a_resumable_part() {
    kill_everywhere(None, "", 0);
}

#[test]
fn existing_file_stays_until_its_replacement_is_complete() {
    kill_everywhere(Some(b"what was there before"), "--overwrite", 0);
}

#[test]
fn verified_bytes_survive_every_kill() {
    kill_everywhere(None, "", SIZE / 2);
}

/// Returns the indexes of the calls that satisfy `is_it`.
fn positions(calls: &[Call], is_it: impl Fn(&Call) -> bool) -> Vec<usize> {
    calls.iter().enumerate().filter(|(_, call)| is_it(call)).map(|(index, _)| index).collect()
}

/// Whether a file descriptor in the arguments of `call` refers to `path`.
fn is_on(call: &Call, path: &str) -> bool {
    call.shown.contains(&format!("{path}>"))
}

fn is_sync(call: &Call) -> bool {
    matches!(call.name.as_str(), "fsync" | "fdatasync")
}

fn is_write(call: &Call) -> bool {
    call.name.contains("write") || matches!(call.name.as_str(), "fallocate" | "ftruncate")
}

#[test]
fn target_and_state_are_renamed_only_after_syncs() {
    let lab = Lab::new();
    let dir = lab.dir().canonicalize().unwrap().display().to_string();
    let image = image();
    put(&lab.path("wire"), &stream(&image, 0));
    let (output, Seen { calls, text, .. }) =
        strace::run_on(&lab, &format!("recv {}", target(&lab)), "wire", &[]);
    assert!(output.status.success(), "{}", show(&output));
    let part = format!("{dir}/out.part");
    // The last write, a sync, the rename, a sync of the directory; the state is deleted only then.
    let renamed = |to: &str| {
        positions(&calls, |call| {
            call.name.starts_with("rename") && call.shown.contains(&format!("\"{to}\""))
        })
    };
    let [name] = renamed("out")[..] else { panic!("one name\n{text}") };
    let written = positions(&calls, |call| is_write(call) && is_on(call, &part));
    let last = *written.last().unwrap();
    let synced = positions(&calls, |call| call.name == "fsync" && is_on(call, &part));
    assert!(synced.iter().any(|sync| (last..name).contains(sync)), "{text}");
    let listed = positions(&calls, |call| is_sync(call) && is_on(call, &dir));
    let gone = positions(&calls, |call| {
        call.name.starts_with("unlink") && call.shown.contains("\"out.part.state\"")
    });
    assert!(listed.iter().any(|sync| (name..*gone.last().unwrap()).contains(sync)), "{text}");
    // For each state: a sync of the part's data, the state's own write and sync, then its rename,
    // all in one thread.
    let mut threads: BTreeMap<u32, Vec<&Call>> = BTreeMap::new();
    calls.iter().for_each(|call| threads.entry(call.thread).or_default().push(call));
    let mut states = 0;
    for calls in threads.values() {
        for (index, call) in calls.iter().enumerate() {
            if call.name.starts_with("rename") && call.shown.contains("\"out.part.state\"") {
                let before: Vec<&str> = calls[index.checked_sub(4).unwrap()..index]
                    .iter()
                    .map(|call| call.name.as_str())
                    .collect();
                assert_eq!(before, ["fdatasync", "openat", "write", "fsync"], "{text}");
                assert!(is_on(calls[index - 4], &part), "{text}");
                assert!(is_on(calls[index - 1], &format!("{part}.state.new")), "{text}");
                states += 1;
            }
        }
    }
    assert!(states > 0, "no state was kept\n{text}");
}

#[test]
fn outdated_state_is_durably_deleted_before_its_part_is_rewritten() {
    let lab = Lab::new();
    let dir = lab.dir().canonicalize().unwrap().display().to_string();
    let image = image();
    let (out, part) = (target(&lab), format!("{dir}/out.part"));
    for flags in ["--resume", "--overwrite"] {
        let words = format!("recv {out} {flags}");
        let sent = stream(&image, 0);
        prepare(&lab, None, 0);
        recv(&lab, "out", &sent[..sent.len() / 2]);
        assert_ne!(lab.ok("recv out --resume-offset"), "0\n");
        put(&lab.path("wire"), &sent);
        let (output, Seen { calls, text, .. }) = strace::run_on(&lab, &words, "wire", &[]);
        assert!(output.status.success(), "{}", show(&output));
        let gone = positions(&calls, |call| {
            call.name.starts_with("unlink") && call.shown.contains("\"out.part.state\"")
        })[0];
        let changed = positions(&calls, |call| {
            is_write(call) && is_on(call, &part)
                || call.name.starts_with("unlink") && call.shown.contains("\"out.part\"")
        });
        let synced = positions(&calls, |call| is_sync(call) && is_on(call, &dir));
        assert!(synced.iter().any(|sync| (gone..changed[0]).contains(sync)), "{words}\n{text}");
    }
}
