//! `--frames android-sparse` through pipes: streams that `simg2img` accepts and that `img2simg`
//! creates.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::process::{Output, Stdio};

use crate::common::mount::*;
use cowslip::formats::android::{AndroidContent, AndroidPlan, AndroidRun, AndroidWriter};

const SIZE: u64 = 32 * MIB;

/// Creates a file with data at both ends and in the middle, and holes between.
fn sparse(lab: &Lab, name: &str) {
    let file = File::create(lab.path(name)).unwrap();
    file.set_len(SIZE).unwrap();
    for (start, len) in [(0, 8192), (5 * MIB, MIB), (SIZE - 4096, 4096)] {
        file.write_all_at(&noise(len, start + 1), start).unwrap();
    }
    file.sync_all().unwrap();
}

/// Runs `cowslip recv WORDS --frames android-sparse` with `image` as its stdin.
fn recv(lab: &Lab, words: &str, image: &[u8]) -> Output {
    put(&lab.path("wire"), image);
    let mut command = lab.command(COWSLIP);
    command.args(["recv", "--frames", "android-sparse"]).args(words.split_whitespace());
    command.stdin(File::open(lab.path("wire")).unwrap());
    command.stdout(Stdio::piped()).stderr(Stdio::piped()).output().unwrap()
}

/// Returns an image of four blocks: data, zeros, don't-care, data. With `sum`, a checksum chunk
/// follows.
fn small(sum: Option<u32>) -> Vec<u8> {
    use AndroidContent::{Data, DontCare, Zeros};
    let contents = [Data, Zeros, DontCare, Data].into_iter().zip(0..);
    let run = |(content, at): (AndroidContent, u64)| AndroidRun {
        range: at * 4096..(at + 1) * 4096,
        content,
    };
    let runs: Vec<AndroidRun> = contents.map(run).collect();
    let mut writer =
        AndroidWriter::new(Vec::new(), AndroidPlan::new(4 * 4096, &runs).unwrap()).unwrap();
    for run in &runs {
        writer.start_run(run).unwrap();
        if run.content == Data {
            writer.write_bytes(&[7; 4096]).unwrap();
        }
    }
    let (mut image, totals) = writer.finish().unwrap();
    if let Some(sum) = sum {
        image[20..24].copy_from_slice(&(totals.chunks + 1).to_le_bytes());
        image.extend(b"\xc4\xca\0\0\0\0\0\0\x10\0\0\0");
        image.extend(sum.to_le_bytes());
    }
    image
}

fn blocks(bytes: [u8; 4]) -> Vec<u8> {
    bytes.into_iter().flat_map(|byte| [byte; 4096]).collect()
}

#[test]
fn simg2img_restores_a_sent_file() {
    let mut lab = Lab::new();
    sparse(&lab, "x");
    lab.sh("$COWSLIP send x --frames android-sparse | cat > sent; simg2img sent out; cmp x out");
    let sent = fs::metadata(lab.path("sent")).unwrap().len();
    assert!(sent < MIB + 16 * KIB + 200, "{sent}");
    // A mounted disk, received again by `recv`.
    lab.watch("x");
    lab.mount("d=x");
    lab.open("m/d").write_all_at(&noise(MIB, 9), 9 * MIB).unwrap();
    lab.sh("$COWSLIP send m/d --frames android-sparse |
            $COWSLIP recv back --frames android-sparse; cmp m/d back");
    assert_eq!(data_runs(&lab.open_ro("back")), data_runs(&lab.open_ro("m/d")));
}

#[test]
fn image_of_img2simg_is_received_with_its_holes() {
    let lab = Lab::new();
    sparse(&lab, "x");
    let file = lab.open("x");
    file.write_all_at(&b"abcd".repeat(1 << 18), 20 * MIB).unwrap();
    file.sync_all().unwrap();
    lab.sh("img2simg x image; cat image | $COWSLIP recv out --frames android-sparse; cmp x out");
    assert_eq!(data_runs(&lab.open_ro("out")), data_runs(&lab.open_ro("x")));
    assert!(!lab.path("out.part").exists());
}

#[test]
fn dont_care_ranges_keep_old_bytes_and_are_holes_in_a_new_file() {
    let lab = Lab::new();
    let image = small(None);
    assert!(recv(&lab, "new", &image).status.success());
    assert_eq!(fs::read(lab.path("new")).unwrap(), blocks([7, 0, 0, 7]));
    assert_eq!(data_runs(&lab.open_ro("new")), [0..4096, 12288..16384]);
    put(&lab.path("old"), &[b'o'; 5 * 4096]);
    let output = recv(&lab, "patched --onto old", &image);
    assert!(output.status.success(), "{}", show(&output));
    assert_eq!(fs::read(lab.path("patched")).unwrap(), blocks([7, 0, b'o', 7]));
    assert_eq!(data_runs(&lab.open_ro("patched")), [0..4096, 8192..16384]);
    assert_eq!(fs::read(lab.path("old")).unwrap(), [b'o'; 5 * 4096]);
    let device = lab.loop_device("old", "");
    let output = recv(&lab, &format!("{device} --overwrite"), &image);
    assert!(output.status.success(), "{}", show(&output));
    lab.sh(&format!("blockdev --flushbufs {device}; losetup -d {device}"));
    let expected = [blocks([7, 0, b'o', 7]), vec![b'o'; 4096]].concat();
    assert_eq!(fs::read(lab.path("old")).unwrap(), expected);
}

#[test]
fn wrong_checksum_is_reported_as_damage() {
    let lab = Lab::new();
    let sum = crc32fast::hash(&blocks([7, 0, 0, 7]));
    assert!(recv(&lab, "out", &small(Some(sum))).status.success());
    let line = one_line(1, &recv(&lab, "bad", &small(Some(sum ^ 1))), "a wrong checksum");
    assert!(line.contains("damaged") && line.contains("checksum"), "{line}");
    assert!(!lab.path("bad").exists());
}

#[test]
fn truncated_or_damaged_image_never_becomes_a_file() {
    let lab = Lab::new();
    let image = small(Some(crc32fast::hash(&blocks([7, 0, 0, 7]))));
    let cuts = (0..image.len()).filter(|cut| *cut < 200 || cut % 97 == 0 || *cut > 8200);
    for cut in cuts {
        let line = one_line(1, &recv(&lab, "out", &image[..cut]), &format!("cut at {cut}"));
        assert!(line.contains("the stream was cut"), "{line}");
        assert!(!lab.path("out").exists());
    }
    // Every bit of the header and the first chunk header, and some later ones; detected damage
    // leaves no file.
    for at in (0..40).chain([4200, 8240]) {
        for bit in 0..8 {
            let mut wrong = image.clone();
            wrong[at] ^= 1 << bit;
            let output = recv(&lab, "out", &wrong);
            match output.status.success() {
                true => {
                    let same = fs::read(lab.path("out")).unwrap() == blocks([7, 0, 0, 7]);
                    assert!(same, "{at}.{bit}");
                    fs::remove_file(lab.path("out")).unwrap();
                }
                false => {
                    one_line(1, &output, &format!("{at}.{bit}"));
                    assert!(!lab.path("out").exists(), "{at}.{bit}");
                }
            }
        }
    }
    let line = one_line(1, &recv(&lab, "out", b"rbd diff v2\n and more of that, and more"), "rbd");
    assert!(line.contains("no Android sparse image") && line.contains("nothing was w"), "{line}");
    assert!(recv(&lab, "out", &image).status.success(), "a part that is left is in nobody's way");
}

#[test]
fn impossible_images_are_rejected_before_the_first_byte() {
    let lab = Lab::new();
    lab.sh("head -c 5000 /dev/urandom > odd; truncate -s 8192 x");
    let line = lab.refused(1, "send odd --frames android-sparse");
    assert!(line.contains("5000 bytes") && line.contains("size=8192"), "{line}");
    let line = lab.sh("cat x | $COWSLIP send - --frames android-sparse 2>&1 | head -c 500");
    assert!(line.contains("nobody knows of a pipe: name a file"), "{line}");
    for words in [
        "send x --frames android-sparse --since s",
        "send x --frames android-sparse --from 4096",
        "send x --frames android-sparse --detect-zeroes",
        "recv y --frames android-sparse --resume",
    ] {
        let line = lab.refused(2, words);
        assert!(line.contains("--frames rbd"), "{words}: {line}");
    }
    assert_eq!(lab.sh("ls"), "m\nodd\nx\n");
}

/// Returns an image of 44 bytes that is a single fill of `blocks` blocks of 1 MiB.
fn fill(blocks: u32) -> Vec<u8> {
    let mut image = 0xed26_ff3a_u32.to_le_bytes().to_vec();
    [1_u16, 0, 28, 12].iter().for_each(|number| image.extend(number.to_le_bytes()));
    [1 << 20, blocks, 1, 0].iter().for_each(|number: &u32| image.extend(number.to_le_bytes()));
    [0xcac2_u16, 0].iter().for_each(|number| image.extend(number.to_le_bytes()));
    [blocks, 16, 0x0707_0707].iter().for_each(|number| image.extend(number.to_le_bytes()));
    image
}

#[test]
fn small_image_cannot_fill_the_file_system() {
    let lab = Lab::new();
    lab.host("small", "ext4", 64 * MIB);
    let dir = "small";
    // Fails before the first byte of a fill that has no space.
    let output = recv(&lab, &format!("{dir}/x"), &fill(1 << 20));
    assert!(one_line(1, &output, "a fill of 1 TiB").contains("No space left on device"));
    assert!(allocated(&lab.path(&format!("{dir}/x.part"))) < MIB);
    // Available space is not enough: the limit applies as well.
    let output = recv(&lab, "y --limit 8M", &fill(9));
    let line = one_line(1, &output, "a fill of 9 MiB");
    assert!(line.contains("has more data than 8 MiB") && line.contains("--limit"), "{line}");
    assert!(allocated(&lab.path("y.part")) < MIB && !lab.path("y").exists());
    let output = recv(&lab, "z --limit 9M", &fill(9));
    assert!(output.status.success(), "{}", show(&output));
    assert_eq!(fs::read(lab.path("z")).unwrap(), vec![7; 9 << 20]);
}
