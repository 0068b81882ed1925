//! Reading a bmap, which anybody may have written: bounded, without entities, and checked as a whole
//! before any of it counts.
//!
//! ```text
//!   text ──▶ elements ──▶ Fields, all still text ──▶ Bmap, once they agree
//! ```

use std::ops::Range;

use quick_xml::Reader;
use quick_xml::events::{BytesStart, Event};
use sha2::{Digest, Sha256};
use thiserror::Error;

use super::{Bmap, BmapRange, hex};
use crate::config::MAX_SIZE;
use crate::printable;

/// The longest file in bytes: 16 MiB, some 140,000 ranges with their checksums.
pub const MAX_FILE_LEN: u64 = 16 << 20;
/// The most ranges: 262,144, of 56 bytes each in memory.
const MAX_RANGES: usize = 1 << 18;
/// The most elements within each other; a bmap has 3.
const MAX_DEPTH: usize = 8;
/// The most attributes that are looked at; a bmap has one in an element.
const MAX_ATTRIBUTES: usize = 8;
/// The longest text of an element and the longest name that is shown, in bytes.
const MAX_TEXT: usize = 256;
/// The block sizes in bytes: those of file systems.
const BLOCK_SIZES: Range<u64> = 512..(1 << 30) + 1;
/// The length of a SHA-256 in hexadecimal digits.
const SUM_LEN: usize = 64;

/// The reason why a text is no bmap that can be used; one line for the user, without the name of the file.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum BmapError {
    /// It is no XML.
    #[error("it is no XML: {0}")]
    Syntax(String),
    /// There is XML that no bmap has.
    #[error("it is no bmap: {0}")]
    Foreign(String),
    /// It is of a version that is not known.
    #[error("it is a bmap of version '{0}': make one of version 2.0 with bmaptool create")]
    Version(String),
    /// Its checksums are not SHA-256.
    #[error("its checksums are {0}: make it anew with bmaptool create, whose are SHA-256")]
    Checksums(String),
    /// The file is not the one that was written.
    #[error("it does not have the checksum that it names for itself: fetch it again")]
    Damaged,
    /// A value is none, or the values do not agree.
    #[error("{0}")]
    Value(String),
    /// It has more ranges than are taken.
    #[error("it has more than {MAX_RANGES} ranges of blocks")]
    TooManyRanges,
}

/// The elements of a bmap that have text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Field {
    ImageSize,
    BlockSize,
    BlocksCount,
    MappedBlocksCount,
    ChecksumType,
    FileChecksum,
}

impl Field {
    const ALL: [(&'static str, Self); 6] = [
        ("ImageSize", Self::ImageSize),
        ("BlockSize", Self::BlockSize),
        ("BlocksCount", Self::BlocksCount),
        ("MappedBlocksCount", Self::MappedBlocksCount),
        ("ChecksumType", Self::ChecksumType),
        ("BmapFileChecksum", Self::FileChecksum),
    ];

    fn of(name: &str) -> Option<Self> {
        Self::ALL.iter().find(|(known, _)| *known == name).map(|(_, field)| *field)
    }

    fn name(self) -> &'static str {
        Self::ALL.iter().find(|(_, field)| *field == self).map_or("", |(name, _)| *name)
    }
}

/// An element that is open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Element {
    Root,
    Field(Field),
    BlockMap,
    Range,
    /// One of a later minor version, with all that is in it.
    Unknown,
}

/// What was read so far.
#[derive(Default)]
struct Fields {
    version: Option<String>,
    texts: Vec<(Field, String)>,
    has_map: bool,
    /// Numbers of blocks, the last one included, and what they have as a checksum.
    ranges: Vec<(Range<u64>, Option<[u8; 32]>)>,
    /// The text of the element that is open.
    text: String,
    /// The checksum of the range that is open.
    sum: Option<[u8; 32]>,
}

impl Bmap {
    /// Parses a bmap: 2.x as `bmaptool` writes it and 1.4, which is the same, with SHA-256 or without
    /// checksums; 1.0 to 1.2, which have none.
    ///
    /// # Errors
    /// [`BmapError`].
    pub fn parse(bytes: &[u8]) -> Result<Self, BmapError> {
        let text = std::str::from_utf8(bytes)
            .map_err(|_| BmapError::Syntax("it is not UTF-8".to_owned()))?;
        let fields = read_elements(text)?;
        let has_sums = fields.check_version(text)?;
        fields.build(has_sums, Sha256::digest(bytes).into())
    }
}

/// Reads the elements of `text`, whose places alone are checked.
fn read_elements(text: &str) -> Result<Fields, BmapError> {
    let mut reader = Reader::from_str(text);
    let (mut open, mut fields) = (Vec::new(), Fields::default());
    loop {
        match reader.read_event().map_err(|error| BmapError::Syntax(shown(&error.to_string())))? {
            Event::Start(start) => fields.open(&mut open, &start)?,
            Event::Empty(start) => {
                fields.open(&mut open, &start)?;
                fields.close(&mut open)?;
            }
            Event::End(_) => fields.close(&mut open)?,
            Event::Text(part) => fields.add_text(open.last().copied(), &part)?,
            Event::Decl(_) | Event::Comment(_) | Event::PI(_) => {}
            Event::DocType(_) | Event::GeneralRef(_) | Event::CData(_) => {
                let what = "it has a document type, an entity or a CDATA section";
                return Err(BmapError::Foreign(what.to_owned()));
            }
            Event::Eof => break,
        }
    }
    match open.is_empty() && fields.version.is_some() {
        true => Ok(fields),
        false => Err(BmapError::Syntax("it ends too early".to_owned())),
    }
}

impl Fields {
    fn open(&mut self, open: &mut Vec<Element>, start: &BytesStart<'_>) -> Result<(), BmapError> {
        let name = start.name();
        let name: &str = name.as_ref();
        let element = match (open.last(), Field::of(name)) {
            (None, _) if name == "bmap" && self.version.is_none() => {
                self.version = Some(attribute(start, "version")?.unwrap_or_default());
                Element::Root
            }
            (None, _) => {
                let what = format!("its outermost element is '{}'", shown(name));
                return Err(BmapError::Foreign(what));
            }
            (Some(Element::Root), Some(field)) => Element::Field(field),
            (Some(Element::Root), None) if name == "BlockMap" && !self.has_map => {
                self.has_map = true;
                Element::BlockMap
            }
            (Some(Element::Root), None) if name != "BlockMap" => Element::Unknown,
            (Some(Element::BlockMap), _) if name == "Range" => {
                self.sum = attribute(start, "chksum")?.map(|sum| parse_sum(&sum)).transpose()?;
                Element::Range
            }
            (Some(Element::Unknown), _) if open.len() < MAX_DEPTH => Element::Unknown,
            _ => {
                let what = format!("the element '{}' is out of place", shown(name));
                return Err(BmapError::Foreign(what));
            }
        };
        self.text.clear();
        open.push(element);
        Ok(())
    }

    fn add_text(&mut self, element: Option<Element>, part: &str) -> Result<(), BmapError> {
        match element {
            Some(Element::Unknown) => {}
            Some(Element::Field(_) | Element::Range) => {
                self.text.push_str(part);
                if self.text.len() > MAX_TEXT {
                    let what = format!("'{}...' is too long", shown(&self.text));
                    return Err(BmapError::Value(what));
                }
            }
            _ if part.trim_ascii().is_empty() => {}
            _ => {
                let what = format!("the text '{}' is out of place", shown(part.trim_ascii()));
                return Err(BmapError::Foreign(what));
            }
        }
        Ok(())
    }

    fn close(&mut self, open: &mut Vec<Element>) -> Result<(), BmapError> {
        let text = self.text.trim_ascii();
        match open.pop() {
            Some(Element::Field(field)) => {
                if self.get(field).is_some() {
                    return Err(BmapError::Value(format!("{} is there twice", field.name())));
                }
                self.texts.push((field, text.to_owned()));
            }
            Some(Element::Range) => {
                if self.ranges.len() >= MAX_RANGES {
                    return Err(BmapError::TooManyRanges);
                }
                let blocks = parse_blocks(text).ok_or_else(|| {
                    BmapError::Value(format!("'{}' is no range of blocks", shown(text)))
                })?;
                self.ranges.push((blocks, self.sum.take()));
            }
            Some(Element::Root | Element::BlockMap | Element::Unknown) | None => {}
        }
        Ok(())
    }

    fn get(&self, field: Field) -> Option<&str> {
        self.texts.iter().find(|(known, _)| *known == field).map(|(_, text)| text.as_str())
    }

    /// Checks version and kind of checksums, and the checksum of the file, which is `text`. Returns
    /// whether ranges may have checksums.
    fn check_version(&self, text: &str) -> Result<bool, BmapError> {
        let version = self.version.as_deref().unwrap_or_default();
        let numbers = version
            .split_once('.')
            .and_then(|(major, minor)| Some((parse_number(major)?, parse_number(minor)?)));
        match numbers {
            Some((1, 3)) => {
                return Err(BmapError::Checksums("SHA-1 (version 1.3)".to_owned()));
            }
            Some((1, 0..=2)) => return Ok(false),
            Some((1, 4) | (2, _)) => {}
            _ => return Err(BmapError::Version(shown(version))),
        }
        match self.get(Field::ChecksumType) {
            Some("sha256") => self.check_file(text).map(|()| true),
            None | Some("none") => Ok(false),
            Some(other) => Err(BmapError::Checksums(format!("'{}'", shown(other)))),
        }
    }

    /// Checks the checksum of the file: with zeros in its own place, which is where it stands first, as
    /// for `bmaptool`.
    fn check_file(&self, text: &str) -> Result<(), BmapError> {
        let sum = self.get(Field::FileChecksum).ok_or_else(|| missing(Field::FileChecksum))?;
        let wanted = parse_sum(sum)?;
        let (before, after) = text.split_once(sum).ok_or(BmapError::Damaged)?;
        let mut hasher = Sha256::new();
        hasher.update(before);
        hasher.update([b'0'; SUM_LEN]);
        hasher.update(after);
        match wanted == <[u8; 32]>::from(hasher.finalize()) {
            true => Ok(()),
            false => Err(BmapError::Damaged),
        }
    }

    fn number(&self, field: Field) -> Result<u64, BmapError> {
        let text = self.get(field).ok_or_else(|| missing(field))?;
        parse_number(text).ok_or_else(|| {
            BmapError::Value(format!("{} is no number: '{}'", field.name(), shown(text)))
        })
    }

    /// Makes the map, after all values agree.
    fn build(self, has_sums: bool, digest: [u8; 32]) -> Result<Bmap, BmapError> {
        let refused = |why: String| Err(BmapError::Value(why));
        let size = self.number(Field::ImageSize)?;
        let block = self.number(Field::BlockSize)?;
        let count = self.number(Field::BlocksCount)?;
        let mapped = self.number(Field::MappedBlocksCount)?;
        if size == 0 || size > MAX_SIZE {
            return refused(format!("no image has {size} bytes"));
        }
        if !BLOCK_SIZES.contains(&block) || !block.is_multiple_of(BLOCK_SIZES.start) {
            return refused(format!("no file system has blocks of {block} bytes"));
        }
        if count != size.div_ceil(block) {
            return refused(format!(
                "its image has {size} bytes, which are not {count} blocks of {block}"
            ));
        }
        if !self.has_map {
            return refused("it has no BlockMap".to_owned());
        }
        let (mut ranges, mut end, mut found) = (Vec::with_capacity(self.ranges.len()), 0, 0);
        for (blocks, sum) in self.ranges {
            let last = blocks.end - 1;
            if blocks.start < end || blocks.end > count {
                return refused(format!(
                    "the range of blocks {}-{last} is out of order, or outside the image",
                    blocks.start
                ));
            }
            if sum.is_some() && !has_sums {
                return refused("it has checksums, and does not say of which kind".to_owned());
            }
            end = blocks.end;
            found += blocks.end - blocks.start;
            // The last block may be cut short.
            let bytes = blocks.start * block..blocks.end.saturating_mul(block).min(size);
            ranges.push(BmapRange { bytes, sum });
        }
        match found == mapped {
            true => Ok(Bmap { image_size: size, block_size: block, ranges, digest }),
            false => refused(format!("it says that {mapped} blocks are mapped, and names {found}")),
        }
    }
}

fn missing(field: Field) -> BmapError {
    BmapError::Value(format!("it has no {}", field.name()))
}

/// Returns the value of the attribute `name`. The library compares each with all before it, which takes
/// long where there are very many; so only a few are taken.
fn attribute(start: &BytesStart<'_>, name: &str) -> Result<Option<String>, BmapError> {
    let mut found = None;
    for (at, attribute) in start.attributes().with_checks(false).enumerate() {
        let attribute = attribute.map_err(|error| BmapError::Syntax(shown(&error.to_string())))?;
        if at >= MAX_ATTRIBUTES {
            return Err(BmapError::Foreign("an element has too many attributes".to_owned()));
        }
        let key: &str = attribute.key.as_ref();
        if key == name {
            if found.is_some() {
                return Err(BmapError::Syntax(format!("the attribute '{name}' is there twice")));
            }
            found = Some(shown(attribute.value.trim_ascii()));
        }
    }
    Ok(found)
}

/// Parses `FIRST-LAST` or `FIRST`, numbers of blocks. The range that is returned ends after the last.
fn parse_blocks(text: &str) -> Option<Range<u64>> {
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    let (first, last) = (parse_number(first.trim_ascii())?, parse_number(last.trim_ascii())?);
    (first <= last).then_some(first..last.checked_add(1)?)
}

fn parse_number(text: &str) -> Option<u64> {
    text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse().ok()).flatten()
}

/// Parses a SHA-256 in hexadecimal digits.
fn parse_sum(text: &str) -> Result<[u8; 32], BmapError> {
    let bad = || BmapError::Value(format!("'{}' is no SHA-256", shown(text)));
    let mut sum = [0; 32];
    if text.len() != SUM_LEN {
        return Err(bad());
    }
    for (byte, digits) in sum.iter_mut().zip(text.as_bytes().chunks_exact(2)) {
        let digits = std::str::from_utf8(digits).ok();
        *byte = digits.and_then(|it| u8::from_str_radix(it, 16).ok()).ok_or_else(bad)?;
    }
    // `from_str_radix` takes a sign.
    match hex(&sum).eq_ignore_ascii_case(text) {
        true => Ok(sum),
        false => Err(bad()),
    }
}

/// Returns a beginning of a foreign text, on one line.
fn shown(text: &str) -> String {
    let mut end = text.len().min(MAX_TEXT);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    printable::line(text.get(..end).unwrap_or_default()).into_owned()
}

#[cfg(test)]
mod tests;
