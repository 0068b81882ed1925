//! Streams received by `recv`: records, checkpoints and the resulting file.
#![no_main]

use std::sync::LazyLock;

use cowslip::config::Overwrite;
use cowslip::transfer::{ReceivePlan, ReceiveStart, TransferFormat, receive, resume_offset};
use cowslip_fuzz::Lab;
use libfuzzer_sys::fuzz_target;

static LAB: LazyLock<Lab> = LazyLock::new(|| Lab::new("old.img"));

fuzz_target!(|bytes: &[u8]| {
    let onto = LAB.put(&[7; 9000]).to_owned();
    let path = LAB.dir().join("new.img");
    let mut plan = ReceivePlan {
        path: path.clone(),
        overwrite: Overwrite::Yes,
        start: ReceiveStart::New,
        frames: TransferFormat::Rbd,
        onto: None,
        limit: 1 << 30,
    };
    // The whole stream; then its first half, followed by the whole stream as a resumption; then the
    // stream as changes to another file.
    let _ = receive(bytes, &plan, &mut |_| ());
    let _ = receive(&bytes[..bytes.len() / 2], &plan, &mut |_| ());
    let _ = resume_offset(&path);
    plan.start = ReceiveStart::Resume;
    let _ = receive(bytes, &plan, &mut |_| ());
    plan.start = ReceiveStart::New;
    plan.onto = Some(onto);
    let _ = receive(bytes, &plan, &mut |_| ());
    for name in ["new.img", "new.img.part", "new.img.part.state", "new.img.part.state.new"] {
        let _ = std::fs::remove_file(LAB.dir().join(name));
    }
    let left = std::fs::read_dir(LAB.dir()).unwrap().count();
    assert_eq!(left, 1, "files are left behind");
});
