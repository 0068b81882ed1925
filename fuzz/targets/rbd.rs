//! The records of streams: rbd diff v2, as sinks write them and `recv` reads them.
#![no_main]

use std::io::Read;

use cowslip::formats::rbd::{RbdDecoder, RbdRecord};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let Ok(mut decoder) = RbdDecoder::new(bytes) else { return };
    loop {
        match decoder.next_record() {
            Err(_) | Ok(RbdRecord::End) => break,
            Ok(RbdRecord::Size(_) | RbdRecord::Since(_)) => {}
            Ok(RbdRecord::Zeros(range)) => assert!(range.start <= range.end),
            Ok(RbdRecord::Data(range)) => {
                assert!(range.start <= range.end);
                let mut body = decoder.input().take(range.end - range.start);
                let _ = std::io::copy(&mut body, &mut std::io::sink());
            }
        }
    }
});
