//! Reader for the map of a disk: a JSON array, which is read element by element and never held as a
//! whole.

use std::io::{self, BufRead, BufReader, Read};

use serde::Deserialize;

/// Size of a read in bytes: as much as a [`MountReader`](crate::cli::client) passes on at once.
const READ_BUFFER_SIZE: usize = 128 << 10;

/// Maximum length of an element in bytes: a few numbers and words.
const MAX_ELEMENT_LEN: u64 = 64 << 10;

/// The kind of a piece.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(in crate::cli) enum PieceKind {
    /// Has data.
    Data,
    /// Reads as zero and has space on the host.
    Zero,
    /// Reads as zero and has no space on the host.
    Hole,
}

impl PieceKind {
    /// Returns the name of the kind in the map.
    pub(in crate::cli) fn name(self) -> &'static str {
        match self {
            Self::Data => "data",
            Self::Zero => "zero",
            Self::Hole => "hole",
        }
    }
}

/// A piece of a disk: one element of the array. Unknown keys are ignored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
pub(in crate::cli) struct MapPiece {
    /// Offset of the first byte.
    pub(in crate::cli) start: u64,
    /// Length in bytes.
    pub(in crate::cli) length: u64,
    /// The layer that provides the piece: 0 is the top, the greatest is the base.
    pub(in crate::cli) depth: usize,
    /// The kind of the piece.
    pub(in crate::cli) kind: PieceKind,
}

/// Calls `each` with every element of the array in `map`.
///
/// Elements are flat objects, so each ends at the next closing brace. Splitting there is much faster
/// than a parser that reads byte by byte.
///
/// # Errors
/// The errors of `map` and `each`; `InvalidData` if `map` is no such array, or one cut short.
pub(in crate::cli) fn each_piece(
    map: impl Read,
    mut each: impl FnMut(MapPiece) -> io::Result<()>,
) -> io::Result<()> {
    let mut map = BufReader::with_capacity(READ_BUFFER_SIZE, map);
    let (mut text, mut before) = (Vec::with_capacity(256), b"[");
    loop {
        text.clear();
        (&mut map).take(MAX_ELEMENT_LEN).read_until(b'}', &mut text)?;
        let trimmed = text.trim_ascii();
        if !trimmed.ends_with(b"}") {
            return match (trimmed, before) {
                (b"]", b",") => Ok(()),
                // The map of an empty disk.
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
    fn array_is_read_whatever_its_white_space() {
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
    fn truncated_map_is_an_error() {
        let text = TWO.trim_end();
        for cut in 0..text.len() {
            assert!(pieces(&text[..cut]).is_err(), "{cut}: {}", &text[..cut]);
        }
    }

    #[test]
    fn invalid_map_is_an_error() {
        for text in ["{}", "[1]", "[{}]", "null", "[,{}]", "[]]", "[][]"] {
            assert!(pieces(text).is_err(), "{text}");
        }
        let unknown = TWO.replace("hole", "hose");
        assert!(pieces(&unknown).is_err());
        assert!(pieces(&TWO.replace("},", "}")).is_err());
        assert!(pieces(&TWO.replace("65536, \"length\"", "-1, \"length\"")).is_err());
    }
}
