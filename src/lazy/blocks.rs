//! Blocks: the units in which a lazy mapping is filled.
//!
//! The image is divided into *blocks*, each as long as a region but at least a page. Mappings may
//! begin and end anywhere in the image, so a block has the bytes of one region, or of several, or
//! parts of two.
//!
//! ```text
//! image    | mapping 0                            | mapping 1          |
//! regions  |--------|--------|--------|--------|--|--------|--------|--|
//! blocks   |--------|--------|--------|--------|--------|--------|--------|   the last: zero-padded
//! ```

use std::ops::Range;
use std::sync::Arc;

use crate::address_space::AddressSpace;
use crate::table::{Place, Places};
use crate::units::{AddressRange, RegionSize};

/// How the image of a snapshot is divided into blocks.
pub(super) struct Blocks {
    space: Arc<AddressSpace>,
    /// The positions of the tables.
    places: Vec<Place>,
    region_bytes: usize,
    block_bytes: usize,
    page_bytes: usize,
    image_bytes: usize,
}

/// A part of one region in a block.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct BlockPart {
    pub(super) table: usize,
    /// The index of the region in its table, and the region's length.
    pub(super) region: usize,
    pub(super) region_bytes: usize,
    pub(super) in_region: Range<usize>,
    pub(super) in_block: Range<usize>,
}

impl Blocks {
    pub(super) fn new(space: Arc<AddressSpace>, region_size: RegionSize, page_bytes: usize) -> Blocks {
        let region_bytes = region_size.bytes();
        Blocks {
            places: Places::new(&space, region_size).iter().collect(),
            region_bytes,
            block_bytes: region_bytes.max(page_bytes),
            page_bytes,
            image_bytes: usize::try_from(space.image_bytes()).unwrap_or(usize::MAX),
            space,
        }
    }

    /// The number of blocks.
    pub(super) fn count(&self) -> usize {
        self.image_bytes.div_ceil(self.block_bytes)
    }

    /// The length of a block, except the last one, which may be shorter.
    pub(super) fn block_bytes(&self) -> usize {
        self.block_bytes
    }

    pub(super) fn image_bytes(&self) -> usize {
        self.image_bytes
    }

    /// The positions of the tables, in the order of the root.
    pub(super) fn places(&self) -> &[Place] {
        &self.places
    }

    /// The bytes of the image in a block.
    pub(super) fn bytes(&self, block: usize) -> Range<usize> {
        let start = block * self.block_bytes;
        start..(start + self.block_bytes).min(self.image_bytes)
    }

    /// The pages of a block.
    pub(super) fn pages(&self, block: usize) -> Range<u64> {
        let bytes = self.bytes(block);
        bytes.start as u64..(bytes.end as u64).next_multiple_of(self.page_bytes as u64)
    }

    /// The addresses of the bytes in a block: a range for each mapping.
    pub(super) fn addresses(&self, block: usize) -> impl Iterator<Item = AddressRange> {
        let block = self.bytes(block);
        self.space.captured().filter_map(move |(image_bytes, mapping)| {
            let start = image_bytes.max(block.start as u64);
            let end = (image_bytes + mapping.range.length_bytes()).min(block.end as u64);
            let address = |at: u64| mapping.range.start() + (at - image_bytes);
            (start < end).then(|| AddressRange::new(address(start), address(end)).ok())?
        })
    }

    /// The blocks with the bytes of a table.
    pub(super) fn of_table(&self, table: usize) -> Range<usize> {
        let place = &self.places[table];
        let start = usize::try_from(place.image_bytes).unwrap_or(usize::MAX);
        self.of_image(start..start + place.length_bytes)
    }

    /// The blocks with the bytes at these addresses, for each mapping.
    pub(super) fn at_addresses(&self, range: AddressRange) -> impl Iterator<Item = Range<usize>> {
        self.space.captured().filter_map(move |(image_bytes, mapping)| {
            let part = mapping.range.intersection(range)?;
            let offset = |address: u64| usize::try_from(image_bytes + (address - mapping.range.start())).ok();
            Some(self.of_image(offset(part.start())?..offset(part.end())?))
        })
    }

    /// The blocks with these bytes of the image.
    fn of_image(&self, image: Range<usize>) -> Range<usize> {
        image.start / self.block_bytes..image.end.min(self.image_bytes).div_ceil(self.block_bytes)
    }

    /// The regions of a block, or parts of them, in order.
    pub(super) fn parts(&self, block: usize) -> impl Iterator<Item = BlockPart> {
        let bytes = self.bytes(block);
        let mut at = bytes.start;
        let mut table = self.places.partition_point(|place| place.image_bytes <= at as u64).wrapping_sub(1);
        std::iter::from_fn(move || {
            let place = self.places.get(table).filter(|_| at < bytes.end)?;
            let in_table = at - usize::try_from(place.image_bytes).ok()?;
            let region = in_table / self.region_bytes;
            let region_start = region * self.region_bytes;
            let region_bytes = self.region_bytes.min(place.length_bytes - region_start);
            let start = in_table - region_start;
            let length = (region_bytes - start).min(bytes.end - at);
            let in_block = at - bytes.start;
            let part = BlockPart {
                table,
                region,
                region_bytes,
                in_region: start..start + length,
                in_block: in_block..in_block + length,
            };
            at += length;
            if in_table + length == place.length_bytes {
                table += 1;
            }
            Some(part)
        })
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::*;
    use crate::address_space::Mapping;
    use crate::table::REGIONS_PER_TABLE;

    /// One byte of the image, found by counting.
    #[derive(Clone, Debug, PartialEq, Eq)]
    struct Byte {
        address: u64,
        table: usize,
        region: usize,
        in_region: usize,
    }

    fn space(mappings: &[(u64, u64, bool)]) -> AddressSpace {
        let mut next = 0x1000;
        let one = AddressSpace::image("", 1).mappings()[0].clone();
        let mappings = mappings.iter().map(|(gap, length, captured)| {
            let range = AddressRange::with_length(next + gap, *length).unwrap();
            next = range.end();
            Mapping { range, captured: *captured, ..one.clone() }
        });
        AddressSpace::new(mappings.collect()).unwrap()
    }

    /// Every byte of the image, in order.
    fn image(space: &AddressSpace, region_bytes: usize) -> Vec<Byte> {
        let (mut bytes, mut first_table) = (Vec::new(), 0);
        for (_, mapping) in space.captured() {
            let mut last_table = first_table;
            for (at, address) in (mapping.range.start()..mapping.range.end()).enumerate() {
                let region = at / region_bytes;
                last_table = first_table + region / REGIONS_PER_TABLE;
                bytes.push(Byte {
                    address,
                    table: last_table,
                    region: region % REGIONS_PER_TABLE,
                    in_region: at % region_bytes,
                });
            }
            first_table = last_table + 1;
        }
        bytes
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]
        #[test]
        fn blocks_have_the_bytes_that_counting_finds_in_them(
            // The regions of the last length fill more than one table.
            lengths in prop::collection::vec(
                (0u64..3000, prop_oneof![1u64..3000, Just(512), Just(4096), 262_000u64..265_000], prop::bool::weighted(0.8)),
                1..5,
            ),
            large in any::<bool>(),
            wanted in (0u64..20_000, 1u64..9000),
        ) {
            let region_size = RegionSize::new(if large { 8192 } else { 512 }).unwrap();
            let space = Arc::new(space(&lengths));
            let blocks = Blocks::new(space.clone(), region_size, 4096);
            let image = image(&space, region_size.bytes());
            let block_bytes = region_size.bytes().max(4096);
            let mut region_bytes = HashMap::new();
            for byte in &image {
                *region_bytes.entry((byte.table, byte.region)).or_insert(0) += 1;
            }
            prop_assert_eq!(blocks.image_bytes(), image.len());
            prop_assert_eq!(blocks.count(), image.chunks(block_bytes).count());
            let wanted = AddressRange::with_length(wanted.0, wanted.1).unwrap();
            let at_wanted: Vec<usize> = blocks.at_addresses(wanted).flatten().collect();
            for (block, expected) in image.chunks(block_bytes).enumerate() {
                let bytes = blocks.bytes(block);
                prop_assert_eq!(&image[bytes.clone()], expected);
                let pages = blocks.pages(block);
                prop_assert_eq!(pages.start, bytes.start as u64);
                prop_assert!(pages.end.is_multiple_of(4096) && (bytes.end as u64..bytes.end as u64 + 4096).contains(&pages.end));
                let addresses: Vec<u64> =
                    blocks.addresses(block).flat_map(|range| range.start()..range.end()).collect();
                prop_assert!(addresses == expected.iter().map(|byte| byte.address).collect::<Vec<_>>());
                let mut found = Vec::new();
                for part in blocks.parts(block) {
                    prop_assert_eq!(part.in_block.start, found.len());
                    prop_assert_eq!(part.in_block.len(), part.in_region.len());
                    prop_assert_eq!(Some(&part.region_bytes), region_bytes.get(&(part.table, part.region)));
                    found.extend(part.in_region.map(|at| (part.table, part.region, at)));
                }
                let expected_parts = expected.iter().map(|byte| (byte.table, byte.region, byte.in_region));
                prop_assert!(found == expected_parts.collect::<Vec<_>>());
                let is_wanted = |byte: &Byte| (wanted.start()..wanted.end()).contains(&byte.address);
                prop_assert_eq!(at_wanted.contains(&block), expected.iter().any(is_wanted));
                for table in 0..blocks.places().len() {
                    let has_it = expected.iter().any(|byte| byte.table == table);
                    prop_assert_eq!(blocks.of_table(table).contains(&block), has_it);
                }
            }
        }
    }
}
