//! Units: the few numbers that must not be mixed up.
//!
//! Plain integers carry their unit in their name (`stored_bytes`, `first_region`). The two things
//! with rules of their own are types: [`RegionSize`] and [`AddressRange`].

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// The size of a region in bytes: a power of two from 512 bytes to 64 KiB.
///
/// It is chosen when a store is created and never changes.
///
/// ```
/// use stillframe::RegionSize;
/// let size = RegionSize::new(4096)?;
/// assert_eq!(size.bytes(), 4096);
/// assert_eq!(size.regions_in(4097), 2); // the last region is shorter
/// assert!(RegionSize::new(5000).is_err());
/// # Ok::<(), stillframe::units::UnitError>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "u32", into = "u32")]
pub struct RegionSize(u32);

impl RegionSize {
    /// The smallest region size, in bytes.
    pub const MIN_BYTES: u32 = 512;
    /// The largest region size, in bytes.
    pub const MAX_BYTES: u32 = 64 * 1024;

    /// A region size of `bytes`; an error unless it is a power of two from 512 to 65,536.
    pub fn new(bytes: u32) -> Result<Self, UnitError> {
        if bytes.is_power_of_two() && (Self::MIN_BYTES..=Self::MAX_BYTES).contains(&bytes) {
            Ok(RegionSize(bytes))
        } else {
            Err(UnitError::RegionSize { found_bytes: bytes })
        }
    }

    /// The size in bytes.
    pub fn bytes(self) -> usize {
        self.0 as usize
    }

    /// How many regions cover `length_bytes`; the last one may be shorter than a whole region.
    pub fn regions_in(self, length_bytes: u64) -> u64 {
        length_bytes.div_ceil(u64::from(self.0))
    }
}

impl Default for RegionSize {
    /// 16 KiB: `docs/design.md` says why.
    fn default() -> Self {
        RegionSize(16 * 1024)
    }
}

impl TryFrom<u32> for RegionSize {
    type Error = UnitError;
    fn try_from(bytes: u32) -> Result<Self, UnitError> {
        RegionSize::new(bytes)
    }
}

impl From<RegionSize> for u32 {
    fn from(size: RegionSize) -> u32 {
        size.0
    }
}

/// A half-open range of byte addresses, `start..end`, never empty and never backwards.
///
/// As text both ends are decimal, or hexadecimal after `0x`:
///
/// ```
/// use stillframe::AddressRange;
/// let range: AddressRange = "0x1000..8192".parse()?;
/// assert_eq!((range.start(), range.length_bytes()), (0x1000, 4096));
/// assert!("8192..0x1000".parse::<AddressRange>().is_err());
/// # Ok::<(), stillframe::units::UnitError>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "(u64, u64)", into = "(u64, u64)")]
pub struct AddressRange {
    start: u64,
    end: u64,
}

impl AddressRange {
    /// The range `start..end`; an error unless `start < end`.
    pub fn new(start: u64, end: u64) -> Result<Self, UnitError> {
        if start < end { Ok(AddressRange { start, end }) } else { Err(UnitError::EmptyRange { start, end }) }
    }

    /// The range of `length_bytes` from `start`; an error if it is empty or passes the last address.
    pub fn with_length(start: u64, length_bytes: u64) -> Result<Self, UnitError> {
        let end = start.checked_add(length_bytes).ok_or(UnitError::RangeOverflow { start, length_bytes })?;
        Self::new(start, end)
    }

    /// The first address.
    pub fn start(self) -> u64 {
        self.start
    }

    /// The address after the last one.
    pub fn end(self) -> u64 {
        self.end
    }

    /// How many bytes lie in the range.
    pub fn length_bytes(self) -> u64 {
        self.end - self.start
    }

    /// What both ranges share, if anything.
    pub fn intersection(self, other: AddressRange) -> Option<AddressRange> {
        AddressRange::new(self.start.max(other.start), self.end.min(other.end)).ok()
    }
}

impl fmt::Display for AddressRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}..{:#x}", self.start, self.end)
    }
}

impl FromStr for AddressRange {
    type Err = UnitError;
    fn from_str(text: &str) -> Result<Self, UnitError> {
        let unreadable = || UnitError::UnreadableRange { text: text.to_owned() };
        let (start, end) = text.split_once("..").ok_or_else(unreadable)?;
        let number = |digits: &str| match digits.strip_prefix("0x").or_else(|| digits.strip_prefix("0X")) {
            Some(hex) => u64::from_str_radix(hex, 16).map_err(|_| unreadable()),
            None => digits.parse().map_err(|_| unreadable()),
        };
        AddressRange::new(number(start)?, number(end)?)
    }
}

impl TryFrom<(u64, u64)> for AddressRange {
    type Error = UnitError;
    fn try_from((start, end): (u64, u64)) -> Result<Self, UnitError> {
        AddressRange::new(start, end)
    }
}

impl From<AddressRange> for (u64, u64) {
    fn from(range: AddressRange) -> (u64, u64) {
        (range.start, range.end)
    }
}

/// A number or a range that breaks a rule of its type.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum UnitError {
    /// Not a power of two from 512 to 65,536.
    #[error("a region size must be a power of two from 512 to 65536 bytes, found {found_bytes}")]
    RegionSize {
        /// What was given.
        found_bytes: u32,
    },
    /// The end is not after the start.
    #[error("an address range must end after it starts, found {start:#x}..{end:#x}")]
    EmptyRange {
        /// The start given.
        start: u64,
        /// The end given.
        end: u64,
    },
    /// Longer than what can be worked on at once.
    #[error(
        "expected an address range of at most {most_bytes} bytes, found {found_bytes} bytes; use a part of it"
    )]
    RangeTooLong {
        /// How long it is.
        found_bytes: u64,
        /// How long it may be.
        most_bytes: u64,
    },
    /// Start and length together pass the last 64-bit address.
    #[error("an address range of {length_bytes} bytes from {start:#x} passes the last 64-bit address")]
    RangeOverflow {
        /// The start given.
        start: u64,
        /// The length given.
        length_bytes: u64,
    },
    /// Not of the form `START..END`.
    #[error(
        "an address range is START..END, each a 64-bit number in decimal or in hexadecimal after 0x, found {text:?}"
    )]
    UnreadableRange {
        /// The text given.
        text: String,
    },
}

#[cfg(not(target_pointer_width = "64"))]
compile_error!(
    "stillframe needs a 64-bit target: offsets in files and addresses of other processes are used as lengths"
);

/// The same number as a `usize`, which has 64 bits on every target that this crate is built for.
#[allow(clippy::cast_possible_truncation)]
pub(crate) const fn usize_of(number: u64) -> usize {
    number as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_region_size_is_a_power_of_two_in_bounds() {
        for good in [512, 1024, 4096, 16384, 65536] {
            assert_eq!(RegionSize::new(good).unwrap().bytes(), good as usize);
        }
        for bad in [0, 1, 256, 513, 5000, 131_072, u32::MAX] {
            assert_eq!(RegionSize::new(bad), Err(UnitError::RegionSize { found_bytes: bad }));
        }
    }

    #[test]
    fn a_range_that_overflows_is_refused() {
        assert!(AddressRange::with_length(u64::MAX - 1, 2).is_err());
        assert!("0..18446744073709551616".parse::<AddressRange>().is_err());
        assert!("0x1..0x1".parse::<AddressRange>().is_err());
        assert!("-1..5".parse::<AddressRange>().is_err());
        assert!("12".parse::<AddressRange>().is_err());
    }
}
