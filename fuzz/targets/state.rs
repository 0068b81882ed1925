//! The state beside a part that is to be resumed, and what `recv --resume` makes of it.
#![no_main]

use std::os::unix::fs::MetadataExt;
use std::sync::LazyLock;

use cowslip::config::Overwrite;
use cowslip::transfer::{ReceivePlan, ReceiveStart, TransferFormat, receive, resume_offset};
use cowslip_fuzz::Lab;
use libfuzzer_sys::fuzz_target;

static LAB: LazyLock<Lab> = LazyLock::new(|| Lab::new("x.part"));

/// What stands for the part's inode, which no mutation would find.
const INODE: &[u8] = b"INODE";
/// The part's length.
const LEN: usize = 5000;

fuzz_target!(|bytes: &[u8]| {
    let part = LAB.put(&[7; LEN]);
    let inode = std::fs::metadata(part).unwrap().ino().to_string().into_bytes();
    let mut text = bytes.to_vec();
    if let Some(at) = bytes.windows(INODE.len()).position(|window| window == INODE) {
        text.splice(at..at + INODE.len(), inode);
    }
    let state = LAB.dir().join("x.part.state");
    std::fs::write(&state, text).unwrap();
    let path = LAB.dir().join("x");
    // Nothing is promised beyond what is there.
    let offset = resume_offset(&path).unwrap();
    assert!(offset <= LEN as u64, "{offset}");
    let plan = ReceivePlan {
        path,
        overwrite: Overwrite::No,
        start: ReceiveStart::Resume,
        frames: TransferFormat::Rbd,
        onto: None,
        limit: 1 << 20,
    };
    assert!(receive(&b"rbd diff v2\n"[..], &plan, &mut |_| ()).is_err());
    let _ = std::fs::remove_file(state);
});
