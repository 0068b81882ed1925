//! The `stack` file, which defines a disk, its layers and its snapshots.
#![no_main]

use std::fs::File;
use std::sync::LazyLock;

use cowslip::trusted_path::open_dir;
use cowslip::overlay::reflink;
use cowslip::overlay::stack::Stack;
use cowslip_fuzz::Lab;
use libfuzzer_sys::fuzz_target;

static LAB: LazyLock<(Lab, File)> = LazyLock::new(|| {
    let lab = Lab::new("stack");
    let dir = open_dir(lab.dir()).unwrap();
    (lab, dir)
});

fuzz_target!(|bytes: &[u8]| {
    let (lab, dir) = &*LAB;
    // The input itself, and the input after a valid checksum, which a mutation would never produce.
    lab.put(bytes);
    let _ = Stack::read(dir);
    let mut sealed = format!("checksum = \"crc32c:{:08x}\"\n", crc32c::crc32c(bytes)).into_bytes();
    sealed.extend_from_slice(bytes);
    lab.put(&sealed);
    let _ = reflink::overlay_kind(lab.dir());
    let Ok(stack) = Stack::read(dir) else { return };
    let mut tree = stack.tree();
    for layer in &stack.layers {
        let _ = tree.chain(layer.uuid);
    }
    let _ = (tree.top_chain(), tree.mergeable(|_| false), stack.base.part());
    tree.prune();
    // A stack that was read can be written and read again.
    let place = tempfile::tempdir_in(lab.dir()).unwrap();
    let place = open_dir(place.path()).unwrap();
    if stack.write(&place).is_ok() {
        assert_eq!(Stack::read(&place).unwrap(), stack);
    }
});
