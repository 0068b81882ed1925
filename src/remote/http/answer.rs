//! The heads of answers: which range of which version of an image follows. Pure.

use std::ops::Range;
use std::time::{Duration, SystemTime};

use jiff::Timestamp;
use jiff::fmt::rfc2822::DateTimeParser;
use reqwest::header::{
    CACHE_CONTROL, CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, ETAG, HeaderMap,
    HeaderName, LAST_MODIFIED, RETRY_AFTER,
};

use super::error::{HttpError, shown};

/// The longest ETag that is kept, in characters; a version with a longer one is known by its samples.
const MAX_ETAG: usize = 256;

/// A version of an image, as the server names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Version {
    /// The size in bytes.
    pub(super) size: u64,
    /// The ETag, strong or weak.
    etag: Option<String>,
    last_modified: Option<String>,
}

impl Version {
    /// Reads the version from the head of an answer about an image of `size` bytes.
    pub(super) fn new(headers: &HeaderMap, size: u64) -> Self {
        let etag = text(headers, ETAG).filter(|etag| etag.len() <= MAX_ETAG);
        Self {
            size,
            etag: etag.map(str::to_owned),
            last_modified: text(headers, LAST_MODIFIED).map(str::to_owned),
        }
    }

    /// Returns the ETag by which every byte of the version is known (RFC 9110, 8.8.3).
    pub(super) fn strong_etag(&self) -> Option<&str> {
        self.etag
            .as_deref()
            .filter(|etag| etag.len() >= 2 && etag.starts_with('"') && etag.ends_with('"'))
    }

    /// Returns the time of the last modification in seconds since 1970.
    pub(super) fn modified(&self) -> Option<i64> {
        Some(date(self.last_modified.as_deref()?)?.as_second())
    }

    /// Compares an answer with this version.
    ///
    /// # Errors
    /// [`HttpError::Changed`]; [`HttpError::NoVersion`] when the answer does not tell.
    pub(super) fn check(&self, headers: &HeaderMap, size: Option<u64>) -> Result<(), HttpError> {
        if let Some(size) = size.filter(|size| *size != self.size) {
            let text = format!("it had {} bytes, and now has {size}", self.size);
            return Err(HttpError::Changed(text));
        }
        let changed = |what: &str, was: &str, now: &str| {
            Err(HttpError::Changed(format!(
                "its {what} was {}, and now is {}",
                shown(was),
                shown(now)
            )))
        };
        match (&self.etag, text(headers, ETAG)) {
            (Some(was), Some(now)) if was != now => return changed("ETag", was, now),
            (Some(_), None) => return Err(HttpError::NoVersion),
            _ => {}
        }
        // A 206 need not repeat it (RFC 9110, 15.3.7).
        match (&self.last_modified, text(headers, LAST_MODIFIED)) {
            (Some(was), Some(now)) if was != now && self.strong_etag().is_none() => {
                changed("Last-Modified", was, now)
            }
            _ => Ok(()),
        }
    }
}

/// A `Content-Range` (RFC 9110, 14.4).
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct ContentRange {
    /// The range in bytes; `None` where it cannot be had.
    pub(super) range: Option<Range<u64>>,
    /// The size of the whole in bytes, where the server says it.
    pub(super) size: Option<u64>,
}

impl ContentRange {
    /// Parses `bytes FIRST-LAST/SIZE`, where `*` stands for what is not known.
    pub(super) fn parse(value: &str) -> Option<Self> {
        let (unit, rest) = value.trim().split_once(' ')?;
        let (range, size) = rest.trim_start().split_once('/')?;
        if !unit.eq_ignore_ascii_case("bytes") {
            return None;
        }
        let size = if size == "*" { None } else { Some(number(size)?) };
        let range = match range {
            "*" => None,
            range => {
                let (first, last) = range.split_once('-')?;
                let (first, last) = (number(first)?, number(last)?);
                let end = last.checked_add(1)?;
                (first < end && size.is_none_or(|size| end <= size)).then_some(first..end)?.into()
            }
        };
        Some(Self { range, size })
    }

    /// Reads that of an answer.
    ///
    /// # Errors
    /// [`HttpError::WrongRange`] when there is none, or one that no range has.
    pub(super) fn of(headers: &HeaderMap) -> Result<Self, HttpError> {
        let wrong = |text: String| HttpError::WrongRange(text);
        let value = text(headers, CONTENT_RANGE);
        let value = value.ok_or_else(|| wrong("it has no Content-Range".to_owned()))?;
        Self::parse(value).ok_or_else(|| wrong(format!("its Content-Range is '{}'", shown(value))))
    }

    /// Makes sure that it is `asked`, or what of that is inside the size.
    ///
    /// # Errors
    /// [`HttpError::WrongRange`].
    pub(super) fn check(&self, asked: &Range<u64>) -> Result<(), HttpError> {
        let end = self.size.map_or(asked.end, |size| asked.end.min(size));
        match &self.range {
            Some(range) if *range == (asked.start..end) => Ok(()),
            Some(range) => Err(HttpError::WrongRange(format!(
                "bytes {}-{} for {}-{}",
                range.start,
                range.end - 1,
                asked.start,
                end.saturating_sub(1),
            ))),
            None => Err(HttpError::WrongRange("none".to_owned())),
        }
    }
}

/// Makes sure that the bytes that follow are those of the image, and `len` of them as far as the head
/// says.
///
/// # Errors
/// [`HttpError::Encoded`], [`HttpError::WrongRange`].
pub(super) fn check_body(headers: &HeaderMap, len: u64) -> Result<(), HttpError> {
    check_encoding(headers)?;
    match text(headers, CONTENT_LENGTH) {
        Some(said) if number(said) != Some(len) => {
            let said = shown(said);
            Err(HttpError::WrongRange(format!("its Content-Length is {said}, for {len} bytes")))
        }
        _ => Ok(()),
    }
}

/// Makes sure that the server does not compress what it sends.
///
/// # Errors
/// [`HttpError::Encoded`].
pub(super) fn check_encoding(headers: &HeaderMap) -> Result<(), HttpError> {
    let encodings = headers.get_all(CONTENT_ENCODING).iter();
    for encoding in encodings.map(|value| String::from_utf8_lossy(value.as_bytes())) {
        if !encoding.trim().eq_ignore_ascii_case("identity") && !encoding.trim().is_empty() {
            return Err(HttpError::Encoded(shown(&encoding)));
        }
    }
    Ok(())
}

/// Whether the answer has no bytes at all.
pub(super) fn is_empty(headers: &HeaderMap) -> bool {
    text(headers, CONTENT_LENGTH).and_then(number) == Some(0)
}

/// Whether the answer calls itself a web page.
pub(super) fn is_web_page(headers: &HeaderMap) -> bool {
    let kind = text(headers, CONTENT_TYPE).unwrap_or_default();
    let kind = kind.split(';').next().unwrap_or_default().trim();
    kind.eq_ignore_ascii_case("text/html") || kind.eq_ignore_ascii_case("application/xhtml+xml")
}

/// Returns for how long the server asks to be left alone.
pub(super) fn retry_after(headers: &HeaderMap, now: SystemTime) -> Option<Duration> {
    let value = text(headers, RETRY_AFTER)?.trim();
    if let Some(seconds) = number(value) {
        return Some(Duration::from_secs(seconds));
    }
    let until = SystemTime::from(date(value)?);
    Some(until.duration_since(now).unwrap_or_default())
}

/// Returns for how long a redirect may be reused by what it says itself.
pub(super) fn max_age(headers: &HeaderMap) -> Option<Duration> {
    let parts = text(headers, CACHE_CONTROL)?.split(',');
    let ages = parts.filter_map(|part| {
        let (name, seconds) = part.trim().split_once('=')?;
        let is_age = name.eq_ignore_ascii_case("max-age");
        is_age.then(|| number(seconds.trim_matches('"'))).flatten()
    });
    ages.min().map(Duration::from_secs)
}

/// Returns a header that is text.
fn text(headers: &HeaderMap, name: HeaderName) -> Option<&str> {
    headers.get(name)?.to_str().ok()
}

/// Parses a decimal number without a sign.
fn number(text: &str) -> Option<u64> {
    let is_number = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    if is_number { text.parse().ok() } else { None }
}

/// Parses a date of HTTP, in the form that servers write (RFC 9110, 5.6.7).
fn date(text: &str) -> Option<Timestamp> {
    DateTimeParser::new().parse_timestamp(text).ok()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use reqwest::header::HeaderValue;

    use super::*;

    fn headers(lines: &[(&'static str, &str)]) -> HeaderMap {
        let line = |(name, value): &(&'static str, &str)| {
            (HeaderName::from_static(name), HeaderValue::from_str(value).unwrap())
        };
        lines.iter().map(line).collect()
    }

    proptest! {
        #[test]
        fn a_content_range_is_what_was_written(first in 0_u64..1 << 62, len in 1_u64..1 << 62, more: u32, has_size: bool) {
            let end = first + len;
            let size = has_size.then(|| end + u64::from(more));
            let total = size.map_or("*".to_owned(), |size| size.to_string());
            let parsed = ContentRange::parse(&format!("bytes {first}-{}/{total}", end - 1)).unwrap();
            prop_assert_eq!(&parsed, &ContentRange { range: Some(first..end), size });
            prop_assert!(parsed.check(&(first..end)).is_ok());
            prop_assert!(parsed.check(&(first..end + 1)).is_err() || size == Some(end));
            prop_assert!(parsed.check(&(first + 1..end + 1)).is_err());
        }

        #[test]
        fn any_text_is_a_range_inside_its_size_or_none(text in "(bytes )?[-0-9*/ ]{0,30}") {
            let found = ContentRange::parse(&text).map(|found| (found.range, found.size));
            if let Some((Some(range), size)) = found {
                prop_assert!(range.start < range.end);
                prop_assert!(size.is_none_or(|size| range.end <= size));
            }
        }
    }

    #[test]
    fn what_is_no_content_range_is_refused() {
        for text in [
            "",
            "bytes",
            "bytes 0-5",
            "bytes 0-5/5",
            "bytes 5-4/10",
            "bytes -5/10",
            "bytes 0-/10",
            "bytes 0-5/-1",
            "bytes +0-5/10",
            "lines 0-5/10",
            "bytes 0-18446744073709551615/*",
            "bytes 0-5/99999999999999999999",
            "bytes=0-5/10",
        ] {
            assert_eq!(ContentRange::parse(text), None, "{text}");
        }
        let whole = ContentRange::parse("BYTES */77").unwrap();
        assert_eq!((whole.range.clone(), whole.size), (None, Some(77)));
        assert!(whole.check(&(0..5)).is_err());
        // What was asked for reaches past the end.
        assert!(ContentRange::parse("bytes 0-9/10").unwrap().check(&(0..65_536)).is_ok());
        assert!(ContentRange::parse("bytes 0-8/10").unwrap().check(&(0..65_536)).is_err());
    }

    #[test]
    fn a_version_is_noticed_by_what_the_server_names() {
        let modified = ("last-modified", "Sun, 06 Nov 1994 08:49:37 GMT");
        let other = ("last-modified", "Sun, 06 Nov 1994 08:49:38 GMT");
        let strong = Version::new(&headers(&[("etag", "\"a\""), modified]), 9);
        assert_eq!((strong.strong_etag(), strong.modified()), (Some("\"a\""), Some(784_111_777)));
        assert_eq!(strong.check(&headers(&[("etag", "\"a\"")]), Some(9)), Ok(()));
        // With a strong ETag another time is only another copy.
        assert_eq!(strong.check(&headers(&[("etag", "\"a\""), other]), None), Ok(()));
        assert_eq!(strong.check(&headers(&[modified]), Some(9)), Err(HttpError::NoVersion));
        let changed = |version: &Version, lines: &[(&'static str, &str)], size| {
            version.check(&headers(lines), size).unwrap_err().to_string()
        };
        assert!(
            changed(&strong, &[("etag", "\"b\"")], Some(9)).contains("was \"a\", and now is \"b\"")
        );
        assert!(changed(&strong, &[("etag", "\"a\"")], Some(8)).contains("9 bytes, and now has 8"));
        let weak = Version::new(&headers(&[("etag", "W/\"a\""), modified]), 9);
        assert_eq!(weak.strong_etag(), None);
        assert!(changed(&weak, &[("etag", "W/\"a\""), other], None).contains("Last-Modified"));
        assert!(changed(&weak, &[("etag", "W/\"b\"")], None).contains("ETag"));
        let unnamed = Version::new(&headers(&[]), 9);
        assert_eq!(unnamed.check(&headers(&[other]), Some(9)), Ok(()));
        for none in ["a", "\"", "", &format!("\"{}\"", "x".repeat(300))] {
            assert_eq!(Version::new(&headers(&[("etag", none)]), 1).strong_etag(), None);
        }
    }

    #[test]
    fn only_the_bytes_of_the_image_are_taken() {
        assert_eq!(check_body(&headers(&[("content-length", "5")]), 5), Ok(()));
        assert_eq!(check_body(&headers(&[("content-encoding", "identity")]), 5), Ok(()));
        for bad in [
            [("content-encoding", "gzip")],
            [("content-encoding", "identity, br")],
            [("content-length", "6")],
            [("content-length", "-5")],
        ] {
            assert!(check_body(&headers(&bad), 5).is_err(), "{bad:?}");
        }
        assert!(is_web_page(&headers(&[("content-type", "Text/HTML; charset=utf-8")])));
        assert!(!is_web_page(&headers(&[("content-type", "application/octet-stream")])));
    }

    #[test]
    fn a_server_may_ask_for_a_pause() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(784_111_777);
        let asked = |value: &str| retry_after(&headers(&[("retry-after", value)]), now);
        assert_eq!(asked("7"), Some(Duration::from_secs(7)));
        assert_eq!(asked("Sun, 06 Nov 1994 08:49:47 GMT"), Some(Duration::from_secs(10)));
        assert_eq!(asked("Sun, 06 Nov 1994 08:49:27 GMT"), Some(Duration::ZERO));
        assert_eq!((asked("-1"), asked("soon")), (None, None));
        let age = |value: &str| max_age(&headers(&[("cache-control", value)]));
        assert_eq!(age("private, Max-Age=60"), Some(Duration::from_secs(60)));
        assert_eq!((age("no-store"), age("max-age=x")), (None, None));
    }
}
