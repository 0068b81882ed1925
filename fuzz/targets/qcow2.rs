//! qcow2 images: header, tables and compressed clusters; opened, mapped and read.
#![no_main]

use std::path::Path;
use std::sync::LazyLock;

use cowslip::base::{self, BaseAccess, BaseOptions, qcow2};
use cowslip::config::{DirectIo, DiskSource, Format, Locking, Passthrough, SourcePart};
use cowslip_fuzz::{Lab, walk};
use libfuzzer_sys::fuzz_target;

static LAB: LazyLock<Lab> = LazyLock::new(|| Lab::new("i"));

fn open(path: &Path, part: SourcePart) {
    let how = BaseOptions {
        format: Some(Format::Qcow2),
        part,
        access: BaseAccess::Read,
        locking: Locking::Off,
        passthrough: Passthrough::Off,
        direct: DirectIo::Off,
        allow_backing: &[],
    };
    let Ok(base) = base::open(&DiskSource::File(path.to_owned()), how) else { return };
    // Only the image exists, and it cannot be its own backing file.
    assert!(base.needs.is_empty(), "it was let to open {:?}", base.needs);
    walk(&*base.layer.reader());
}

fuzz_target!(|bytes: &[u8]| {
    let path = LAB.put(bytes);
    open(path, SourcePart::Whole);
    open(path, SourcePart::Partition(1));
    if let Ok(top) = qcow2::open_top(path, &[]) {
        assert!(top.backing.is_none());
    }
});
