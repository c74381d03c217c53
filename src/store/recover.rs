//! Recovery: puts what the packs hold past their watermarks into the index and the catalog.
//!
//! Each pack is scanned from its watermark on. In the pack that was appended to last, the scan may
//! find what a crash left unfinished: a torn tail, which is truncated, or a torn hole, which is
//! filled. Neither contains data of an acknowledged operation. All other bytes that are not a whole
//! object are damage: they are reported, and are left as they are.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

use super::catalog::{Catalog, Fact, FactRoom};
use super::error::StoreError;
use super::fact;
use super::index::Index;
use super::lock::Access;
use super::packs::location::Location;
use super::packs::lost::Lost;
use super::packs::pack::Pack;
use super::packs::ready::ready;
use super::packs::scan::Scanned;
use super::tree::{IndexEntry, Tree};
use crate::progress::{Meter, Progress};
use crate::record::SnapshotId;
use crate::region::is_zero;
use crate::units::usize_of;

/// The result of scanning the packs.
pub(super) struct Recovered {
    /// The pack to continue appending to.
    pub(super) active: Option<Arc<Pack>>,
    pub(super) ragged: Vec<Arc<Pack>>,
    pub(super) other_deltas: Vec<IndexEntry>,
    pub(super) damage_found: bool,
}

/// What is known of the packs before the scan, apart from the index.
pub(super) struct Prior<'a> {
    /// Up to where each pack was durable. No earlier byte is part of a torn tail.
    pub(super) durable_bytes: HashMap<u32, u64>,
    /// The pack that may have a torn tail.
    pub(super) last_appended: Option<u32>,
    pub(super) lost: &'a [Lost],
}

/// Scans what the packs hold and the index lacks.
pub(super) fn recover(
    packs: &[Arc<Pack>],
    index: &Index,
    catalog: &mut Catalog,
    access: Access,
    prior: &Prior<'_>,
    progress: &Progress,
) -> Result<Recovered, StoreError> {
    let (watermarks, rebuilding) = (index.watermarks(), index.is_rebuilding());
    let first_bytes = |pack: &Pack| {
        let watermark = watermarks.get(&pack.number).map_or(0, |it| it.end_bytes);
        watermark.max(pack.header_bytes())
    };
    let to_scan_bytes =
        packs.iter().map(|pack| pack.length_bytes().saturating_sub(first_bytes(pack))).sum::<u64>();
    let meter = progress.begin(to_scan_bytes);
    let mut active = None;
    let mut facts = Vec::new();
    let mut room_for_facts = FactRoom::default();
    let mut ends = Vec::new();
    let (mut ragged, mut damage_found) = (Vec::new(), false);
    let mut other_deltas = Vec::new();
    for pack in packs {
        let indexed_bytes = first_bytes(pack);
        let may_be_torn = prior.last_appended == Some(pack.number);
        // A pack that was cut short is not appended to, so that the missing part can be put back.
        let (mut is_ragged, mut damaged) = (false, prior.lost.iter().any(|lost| lost.pack.0 == pack.number));
        if pack.length_bytes() > indexed_bytes {
            // The process that wrote it may have been killed before it was durable, and from here
            // on it is relied on.
            if access == Access::Owner {
                pack.sync()?;
            }
            // Bytes that were durable once are no torn tail.
            let durable_bytes = prior.durable_bytes.get(&pack.number).copied().unwrap_or(0);
            let durable_bytes = durable_bytes.max(index.durable_bytes(pack.number, pack.id));
            let torn_from = may_be_torn.then(|| indexed_bytes.max(durable_bytes));
            // The objects found are put into the index and saved in chunks, so that they are not
            // all in memory at once.
            let take_in = |found: Vec<IndexEntry>| -> Result<(), StoreError> {
                other_deltas.append(&mut index.insert_found(found)?);
                index.save_if_much()
            };
            let torn = (torn_from, rebuilding);
            let mut tail = PackTail::scan(pack, indexed_bytes, torn, &mut room_for_facts, &meter, take_in)?;
            if access == Access::Owner {
                for hole in &tail.torn_holes {
                    tracing::info!("filling {} bytes that a power failure took", hole.end - hole.start);
                    match pack.fill(hole.clone()) {
                        Err(StoreError::DiskFull { .. }) => pack.fill_later(hole.clone()),
                        other => other?,
                    }
                }
            }
            if let Some(end_bytes) = tail.torn_at {
                tracing::info!("cutting a torn tail of {} bytes", pack.length_bytes() - end_bytes);
                match pack.cut(end_bytes, access) {
                    // On some disks, and under some quotas, truncating a file needs space. The tail
                    // is truncated as soon as there is some, and before anything is written after
                    // it.
                    Err(StoreError::DiskFull { .. }) => is_ragged = true,
                    other => other?,
                }
            }
            is_ragged |= pack.has_holes();
            if is_ragged {
                ragged.push(pack.clone());
            }
            let damaged_bytes = tail.damaged.iter().map(|(at, why)| (at, *why));
            for (offset_bytes, why) in
                damaged_bytes.chain(tail.undecodable.iter().map(|(at, why)| (at, &**why)))
            {
                tracing::warn!("pack {} is damaged at byte {offset_bytes}: {why}", pack.number);
                index.set_damage_known(true)?;
                (damaged, damage_found) = (true, true);
            }
            facts.append(&mut tail.facts);
            if !pack.has_holes() {
                ends.push((pack.number, pack.watermark(pack.length_bytes())));
            }
        }
        // The last pack of the loop decides.
        let room = pack.replaces.is_empty()
            && !damaged
            && !is_ragged
            && pack.is_ours_alone()
            && pack.length_bytes() < pack.seal_bytes()
            && pack.length_bytes() % 8 == 0;
        active = room.then(|| pack.clone());
    }
    // Notes and tombstones come after all records: gc may have moved a record into a later pack.
    facts.sort_by_key(|fact| !matches!(fact, Fact::Snapshot(..)));
    let snapshots: Vec<SnapshotId> = facts.iter().map(Fact::snapshot).collect();
    facts.into_iter().for_each(|fact| catalog.apply(fact));
    for id in snapshots {
        for (key, value) in catalog.stored(id) {
            index.set_snapshot(key, value);
        }
    }
    for (number, watermark) in ends {
        index.set_watermark(number, Some(watermark));
    }
    Ok(Recovered { active, ragged, other_deltas, damage_found })
}

/// How often progress is reported.
const TELL_BYTES: u64 = 1 << 20;

/// How many objects are put into the index at once: 4 MiB of them.
const TAKE_IN_OBJECTS: usize = 64 << 10;

/// What a pack holds past its watermark, except for the objects of the index.
#[derive(Default)]
struct PackTail {
    facts: Vec<Fact>,
    damaged: Vec<(u64, &'static str)>,
    /// Records, notes and tombstones that are whole but cannot be decoded.
    undecodable: Vec<(u64, String)>,
    /// Where to truncate the pack.
    torn_at: Option<u64>,
    /// The ranges to fill, all before that.
    torn_holes: Vec<Range<u64>>,
}

/// Bytes that are not an object.
struct Hole {
    range: Range<u64>,
    why: &'static str,
    /// Whether it can be, and looks like, the remains of bytes that were not yet durable when the
    /// power failed.
    is_torn: bool,
}

impl PackTail {
    /// Scans the tail of a pack. In the pack that was appended to last, the bytes after the first
    /// ones that are not an object, and after the last record, note and tombstone, belong to no
    /// acknowledged operation: they are a torn tail. When the whole index is rebuilt, it is unknown
    /// where the last record was. The bytes are then a torn tail only if they look like one.
    ///
    /// If several writes were not yet durable, a power failure may lose an earlier one and keep a
    /// later one. That leaves a torn hole.
    ///
    /// Objects that are not in a torn tail are passed to `take_in`.
    fn scan(
        pack: &Pack,
        from_bytes: u64,
        (torn_from, rebuilding): (Option<u64>, bool),
        room_for_facts: &mut FactRoom,
        meter: &Meter,
        mut take_in: impl FnMut(Vec<IndexEntry>) -> Result<(), StoreError>,
    ) -> Result<PackTail, StoreError> {
        let bytes = pack.bytes(pack.length_bytes())?;
        let mut tail = PackTail::default();
        let offset_of_last =
            |found: &[IndexEntry]| found.last().map(|(_, _, location)| location.offset_bytes);
        let (mut torn_at, mut holes) = (None, Vec::new());
        // Objects that were not passed on yet, and the offset of the last object that stays.
        let (mut objects, mut last_object) = (Vec::new(), 0);
        let mut told_bytes = from_bytes;
        let mut records = HashMap::new();
        // Everything before this offset was durable.
        let mut durable_bytes = 0;
        for scanned in pack.scan(&bytes, from_bytes) {
            let scanned = scanned?;
            let end_bytes = scanned.end_bytes();
            if end_bytes - told_bytes >= TELL_BYTES || end_bytes == pack.length_bytes() {
                meter.advance(end_bytes - told_bytes)?;
                told_bytes = end_bytes;
            }
            match scanned {
                Scanned::Object { offset_bytes, header, payload } => {
                    let location = Location::new(pack.number, offset_bytes, &header);
                    let fact = fact::read(&header, payload, location).and_then(|fact| match fact {
                        Some(fact) => {
                            let has_room = fact.take_room(room_for_facts);
                            has_room.map(|()| Some(fact)).map_err(|error| error.to_string())
                        }
                        None => Ok(None),
                    });
                    match fact {
                        Ok(None) => objects.push((Tree::of(header.kind), header.hash, location)),
                        Ok(Some(fact)) => {
                            // A snapshot was acknowledged before another one became its child and
                            // before it was forgotten.
                            let acknowledged = match &fact {
                                Fact::Snapshot(_, entry) => entry.held().parent(),
                                Fact::Tombstone(id, _) => Some(*id),
                                Fact::Note(..) => None,
                            };
                            let there = acknowledged.and_then(|id| records.get(&id).copied());
                            durable_bytes = durable_bytes.max(there.unwrap_or(0));
                            if let Fact::Snapshot(id, _) = &fact {
                                records.insert(*id, offset_bytes);
                            }
                            tail.facts.push(fact);
                            torn_at = None;
                        }
                        // It is unknown what it refers to.
                        Err(why) => {
                            tail.undecodable.push((offset_bytes, why));
                            torn_at = None;
                        }
                    }
                }
                Scanned::Damaged { offset_bytes, end_bytes, why, .. } => {
                    let hole = offset_bytes..end_bytes;
                    let [start, end] = [hole.start, hole.end].map(usize_of);
                    ready(&bytes, start..end)?;
                    let ends = end_bytes == pack.length_bytes() && why.starts_with("the pack ends");
                    let looks_torn = ends || lacks_a_sector(&bytes, hole);
                    let may_be_torn = torn_from.is_some_and(|from_bytes| offset_bytes >= from_bytes);
                    let is_torn = may_be_torn && looks_torn;
                    holes.push(Hole { range: offset_bytes..end_bytes, why, is_torn });
                    if may_be_torn && (!rebuilding || looks_torn) {
                        torn_at = torn_at.or(Some(offset_bytes));
                    }
                }
            }
            if torn_at.is_none() && objects.len() >= TAKE_IN_OBJECTS {
                last_object = offset_of_last(&objects).unwrap_or(last_object);
                take_in(std::mem::take(&mut objects))?;
            }
        }
        if let Some(end_bytes) = torn_at {
            objects.retain(|(_, _, location)| location.offset_bytes < end_bytes);
            holes.retain(|hole| hole.range.start < end_bytes);
        }
        // Without an index, a torn hole cannot be distinguished from damage, unless everything
        // after it was written at once.
        last_object = offset_of_last(&objects).unwrap_or(last_object);
        take_in(objects)?;
        for Hole { range, why, is_torn } in holes {
            let is_torn = is_torn && (!rebuilding || range.start > last_object);
            if is_torn && range.start >= durable_bytes && Pack::can_fill(&range) {
                tail.torn_holes.push(range)
            } else {
                tail.damaged.push((range.start, why))
            }
        }
        Ok(PackTail { torn_at, ..tail })
    }
}

/// The unit that a disk writes entirely or not at all.
const SECTOR_BYTES: usize = 512;

/// Whether a sector of these bytes is all zeros, as if it had never been written. Of the first
/// sector, only the part in the hole counts: the rest may have been written before. Stored bytes
/// hardly ever contain a sector of zeros, and no object begins with one.
fn lacks_a_sector(bytes: &[u8], hole: Range<u64>) -> bool {
    let [start, end] = [hole.start, hole.end].map(|at| usize_of(at).min(bytes.len()));
    let mut from = start;
    while from < end {
        let to = (from / SECTOR_BYTES + 1).saturating_mul(SECTOR_BYTES).min(end);
        let reaches_its_end = to % SECTOR_BYTES == 0 || to == bytes.len();
        if reaches_its_end && is_zero(&bytes[from..to]) {
            return true;
        }
        from = to;
    }
    false
}
