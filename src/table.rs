//! A table: the hashes of up to 512 consecutive regions of one mapping. A table is itself stored
//! under its hash.
//!
//! ```text
//!  0        32        64                       32 × n
//!  +---------+---------+--- … ---+---------+
//!  | region 0| region 1|         | region n-1    n = 512, fewer at the end of a mapping
//!  +---------+---------+--- … ---+---------+
//! ```
//!
//! A region of zeros has the all-zero hash. A table in which all hashes are zero also has the
//! all-zero hash and is not stored. Two tables with the same hash stand for 512 equal regions, so
//! comparing snapshots, marking and restoring skip equal tables without reading them. This is a
//! Merkle tree of three levels: root, table, region (Merkle, *A Digital Signature Based on a
//! Conventional Encryption Function*, CRYPTO 1987).
//!
//! The [root](crate::root) of a snapshot has the same form: it holds the hashes of its tables, in
//! layout order.

use std::ops::Range;

use crate::address_space::AddressSpace;
use crate::hash::Hash;
use crate::units::{AddressRange, RegionSize, UnitError, usize_of};

/// How many regions one table covers. It is a power of two: at 16 KiB a table covers 8 MiB.
pub const REGIONS_PER_TABLE: usize = 512;

/// How many bytes of memory a full table covers.
pub(crate) fn covered_bytes(region_size: RegionSize) -> u64 {
    (REGIONS_PER_TABLE * region_size.bytes()) as u64
}

/// How many tables cover `length_bytes` of one mapping.
pub(crate) fn count_in(length_bytes: u64, region_size: RegionSize) -> usize {
    usize_of(length_bytes.div_ceil(covered_bytes(region_size)))
}

/// The position of one table of an address space, in the order of the root.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    /// The index of its mapping.
    pub(crate) mapping_index: usize,
    /// Where it begins in its mapping.
    pub(crate) offset_bytes: u64,
    /// Where it begins in the image.
    pub(crate) image_bytes: u64,
    /// How many bytes of memory it covers.
    pub(crate) length_bytes: usize,
    /// How many regions it covers.
    pub(crate) regions: usize,
}

impl Place {
    /// The addresses it covers in `space`.
    pub(crate) fn addresses(&self, space: &AddressSpace) -> Result<AddressRange, UnitError> {
        let mapping = space.mappings()[self.mapping_index].range;
        AddressRange::with_length(mapping.start() + self.offset_bytes, self.length_bytes as u64)
    }
}

/// The positions of an address space's tables, in the order of the root. This takes memory for each
/// mapping and not for each table, because a sparse process has millions of tables.
pub(crate) struct Places {
    region_size: RegionSize,
    /// The captured mappings, in the order of their addresses.
    mappings: Vec<MappingTables>,
}

/// The tables of one captured mapping.
#[derive(Clone, Copy, Debug)]
pub(crate) struct MappingTables {
    /// The index of the mapping.
    pub(crate) mapping_index: usize,
    /// The addresses of the mapping.
    pub(crate) range: AddressRange,
    /// The index of its first table in the root.
    first_table: usize,
    tables: usize,
    /// Where it begins in the image.
    image_bytes: u64,
}

impl MappingTables {
    /// The indexes of its tables in the root.
    pub(crate) fn tables(&self) -> Range<usize> {
        self.first_table..self.first_table.saturating_add(self.tables)
    }
}

impl Places {
    pub(crate) fn new(space: &AddressSpace, region_size: RegionSize) -> Places {
        let captured = space.mappings().iter().enumerate().filter(|(_, mapping)| mapping.captured);
        let (mut first_table, mut image_bytes) = (0usize, 0);
        let mappings = captured.map(|(mapping_index, mapping)| {
            let range = mapping.range;
            let tables = count_in(range.length_bytes(), region_size);
            let placed = MappingTables { mapping_index, range, first_table, tables, image_bytes };
            first_table = first_table.saturating_add(tables);
            image_bytes += range.length_bytes();
            placed
        });
        Places { region_size, mappings: mappings.collect() }
    }

    /// The number of tables.
    pub(crate) fn count(&self) -> usize {
        self.mappings.last().map_or(0, |last| last.tables().end)
    }

    /// The captured mappings, in the order of their addresses.
    pub(crate) fn mappings(&self) -> &[MappingTables] {
        &self.mappings
    }

    /// The position of a table.
    pub(crate) fn get(&self, at: usize) -> Option<Place> {
        let mapping = self.mappings.partition_point(|mapping| mapping.tables().end <= at);
        let mapping = self.mappings.get(mapping)?;
        Some(self.place(mapping, (at - mapping.first_table) as u64))
    }

    /// Table number `at` of a mapping.
    pub(crate) fn place(&self, mapping: &MappingTables, at: u64) -> Place {
        let offset_bytes = at * covered_bytes(self.region_size);
        let length_bytes = covered_bytes(self.region_size).min(mapping.range.length_bytes() - offset_bytes);
        Place {
            mapping_index: mapping.mapping_index,
            offset_bytes,
            image_bytes: mapping.image_bytes + offset_bytes,
            length_bytes: usize_of(length_bytes),
            regions: usize_of(self.region_size.regions_in(length_bytes)),
        }
    }

    /// All positions, in order.
    pub(crate) fn iter(&self) -> impl Iterator<Item = Place> + '_ {
        self.mappings.iter().flat_map(|mapping| (0..mapping.tables as u64).map(|at| self.place(mapping, at)))
    }

    /// The tables that cover any of these addresses.
    pub(crate) fn overlapping(&self, addresses: AddressRange) -> Range<usize> {
        let covered_bytes = covered_bytes(self.region_size);
        // The first table that ends after an address.
        let first_after = |address: u64| {
            let mapping = self.mappings.partition_point(|mapping| mapping.range.end() <= address);
            let Some(mapping) = self.mappings.get(mapping) else { return (self.count(), false) };
            let into_bytes = address.saturating_sub(mapping.range.start());
            let at = usize_of(into_bytes / covered_bytes);
            (mapping.first_table.saturating_add(at), mapping.range.start() <= address)
        };
        let (first, _) = first_after(addresses.start());
        // If the last address lies in a table, that table is the last one.
        let (last, is_inside) = first_after(addresses.end() - 1);
        first..last.saturating_add(usize::from(is_inside)).max(first)
    }
}

/// How many tables an address space has.
pub(crate) fn count(space: &AddressSpace, region_size: RegionSize) -> usize {
    let counts = space.captured().map(|(_, mapping)| count_in(mapping.range.length_bytes(), region_size));
    counts.fold(0, usize::saturating_add)
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
    fn hashes_come_back_and_a_wrong_length_does_not() {
        let hashes: Vec<Hash> = (0..5u8).map(|byte| Hash::of(&[byte])).collect();
        let bytes = encode(&hashes);
        assert_eq!(decode(&bytes, 5), Some(hashes));
        assert_eq!(decode(&bytes, 4), None);
        assert_eq!(decode(&bytes[1..], 5), None);
    }
}
