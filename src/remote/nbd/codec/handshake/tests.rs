use proptest::prelude::*;

use super::*;
use crate::remote::nbd::codec::wire::REP_ERR_UNSUP;

fn greeting(flags: u16) -> Vec<u8> {
    [&INIT_MAGIC.to_be_bytes()[..], &OPTION_MAGIC.to_be_bytes(), &flags.to_be_bytes()].concat()
}

fn reply(option: u32, kind: u32, data: &[u8]) -> Vec<u8> {
    let len = u32::try_from(data.len()).unwrap();
    let mut bytes = OPTION_REPLY_MAGIC.to_be_bytes().to_vec();
    for field in [option, kind, len] {
        bytes.extend(field.to_be_bytes());
    }
    bytes.extend(data);
    bytes
}

fn info_export(size: u64, flags: u16) -> Vec<u8> {
    let data = [&INFO_EXPORT.to_be_bytes()[..], &size.to_be_bytes(), &flags.to_be_bytes()].concat();
    reply(OPT_GO, REP_INFO, &data)
}

fn info_blocks(min: u32, max: u32) -> Vec<u8> {
    let mut data = INFO_BLOCK_SIZE.to_be_bytes().to_vec();
    for field in [min, 4096, max] {
        data.extend(field.to_be_bytes());
    }
    reply(OPT_GO, REP_INFO, &data)
}

/// The answers of a server that knows everything, for an image of 12,345 bytes.
fn full_answers() -> Vec<Vec<u8>> {
    vec![
        greeting(3),
        reply(OPT_STRUCTURED_REPLY, REP_ACK, b""),
        reply(OPT_EXTENDED_HEADERS, REP_ACK, b""),
        reply(OPT_SET_META_CONTEXT, REP_META_CONTEXT, b"\0\0\0\x2abase:allocation"),
        reply(OPT_SET_META_CONTEXT, REP_ACK, b""),
        info_export(12_345, 0x103),
        info_blocks(512, 1 << 20),
        reply(OPT_GO, REP_INFO, b"\0\x01other"),
        reply(OPT_GO, REP_INFO, b"\0\x63who knows"),
        reply(OPT_GO, REP_ACK, b""),
    ]
}

fn run(handshake: &mut Handshake, answers: &[Vec<u8>]) -> Result<Progress, HandshakeError> {
    handshake.feed(&answers.concat())
}

/// Runs a handshake for `vm` without TLS; also byte by byte, with the same result.
fn plain(answers: &[Vec<u8>]) -> Result<Progress, HandshakeError> {
    let whole = run(&mut Handshake::new("vm", Tls::No), answers);
    let mut single = Handshake::new("vm", Tls::No);
    let bytes = answers.concat();
    let mut last = Ok(Progress::MoreInput);
    for byte in bytes.chunks(1) {
        last = single.feed(byte);
        if last.is_err() {
            break;
        }
    }
    assert_eq!(last, whole);
    whole
}

fn export(answers: &[Vec<u8>]) -> Export {
    match plain(answers).unwrap() {
        Progress::Done(export) => *export,
        other => panic!("{other:?}"),
    }
}

#[test]
fn all_options_go_in_one_message_and_are_answered() {
    let mut handshake = Handshake::new("vm", Tls::No);
    assert_eq!(handshake.feed(&greeting(3)), Ok(Progress::MoreInput));
    let sent = handshake.take_output();
    let mut fields = Fields(&sent);
    assert_eq!(fields.u32(), Some(3));
    let mut options = Vec::new();
    while let Some(magic) = fields.u64() {
        assert_eq!(magic, OPTION_MAGIC);
        let option = fields.u32().unwrap();
        let len = usize::try_from(fields.u32().unwrap()).unwrap();
        options.push((option, fields.bytes(len).unwrap().to_vec()));
    }
    let context = b"\0\0\0\x02vm\0\0\0\x01\0\0\0\x0fbase:allocation".to_vec();
    let go = b"\0\0\0\x02vm\0\x02\0\x01\0\x03".to_vec();
    assert_eq!(options, [(8, vec![]), (11, vec![]), (10, context), (7, go)]);
    assert_eq!(fields.0, b"");
    let found = export(&full_answers());
    assert_eq!(
        (found.size, found.headers, found.allocation),
        (12_345, Headers::Extended, Some(42))
    );
    assert_eq!(found.name.as_deref(), Some("other"));
    assert_eq!((found.limits().alignment, found.limits().max_len), (512, 1 << 20));
    assert!(found.flags.is_read_only() && found.flags.allows_many_connections());
}

#[test]
fn a_server_goes_on_without_what_it_refuses() {
    let unsup = |option| reply(option, REP_ERR_UNSUP, b"no");
    let mut answers = full_answers();
    answers[2] = unsup(OPT_EXTENDED_HEADERS);
    assert_eq!(export(&answers).headers, Headers::Structured);
    answers[3] = unsup(OPT_SET_META_CONTEXT);
    answers.remove(4);
    assert_eq!(export(&answers).allocation, None);
    answers[1] = unsup(OPT_STRUCTURED_REPLY);
    assert_eq!(export(&answers).headers, Headers::Simple);
}

#[test]
fn a_server_without_go_is_asked_by_export_name() {
    let unsup = |option| reply(option, REP_ERR_UNSUP, b"");
    let options = [OPT_STRUCTURED_REPLY, OPT_EXTENDED_HEADERS, OPT_SET_META_CONTEXT, OPT_GO];
    for (flags, zeroes) in [(3, 0), (1, 124)] {
        let mut handshake = Handshake::new("vm", Tls::No);
        let refusals = options.map(unsup).concat();
        let asked = handshake.feed(&[greeting(flags), refusals].concat());
        assert_eq!(asked, Ok(Progress::MoreInput));
        assert!(handshake.take_output().ends_with(b"IHAVEOPT\0\0\0\x01\0\0\0\x02vm"));
        let answer = [&77_u64.to_be_bytes()[..], &[0, 5], &vec![0; zeroes]].concat();
        let Ok(Progress::Done(found)) = handshake.feed(&answer) else { panic!("not done") };
        assert_eq!((found.size, found.headers), (77, Headers::Simple));
        assert!(found.flags.can_flush() && !found.flags.is_read_only());
        assert_eq!(found.limits().alignment, 1);
    }
    let mut handshake = Handshake::new("vm", Tls::No);
    handshake.feed(&greeting(0)).unwrap();
    assert_eq!(handshake.take_output(), b"\0\0\0\0IHAVEOPT\0\0\0\x01\0\0\0\x02vm");
    let name = "vm".to_owned();
    assert_eq!(handshake.end_of_input(), HandshakeError::ExportRefused { name });
}

#[test]
fn errors_say_what_is_wrong_with_the_server() {
    let answers = |last: Vec<u8>| {
        let mut answers = full_answers();
        answers.truncate(5);
        answers.push(last);
        plain(&answers).unwrap_err().to_string()
    };
    let go = |code: u32, text: &str| answers(reply(OPT_GO, REP_ERROR + code, text.as_bytes()));
    assert_eq!(go(6, ""), "the server has no export named 'vm'");
    assert_eq!(go(6, "look\nelsewhere"), "the server has no export named 'vm' (look\\nelsewhere)");
    assert_eq!(go(5, ""), "the server requires TLS: write nbds: in place of nbd:");
    assert_eq!(
        go(2, ""),
        "the server refuses the export (error 0x80000002) (its policy forbids it)"
    );
    assert!(answers(info_blocks(3, 1 << 20)).contains("block sizes make no sense: smallest 3"));
    assert!(go(9, &"x".repeat(9000)).len() < 400);
    assert_eq!(plain(&[b"HTTP/1.1 400".to_vec()]), Err(HandshakeError::NotNbd));
    assert_eq!(plain(&[b"SSH".to_vec()]), Err(HandshakeError::NotNbd));
    let old = [&INIT_MAGIC.to_be_bytes()[..], &OLDSTYLE_MAGIC.to_be_bytes(), &[0; 136]].concat();
    assert_eq!(plain(&[old]), Err(HandshakeError::OldStyle));
}

#[test]
fn sizes_and_messages_that_cannot_be_are_refused() {
    let with = |at: usize, message: Vec<u8>| {
        let mut answers = full_answers();
        answers[at] = message;
        plain(&answers)
    };
    assert_eq!(with(5, info_export(1 << 63, 1)), Err(HandshakeError::TooLarge(1 << 63)));
    assert!(with(5, info_export((1 << 63) - 1, 1)).is_ok());
    let broken = |result| matches!(result, Err(HandshakeError::Protocol(_)));
    assert!(broken(with(5, vec![])), "no size");
    assert!(broken(with(5, reply(OPT_GO, REP_INFO, b"\0\0\0"))));
    assert!(broken(with(1, reply(OPT_GO, REP_ACK, b""))));
    assert!(broken(with(1, reply(OPT_STRUCTURED_REPLY, REP_INFO, b""))));
    assert!(broken(with(3, reply(OPT_SET_META_CONTEXT, REP_META_CONTEXT, b"\0"))));
    let mut long = reply(OPT_GO, REP_INFO, b"");
    long[16..20].copy_from_slice(&u32::MAX.to_be_bytes());
    assert!(broken(with(5, long)));
    let endless = reply(OPT_SET_META_CONTEXT, REP_META_CONTEXT, b"\0\0\0\x01x:y").repeat(300);
    assert!(broken(with(3, endless)));
    let mut answers = full_answers();
    answers.push(vec![0]);
    assert!(broken(run(&mut Handshake::new("vm", Tls::No), &answers)));
}

#[test]
fn tls_begins_before_anything_is_asked() {
    let mut handshake = Handshake::new("vm", Tls::Required);
    handshake.feed(&greeting(3)).unwrap();
    assert_eq!(handshake.take_output(), b"\0\0\0\x03IHAVEOPT\0\0\0\x05\0\0\0\0");
    let ack = reply(OPT_STARTTLS, REP_ACK, b"");
    assert_eq!(handshake.feed(&ack), Ok(Progress::StartTls));
    handshake.start_options();
    let sent = handshake.take_output();
    assert!(sent.starts_with(b"IHAVEOPT\0\0\0\x08"));
    let Ok(Progress::Done(_)) = run(&mut handshake, &full_answers()[1..]) else {
        panic!("not done")
    };
}

#[test]
fn a_server_without_tls_or_with_bytes_before_it_is_refused() {
    let with = |answers: &[Vec<u8>]| run(&mut Handshake::new("vm", Tls::Required), answers);
    let no = with(&[greeting(3), reply(OPT_STARTTLS, REP_ERR_UNSUP, b"")]);
    assert!(matches!(no, Err(HandshakeError::NoTls { .. })));
    assert!(matches!(with(&[greeting(2)]), Err(HandshakeError::NoTls { .. })));
    let injected = [reply(OPT_STARTTLS, REP_ACK, b""), reply(OPT_GO, REP_ACK, b"")];
    let result = with(&[greeting(3), injected.concat()]);
    assert_eq!(result, Err(HandshakeError::BytesBeforeTls));
}

#[test]
fn a_server_that_wants_tls_and_closes_is_told_so() {
    let mut handshake = Handshake::new("vm", Tls::No);
    let answer = reply(OPT_STRUCTURED_REPLY, REP_ERR_TLS_REQD, b"");
    run(&mut handshake, &[greeting(3), answer]).unwrap();
    assert!(matches!(handshake.end_of_input(), HandshakeError::TlsRequired { .. }));
    assert_eq!(Handshake::new("vm", Tls::No).end_of_input(), HandshakeError::Closed);
}

proptest! {
    #[test]
    fn a_handshake_in_pieces_is_that_in_one(steps in prop::collection::vec(1usize..60, 1..30)) {
        let bytes = full_answers().concat();
        let mut handshake = Handshake::new("vm", Tls::No);
        let mut rest = &bytes[..];
        let mut progress = Progress::MoreInput;
        for step in steps.iter().cycle() {
            let (now, later) = rest.split_at((*step).min(rest.len()));
            progress = handshake.feed(now).unwrap();
            rest = later;
            if rest.is_empty() {
                break;
            }
        }
        prop_assert!(matches!(progress, Progress::Done(_)));
    }

    #[test]
    fn a_changed_byte_never_gives_an_export_beyond_the_rules(
        at in any::<prop::sample::Index>(), with in 1u8..=255,
    ) {
        let mut bytes = full_answers().concat();
        let at = at.index(bytes.len());
        bytes[at] ^= with;
        if let Ok(Progress::Done(found)) = Handshake::new("vm", Tls::No).feed(&bytes) {
            prop_assert!(i64::try_from(found.size).is_ok());
            let limits = found.limits();
            prop_assert!(limits.alignment.is_power_of_two() && limits.alignment <= 1 << 16);
            prop_assert!(limits.max_len >= limits.alignment && limits.max_len % limits.alignment == 0);
        }
    }

    #[test]
    fn any_bytes_are_taken_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        let mut handshake = Handshake::new("vm", Tls::No);
        let _ = handshake.feed(&[greeting(3), bytes].concat());
    }
}
