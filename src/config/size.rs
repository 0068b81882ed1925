//! The parsers and formatters of sizes and ranges: `64K`, `10MiB`, `1G..2G`. Units are powers of
//! 1024.

use std::ops::Range;

use super::SpecError;
use super::error::escaped;

/// Maximum size of a disk in bytes: the kernel's file offsets are signed 64-bit numbers.
pub const MAX_SIZE: u64 = i64::MAX.unsigned_abs();

/// Returns whether a layer may have blocks of `size` bytes: a power of two from 512, the smallest
/// sector, to 2 MiB, the largest page and qcow2's largest cluster.
#[must_use]
pub fn is_block_size(size: u32) -> bool {
    size.is_power_of_two() && (512..=2 << 20).contains(&size)
}

/// Letters of the units, each 1024 times the one before it.
const UNITS: &str = "KMGTPE";

/// The syntax of a size, for messages.
const SIZE_HINT: &str = "write digits and a unit, as in 512, 64K, 10M or 10MiB";

/// Parses a size in bytes: digits, followed by nothing, one of `K M G T P E`, or `KiB` to `EiB`;
/// upper or lower case.
///
/// # Errors
/// [`SpecError::Size`] for any other text: a decimal unit (`10MB`), a negative number, a fraction,
/// or more than [`MAX_SIZE`].
pub fn parse_size(text: &str) -> Result<u64, SpecError> {
    parse_bytes(text).map_err(|why| SpecError::Size { given: escaped(text), why })
}

/// Parses a size like [`parse_size`], but fails with the bare reason.
fn parse_bytes(text: &str) -> Result<u64, String> {
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at(digits);
    if unit.starts_with('-') && number.is_empty() {
        return Err("it cannot be negative".to_owned());
    }
    // `.5G`, `1.5G`, and the decimal comma of many countries.
    if unit.starts_with(['.', ',']) {
        return Err("it must be whole: take a smaller unit, 1536M for 1.5G".to_owned());
    }
    if number.is_empty() {
        return Err(SIZE_HINT.to_owned());
    }
    let shift = unit_shift(unit).ok_or_else(|| unit_hint(number, unit))?;
    // The text is all digits, so `parse` fails only for a number that does not fit.
    let bytes = number.parse::<u64>().ok().and_then(|n| n.checked_mul(1 << shift));
    bytes
        .filter(|bytes| *bytes <= MAX_SIZE)
        .ok_or_else(|| format!("it is too large, the most is {MAX_SIZE} bytes (8E less one)"))
}

/// Returns the number of bits that a unit shifts by; `None` for an unknown unit.
fn unit_shift(unit: &str) -> Option<u32> {
    let mut chars = unit.chars();
    let Some(letter) = chars.next() else {
        return Some(0);
    };
    let rest = chars.as_str();
    let is_binary = rest.is_empty() || rest.eq_ignore_ascii_case("iB");
    let place = UNITS.chars().zip(1..).find(|(known, _)| known.eq_ignore_ascii_case(&letter));
    place.filter(|_| is_binary).map(|(_, power)| 10 * power)
}

/// Says what to write instead of `number` with an unknown `unit`.
fn unit_hint(number: &str, unit: &str) -> String {
    match unit.strip_suffix(['B', 'b']) {
        Some("") => format!("write {number} for bytes"),
        Some(letter) if letter.len() == 1 && unit_shift(letter).is_some() => {
            let letter = letter.to_ascii_uppercase();
            format!("units are powers of 1024, write {number}{letter} or {number}{letter}iB")
        }
        _ => SIZE_HINT.to_owned(),
    }
}

/// Parses a range of bytes: `1G..2G`, `..2G` from the start, or `1G..` to the end. The end is then
/// [`MAX_SIZE`], since the disk is not known here.
///
/// # Errors
/// [`SpecError::Range`] for a range that is empty, backwards or malformed; the error of
/// [`parse_size`] for a bad end of the range.
pub fn parse_range(text: &str) -> Result<Range<u64>, SpecError> {
    let refused = |why: &str| SpecError::Range { given: escaped(text), why: why.to_owned() };
    let inside = |error: SpecError| error.within(format!("range '{}'", escaped(text)));
    let Some((start, end)) = text.split_once("..") else {
        return Err(refused("write START..END, as in 1G..2G, ..2G or 1G.."));
    };
    if start.is_empty() && end.is_empty() {
        return Err(refused("write one end at least, or no range at all for the whole disk"));
    }
    let start = if start.is_empty() { 0 } else { parse_size(start).map_err(inside)? };
    let end = if end.is_empty() { MAX_SIZE } else { parse_size(end).map_err(inside)? };
    match start.cmp(&end) {
        std::cmp::Ordering::Less => Ok(start..end),
        std::cmp::Ordering::Equal => Err(refused("it is empty, the end comes after the last byte")),
        std::cmp::Ordering::Greater => Err(refused("it ends before it starts, swap the two")),
    }
}

/// Formats a size for people, rounded to a tenth of the unit: `20 GiB`, `1.5 MiB`, `512 bytes`.
#[must_use]
pub fn format_size(bytes: u64) -> String {
    match bytes {
        1 => return "1 byte".to_owned(),
        0..1024 => return format!("{bytes} bytes"),
        _ => {}
    }
    let mut text = String::new();
    for (unit, power) in UNITS.chars().zip(1..) {
        let unit_size = 1_u128 << (10 * power);
        let tenths = (u128::from(bytes) * 10 + unit_size / 2) / unit_size;
        text = match (tenths / 10, tenths % 10) {
            (whole, 0) => format!("{whole} {unit}iB"),
            (whole, tenth) => format!("{whole}.{tenth} {unit}iB"),
        };
        // Compare the rounded value: a byte less than 1 MiB is "1 MiB", not "1024 KiB".
        if tenths < 10_240 {
            break;
        }
    }
    text
}

/// Formats the number of zeroed bytes as a suffix, ` (and 20 GiB zeroed)`; empty for 0.
#[must_use]
pub fn format_zeroed(bytes: u64) -> String {
    if bytes == 0 { String::new() } else { format!(" (and {} zeroed)", format_size(bytes)) }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn why(text: &str) -> String {
        parse_size(text).unwrap_err().to_string()
    }

    #[test]
    fn units_are_powers_of_1024() {
        for (text, bytes) in [
            ("0", 0),
            ("512", 512),
            ("0512", 512),
            ("64K", 64 << 10),
            ("64k", 64 << 10),
            ("64KiB", 64 << 10),
            ("10M", 10 << 20),
            ("10MiB", 10 << 20),
            ("10mib", 10 << 20),
            ("2G", 2 << 30),
            ("2GiB", 2 << 30),
            ("1T", 1 << 40),
            ("3TiB", 3 << 40),
            ("1P", 1 << 50),
            ("1PiB", 1 << 50),
            ("7E", 7 << 60),
            ("7EiB", 7 << 60),
            ("0E", 0),
            ("9223372036854775807", MAX_SIZE),
        ] {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
    }

    #[test]
    fn decimal_unit_error_gives_both_binary_spellings() {
        assert_eq!(
            why("10MB"),
            "'10MB' is not a size: units are powers of 1024, write 10M or 10MiB"
        );
        assert_eq!(why("3kb"), "'3kb' is not a size: units are powers of 1024, write 3K or 3KiB");
        assert_eq!(why("512B"), "'512B' is not a size: write 512 for bytes");
    }

    #[test]
    fn fractions_and_negative_sizes_are_refused() {
        for text in ["1.5G", ".5G", "1,5G", "1."] {
            assert!(why(text).contains("must be whole"), "{text}");
        }
        assert!(why("-1").contains("cannot be negative"));
        assert!(why("-1G").contains("cannot be negative"));
    }

    #[test]
    fn sizes_past_the_largest_file_offset_are_refused() {
        for text in ["8E", "16E", "9223372036854775808", "18446744073709551616", "9999999T"] {
            assert!(why(text).contains("too large"), "{text}");
        }
        assert!(why(&"9".repeat(4000)).contains("too large"));
    }

    #[test]
    fn malformed_size_error_gives_examples() {
        for text in ["", " ", "K", "+1", "10 M", " 10", "10Q", "10MiBs", "0x10", "1e3", "10Mi"] {
            assert!(why(text).contains("as in 512, 64K"), "{text:?}: {}", why(text));
        }
        for text in ["10ı", "1ſ", "10İB", "1😀", "😀", "１K"] {
            assert!(parse_size(text).is_err(), "{text:?}");
        }
    }

    #[test]
    fn range_may_omit_one_end() {
        assert_eq!(parse_range("1G..2G"), Ok(1 << 30..2 << 30));
        assert_eq!(parse_range("..2G"), Ok(0..2 << 30));
        assert_eq!(parse_range("1G.."), Ok(1 << 30..MAX_SIZE));
        assert_eq!(parse_range("0..1"), Ok(0..1));
    }

    #[test]
    fn empty_or_malformed_range_is_refused() {
        for text in ["", "..", "1G..1G", "..0", "2G..1G", "1G", "1G-2G", "1G...2G", "1G..=2G"] {
            assert!(parse_range(text).is_err(), "{text:?}");
        }
        assert!(parse_range("2G..1G").unwrap_err().to_string().contains("ends before it starts"));
        assert_eq!(
            parse_range("1GB..2G").unwrap_err().to_string(),
            "range '1GB..2G': '1GB' is not a size: units are powers of 1024, write 1G or 1GiB"
        );
    }

    #[test]
    fn sizes_are_rounded_to_a_tenth() {
        for (bytes, text) in [
            (0, "0 bytes"),
            (1, "1 byte"),
            (512, "512 bytes"),
            (1023, "1023 bytes"),
            (1024, "1 KiB"),
            (1536, "1.5 KiB"),
            (3 << 19, "1.5 MiB"),
            ((1 << 20) - 1, "1 MiB"),
            (1000 << 20, "1000 MiB"),
            (20 << 30, "20 GiB"),
            ((20 << 30) + 1, "20 GiB"),
            (MAX_SIZE, "8 EiB"),
            (u64::MAX, "16 EiB"),
        ] {
            assert_eq!(format_size(bytes), text, "{bytes}");
        }
    }

    proptest! {
        #[test]
        fn size_in_any_unit_is_parsed(
            number in 0_u64..=MAX_SIZE, power in 0_usize..=6, long: bool,
        ) {
            let number = number >> (10 * power);
            let mut text = number.to_string();
            if power > 0 {
                text.push_str(&UNITS[power - 1..power]);
                text.push_str(if long { "iB" } else { "" });
            }
            prop_assert_eq!(parse_size(&text), Ok(number << (10 * power)));
        }

        #[test]
        fn formatted_size_parses_back_nearly(bytes in 0..=MAX_SIZE, shift in 0_u32..63) {
            let shown = format_size(bytes >> shift);
            let tight = shown.replace(" bytes", "").replace(" byte", "").replace(' ', "");
            if let Ok(read) = parse_size(&tight) {
                // Rounding loses at most half a tenth of the unit: under 5 % of the number.
                prop_assert!(read.abs_diff(bytes >> shift) <= (bytes >> shift) / 20 + 1);
            }
        }

        #[test]
        fn parser_survives_any_text(text in "\\PC*|[0-9.,\\-+KMGTPEiBb]{0,24}|(?s:.{0,9})") {
            for error in [parse_size(&text).err(), parse_range(&text).err()].into_iter().flatten() {
                prop_assert!(!error.to_string().contains('\n'));
            }
            if let Ok(range) = parse_range(&text) {
                prop_assert!(range.start < range.end && range.end <= MAX_SIZE);
            }
        }

        #[test]
        fn formatted_size_is_short_for_every_number(bytes: u64) {
            prop_assert!(format_size(bytes).len() <= "1023.9 KiB".len());
        }
    }
}
