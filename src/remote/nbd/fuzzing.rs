//! The entry of the fuzz target `nbd`: what a server sends, in the handshake and after it.

use std::collections::HashMap;
use std::ops::Range;

use super::codec::Headers;
use super::codec::handshake::{Handshake, Progress, Tls};
use super::codec::replies::{Answer, Expected, Replies};

/// The ranges of the reads and the extents that wait for answers, by cookie.
const READS: [Range<u64>; 3] = [0..1, 4096..8192, (1 << 40)..(1 << 40) + 300_000];
const EXTENTS: [Range<u64>; 2] = [5..6, 0..1 << 42];

/// Feeds `bytes` to the client as what a server sends. The first byte chooses: bit 0, after the
/// handshake or during it; bits 1 and 2, the form of messages, or TLS. The second byte is the number
/// of bytes that come at a time, less one.
///
/// # Panics
/// When an answer breaks what its documentation says.
#[doc(hidden)]
pub fn take_bytes_of_a_server(bytes: &[u8]) {
    let [choice, step, rest @ ..] = bytes else { return };
    let pieces = rest.chunks(usize::from(*step) + 1);
    match choice & 1 {
        0 => take_handshake(choice >> 1, pieces),
        _ => take_replies(choice >> 1, pieces),
    }
}

fn take_handshake<'a>(choice: u8, pieces: impl Iterator<Item = &'a [u8]>) {
    let tls = if choice & 1 == 0 { Tls::No } else { Tls::Required };
    let mut handshake = Handshake::new("vm", tls);
    for piece in pieces {
        match handshake.feed(piece) {
            Ok(Progress::MoreInput) => {}
            Ok(Progress::StartTls) => {
                assert_eq!(tls, Tls::Required);
                handshake.start_options();
            }
            Ok(Progress::Done(export)) => {
                let limits = export.limits();
                assert!(i64::try_from(export.size).is_ok());
                assert!(limits.alignment.is_power_of_two() && limits.alignment <= 1 << 16);
                assert!(limits.max_len >= limits.alignment && limits.max_len <= 4 << 20);
                assert_eq!(limits.max_len % limits.alignment, 0);
                assert!(export.allocation.is_none() || export.headers != Headers::Simple);
                return;
            }
            Err(error) => {
                let line = error.to_string();
                assert!(!line.contains('\n') && line.len() < 20_000);
                return;
            }
        }
        assert!(handshake.take_output().len() < 4096);
    }
    let _ = handshake.end_of_input().to_string();
}

fn take_replies<'a>(choice: u8, pieces: impl Iterator<Item = &'a [u8]>) {
    let headers = [Headers::Simple, Headers::Structured, Headers::Extended];
    let headers = headers.get(usize::from(choice % 3)).copied().unwrap_or(Headers::Simple);
    let mut replies = Replies::new(headers, Some(0));
    let mut waiting = HashMap::new();
    let expected = READS.map(Expected::Bytes).into_iter();
    let expected = expected.chain(EXTENTS.map(Expected::Extents));
    for (cookie, expected) in (0..).zip(expected.chain([Expected::Done, Expected::Done])) {
        replies.expect(cookie, expected.clone());
        waiting.insert(cookie, expected);
    }
    let mut events = Vec::new();
    for piece in pieces {
        let fed = replies.feed(piece, &mut events);
        for event in events.drain(..) {
            // Each request is answered once.
            match (waiting.remove(&event.cookie), event.result) {
                (None, _) => panic!("an answer to no request"),
                (Some(_), Err(failure)) => {
                    assert!(failure.errno > 0 && !failure.text.contains('\n'));
                }
                (Some(Expected::Bytes(range)), Ok(Answer::Bytes(bytes))) => {
                    assert_eq!(bytes.len() as u64, range.end - range.start);
                }
                (Some(Expected::Extents(range)), Ok(Answer::Extents(extents))) => {
                    let mut at = range.start;
                    for extent in &extents {
                        assert!(extent.range.start == at && !extent.is_empty());
                        at = extent.range.end;
                    }
                    assert!(at > range.start && at <= range.end);
                }
                (Some(Expected::Done), Ok(Answer::Done)) => {}
                (Some(expected), Ok(_)) => panic!("an answer of another kind than {expected:?}"),
            }
        }
        if fed.is_err() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn any_bytes_of_a_server_are_taken(
            choice in 0u8..8, step: u8, number in 0usize..5,
            rest in prop::collection::vec(prop_oneof![Just(0), 0u8..9, any::<u8>()], 0..300),
        ) {
            let begin: &[u8] = match number {
                0 => b"",
                1 => b"NBDMAGICIHAVEOPT\0\x03\0\x03\xe8\x89\x04\x55\x65\xa9",
                2 => b"\x67\x44\x66\x98",
                3 => b"\x66\x8e\x33\xef\0\x01\0\x05\0\0\0\0\0\0\0\x04\0\0\0\x14",
                _ => b"\x6e\x8a\x27\x8c\0\x01\0\x06\0\0\0\0\0\0\0\x04",
            };
            take_bytes_of_a_server(&[&[choice, step], begin, &rest].concat());
        }
    }

    #[test]
    fn sound_messages_are_taken() {
        take_bytes_of_a_server(b"");
        let handshake =
            b"NBDMAGICIHAVEOPT\0\x03\0\x03\xe8\x89\x04\x55\x65\xa9\0\0\0\x08\0\0\0\x01\0\0\0\0";
        take_bytes_of_a_server(&[b"\0\x07", &handshake[..]].concat());
        let reply = b"\x67\x44\x66\x98\0\0\0\0\0\0\0\0\0\0\0\0!";
        take_bytes_of_a_server(&[b"\x01\0", &reply[..]].concat());
    }
}
