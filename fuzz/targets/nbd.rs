//! What NBD servers send: the handshake, and replies.
#![no_main]

use cowslip::remote::fuzzing::take_bytes_of_a_server;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| take_bytes_of_a_server(bytes));
