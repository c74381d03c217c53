//! Parsers of option values: numbers, durations, labels, sizes.

use std::fmt::Display;
use std::str::FromStr;
use std::time::Duration;

use jiff::{Span, SpanRelativeTo};
use stillframe::RegionSize;

/// A number of seconds.
pub(crate) fn seconds(text: &str) -> Result<Duration, String> {
    let seconds: f64 =
        text.parse().map_err(|_| "expected a number of seconds, such as 5 or 0.5".to_owned())?;
    Duration::try_from_secs_f64(seconds)
        .map_err(|_| "expected a number of seconds from 0 to 1.8e19".to_owned())
}

/// A region size in bytes.
pub(crate) fn region_size(text: &str) -> Result<u32, String> {
    let bytes = text.parse().map_err(|_| "expected a number of bytes, such as 4096".to_owned())?;
    RegionSize::new(bytes).map(u32::from).map_err(|error| error.to_string())
}

/// A percentage of at least `least`.
pub(crate) fn percent(least: u8) -> impl Fn(&str) -> Result<u8, String> + Clone {
    move |text| whole_number(text, least, 100, "percentage")
}

/// A process id.
pub(crate) fn pid(text: &str) -> Result<u32, String> {
    whole_number(text, 1, u32::MAX, "pid")
}

/// A number of snapshots to keep.
pub(crate) fn keep_count(text: &str) -> Result<u32, String> {
    whole_number(text, 0, u32::MAX, "number of snapshots")
}

/// A number of snapshots to take.
pub(crate) fn capture_count(text: &str) -> Result<u64, String> {
    whole_number(text, 1, u64::MAX, "number of snapshots")
}

fn whole_number<T: FromStr + PartialOrd + Display>(
    text: &str,
    least: T,
    most: T,
    what: &str,
) -> Result<T, String> {
    let number = text.parse().ok().filter(|number| *number >= least && *number <= most);
    number.ok_or_else(|| format!("expected a {what} from {least} to {most}"))
}

/// A label.
pub(crate) fn label(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() && !value.is_empty() => Ok((key.to_owned(), value.to_owned())),
        _ => Err("expected KEY=VALUE, such as stage=ready".to_owned()),
    }
}

/// A label to set or to remove.
pub(crate) fn label_change(text: &str) -> Result<(String, Option<String>), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => {
            Ok((key.to_owned(), (!value.is_empty()).then(|| value.to_owned())))
        }
        _ => Err("expected KEY=VALUE to set a label, or KEY= to remove it".to_owned()),
    }
}

/// A duration such as `90s` or `7d`. A day has 24 hours; months have no fixed length.
pub(crate) fn duration(text: &str) -> Result<Duration, String> {
    let expected = "expected a duration such as 500ms, 2s, 1m, 12h or 7d";
    let span: Span = text.parse().map_err(|_| expected.to_owned())?;
    let duration = span
        .to_duration(SpanRelativeTo::days_are_24_hours())
        .map_err(|_| format!("{expected}; months and years have no fixed length"))?;
    Duration::try_from(duration).map_err(|_| format!("{expected}, and not a negative one"))
}

/// A duration of at least a millisecond.
pub(crate) fn interval(text: &str) -> Result<Duration, String> {
    match duration(text)? {
        short if short < Duration::from_millis(1) => Err("expected at least 1ms".to_owned()),
        interval => Ok(interval),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_read_as_people_write_them() {
        for (text, expected_ms) in
            [("500ms", 500), ("2s", 2_000), ("1m", 60_000), ("1h 30m", 5_400_000), ("7d", 604_800_000)]
        {
            assert_eq!(duration(text), Ok(Duration::from_millis(expected_ms)), "{text}");
        }
        for text in ["", "5", "soon", "-1s", "1 month"] {
            assert!(duration(text).is_err(), "{text}");
        }
        assert!(interval("0s").is_err());
    }

    #[test]
    fn a_number_out_of_its_range_is_refused_with_the_range() {
        assert_eq!((pid("7"), percent(1)("100"), keep_count("0")), (Ok(7), Ok(100), Ok(0)));
        for text in ["0", "-1", "", "x", "4294967296"] {
            assert_eq!(pid(text), Err("expected a pid from 1 to 4294967295".to_owned()), "{text}");
        }
        assert_eq!(percent(1)("0"), Err("expected a percentage from 1 to 100".to_owned()));
    }

    #[test]
    fn a_label_needs_a_key_and_only_a_change_may_lack_its_value() {
        assert_eq!(label("a=b=c"), Ok(("a".to_owned(), "b=c".to_owned())));
        assert_eq!(label_change("a="), Ok(("a".to_owned(), None)));
        assert!(label("a=").is_err() && label("=b").is_err() && label("ab").is_err());
        assert!(label_change("=b").is_err() && label_change("ab").is_err());
    }
}
