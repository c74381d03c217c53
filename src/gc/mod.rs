//! gc: drops what no snapshot needs any more, and frees its space.
//!
//! The steps are mark (mark.rs), condemn, drop and compact (compact.rs). `store/gate.rs` shows why
//! captures can run at the same time. gc needs 8 bytes of memory for each region and object,
//! besides the index. full_disk.rs handles a disk without space for copies. erase.rs leaves no byte
//! of forgotten snapshots.

pub(crate) mod compact;
mod erase;
mod full_disk;
mod mark;

use std::cell::Cell;
use std::collections::{BTreeMap, HashSet, VecDeque};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::error::Error;
use crate::hash::Hash;
use crate::progress::Progress;
use crate::record::SnapshotId;
use crate::store::commit;
use crate::store::error::StoreError;
use crate::store::gate::Condemned;
use crate::store::packs::header::PackHeader;
use crate::store::packs::location::{Location, Position};
use crate::store::packs::object::{self, ObjectKind};
use crate::store::packs::pack::Pack;
use crate::store::tree::{IndexEntry, Tree};
use crate::store::{OpenStore, Store};
use compact::{Compacted, Keep, compact};
use full_disk::FullDisk;
use mark::{Marking, live_snapshots};

/// Options for [`Store::gc`].
///
/// ```
/// use stillframe::{CaptureOptions, GcOptions, Store};
/// # let dir = tempfile::tempdir()?;
/// # let store = Store::options().create(dir.path().join("vault"))?;
/// let taken = store.process("web-1").capture(&vec![7; 1 << 20], &CaptureOptions::new())?;
/// store.forget(&[taken.id])?;
/// let expected = store.gc(&GcOptions::new().dry_run(true))?;
/// let stats = store.gc(&GcOptions::new())?;
/// assert!(stats.freed_bytes > 0 && expected.freed_bytes > 0);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct GcOptions {
    /// Only computes what would be freed.
    pub dry_run: bool,
    /// A pack is rewritten when more than this percentage of it is unused. A lower value wastes
    /// less space and copies more.
    pub max_unused_percent: u8,
    /// Leaves no byte of forgotten snapshots: not as the base of a live snapshot's delta, not in
    /// the unused part of a pack, and not in the index. No capture runs at the same time: gc waits
    /// for running ones to end.
    pub erase: bool,
    /// Reports progress, and can cancel the gc.
    pub progress: Progress,
}

impl GcOptions {
    /// The default.
    pub fn new() -> Self {
        GcOptions::default()
    }

    /// With `true`, finds out what would be freed and changes nothing.
    pub fn dry_run(mut self, dry_run: bool) -> Self {
        self.dry_run = dry_run;
        self
    }

    /// Sets the [share](Self::max_unused_percent) of unused bytes above which a pack is rewritten;
    /// 10 unless set.
    pub fn max_unused_percent(mut self, percent: u8) -> Self {
        self.max_unused_percent = percent;
        self
    }

    /// With `true`, [erases](Self::erase) what is freed.
    pub fn erase(mut self, erase: bool) -> Self {
        self.erase = erase;
        self
    }

    /// Sets the receiver of progress, which can also cancel the call.
    pub fn progress(mut self, progress: Progress) -> Self {
        self.progress = progress;
        self
    }
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
    /// Regions that snapshots need, bases of deltas included.
    pub live_regions: u64,
    /// Regions that no snapshot needs. gc removes them from the index.
    pub dead_regions: u64,
    /// How many bytes shorter the packs became.
    pub freed_bytes: u64,
    /// With [`GcOptions::erase`]: how many bytes were removed that no live snapshot has. The bytes
    /// that were stored whole for that are not subtracted.
    pub erased_bytes: u64,
    /// Packs that were removed and had nothing to keep.
    pub packs_removed: u64,
    /// Packs that were replaced: what had to be kept was copied.
    pub packs_rewritten: u64,
    /// How long it took.
    #[serde(rename = "elapsed_ms", serialize_with = "crate::report::milliseconds")]
    pub elapsed: Duration,
}

impl Store {
    /// Frees the space of everything that no snapshot needs. Captures and restores can run at the
    /// same time.
    ///
    /// Cost: it reads the tables of all snapshots, each distinct one once, and copies what is still
    /// needed from the packs that it rewrites.
    ///
    /// # Examples
    ///
    /// ```
    /// use stillframe::{CaptureOptions, GcOptions, Store};
    ///
    /// # let dir = tempfile::tempdir()?;
    /// # let store = Store::options().create(dir.path().join("vault"))?;
    /// let taken = store.process("web-1").capture(&[7; 1 << 20], &CaptureOptions::default())?;
    /// store.forget(&[taken.id])?;
    /// let stats = store.gc(&GcOptions::default())?;
    /// assert_eq!(stats.live_regions, 0);
    /// assert!(stats.freed_bytes > 0);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// If the store cannot be read or written. On a full disk, gc frees what it can, which is no
    /// error; if it can free nothing, the error says how much more space it needs. If a table is
    /// damaged, or a whole pack with records in it, it is unknown what they need, and nothing is
    /// collected. If the index lacks an object that a snapshot needs and no damage is known, gc
    /// refuses too: [`repair`](Store::repair) rebuilds the index.
    ///
    /// With [`GcOptions::erase`] also [`StoreError::CannotErase`] if something prevents erasing
    /// (damage, files that were set aside, a forgotten snapshot that is open for reading), and
    /// [`StoreError::DiskFull`] if there is not enough space for all of it. In both cases nothing
    /// is changed. [`StoreError::NotErased`] if some bytes may be left.
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

    /// How many bytes shorter the packs would become in a [`gc`](Self::gc) with default options if
    /// these snapshots were forgotten.
    ///
    /// # Errors
    ///
    /// Those of [`gc`](Self::gc).
    pub fn freeable_bytes(&self, forgotten: &[SnapshotId]) -> Result<u64, Error> {
        let shared = &**self.shared();
        shared.check_process()?;
        let _one_at_a_time = shared.collecting.lock();
        let forgotten = forgotten.iter().copied().collect();
        Ok(Collecting::begin(shared).plan(&forgotten, &GcOptions::default())?.freed_bytes)
    }
}

/// Marks, drops and compacts. Returns also a pack that was left because it is damaged, if there is
/// one.
fn collect(shared: &OpenStore, options: &GcOptions) -> Result<(GcStats, Option<PathBuf>), Error> {
    let collecting = Collecting::begin(shared);
    let condemned = collecting.condemn(collecting.mark(&options.progress)?)?;
    let stats = collecting.sweep(&condemned, options)?;
    Ok((stats, collecting.left.take()))
}

/// Collects, and leaves no byte of forgotten snapshots.
fn erase_all(shared: &OpenStore, options: &GcOptions) -> Result<GcStats, Error> {
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

/// Tombstones can be dropped once the records of their snapshots are. That takes one round each,
/// one that finds nothing, and one for labels that change in the meantime.
const MAX_ROUNDS: usize = 4;

/// Packs that are smaller than this fraction of a full one are merged when there are many of them.
/// They arise because the first capture after a gc that wrote a pack begins another pack.
const SMALL: u64 = 16;

/// Up to this many small packs are left alone.
const MAX_SMALL: usize = 16;

/// Packs that are merged into one, and how many of their bytes are kept.
type Group = (Vec<Arc<Pack>>, u64);

/// A gc in progress. Dropping it opens the gate.
struct Collecting<'a> {
    shared: &'a OpenStore,
    horizon: Position,
    /// A pack that was not replaced because it is damaged.
    left: Cell<Option<PathBuf>>,
}

impl Drop for Collecting<'_> {
    fn drop(&mut self) {
        self.shared.gate.end_gc();
    }
}

impl<'a> Collecting<'a> {
    fn begin(shared: &'a OpenStore) -> Collecting<'a> {
        shared.gate.begin_gc();
        Collecting { shared, horizon: shared.log.position(), left: Cell::default() }
    }

    /// What a gc would do if these snapshots were forgotten.
    fn plan(&self, forgotten: &HashSet<SnapshotId>, options: &GcOptions) -> Result<GcStats, Error> {
        let lifts = options.erase.then(|| erase::plan(self.shared, &options.progress)).transpose()?;
        let mut marking = if options.erase {
            Marking::without_bases(self.shared, &options.progress)?
        } else {
            Marking::begin(self.shared, &options.progress)?
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

    /// Marks what is pinned too, and publishes the rest as condemned.
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

    /// Drops what is condemned and compacts the packs that contained it.
    fn sweep(&self, condemned: &Condemned, options: &GcOptions) -> Result<GcStats, Error> {
        let (live_bytes, mut stats) = self.weigh(condemned, &HashSet::new())?;
        self.drop_dead(condemned, &stats)?;
        let groups = self.groups(&live_bytes, &HashSet::new(), options)?;
        // One of them may be the active pack. From here on nothing is appended to it, and what was
        // appended in the meantime must be in the index before the pack is copied.
        for pack in groups.iter().flat_map(|(packs, _)| packs) {
            self.shared.log.seal(pack.number);
        }
        self.shared.sync()?;
        self.shared.settle_all();
        let needed: HashSet<SnapshotId> = self.shared.catalog().all().map(|(id, _)| *id).collect();
        let keep = KeepLive { shared: self.shared, condemned, needed };
        let mut waiting: VecDeque<Vec<Arc<Pack>>> = groups.into_iter().map(|(packs, _)| packs).collect();
        let mut full_disk =
            FullDisk { live_bytes: &live_bytes, room_made: false, left: Vec::new(), why: None };
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
                    full_disk.out_of_room(self.shared, packs, error, &mut waiting)?;
                }
                Err(error) => return Err(error.into()),
            }
        }
        full_disk.end(self.shared, stats.freed_bytes, options.erase)?;
        Ok(stats)
    }

    /// How many bytes of each pack are needed, and how many regions.
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
        // Everything past the horizon is kept.
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
        // Forgetting them will append this to the active pack.
        let mut tombstones_bytes = 0;
        for id in forgotten {
            let tombstone = commit::encode_tombstone(*id)?;
            let mut object = Vec::new();
            object::write(
                ObjectKind::Tombstone,
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

    /// Removes what is condemned from the index.
    fn drop_dead(&self, condemned: &Condemned, stats: &GcStats) -> Result<(), Error> {
        let index = self.shared.index();
        let live = |tree, hash: &Hash, at| (!condemned.contains(tree, hash, at)).then_some(at);
        if index.is_many(stats.dead_regions) && index.rewrite(live)? {
            return Ok(());
        }
        // All entries are read before the first is removed: if not all can be read, none is.
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

/// Keeps the objects to which the index and the catalog refer. It is used after the dead ones are
/// removed from both.
struct KeepLive<'a> {
    shared: &'a OpenStore,
    condemned: &'a Condemned,
    /// The snapshots whose records were in a pack when gc began. Their tombstones are still needed.
    needed: HashSet<SnapshotId>,
}

impl Keep for KeepLive<'_> {
    fn object(&self, tree: Tree, hash: &Hash, at: Position) -> bool {
        match self.shared.index().get(tree, hash) {
            Ok(Some(found)) => Position::from(found) == at,
            // The index had the object when it was marked. If the index has lost it since, it must
            // not be lost here too.
            Ok(None) => !self.condemned.contains(tree, hash, at),
            Err(_) => true,
        }
    }

    fn fact(&self, kind: ObjectKind, snapshot: SnapshotId, location: Location) -> bool {
        let catalog = self.shared.catalog();
        let live = catalog.live(&snapshot);
        match kind {
            ObjectKind::Record => live.is_some_and(|entry| entry.location == location),
            ObjectKind::Note => live.is_some_and(|entry| entry.note().is_some_and(|(_, at)| at == location)),
            _ => self.needed.contains(&snapshot) || catalog.any(&snapshot).is_some(),
        }
    }
}

#[cfg(test)]
mod tests;
