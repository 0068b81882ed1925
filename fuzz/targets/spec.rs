//! Arguments of the command line: disks, sizes, ranges and mount options.
#![no_main]

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use cowslip::config;
use libfuzzer_sys::fuzz_target;

/// Checks that every error is a single line.
fn check<T>(read: Result<T, config::SpecError>) -> Option<T> {
    read.inspect_err(|error| {
        let line = error.to_string();
        assert!(!line.is_empty() && !line.chars().any(char::is_control), "{line:?}");
    })
    .ok()
}

fuzz_target!(|bytes: &[u8]| {
    for exists in [true, false] {
        let disk = config::parse_disk(OsStr::from_bytes(bytes), Path::new("/srv"), &|_| exists);
        if let Some(disk) = check(disk) {
            assert!(!disk.name.is_empty() && disk.name.len() <= 255 && !disk.name.contains('/'));
            let _ = check(config::check_names(&[disk.clone(), disk]));
        }
    }
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let _ = check(config::parse_mount_options([text]));
    if let Some(range) = check(config::parse_range(text)) {
        assert!(range.start <= range.end);
    }
    if let Some(size) = check(config::parse_size(text)) {
        assert!(size <= config::MAX_SIZE);
        let _ = config::format_size(size);
    }
});
