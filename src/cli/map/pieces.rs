//! The map as the daemon tells it: a JSON array, element by element, never all at once.

use std::io::{self, BufRead, BufReader, Read};

use serde::Deserialize;

/// What is read at a time: as much as the feed hands on at once.
const READ_BUFFER_SIZE: usize = 128 << 10;

/// The longest element: a few numbers and words.
const MAX_ELEMENT_LEN: u64 = 64 << 10;

/// What a piece of a disk is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(in crate::cli) enum PieceKind {
    /// Holds bytes.
    Data,
    /// Reads as zero and has space.
    Zero,
    /// Reads as zero and has none.
    Hole,
}

impl PieceKind {
    /// As the map has it.
    pub(in crate::cli) fn name(self) -> &'static str {
        match self {
            Self::Data => "data",
            Self::Zero => "zero",
            Self::Hole => "hole",
        }
    }
}

/// One element of the array. Keys that are not known here are left alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
pub(in crate::cli) struct MapPiece {
    /// Its first byte.
    pub(in crate::cli) start: u64,
    /// Its bytes.
    pub(in crate::cli) length: u64,
    /// The layer that provides it: 0 is the top one, the greatest the base.
    pub(in crate::cli) depth: usize,
    /// What it is.
    pub(in crate::cli) kind: PieceKind,
}

/// Calls `each` with every element of the array in `feed`.
///
/// Elements are flat objects, so each ends with the next closing brace: far quicker than a parser
/// that is fed byte by byte.
///
/// # Errors
/// Those of `feed` and `each`; `InvalidData` for what is no such array, or one cut short.
pub(in crate::cli) fn each_piece(
    feed: impl Read,
    mut each: impl FnMut(MapPiece) -> io::Result<()>,
) -> io::Result<()> {
    let mut feed = BufReader::with_capacity(READ_BUFFER_SIZE, feed);
    let (mut text, mut before) = (Vec::with_capacity(256), b"[");
    loop {
        text.clear();
        (&mut feed).take(MAX_ELEMENT_LEN).read_until(b'}', &mut text)?;
        let trimmed = text.trim_ascii();
        if !trimmed.ends_with(b"}") {
            return match (trimmed, before) {
                (b"]", b",") => Ok(()),
                // Of a disk without a byte.
                ([b'[', inner @ .., b']'], b"[") if inner.trim_ascii().is_empty() => Ok(()),
                _ => Err(invalid_map()),
            };
        }
        let element = trimmed.strip_prefix(before).ok_or_else(invalid_map)?;
        each(serde_json::from_slice(element)?)?;
        before = b",";
    }
}

fn invalid_map() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "its map is cut short or not understood")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pieces(text: &str) -> io::Result<Vec<MapPiece>> {
        let mut all = Vec::new();
        each_piece(text.as_bytes(), |piece| {
            all.push(piece);
            Ok(())
        })?;
        Ok(all)
    }

    const TWO: &str = r#"[{ "start": 0, "length": 65536, "depth": 0, "present": true, "zero": false, "data": true, "kind": "data"},
{ "start": 65536, "length": 1048576, "depth": 12, "present": true, "zero": true, "data": false, "kind": "hole"}]
"#;

    #[test]
    fn an_array_comes_piece_by_piece_however_it_is_laid_out() {
        let expected = [
            MapPiece { start: 0, length: 65536, depth: 0, kind: PieceKind::Data },
            MapPiece { start: 65536, length: 1 << 20, depth: 12, kind: PieceKind::Hole },
        ];
        assert_eq!(pieces(TWO).unwrap(), expected);
        let compact: serde_json::Value = serde_json::from_str(TWO).unwrap();
        assert_eq!(pieces(&compact.to_string()).unwrap(), expected);
        assert_eq!(pieces(&format!("{compact:#}")).unwrap(), expected);
        assert_eq!(pieces("[]\n").unwrap(), []);
        assert_eq!(pieces("[ \n ]").unwrap(), []);
    }

    #[test]
    fn a_map_that_is_cut_anywhere_is_an_error() {
        let text = TWO.trim_end();
        for cut in 0..text.len() {
            assert!(pieces(&text[..cut]).is_err(), "{cut}: {}", &text[..cut]);
        }
    }

    #[test]
    fn what_is_no_map_is_an_error() {
        for text in ["{}", "[1]", "[{}]", "null", "[,{}]", "[]]", "[][]"] {
            assert!(pieces(text).is_err(), "{text}");
        }
        let unknown = TWO.replace("hole", "hose");
        assert!(pieces(&unknown).is_err());
        assert!(pieces(&TWO.replace("},", "}")).is_err());
        assert!(pieces(&TWO.replace("65536, \"length\"", "-1, \"length\"")).is_err());
    }
}
