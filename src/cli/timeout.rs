//! The time in `--timeout T`.

use std::time::Duration;

/// Parses `10`, `10s`, `500ms`, `2m` or `1h`; a number without a unit is in seconds.
///
/// # Errors
/// A line for the user with valid forms.
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
    // A limit of 10,000 hours, over a year, is practically unlimited, and fits into every clock.
    let limit = 10_000 * 3_600_000;
    let total = number.checked_mul(milliseconds).filter(|ms| *ms <= limit);
    total.map(Duration::from_millis).ok_or_else(refused)
}

/// Formats a time for people: `10 s`, `500 ms`.
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
    fn time_without_a_unit_is_in_seconds() {
        let seconds = |text: &str| parse(text).unwrap().as_secs_f64();
        assert_eq!(seconds("10"), 10.0);
        assert_eq!(seconds("10s"), 10.0);
        assert_eq!(seconds("2m"), 120.0);
        assert_eq!(seconds("1h"), 3600.0);
        assert_eq!(seconds("500ms"), 0.5);
        assert_eq!(seconds("0"), 0.0);
    }

    #[test]
    fn malformed_time_error_gives_examples() {
        for text in ["", "s", "-1", "1.5", "10 s", "10d", "99999999999h", "+1", "١"] {
            let line = parse(text).unwrap_err();
            assert!(line.contains("write seconds"), "{line}");
        }
    }

    #[test]
    fn time_is_formatted_in_seconds_or_milliseconds() {
        assert_eq!(format_timeout(Duration::from_secs(60)), "60 s");
        assert_eq!(format_timeout(Duration::from_millis(500)), "500 ms");
    }

    proptest! {
        #[test]
        fn parser_survives_any_text(text: String) {
            let _ = parse(&text);
        }
    }
}
