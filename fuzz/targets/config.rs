//! The configuration file, in TOML.
#![no_main]

use std::path::Path;

use cowslip::config;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    if let Err(error) = config::parse_config(text, Path::new("/srv")) {
        let line = error.to_string();
        assert!(!line.is_empty() && !line.chars().any(char::is_control), "{line:?}");
    }
});
