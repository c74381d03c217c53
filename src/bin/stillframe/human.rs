//! Sizes, counts, ages and durations as text.

use std::time::Duration;

use jiff::Timestamp;
use jiff::tz::TimeZone;
use stillframe::SnapshotId;

/// How many hex digits of an id are shown to people: enough for a trillion snapshots.
const SHORT_ID_DIGITS: usize = 12;

/// The first digits of an id.
pub(crate) fn short(id: SnapshotId) -> String {
    let mut id = id.to_string();
    id.truncate(SHORT_ID_DIGITS);
    id
}

/// A size, such as `57.2 MiB`.
pub(crate) fn size(bytes: u64) -> String {
    const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    let (mut value, mut unit) = (bytes as f64 / 1024.0, 0);
    while value >= 999.5 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if value < 99.95 { format!("{value:.1} {}", UNITS[unit]) } else { format!("{value:.0} {}", UNITS[unit]) }
}

/// A count, such as `1,204`.
pub(crate) fn count(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// A count with its noun, such as `1 snapshot` or `12 snapshots`.
pub(crate) fn counted(number: u64, noun: &str) -> String {
    format!("{} {noun}{}", count(number), if number == 1 { "" } else { "s" })
}

/// `1 process` or `12 processes`.
pub(crate) fn processes(number: u64) -> String {
    format!("{} {}", count(number), if number == 1 { "process" } else { "processes" })
}

/// A duration, such as `35.1 ms`.
pub(crate) fn duration(duration: Duration) -> String {
    let seconds = duration.as_secs_f64();
    match seconds {
        _ if seconds < 0.001 => format!("{:.2} ms", seconds * 1e3),
        _ if seconds < 0.1 => format!("{:.1} ms", seconds * 1e3),
        _ if seconds < 0.9995 => format!("{:.0} ms", seconds * 1e3),
        _ if seconds < 60.0 => format!("{seconds:.1} s"),
        _ => format!("{} min {} s", duration.as_secs() / 60, duration.as_secs() % 60),
    }
}

/// How long ago something was, such as `5 min ago`; or when it will be, if a clock was wrong.
pub(crate) fn age(time: Timestamp, now: Timestamp) -> String {
    let seconds = now.duration_since(time).as_secs();
    let count = match seconds.abs() {
        0..=1 => return "just now".to_owned(),
        seconds @ 2..=119 => format!("{seconds} s"),
        seconds @ 120..=7_199 => format!("{} min", seconds / 60),
        seconds @ 7_200..=172_799 => format!("{} h", seconds / 3_600),
        seconds => format!("{} days", seconds / 86_400),
    };
    if seconds < 0 { format!("in {count}") } else { format!("{count} ago") }
}

/// A time in the time zone of this machine.
pub(crate) fn local_time(time: Timestamp) -> String {
    time.to_zoned(TimeZone::system()).strftime("%Y-%m-%d %H:%M:%S").to_string()
}

/// The time of day in the time zone of this machine.
pub(crate) fn time_of_day(time: Timestamp) -> String {
    time.to_zoned(TimeZone::system()).strftime("%H:%M:%S").to_string()
}

/// A ratio, such as `26.7 times`.
pub(crate) fn times(ratio: f64) -> String {
    if ratio < 99.95 { format!("{ratio:.1} times") } else { format!("{ratio:.0} times") }
}

/// Foreign text (a command line, a file name, a label) with control characters replaced: they could control the
/// terminal or make a name look like another.
pub(crate) fn plain(text: &str) -> String {
    stillframe::text::printable(text).into_owned()
}

/// The same for lines of text.
pub(crate) fn plain_lines(text: &str) -> String {
    text.split('\n').map(stillframe::text::printable).collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests {
    use jiff::SignedDuration;

    use super::*;

    #[test]
    fn sizes_have_two_or_three_digits_and_a_unit() {
        for (bytes, expected) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1.0 KiB"),
            (102_400, "100 KiB"),
            (1_023_500, "1.0 MiB"),
            (60_000_000, "57.2 MiB"),
            (u64::MAX, "16.0 EiB"),
        ] {
            assert_eq!(size(bytes), expected);
        }
    }

    #[test]
    fn counts_are_grouped_by_thousands() {
        for (number, expected) in
            [(0, "0"), (999, "999"), (1_000, "1,000"), (123_456, "123,456"), (1_234_567, "1,234,567")]
        {
            assert_eq!(count(number), expected);
        }
    }

    #[test]
    fn ages_and_durations_keep_to_one_unit_or_two() {
        let now = Timestamp::from_second(1_790_000_000).unwrap();
        for (seconds, expected) in [
            (-1, "just now"),
            (-200_000, "in 2 days"),
            (30, "30 s ago"),
            (150, "2 min ago"),
            (7_200, "2 h ago"),
            (200_000, "2 days ago"),
        ] {
            assert_eq!(age(now - SignedDuration::from_secs(seconds), now), expected);
        }
        for (micros, expected) in [
            (420, "0.42 ms"),
            (35_100, "35.1 ms"),
            (350_000, "350 ms"),
            (2_310_000, "2.3 s"),
            (200_000_000, "3 min 20 s"),
        ] {
            assert_eq!(duration(Duration::from_micros(micros)), expected);
        }
    }

    #[test]
    fn control_characters_never_reach_a_terminal() {
        assert_eq!(plain("a\x1b[2Jb\nc"), "a\u{fffd}[2Jb\u{fffd}c");
        assert_eq!(plain_lines("a\u{202e}b\nc"), "a\u{fffd}b\nc");
    }
}
