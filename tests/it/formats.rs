//! Codecs of other tools' formats, tested against these tools: `simg2img` and `img2simg` (Debian's
//! android-sdk-libsparse-utils), and `bmaptool` (bmap-tools). `contrib/test` installs them.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::process::Command;

use cowslip::formats::android::{
    AndroidContent, AndroidDecoder, AndroidPlan, AndroidRecord, AndroidRun, AndroidWriter,
    BLOCK_SIZE, Checksums, whole_blocks,
};
use cowslip::formats::bmap;

const MIB: u64 = 1 << 20;

/// Runs a program in `dir`. If it fails, the test fails with its output.
fn run(dir: &Path, line: &[&str]) {
    let output = Command::new(line[0]).args(&line[1..]).current_dir(dir).output();
    let output = output.unwrap_or_else(|error| panic!("{}: {error}: run contrib/test", line[0]));
    assert!(output.status.success(), "{line:?}: {output:?}");
}

fn of(content: AndroidContent, range: Range<u64>) -> AndroidRun {
    AndroidRun { range, content }
}

/// Returns the `len` bytes of the test pattern at `offset`: never zero, and never the same byte
/// four times in a row.
fn noise(offset: u64, len: usize) -> Vec<u8> {
    let byte = |at: u64| (at.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 56) as u8 | 1;
    (offset..).take(len).map(byte).collect()
}

fn write_data<W: Write>(writer: &mut AndroidWriter<W>, range: Range<u64>) {
    let mut at = range.start;
    while at < range.end {
        let len = (range.end - at).min(100_000) as usize;
        writer.write_bytes(&noise(at, len)).unwrap();
        at += len as u64;
    }
}

fn write_runs<W: Write>(writer: &mut AndroidWriter<W>, runs: &[AndroidRun]) {
    for run in runs {
        writer.start_run(run).unwrap();
        if run.content == AndroidContent::Data {
            write_data(writer, run.range.clone());
        }
    }
}

/// Returns the bytes of a target after applying `runs`, where every byte was `before`.
fn expected(runs: &[AndroidRun], before: u8) -> Vec<u8> {
    runs.iter()
        .flat_map(|run| {
            let len = (run.range.end - run.range.start) as usize;
            match run.content {
                AndroidContent::Data => noise(run.range.start, len),
                AndroidContent::Zeros => vec![0; len],
                AndroidContent::DontCare => vec![before; len],
            }
        })
        .collect()
}

fn some_runs() -> (u64, Vec<AndroidRun>) {
    let size = 100 * MIB;
    let runs = [
        of(AndroidContent::Data, 0..BLOCK_SIZE),
        of(AndroidContent::Zeros, BLOCK_SIZE..3 * MIB),
        // Longer than one chunk.
        of(AndroidContent::Data, 5 * MIB..78 * MIB),
        of(AndroidContent::Zeros, 78 * MIB..79 * MIB),
        of(AndroidContent::Data, 90 * MIB..90 * MIB + BLOCK_SIZE),
    ];
    (size, whole_blocks(size, runs).unwrap())
}

#[test]
fn simg2img_reads_our_images() {
    let dir = tempfile::tempdir().unwrap();
    let (size, runs) = some_runs();
    let plan = AndroidPlan::new(size, &runs).unwrap();
    let file = File::create(dir.path().join("sparse")).unwrap();
    let mut writer = AndroidWriter::new(io::BufWriter::new(file), plan).unwrap();
    write_runs(&mut writer, &runs);
    writer.finish().unwrap();

    run(dir.path(), &["simg2img", "sparse", "image"]);
    assert!(fs::read(dir.path().join("image")).unwrap() == expected(&runs, 0));
}

#[test]
fn simg2img_writes_zeros_and_skips_dont_care_ranges() {
    let dir = tempfile::tempdir().unwrap();
    let (size, runs) = some_runs();
    let mut writer =
        AndroidWriter::new(Vec::new(), AndroidPlan::new(size, &runs).unwrap()).unwrap();
    write_runs(&mut writer, &runs);
    fs::write(dir.path().join("sparse"), writer.finish().unwrap().0).unwrap();
    // simg2img truncates a file, but not a device.
    let target = dir.path().join("device");
    fs::write(&target, vec![0xEE; size as usize]).unwrap();
    let device = Loop::new(&target);
    run(dir.path(), &["simg2img", "sparse", &device.0]);
    run(dir.path(), &["blockdev", "--flushbufs", &device.0]);
    drop(device);
    assert!(fs::read(&target).unwrap() == expected(&runs, 0xEE));
}

#[test]
#[ignore = "writes 5 GiB: contrib/interop android runs it"]
fn simg2img_writes_all_of_five_gigabytes_of_zeros() {
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    let size = 5 << 30;
    let runs = [
        of(AndroidContent::Zeros, 0..size - BLOCK_SIZE),
        of(AndroidContent::Data, size - BLOCK_SIZE..size),
    ];
    let mut writer =
        AndroidWriter::new(Vec::new(), AndroidPlan::new(size, &runs).unwrap()).unwrap();
    write_runs(&mut writer, &runs);
    fs::write(dir.path().join("sparse"), writer.finish().unwrap().0).unwrap();
    run(dir.path(), &["simg2img", "sparse", "image"]);
    let image = File::open(dir.path().join("image")).unwrap();
    let metadata = image.metadata().unwrap();
    assert_eq!(metadata.len(), size);
    // simg2img writes zeros out, so a lost range would be a hole.
    assert!(metadata.blocks() * 512 >= size, "{} of {size}", metadata.blocks() * 512);
    let mut last = vec![0; BLOCK_SIZE as usize];
    image.read_exact_at(&mut last, size - BLOCK_SIZE).unwrap();
    assert!(last == noise(size - BLOCK_SIZE, BLOCK_SIZE as usize));
}

#[test]
fn images_of_img2simg_can_be_read() {
    let dir = tempfile::tempdir().unwrap();
    let (_, runs) = some_runs();
    let mut image = expected(&runs, 0);
    // Fills other than zeros, and a size that is not a multiple of the block size: img2simg pads
    // it.
    image[(80 * MIB) as usize..(81 * MIB) as usize].copy_from_slice(&b"abcd".repeat(1 << 18));
    image.truncate(image.len() - 5000);
    fs::write(dir.path().join("image"), &image).unwrap();
    image.resize(image.len().next_multiple_of(BLOCK_SIZE as usize), 0);
    run(dir.path(), &["img2simg", "image", "sparse"]);
    let file = File::open(dir.path().join("sparse")).unwrap();
    let (bytes, fills) = decode(io::BufReader::new(file));
    assert!(bytes == image);
    assert!(fills > 1, "img2simg has found no fill");
}

/// Decodes a sparse image, and returns the image and the number of fills.
fn decode(input: impl Read) -> (Vec<u8>, usize) {
    let mut decoder = AndroidDecoder::new(input, Checksums::Verify).unwrap();
    let (mut image, mut fills) = (Vec::new(), 0);
    let AndroidRecord::Size(size) = decoder.next_record().unwrap() else { panic!("no size") };
    loop {
        match decoder.next_record().unwrap() {
            AndroidRecord::Size(_) => panic!("a second size"),
            AndroidRecord::Data(range) => {
                assert_eq!(image.len() as u64, range.start);
                decoder.body().read_to_end(&mut image).unwrap();
                assert_eq!(image.len() as u64, range.end);
            }
            AndroidRecord::Fill(range, value) => {
                fills += 1;
                image.extend(value.repeat(((range.end - range.start) / 4) as usize));
            }
            AndroidRecord::DontCare(range) => image.resize(range.end as usize, 0),
            AndroidRecord::End => break,
        }
    }
    assert_eq!(image.len() as u64, size);
    (image, fills)
}

/// Creates an image with three runs of data and an unaligned end, and its bmap.
fn image_and_bmap(dir: &Path) -> Vec<u8> {
    let size = 20 * MIB + 1234;
    let runs = [100..5000, 3 * MIB + 7..9 * MIB, 20 * MIB + 1000..20 * MIB + 1234];
    let mut image = vec![0; size as usize];
    for run in &runs {
        let len = (run.end - run.start) as usize;
        image[run.start as usize..run.end as usize].copy_from_slice(&noise(run.start, len));
    }
    fs::write(dir.join("image"), &image).unwrap();
    let file = File::open(dir.join("image")).unwrap();
    let mut output = File::create(dir.join("image.bmap")).unwrap();
    let read = |offset, buf: &mut [u8]| file.read_exact_at(buf, offset);
    let totals = bmap::write(&mut output, size, runs, read).unwrap();
    assert_eq!((totals.ranges, totals.blocks), (3, 5121));
    image
}

#[test]
fn bmaptool_copies_with_our_bmap() {
    let dir = tempfile::tempdir().unwrap();
    let image = image_and_bmap(dir.path());
    run(dir.path(), &["bmaptool", "copy", "--bmap", "image.bmap", "image", "copy"]);
    assert!(fs::read(dir.path().join("copy")).unwrap() == image);
    let copied = fs::metadata(dir.path().join("copy")).unwrap().blocks() * 512;
    assert!(copied < 7 * MIB, "{copied} bytes of 6 MiB");
}

#[test]
fn bmaptool_detects_damage_with_our_bmap() {
    let refuses = |damage: &dyn Fn(&Path)| {
        let dir = tempfile::tempdir().unwrap();
        image_and_bmap(dir.path());
        damage(dir.path());
        let line = ["copy", "--bmap", "image.bmap", "image", "copy"];
        let output = Command::new("bmaptool").args(line).current_dir(dir.path()).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && said.contains("checksum"), "{said}");
    };
    refuses(&|dir| {
        let image = fs::OpenOptions::new().write(true).open(dir.join("image")).unwrap();
        image.write_all_at(&[0], 5 * MIB).unwrap();
    });
    refuses(&|dir| {
        let text = fs::read_to_string(dir.join("image.bmap")).unwrap();
        fs::write(dir.join("image.bmap"), text.replace(" 768-2303 ", " 768-2302 ")).unwrap();
    });
}

#[test]
fn bmaptool_accepts_an_image_that_is_one_hole() {
    let dir = tempfile::tempdir().unwrap();
    File::create(dir.path().join("image")).unwrap().set_len(MIB).unwrap();
    let mut output = File::create(dir.path().join("image.bmap")).unwrap();
    let read = |_, _: &mut [u8]| panic!("nothing is read");
    bmap::write(&mut output, MIB, [], read).unwrap();
    run(dir.path(), &["bmaptool", "copy", "--bmap", "image.bmap", "image", "copy"]);
    assert_eq!(fs::metadata(dir.path().join("copy")).unwrap().len(), MIB);
}

/// A loop device that is detached on drop.
struct Loop(String);

impl Loop {
    fn new(file: &Path) -> Self {
        let output = Command::new("losetup").args(["-f", "--show"]).arg(file).output().unwrap();
        assert!(output.status.success(), "{output:?}");
        Self(String::from_utf8(output.stdout).unwrap().trim().to_owned())
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").args(["-d", &self.0]).status();
    }
}
