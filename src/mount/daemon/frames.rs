//! The frames by which a starting daemon reports to the command that waits for it.
//!
//! ```text
//!   kind (1 byte) | length (4 bytes, little-endian) | text
//! ```
//!
//! The channel is a socket pair and no pipe: a socket can be written without the risk of SIGPIPE
//! when the command was interrupted.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;

use rustix::io::Errno;
use rustix::net::SendFlags;

use crate::printable;

/// Meaning of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum FrameKind {
    /// A line for stdout.
    Note,
    /// The last frame: the mount answers.
    Serving,
    /// The last frame: the exit code (1 byte) and the line for stderr.
    Failed,
}

impl FrameKind {
    const ALL: [Self; 3] = [Self::Note, Self::Serving, Self::Failed];

    const fn byte(self) -> u8 {
        match self {
            Self::Note => b'n',
            Self::Serving => b'o',
            Self::Failed => b'f',
        }
    }
}

/// Sends a frame.
///
/// # Errors
/// `EPIPE` when the other end is closed; otherwise the host's errno.
pub(super) fn send_frame(to: &UnixStream, kind: FrameKind, text: &[u8]) -> io::Result<()> {
    let len = u32::try_from(text.len()).map_err(|_| Errno::MSGSIZE)?;
    let mut frame = vec![kind.byte()];
    frame.extend(len.to_le_bytes());
    frame.extend(text);
    let mut rest = &frame[..];
    while !rest.is_empty() {
        let sent = rustix::io::retry_on_intr(|| rustix::net::send(to, rest, SendFlags::NOSIGNAL))?;
        rest = rest.get(sent..).unwrap_or_default();
    }
    Ok(())
}

/// Reads the next frame; `None` at the end, or when the last frame was cut off.
///
/// # Errors
/// `InvalidData` for a frame of unknown kind; otherwise the host's errno.
pub(super) fn read_frame(from: &mut impl Read) -> io::Result<Option<(FrameKind, Vec<u8>)>> {
    let mut head = [0; 5];
    match from.read_exact(&mut head) {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        read => read?,
    }
    let [kind, len @ ..] = head;
    let kind = FrameKind::ALL.into_iter().find(|known| known.byte() == kind);
    let kind = kind.ok_or(io::ErrorKind::InvalidData)?;
    let len = u32::from_le_bytes(len);
    // `take` lets memory grow only with the bytes that really arrive.
    let mut text = Vec::new();
    from.take(len.into()).read_to_end(&mut text)?;
    match u32::try_from(text.len()) == Ok(len) {
        true => Ok(Some((kind, text))),
        false => Ok(None),
    }
}

/// Prints a line that the daemon reported; paths and names in it may be anybody's.
pub(super) fn print_line(to: &mut dyn Write, text: &[u8]) -> io::Result<()> {
    to.write_all(printable::line(&String::from_utf8_lossy(text)).as_bytes())?;
    to.write_all(b"\n")?;
    to.flush()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_arrive_as_they_were_sent() {
        let (mut reader, writer) = UnixStream::pair().unwrap();
        send_frame(&writer, FrameKind::Note, b"a\nb").unwrap();
        send_frame(&writer, FrameKind::Failed, b"").unwrap();
        assert_eq!(read_frame(&mut reader).unwrap(), Some((FrameKind::Note, b"a\nb".to_vec())));
        assert_eq!(read_frame(&mut reader).unwrap(), Some((FrameKind::Failed, Vec::new())));
        drop(writer);
        assert_eq!(read_frame(&mut reader).unwrap(), None);
    }

    #[test]
    fn a_cut_frame_is_the_end_and_an_unknown_one_an_error() {
        assert_eq!(read_frame(&mut &b"n\x05\0\0\0abc"[..]).unwrap(), None);
        assert_eq!(read_frame(&mut &b"n\x05"[..]).unwrap(), None);
        assert!(read_frame(&mut &b"?\0\0\0\0"[..]).is_err());
    }

    #[test]
    fn success_without_a_parent_is_an_error_not_a_signal() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        drop(ours);
        let error = send_frame(&theirs, FrameKind::Serving, b"").unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EPIPE));
    }
}
