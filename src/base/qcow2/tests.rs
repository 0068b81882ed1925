//! Images of the real qemu-img, read through layers that are no files: slow, broken, and on a
//! server.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::super::{BaseAccess, BaseImage, open_base_file};
use super::*;
use crate::arrival::Arrival;
use crate::config::{DirectIo, Locking, Passthrough};
use crate::host::testing::{LoopDevice, run};
use crate::layer::testing::MemoryLayer;

const NAME: &str = "nbd://server/vm";

/// A directory for images.
struct Images(tempfile::TempDir);

impl Images {
    /// Creates `source.raw`, with data that compresses and zeros between.
    fn new() -> Self {
        let images = Self(tempfile::tempdir_in("/var/tmp").unwrap());
        images.sh("seq 99999 | head -c 400K >source.raw; truncate -s 2M source.raw
             seq 9 99999 | head -c 200001 >>source.raw; truncate -s 2500096 source.raw");
        images
    }

    fn sh(&self, script: &str) -> String {
        run("sh", &["-ec", &format!("cd {}; {script}", self.0.path().display())])
    }

    fn bytes(&self, name: &str) -> Vec<u8> {
        fs::read(self.0.path().join(name)).unwrap()
    }

    /// Runs `script`, which makes `image.qcow2`, and returns the bytes of the image and those of the
    /// disk, as QEMU reads it.
    fn make(&self, script: &str) -> (Vec<u8>, Vec<u8>) {
        self.sh(script);
        self.sh("qemu-img convert -f qcow2 -O raw image.qcow2 image.raw");
        (self.bytes("image.qcow2"), self.bytes("image.raw"))
    }
}

fn open_layer(image: Arc<MemoryLayer>, allowed: &[PathBuf]) -> Result<BackingChain, ChainError> {
    open(BaseImage::on_server(image, NAME), allowed, Locking::Qemu)
}

fn open_bytes(image: &[u8], allowed: &[PathBuf]) -> Result<BackingChain, ChainError> {
    open_layer(Arc::new(MemoryLayer::new(image.to_vec())), allowed)
}

fn open_file(path: &Path) -> Result<BackingChain, ChainError> {
    let (passthrough, direct) = (Passthrough::Off, DirectIo::Off);
    let file = open_base_file(path, BaseAccess::Read, Locking::Qemu, passthrough, direct).unwrap();
    open(file.into(), &[], Locking::Qemu)
}

fn is_eagain<T>(result: &io::Result<T>) -> bool {
    result.as_ref().is_err_and(|error| error.raw_os_error() == Some(libc::EAGAIN))
}

/// Reads up to `len` bytes from `at` on: first without waiting, as a worker does.
fn read_some(disk: &BackingChain, at: u64, len: usize) -> io::Result<Vec<u8>> {
    let mut buf = vec![0xee; len];
    let mut found = disk.read_at(&mut buf, at, Wait::No);
    if is_eagain(&found) {
        found = disk.read_at(&mut buf, at, Wait::Yes);
    }
    let found = found?;
    assert!(found.range.start == at && !found.range.is_empty());
    assert!(found.range.end <= at + len as u64);
    buf.truncate(usize::try_from(found.len()).unwrap());
    if found.kind != ExtentKind::Data {
        buf.fill(0);
    }
    Ok(buf)
}

fn read_all(disk: &BackingChain) -> Vec<u8> {
    let mut bytes = Vec::new();
    while (bytes.len() as u64) < disk.size() {
        let left = usize::try_from(disk.size()).unwrap() - bytes.len();
        let read = read_some(disk, bytes.len() as u64, left.min(70_001)).unwrap();
        bytes.extend(read);
    }
    bytes
}

/// Checks that the extents of `disk` cover it, and that nothing but zeros is called so.
fn check_extents(disk: &BackingChain, want: &[u8]) {
    let mut at = 0;
    while at < disk.size() {
        let found = disk.extent_at(at..disk.size(), Wait::Yes).unwrap();
        assert_eq!(found.range.start, at);
        let is_zero = || {
            let byte = |at| usize::try_from(at).unwrap();
            want[byte(at)..byte(found.range.end)].iter().all(|byte| *byte == 0)
        };
        assert!(found.kind == ExtentKind::Data || is_zero(), "{found:?}");
        at = found.range.end;
    }
}

#[test]
fn images_of_every_cluster_size_and_version_are_read_from_any_layer() {
    let images = Images::new();
    for bits in 9..=21 {
        for (compat, packed) in [("0.10", ""), ("0.10", "-c"), ("1.1", ""), ("1.1", "-c")] {
            let case = format!("clusters of 2^{bits}, {compat} {packed}");
            let (image, want) = images.make(&format!(
                "qemu-img convert {packed} -f raw -O qcow2 -o cluster_size={},compat={compat} source.raw image.qcow2
                 qemu-io -c 'write -P 9 1000K 30K' -c 'write -z 2100K 50K' -c 'discard 0 64K' image.qcow2",
                1 << bits
            ));
            let memory = || MemoryLayer::new(image.clone());
            let plain = open_layer(Arc::new(memory()), &[]).unwrap();
            assert!(plain.needs().is_empty());
            assert!(read_all(&plain) == want, "{case}");
            check_extents(&plain, &want);
            let hard = memory().with_delay().with_short_answers(777);
            let disk = open_layer(Arc::new(hard), &[]).unwrap();
            assert!(read_all(&disk) == want, "{case}");
            check_extents(&disk, &want);
        }
    }
}

#[test]
fn formats_that_are_not_read_are_refused_as_those_of_files_are() {
    let images = Images::new();
    for (option, why) in [
        ("compression_type=zstd", "is compressed with zstd"),
        ("extended_l2=on", "has extended L2 entries"),
    ] {
        images
            .sh(&format!("qemu-img convert -c -f raw -O qcow2 -o {option} source.raw image.qcow2"));
        let Err(error) = open_bytes(&images.bytes("image.qcow2"), &[]) else {
            panic!("{option} was opened");
        };
        assert!(error.to_string().starts_with(&format!("'{NAME}' {why}")), "{error}");
    }
}

#[test]
fn an_image_that_was_cut_off_gives_the_errors_that_a_file_gives() {
    let images = Images::new();
    let (image, _) = images.make(
        "qemu-img convert -f raw -O qcow2 -o cluster_size=4K source.raw image.qcow2
         qemu-img convert -c -f raw -O qcow2 -o cluster_size=4K source.raw packed.qcow2
         dd if=packed.qcow2 of=tail bs=4K skip=300 status=none",
    );
    let path = images.0.path().join("cut");
    let packed = images.bytes("packed.qcow2");
    let mut lines = std::collections::BTreeSet::new();
    for whole in [image, packed] {
        let small = [0, 3, 71, 72, 103, 104, 120, 511, 512, 4096, 4097];
        for len in small.into_iter().chain((0..whole.len()).step_by(whole.len() / 20)) {
            let cut = &whole[..len];
            fs::write(&path, cut).unwrap();
            let name = path.display().to_string();
            match (open_file(&path), open_bytes(cut, &[])) {
                (Ok(file), Ok(memory)) => {
                    for at in (0..file.size()).step_by(4096) {
                        let [one, two] = [&file, &memory].map(|disk| {
                            read_some(disk, at, 512).map_err(|error| error.raw_os_error())
                        });
                        assert!(one == two, "{len} bytes, at {at}");
                    }
                }
                (Err(file), Err(memory)) => {
                    let line = memory.to_string();
                    assert_eq!(file.to_string().replace(&name, NAME), line);
                    lines.insert(line);
                }
                (file, memory) => panic!("{len} bytes: {:?} {:?}", file.err(), memory.err()),
            }
        }
    }
    assert!(lines.iter().any(|line| line.contains("it has no header")), "{lines:?}");
    assert!(lines.iter().any(|line| line.contains("outside the file")), "{lines:?}");
}

#[test]
fn a_failing_layer_gives_its_errno_and_never_wrong_bytes_and_recovers() {
    let images = Images::new();
    for packed in ["", "-c"] {
        let (image, want) = images.make(&format!(
            "qemu-img convert {packed} -f raw -O qcow2 -o cluster_size=4K source.raw image.qcow2"
        ));
        let (mut refused, mut damaged) = (0, 0);
        for bad in (0..image.len() as u64).step_by(16 << 10) {
            let failure = (bad..bad + (16 << 10), libc::ETIMEDOUT);
            let layer = Arc::new(MemoryLayer::new(image.clone()));
            layer.set_failure(Some(failure.clone()));
            match open_layer(Arc::clone(&layer), &[]) {
                Ok(_) => {}
                Err(error) => {
                    let start = format!("'{NAME}' cannot be read: Connection timed out");
                    assert!(error.to_string().starts_with(&start), "{error}");
                    refused += 1;
                }
            }
            // And once more, where it fails only after the image was opened.
            layer.set_failure(None);
            let disk = open_layer(Arc::clone(&layer), &[]).unwrap();
            layer.set_failure(Some(failure));
            let piece = |at: u64| &want[usize::try_from(at).unwrap()..][..512];
            let mut errors = 0;
            for at in (0..disk.size()).step_by(4096) {
                match read_some(&disk, at, 512) {
                    Ok(read) => assert!(read == piece(at)[..read.len()], "{bad}, at {at}"),
                    Err(error) => {
                        assert_eq!(error.raw_os_error(), Some(libc::ETIMEDOUT));
                        errors += 1;
                    }
                }
            }
            damaged += u32::from(errors > 0);
            layer.set_failure(None);
            assert!(read_all(&disk) == want, "{bad} after it was readable again");
        }
        assert!(refused > 0 && damaged > 5, "{refused} {damaged}");
    }
}

#[test]
fn a_table_that_a_file_lost_is_an_error_and_not_unallocated() {
    let images = Images::new();
    images.sh("qemu-img create -q -f qcow2 -o cluster_size=4K -b source.raw -F raw image.qcow2
         qemu-io -c 'write -P 7 0 64K' image.qcow2");
    let image = images.0.path().join("image.qcow2");
    let disk = open_file(&image).unwrap();
    // QEMU puts the L2 table behind the L1 table, in the fifth cluster.
    fs::File::options().write(true).open(&image).unwrap().set_len(4 * 4096).unwrap();
    for at in [0, 100 << 10] {
        let error = disk.read_at(&mut [0; 512], at, Wait::Yes).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EIO));
        // Whoever reads what it describes is told.
        assert_eq!(disk.extent_at(at..at + 512, Wait::Yes).unwrap().kind, ExtentKind::Data);
    }
}

#[test]
fn an_image_on_a_block_device_is_read_as_one_in_a_file() {
    let images = Images::new();
    let (image, want) = images.make("qemu-img convert -c -f raw -O qcow2 source.raw image.qcow2");
    let size = image.len().next_multiple_of(1 << 20) as u64;
    let path = images.0.path().join("image.qcow2");
    fs::File::options().write(true).open(&path).unwrap().set_len(size).unwrap();
    let device = LoopDevice::new(&path, &["-r"]);
    let disk = open_file(device.path()).unwrap();
    assert!(read_all(&disk) == want);
}

/// Checks that `answer` is `EAGAIN`, and whether the layer below has left an arrival.
fn assert_waits<T>(answer: &io::Result<T>, for_layer: bool) {
    assert!(is_eagain(answer));
    assert_eq!(Arrival::take_expected().is_some(), for_layer);
}

#[test]
fn without_waiting_tables_are_eagain_and_data_waits_for_the_layer_below() {
    let images = Images::new();
    let (image, want) = images.make(
        "qemu-img create -q -f qcow2 image.qcow2 3M
         qemu-io -c 'write -P 7 0 64K' -c 'write -z 64K 64K' -c 'write -c -P 5 1M 64K' image.qcow2",
    );
    let disk = open_layer(Arc::new(MemoryLayer::new(image).with_delay()), &[]).unwrap();
    let mut buf = [0; 4096];
    let mut copy = |_: std::os::fd::BorrowedFd<'_>, _| panic!("there is no file to lend");
    // The mapping is not known: a table would have to be read.
    assert_waits(&disk.read_at(&mut buf, 0, Wait::No), false);
    assert_waits(&disk.extent_at(0..4096, Wait::No), false);
    assert_waits(&disk.lend_at(0..4096, Wait::No, &mut copy), false);
    let found = disk.read_at(&mut buf, 0, Wait::Yes).unwrap();
    assert_eq!((found.range, found.kind), (0..4096, ExtentKind::Data));
    assert!(buf == want[..4096]);
    // It is known: only the data is waited for, by the layer that has it.
    assert_waits(&disk.read_at(&mut buf, 4096, Wait::No), true);
    assert_waits(&disk.extent_at(4096..8192, Wait::No), true);
    assert_waits(&disk.lend_at(4096..8192, Wait::No, &mut copy), true);
    for (at, end, kind) in [
        (64 << 10, 128 << 10, ExtentKind::Zero),
        (128 << 10, 1 << 20, ExtentKind::Hole),
        (2 << 20, 3 << 20, ExtentKind::Hole),
    ] {
        assert_eq!(disk.read_at(&mut buf, at, Wait::No).unwrap().kind, kind);
        let found = disk.extent_at(at..3 << 20, Wait::No).unwrap();
        assert_eq!((found.range, found.kind), (at..end, kind));
    }
    // A compressed cluster is inflated with waiting, and is in the cache then.
    assert_eq!(disk.extent_at(1 << 20..2 << 20, Wait::No).unwrap().kind, ExtentKind::Data);
    assert_waits(&disk.read_at(&mut buf, 1 << 20, Wait::No), false);
    disk.read_at(&mut buf, 1 << 20, Wait::Yes).unwrap();
    assert_eq!(buf, [5; 4096]);
    disk.read_at(&mut buf, (1 << 20) + 8192, Wait::No).unwrap();
    assert!(Arrival::take_expected().is_none());
}

/// Returns the line that refuses the image made by `script`.
fn refusal(images: &Images, script: &str, allowed: &[PathBuf]) -> String {
    images.sh(script);
    match open_bytes(&images.bytes("image.qcow2"), allowed) {
        Ok(_) => panic!("it was opened: {script}"),
        Err(error) => error.to_string(),
    }
}

#[test]
fn what_an_image_on_a_server_names_is_not_followed() {
    let images = Images::new();
    let place = images.0.path().to_owned();
    let here = place.display().to_string();
    images.sh("mkdir allowed");
    let dirs = [place.join("allowed")];
    let one = "make one image of the two with qemu-img convert -O qcow2";
    // No path, with and without directories that are allowed.
    for name in ["source.raw", "../source.raw", "nbd://other/disk", "json:{}"] {
        for allowed in [&[][..], &dirs] {
            let script =
                format!("qemu-img create -q -f qcow2 -u -b '{name}' -F raw image.qcow2 1M");
            let want = format!(
                "'{NAME}' is on a server and names '{name}' as its backing file, which is not followed: {one}"
            );
            assert_eq!(refusal(&images, &script, allowed), want);
        }
    }
    // A path, whether there is a file or not.
    for (name, dir) in [(format!("{here}/source.raw"), &*here), ("/no/file".to_owned(), "/no")] {
        let script = format!("qemu-img create -q -f qcow2 -u -b '{name}' -F raw image.qcow2 1M");
        let want = format!(
            "'{NAME}' is on a server and names '{name}' as its backing file, which is not followed: {one}, \
             or add --allow-backing {dir} if it is a file of this host and you trust the image"
        );
        assert_eq!(refusal(&images, &script, &[]), want);
    }
    // A directory is allowed, but not the one of the file.
    images.sh("ln -s ../source.raw allowed/link");
    for name in ["source.raw", "allowed/../source.raw", "allowed/link"] {
        let script =
            format!("qemu-img create -q -f qcow2 -u -b {here}/{name} -F raw image.qcow2 1M");
        let want = format!(
            "'{NAME}' needs '{here}/source.raw', which is not below a directory that is allowed: \
             add --allow-backing {here} if you trust the image"
        );
        assert_eq!(refusal(&images, &script, &dirs), want);
    }
    let data = "rm -f data; qemu-img create -q -f qcow2 -o data_file=data image.qcow2 1M";
    let want = format!(
        "'{NAME}' is on a server and names 'data' as its data file, which is not followed: {one}"
    );
    assert_eq!(refusal(&images, data, &dirs), want);
}

#[test]
fn a_file_of_this_host_below_an_allowed_directory_is_followed_from_a_server() {
    let images = Images::new();
    let place = images.0.path().to_owned();
    let here = place.display().to_string();
    let allowed = [place.clone()];
    // A chain: the image on the server, a qcow2 image here, and a raw one below it.
    let (image, want) = images.make(&format!(
        "qemu-img create -q -f qcow2 -b source.raw -F raw middle.qcow2
         qemu-io -c 'write -P 3 500K 100K' middle.qcow2
         qemu-img create -q -f qcow2 -b {here}/middle.qcow2 -F qcow2 image.qcow2
         qemu-io -c 'write -P 4 550K 100K' image.qcow2"
    ));
    let disk = open_bytes(&image, &allowed).unwrap();
    let names = || disk.needs().iter().map(|(path, _)| path.strip_prefix(&place).unwrap());
    assert_eq!(names().collect::<Vec<_>>(), [Path::new("middle.qcow2"), Path::new("source.raw")]);
    assert!(read_all(&disk) == want);
    // A data file that is allowed.
    let (image, want) = images.make(&format!(
        "rm image.qcow2; qemu-img create -q -f qcow2 -o data_file={here}/data image.qcow2 1M
         qemu-io -c 'write -P 6 500K 100K' image.qcow2"
    ));
    let disk = open_bytes(&image, &allowed).unwrap();
    assert_eq!(disk.needs().len(), 1);
    assert!(read_all(&disk) == want);
}
