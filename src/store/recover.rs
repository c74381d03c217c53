//! Recovery: what the packs hold past their watermarks goes into the index and the catalog.
//!
//! The packs are scanned from their watermarks on. In the pack that was appended to last the scan may find what a crash
//! left unfinished: a torn tail, which is cut off, or a torn hole, which is filled. Both belong to nothing that was
//! acknowledged. Everything else that is no whole object is damage: it is told, and nothing of it is changed.

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

/// What came of scanning the packs.
pub(super) struct Recovered {
    /// The pack to go on appending to.
    pub(super) active: Option<Arc<Pack>>,
    pub(super) ragged: Vec<Arc<Pack>>,
    pub(super) other_deltas: Vec<IndexEntry>,
    pub(super) damage_found: bool,
}

/// What is known of the packs before they are scanned, apart from the index.
pub(super) struct Prior<'a> {
    /// Up to where they were durable once: nothing of that is a torn tail.
    pub(super) durable_bytes: HashMap<u32, u64>,
    /// The one that may have a torn tail.
    pub(super) last_appended: Option<u32>,
    pub(super) lost: &'a [Lost],
}

/// Scans what the index lacks of the packs.
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
        // What was cut short is not appended to, so that it can be put back.
        let (mut is_ragged, mut damaged) = (false, prior.lost.iter().any(|lost| lost.pack.0 == pack.number));
        if pack.length_bytes() > indexed_bytes {
            // Whoever wrote it may have been killed before it was durable, and from here on it is relied on.
            if access == Access::Owner {
                pack.sync()?;
            }
            // What was durable once is no torn tail.
            let durable_bytes = prior.durable_bytes.get(&pack.number).copied().unwrap_or(0);
            let durable_bytes = durable_bytes.max(index.durable_bytes(pack.number, pack.id));
            let torn_from = may_be_torn.then(|| indexed_bytes.max(durable_bytes));
            // What is found goes into the index in chunks, and is saved: not all at once in memory.
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
                    // There are disks, and quotas, where cutting a file takes room. It is cut as soon as there is
                    // some, and before anything is written behind it.
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
        // The last one, as it turns out.
        let room = pack.replaces.is_empty()
            && !damaged
            && !is_ragged
            && pack.is_ours_alone()
            && pack.length_bytes() < pack.seal_bytes()
            && pack.length_bytes() % 8 == 0;
        active = room.then(|| pack.clone());
    }
    // Notes and tombstones come after all records: gc may have put a record into a later pack.
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

/// How often progress is told.
const TELL_BYTES: u64 = 1 << 20;

/// So many objects go into the index at once: 4 MiB of them.
const TAKE_IN_OBJECTS: usize = 64 << 10;

/// What a pack holds past its watermark, but for the objects that the index is to know.
#[derive(Default)]
struct PackTail {
    facts: Vec<Fact>,
    damaged: Vec<(u64, &'static str)>,
    /// Records, notes and tombstones that are whole and yet say nothing.
    undecodable: Vec<(u64, String)>,
    /// Where to cut the pack.
    torn_at: Option<u64>,
    /// What to fill, before that.
    torn_holes: Vec<Range<u64>>,
}

/// Bytes that are no object.
struct Hole {
    range: Range<u64>,
    why: &'static str,
    /// It may be what a power failure left of bytes that nobody relied on, and it looks so.
    is_torn: bool,
}

impl PackTail {
    /// Scans it. In the pack that was appended to last, what comes after the first bytes that are no
    /// object, and after the last record, note and tombstone, belongs to nothing that was
    /// acknowledged: a torn tail. When the whole index is rebuilt one cannot know where the last
    /// record was; then it is one only if it looks so.
    ///
    /// Where several things were written and not yet durable, a power failure may also keep the later ones
    /// and lose earlier ones. That leaves a torn hole.
    ///
    /// Objects that are in no torn tail are given to `take_in`.
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
        // Those that were not taken in yet, and where the last one begins of all that stay.
        let (mut objects, mut last_object) = (Vec::new(), 0);
        let mut told_bytes = from_bytes;
        let mut records = HashMap::new();
        // What came before this was durable.
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
                            // A snapshot was acknowledged before another one followed it or it was forgotten.
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
                        // Nobody can know what it needs.
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
        // Without an index there is no telling a hole from damage, unless all that follows was written at once.
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

/// What is written to a disk at once, or not.
const SECTOR_BYTES: usize = 512;

/// Whether a sector of these bytes is all zeros, as if never written; of the first one, which may have been there,
/// the rest. What is stored hardly ever has a sector of zeros, and no object begins with one.
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
