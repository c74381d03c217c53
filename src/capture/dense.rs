//! The regions of a piece that a worker processes, side by side in a buffer.

use std::ops::Range;

use super::piece::Piece;

/// Some regions of a piece, stored side by side without the regions between them.
pub(super) struct Dense<'a> {
    pub(super) piece: &'a Piece,
    /// Region numbers, counted from the beginning of the table. Invariant: ascending.
    pub(super) regions: &'a [usize],
    pub(super) region_bytes: usize,
}

impl Dense<'_> {
    /// The range of the mapping that a region covers.
    pub(super) fn range_of(&self, region: usize) -> Range<u64> {
        let start = self.piece.offset_bytes + ((region - self.piece.first_region) * self.region_bytes) as u64;
        start..self.piece.end_bytes().min(start + self.region_bytes as u64)
    }

    pub(super) fn length_bytes(&self) -> usize {
        let last = self.regions.last().map_or(0..0, |region| self.range_of(*region));
        let last_bytes = usize::try_from(last.end - last.start).unwrap_or(usize::MAX);
        self.regions.len().saturating_sub(1) * self.region_bytes + last_bytes
    }

    /// The position in the buffer of a range that lies within these regions.
    pub(super) fn place(&self, range: &Range<u64>) -> Range<usize> {
        let range = self.piece.place(range);
        let first = self.piece.first_region + range.start / self.region_bytes;
        let at = self.regions.partition_point(|region| *region < first);
        let start = at * self.region_bytes + range.start % self.region_bytes;
        start..start + range.len()
    }

    /// The positions in the buffer of the parts of `range`: one part for each region that the range
    /// overlaps.
    pub(super) fn parts(&self, range: &Range<u64>) -> impl Iterator<Item = Range<usize>> {
        let first = self.regions.partition_point(|region| self.range_of(*region).end <= range.start);
        self.regions[first..].iter().map_while(move |region| {
            let here = self.range_of(*region);
            let shared = here.start.max(range.start)..here.end.min(range.end);
            (shared.start < shared.end).then(|| self.place(&shared))
        })
    }
}
