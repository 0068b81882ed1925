//! Counting what a client asks for, from its bytes alone.

/// What is spoken over a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Protocol {
    /// NBD: each option of the handshake and each request is a message.
    Nbd,
    /// HTTP/1.1: each header that ends, for requests without a body.
    Http,
    /// Nothing is counted.
    Opaque,
}

/// Counts the requests on one connection.
pub(super) struct RequestCounter {
    protocol: Protocol,
    /// The part of a header that has come.
    head: Vec<u8>,
    /// The bytes of a payload that are still to come.
    payload: u64,
    /// Whether the first words of the handshake, the client's flags, have come.
    has_begun: bool,
}

/// The client's flags in the handshake of NBD (doc/proto.md of the NBD project, as all below).
const NBD_FLAGS_LEN: usize = 4;
const NBD_OPTION: [u8; 4] = *b"IHAV";
const NBD_OPTION_LEN: usize = 16;
const NBD_REQUEST: [u8; 4] = 0x2560_9513_u32.to_be_bytes();
const NBD_REQUEST_LEN: usize = 28;
const NBD_EXTENDED: [u8; 4] = 0x21e4_1c71_u32.to_be_bytes();
const NBD_EXTENDED_LEN: usize = 32;
const NBD_WRITE: u8 = 1;
/// `NBD_CMD_FLAG_PAYLOAD_LEN`: a payload follows an extended header.
const NBD_HAS_PAYLOAD: u8 = 1 << 5;

/// The end of a header of HTTP.
const HTTP_END: &[u8] = b"\r\n\r\n";

fn number(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0, |value, byte| value << 8 | u64::from(*byte))
}

impl RequestCounter {
    pub(super) fn new(protocol: Protocol) -> Self {
        Self { protocol, head: Vec::new(), payload: 0, has_begun: false }
    }

    /// Takes the next bytes of the client, and returns how many requests they complete.
    pub(super) fn add(&mut self, bytes: &[u8]) -> u64 {
        match self.protocol {
            Protocol::Nbd => self.add_nbd(bytes),
            Protocol::Http => self.add_http(bytes),
            Protocol::Opaque => 0,
        }
    }

    fn add_nbd(&mut self, mut bytes: &[u8]) -> u64 {
        let mut found = 0;
        while !bytes.is_empty() && self.protocol == Protocol::Nbd {
            if self.payload > 0 {
                let len = usize::try_from(self.payload).unwrap_or(usize::MAX).min(bytes.len());
                self.payload -= len as u64;
                bytes = &bytes[len..];
                continue;
            }
            let missing = self.nbd_header_len() - self.head.len();
            let (some, rest) = bytes.split_at(missing.min(bytes.len()));
            self.head.extend_from_slice(some);
            bytes = rest;
            found += u64::from(self.end_nbd_header());
        }
        found
    }

    /// Returns the length of the header that has begun, as far as it is known yet.
    fn nbd_header_len(&self) -> usize {
        if !self.has_begun {
            return NBD_FLAGS_LEN;
        }
        match self.head.first_chunk() {
            Some(&NBD_OPTION) => NBD_OPTION_LEN,
            Some(&NBD_REQUEST) => NBD_REQUEST_LEN,
            Some(&NBD_EXTENDED) => NBD_EXTENDED_LEN,
            _ => 4,
        }
    }

    /// Ends the header if all of it is there; returns whether that was a message.
    fn end_nbd_header(&mut self) -> bool {
        if self.head.len() < self.nbd_header_len() {
            return false;
        }
        if !self.has_begun {
            self.has_begun = true;
            self.head.clear();
            return false;
        }
        self.payload = match self.head.first_chunk() {
            Some(&NBD_OPTION) => number(&self.head[12..16]),
            Some(&NBD_REQUEST) if self.head[7] == NBD_WRITE => number(&self.head[24..28]),
            Some(&NBD_EXTENDED) if self.head[5] & NBD_HAS_PAYLOAD != 0 => {
                number(&self.head[24..32])
            }
            Some(&NBD_REQUEST | &NBD_EXTENDED) => 0,
            // Encrypted from here on, or another protocol: nothing more can be counted.
            _ => {
                self.protocol = Protocol::Opaque;
                return false;
            }
        };
        self.head.clear();
        true
    }

    fn add_http(&mut self, bytes: &[u8]) -> u64 {
        let mut found = 0;
        for byte in bytes {
            self.head.push(*byte);
            if !HTTP_END.starts_with(&self.head) {
                // A carriage return may be the first one of the end.
                let again = *byte == HTTP_END[0];
                self.head.clear();
                self.head.extend(again.then_some(*byte));
            } else if self.head == HTTP_END {
                self.head.clear();
                found += 1;
            }
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(kind: u8, len: u32) -> Vec<u8> {
        let mut bytes = NBD_REQUEST.to_vec();
        bytes.extend([0, 0, 0, kind]);
        bytes.extend([0; 16]);
        bytes.extend(len.to_be_bytes());
        bytes
    }

    fn option(kind: u8, data: &[u8]) -> Vec<u8> {
        let len = u32::try_from(data.len()).unwrap().to_be_bytes();
        [b"IHAVEOPT\0\0\0".as_slice(), &[kind], &len, data].concat()
    }

    fn extended(has_payload: bool, len: u64, payload: &[u8]) -> Vec<u8> {
        let mut bytes = NBD_EXTENDED.to_vec();
        bytes.extend([0, u8::from(has_payload) << 5, 0, 1]);
        bytes.extend([0; 16]);
        bytes.extend(len.to_be_bytes());
        bytes.extend(payload);
        bytes
    }

    /// Counts in pieces of `step` bytes.
    fn count(protocol: Protocol, bytes: &[u8], step: usize) -> u64 {
        let mut counter = RequestCounter::new(protocol);
        bytes.chunks(step).map(|piece| counter.add(piece)).sum()
    }

    #[test]
    fn each_message_of_an_nbd_client_counts_however_it_is_cut() {
        let write = [request(1, 40), request(0, 4096)[..20].to_vec(), vec![7; 20]].concat();
        let messages = [
            vec![0, 0, 0, 3],
            option(8, &[]),
            option(7, b"\0\0\0\x02vm\0\0"),
            request(0, 1 << 20),
            write,
            extended(false, 1 << 40, &[]),
            extended(true, 5, b"IHAVE"),
            request(2, 0),
        ]
        .concat();
        for step in [1, 3, 28, 1000] {
            assert_eq!(count(Protocol::Nbd, &messages, step), 7, "{step}");
        }
    }

    #[test]
    fn nothing_is_counted_once_a_connection_is_encrypted() {
        let bytes = [vec![0, 0, 0, 3], option(5, &[]), vec![22, 3, 1, 2], request(0, 1)].concat();
        assert_eq!(count(Protocol::Nbd, &bytes, 1), 1);
        assert_eq!(count(Protocol::Opaque, &bytes, 1), 0);
    }

    #[test]
    fn each_header_of_http_counts() {
        let bytes = b"GET / HTTP/1.1\r\nHost: a\r\n\r\nHEAD / HTTP/1.1\r\r\n\r\n\r\n";
        for step in [1, 5, 100] {
            assert_eq!(count(Protocol::Http, bytes, step), 2, "{step}");
        }
    }
}
