use proptest::prelude::*;

use super::*;
use crate::extents::{Extent, ExtentKind};
use crate::remote::nbd::codec::wire::EXTENDED_REPLY_MAGIC;

/// Encodes a chunk with the headers of `headers`.
fn chunk(headers: Headers, kind: u16, is_last: bool, cookie: u64, payload: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    let is_extended = headers == Headers::Extended;
    let magic = if is_extended { EXTENDED_REPLY_MAGIC } else { STRUCTURED_REPLY_MAGIC };
    bytes.extend(magic.to_be_bytes());
    bytes.extend(u16::from(is_last).to_be_bytes());
    bytes.extend(kind.to_be_bytes());
    bytes.extend(cookie.to_be_bytes());
    match is_extended {
        true => {
            bytes.extend(0_u64.to_be_bytes());
            bytes.extend((payload.len() as u64).to_be_bytes());
        }
        false => bytes.extend(u32::try_from(payload.len()).unwrap().to_be_bytes()),
    }
    bytes.extend(payload);
    bytes
}

fn simple(error: u32, cookie: u64, payload: &[u8]) -> Vec<u8> {
    let mut bytes = SIMPLE_REPLY_MAGIC.to_be_bytes().to_vec();
    bytes.extend(error.to_be_bytes());
    bytes.extend(cookie.to_be_bytes());
    bytes.extend(payload);
    bytes
}

fn data(offset: u64, bytes: &[u8]) -> Vec<u8> {
    [&offset.to_be_bytes(), bytes].concat()
}

fn hole(offset: u64, len: u32) -> Vec<u8> {
    [&offset.to_be_bytes()[..], &len.to_be_bytes()].concat()
}

fn error(value: u32, text: &str) -> Vec<u8> {
    let len = u16::try_from(text.len()).unwrap();
    [&value.to_be_bytes()[..], &len.to_be_bytes(), text.as_bytes()].concat()
}

fn status(context: u32, descriptors: &[(u32, u32)]) -> Vec<u8> {
    let mut bytes = context.to_be_bytes().to_vec();
    for (len, flags) in descriptors {
        bytes.extend(len.to_be_bytes());
        bytes.extend(flags.to_be_bytes());
    }
    bytes
}

fn status_ext(context: u32, count: u32, descriptors: &[(u64, u64)]) -> Vec<u8> {
    let mut bytes = [context.to_be_bytes(), count.to_be_bytes()].concat();
    for (len, flags) in descriptors {
        bytes.extend(len.to_be_bytes());
        bytes.extend(flags.to_be_bytes());
    }
    bytes
}

/// Feeds `messages` in pieces of at most `step` bytes to a connection that waits for a read of
/// 100..116 (cookie 1), extents of 1000..2000 (cookie 2) and a change (cookie 3).
fn replies_to(
    headers: Headers,
    step: usize,
    messages: &[Vec<u8>],
) -> Result<Vec<Event>, ReplyError> {
    let mut replies = Replies::new(headers, Some(7));
    replies.expect(1, Expected::Bytes(100..116));
    replies.expect(2, Expected::Extents(1000..2000));
    replies.expect(3, Expected::Done);
    let mut events = Vec::new();
    for piece in messages.concat().chunks(step) {
        replies.feed(piece, &mut events)?;
    }
    Ok(events)
}

fn structured(messages: &[Vec<u8>]) -> Result<Vec<Event>, ReplyError> {
    let whole = replies_to(Headers::Structured, usize::MAX, messages);
    assert_eq!(replies_to(Headers::Structured, 1, messages), whole);
    whole
}

fn last(kind: u16, cookie: u64, payload: &[u8]) -> Vec<u8> {
    chunk(Headers::Structured, kind, true, cookie, payload)
}

fn more(kind: u16, cookie: u64, payload: &[u8]) -> Vec<u8> {
    chunk(Headers::Structured, kind, false, cookie, payload)
}

fn failure(events: &[Event]) -> (i32, &str) {
    let [Event { result: Err(failure), .. }] = events else { panic!("{events:?}") };
    (failure.errno, &failure.text)
}

#[test]
fn a_reply_of_errors_or_of_other_contexts_alone_has_an_end() {
    let barren = [
        more(0x8002, 1, &[&error(5, "")[..], &[0; 8]].concat()),
        more(5, 2, &status(8, &[(1000, 0)])),
    ];
    for (message, cookie) in barren.into_iter().zip([1, 2]) {
        let many = vec![message.clone(); 4096];
        let end = last(0, cookie, b"");
        assert_eq!(structured(&[many.concat(), end]).unwrap().len(), 1);
        assert_eq!(structured(&[many.concat(), message]), Err(ReplyError::TooManyBarren));
    }
}

#[test]
fn simple_replies_bring_bytes_errors_and_success() {
    let bytes: Vec<u8> = (1..=16).collect();
    let messages = [simple(0, 3, b""), simple(0, 1, &bytes), simple(28, 2, b"")];
    for step in [1, 3, 17, 100] {
        let events = replies_to(Headers::Simple, step, &messages).unwrap();
        assert_eq!(events[0], Event { cookie: 3, result: Ok(Answer::Done) });
        assert_eq!(events[1], Event { cookie: 1, result: Ok(Answer::Bytes(bytes.clone())) });
        assert_eq!(events[2].result.as_ref().unwrap_err().errno, libc::ENOSPC);
    }
    let failed = replies_to(Headers::Simple, 9, &[simple(5, 1, b""), simple(0, 3, b"")]).unwrap();
    assert_eq!(failed.len(), 2);
}

#[test]
fn pieces_come_in_any_order_and_holes_are_zeros() {
    let events = structured(&[
        more(1, 1, &data(112, b"last")),
        last(0, 3, b""),
        more(2, 1, &hole(104, 8)),
        last(1, 1, &data(100, b"head")),
    ]);
    let bytes = b"head\0\0\0\0\0\0\0\0last".to_vec();
    let read = Event { cookie: 1, result: Ok(Answer::Bytes(bytes)) };
    assert_eq!(events.unwrap(), [Event { cookie: 3, result: Ok(Answer::Done) }, read]);
}

#[test]
fn a_byte_that_comes_twice_or_from_elsewhere_ends_the_connection() {
    let whole = || more(1, 1, &data(100, &[7; 16]));
    assert_eq!(structured(&[whole(), last(2, 1, &hole(115, 1))]), Err(ReplyError::Overlap));
    assert_eq!(structured(&[last(1, 1, &data(99, b"ab"))]), Err(ReplyError::Outside));
    assert_eq!(structured(&[last(1, 1, &data(115, b"ab"))]), Err(ReplyError::Outside));
    assert_eq!(structured(&[last(2, 1, &hole(100, 17))]), Err(ReplyError::Outside));
    assert_eq!(structured(&[last(2, 1, &hole(u64::MAX, 2))]), Err(ReplyError::Outside));
}

#[test]
fn a_read_that_lacks_a_byte_fails_alone() {
    let events = structured(&[last(1, 1, &data(100, &[1; 15])), last(0, 3, b"")]).unwrap();
    assert_eq!(failure(&events[..1]), (libc::EIO, "the server left out bytes of a read"));
    assert!(events[1].result.is_ok());
    let none = structured(&[last(0, 1, b"")]).unwrap();
    assert_eq!(failure(&none).0, libc::EIO);
}

#[test]
fn an_error_after_data_fails_the_read() {
    let whole = || more(1, 1, &data(100, &[7; 16]));
    let events = structured(&[whole(), last(0x8001, 1, &error(5, "disk\x1b[2J"))]).unwrap();
    assert_eq!(failure(&events), (libc::EIO, "disk\\u{1b}[2J"));
    let with_offset = [error(12, ""), 3_u64.to_be_bytes().to_vec()].concat();
    let events = structured(&[more(0x8002, 1, &with_offset), whole(), last(0, 1, b"")]).unwrap();
    assert_eq!(failure(&events), (libc::ENOMEM, ""));
    // An error of a type that is not known yet, with a value that is none.
    let events = structured(&[last(0xffff, 3, &error(0xdead, "x"))]).unwrap();
    assert_eq!(failure(&events), (libc::EINVAL, "x"));
}

#[test]
fn block_status_longer_or_shorter_than_asked_is_cut() {
    let extents = |descriptors: &[(u32, u32)]| {
        let events = structured(&[last(5, 2, &status(7, descriptors))]).unwrap();
        match &events[..] {
            [Event { cookie: 2, result: Ok(Answer::Extents(extents)) }] => extents.clone(),
            other => panic!("{other:?}"),
        }
    };
    let hole = |range| Extent::new(range, ExtentKind::Hole);
    let data = |range| Extent::new(range, ExtentKind::Data);
    assert_eq!(extents(&[(100, 3), (50, 1)]), [hole(1000..1100), data(1100..1150)]);
    assert_eq!(extents(&[(u32::MAX, 3), (u32::MAX, 0)]), [hole(1000..2000)]);
    assert_eq!(extents(&[(600, 3), (600, 1), (9, 2)]), [hole(1000..1600), data(1600..2000)]);
}

#[test]
fn block_status_that_makes_no_sense_ends_the_connection() {
    assert_eq!(structured(&[last(5, 2, &status(7, &[(0, 0)]))]), Err(ReplyError::Length));
    assert_eq!(structured(&[last(5, 2, &status(7, &[]))]), Err(ReplyError::Length));
    assert_eq!(structured(&[last(5, 1, &status(7, &[(1, 0)]))]), Err(ReplyError::Type));
    let twice = [more(5, 2, &status(7, &[(1, 0)])), last(5, 2, &status(7, &[(1, 0)]))];
    assert_eq!(structured(&twice), Err(ReplyError::Type));
    let mut header = last(5, 2, &[]);
    header.truncate(16);
    header.extend((4 + ((1_u32 << 20) + 1) * 8).to_be_bytes());
    assert_eq!(structured(&[header]), Err(ReplyError::TooManyExtents));
}

#[test]
fn block_status_of_another_context_is_no_answer() {
    let events = structured(&[last(5, 2, &status(8, &[(9, 3)]))]).unwrap();
    assert_eq!(failure(&events), (libc::EIO, "the server left out the extents of a range"));
    let both = [more(5, 2, &status(8, &[(9, 3)])), last(5, 2, &status(7, &[(9, 3)]))];
    assert!(structured(&both).unwrap()[0].result.is_ok());
}

#[test]
fn extended_block_status_has_64_bits_and_an_exact_count() {
    let extended = |payload: &[u8]| {
        replies_to(Headers::Extended, 5, &[chunk(Headers::Extended, 6, true, 2, payload)])
    };
    let events = extended(&status_ext(7, 1, &[(1 << 40, 3)])).unwrap();
    let hole = Extent::new(1000..2000, ExtentKind::Hole);
    assert_eq!(events, [Event { cookie: 2, result: Ok(Answer::Extents(vec![hole])) }]);
    assert_eq!(extended(&status_ext(7, 2, &[(1, 3)])), Err(ReplyError::Length));
    let compact = last(6, 2, &status_ext(7, 1, &[(1, 3)]));
    assert_eq!(structured(&[compact]), Err(ReplyError::Type));
}

#[test]
fn replies_of_the_wrong_form_end_the_connection() {
    assert_eq!(structured(&[b"HTTP/1.1".to_vec()]), Err(ReplyError::Magic));
    assert_eq!(structured(&[last(0, 9, b"")]), Err(ReplyError::UnknownCookie));
    assert_eq!(structured(&[last(0, 3, b""), last(0, 3, b"")]), Err(ReplyError::UnknownCookie));
    assert_eq!(structured(&[simple(0, 1, &[0; 16])]), Err(ReplyError::Type));
    assert_eq!(structured(&[more(0, 3, b"")]), Err(ReplyError::Length));
    assert_eq!(structured(&[last(0, 3, b"x")]), Err(ReplyError::Length));
    assert_eq!(structured(&[last(77, 3, b"")]), Err(ReplyError::Type));
    assert_eq!(structured(&[last(1, 1, &data(100, b""))]), Err(ReplyError::Length));
    assert_eq!(structured(&[last(2, 1, &hole(100, 0))]), Err(ReplyError::Length));
    assert_eq!(structured(&[last(1, 3, &data(100, b"a"))]), Err(ReplyError::Type));
    assert_eq!(structured(&[last(0x8001, 3, b"short")]), Err(ReplyError::Length));
    let too_long = [&error(5, "")[..4], &[0, 9], b"text"].concat();
    assert_eq!(structured(&[last(0x8001, 3, &too_long)]), Err(ReplyError::Length));
    let with = |headers, message: Vec<u8>| replies_to(headers, 7, &[message]);
    assert_eq!(with(Headers::Simple, last(0, 3, b"")), Err(ReplyError::Magic));
    assert_eq!(with(Headers::Extended, simple(0, 3, b"")), Err(ReplyError::Magic));
    assert_eq!(with(Headers::Extended, last(0, 3, b"")), Err(ReplyError::Magic));
}

#[test]
fn bytes_put_into_the_buffer_of_a_read_count_as_fed() {
    let mut replies = Replies::new(Headers::Structured, None);
    replies.expect(5, Expected::Bytes(10..14));
    let mut events = Vec::new();
    let message = last(1, 5, &data(10, b"abcd"));
    let (header, payload) = message.split_at(message.len() - 4);
    assert!(replies.direct().is_empty());
    replies.feed(header, &mut events).unwrap();
    for byte in payload.chunks(1) {
        replies.direct()[..1].copy_from_slice(byte);
        replies.advance(1, &mut events).unwrap();
    }
    assert!(replies.direct().is_empty());
    assert_eq!(events, [Event { cookie: 5, result: Ok(Answer::Bytes(b"abcd".to_vec())) }]);
}

/// A server's way to answer one read: cuts, the order of the pieces, which of them are holes.
#[derive(Clone, Debug)]
struct Plan {
    start: u64,
    pieces: Vec<(Vec<u8>, bool)>,
    order: Vec<usize>,
}

fn plans() -> impl Strategy<Value = Plan> {
    let piece = prop::bool::ANY.prop_flat_map(|is_hole| match is_hole {
        true => (1usize..40).prop_map(|len| (vec![0; len], true)).boxed(),
        false => (prop::collection::vec(any::<u8>(), 1..40), Just(false)).boxed(),
    });
    (0u64..1 << 50, prop::collection::vec(piece, 1..12)).prop_flat_map(|(start, pieces)| {
        let order: Vec<usize> = (0..pieces.len()).collect();
        Just(order).prop_shuffle().prop_map(move |order| Plan {
            start,
            pieces: pieces.clone(),
            order,
        })
    })
}

/// The chunks of a read, in the order of the plan, and the bytes that they make.
fn chunks_of(plan: &Plan, headers: Headers, cookie: u64) -> (Vec<Vec<u8>>, Vec<u8>) {
    let mut offsets = Vec::new();
    let mut whole = Vec::new();
    for (bytes, _) in &plan.pieces {
        offsets.push(plan.start + whole.len() as u64);
        whole.extend(bytes);
    }
    let number = plan.order.len();
    let chunks = plan.order.iter().enumerate().map(|(sent, piece)| {
        let (bytes, is_hole) = &plan.pieces[*piece];
        let (kind, payload) = match is_hole {
            true => (2, hole(offsets[*piece], u32::try_from(bytes.len()).unwrap())),
            false => (1, data(offsets[*piece], bytes)),
        };
        chunk(headers, kind, sent + 1 == number, cookie, &payload)
    });
    (chunks.collect(), whole)
}

proptest! {
    #[test]
    fn interleaved_reads_in_pieces_of_any_length_give_their_bytes(
        plans in prop::collection::vec(plans(), 1..6),
        turns in prop::collection::vec(any::<prop::sample::Index>(), 80),
        steps in prop::collection::vec(1usize..70, 1..20),
        is_extended in any::<bool>(),
    ) {
        let headers = if is_extended { Headers::Extended } else { Headers::Structured };
        let mut replies = Replies::new(headers, None);
        let mut waiting = Vec::new();
        let mut expected = HashMap::new();
        for (cookie, plan) in plans.iter().enumerate() {
            let cookie = cookie as u64;
            let (chunks, whole) = chunks_of(plan, headers, cookie);
            replies.expect(cookie, Expected::Bytes(plan.start..plan.start + whole.len() as u64));
            expected.insert(cookie, whole);
            waiting.push(chunks.into_iter());
        }
        let mut stream = Vec::new();
        for turn in turns {
            let turn = turn.index(waiting.len());
            stream.extend(waiting[turn].next().unwrap_or_default());
        }
        stream.extend(waiting.into_iter().flatten().flatten());
        let mut events = Vec::new();
        let mut rest = &stream[..];
        for step in steps.iter().cycle() {
            if rest.is_empty() {
                break;
            }
            let (now, later) = rest.split_at((*step).min(rest.len()));
            replies.feed(now, &mut events).unwrap();
            rest = later;
        }
        prop_assert_eq!(events.len(), expected.len());
        for Event { cookie, result } in events {
            prop_assert_eq!(result, Ok(Answer::Bytes(expected.remove(&cookie).unwrap())));
        }
    }

    #[test]
    fn a_changed_byte_never_gives_more_answers_than_requests(
        plan in plans(), at in any::<prop::sample::Index>(), with in 1u8..=255, step in 1usize..50,
    ) {
        let (chunks, whole) = chunks_of(&plan, Headers::Structured, 1);
        let mut stream = chunks.concat();
        let at = at.index(stream.len());
        stream[at] ^= with;
        let mut replies = Replies::new(Headers::Structured, Some(0));
        replies.expect(1, Expected::Bytes(plan.start..plan.start + whole.len() as u64));
        let mut events = Vec::new();
        for piece in stream.chunks(step) {
            if replies.feed(piece, &mut events).is_err() {
                break;
            }
        }
        prop_assert!(events.len() <= 1);
        if let Some(Event { result: Ok(Answer::Bytes(bytes)), .. }) = events.first() {
            prop_assert_eq!(bytes.len(), whole.len());
        }
    }

    #[test]
    fn a_cut_leaves_the_bytes_before_the_first_gap(plan in plans(), at in any::<prop::sample::Index>()) {
        let (chunks, whole) = chunks_of(&plan, Headers::Structured, 1);
        let stream = chunks.concat();
        let mut replies = Replies::new(Headers::Structured, None);
        replies.expect(1, Expected::Bytes(plan.start..plan.start + whole.len() as u64));
        let mut events = Vec::new();
        replies.feed(&stream[..at.index(stream.len())], &mut events).unwrap();
        prop_assert!(events.is_empty());
        // What came, byte by byte: a hole counts when its chunk is there.
        let mut came = vec![false; whole.len()];
        let mut left = at.index(stream.len());
        for (sent, piece) in plan.order.iter().enumerate() {
            let start: usize = plan.pieces[..*piece].iter().map(|(bytes, _)| bytes.len()).sum();
            let (bytes, is_hole) = &plan.pieces[*piece];
            let taken = left.min(chunks[sent].len());
            left -= taken;
            let len = match is_hole {
                true if taken == chunks[sent].len() => bytes.len(),
                true => 0,
                false => taken.saturating_sub(28),
            };
            came[start..start + len].fill(true);
        }
        let prefix = came.iter().take_while(|came| **came).count();
        let expected = if prefix == 0 { vec![] } else { vec![(1, whole[..prefix].to_vec())] };
        prop_assert_eq!(replies.into_partial(), expected);
    }
}
