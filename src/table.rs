//! A table: the hashes of up to 512 consecutive regions of one mapping, itself stored by hash.
//!
//! ```text
//!  0        32        64                       32 × n
//!  +---------+---------+--- … ---+---------+
//!  | region 0| region 1|         | region n-1    n = 512, fewer at the end of a mapping
//!  +---------+---------+--- … ---+---------+
//! ```
//!
//! A region of zeros has the all-zero hash, and a table of nothing but zeros is itself named by the
//! all-zero hash and not stored. Two tables with the same hash are 512 equal regions, which is how
//! comparing snapshots, marking and restoring skip what they need not read.
//!
//! The *root* of a snapshot has the same form: the hashes of its tables, in layout order.

use crate::address_space::AddressSpace;
use crate::hash::Hash;
use crate::units::{AddressRange, RegionSize, UnitError};

/// How many regions one table covers. A power of two: at 16 KiB a table stands for 8 MiB.
pub const REGIONS_PER_TABLE: usize = 512;

/// How many bytes of memory a whole table covers.
pub(crate) fn covered_bytes(region_size: RegionSize) -> u64 {
    (REGIONS_PER_TABLE * region_size.bytes()) as u64
}

/// How many tables cover `length_bytes` of one mapping.
pub(crate) fn count_in(length_bytes: u64, region_size: RegionSize) -> usize {
    usize::try_from(length_bytes.div_ceil(covered_bytes(region_size))).unwrap_or(usize::MAX)
}

/// One table of an address space, as its root lists them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    /// Which of the mappings.
    pub(crate) mapping_index: usize,
    /// Where it begins in its mapping.
    pub(crate) offset_bytes: u64,
    /// Where it begins in the image.
    pub(crate) image_bytes: u64,
    /// How many bytes of memory it covers.
    pub(crate) length_bytes: usize,
    /// How many regions.
    pub(crate) regions: usize,
}

impl Place {
    /// The addresses it covers in `space`.
    pub(crate) fn addresses(&self, space: &AddressSpace) -> Result<AddressRange, UnitError> {
        let mapping = space.mappings()[self.mapping_index].range;
        AddressRange::with_length(mapping.start() + self.offset_bytes, self.length_bytes as u64)
    }
}

/// The tables of an address space, in the order of its root.
pub(crate) fn places(space: &AddressSpace, region_size: RegionSize) -> impl Iterator<Item = Place> {
    let captured = space.mappings().iter().enumerate().filter(|(_, mapping)| mapping.captured);
    let mut image_bytes = 0;
    captured.flat_map(move |(mapping_index, mapping)| {
        let total_bytes = mapping.range.length_bytes();
        let first_bytes = image_bytes;
        image_bytes += total_bytes;
        let covered_bytes = covered_bytes(region_size);
        (0..count_in(total_bytes, region_size) as u64).map(move |at| {
            let offset_bytes = at * covered_bytes;
            let length_bytes = covered_bytes.min(total_bytes - offset_bytes);
            Place {
                mapping_index,
                offset_bytes,
                image_bytes: first_bytes + offset_bytes,
                length_bytes: usize::try_from(length_bytes).unwrap_or(usize::MAX),
                regions: usize::try_from(region_size.regions_in(length_bytes)).unwrap_or(usize::MAX),
            }
        })
    })
}

/// The tables that have something of a range, each with its number in the root. Cost: that of the mappings and of these tables.
pub(crate) fn places_in(
    space: &AddressSpace,
    region_size: RegionSize,
    range: AddressRange,
) -> impl Iterator<Item = (usize, Place)> {
    let captured = space.mappings().iter().enumerate().filter(|(_, mapping)| mapping.captured);
    let (mut first_table, mut first_bytes) = (0usize, 0u64);
    captured.flat_map(move |(mapping_index, mapping)| {
        let total_bytes = mapping.range.length_bytes();
        let (tables_before, image_bytes) = (first_table, first_bytes);
        first_table = first_table.saturating_add(count_in(total_bytes, region_size));
        first_bytes = first_bytes.saturating_add(total_bytes);
        let covered_bytes = covered_bytes(region_size);
        let concerned = mapping.range.intersection(range).map_or(0..0, |shared| {
            let offset = |address: u64| address - mapping.range.start();
            offset(shared.start()) / covered_bytes..offset(shared.end()).div_ceil(covered_bytes)
        });
        concerned.map(move |at| {
            let offset_bytes = at * covered_bytes;
            let length_bytes = covered_bytes.min(total_bytes - offset_bytes);
            let number = tables_before.saturating_add(usize::try_from(at).unwrap_or(usize::MAX));
            let place = Place {
                mapping_index,
                offset_bytes,
                image_bytes: image_bytes.saturating_add(offset_bytes),
                length_bytes: usize::try_from(length_bytes).unwrap_or(usize::MAX),
                regions: usize::try_from(region_size.regions_in(length_bytes)).unwrap_or(usize::MAX),
            };
            (number, place)
        })
    })
}

/// How many tables an address space has.
pub(crate) fn count(space: &AddressSpace, region_size: RegionSize) -> usize {
    space.captured().map(|(_, mapping)| count_in(mapping.range.length_bytes(), region_size)).sum()
}

/// The bytes of a list of hashes, as tables and roots are stored.
pub(crate) fn encode(hashes: &[Hash]) -> Vec<u8> {
    hashes.iter().flat_map(|hash| hash.0).collect()
}

/// The hashes in a stored list, or `None` if its length is not that of `expected` hashes.
pub(crate) fn decode(bytes: &[u8], expected: usize) -> Option<Vec<Hash>> {
    let (hashes, rest) = bytes.as_chunks::<{ Hash::BYTES }>();
    (rest.is_empty() && hashes.len() == expected).then(|| hashes.iter().copied().map(Hash).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tables_of_a_range_are_those_that_have_something_of_it() {
        use crate::address_space::Mapping;
        let region_size = RegionSize::default();
        let table = covered_bytes(region_size);
        let image = AddressSpace::image("a", 1).mappings()[0].clone();
        let mapping = |start: u64, length: u64| Mapping {
            range: AddressRange::with_length(start, length).unwrap(),
            ..image.clone()
        };
        let not_captured = Mapping { captured: false, ..mapping(20 * table, table) };
        let mappings = vec![mapping(0, table + 5), mapping(8 * table, 3 * table), not_captured];
        let space = AddressSpace::new(mappings).unwrap();
        for (start, end) in
            [(0, 1), (table, table + 1), (table - 1, 9 * table), (3 * table, 4 * table), (0, u64::MAX)]
        {
            let range = AddressRange::new(start, end).unwrap();
            let shares =
                |(_, place): &(usize, Place)| place.addresses(&space).unwrap().intersection(range).is_some();
            let naive: Vec<_> = places(&space, region_size).enumerate().filter(shares).collect();
            assert_eq!(places_in(&space, region_size, range).collect::<Vec<_>>(), naive, "{range}");
        }
    }

    #[test]
    fn hashes_come_back_and_a_wrong_length_does_not() {
        let hashes: Vec<Hash> = (0..5u8).map(|byte| Hash::of(&[byte])).collect();
        let bytes = encode(&hashes);
        assert_eq!(decode(&bytes, 5), Some(hashes));
        assert_eq!(decode(&bytes, 4), None);
        assert_eq!(decode(&bytes[1..], 5), None);
    }
}
