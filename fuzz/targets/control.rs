//! Requests to a mount and to a disk, as they arrive through `.cowslip/.../ctl`: parsed, and
//! executed on a disk in memory if they name nothing on the host.
#![no_main]

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize};

use cowslip::catalog::{Catalog, DiskOrigin};
use cowslip::config::{self, CacheMode};
use cowslip::control::{Control, ControlNode, ControlSession, is_valid_request};
use cowslip::disk::{self, OpenContext};
use libfuzzer_sys::fuzz_target;
use serde_json::Value;

/// Operations that are executed; others create or open the files they name, or wait for long.
const HARMLESS: [&str; 11] = [
    "drain",
    "remove",
    "finish",
    "abort",
    "snapshot",
    "snapshots",
    "unsnapshot",
    "revert",
    "reset",
    "prefetch",
    "difference",
];

/// Creates the control of a mount with one blank disk, and returns it with the disk's slot.
fn control() -> (Arc<Control>, u64) {
    let catalog = Arc::new(Catalog::new(Path::new("/mnt"), None));
    let spec = config::parse_disk("d=blank:64K", Path::new("/"), &|_| false).unwrap();
    let disk = Arc::new(disk::open(&spec, &OpenContext::unmounted()).unwrap().disk);
    let slot = catalog.add("d", disk, DiskOrigin::Given).unwrap().slot;
    let control = Control {
        catalog,
        source: "d".to_owned(),
        cache: CacheMode::Auto,
        draining: AtomicBool::new(false),
        device: Default::default(),
        invalidator: Default::default(),
        running_requests: AtomicUsize::new(0),
    };
    (Arc::new(control), slot)
}

fuzz_target!(|bytes: &[u8]| {
    // Several requests to one mount.
    let (control, slot) = control();
    for request in bytes.split(|byte| *byte == b'\n').take(8) {
        let understood = is_valid_request(request);
        let op = serde_json::from_slice(request)
            .ok()
            .and_then(|said: Value| said.get("op").and_then(Value::as_str).map(str::to_owned));
        let is_harmless = op.is_some_and(|op| HARMLESS.contains(&op.as_str()));
        if understood && !is_harmless {
            continue;
        }
        for spot in [ControlNode::DiskCtl(slot), ControlNode::Ctl] {
            let session = Arc::new(ControlSession::default());
            session.submit(&control, spot, request, |job| job()).unwrap();
            let answer = session.read(usize::MAX).unwrap();
            let answer: Value = serde_json::from_slice(&answer).unwrap();
            let is = |key| answer.get(key).is_some();
            assert!(is("ok") != is("error"), "{answer}");
            assert!(session.read(1).unwrap().is_empty());
        }
    }
    for disk in control.catalog.disks() {
        disk.abandon();
    }
});
