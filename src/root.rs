//! A root: the hashes of a snapshot's tables, in layout order.
//!
//! Its bytes are those of a long table, 32 for each table of the address space. A sparse process
//! has terabytes of address space and some megabytes of memory: nearly all of its tables are absent
//! memory, whose hash is zero. So in memory, a root is the list of its stored tables, and all code
//! that walks a root walks this list:
//!
//! ```text
//! plain bytes   0 0 0 A 0 0 0 0 0 B C 0 0 0 … 0        1.8 million hashes for 14 TiB
//! in memory     tables: 1,800,000   stored: (3, A) (9, B) (10, C)
//! ```
//!
//! Hashing and encoding need the plain bytes. They are written into fresh zeroed memory, so that
//! the kernel allocates pages only for the parts that are not zeros.

use std::ops::Range;

use crate::hash::Hash;
use crate::table::{Place, Places};
use crate::units::AddressRange;

/// The hashes of the tables of a snapshot.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Root {
    tables: usize,
    /// The tables that are not zeros. Invariant: ascending, below `tables`, and no hash is the
    /// all-zero one.
    stored: Vec<(usize, Hash)>,
}

/// The hashes of consecutive tables, those of one mapping; empty if there is no such mapping.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct RootPart<'a> {
    /// The index in the root of the first of them.
    first: usize,
    stored: &'a [(usize, Hash)],
}

/// Consecutive tables of one mapping: either one stored table, or a maximal run of tables of zeros.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Run {
    /// The addresses that it covers.
    pub(crate) range: AddressRange,
    /// The hash of the one table, or the all-zero hash.
    pub(crate) hash: Hash,
    /// How many regions the one table has; 0 for zeros.
    pub(crate) regions: usize,
}

impl Root {
    /// `tables` tables of zeros.
    pub(crate) fn zeros(tables: usize) -> Root {
        Root { tables, stored: Vec::new() }
    }

    /// `tables` tables, of which these are stored: in any order, each once. Tables of zeros are
    /// dropped from the list.
    pub(crate) fn new(tables: usize, mut stored: Vec<(usize, Hash)>) -> Root {
        stored.retain(|(at, hash)| *at < tables && !hash.is_zero());
        stored.sort_unstable();
        Root { tables, stored }
    }

    /// The number of tables.
    #[cfg(any(test, feature = "fuzzing"))]
    pub(crate) fn tables(&self) -> usize {
        self.tables
    }

    /// Whether all tables are zeros.
    pub(crate) fn is_zero(&self) -> bool {
        self.stored.is_empty()
    }

    /// The tables that are not zeros, in order.
    pub(crate) fn stored(&self) -> &[(usize, Hash)] {
        &self.stored
    }

    /// The hash of a table.
    pub(crate) fn get(&self, at: usize) -> Hash {
        self.part(0..self.tables).get(at)
    }

    /// A range of its tables.
    pub(crate) fn part(&self, tables: Range<usize>) -> RootPart<'_> {
        let place = |table: usize| self.stored.partition_point(|(at, _)| *at < table);
        let (from, to) = (place(tables.start), place(tables.end));
        RootPart { first: tables.start, stored: self.stored.get(from..to).unwrap_or_default() }
    }

    /// The stored tables and their positions.
    pub(crate) fn places<'a>(&'a self, places: &'a Places) -> impl Iterator<Item = (Hash, Place)> + 'a {
        self.stored.iter().filter_map(|(at, hash)| Some((*hash, places.get(*at)?)))
    }

    /// All tables, as runs in the order of their addresses.
    pub(crate) fn runs(&self, places: &Places) -> Vec<Run> {
        let mut runs = Vec::new();
        for mapping in places.mappings() {
            let (start, end) = (mapping.range.start(), mapping.range.end());
            let mut next = start;
            for (at, hash) in self.part(mapping.tables()).stored() {
                let Some(place) = places.get(mapping.tables().start + at) else { continue };
                let first = start + place.offset_bytes;
                runs.extend(AddressRange::new(next, first).ok().map(Run::of_zeros));
                next = first + place.length_bytes as u64;
                let range = AddressRange::new(first, next).ok();
                runs.extend(range.map(|range| Run { range, hash, regions: place.regions }));
            }
            runs.extend(AddressRange::new(next, end).ok().map(Run::of_zeros));
        }
        runs
    }

    /// Its plain bytes. Only pages that contain the hash of a stored table are populated.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.tables * Hash::BYTES];
        let (cells, _) = bytes.as_chunks_mut::<{ Hash::BYTES }>();
        for (at, hash) in &self.stored {
            cells[*at] = hash.0;
        }
        bytes
    }

    /// The root in stored bytes, or `None` if their length is not that of `expected` hashes.
    pub(crate) fn decode(bytes: &[u8], expected: usize) -> Option<Root> {
        /// Zeros are skipped in units of this size.
        const BLOCK_BYTES: usize = 64 * Hash::BYTES;
        if Some(bytes.len()) != expected.checked_mul(Hash::BYTES) {
            return None;
        }
        let mut stored = Vec::new();
        for (block, bytes) in bytes.chunks(BLOCK_BYTES).enumerate() {
            if crate::region::is_zero(bytes) {
                continue;
            }
            let (cells, _) = bytes.as_chunks::<{ Hash::BYTES }>();
            let hashes = cells.iter().enumerate().map(|(at, cell)| (block * 64 + at, Hash(*cell)));
            stored.extend(hashes.filter(|(_, hash)| !hash.is_zero()));
        }
        Some(Root { tables: expected, stored })
    }
}

impl<'a> RootPart<'a> {
    /// The hash of a table of the part; the all-zero hash past its end.
    pub(crate) fn get(&self, at: usize) -> Hash {
        let found = self.first.checked_add(at).and_then(|wanted| {
            let place = self.stored.binary_search_by_key(&wanted, |(at, _)| *at).ok()?;
            self.stored.get(place)
        });
        found.map_or(Hash::ZERO, |(_, hash)| *hash)
    }

    /// The tables of the part that are not zeros, in order.
    pub(crate) fn stored(self) -> impl Iterator<Item = (usize, Hash)> + 'a {
        self.stored.iter().map(move |(at, hash)| (at - self.first, *hash))
    }
}

impl Run {
    fn of_zeros(range: AddressRange) -> Run {
        Run { range, hash: Hash::ZERO, regions: 0 }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::address_space::{AddressSpace, Mapping};
    use crate::table::covered_bytes;
    use crate::units::RegionSize;

    fn hash(number: u8) -> Hash {
        if number == 0 { Hash::ZERO } else { Hash::of(&[number]) }
    }

    /// Mappings with gaps between them, of a few tables each, whose last table may be partial.
    fn space(mappings: &[(u64, u64, bool)]) -> AddressSpace {
        let mut start = 0;
        let all = AddressSpace::image("", 1).mappings()[0].clone();
        let mappings = mappings.iter().map(|(gap, length, captured)| {
            let range = AddressRange::with_length(start + gap, *length).unwrap();
            start = range.end();
            Mapping { range, captured: *captured, ..all.clone() }
        });
        AddressSpace::new(mappings.collect()).unwrap()
    }

    proptest! {
        #[test]
        fn a_root_says_what_the_list_of_all_its_hashes_says(
            numbers in proptest::collection::vec(prop_oneof![3 => Just(0u8), 1 => 1u8..4], 0..300),
            from in 0usize..300,
            length in 0usize..300,
        ) {
            let hashes: Vec<Hash> = numbers.iter().map(|number| hash(*number)).collect();
            let bytes = crate::table::encode(&hashes);
            let root = Root::decode(&bytes, hashes.len()).unwrap();
            prop_assert_eq!(&root.encode(), &bytes);
            prop_assert_eq!(Root::decode(&bytes, hashes.len() + 1), None);
            prop_assert_eq!(root.is_zero(), hashes.iter().all(Hash::is_zero));
            let all: Vec<Hash> = (0..hashes.len()).map(|at| root.get(at)).collect();
            prop_assert_eq!(&all, &hashes);
            let shuffled = hashes.iter().copied().enumerate().rev().collect();
            prop_assert_eq!(&Root::new(hashes.len(), shuffled), &root);
            let (from, to) = (from.min(hashes.len()), (from + length).min(hashes.len()));
            let part = root.part(from..to);
            let expected: Vec<(usize, Hash)> =
                hashes[from..to].iter().copied().enumerate().filter(|(_, hash)| !hash.is_zero()).collect();
            prop_assert_eq!(part.stored().collect::<Vec<_>>(), expected);
            for at in 0..to - from + 3 {
                prop_assert_eq!(part.get(at), hashes[from..to].get(at).copied().unwrap_or(Hash::ZERO));
            }
        }

        #[test]
        fn places_and_runs_say_what_the_list_of_all_places_says(
            mappings in proptest::collection::vec((0u64..3, 1u64..5, 0u64..512 * 512, any::<bool>()), 0..6),
            numbers in proptest::collection::vec(prop_oneof![2 => Just(0u8), 1 => 1u8..4], 40),
            window in (0u64..40 * 512 * 512, 1u64..10 * 512 * 512),
        ) {
            let region_size = RegionSize::new(512).unwrap();
            let covered = covered_bytes(region_size);
            let mappings: Vec<_> = mappings
                .iter()
                .map(|(gap, tables, cut, captured)| (gap * 4096, tables * covered - cut, *captured))
                .collect();
            let space = space(&mappings);
            let places = Places::new(&space, region_size);
            // The naive list.
            let mut all: Vec<Place> = Vec::new();
            let mut image_bytes = 0;
            for (mapping_index, mapping) in space.mappings().iter().enumerate().filter(|(_, it)| it.captured) {
                let mut offset_bytes = 0;
                while offset_bytes < mapping.range.length_bytes() {
                    let length = covered.min(mapping.range.length_bytes() - offset_bytes);
                    let length_bytes = usize::try_from(length).unwrap();
                    let regions = length_bytes.div_ceil(512);
                    all.push(Place { mapping_index, offset_bytes, image_bytes, length_bytes, regions });
                    offset_bytes += length;
                    image_bytes += length;
                }
            }
            prop_assert_eq!(places.count(), all.len());
            prop_assert_eq!(&places.iter().collect::<Vec<_>>(), &all);
            prop_assert_eq!(places.get(all.len()), None);
            // The tables in a window of addresses.
            let window = AddressRange::with_length(window.0, window.1).unwrap();
            let inside = |place: &Place| place.addresses(&space).unwrap().intersection(window).is_some();
            let expected: Vec<usize> = (0..all.len()).filter(|at| inside(&all[*at])).collect();
            prop_assert_eq!(places.overlapping(window).collect::<Vec<_>>(), expected);
            // The runs, split into single tables again.
            let hashes: Vec<Hash> = (0..all.len()).map(|at| hash(numbers[at % numbers.len()])).collect();
            let root = Root::new(all.len(), hashes.iter().copied().enumerate().collect());
            let stored: Vec<_> =
                hashes.iter().copied().zip(all.iter().copied()).filter(|(hash, _)| !hash.is_zero()).collect();
            prop_assert_eq!(&root.places(&places).collect::<Vec<_>>(), &stored);
            let runs = root.runs(&places);
            prop_assert!(runs.windows(2).all(|pair| pair[0].range.end() <= pair[1].range.start()));
            let length: u64 = runs.iter().map(|run| run.range.length_bytes()).sum();
            prop_assert_eq!(length, image_bytes);
            for (place, hash) in all.iter().zip(&hashes) {
                let range = place.addresses(&space).unwrap();
                let run = runs.iter().find(|run| run.range.intersection(range).is_some()).unwrap();
                prop_assert_eq!(run.range.intersection(range), Some(range));
                prop_assert_eq!(run.hash, *hash);
                prop_assert!(hash.is_zero() || run.range == range && run.regions == place.regions);
            }
            let stored_or_at_a_border = |pair: &[Run]| {
                !pair[0].hash.is_zero() || !pair[1].hash.is_zero() || space.mappings().iter().any(|it| it.range.start() == pair[1].range.start())
            };
            prop_assert!(runs.windows(2).all(stored_or_at_a_border), "zeros are one run in each mapping");
        }
    }
}
