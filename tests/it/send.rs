//! `cowslip send` and `cowslip recv`: a file sent through a pipe with its holes arrives completely
//! or not at all.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::Path;
use std::process::{ChildStdout, Output, Stdio};
use std::time::Instant;

use crate::common::mount::*;
use cowslip::formats::rbd;
use cowslip::formats::rbd::checkpoint::{Checkpoint, CheckpointKind, HashChain};
use proptest::prelude::*;

/// Data ranges of a file: start and length in bytes.
type Pieces = &'static [(u64, u64)];

/// Checks the output as [`crate::common::mount::one_line`] does, after removing the progress lines that
/// slow transfers print every second.
#[track_caller]
fn one_line(code: i32, output: &Output, what: &str) -> String {
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    let lines = text.split_inclusive('\n').filter(|line| !is_progress(line));
    let stderr = lines.collect::<String>().into_bytes();
    crate::common::mount::one_line(code, &Output { stderr, ..output.clone() }, what)
}

fn is_progress(line: &str) -> bool {
    ["sent ", "received "].iter().any(|verb| line.starts_with(verb)) && line.contains(" of data, ")
}

/// Creates a sparse file of `size` bytes with random data in the ranges `data`.
fn sparse(lab: &Lab, name: &str, size: u64, data: &[(u64, u64)]) {
    let file = File::create(lab.path(name)).unwrap();
    file.set_len(size).unwrap();
    for (start, len) in data {
        file.write_all_at(&noise(*len, start + 1), *start).unwrap();
    }
    file.sync_all().unwrap();
}

/// Runs `cowslip recv WORDS` with `wire` as its stdin.
fn recv(lab: &Lab, words: &str, wire: &[u8]) -> Output {
    put(&lab.path("wire"), wire);
    let mut command = lab.command(COWSLIP);
    command.arg("recv").args(words.split_whitespace());
    command.stdin(File::open(lab.path("wire")).unwrap());
    command.stdout(Stdio::piped()).stderr(Stdio::piped()).output().unwrap()
}

/// Returns the bytes that `cowslip send WORDS` sends.
#[track_caller]
fn wire(lab: &Lab, words: &str) -> Vec<u8> {
    lab.sh(&format!("$COWSLIP send {words} > wire.out"));
    fs::read(lab.path("wire.out")).unwrap()
}

#[track_caller]
fn same(lab: &Lab, one: &str, two: &str) {
    let (a, b) = (lab.open_ro(one), lab.open_ro(two));
    assert_eq!(a.metadata().unwrap().len(), b.metadata().unwrap().len());
    assert_eq!(checksum(&lab.path(one)), checksum(&lab.path(two)), "{one} {two}");
    assert_eq!(data_runs(&a), data_runs(&b), "{one} {two}");
}

fn is_there(lab: &Lab, name: &str) -> bool {
    fs::symlink_metadata(lab.path(name)).is_ok()
}

#[test]
fn received_file_has_the_same_bytes_size_and_holes() {
    let lab = Lab::new();
    let files: [(&str, u64, Pieces); 6] = [
        ("empty", 0, &[]),
        ("hole", 5 * MIB, &[]),
        ("data", 3 * MIB + 17, &[(0, 3 * MIB + 17)]),
        ("trailing", 9 * MIB + 1, &[(0, 4096), (MIB, 300 * KIB)]),
        ("leading", 9 * MIB, &[(8 * MIB, MIB)]),
        ("odd", 150 * MIB + 511, &[(64 * KIB, 100 * MIB + 5), (150 * MIB, 511)]),
    ];
    for (name, size, data) in files {
        sparse(&lab, name, size, data);
        lab.sh(&format!("$COWSLIP send {name} | $COWSLIP recv {name}.out"));
        same(&lab, name, &format!("{name}.out"));
        let rest = lab.sh("ls -a");
        assert!(!rest.contains(".part"), "{rest}");
    }
}

#[test]
fn holes_of_a_terabyte_file_are_not_sent() {
    let lab = Lab::new();
    sparse(&lab, "big", TIB, &[(77 * GIB, MIB), (TIB - 4096, 4096)]);
    let sent = wire(&lab, "big");
    assert!(sent.len() as u64 <= MIB + 4096 + 1000, "{}", sent.len());
    assert!(recv(&lab, "out", &sent).status.success());
    same(&lab, "big", "out");
    assert!(allocated(&lab.path("out")) < 2 * MIB);
}

#[test]
fn records_cover_exactly_the_ranges_of_the_file() {
    let lab = Lab::new();
    sparse(&lab, "x", 3 * MIB, &[(MIB, 10)]);
    let sent = wire(&lab, "x");
    let mut decoder = rbd::RbdDecoder::new(&sent[..]).unwrap();
    let mut found = Vec::new();
    loop {
        let record = decoder.next_record().unwrap();
        if let rbd::RbdRecord::Data(range) = &record {
            let len = (range.end - range.start) as usize;
            *decoder.input() = &decoder.input()[len..];
        }
        found.push(record);
        if found.last() == Some(&rbd::RbdRecord::End) {
            break;
        }
    }
    use rbd::RbdRecord::{Data, End, Size, Zeros};
    let data = MIB..MIB + 4096;
    let all = [Size(3 * MIB), Zeros(0..MIB), Data(data), Zeros(MIB + 4096..3 * MIB), End];
    assert_eq!(found, all);
}

#[test]
fn truncated_stream_leaves_no_file_and_can_be_resumed() {
    let lab = Lab::new();
    sparse(&lab, "x", 300 * MIB, &[(MIB, 70 * MIB), (100 * MIB, 80 * MIB), (299 * MIB, 100)]);
    let mut seed = noise(64, 9).into_iter();
    let mut cuts = 0;
    let mut offset = 0;
    loop {
        let sent = wire(&lab, &format!("x --from {offset}"));
        // 10 to 100 MB more each time; some of the cuts are inside headers.
        let more = 10_000_000 + usize::from(seed.next().unwrap()) * 350_003;
        if more >= sent.len() {
            break;
        }
        let output = recv(&lab, "out --resume", &sent[..more]);
        let line = one_line(1, &output, "a cut stream");
        assert!(line.contains("the stream was cut at byte"), "{line}");
        assert!(!is_there(&lab, "out"));
        cuts += 1;
        let said: u64 = lab.ok("recv out --resume-offset").trim().parse().unwrap();
        assert!(said >= offset, "{said} {offset}");
        if said > 0 {
            assert!(line.contains(&format!("send --from {said} ")), "{line}");
        }
        offset = said;
    }
    assert!(cuts >= 2 && offset > 0, "{cuts} {offset}");
    // Both ends start at the same time, and the receiver may be first.
    lab.sh("$COWSLIP send x --from $($COWSLIP recv out --resume-offset) |
        $COWSLIP recv out --resume");
    same(&lab, "x", "out");
    assert!(!is_there(&lab, "out.part") && !is_there(&lab, "out.part.state"));
}

#[test]
fn unverified_data_is_written_again() {
    let lab = Lab::new();
    sparse(&lab, "x", 140 * MIB, &[(0, 140 * MIB)]);
    let mut sent = wire(&lab, "x");
    // Damage in the second piece, detected at its checkpoint.
    sent[100 << 20] ^= 1;
    let line = one_line(1, &recv(&lab, "out", &sent), "damage");
    assert!(line.contains("damaged") && line.contains("send --from 67108864 "), "{line}");
    // Sent again from the start, and cut: the older resume offset is no longer valid.
    let sent = wire(&lab, "x");
    let mut worse = sent.clone();
    worse[1 << 20] ^= 1;
    one_line(1, &recv(&lab, "out --resume", &worse), "damage");
    assert_eq!(lab.ok("recv out --resume-offset"), "0\n");
    let from = wire(&lab, "x --from 64M");
    let line = one_line(1, &recv(&lab, "out --resume", &from), "a gap");
    assert!(line.contains("begins at byte 67108864"), "{line}");
    assert!(recv(&lab, "out --resume", &sent).status.success());
    same(&lab, "x", "out");
}

#[test]
fn flipped_bit_in_a_stream_is_detected_or_harmless() {
    let lab = Lab::new();
    sparse(&lab, "x", 64 * KIB, &[(8 * KIB, 5000), (40 * KIB, 4096)]);
    let sent = wire(&lab, "x");
    let sum = checksum(&lab.path("x"));
    let at = (0..sent.len(), 0..8u8);
    let mut runner = proptest::test_runner::TestRunner::new(ProptestConfig {
        cases: 150,
        failure_persistence: None,
        ..ProptestConfig::default()
    });
    let all = |at: usize, bit: u8| {
        let mut wire = sent.clone();
        wire[at] ^= 1 << bit;
        let output = recv(&lab, "out --overwrite", &wire);
        if is_there(&lab, "out") {
            assert!(output.status.success(), "{at}.{bit}\n{}", show(&output));
            assert_eq!(checksum(&lab.path("out")), sum, "{at}.{bit}");
            fs::remove_file(lab.path("out")).unwrap();
        } else {
            one_line(1, &output, &format!("{at}.{bit}"));
        }
    };
    // All header and checkpoint bytes, where damage is worst, and random other ones.
    for byte in (0..180).chain(sent.len() - 140..sent.len()) {
        all(byte, (byte % 8) as u8);
    }
    runner
        .run(&at, |(at, bit)| {
            all(at, bit);
            Ok(())
        })
        .unwrap();
}

#[test]
fn short_stream_cut_at_any_byte_never_becomes_a_file() {
    let lab = Lab::new();
    sparse(&lab, "x", 8 * KIB, &[(0, 100)]);
    lab.sh("truncate -s 100 x");
    let sent = wire(&lab, "x");
    for cut in 0..sent.len() {
        one_line(1, &recv(&lab, "out", &sent[..cut]), &format!("cut at {cut}"));
        assert!(!is_there(&lab, "out"));
    }
    assert!(recv(&lab, "out", &sent).status.success());
    same(&lab, "x", "out");
}

#[test]
fn existing_target_is_rejected_without_overwrite() {
    let lab = Lab::new();
    sparse(&lab, "x", MIB, &[(0, 5000)]);
    let sent = wire(&lab, "x");
    lab.sh("echo old > out; chmod 640 out; mkdir dir; mkfifo fifo; ln -s out link; ln -s no gone");
    let refused = |words: &str, part: &str| {
        let line = one_line(1, &recv(&lab, words, &sent), words);
        assert!(line.contains(part), "{words}: {line}");
    };
    refused("out", "'out' exists: --overwrite replaces it");
    refused("out --resume", "'out' exists");
    refused("link", "'link' exists");
    refused("dir", "is a directory");
    refused("dir --overwrite", "is a directory");
    refused("fifo --overwrite", "name a file or a block device");
    refused("gone --overwrite", "a link to nothing");
    refused("none/x", "No such file");
    refused("new --onto out", "leave --onto out");
    assert_eq!(fs::read(lab.path("out")).unwrap(), b"old\n");
    assert!(recv(&lab, "link --overwrite", &sent).status.success());
    same(&lab, "x", "out");
    assert_eq!(fs::metadata(lab.path("out")).unwrap().permissions().mode() & 0o777, 0o640);
    lab.sh("test -L link; umask 027; $COWSLIP recv new < wire; test $(stat -c %a new) = 640");
}

#[test]
fn kernel_file_that_hides_its_length_is_rejected() {
    let lab = Lab::new();
    for frames in ["", " --frames rbd", " --frames raw"] {
        for path in ["/proc/cpuinfo", "/proc/self/maps", "/proc/kmsg"] {
            let line = lab.refused(1, &format!("send {path}{frames}"));
            assert!(line.contains("is a proc file of the kernel"), "{line}");
        }
    }
    lab.sh("test -z \"$($COWSLIP send - </proc/cpuinfo 2>why)\"; grep 'is a proc file' why");
    lab.sh("cat /proc/version | $COWSLIP send - | $COWSLIP recv out; cmp out /proc/version");
    // An empty file is one.
    lab.sh(": >e; $COWSLIP send e | $COWSLIP recv e2; test -f e2 -a ! -s e2");
}

#[test]
fn part_is_kept_if_resume_is_forgotten() {
    let lab = Lab::new();
    sparse(&lab, "x", 80 * MIB, &[(0, 80 * MIB)]);
    let sent = wire(&lab, "x");
    one_line(1, &recv(&lab, "out", &sent[..70 << 20]), "cut");
    let line = one_line(1, &recv(&lab, "out", &sent), "again");
    assert!(line.contains("--resume goes on") && line.contains("67108864"), "{line}");
    // A source that changed in the meantime would give a mixture of two files.
    lab.open("x").write_all_at(b"new", 0).unwrap();
    let other = wire(&lab, "x --from 64M");
    let line = one_line(1, &recv(&lab, "out --resume", &other), "changed");
    assert!(line.contains("changed since 'out.part' was begun"), "{line}");
    assert!(recv(&lab, "out --overwrite", &wire(&lab, "x")).status.success());
    same(&lab, "x", "out");
}

#[test]
fn replacement_of_another_users_file_belongs_to_the_caller_until_it_is_complete() {
    let lab = Lab::new();
    sparse(&lab, "x", 80 * MIB, &[(0, 80 * MIB)]);
    let sent = wire(&lab, "x");
    lab.sh("truncate -s 1M out; chown 65534:65534 out; chmod 664 out");
    for words in ["--overwrite", "--overwrite", "--overwrite --resume"] {
        let from = if words.contains("resume") { "x --from 64M" } else { "x" };
        let wire = wire(&lab, from);
        let cut = wire.len().min(70 << 20) - 4 * MIB as usize;
        one_line(1, &recv(&lab, &format!("out {words}"), &wire[..cut]), words);
        assert_eq!(lab.sh("stat -c %u:%g:%a out.part"), "0:0:600\n", "{words}");
    }
    assert_eq!(lab.sh("$COWSLIP recv out --resume-offset"), "67108864\n");
    assert!(recv(&lab, "out --resume", &wire(&lab, "x --from 64M")).status.success());
    same(&lab, "x", "out");
    assert_eq!(lab.sh("stat -c %u:%g:%a out"), "65534:65534:664\n");
    assert!(recv(&lab, "out --overwrite", &sent).status.success());
    assert_eq!(lab.sh("stat -c %u:%g:%a out"), "65534:65534:664\n");
}

#[test]
fn raw_frames_work_in_both_directions() {
    let lab = Lab::new();
    sparse(&lab, "x", 9 * MIB + 100, &[(MIB, 8192), (5 * MIB, 4096)]);
    lab.sh("$COWSLIP send x --frames raw > raw; cmp x raw
        test $(stat -c %b raw) -ge $(( 9 * 2048 ))
        $COWSLIP recv out --frames raw < raw
        $COWSLIP send x --from 1M --frames raw | cmp -i 0:1048576 - x");
    same(&lab, "x", "out");
    lab.refused(2, "recv y --frames raw --resume");
    lab.refused(2, "recv y --frames tar");
    lab.refused(2, "send x --frames raw --since s");
}

#[test]
fn zeros_become_holes_on_request_and_from_pipes() {
    let lab = Lab::new();
    let mut bytes = noise(MIB, 1);
    bytes[100_000..900_000].fill(0);
    put(&lab.path("x"), &bytes);
    let len = |words: &str| {
        lab.sh(&format!("{words} | tee wire | $COWSLIP recv out --overwrite; cmp x out"));
        fs::metadata(lab.path("wire")).unwrap().len()
    };
    assert!(len("$COWSLIP send x") > MIB);
    assert!(len("$COWSLIP send x --detect-zeroes") < 300 * KIB);
    let holes = data_runs(&lab.open_ro("out"));
    assert_eq!(holes, [0..102_400, 897_024..MIB]);
    // A pipe has neither holes nor a size.
    assert!(len("cat x | $COWSLIP send -") < 300 * KIB);
    assert_eq!(data_runs(&lab.open_ro("out")), holes);
    lab.sh("$COWSLIP send - < x > wire; $COWSLIP recv stdin < wire; cmp x stdin");
    lab.sh("cat x | $COWSLIP send - --from 5000 --frames raw | cmp -i 0:5000 - x");
}

#[test]
fn block_device_can_be_sent_and_received() {
    let lab = Lab::new();
    sparse(&lab, "x", 16 * MIB, &[(0, 4096), (5 * MIB, MIB)]);
    let device = lab.loop_device("x", "");
    lab.sh(&format!("$COWSLIP send {device} | tee wire | $COWSLIP recv out; cmp x out"));
    assert!(fs::metadata(lab.path("wire")).unwrap().len() < 2 * MIB);
    assert_eq!(data_runs(&lab.open_ro("out")), data_runs(&lab.open_ro("x")));
    lab.sh("tr '\\0' z < /dev/zero | head -c 20M > y");
    let target = lab.loop_device("y", "");
    let sent = fs::read(lab.path("wire")).unwrap();
    let line = one_line(1, &recv(&lab, &target, &sent), "a device");
    assert!(line.contains("is a device: --overwrite writes to it"), "{line}");
    one_line(1, &recv(&lab, &format!("{target} --resume --overwrite"), &sent), "a device");
    let output = recv(&lab, &format!("{target} --overwrite"), &sent);
    assert!(output.status.success(), "{}", show(&output));
    lab.sh(&format!("cmp -n {} x {target}; losetup -d {target} {device}", 16 * MIB));
    assert_eq!(read(&lab.open_ro("y"), 16 * MIB, 100), [b'z'; 100]);
    let small = lab.loop_device("wire", "");
    let line = one_line(1, &recv(&lab, &format!("{small} --overwrite"), &sent), "too small");
    assert!(line.contains("use a larger device"), "{line}");
    lab.sh(&format!("losetup -d {small}"));
    // A mounted device is never overwritten, not even with --overwrite.
    lab.sh("truncate -s 64M fs; mkfs.ext4 -q fs; mkdir inside");
    let used = lab.loop_device("fs", "");
    lab.sh(&format!("mount {used} inside; echo kept >inside/file; sync"));
    let line = one_line(1, &recv(&lab, &format!("{used} --overwrite"), &sent), "mounted");
    assert!(line.contains("busy"), "{line}");
    lab.sh(&format!("umount inside; e2fsck -fn {used} 2>/dev/null; mount {used} inside"));
    assert_eq!(lab.sh("cat inside/file"), "kept\n");
    lab.sh(&format!("umount inside; losetup -d {used}"));
}

#[test]
fn file_that_took_the_name_of_the_part_is_not_taken_for_what_was_received() {
    let lab = Lab::new();
    sparse(&lab, "x", 8 * MIB, &[(0, 8 * MIB)]);
    let sent = wire(&lab, "x");
    let mut command = lab.command(COWSLIP);
    command.args(["recv", "out"]).stdin(Stdio::piped());
    let mut receiver = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut input = receiver.stdin.take().unwrap();
    // It has read more than a pipe holds, and so has made the part.
    let (first, rest) = sent.split_at(4 * MIB as usize);
    input.write_all(first).unwrap();
    lab.sh("mv out.part moved; echo evil > out.part");
    input.write_all(rest).unwrap();
    drop(input);
    let line = one_line(1, &receiver.wait_with_output().unwrap(), "another part");
    assert!(line.contains("'out.part' was replaced by another file"), "{line}");
    assert_eq!(lab.sh("cat out.part; [ ! -e out ]"), "evil\n");
    // The record of the first part is not taken for one of the other file.
    lab.sh("$COWSLIP recv out --resume < wire.out; cmp out x");
}

#[test]
fn mounted_disk_is_sent_with_its_present_bytes() {
    let mut lab = Lab::new();
    lab.base("base.img", 16 * MIB);
    lab.mount("d=base.img");
    let disk = lab.open("m/d");
    disk.write_all_at(&noise(100_000, 3), 12_345).unwrap();
    fallocate(&disk, PUNCH, MIB..9 * MIB).unwrap();
    lab.sh("$COWSLIP send m/d | $COWSLIP recv out; cmp m/d out");
    assert_eq!(data_runs(&lab.open_ro("out")), data_runs(&lab.open_ro("m/d")));
    drop(disk);
    lab.umount();
}

#[test]
fn changes_since_a_snapshot_are_applied_to_a_copy_of_it() {
    let mut lab = Lab::new();
    lab.base("base.img", 64 * MIB);
    lab.mount("d=base.img,overlay=ov");
    let disk = lab.open("m/d");
    disk.write_all_at(&noise(MIB, 3), 8 * MIB).unwrap();
    lab.ok("snapshot m/d monday");
    lab.sh("$COWSLIP send m/d | $COWSLIP recv old");
    disk.write_all_at(&noise(5000, 4), MIB).unwrap();
    fallocate(&disk, PUNCH, 8 * MIB..8 * MIB + 64 * KIB).unwrap();
    lab.ok("snapshot m/d tuesday");
    disk.write_all_at(&noise(5000, 5), 30 * MIB).unwrap();
    disk.set_len(40 * MIB).unwrap();
    disk.set_len(70 * MIB).unwrap();
    drop(disk);
    let sent = wire(&lab, "m/d --since monday");
    assert!(sent.len() < 40_000, "{}", sent.len());
    let line = one_line(1, &recv(&lab, "new", &sent), "no --onto");
    assert!(line.contains("since 'monday'") && line.contains("--onto OLD"), "{line}");
    let before = checksum(&lab.path("old"));
    let output = recv(&lab, "new --onto old", &sent);
    assert!(output.status.success(), "{}", show(&output));
    lab.sh("cmp m/d new");
    assert_eq!(checksum(&lab.path("old")), before);
    one_line(1, &recv(&lab, "cut --onto old", &sent[..sent.len() - 1]), "cut");
    assert!(!is_there(&lab, "cut"));
    lab.refused(1, "send m/d --since friday");
    lab.refused(1, "send base.img --since monday");
    lab.umount();
}

#[test]
fn stream_of_another_sender_is_accepted_with_a_note() {
    let lab = Lab::new();
    let mut plain = rbd::v2::preamble(MIB).to_vec();
    // Later records override earlier ones, and uncovered ranges are holes.
    for (start, byte) in [(65_536u64, 1u8), (0, 2), (67_000, 3)] {
        plain.extend(rbd::v2::data_header(&(start..start + 5000)));
        plain.extend([byte; 5000]);
    }
    plain.extend(rbd::v2::zeros_record(&(0..100)));
    plain.extend(b"t\x06\0\0\0\0\0\0\0\x02\0\0\0ab?\x01\0\0\0\0\0\0\0xe");
    let output = recv(&lab, "out", &plain);
    assert!(output.status.success(), "{}", show(&output));
    assert!(show(&output).contains("nothing verified what arrived"), "{}", show(&output));
    let mut expected = vec![0; MIB as usize];
    expected[65_536..67_000].fill(1);
    expected[100..5000].fill(2);
    expected[67_000..72_000].fill(3);
    assert!(fs::read(lab.path("out")).unwrap() == expected);
    assert_eq!(data_runs(&lab.open_ro("out")), [0..8192, 65_536..73_728]);
    let line = one_line(1, &recv(&lab, "out --resume", &plain), "resumed");
    assert!(line.contains("exists"), "{line}");
    one_line(1, &recv(&lab, "out --overwrite", b"rbd diff v1\ne"), "version 1");
}

#[test]
fn received_holes_are_exact_although_the_file_system_preallocates() {
    let lab = Lab::new();
    sparse(&lab, "x", 64 * MIB, &[(0, 4096), (20 * MIB, MIB), (41 * MIB, 4096)]);
    lab.host("xfs", "xfs", 400 * MIB);
    lab.sh("xfs_io -c 'extsize 16m' xfs; $COWSLIP send x | $COWSLIP recv xfs/out; cmp x xfs/out");
    assert_eq!(data_runs(&lab.open_ro("xfs/out")), data_runs(&lab.open_ro("x")));
    let taken = allocated(&lab.path("xfs/out"));
    assert!(taken <= allocated(&lab.path("x")) + 64 * KIB, "{taken}");
    lab.sh("umount xfs");
}

/// Starts `cowslip send WORDS` and reads only the banner of its stream.
#[track_caller]
fn begin_send(lab: &Lab, words: &str) -> (std::process::Child, ChildStdout) {
    let mut sender = lab.command(COWSLIP);
    sender.arg("send").args(words.split_whitespace());
    let mut sender = sender.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut stdout = sender.stdout.take().unwrap();
    let mut first = [0; 12];
    stdout.read_exact(&mut first).unwrap();
    assert_eq!(&first, rbd::v2::BANNER);
    (sender, stdout)
}

#[test]
fn mounted_disk_is_sent_as_of_one_point_in_time() {
    let mut lab = Lab::new();
    lab.base("base.img", 64 * MIB);
    lab.mount("d=base.img,overlay=ov t=base.img");
    for disk in ["m/d", "m/t"] {
        let file = lab.open(disk);
        file.write_all_at(&noise(9 * MIB, 3), 12_345).unwrap();
        lab.sh(&format!("cp --sparse=always {disk} want"));
        // The pipe is full long before the end of the stream.
        let (sender, mut stdout) = begin_send(&lab, disk);
        // Overwrites nearly the whole disk while it is sent, then truncates and extends it.
        file.write_all_at(&noise(63 * MIB, 8), 0).unwrap();
        file.set_len(40 * MIB).unwrap();
        file.set_len(65 * MIB).unwrap();
        file.sync_all().unwrap();
        let mut sent = rbd::v2::BANNER.to_vec();
        stdout.read_to_end(&mut sent).unwrap();
        let output = sender.wait_with_output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() && said.lines().all(is_progress), "{said}");
        assert!(recv(&lab, "out --overwrite", &sent).status.success());
        lab.sh(&format!("cmp want out; ! cmp -s {disk} out"));
    }
    lab.umount();
}

#[test]
fn changes_are_sent_as_of_one_point_in_time() {
    let mut lab = Lab::new();
    lab.base("base.img", 64 * MIB);
    lab.mount("d=base.img,overlay=ov");
    let disk = lab.open("m/d");
    disk.write_all_at(&noise(MIB, 3), 8 * MIB).unwrap();
    lab.ok("snapshot m/d monday");
    disk.write_all_at(&noise(20 * MIB, 5), 30 * MIB).unwrap();
    lab.sh("cp m/d want; $COWSLIP send m/.cowslip/d/snapshots/monday | $COWSLIP recv old");
    let (sender, mut stdout) = begin_send(&lab, "m/d --since monday");
    disk.write_all_at(&noise(63 * MIB, 8), 0).unwrap();
    // A new snapshot does not disturb the transfer either.
    lab.ok("snapshot m/d tuesday");
    let mut sent = rbd::v2::BANNER.to_vec();
    stdout.read_to_end(&mut sent).unwrap();
    assert!(sender.wait_with_output().unwrap().status.success());
    assert!((sent.len() as u64) < 20 * MIB + 10_000, "{}", sent.len());
    assert!(recv(&lab, "new --onto old", &sent).status.success());
    lab.sh("cmp want new");
    drop(disk);
    lab.umount();
}

#[test]
fn send_of_a_frozen_disk_can_be_resumed_until_a_write() {
    let mut lab = Lab::new();
    lab.base("base.img", 200 * MIB);
    lab.mount("d=base.img,overlay=ov");
    let disk = lab.open("m/d");
    disk.write_all_at(&noise(130 * MIB, 3), 0).unwrap();
    let sent = wire(&lab, "m/d");
    one_line(1, &recv(&lab, "out", &sent[..80 << 20]), "cut");
    assert_eq!(lab.ok("recv out --resume-offset"), "67108864\n");
    // Whether or not the frozen layer has been merged again, it is the same disk.
    let rest = wire(&lab, "m/d --from 64M");
    one_line(1, &recv(&lab, "out --resume", &rest[..65 << 20]), "cut");
    assert_eq!(lab.ok("recv out --resume-offset"), "134217728\n");
    disk.write_all_at(b"new", 199 * MIB).unwrap();
    let line = one_line(1, &recv(&lab, "out --resume", &wire(&lab, "m/d --from 128M")), "changed");
    assert!(line.contains("changed since 'out.part' was begun"), "{line}");
    drop(disk);
    lab.umount();
}

#[test]
fn disk_that_cannot_be_frozen_is_sent_live_and_reports_changes() {
    let lab = Lab::new();
    sparse(&lab, "base.img", 64 * MIB, &[(0, 64 * MIB)]);
    lab.mount("d=base.img,mode=rw");
    let disk = lab.open("m/d");
    let (sender, mut stdout) = begin_send(&lab, "m/d");
    disk.write_all_at(&noise(MIB, 8), 60 * MIB).unwrap();
    let mut sent = rbd::v2::BANNER.to_vec();
    stdout.read_to_end(&mut sent).unwrap();
    let output = sender.wait_with_output().unwrap();
    let line = one_line(0, &output, "written to");
    assert!(line.contains("was written to while it was sent"), "{line}");
    assert!(recv(&lab, "out", &sent).status.success());
    lab.sh("cmp m/d out");
    let line = lab.refused(1, "send m/d --since monday");
    assert!(line.contains("no overlay"), "{line}");
    drop(disk);
    lab.umount();
}

#[test]
fn user_with_read_access_alone_can_send_a_disk() {
    let mut lab = Lab::new();
    lab.base("base.img", 16 * MIB);
    lab.mount("d=base.img,perm=0644 -o allow_other");
    lab.open("m/d").write_all_at(&noise(100_000, 3), 12_345).unwrap();
    // Another user may have no access to the build directory.
    lab.sh("chmod 755 .; cp $COWSLIP program; chmod 755 program
        setpriv --reuid 65534 --clear-groups ./program send m/d | $COWSLIP recv out; cmp m/d out
        ! setpriv --reuid 65534 --clear-groups ./program send m/d --since x 2> why");
    let why = fs::read_to_string(lab.path("why")).unwrap();
    assert!(why.contains("does not let you ask"), "{why}");
    assert_eq!(lab.disk("d")["overlay"]["chain"].as_array().unwrap().len(), 1, "it was frozen");
    lab.umount();
}

#[test]
fn progress_without_a_terminal_is_one_line_per_second_on_request() {
    let lab = Lab::new();
    sparse(&lab, "x", 32 * MIB, &[(0, 32 * MIB)]);
    let slow = "i=0; while [ $i -lt 8 ]; do head -c 4M; sleep 0.4; i=$((i + 1)); done; cat";
    let begun = Instant::now();
    lab.sh(&format!(
        "$COWSLIP send --progress x 2> sent | {{ {slow}; }} | $COWSLIP recv --progress out 2> received"
    ));
    same(&lab, "x", "out");
    for verb in ["sent", "received"] {
        let text = fs::read_to_string(lab.path(verb)).unwrap();
        let lines = text.lines().count();
        assert!((2..=begun.elapsed().as_secs() as usize + 1).contains(&lines), "{text}");
        assert!(text.lines().all(|line| line.starts_with(verb) && is_progress(line)), "{text}");
        assert!(!text.contains(['\r', '\x1b']), "{text}");
    }
    let slow = "head -c 4M; sleep 1.5; cat";
    lab.sh(&format!(
        "rm out; $COWSLIP send x 2> sent | {{ {slow}; }} | $COWSLIP recv -q out 2> received"
    ));
    for verb in ["sent", "received"] {
        assert_eq!(fs::read_to_string(lab.path(verb)).unwrap(), "", "nobody asked");
    }
    lab.refused(2, "send --progress -q x");
}

#[test]
fn progress_on_a_terminal_is_one_line_that_fits_and_is_erased() {
    let lab = Lab::new();
    sparse(&lab, "x", 32 * MIB, &[(0, 32 * MIB)]);
    lab.sh("script -qec 'stty rows 10 cols 30; $COWSLIP send --frames raw x | { sleep 1; cat >out; }' shown >/dev/null
         cmp x out");
    let shown = fs::read_to_string(lab.path("shown")).unwrap();
    let shown = shown.lines().find(|line| line.contains("sent ")).unwrap();
    let mut draws: Vec<_> = shown.split("\r\x1b[2K").collect();
    assert_eq!(draws.pop(), Some(""), "the last line was not erased: {shown:?}");
    assert!(draws.len() > 1, "{shown:?}");
    for draw in draws {
        assert!(draw.is_empty() || draw.starts_with("sent "), "{shown:?}");
        assert!(draw.chars().count() <= 30 && !draw.contains('\x1b'), "{shown:?}");
    }
}

#[test]
fn source_truncated_while_sending_is_an_error_and_gives_no_file() {
    let lab = Lab::new();
    sparse(&lab, "x", 64 * MIB, &[(0, 64 * MIB)]);
    // The pipe is full long before the end, so the source is truncated while it is sent.
    let (sender, mut stdout) = begin_send(&lab, "x");
    lab.sh("truncate -s 32M x");
    let mut rest = rbd::v2::BANNER.to_vec();
    stdout.read_to_end(&mut rest).unwrap();
    let line = one_line(1, &sender.wait_with_output().unwrap(), "shorter");
    assert!(line.contains("got shorter while it was sent"), "{line}");
    one_line(1, &recv(&lab, "out", &rest), "the stream of it");
    assert!(!is_there(&lab, "out"));
}

#[test]
fn bad_arguments_give_one_line_and_a_closed_pipe_none() {
    let lab = Lab::new();
    sparse(&lab, "x", 8 * MIB, &[(0, 8 * MIB)]);
    lab.refused(1, "send nothing");
    lab.refused(1, "send m");
    lab.refused(1, "send /dev/null");
    lab.refused(2, "send");
    lab.refused(2, "send x --from some");
    let line = lab.refused(1, "send x --from 9M");
    assert!(line.contains("has 8388608 bytes"), "{line}");
    lab.refused(2, "recv");
    lab.refused(1, "recv m");
    lab.refused(2, "recv x --resume-offset --overwrite");
    assert_eq!(lab.ok("recv nothing --resume-offset"), "0\n");
    assert_eq!(lab.sh("{ $COWSLIP send x; } 2> err | head -c 5; cat err"), "rbd d");
}

#[test]
fn concurrent_receivers_do_not_share_a_part() {
    let lab = Lab::new();
    sparse(&lab, "x", MIB, &[(0, MIB)]);
    let sent = wire(&lab, "x");
    let mut first = lab.command(COWSLIP);
    let mut first = first.args(["recv", "out"]).stdin(Stdio::piped()).stdout(Stdio::null());
    first = first.stderr(Stdio::inherit());
    let mut first = first.spawn().unwrap();
    let mut stdin = first.stdin.take().unwrap();
    stdin.write_all(&sent[..1000]).unwrap();
    wait_until("the part", || is_there(&lab, "out.part"));
    let inode = fs::metadata(lab.path("out.part")).unwrap().ino();
    let lock = format!(":{inode} ");
    wait_until("the lock", || fs::read_to_string("/proc/locks").unwrap().contains(&lock));
    let line = one_line(1, &recv(&lab, "out", &sent), "the second");
    assert!(line.contains("received by another"), "{line}");
    assert_eq!(fs::metadata(lab.path("out.part")).unwrap().ino(), inode);
    stdin.write_all(&sent[1000..]).unwrap();
    drop(stdin);
    assert!(first.wait().unwrap().success());
    same(&lab, "x", "out");
    assert!(Path::new(&lab.path("out")).is_file());
}

#[test]
fn links_and_pipes_beside_the_target_are_not_followed() {
    let lab = Lab::new();
    // Longer than one checkpoint interval, so that there is a state file.
    sparse(&lab, "a", 72 * MIB, &[(0, 72 * MIB)]);
    let wire = wire(&lab, "a");
    fs::write(lab.path("victim"), "whole").unwrap();
    lab.sh("ln -s victim b.part.state.new; ln -s victim b.part.state");
    let output = recv(&lab, "b", &wire);
    assert!(output.status.success(), "{}", show(&output));
    same(&lab, "a", "b");
    assert_eq!(fs::read(lab.path("victim")).unwrap(), b"whole");
    assert!(!is_there(&lab, "b.part.state") && !is_there(&lab, "b.part.state.new"));
    // A state file that is a link is ignored, whatever it refers to.
    let cut = recv(&lab, "c", &wire[..wire.len() - 100]);
    assert!(one_line(1, &cut, "a cut stream").contains("verified"));
    lab.sh("mv c.part.state real; ln -s real c.part.state");
    assert_eq!(lab.ok("recv c --resume-offset"), "0\n");
    for (name, make) in [
        ("c.part", "rm -f c.part c.part.state; mkfifo c.part"),
        ("c.part", "rm -f c.part; mkdir c.part"),
        ("c.part", "rmdir c.part; ln -s victim c.part"),
    ] {
        lab.sh(make);
        let line = one_line(1, &recv(&lab, "c", &wire), make);
        assert!(line.contains(&format!("{name}' is no file: remove it")), "{line}");
        assert!(lab.refused(1, "recv c --resume-offset").contains("is no file"));
    }
    lab.sh("rm c.part; mkfifo c.part.state");
    assert!(recv(&lab, "c", &wire).status.success());
    assert_eq!(fs::read(lab.path("victim")).unwrap(), b"whole");
}

#[test]
fn stream_of_checkpoints_alone_needs_little_memory() {
    let lab = Lab::new();
    let mut wire = rbd::v2::preamble(1 << 30).to_vec();
    let mut chain = HashChain::default();
    chain.update(&wire);
    let mark = Checkpoint { start: 0, end: 0, identity: 7, origin: 0 };
    let name = "s".repeat(255);
    let since = [&b"f"[..], &259_u64.to_le_bytes(), &255_u32.to_le_bytes(), name.as_bytes()];
    let since = since.concat();
    chain.update(&since);
    wire.extend(since);
    for _ in 0..200_000 {
        wire.extend(chain.checkpoint_record(&mark, CheckpointKind::Middle));
    }
    fs::write(lab.path("old"), "old").unwrap();
    put(&lab.path("wire"), &wire);
    // Each state holds its snapshot's name. Syncs are slow here: a queue of states would exceed the
    // memory limit.
    let line = "ulimit -d 40000; exec strace -f -o strace.txt -e trace=fdatasync \
                -e inject=fdatasync:delay_enter=3000000 $COWSLIP recv x --onto old <wire";
    let output = lab.output("sh", &["-c", line]);
    assert!(one_line(1, &output, line).contains("the stream was cut"));
}

#[test]
fn a_part_that_can_be_resumed_survives_another_command_that_replaces_its_file() {
    let lab = Lab::new();
    lab.sh("head -c 8M /dev/urandom > big; cp big x; cp big y");
    for name in ["x", "y"] {
        let line =
            format!("$COWSLIP send big | head -c 5M | $COWSLIP recv {name} --overwrite || true");
        lab.sh(&line);
    }
    let before = lab.sh("sha256sum x.part y.part");
    lab.ok("mount m d=blank:1M");
    lab.ok("diff m/d -o x --overwrite");
    lab.ok("map m/d --svg y --overwrite");
    lab.umount();
    assert_eq!(lab.sh("sha256sum x.part y.part"), before);
    lab.sh("$COWSLIP send big | $COWSLIP recv x --overwrite; cmp big x; [ ! -e x.part ]");
}
