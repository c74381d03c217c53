//! How the reports of the operations are serialized.
//!
//! The keys and the form of the values are the JSON of the command, on which scripts depend:
//! durations are milliseconds, ids and times are text, bytes are hex digits.

use std::fmt::Display;
use std::time::Duration;

use serde::ser::SerializeSeq;
use serde::{Serialize, Serializer};

use crate::units::AddressRange;

/// A duration in milliseconds, with microsecond precision.
pub(crate) fn milliseconds<S: Serializer>(duration: &Duration, to: S) -> Result<S::Ok, S::Error> {
    in_milliseconds(duration).serialize(to)
}

/// Like `milliseconds`, with `None` as null.
pub(crate) fn optional_milliseconds<S: Serializer>(
    duration: &Option<Duration>,
    to: S,
) -> Result<S::Ok, S::Error> {
    duration.as_ref().map(in_milliseconds).serialize(to)
}

/// A displayable value, as text.
pub(crate) fn text<T: Display, S: Serializer>(value: &T, to: S) -> Result<S::Ok, S::Error> {
    to.collect_str(value)
}

/// Like `text`, with `None` as null.
pub(crate) fn optional_text<T: Display, S: Serializer>(value: &Option<T>, to: S) -> Result<S::Ok, S::Error> {
    value.as_ref().map(T::to_string).serialize(to)
}

/// A list of texts.
pub(crate) fn texts<T: Display, S: Serializer>(values: &[T], to: S) -> Result<S::Ok, S::Error> {
    let mut list = to.serialize_seq(Some(values.len()))?;
    for value in values {
        list.serialize_element(&value.to_string())?;
    }
    list.end()
}

/// Bytes as hex digits, or null.
pub(crate) fn optional_hex<S: Serializer>(bytes: &Option<Vec<u8>>, to: S) -> Result<S::Ok, S::Error> {
    let digits = |bytes: &Vec<u8>| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    bytes.as_ref().map(digits).serialize(to)
}

/// Address ranges, each as an object with `start` and `end`.
pub(crate) fn ranges<S: Serializer>(ranges: &[AddressRange], to: S) -> Result<S::Ok, S::Error> {
    #[derive(Serialize)]
    struct Bounds {
        start: u64,
        end: u64,
    }
    let mut list = to.serialize_seq(Some(ranges.len()))?;
    for range in ranges {
        list.serialize_element(&Bounds { start: range.start(), end: range.end() })?;
    }
    list.end()
}

fn in_milliseconds(duration: &Duration) -> f64 {
    // Microseconds in an f64 are exact for 285 years.
    duration.as_micros() as f64 / 1e3
}
