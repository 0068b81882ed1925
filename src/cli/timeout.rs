//! The time in `--timeout T`.

use std::time::Duration;

use jiff::SignedDuration;

/// Longest accepted time: over a year, which is practically unlimited and fits into every clock.
const MAX_TIMEOUT: Duration = Duration::from_hours(10_000);

/// Parses `10`, `10s`, `500ms`, `2m`, `1h30m`; a number without a unit is in seconds.
///
/// # Errors
/// A line for the user with valid forms.
pub(super) fn parse(text: &str) -> Result<Duration, String> {
    let time = if text.bytes().all(|byte| byte.is_ascii_digit()) {
        text.parse().ok().map(Duration::from_secs)
    } else {
        text.parse().ok().and_then(|time: SignedDuration| Duration::try_from(time).ok())
    };
    time.filter(|time| *time <= MAX_TIMEOUT)
        .ok_or_else(|| format!("'{text}' is not a time: write seconds, or 500ms, 10s, 2m, 1h"))
}

/// Returns the whole milliseconds in `time`, as requests have them.
pub(super) fn to_millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
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
        assert_eq!(seconds("1h30m"), 5400.0);
    }

    #[test]
    fn malformed_time_error_gives_examples() {
        for text in [
            "",
            "s",
            "-1",
            "1.5",
            "10d",
            "10001h",
            "-1s",
            "99999999999h",
            "+1",
            "99999999999999999999",
            "١",
        ] {
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
