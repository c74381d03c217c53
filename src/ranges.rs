//! Ranges: a set of bytes, as the ranges that they form.
//!
//! ```text
//! given      5..9  1..3  8..12  3..4  7..7
//! kept       1..4  5..12
//! ```
//!
//! The ranges of a [`Ranges`] are in ascending order, none is empty, and none overlaps or touches the next one. So
//! two of them are equal exactly if they have the same bytes, a search takes logarithmic time, and each operation on
//! two of them passes over both once. The unit tests compare each operation with sets of single bytes.

use std::ops::{Deref, Range};

use crate::units::AddressRange;

/// A set of bytes as ranges: in ascending order, none empty, and none overlaps or touches the next one.
///
/// Whether the numbers are addresses or offsets in a mapping depends on where it is used. It is collected from
/// ranges in any order, and it reads as a slice of them.
///
/// ```
/// use stillframe::ranges::Ranges;
/// let some: Ranges = [5..9, 1..3, 8..12, 3..4].into_iter().collect();
/// assert_eq!(some, [1..4, 5..12]);
/// assert_eq!(some.length_bytes(), 10);
/// assert_eq!(some.complement(0..20), [0..1, 4..5, 12..20]);
/// assert_eq!(some.intersection(&Ranges::from(3..6)), [3..4, 5..6]);
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ranges {
    // Invariant: ascending, none empty, `end` of each is less than `start` of the next.
    list: Vec<Range<u64>>,
}

impl Ranges {
    /// No bytes.
    pub const fn new() -> Ranges {
        Ranges { list: Vec::new() }
    }

    /// How many bytes they are together.
    pub fn length_bytes(&self) -> u64 {
        self.list.iter().map(|range| range.end - range.start).sum()
    }

    /// Adds the bytes of a range. Cost: constant if no range begins or ends after `range` begins, else linear.
    pub fn insert(&mut self, range: Range<u64>) {
        if range.is_empty() {
            return;
        }
        match self.list.last_mut() {
            Some(last) if range.start < last.start => {
                // Those that overlap or touch it become one with it.
                let from = self.list.partition_point(|other| other.end < range.start);
                let to = self.list.partition_point(|other| other.start <= range.end);
                let joined = self.list[from..to]
                    .iter()
                    .fold(range, |all, it| all.start.min(it.start)..all.end.max(it.end));
                self.list.splice(from..to, [joined]);
            }
            Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
            _ => self.list.push(range),
        }
    }

    /// What either has.
    pub fn union(&self, other: &Ranges) -> Ranges {
        self.iter().chain(other.iter()).cloned().collect()
    }

    /// What both have.
    pub fn intersection(&self, other: &Ranges) -> Ranges {
        let (mut ours, mut theirs) = (self.list.iter().peekable(), other.list.iter().peekable());
        let mut list = Vec::new();
        while let (Some(our), Some(their)) = (ours.peek(), theirs.peek()) {
            let shared = our.start.max(their.start)..our.end.min(their.end);
            let ours_ends_first = our.end <= their.end;
            // Two that share no byte and touch both have one of these between them, so the list stays apart.
            if !shared.is_empty() {
                list.push(shared);
            }
            if ours_ends_first {
                ours.next();
            } else {
                theirs.next();
            }
        }
        Ranges { list }
    }

    /// What of this the other one does not have.
    pub fn difference(&self, other: &Ranges) -> Ranges {
        let end = self.list.last().map_or(0, |last| last.end);
        self.intersection(&other.complement(0..end))
    }

    /// What of `whole` is not in here.
    pub fn complement(&self, whole: Range<u64>) -> Ranges {
        Ranges { list: complement(&self.list, whole) }
    }

    /// What of `window` is in here, in order.
    pub fn within(&self, window: Range<u64>) -> impl Iterator<Item = Range<u64>> {
        overlapping(&self.list, window)
    }

    /// Whether any byte of `window` is in here.
    pub fn overlaps(&self, window: Range<u64>) -> bool {
        self.within(window).next().is_some()
    }

    /// What of `window` is in here, counted from the start of `window`.
    pub fn from_start_of(&self, window: Range<u64>) -> Ranges {
        let start = window.start;
        Ranges { list: self.within(window).map(|range| range.start - start..range.end - start).collect() }
    }

    /// The parts of `whole` in order, each with whether it is in here.
    pub(crate) fn alternating(&self, whole: Range<u64>) -> Vec<(Range<u64>, bool)> {
        let mut parts: Vec<_> =
            self.complement(whole.clone()).into_iter().map(|range| (range, false)).collect();
        parts.extend(self.within(whole).map(|range| (range, true)));
        parts.sort_unstable_by_key(|(range, _)| range.start);
        parts
    }

    /// Removes everything from `end` on.
    pub fn truncate(&mut self, end: u64) {
        self.list.truncate(self.list.partition_point(|range| range.start < end));
        if let Some(last) = self.list.last_mut() {
            last.end = last.end.min(end);
        }
    }

    /// The ranges as addresses.
    pub fn addresses(&self) -> impl Iterator<Item = AddressRange> {
        // None is empty.
        self.list.iter().filter_map(|range| AddressRange::new(range.start, range.end).ok())
    }
}

impl Deref for Ranges {
    type Target = [Range<u64>];
    fn deref(&self) -> &[Range<u64>] {
        &self.list
    }
}

impl From<Range<u64>> for Ranges {
    fn from(range: Range<u64>) -> Ranges {
        std::iter::once(range).collect()
    }
}

impl From<AddressRange> for Ranges {
    fn from(range: AddressRange) -> Ranges {
        Ranges::from(range.start()..range.end())
    }
}

impl From<Vec<Range<u64>>> for Ranges {
    /// Of ranges in any order. Cost: linear if they are sorted.
    fn from(mut list: Vec<Range<u64>>) -> Ranges {
        merge(&mut list);
        Ranges { list }
    }
}

impl From<Ranges> for Vec<Range<u64>> {
    fn from(ranges: Ranges) -> Vec<Range<u64>> {
        ranges.list
    }
}

impl FromIterator<Range<u64>> for Ranges {
    fn from_iter<I: IntoIterator<Item = Range<u64>>>(ranges: I) -> Ranges {
        Ranges::from(ranges.into_iter().collect::<Vec<_>>())
    }
}

impl FromIterator<AddressRange> for Ranges {
    fn from_iter<I: IntoIterator<Item = AddressRange>>(ranges: I) -> Ranges {
        ranges.into_iter().map(|range| range.start()..range.end()).collect()
    }
}

impl Extend<Range<u64>> for Ranges {
    fn extend<I: IntoIterator<Item = Range<u64>>>(&mut self, ranges: I) {
        self.list.extend(ranges);
        merge(&mut self.list);
    }
}

impl IntoIterator for Ranges {
    type Item = Range<u64>;
    type IntoIter = std::vec::IntoIter<Range<u64>>;
    fn into_iter(self) -> Self::IntoIter {
        self.list.into_iter()
    }
}

impl<'a> IntoIterator for &'a Ranges {
    type Item = &'a Range<u64>;
    type IntoIter = std::slice::Iter<'a, Range<u64>>;
    fn into_iter(self) -> Self::IntoIter {
        self.list.iter()
    }
}

impl PartialEq<[Range<u64>]> for Ranges {
    fn eq(&self, other: &[Range<u64>]) -> bool {
        self.list == other
    }
}

impl PartialEq<&[Range<u64>]> for Ranges {
    fn eq(&self, other: &&[Range<u64>]) -> bool {
        self.list == *other
    }
}

impl<const N: usize> PartialEq<[Range<u64>; N]> for Ranges {
    fn eq(&self, other: &[Range<u64>; N]) -> bool {
        self.list == other
    }
}

/// Sorts ranges and joins those that touch or overlap.
pub(crate) fn merge(ranges: &mut Vec<Range<u64>>) {
    ranges.retain(|range| !range.is_empty());
    ranges.sort_unstable_by_key(|range| (range.start, range.end));
    ranges.dedup_by(|next, kept| {
        let touch = next.start <= kept.end;
        if touch {
            kept.end = kept.end.max(next.end);
        }
        touch
    });
}

/// The part of `whole` that is in none of `ranges`, which are those of a [`Ranges`].
pub(crate) fn complement(ranges: &[Range<u64>], whole: Range<u64>) -> Vec<Range<u64>> {
    let mut rest = Vec::new();
    let mut start = whole.start;
    for range in overlapping(ranges, whole.clone()) {
        if start < range.start {
            rest.push(start..range.start);
        }
        start = range.end;
    }
    if start < whole.end {
        rest.push(start..whole.end);
    }
    rest
}

/// What `ranges`, which are those of a [`Ranges`], and `window` share, in order.
pub(crate) fn overlapping(ranges: &[Range<u64>], window: Range<u64>) -> impl Iterator<Item = Range<u64>> {
    let first = ranges.partition_point(|range| range.end <= window.start);
    ranges[first..]
        .iter()
        .take_while(move |range| range.start < window.end)
        .map(move |range| range.start.max(window.start)..range.end.min(window.end))
        .filter(|range| !range.is_empty())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    /// The naive form: every single byte.
    type Bytes = BTreeSet<u64>;

    fn bytes(ranges: &[Range<u64>]) -> Bytes {
        ranges.iter().cloned().flatten().collect()
    }

    /// The ranges that have these bytes, and no others.
    fn ranges(bytes: &Bytes) -> Vec<Range<u64>> {
        let mut ranges: Vec<Range<u64>> = Vec::new();
        for byte in bytes {
            match ranges.last_mut() {
                Some(last) if last.end == *byte => last.end += 1,
                _ => ranges.push(*byte..byte + 1),
            }
        }
        ranges
    }

    fn range() -> impl Strategy<Value = Range<u64>> {
        // Some are empty, and some backwards.
        (0u64..60, 0u64..12).prop_map(|(start, length)| start..(start + length).saturating_sub(2))
    }

    fn list() -> impl Strategy<Value = Vec<Range<u64>>> {
        prop::collection::vec(range(), 0..12)
    }

    proptest! {
        #[test]
        fn each_operation_does_what_it_does_to_sets_of_single_bytes(
            some in list(), others in list(), window in range(), end in 0u64..70,
        ) {
            let (a, b): (Ranges, Ranges) = (some.iter().cloned().collect(), others.iter().cloned().collect());
            let (x, y) = (bytes(&some), bytes(&others));
            let w: Bytes = window.clone().collect();
            let is = |found: &Ranges, expected: &Bytes| {
                prop_assert_eq!(&**found, &ranges(expected)[..]);
                Ok(())
            };
            is(&a, &x)?;
            prop_assert_eq!(a.length_bytes(), x.len() as u64);
            is(&a.union(&b), &(&x | &y))?;
            is(&a.intersection(&b), &(&x & &y))?;
            is(&a.difference(&b), &(&x - &y))?;
            is(&a.complement(window.clone()), &(&w - &x))?;
            prop_assert_eq!(a.within(window.clone()).collect::<Vec<_>>(), ranges(&(&w & &x)));
            prop_assert_eq!(a.overlaps(window.clone()), !(&w & &x).is_empty());
            for (range, is_in_here) in a.alternating(window.clone()) {
                prop_assert!(!range.is_empty() && range.clone().all(|byte| x.contains(&byte) == is_in_here));
            }
            let parts: Vec<u64> = a.alternating(window.clone()).into_iter().flat_map(|(range, _)| range).collect();
            prop_assert_eq!(parts, window.clone().collect::<Vec<_>>());
            let counted: Bytes = (&w & &x).iter().map(|byte| byte - window.start).collect();
            is(&a.from_start_of(window.clone()), &counted)?;
            let mut inserted = Ranges::new();
            some.iter().cloned().for_each(|range| inserted.insert(range));
            is(&inserted, &x)?;
            let mut extended = a.clone();
            extended.extend(others.iter().cloned());
            is(&extended, &(&x | &y))?;
            let mut cut = a.clone();
            cut.truncate(end);
            is(&cut, &x.iter().copied().filter(|byte| *byte < end).collect())?;
            let addresses: Vec<_> = a.addresses().map(|range| range.start()..range.end()).collect();
            prop_assert_eq!(&addresses[..], &a[..]);
        }
    }

    #[test]
    fn the_last_byte_is_a_byte_like_any_other() {
        let all = Ranges::from(0..u64::MAX);
        assert_eq!(all.length_bytes(), u64::MAX);
        assert_eq!(all.complement(0..u64::MAX), []);
        assert_eq!(all.difference(&Ranges::from(5..u64::MAX)), [0..5, 0..0][..1]);
    }
}
