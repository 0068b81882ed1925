//! `--timeout T`: a time for people.

use std::time::Duration;

/// Reads `10`, `10s`, `500ms`, `2m` or `1h`; without a unit it is seconds.
///
/// # Errors
/// A line that says what to write.
pub(super) fn parse(text: &str) -> Result<Duration, String> {
    let refused = || format!("'{text}' is not a time: write seconds, or 500ms, 10s, 2m, 1h");
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at(digits);
    let number: u64 = number.parse().map_err(|_| refused())?;
    let milliseconds = match unit {
        "ms" => 1,
        "" | "s" => 1000,
        "m" => 60_000,
        "h" => 3_600_000,
        _ => return Err(refused()),
    };
    // A year and a half is for ever, and still fits into every clock.
    let limit = 10_000 * 3_600_000;
    let total = number.checked_mul(milliseconds).filter(|ms| *ms <= limit);
    total.map(Duration::from_millis).ok_or_else(refused)
}

/// A time as [`parse`] reads it: `10 s`, `500 ms`.
pub(super) fn format_timeout(time: Duration) -> String {
    match time.subsec_millis() {
        0 => format!("{} s", time.as_secs()),
        _ => format!("{} ms", time.as_millis()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_time_has_a_unit_or_is_in_seconds() {
        let seconds = |text: &str| parse(text).unwrap().as_secs_f64();
        assert_eq!(seconds("10"), 10.0);
        assert_eq!(seconds("10s"), 10.0);
        assert_eq!(seconds("2m"), 120.0);
        assert_eq!(seconds("1h"), 3600.0);
        assert_eq!(seconds("500ms"), 0.5);
        assert_eq!(seconds("0"), 0.0);
    }

    #[test]
    fn what_is_no_time_is_refused_with_an_example() {
        for text in ["", "s", "-1", "1.5", "10 s", "10d", "99999999999h", "+1", "١"] {
            let line = parse(text).unwrap_err();
            assert!(line.contains("write seconds"), "{line}");
        }
    }

    #[test]
    fn a_time_is_shown_in_its_natural_unit() {
        assert_eq!(format_timeout(Duration::from_secs(60)), "60 s");
        assert_eq!(format_timeout(Duration::from_millis(500)), "500 ms");
    }

    proptest! {
        #[test]
        fn no_text_panics(text: String) {
            let _ = parse(&text);
        }
    }
}
