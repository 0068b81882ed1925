//! What QEMU's programs say of an image.

use crate::common::mount::Lab;

/// The zero ranges and the data ranges of an image, as qemu-img sees them: start, length, is zero.
pub(crate) fn runs(lab: &Lab, of: &str) -> Vec<(u64, u64, bool)> {
    let json = lab.sh(&format!("qemu-img map --output=json {of}"));
    let map: serde_json::Value = serde_json::from_str(&json).unwrap();
    let mut runs: Vec<(u64, u64, bool)> = Vec::new();
    for run in map.as_array().unwrap() {
        let number = |key: &str| run[key].as_u64().unwrap();
        let (start, len) = (number("start"), number("length"));
        let is_zero = run["zero"].as_bool().unwrap();
        match runs.last_mut() {
            Some(last) if last.2 == is_zero => last.1 += len,
            _ => runs.push((start, len, is_zero)),
        }
    }
    runs
}

/// Checks that the disk `name` has the bytes and the holes that QEMU finds in the image.
#[track_caller]
pub(crate) fn assert_same_as_qemu(lab: &Lab, name: &str, format: &str, image: &str) {
    lab.sh(&format!("qemu-img compare -f raw -F {format} m/{name} {image}"));
    assert_eq!(runs(lab, &format!("-f raw m/{name}")), runs(lab, &format!("-f {format} {image}")));
}
