//! Bmaps: the parser.
#![no_main]

use cowslip::formats::bmap::Bmap;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    match Bmap::parse(bytes) {
        Ok(map) => map.assert_sound(),
        Err(error) => assert!(!error.to_string().contains('\n')),
    }
});
