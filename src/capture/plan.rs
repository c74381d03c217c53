//! The plan of a capture: which tables it processes, and which bytes of memory it reads for each.
//!
//! The plan is made while the source is open, and reads no memory. If the changes since the parent
//! are known, the capture reads only these. Tables without a change are taken over from the parent,
//! unread. If a region changed in part, its unchanged bytes come from the parent's region in the
//! store. They do not come from memory, which may have been written again by then.

use std::ops::Range;

use super::piece::{CHANGED_PIECE_BYTES, PIECE_BYTES, Piece, pieces_of};
use super::reference::ReferenceMapping;
use crate::address_space::AddressSpace;
use crate::hash::Hash;
use crate::ranges::Ranges;
use crate::source::{Frozen, SourceError};
use crate::table::{self, MappingTables, Place, Places};
use crate::units::RegionSize;

/// What is to be done for one capture. `Ranges` are counted from the start of their mapping.
pub(super) struct Plan {
    pub(super) region_size: RegionSize,
    /// How many tables the root has.
    pub(super) root_tables: usize,
    /// Those in which there is something to do, in the order of the root.
    pub(super) tables: Vec<PlannedTable>,
    /// Those that are the parent's, and which.
    pub(super) taken_over: Vec<(usize, Hash)>,
    /// How many bytes of zeros there are outside these tables that the parent does not have.
    pub(super) zero_bytes: u64,
    /// For each mapping what is to be read: what may be something else than zeros, and of that what
    /// changed, if that is known.
    wanted: Vec<Ranges>,
    /// For each mapping what changed, if that is known.
    changed: Option<Vec<Ranges>>,
    /// For each mapping what the caller excluded.
    excluded: Vec<Ranges>,
}

/// One table that is worked on.
pub(super) struct PlannedTable {
    /// Which table of the root.
    pub(super) at: usize,
    pub(super) place: Place,
    /// The reference's table in the same place.
    pub(super) reference: Hash,
    /// How much memory the reference's table covers.
    pub(super) reference_bytes: usize,
}

impl Plan {
    /// Makes the plan. `reference` has, for each mapping, the mapping that it is compared with.
    /// `changes` is what may differ from it, if that is known.
    pub(super) fn new(
        space: &AddressSpace,
        frozen: &dyn Frozen,
        reference: &[ReferenceMapping<'_>],
        changes: Option<Vec<Ranges>>,
        region_size: RegionSize,
    ) -> Result<Plan, SourceError> {
        let all_excluded: Ranges = space.excluded().iter().copied().collect();
        let (mut wanted, mut excluded) = (Vec::new(), Vec::new());
        for (at, mapping) in space.mappings().iter().enumerate() {
            wanted.push(if mapping.captured { frozen.populated(at)? } else { Ranges::new() });
            excluded.push(all_excluded.from_start_of(mapping.range.start()..mapping.range.end()));
        }
        let changed = changes.map(|mut changed| {
            changed.resize(space.mappings().len(), Ranges::new());
            let reference_bytes = reference.iter().map(|mapping| mapping.length_bytes);
            let mappings = space.mappings().iter().zip(reference_bytes.chain(std::iter::repeat(0)));
            for ((ranges, wanted), (mapping, reference_bytes)) in
                changed.iter_mut().zip(&mut wanted).zip(mappings)
            {
                add_growth(ranges, reference_bytes, mapping.range.length_bytes(), region_size);
                *wanted = ranges.intersection(wanted);
            }
            changed
        });
        let places = Places::new(space, region_size);
        let mut plan = Plan {
            region_size,
            root_tables: places.count(),
            tables: Vec::new(),
            taken_over: Vec::new(),
            zero_bytes: 0,
            wanted,
            changed,
            excluded,
        };
        for mapping in places.mappings() {
            let reference = reference.get(mapping.mapping_index).copied().unwrap_or_default();
            plan.add_mapping(&places, mapping, reference);
        }
        Ok(plan)
    }

    /// Plans the tables of a mapping that need work. All other tables are equal to the reference's
    /// if the changes are known, and otherwise all zeros. These others are not visited one by one.
    fn add_mapping(&mut self, places: &Places, mapping: &MappingTables, reference: ReferenceMapping<'_>) {
        let covered_bytes = table::covered_bytes(self.region_size);
        let in_mapping = mapping.tables();
        let mut wanted = tables_in(&self.wanted[mapping.mapping_index], covered_bytes);
        for (at, hash) in reference.tables.stored().take_while(|(at, _)| *at < in_mapping.len()) {
            let table = at as u64 * covered_bytes..(at as u64 + 1) * covered_bytes;
            match &self.changed {
                Some(changed) if !changed[mapping.mapping_index].overlaps(table) => {
                    self.taken_over.push((in_mapping.start + at, hash));
                }
                _ => wanted.push(at as u64),
            }
        }
        wanted.sort_unstable();
        wanted.dedup();
        // How many bytes of zeros are new: all bytes, or the bytes by which the mapping grew.
        let whole_bytes = mapping.range.length_bytes();
        let mut zero_bytes = match self.changed {
            Some(_) => whole_bytes.saturating_sub(reference.length_bytes),
            None => whole_bytes,
        };
        for at in wanted {
            let place = places.place(mapping, at);
            let table = PlannedTable {
                at: in_mapping.start + usize::try_from(at).unwrap_or(usize::MAX),
                place,
                reference: usize::try_from(at).map_or(Hash::ZERO, |at| reference.tables.get(at)),
                reference_bytes: covered_of(reference, &place),
            };
            zero_bytes -= match self.changed {
                Some(_) => place.length_bytes - table.reference_bytes,
                None => place.length_bytes,
            } as u64;
            self.tables.push(table);
        }
        self.zero_bytes += zero_bytes;
    }

    /// Makes the plan compare everything with a similar snapshot that is not the parent. Must be
    /// called before work begins.
    pub(super) fn compare_with(&mut self, reference: &[ReferenceMapping<'_>]) {
        let covered_bytes = table::covered_bytes(self.region_size);
        for table in &mut self.tables {
            let reference = reference.get(table.place.mapping_index).copied().unwrap_or_default();
            let at = usize::try_from(table.place.offset_bytes / covered_bytes);
            table.reference = at.map_or(Hash::ZERO, |at| reference.tables.get(at));
            table.reference_bytes = covered_of(reference, &table.place);
        }
    }

    /// How many bytes the capture reads.
    pub(super) fn wanted_bytes(&self) -> u64 {
        self.wanted.iter().map(Ranges::length_bytes).sum()
    }

    /// The changes of a mapping, if they are known.
    pub(super) fn changed(&self, mapping_index: usize) -> Option<&Ranges> {
        self.changed.as_ref().map(|changed| &changed[mapping_index])
    }

    /// Whether it is known what changed.
    pub(super) fn is_tracked(&self) -> bool {
        self.changed.is_some()
    }

    /// All pieces to process, in order.
    pub(super) fn pieces(&self) -> impl Iterator<Item = Piece> + '_ {
        (0..self.tables.len()).flat_map(|table| self.pieces_of(table))
    }

    /// The pieces of one table to process.
    pub(super) fn pieces_of(&self, table: usize) -> impl Iterator<Item = Piece> {
        let max_bytes = if self.is_tracked() { CHANGED_PIECE_BYTES } else { PIECE_BYTES };
        let ranges = self.ranges_of(&self.tables[table]);
        pieces_of(table, self.tables[table].place, ranges, self.region_size, max_bytes)
    }

    /// The ranges that determine which regions of a table are processed.
    fn ranges_of(&self, table: &PlannedTable) -> &Ranges {
        let mapping_index = table.place.mapping_index;
        match self.changed(mapping_index) {
            // If the parent has only zeros there, unpopulated memory did not change.
            Some(changed) if !table.reference.is_zero() => changed,
            _ => &self.wanted[mapping_index],
        }
    }

    /// The regions of a piece to process, counted from the beginning of their table.
    pub(super) fn regions_of(&self, piece: &Piece) -> Vec<usize> {
        let region_bytes = self.region_size.bytes();
        let last = piece.first_region + piece.length_bytes.div_ceil(region_bytes);
        if !self.is_tracked() {
            return (piece.first_region..last).collect();
        }
        let mut regions: Vec<usize> = Vec::new();
        for range in self.ranges_of(&self.tables[piece.table]).within(piece.range()) {
            let range = piece.place(&range);
            let first = piece.first_region + range.start / region_bytes;
            let first = regions.last().map_or(first, |last| first.max(last + 1));
            regions.extend(first..piece.first_region + range.end.div_ceil(region_bytes));
        }
        regions
    }

    /// The ranges of a piece to read.
    pub(super) fn wanted_of(&self, piece: &Piece) -> impl Iterator<Item = Range<u64>> {
        self.wanted[piece.mapping_index].within(piece.range())
    }

    /// How many bytes of a piece to read.
    pub(super) fn wanted_bytes_of(&self, piece: &Piece) -> usize {
        // Not longer than the piece.
        self.wanted_of(piece)
            .map(|range| usize::try_from(range.end - range.start).unwrap_or(usize::MAX))
            .sum()
    }

    /// What the caller excluded of a piece.
    pub(super) fn excluded_of(&self, piece: &Piece) -> impl Iterator<Item = Range<u64>> {
        self.excluded[piece.mapping_index].within(piece.range())
    }

    /// Whether all bytes of a piece are to be read, so that they need not be put together.
    pub(super) fn is_whole(&self, piece: &Piece) -> bool {
        !self.is_tracked()
            && self.excluded_of(piece).next().is_none()
            && self.wanted_of(piece).next() == Some(piece.range())
    }
}

/// How many bytes the reference's table at this place covers.
fn covered_of(reference: ReferenceMapping<'_>, place: &Place) -> usize {
    let bytes = reference.length_bytes.saturating_sub(place.offset_bytes);
    usize::try_from(bytes).map_or(place.length_bytes, |bytes| bytes.min(place.length_bytes))
}

/// The numbers of the tables of a mapping that contain a byte of `ranges`, in order.
fn tables_in(ranges: &Ranges, covered_bytes: u64) -> Vec<u64> {
    let mut found: Vec<u64> = Vec::new();
    for range in ranges {
        let first = (range.start / covered_bytes).max(found.last().map_or(0, |last| last + 1));
        found.extend(first..range.end.div_ceil(covered_bytes));
    }
    found
}

/// Adds to the changes the bytes by which a mapping grew, and the region that was its last.
fn add_growth(changed: &mut Ranges, parent_bytes: u64, length_bytes: u64, region_size: RegionSize) {
    if parent_bytes < length_bytes {
        let region_bytes = region_size.bytes() as u64;
        let start = parent_bytes / region_bytes * region_bytes;
        changed.truncate(length_bytes);
        changed.insert(start..length_bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[allow(clippy::single_range_in_vec_init)]
    fn what_a_mapping_grew_by_changed_and_so_did_the_region_that_was_cut() {
        let region_size = RegionSize::new(512).unwrap();
        let grown = |ranges: &[Range<u64>], before, now| {
            let mut changed: Ranges = ranges.iter().cloned().collect();
            add_growth(&mut changed, before, now, region_size);
            changed
        };
        assert_eq!(grown(&[10..20, 600..700], 1300, 5000), [10..20, 600..700, 1024..5000]);
        assert_eq!(grown(&[10..20, 600..1100, 4000..6000], 1300, 5000), [10..20, 600..5000]);
        assert_eq!(grown(&[10..20], 5000, 5000), [10..20, 0..0][..1]);
        assert_eq!(grown(&[], 0, 7), [0..7, 0..0][..1]);
    }

    #[test]
    fn tables_are_found_once_each() {
        let ranges: Ranges = [0..1, 99..101, 150..160, 500..701].into_iter().collect();
        assert_eq!(tables_in(&ranges, 100), [0, 1, 5, 6, 7]);
    }
}
