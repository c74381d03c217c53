//! Where a snapshot has anything but zeros.

use std::ops::Range;

use super::Rollback;
use crate::error::Error;
use crate::ranges::overlapping;
use crate::store::packs::object::ObjectKind;
use crate::store::read::{Check, Reader};

/// The regions with content that share addresses with `ranges`, which are sorted and apart: cut to them.
pub(super) fn filled(rollback: &Rollback<'_>, ranges: &[Range<u64>]) -> Result<Vec<Range<u64>>, Error> {
    let region_bytes = rollback.record.region_size.bytes() as u64;
    let mut reader = Reader::new(rollback.shared, Check::Full);
    let mut filled = Vec::new();
    let places = rollback.places();
    for (at, table) in rollback.root.stored() {
        let Some(place) = places.get(*at) else { continue };
        let mapping = &rollback.space.mappings()[place.mapping_index];
        let start = mapping.range.start() + place.offset_bytes;
        let end = start + place.length_bytes as u64;
        if overlapping(ranges, start..end).next().is_none() {
            continue;
        }
        let hashes = reader.hashes(ObjectKind::Table, table, place.regions)?;
        for (region, _) in hashes.iter().enumerate().filter(|(_, hash)| !hash.is_zero()) {
            let at = start + region as u64 * region_bytes;
            filled.extend(overlapping(ranges, at..end.min(at + region_bytes)));
        }
    }
    Ok(filled)
}
