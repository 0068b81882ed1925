//! Replies of a mount, as the commands read and print them: three texts separated by zero bytes.
#![no_main]

use cowslip::cli::fuzzing::render_answers;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let mut texts = bytes.splitn(3, |byte| *byte == 0);
    let mut next = || texts.next().unwrap_or_default();
    let (answer, status, map) = (next(), next(), next());
    let _ = render_answers(answer, status, map);
});
