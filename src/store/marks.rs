//! Marks: one bit for each of very many hashes, at 8 bytes a hash.
//!
//! A hash is represented by its first 63 bits. They are sorted, each with its mark in the lowest
//! bit. If two hashes of a store share 63 bits (one chance in a million at six million hashes),
//! both count as marked once one is marked: an unneeded object is kept, and no needed one is
//! dropped.
//!
//! For a delta the base is stored too, at 16 more bytes; marking a delta marks its base.

use super::error::StoreError;
use super::index::Index;
use super::packs::location::Position;
use super::tree::Tree;
use crate::hash::Hash;

/// A set of hashes, each marked or not.
#[derive(Default)]
pub(crate) struct Marks {
    sorted: Vec<u64>,
    /// The first 64 bits of the hashes of deltas and of their bases, sorted.
    bases: Vec<(u64, u64)>,
}

impl Marks {
    /// The objects in a tree of the index, unmarked. Cost: it reads the whole tree.
    pub(crate) fn of(index: &Index, tree: Tree) -> Result<Marks, StoreError> {
        let mut marks = Marks::default();
        for entry in index.entries(tree) {
            marks.push(&entry?.0);
        }
        Ok(marks)
    }

    /// As [`of`](Self::of), but marking a delta also marks its base. `delta_at` reads a delta and
    /// returns its hash and that of its base, or `None` if the delta cannot be read any more. Cost:
    /// it also reads the start of each delta.
    pub(crate) fn with_bases(
        index: &Index,
        tree: Tree,
        mut delta_at: impl FnMut(Position) -> Result<Option<(Hash, Hash)>, StoreError>,
    ) -> Result<Marks, StoreError> {
        let mut marks = Marks::default();
        for entry in index.entries(tree) {
            let (hash, location) = entry?;
            marks.push(&hash);
            if location.is_delta() {
                marks.bases.push((u64::from(location.pack), location.offset_bytes));
            }
        }
        // The bases are sorted, so that the packs are read sequentially.
        marks.bases.sort_unstable();
        let mut failure = None;
        marks.bases.retain_mut(|(pack, offset_bytes)| {
            let at = Position { pack: u32::try_from(*pack).unwrap_or(0), offset_bytes: *offset_bytes };
            match delta_at(at) {
                Ok(Some((hash, base))) => (*pack, *offset_bytes) = (hash.prefix() & !1, base.prefix()),
                // The delta cannot be read any more, so its base does not matter.
                Ok(None) => return false,
                Err(error) => drop(failure.get_or_insert(error)),
            }
            true
        });
        marks.bases.sort_unstable();
        failure.map_or(Ok(marks), Err)
    }

    /// Adds an unmarked hash. Hashes must come in ascending order.
    fn push(&mut self, hash: &Hash) {
        self.sorted.push(hash.prefix() & !1);
    }

    /// The position of the first hash with these 63 bits. BLAKE3 hashes are evenly distributed, so
    /// their position is close to the one that their value predicts.
    fn find(&self, prefix: u64) -> Option<usize> {
        let wanted = prefix & !1;
        let count = self.sorted.len();
        let guess = usize::try_from((u128::from(wanted) * count as u128) >> 64).unwrap_or(0);
        let (mut low, mut high) = (guess, guess);
        let mut step = 16;
        while low > 0 && self.sorted[low - 1] & !1 >= wanted {
            low = low.saturating_sub(step);
            step *= 2;
        }
        step = 16;
        while high < count && self.sorted[high] & !1 < wanted {
            high = (high + step).min(count);
            step *= 2;
        }
        let at = low + self.sorted[low..high.max(low)].partition_point(|entry| entry & !1 < wanted);
        (at < count && self.sorted[at] & !1 == wanted).then_some(at)
    }

    /// Marks a hash.
    pub(crate) fn mark(&mut self, hash: &Hash) -> Marked {
        self.mark_prefix(hash.prefix())
    }

    /// As [`mark`](Self::mark), for a hash of which only the first 64 bits are known.
    pub(crate) fn mark_prefix(&mut self, prefix: u64) -> Marked {
        let Some(first) = self.find(prefix) else { return Marked::Unknown };
        let was = self.sorted[first] & 1;
        for entry in self.sorted[first..].iter_mut().take_while(|entry| **entry & !1 == prefix & !1) {
            *entry |= 1;
        }
        if was != 0 {
            return Marked::Before;
        }
        let first = self.bases.partition_point(|(delta, _)| *delta < prefix & !1);
        for at in first..self.bases.len() {
            let (delta, base) = self.bases[at];
            if delta != prefix & !1 {
                break;
            }
            self.mark_prefix(base);
        }
        Marked::Now
    }

    /// Whether a hash is in the set and marked.
    pub(crate) fn is_marked(&self, hash: &Hash) -> bool {
        self.find(hash.prefix()).is_some_and(|at| self.sorted[at] & 1 == 1)
    }
}

/// The result of marking a hash.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Marked {
    /// It is not in the set.
    Unknown,
    /// It is marked now.
    Now,
    /// It had been marked before.
    Before,
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::{BTreeMap, BTreeSet};

    proptest! {
        #[test]
        fn marks_agree_with_a_map(
            present in proptest::collection::btree_set(any::<u64>(), 0..200),
            clustered in proptest::collection::btree_set(0u64..500, 0..100),
            marked in proptest::collection::vec(0usize..300, 0..300),
        ) {
            let prefixes: Vec<u64> = present.union(&clustered).copied().collect();
            let hash = |prefix: u64| {
                let mut hash = Hash::ZERO;
                hash.0[..8].copy_from_slice(&prefix.to_be_bytes());
                hash
            };
            let mut marks = Marks::default();
            let mut oracle: BTreeMap<u64, bool> = BTreeMap::new();
            for prefix in &prefixes {
                marks.push(&hash(*prefix));
                oracle.insert(prefix >> 1, false);
            }
            for at in marked {
                let prefix = prefixes.get(at).copied().unwrap_or(at as u64 * 0x0101_0101_0101);
                let expected = match oracle.get_mut(&(prefix >> 1)) {
                    None => Marked::Unknown,
                    Some(mark) => if std::mem::replace(mark, true) { Marked::Before } else { Marked::Now },
                };
                prop_assert_eq!(marks.mark(&hash(prefix)), expected);
            }
            for (prefix, mark) in oracle {
                prop_assert_eq!(marks.is_marked(&hash(prefix << 1)), mark);
            }
        }

        #[test]
        fn with_a_delta_its_base_is_marked_and_no_other(
            bases in proptest::collection::btree_map(0u64..40, 0u64..40, 0..20),
            marked in proptest::collection::vec(0u64..40, 0..10),
        ) {
            let hash = |number: u64| {
                let mut hash = Hash::ZERO;
                hash.0[..8].copy_from_slice(&(number << 1).to_be_bytes());
                hash
            };
            let mut marks = Marks::default();
            (0..40).for_each(|number| marks.push(&hash(number)));
            marks.bases = bases.iter().map(|(delta, base)| (delta << 1, base << 1)).collect();
            let mut expected = BTreeSet::new();
            for number in marked {
                marks.mark(&hash(number));
                let mut number = Some(number);
                while let Some(next) = number.filter(|number| expected.insert(*number)) {
                    number = bases.get(&next).copied();
                }
            }
            for number in 0..40 {
                prop_assert_eq!(marks.is_marked(&hash(number)), expected.contains(&number));
            }
        }
    }
}
