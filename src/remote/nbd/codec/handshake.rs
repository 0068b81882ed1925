//! The handshake: fixed newstyle, as a state machine (doc/proto.md, "Newstyle negotiation").
//!
//! ```text
//!   server                                 client
//!   NBDMAGIC IHAVEOPT flags
//!                                          flags, and all options at once:
//!                                          STRUCTURED_REPLY, EXTENDED_HEADERS, SET_META_CONTEXT, GO
//!   the answer to each, in this order
//! ```
//!
//! The options go in one message, so that a connection costs one round trip and not four: a server
//! takes them one after the other, and what it does not know it refuses and goes on. With TLS,
//! `STARTTLS` comes before them and is waited for. A server without `GO` gets `EXPORT_NAME`.

mod error;

use std::collections::VecDeque;

pub(crate) use self::error::HandshakeError;
pub(super) use self::error::text_of;
use super::Headers;
use super::export::{BlockSizes, Export, ExportFlags};
use super::wire::{
    BASE_ALLOCATION, EXPORT_NAME_ZEROES, FLAG_FIXED_NEWSTYLE, FLAG_NO_ZEROES, Fields,
    INFO_BLOCK_SIZE, INFO_EXPORT, INFO_NAME, INIT_MAGIC, MAX_STRING, OLDSTYLE_MAGIC,
    OPT_EXPORT_NAME, OPT_EXTENDED_HEADERS, OPT_GO, OPT_SET_META_CONTEXT, OPT_STARTTLS,
    OPT_STRUCTURED_REPLY, OPTION_MAGIC, OPTION_REPLY_MAGIC, REP_ACK, REP_ERR_POLICY,
    REP_ERR_SHUTDOWN, REP_ERR_TLS_REQD, REP_ERR_UNKNOWN, REP_ERR_UNSUP, REP_ERROR, REP_INFO,
    REP_META_CONTEXT,
};
use crate::printable;

/// The longest reply to an option, in bytes: a string of 4,096 bytes and a few numbers are the most
/// that one needs to have.
const MAX_REPLY: usize = 16 << 10;

/// The most replies to all options together; a server that goes on has no end.
const MAX_REPLIES: u32 = 256;

/// Whether the connection is to be encrypted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Tls {
    /// Not at all.
    No,
    /// Before anything is asked, or the handshake fails.
    Required,
}

/// What the handshake needs next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Progress {
    /// Bytes of the server.
    MoreInput,
    /// TLS on the connection, and then [`Handshake::start_options`].
    StartTls,
    /// Nothing: requests may be sent.
    Done(Box<Export>),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Greeting,
    StartTls,
    /// TLS was agreed on; the connection is being encrypted.
    Encrypting,
    Options,
    ExportName,
    Done,
}

/// A handshake. It is fed the server's bytes, and its own are taken after that.
#[derive(Debug)]
pub(crate) struct Handshake {
    export: String,
    tls: Tls,
    state: State,
    has_no_zeroes: bool,
    input: Vec<u8>,
    output: Vec<u8>,
    /// The options whose last reply is still to come.
    asked: VecDeque<u32>,
    replies: u32,
    is_structured: bool,
    is_extended: bool,
    allocation: Option<u32>,
    size_and_flags: Option<(u64, u16)>,
    blocks: BlockSizes,
    name: Option<String>,
    /// The text with which the server demanded TLS, for an option that could do without.
    wants_tls: Option<String>,
}

impl Handshake {
    /// Begins a handshake for `export`, a name of at most 4,096 bytes.
    pub(crate) fn new(export: &str, tls: Tls) -> Self {
        Self {
            export: export.to_owned(),
            tls,
            state: State::Greeting,
            has_no_zeroes: false,
            input: Vec::new(),
            output: Vec::new(),
            asked: VecDeque::new(),
            replies: 0,
            is_structured: false,
            is_extended: false,
            allocation: None,
            size_and_flags: None,
            blocks: BlockSizes::default(),
            name: None,
            wants_tls: None,
        }
    }

    /// Takes the bytes that are to be sent.
    pub(crate) fn take_output(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.output)
    }

    /// Takes bytes of the server, in pieces of any length.
    pub(crate) fn feed(&mut self, bytes: &[u8]) -> Result<Progress, HandshakeError> {
        self.input.extend_from_slice(bytes);
        let input = std::mem::take(&mut self.input);
        let mut rest = Fields(&input);
        while self.take_message(&mut rest)? {}
        match self.state {
            State::Done if rest.0.is_empty() => Ok(Progress::Done(Box::new(self.finish()?))),
            State::Done => Err(HandshakeError::Protocol("it sent an answer before a request")),
            // What an attacker put here would otherwise count as encrypted (CVE-2021-3716).
            State::Encrypting if !rest.0.is_empty() => Err(HandshakeError::BytesBeforeTls),
            State::Encrypting => Ok(Progress::StartTls),
            _ => {
                self.input = rest.0.to_vec();
                Ok(Progress::MoreInput)
            }
        }
    }

    /// Explains the end of the connection.
    pub(crate) fn end_of_input(&self) -> HandshakeError {
        match (&self.wants_tls, self.state) {
            (Some(text), _) => HandshakeError::TlsRequired { text: text.clone() },
            (None, State::ExportName) => HandshakeError::ExportRefused { name: self.shown_name() },
            _ => HandshakeError::Closed,
        }
    }

    fn shown_name(&self) -> String {
        printable::line(&self.export).into_owned()
    }

    /// Takes one message off `rest`; `false` when it is not there yet, or none is expected.
    fn take_message(&mut self, rest: &mut Fields<'_>) -> Result<bool, HandshakeError> {
        match self.state {
            State::Greeting => self.take_greeting(rest),
            State::StartTls | State::Options => self.take_reply(rest),
            State::ExportName => Ok(self.take_export(rest)),
            State::Encrypting | State::Done => Ok(false),
        }
    }

    fn take_greeting(&mut self, rest: &mut Fields<'_>) -> Result<bool, HandshakeError> {
        let magic = INIT_MAGIC.to_be_bytes();
        // Another protocol is told at its first bytes: its greeting may be short.
        if !rest.0.iter().zip(&magic).all(|(byte, expected)| byte == expected) {
            return Err(HandshakeError::NotNbd);
        }
        let mut fields = *rest;
        let (Some(_), Some(second), Some(flags)) = (fields.u64(), fields.u64(), fields.u16())
        else {
            return Ok(false);
        };
        match second {
            OPTION_MAGIC => {}
            OLDSTYLE_MAGIC => return Err(HandshakeError::OldStyle),
            _ => return Err(HandshakeError::NotNbd),
        }
        *rest = fields;
        // The client's flags have the numbers of the server's ("Client flags").
        let flags = flags & (FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES);
        self.has_no_zeroes = flags & FLAG_NO_ZEROES != 0;
        self.output.extend(u32::from(flags).to_be_bytes());
        match (self.tls, flags & FLAG_FIXED_NEWSTYLE != 0) {
            (Tls::No, true) => self.start_options(),
            (Tls::No, false) => self.ask_export_name(),
            (Tls::Required, true) => {
                self.state = State::StartTls;
                self.asked.push_back(OPT_STARTTLS);
                self.put_option(OPT_STARTTLS, &[]);
            }
            (Tls::Required, false) => return Err(HandshakeError::NoTls { text: String::new() }),
        }
        Ok(true)
    }

    /// Sends the options; with TLS, once the connection is encrypted.
    pub(crate) fn start_options(&mut self) {
        self.state = State::Options;
        let name = self.export.as_bytes().to_vec();
        let name_len = u32::try_from(name.len()).unwrap_or(u32::MAX).to_be_bytes();
        self.put_option(OPT_STRUCTURED_REPLY, &[]);
        self.put_option(OPT_EXTENDED_HEADERS, &[]);
        let context_len = u32::try_from(BASE_ALLOCATION.len()).unwrap_or(u32::MAX).to_be_bytes();
        let one = 1_u32.to_be_bytes();
        self.put_option(
            OPT_SET_META_CONTEXT,
            &[&name_len, &name, &one, &context_len, BASE_ALLOCATION],
        );
        let wanted = [2, INFO_NAME, INFO_BLOCK_SIZE].map(u16::to_be_bytes).concat();
        self.put_option(OPT_GO, &[&name_len, &name, &wanted]);
        self.asked =
            [OPT_STRUCTURED_REPLY, OPT_EXTENDED_HEADERS, OPT_SET_META_CONTEXT, OPT_GO].into();
    }

    fn ask_export_name(&mut self) {
        self.state = State::ExportName;
        let name = self.export.as_bytes().to_vec();
        self.put_option(OPT_EXPORT_NAME, &[&name]);
    }

    fn put_option(&mut self, option: u32, data: &[&[u8]]) {
        let len: usize = data.iter().map(|part| part.len()).sum();
        self.output.extend(OPTION_MAGIC.to_be_bytes());
        self.output.extend(option.to_be_bytes());
        self.output.extend(u32::try_from(len).unwrap_or(u32::MAX).to_be_bytes());
        for part in data {
            self.output.extend_from_slice(part);
        }
    }

    fn take_reply(&mut self, rest: &mut Fields<'_>) -> Result<bool, HandshakeError> {
        let mut fields = *rest;
        let (Some(magic), Some(option), Some(kind), Some(len)) =
            (fields.u64(), fields.u32(), fields.u32(), fields.u32())
        else {
            return Ok(false);
        };
        if magic != OPTION_REPLY_MAGIC {
            return Err(HandshakeError::Protocol(
                "the reply to an option has another magic number",
            ));
        }
        let len = usize::try_from(len).unwrap_or(usize::MAX);
        if len > MAX_REPLY {
            return Err(HandshakeError::Protocol("the reply to an option is too long"));
        }
        let Some(data) = fields.bytes(len) else { return Ok(false) };
        *rest = fields;
        self.replies += 1;
        if self.replies > MAX_REPLIES {
            return Err(HandshakeError::Protocol("its replies to the options have no end"));
        }
        if self.asked.front() != Some(&option) {
            return Err(HandshakeError::Protocol("it answers an option that was not sent"));
        }
        self.take_option_reply(option, kind, data)?;
        Ok(true)
    }

    fn take_option_reply(
        &mut self,
        option: u32,
        kind: u32,
        data: &[u8],
    ) -> Result<(), HandshakeError> {
        let is_last = kind == REP_ACK || kind & REP_ERROR != 0;
        match (option, kind) {
            (OPT_STRUCTURED_REPLY, REP_ACK) => self.is_structured = true,
            (OPT_EXTENDED_HEADERS, REP_ACK) => self.is_extended = true,
            (OPT_SET_META_CONTEXT, REP_META_CONTEXT) => self.take_context(data)?,
            (OPT_GO, REP_INFO) => self.take_info(data)?,
            (OPT_GO, REP_ACK) => self.state = State::Done,
            (OPT_STARTTLS, REP_ACK) => self.state = State::Encrypting,
            (OPT_SET_META_CONTEXT, REP_ACK) => {}
            (OPT_GO | OPT_STARTTLS, _) if is_last => return self.refused(option, kind, data),
            (_, REP_ERR_TLS_REQD) => self.wants_tls = Some(text_of(data)),
            // Without the option it goes on with less.
            (OPT_SET_META_CONTEXT, _) if is_last => self.allocation = None,
            _ if is_last => {}
            _ => return Err(HandshakeError::Protocol("its reply does not fit the option")),
        }
        if is_last {
            self.asked.pop_front();
        }
        Ok(())
    }

    fn refused(&mut self, option: u32, code: u32, data: &[u8]) -> Result<(), HandshakeError> {
        let text = text_of(data);
        Err(match (option, code) {
            (OPT_STARTTLS, _) => HandshakeError::NoTls { text },
            (_, REP_ERR_UNSUP) if !self.is_extended => {
                self.asked.clear();
                self.is_structured = false;
                self.allocation = None;
                self.ask_export_name();
                return Ok(());
            }
            (_, REP_ERR_TLS_REQD) => HandshakeError::TlsRequired { text },
            (_, REP_ERR_UNKNOWN) => HandshakeError::NoExport { name: self.shown_name(), text },
            (_, REP_ERR_SHUTDOWN) => HandshakeError::ShuttingDown { text },
            (_, REP_ERR_POLICY) if text.is_empty() => {
                HandshakeError::Refused { code, text: "its policy forbids it".to_owned() }
            }
            _ => HandshakeError::Refused { code, text },
        })
    }

    fn take_context(&mut self, data: &[u8]) -> Result<(), HandshakeError> {
        let mut fields = Fields(data);
        let number = fields.u32().ok_or(HandshakeError::Protocol("a context without a number"))?;
        if fields.0 == BASE_ALLOCATION {
            self.allocation = Some(number);
        }
        Ok(())
    }

    fn take_info(&mut self, data: &[u8]) -> Result<(), HandshakeError> {
        const SHORT: HandshakeError = HandshakeError::Protocol("its description is cut off");
        let mut fields = Fields(data);
        match fields.u16().ok_or(SHORT)? {
            INFO_EXPORT => {
                let size = fields.u64().ok_or(SHORT)?;
                self.size_and_flags = Some((size, fields.u16().ok_or(SHORT)?));
            }
            INFO_NAME if fields.0.len() <= MAX_STRING => {
                self.name = Some(String::from_utf8_lossy(fields.0).into_owned());
            }
            INFO_BLOCK_SIZE => {
                let min = fields.u32().ok_or(SHORT)?;
                let _preferred = fields.u32().ok_or(SHORT)?;
                let max = fields.u32().ok_or(SHORT)?;
                self.blocks =
                    BlockSizes::new(min, max).ok_or(HandshakeError::BlockSizes { min, max })?;
            }
            _ => {}
        }
        Ok(())
    }

    /// Takes the answer to `EXPORT_NAME`, which has no header.
    fn take_export(&mut self, rest: &mut Fields<'_>) -> bool {
        let mut fields = *rest;
        let zeroes = if self.has_no_zeroes { 0 } else { EXPORT_NAME_ZEROES };
        let (Some(size), Some(flags), Some(_)) = (fields.u64(), fields.u16(), fields.bytes(zeroes))
        else {
            return false;
        };
        *rest = fields;
        self.size_and_flags = Some((size, flags));
        self.state = State::Done;
        true
    }

    fn finish(&mut self) -> Result<Export, HandshakeError> {
        let described = self.size_and_flags.take();
        let (size, flags) =
            described.ok_or(HandshakeError::Protocol("it does not say how large the image is"))?;
        if i64::try_from(size).is_err() {
            return Err(HandshakeError::TooLarge(size));
        }
        let headers = match (self.is_extended, self.is_structured) {
            (true, _) => Headers::Extended,
            (false, true) => Headers::Structured,
            (false, false) => Headers::Simple,
        };
        Ok(Export {
            size,
            flags: ExportFlags::new(flags),
            blocks: self.blocks,
            headers,
            // A server that tells holes has to answer in chunks.
            allocation: self.allocation.filter(|_| headers != Headers::Simple),
            name: self.name.take(),
        })
    }
}

#[cfg(test)]
mod tests;
