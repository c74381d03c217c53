//! Gc: what no snapshot needs any more is given back.
//!
//! Mark, condemn, drop, compact; `store/gate.rs` says why captures can go on meanwhile. It needs 8
//! bytes of memory for each region and object, beside what the index takes.

use std::cell::Cell;
use std::collections::{BTreeMap, HashSet, VecDeque};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::address_space::AddressSpace;
use crate::erase;
use crate::error::Error;
use crate::hash::Hash;
use crate::progress::{Meter, Progress};
use crate::record::SnapshotId;
use crate::store::commit;
use crate::store::compact::{Compacted, Keep, compact};
use crate::store::error::StoreError;
use crate::store::gate::Condemned;
use crate::store::held::Held;
use crate::store::marks::{Marked, Marks};
use crate::store::packs::header::PackHeader;
use crate::store::packs::location::{Location, Position};
use crate::store::packs::object::{self, Kind};
use crate::store::packs::pack::Pack;
use crate::store::packs::read::{Check, Reader};
use crate::store::tree::{IndexEntry, Tree};
use crate::store::{Shared, Store};
use crate::sys::file;
use crate::table::Places;

/// How to collect.
#[derive(Clone, Debug)]
pub struct GcOptions {
    /// Only find out what would be given back.
    pub dry_run: bool,
    /// Packs are rewritten when more than this share of them is unused, in percent. Less means
    /// less space wasted and more copying.
    pub max_unused_percent: u8,
    /// Leave nothing of what is forgotten: also not as the base of a delta of a live snapshot, in a part of a pack that
    /// may be unused, or in the index. No capture runs meanwhile; one that is running is waited for.
    pub erase: bool,
    /// Watches it.
    pub progress: Progress,
}

impl Default for GcOptions {
    fn default() -> Self {
        GcOptions { dry_run: false, max_unused_percent: 10, erase: false, progress: Progress::default() }
    }
}

/// What gc did, or with `dry_run` would do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
#[non_exhaustive]
pub struct GcStats {
    /// Regions that snapshots need, also as bases of deltas.
    pub live_regions: u64,
    /// Regions that none needs; they are dropped from the index.
    pub dead_regions: u64,
    /// By how much the packs shrank.
    pub freed_bytes: u64,
    /// With [`GcOptions::erase`]: how many bytes are gone that no live snapshot has. What was stored whole for that is
    /// not taken off.
    pub erased_bytes: u64,
    /// Packs that are gone and had nothing to keep.
    pub packs_removed: u64,
    /// Packs that are gone and of which something was copied.
    pub packs_rewritten: u64,
    /// How long it took.
    #[serde(rename = "elapsed_ms", serialize_with = "crate::report::milliseconds")]
    pub elapsed: Duration,
}

impl Store {
    /// Gives back what no snapshot needs. Captures and restores may go on meanwhile.
    ///
    /// Cost: reads the tables of all snapshots, distinct ones once; copies what is still needed
    /// of the packs that it rewrites.
    ///
    /// # Errors
    ///
    /// When the store cannot be read or written. On a full disk what can be freed is, which is no error; if that is
    /// nothing, the error says how much must be free besides. If a table is damaged, or a whole pack with records
    /// in it, nobody can know what it needed, and nothing is collected. If the index lacks what a snapshot needs and no damage is
    /// known, it refuses as well: [`repair`](Store::repair) builds the index anew.
    ///
    /// With [`GcOptions::erase`] also [`StoreError::CannotErase`] where something is in the way (damage, files that were
    /// set aside, a forgotten snapshot that is being read) and [`StoreError::DiskFull`] unless there is room for all
    /// of it: nothing is changed then. [`StoreError::NotErased`] if something is left.
    pub fn gc(&self, options: &GcOptions) -> Result<GcStats, Error> {
        let started = Instant::now();
        let shared = &**self.shared();
        shared.check_process()?;
        if !options.dry_run {
            shared.check_writable()?;
        }
        let _one_at_a_time = shared.collecting.lock();
        if let Some((name, why)) = shared.unusable.first() {
            return Err(StoreError::UnusablePack { path: name.into(), why: why.clone() }.into());
        }
        if !options.dry_run {
            shared.clear_away(Vec::new())?;
        }
        let mut stats = match options {
            GcOptions { dry_run: true, .. } => Collecting::begin(shared).plan(&HashSet::new(), options)?,
            GcOptions { erase: true, .. } => erase_all(shared, options)?,
            _ => {
                let (stats, _) = collect(shared, options)?;
                shared.index().rewrite_if_bloated()?;
                stats
            }
        };
        stats.elapsed = started.elapsed();
        Ok(stats)
    }

    /// By how much the packs would shrink in a [`gc`](Self::gc) with default options if these
    /// snapshots were forgotten.
    ///
    /// # Errors
    ///
    /// As [`gc`](Self::gc).
    pub fn freeable_bytes(&self, forgotten: &[SnapshotId]) -> Result<u64, Error> {
        let shared = &**self.shared();
        shared.check_process()?;
        let _one_at_a_time = shared.collecting.lock();
        let forgotten = forgotten.iter().copied().collect();
        Ok(Collecting::begin(shared).plan(&forgotten, &GcOptions::default())?.freed_bytes)
    }
}

/// Marks, drops and compacts. Answers also which pack was left, if there are damaged bytes in one.
fn collect(shared: &Shared, options: &GcOptions) -> Result<(GcStats, Option<PathBuf>), Error> {
    let collecting = Collecting::begin(shared);
    let condemned = collecting.condemn(collecting.mark(&options.progress)?)?;
    let stats = collecting.sweep(&condemned, options)?;
    Ok((stats, collecting.left.take()))
}

/// Collects so that nothing is left.
fn erase_all(shared: &Shared, options: &GcOptions) -> Result<GcStats, Error> {
    let _none_runs = shared.gate.hold_captures();
    erase::check(shared)?;
    let lifts = erase::plan(shared, &options.progress)?;
    erase::check_room(shared, &lifts)?;
    let lifted_bytes = erase::lift(shared, lifts, &options.progress)?;
    let (mut stats, mut left) = (GcStats::default(), None);
    for _ in 0..MAX_ROUNDS {
        let round;
        (round, left) = collect(shared, options)?;
        stats.live_regions = round.live_regions;
        stats.dead_regions += round.dead_regions;
        stats.erased_bytes += round.freed_bytes;
        stats.packs_removed += round.packs_removed;
        stats.packs_rewritten += round.packs_rewritten;
        if round.packs_removed + round.packs_rewritten == 0 {
            break;
        }
    }
    stats.freed_bytes = stats.erased_bytes.saturating_sub(lifted_bytes);
    erase::renew_index(shared)?;
    match left {
        Some(path) => {
            Err(StoreError::NotErased { path, why: "it is damaged; see `stillframe verify`" }.into())
        }
        None => Ok(stats),
    }
}

/// The live snapshots.
pub(crate) fn live_snapshots(shared: &Shared) -> Vec<(SnapshotId, Held)> {
    shared.catalog().all_live().map(|(id, entry)| (*id, entry.held().clone())).collect()
}

/// When the records of forgotten snapshots are gone, their tombstones can go: one round each, one that finds nothing, and
/// one for labels that change meanwhile.
const MAX_ROUNDS: usize = 4;

/// Packs of less than this share of a full one are put together when there are many of them: after each gc that
/// wrote one the next capture begins a pack.
const SMALL: u64 = 16;

/// So many are not many.
const MAX_SMALL: usize = 16;

/// Packs that together become one, and what is to be kept of them, in bytes.
type Group = (Vec<Arc<Pack>>, u64);

/// A gc under way. Dropping it opens the gate again.
struct Collecting<'a> {
    shared: &'a Shared,
    horizon: Position,
    /// A pack that was to be replaced and is damaged.
    left: Cell<Option<PathBuf>>,
}

impl Drop for Collecting<'_> {
    fn drop(&mut self) {
        self.shared.gate.end_gc();
    }
}

impl<'a> Collecting<'a> {
    fn begin(shared: &'a Shared) -> Collecting<'a> {
        shared.gate.begin_gc();
        Collecting { shared, horizon: shared.log.position(), left: Cell::default() }
    }

    /// What collecting would do if these were forgotten.
    fn plan(&self, forgotten: &HashSet<SnapshotId>, options: &GcOptions) -> Result<GcStats, Error> {
        let lifts = options.erase.then(|| erase::plan(self.shared, &options.progress)).transpose()?;
        let mut marking = match options.erase {
            true => Marking::without_bases(self.shared, &options.progress)?,
            false => Marking::begin(self.shared, &options.progress)?,
        };
        marking
            .mark_all(live_snapshots(self.shared).into_iter().filter(|(id, _)| !forgotten.contains(id)))?;
        let Marking { regions, objects, .. } = marking;
        let condemned = Condemned { horizon: self.horizon, regions, objects };
        let (live_bytes, mut stats) = self.weigh(&condemned, forgotten)?;
        let groups = self.groups(&live_bytes, forgotten, options)?;
        for (packs, live_bytes) in &groups {
            let old_bytes: u64 = packs.iter().map(|pack| pack.length_bytes()).sum();
            let new_bytes =
                if *live_bytes == 0 { 0 } else { PackHeader::bytes_for(packs.len()) + live_bytes };
            stats.freed_bytes += old_bytes.saturating_sub(new_bytes);
            let count = if *live_bytes == 0 { &mut stats.packs_removed } else { &mut stats.packs_rewritten };
            *count += packs.len() as u64;
        }
        if let Some(lifts) = lifts {
            stats.erased_bytes = stats.freed_bytes + lifts.replaced_bytes();
            stats.freed_bytes = stats.erased_bytes.saturating_sub(lifts.most_bytes());
        }
        Ok(stats)
    }

    /// Marks what the live snapshots need.
    fn mark(&self, progress: &'a Progress) -> Result<Marking<'a>, Error> {
        let mut marking = Marking::begin(self.shared, progress)?;
        marking.mark_all(live_snapshots(self.shared))?;
        Ok(marking)
    }

    /// Marks what is pinned besides, and publishes the rest as condemned.
    fn condemn(&self, mut marking: Marking<'a>) -> Result<Arc<Condemned>, Error> {
        loop {
            let Marking { regions, objects, .. } = marking;
            let condemned = Condemned { horizon: self.horizon, regions, objects };
            match self.shared.gate.condemn(condemned, &marking.marked) {
                Ok(condemned) => return Ok(condemned),
                Err(unmarked) => {
                    let (Condemned { regions, objects, .. }, unmarked) = *unmarked;
                    marking = Marking { regions, objects, ..marking };
                    marking.mark_all(unmarked)?;
                }
            }
        }
    }

    /// Drops what is condemned and compacts the packs it was in.
    fn sweep(&self, condemned: &Condemned, options: &GcOptions) -> Result<GcStats, Error> {
        let (live_bytes, mut stats) = self.weigh(condemned, &HashSet::new())?;
        self.drop_dead(condemned, &stats)?;
        let groups = self.groups(&live_bytes, &HashSet::new(), options)?;
        // The active pack is among them: from here on it is not appended to, and what was appended
        // to it meanwhile must be in the index before it is copied.
        for pack in groups.iter().flat_map(|(packs, _)| packs) {
            self.shared.log.seal(pack.number);
        }
        self.shared.sync()?;
        self.shared.settle_all();
        let needed: HashSet<SnapshotId> = self.shared.catalog().all().map(|(id, _)| *id).collect();
        let keep = KeepLive { shared: self.shared, condemned, needed };
        let mut waiting: VecDeque<Vec<Arc<Pack>>> = groups.into_iter().map(|(packs, _)| packs).collect();
        let mut crowded = Crowded { live_bytes: &live_bytes, room_made: false, left: Vec::new(), why: None };
        while let Some(packs) = waiting.pop_front() {
            options.progress.check()?;
            match compact(self.shared, &packs, &keep, false) {
                Ok(Compacted { removed, removed_bytes, written_bytes, left }) => {
                    if left.is_some() {
                        self.left.set(left);
                    }
                    stats.freed_bytes += removed_bytes.saturating_sub(written_bytes);
                    let count = if written_bytes == 0 {
                        &mut stats.packs_removed
                    } else {
                        &mut stats.packs_rewritten
                    };
                    *count += removed;
                }
                Err(error @ StoreError::DiskFull { .. }) => {
                    crowded.out_of_room(self.shared, packs, error, &mut waiting)?;
                }
                Err(error) => return Err(error.into()),
            }
        }
        crowded.end(self.shared, &stats, options)?;
        Ok(stats)
    }

    /// What is needed of each pack, and how many regions that is.
    fn weigh(
        &self,
        condemned: &Condemned,
        forgotten: &HashSet<SnapshotId>,
    ) -> Result<(BTreeMap<u32, u64>, GcStats), Error> {
        let mut live_bytes: BTreeMap<u32, u64> = BTreeMap::new();
        let mut stats = GcStats::default();
        let index = self.shared.index();
        for tree in Tree::ALL {
            for entry in index.entries(tree) {
                let (hash, location) = entry?;
                let dead = condemned.contains(tree, &hash, location);
                if !dead && Position::from(location) < self.horizon {
                    *live_bytes.entry(location.pack).or_default() += location.object_bytes();
                }
                if tree == Tree::Regions {
                    *(if dead { &mut stats.dead_regions } else { &mut stats.live_regions }) += 1;
                }
            }
        }
        let catalog = self.shared.catalog();
        for (id, entry) in catalog.all() {
            let (note, tombstone) = (entry.note(), entry.tombstone());
            let live = tombstone.is_none() && !forgotten.contains(id);
            let kept = [live.then_some(entry.location), note.filter(|_| live).map(|(_, at)| at), tombstone];
            let before = |location: &Location| Position::from(*location) < self.horizon;
            for location in kept.into_iter().flatten().filter(before) {
                *live_bytes.entry(location.pack).or_default() += location.object_bytes();
            }
        }
        // What is past the horizon is kept, whatever it is.
        if let Some(pack) = self.shared.log.pack(self.horizon.pack) {
            *live_bytes.entry(pack.number).or_default() +=
                pack.length_bytes().saturating_sub(self.horizon.offset_bytes);
        }
        Ok((live_bytes, stats))
    }

    /// The packs to replace: those with the least to copy first.
    fn groups(
        &self,
        live_bytes: &BTreeMap<u32, u64>,
        forgotten: &HashSet<SnapshotId>,
        options: &GcOptions,
    ) -> Result<Vec<Group>, Error> {
        // What forgetting them will append to the active pack.
        let mut tombstones_bytes = 0;
        for id in forgotten {
            let tombstone = commit::encode_tombstone(*id)?;
            let mut object = Vec::new();
            object::write(
                Kind::Tombstone,
                self.shared.format.codec,
                Hash::of(&tombstone),
                &tombstone,
                &mut object,
            );
            tombstones_bytes += object.len() as u64;
        }
        let (mut victims, mut small) = (Vec::new(), Vec::new());
        for pack in self.shared.log.packs() {
            if pack.number > self.horizon.pack {
                continue;
            }
            let live_bytes = live_bytes.get(&pack.number).copied().unwrap_or(0);
            let more_bytes = if pack.number == self.horizon.pack { tombstones_bytes } else { 0 };
            let whole_bytes = pack.length_bytes() - pack.header_bytes() + more_bytes;
            let dead_bytes = whole_bytes.saturating_sub(live_bytes + more_bytes);
            let most_percent = if options.erase { 0 } else { options.max_unused_percent };
            if dead_bytes * 100 > whole_bytes * u64::from(most_percent) {
                victims.push((live_bytes, pack));
            } else if pack.length_bytes() < pack.seal_bytes() / SMALL {
                small.push((live_bytes, pack));
            }
        }
        if small.len() > MAX_SMALL && !options.erase {
            victims.append(&mut small);
        }
        victims.sort_by_key(|(live_bytes, pack)| (*live_bytes, pack.number));
        let mut groups: Vec<Group> = Vec::new();
        for (live_bytes, pack) in victims {
            match groups.last_mut() {
                Some((packs, group_bytes))
                    if (*group_bytes == 0) == (live_bytes == 0)
                        && *group_bytes + live_bytes <= pack.seal_bytes() =>
                {
                    packs.push(pack);
                    *group_bytes += live_bytes;
                }
                _ => groups.push((vec![pack], live_bytes)),
            }
        }
        Ok(groups)
    }

    /// Drops what is condemned from the index.
    fn drop_dead(&self, condemned: &Condemned, stats: &GcStats) -> Result<(), Error> {
        let index = self.shared.index();
        let live = |tree, hash: &Hash, at| (!condemned.contains(tree, hash, at)).then_some(at);
        if index.is_many(stats.dead_regions) && index.rewrite(live)? {
            return Ok(());
        }
        // All of it before the first goes: if not all can be read, nothing does.
        let mut dead: Vec<IndexEntry> = Vec::new();
        for tree in Tree::ALL {
            for entry in index.entries(tree) {
                let (hash, location) = entry?;
                if condemned.contains(tree, &hash, location) {
                    dead.push((tree, hash, location));
                }
            }
        }
        Ok(index.take_out(dead.into_iter())?)
    }
}

/// A gc on a disk that is full: what it does about it, and what it had to leave.
struct Crowded<'a> {
    live_bytes: &'a BTreeMap<u32, u64>,
    /// Whether the index was asked for its room.
    room_made: bool,
    /// Packs of which what is needed could not be copied.
    left: Vec<Arc<Pack>>,
    why: Option<StoreError>,
}

impl Crowded<'_> {
    /// There was no room to copy what is needed of these. The index gives its room, once: it can be built anew.
    /// Then they are tried one by one, those with the least to copy first, as each gives room for the next. One that is
    /// alone is left.
    fn out_of_room(
        &mut self,
        shared: &Shared,
        packs: Vec<Arc<Pack>>,
        error: StoreError,
        waiting: &mut VecDeque<Vec<Arc<Pack>>>,
    ) -> Result<(), StoreError> {
        // Of what could not be finished nothing may stay before anything else is replaced.
        shared.log.clear_away(Vec::new())?;
        // Where there is damage the index may have what the packs have lost.
        if !std::mem::replace(&mut self.room_made, true)
            && !shared.damage_known()
            && shared.index().make_room()?
        {
            waiting.push_front(packs);
        } else if packs.len() > 1 {
            packs.into_iter().rev().for_each(|pack| waiting.push_front(vec![pack]));
        } else {
            self.left.extend(packs);
            self.why.get_or_insert(error);
        }
        Ok(())
    }

    /// An error if nothing could be freed, and a warning if not all.
    fn end(self, shared: &Shared, stats: &GcStats, options: &GcOptions) -> Result<(), StoreError> {
        let Some(StoreError::DiskFull { path, source, .. }) = self.why else { return Ok(()) };
        let live_bytes = |pack: &Arc<Pack>| self.live_bytes.get(&pack.number).copied().unwrap_or(0);
        if stats.freed_bytes > 0 && !options.erase {
            let unused_bytes: u64 = self
                .left
                .iter()
                .map(|pack| (pack.length_bytes() - pack.header_bytes()).saturating_sub(live_bytes(pack)))
                .sum();
            tracing::warn!(
                "the disk is too full to copy what is still needed of {} packs, in which {unused_bytes} bytes are \
                 unused; what was freed so far stays free, run gc again",
                self.left.len()
            );
            return Ok(());
        }
        let least_bytes = self.left.iter().map(live_bytes).min().unwrap_or(0);
        let room_bytes = file::room_bytes(shared.log.dir()).unwrap_or(0);
        let needed_bytes =
            (PackHeader::bytes_for(1) + least_bytes).next_multiple_of(BLOCK_BYTES) + BLOCK_BYTES;
        // However little it is, it was not enough.
        let missing_bytes = needed_bytes.saturating_sub(room_bytes).max(BLOCK_BYTES);
        Err(StoreError::DiskFull { path, missing_bytes: Some(missing_bytes), source })
    }
}

/// What file systems give room by. A file may need one besides its bytes.
const BLOCK_BYTES: u64 = 4096;

/// Keeps what the index and the catalog speak of. To be used when what is dead is dropped from them.
struct KeepLive<'a> {
    shared: &'a Shared,
    condemned: &'a Condemned,
    /// The snapshots whose records were in a pack when gc began: so long their tombstones are needed.
    needed: HashSet<SnapshotId>,
}

impl Keep for KeepLive<'_> {
    fn object(&self, tree: Tree, hash: &Hash, at: Position) -> bool {
        match self.shared.index().get(tree, hash) {
            Ok(Some(found)) => Position::from(found) == at,
            // It was there when it was marked. An index that has lost it is no reason to lose it here.
            Ok(None) => !self.condemned.contains(tree, hash, at),
            Err(_) => true,
        }
    }

    fn fact(&self, kind: Kind, snapshot: SnapshotId, location: Location) -> bool {
        let catalog = self.shared.catalog();
        let live = catalog.live(&snapshot);
        match kind {
            Kind::Record => live.is_some_and(|entry| entry.location == location),
            Kind::Note => live.is_some_and(|entry| entry.note().is_some_and(|(_, at)| at == location)),
            _ => self.needed.contains(&snapshot) || catalog.any(&snapshot).is_some(),
        }
    }
}

/// Marking under way.
pub(crate) struct Marking<'a> {
    shared: &'a Shared,
    meter: Meter,
    regions: Marks,
    objects: Marks,
    marked: HashSet<SnapshotId>,
    /// Roots and tables of which all is marked. That they are marked themselves does not tell: an
    /// attachment may have the same bytes, and marks know only the first bits of a hash.
    walked: HashSet<(Kind, Hash)>,
}

impl<'a> Marking<'a> {
    /// Nothing is marked yet of what is in the index.
    fn begin(shared: &'a Shared, progress: &'a Progress) -> Result<Marking<'a>, Error> {
        shared.sync()?;
        shared.settle_all();
        let mut reader = Reader::new(shared, Check::Checksum);
        let mut marks = |tree| Marks::with_bases(shared.index(), tree, |at| reader.delta_at(at));
        Ok(Marking::with(shared, progress, (marks(Tree::Regions)?, marks(Tree::Objects)?)))
    }

    /// The same, where the bases of deltas are not marked with these.
    pub(crate) fn without_bases(shared: &'a Shared, progress: &'a Progress) -> Result<Marking<'a>, Error> {
        shared.sync()?;
        shared.settle_all();
        let marks = |tree| Marks::of(shared.index(), tree);
        Ok(Marking::with(shared, progress, (marks(Tree::Regions)?, marks(Tree::Objects)?)))
    }

    fn with(shared: &'a Shared, progress: &'a Progress, (regions, objects): (Marks, Marks)) -> Marking<'a> {
        let (meter, marked, walked) = (progress.begin(0), HashSet::new(), HashSet::new());
        Marking { shared, meter, regions, objects, marked, walked }
    }

    /// The marks of one of the trees.
    pub(crate) fn of(&self, tree: Tree) -> &Marks {
        match tree {
            Tree::Regions => &self.regions,
            Tree::Objects => &self.objects,
        }
    }

    /// Marks all that these snapshots need: distinct tables once.
    pub(crate) fn mark_all(
        &mut self,
        snapshots: impl IntoIterator<Item = (SnapshotId, Held)>,
    ) -> Result<(), Error> {
        let mut reader = Reader::new(self.shared, Check::Full);
        // Snapshots that follow one another mostly have the same one.
        let mut last_layout: Option<(Hash, AddressSpace)> = None;
        for (id, held) in snapshots {
            if !self.marked.insert(id) {
                continue;
            }
            let record = held.record();
            for attachment in &record.attachments {
                self.object(Kind::Attachment, &attachment.hash)?;
            }
            self.object(Kind::Layout, &record.layout)?;
            self.object(Kind::Root, &record.root)?;
            if record.root.is_zero() || !self.walked.insert((Kind::Root, record.root)) {
                continue;
            }
            let space = match last_layout.take_if(|(layout, _)| *layout == record.layout) {
                Some((_, space)) => space,
                None => reader.value(Kind::Layout, &record.layout)?,
            };
            let places = Places::new(&space, record.region_size);
            let root = reader.root(&record.root, places.count())?;
            for (table, place) in root.places(&places) {
                self.object(Kind::Table, &table)?;
                if !self.walked.insert((Kind::Table, table)) {
                    continue;
                }
                for hash in reader.hashes(Kind::Table, &table, place.regions)? {
                    if !hash.is_zero() {
                        let marked = self.regions.mark(&hash);
                        self.there(marked, Kind::Region, &hash)?;
                    }
                }
                self.meter.advance(place.length_bytes as u64)?;
            }
            last_layout = Some((record.layout, space));
        }
        Ok(())
    }
}

impl Marking<'_> {
    fn object(&mut self, kind: Kind, hash: &Hash) -> Result<(), StoreError> {
        if hash.is_zero() {
            return Ok(());
        }
        let marked = self.objects.mark(hash);
        self.there(marked, kind, hash)
    }

    /// An error where the index has lost what a snapshot needs. The packs may have it: dropping it there would lose it for
    /// good. Where damage is known it is expected.
    fn there(&self, marked: Marked, kind: Kind, hash: &Hash) -> Result<(), StoreError> {
        if marked != Marked::Unknown || self.shared.damage_known() {
            return Ok(());
        }
        // It may have been appended since the index was read: then it lies past the horizon.
        match self.shared.locate(Tree::of(kind), hash)? {
            Some(_) => Ok(()),
            None => Err(StoreError::Missing { kind, hash: *hash }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::CaptureOptions;
    use crate::store::catalog::Fact;
    use crate::store::packs::log::FactAt;

    /// A store, and memory that only a forgotten snapshot has.
    fn store_with_garbage() -> (tempfile::TempDir, Store, Vec<u8>) {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::options().create(dir.path().join("store")).unwrap();
        let memory: Vec<u8> =
            (0..1_000_000u32).map(|at| (at.wrapping_mul(at) >> 7).to_le_bytes()[0]).collect();
        let id = capture(&store, "old", &memory);
        capture(&store, "other", &[5; 40_000]);
        store.forget(&[id]).unwrap();
        (dir, store, memory)
    }

    fn capture(store: &Store, process: &str, memory: &[u8]) -> SnapshotId {
        store.process(process).capture(memory, &CaptureOptions::default()).unwrap().id
    }

    fn assert_whole(store: &Store, id: SnapshotId, memory: &[u8]) {
        assert!(store.restore(id).unwrap().into_mapping().unwrap()[..] == *memory);
        assert!(store.verify(&Default::default()).unwrap().problems.is_empty());
    }

    #[test]
    fn a_snapshot_taken_after_the_roots_were_read_keeps_what_it_found() {
        let (_dir, store, memory) = store_with_garbage();
        let options = GcOptions::default();
        let collecting = Collecting::begin(store.shared());
        let marking = collecting.mark(&options.progress).unwrap();
        let id = capture(&store, "new", &memory);
        let condemned = collecting.condemn(marking).unwrap();
        let stats = collecting.sweep(&condemned, &options).unwrap();
        assert_eq!(stats.dead_regions, 0);
        drop(collecting);
        assert_whole(&store, id, &memory);
    }

    #[test]
    fn a_snapshot_taken_when_its_regions_are_condemned_stores_them_anew() {
        let (_dir, store, memory) = store_with_garbage();
        let options = GcOptions::default();
        let collecting = Collecting::begin(store.shared());
        let condemned = collecting.condemn(collecting.mark(&options.progress).unwrap()).unwrap();
        let done = store.process("new").capture(&memory, &CaptureOptions::default()).unwrap();
        assert!(done.new_regions > 0);
        let stats = collecting.sweep(&condemned, &options).unwrap();
        assert!(stats.freed_bytes > 0, "the first copies are gone");
        drop(collecting);
        assert_whole(&store, done.id, &memory);
    }

    #[test]
    fn a_snapshot_that_is_read_is_kept_though_it_is_forgotten() {
        let (_dir, store, memory) = store_with_garbage();
        let id = capture(&store, "new", &memory);
        let options = GcOptions::default();
        let collecting = Collecting::begin(store.shared());
        let restore = store.restore(id).unwrap();
        store.forget(&[id]).unwrap();
        let condemned = collecting.condemn(collecting.mark(&options.progress).unwrap()).unwrap();
        collecting.sweep(&condemned, &options).unwrap();
        drop(collecting);
        // The first gc has taken its record away; a second one must know of it all the same.
        store.gc(&options).unwrap();
        assert!(restore.into_mapping().unwrap()[..] == memory[..]);
        assert!(store.gc(&options).unwrap().dead_regions > 0);
    }

    #[test]
    fn a_child_keeps_what_it_took_over_from_a_parent_that_is_forgotten_meanwhile() {
        let (_dir, store, memory) = store_with_garbage();
        let parent = capture(&store, "line", &memory);
        let options = GcOptions::default();
        let collecting = Collecting::begin(store.shared());
        // Unchanged: it looks nothing up, the parent's tables say it all.
        let child = capture(&store, "line", &memory);
        store.forget(&[parent]).unwrap();
        let condemned = collecting.condemn(collecting.mark(&options.progress).unwrap()).unwrap();
        collecting.sweep(&condemned, &options).unwrap();
        drop(collecting);
        assert_whole(&store, child, &memory);
    }

    /// Memory that does something when it is opened: in the middle of a capture.
    struct Meanwhile<'a>(&'a [u8], &'a dyn Fn());

    impl crate::Source for Meanwhile<'_> {
        fn open(&self) -> Result<Box<dyn crate::Frozen + '_>, crate::SourceError> {
            (self.1)();
            self.0.open()
        }
    }

    #[test]
    fn a_parent_forgotten_during_the_capture_of_its_child_is_kept_until_gc_knows_the_child() {
        let (_dir, store, memory) = store_with_garbage();
        let parent = capture(&store, "line", &memory);
        let options = GcOptions::default();
        let under_way = std::cell::RefCell::new(None);
        let meanwhile = || {
            store.forget(&[parent]).unwrap();
            let collecting = Collecting::begin(store.shared());
            let marking = collecting.mark(&options.progress).unwrap();
            *under_way.borrow_mut() = Some((collecting, marking));
        };
        let source = Meanwhile(&memory, &meanwhile);
        let child = store.process("line").capture(&source, &CaptureOptions::default()).unwrap().id;
        let (collecting, marking) = under_way.take().unwrap();
        let condemned = collecting.condemn(marking).unwrap();
        collecting.sweep(&condemned, &options).unwrap();
        drop(collecting);
        assert_whole(&store, child, &memory);
    }

    /// The index loses what it knows, as sled was seen to after it could not read a page.
    fn lose(store: &Store, trees: &[Tree]) {
        // What the settler puts into it later would not be lost.
        store.shared().sync().unwrap();
        store.shared().settle_all();
        let index = store.shared().index();
        for tree in trees.iter().copied() {
            let entries: Vec<_> = index.entries(tree).collect::<Result<_, _>>().unwrap();
            assert!(!entries.is_empty());
            index.take_out(entries.into_iter().map(|(hash, location)| (tree, hash, location))).unwrap();
        }
    }

    /// What the packs hold, whatever the index says.
    fn rebuilt(store: Store) -> Store {
        let path = store.info().path;
        drop(store);
        Store::repair(&path, &Default::default()).unwrap();
        Store::open(&path).unwrap()
    }

    #[test]
    fn what_the_index_loses_after_marking_is_copied_all_the_same() {
        let (_dir, store, _) = store_with_garbage();
        let memory: Vec<u8> = (0..400_000u32).map(|at| (at.wrapping_mul(at) >> 9).to_le_bytes()[0]).collect();
        let id = capture(&store, "new", &memory);
        let options = GcOptions::default();
        let collecting = Collecting::begin(store.shared());
        let condemned = collecting.condemn(collecting.mark(&options.progress).unwrap()).unwrap();
        lose(&store, &Tree::ALL);
        let stats = collecting.sweep(&condemned, &options).unwrap();
        assert!(stats.packs_rewritten > 0 && stats.freed_bytes > 0, "{stats:?}");
        drop(collecting);
        assert_whole(&rebuilt(store), id, &memory);
    }

    #[test]
    fn gc_refuses_to_run_when_the_index_has_lost_what_a_snapshot_needs() {
        let (_dir, store, _) = store_with_garbage();
        let memory = vec![7; 100_000];
        let id = capture(&store, "new", &memory);
        lose(&store, &[Tree::Regions]);
        let refused = store.gc(&GcOptions::default()).unwrap_err();
        assert!(matches!(refused, Error::Store(StoreError::Missing { .. })), "{refused}");
        let store = rebuilt(store);
        assert_whole(&store, id, &memory);
        assert!(store.gc(&GcOptions::default()).unwrap().freed_bytes > 0);
    }

    #[test]
    fn an_undecodable_record_is_damage_and_its_pack_stays_until_a_repair() {
        let (dir, store, _) = store_with_garbage();
        let shared = store.shared();
        // Checks and hash are right; what it says is nothing.
        let plain = vec![0xFF; 300];
        let id = SnapshotId(Hash::of(&plain));
        let fact: FactAt = Box::new(move |at| Fact::Tombstone(id, at));
        shared.log.append_facts(vec![(Kind::Record, plain, fact)], shared.log.failures()).unwrap();
        shared.sync().unwrap();
        let path = store.info().path;
        drop(store);
        let packs = || {
            std::fs::read_dir(path.join("packs")).unwrap().map(|it| it.unwrap().path()).collect::<Vec<_>>()
        };
        let before = packs();
        for _ in 0..2 {
            let store = Store::open(&path).unwrap();
            let problems = store.verify(&Default::default()).unwrap().problems;
            assert_eq!(problems.len(), 1, "{problems:?}");
            assert_eq!((&*problems[0].kind, &problems[0].snapshots[..]), ("record", &[id][..]));
            let everything = GcOptions { max_unused_percent: 0, ..GcOptions::default() };
            store.gc(&everything).unwrap();
            assert!(before.iter().all(|pack| pack.exists()), "{:?}", packs());
        }
        let report = Store::repair(&path, &Default::default()).unwrap();
        assert_eq!(report.damaged.len(), 1, "{report:?}");
        let store = Store::open(&path).unwrap();
        assert_eq!(store.verify(&Default::default()).unwrap().problems, []);
        drop(dir);
    }
}
