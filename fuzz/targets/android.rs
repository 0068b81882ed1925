//! Android sparse images: the decoder, with and without checksums.
#![no_main]

use std::io::Read;

use cowslip::formats::android::{AndroidDecoder, AndroidRecord, Checksums};
use libfuzzer_sys::fuzz_target;

/// Maximum number of records decoded. The header may announce four thousand million records that
/// need no input.
const RECORDS: usize = 1 << 16;

fuzz_target!(|bytes: &[u8]| {
    for checksums in [Checksums::Skip, Checksums::Verify] {
        let Ok(mut decoder) = AndroidDecoder::new(bytes, checksums) else { return };
        let (mut size, mut at) = (0, 0);
        for _ in 0..RECORDS {
            match decoder.next_record() {
                Err(_) => break,
                Ok(AndroidRecord::Size(told)) => size = told,
                Ok(AndroidRecord::Data(range)) => {
                    assert!(range.start == at && range.end <= size);
                    at = range.end;
                    // Reads all, half or none of the body.
                    let wanted = (range.end - range.start) / 2 * (range.start / 512 % 3);
                    let _ = std::io::copy(&mut decoder.body().take(wanted), &mut std::io::sink());
                }
                Ok(AndroidRecord::Fill(range, _) | AndroidRecord::DontCare(range)) => {
                    assert!(range.start == at && range.start < range.end && range.end <= size);
                    at = range.end;
                }
                Ok(AndroidRecord::End) => {
                    assert_eq!(at, size);
                    break;
                }
            }
        }
    }
});
