//! Pieces: the parts in which a capture reads memory.
//!
//! A piece is a run of consecutive regions of one table. Pieces without work are left out: those in
//! which nothing is populated, or nothing has changed.

use std::ops::Range;

use crate::ranges::Ranges;
use crate::table::{Place, REGIONS_PER_TABLE};
use crate::units::RegionSize;

/// How many bytes a worker takes at a time. It is large enough to keep the overhead small, and
/// small enough that the pieces of all workers together fit roughly in the cache.
pub(crate) const PIECE_BYTES: usize = 1 << 20;

/// The same for a capture that processes only changes. These are a small part of each piece, so a
/// longer piece lets one write append them.
pub(crate) const CHANGED_PIECE_BYTES: usize = 8 << 20;

/// Some regions of one table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Piece {
    /// The index of its table among the tables of the plan.
    pub(crate) table: usize,
    /// The index of its mapping.
    pub(crate) mapping_index: usize,
    /// The number of its first region, counted from the beginning of the table.
    pub(crate) first_region: usize,
    /// The offset of its start in the mapping.
    pub(crate) offset_bytes: u64,
    /// Its length.
    pub(crate) length_bytes: usize,
}

impl Piece {
    /// The offset of its end in the mapping.
    pub(crate) fn end_bytes(&self) -> u64 {
        self.offset_bytes + self.length_bytes as u64
    }

    /// The range of the mapping that it covers.
    pub(crate) fn range(&self) -> Range<u64> {
        self.offset_bytes..self.end_bytes()
    }

    /// Converts a range of the mapping that lies in this piece into offsets from the start of the
    /// piece.
    pub(crate) fn place(&self, range: &Range<u64>) -> Range<usize> {
        // The range lies inside the piece, whose length is a `usize`.
        let place =
            |offset_bytes: u64| usize::try_from(offset_bytes - self.offset_bytes).unwrap_or(usize::MAX);
        place(range.start)..place(range.end)
    }
}

/// The pieces of the table at `place` that contain a byte of `ranges`, each of at most `max_bytes`.
/// `ranges` are offsets from the start of the mapping.
pub(crate) fn pieces_of(
    table: usize,
    place: Place,
    ranges: &Ranges,
    region_size: RegionSize,
    max_bytes: usize,
) -> impl Iterator<Item = Piece> {
    let piece_regions = (max_bytes / region_size.bytes()).clamp(1, REGIONS_PER_TABLE);
    let piece_bytes = piece_regions * region_size.bytes();
    (0..place.length_bytes.div_ceil(piece_bytes)).filter_map(move |at| {
        let piece = Piece {
            table,
            mapping_index: place.mapping_index,
            first_region: at * piece_regions,
            offset_bytes: place.offset_bytes + (at * piece_bytes) as u64,
            length_bytes: piece_bytes.min(place.length_bytes - at * piece_bytes),
        };
        ranges.overlaps(piece.range()).then_some(piece)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_cover_exactly_what_is_populated() {
        let size = RegionSize::default();
        let place = Place {
            mapping_index: 3,
            offset_bytes: 8 << 20,
            image_bytes: 0,
            length_bytes: (5 << 20) + 77,
            regions: 321,
        };
        let populated: Ranges =
            [0..1, (9 << 20) - 1..(9 << 20) + 1, (13 << 20)..(13 << 20) + 77].into_iter().collect();
        let pieces: Vec<_> = pieces_of(1, place, &populated, size, PIECE_BYTES).collect();
        let found: Vec<_> =
            pieces.iter().map(|piece| (piece.offset_bytes >> 20, piece.length_bytes)).collect();
        assert_eq!(found, [(8, 1 << 20), (9, 1 << 20), (13, 77)]);
        assert_eq!(pieces[1].first_region, 64);
    }
}
