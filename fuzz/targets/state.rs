//! The state file beside a part, and how `recv --resume` uses it.
#![no_main]

use std::os::unix::fs::MetadataExt;
use std::sync::LazyLock;

use cowslip::config::Overwrite;
use cowslip::transfer::{ReceivePlan, ReceiveStart, TransferFormat, receive, resume_offset};
use cowslip_fuzz::Lab;
use libfuzzer_sys::fuzz_target;

static LAB: LazyLock<Lab> = LazyLock::new(|| Lab::new("x.part"));

/// Placeholder for the part's inode number, which a mutation would never guess.
const INODE: &[u8] = b"INODE";
/// Length of the part in bytes.
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
    // The state never promises more bytes than there are.
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
