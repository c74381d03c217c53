//! The index: where each object is.
//!
//! It is derived from the packs and can be rebuilt from them, so nothing here needs to be durable at
//! any particular moment. It has two tiers: the *buckets* in a sled database (database.rs), which are only
//! ever written all at once, and above them in memory the *overlay*, with what has changed since. An
//! entry is found in the overlay or else, with one access to the database, in its bucket.
//!
//! ```text
//!  insert, replace ─> overlay (memory) ─ save ──> a run in the database: read back when it is opened
//!                        │
//!                        └──────────── rewrite ─> a new database with new buckets, without runs
//! ```
//!
//! What is not *saved* yet is lost when the store is closed or killed, and found again in the packs: a
//! pack's *watermark* says up to which byte it is indexed in the database, and what lies past that is
//! scanned when the store is opened. So a small snapshot costs the database nothing at all; it is written
//! to once for thousands of objects. A watermark is written only after all that it stands for.
//!
//! When the overlay has outgrown a quarter of the buckets the database is written anew, beside the old one, which
//! it replaces when it is complete. Look-ups go on meanwhile.
//!
//! Where there is no room to write, on a full disk, or none can be written at all, the index is *held in memory*:
//! everything is in the overlay, some 100 bytes an entry, and nothing is saved until the store is opened again.

pub(crate) mod block;
pub(crate) mod closing;
pub(crate) mod database;
mod overlay;

use std::collections::{BTreeMap, btree_map};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, MutexGuard, RwLockReadGuard, RwLockWriteGuard};
use std::time::Duration;

use crate::hash::Hash;
use crate::store::error::StoreError;
use crate::store::id::{PackId, StoreId};
use crate::store::names::UNFINISHED;
use crate::store::packs::location::Location;
use crate::store::packs::watermark::Watermark;
use crate::store::tree::{IndexEntry, Tree};
use crate::sync::{Mutex, RwLock};
use crate::sys::dir::{Dir, Name};
use crate::sys::file;
use crate::sys::heap;
use block::Stored;
use closing::Durable;
use database::{BLOCK_ENTRIES, Database, INDEX_THREAD};
use overlay::{Change, Lower, State};

/// When what is in memory goes to the database.
#[derive(Clone, Copy, Debug)]
struct Limits {
    /// So many entries that are not saved, or ...
    unsaved_entries: usize,
    /// ... so many bytes of packs that are not, are saved. An opening reads them again.
    unsaved_bytes: u64,
    /// The overlay may have so many entries, or a quarter of those in the buckets. An opening reads
    /// them too.
    overlay_entries: usize,
}

/// With 14,000 unsaved entries in 8 MB of packs an opening took 9 ms more than with none, with 60,000 entries
/// of runs 12 ms. This is half of both.
const LIMITS: Limits =
    Limits { unsaved_entries: 8 * 1024, unsaved_bytes: 4 << 20, overlay_entries: 32 * 1024 };

/// What an entry takes on the disk, generously: measured 43 to 46 in buckets, about 50 in runs.
const ENTRY_BYTES: u64 = 60;

/// An index may take so long to open, and ...
const OPEN_WITHIN: Duration = Duration::from_secs(30);

/// ... another second for so many bytes.
const OPEN_BYTES_A_SECOND: u64 = 4 << 20;

/// Of an index that is held in memory so many entries are looked at together.
const HELD_ENTRIES: usize = 1024;

/// What a snapshot takes there, generously.
const SNAPSHOT_BYTES: u64 = 1024;

/// What an empty database takes there, generously.
const MIN_BYTES: u64 = 1 << 20;

/// The open index.
pub(crate) struct Index {
    name: Name,
    store: StoreId,
    limits: Limits,
    state: RwLock<State>,
    /// Held by whoever changes the database. To be taken before the state.
    writing: Mutex<()>,
    /// Up to where the packs were durable when the store was last closed.
    durable: Durable,
}

impl Index {
    /// Opens the index of this name, or creates it. An error means that it is not usable and wants
    /// to be rebuilt; that of another store or schema counts as such, and one that does not open in time.
    pub(crate) fn open(name: &Name, store: StoreId) -> Result<Index, StoreError> {
        let place = name.clone();
        guard(open_within(name), move || Index::open_with(&place, store, LIMITS))
    }

    fn open_with(name: &Name, store: StoreId, limits: Limits) -> Result<Index, StoreError> {
        remove(&name.with_extension(UNFINISHED))?;
        check_room(name)?;
        if Database::is_missing(name) {
            // With its second opening it takes the space of a whole segment. That is part of an empty store
            // and not of the second snapshot.
            drop(Database::open(name, store)?);
        }
        let database = Database::open(name, store)?;
        let mut overlays: [Vec<(Hash, Change)>; Tree::ALL.len()] = Default::default();
        database.read_runs(|tree, (hash, place)| {
            overlays[tree as usize].push((hash, Change { place, epoch: 0 }));
        })?;
        let state = State {
            // Of several changes of an object the last one stays.
            overlays: overlays.map(|changes| changes.into_iter().collect()),
            watermarks: database.watermarks()?,
            damage_known: database.damage_known(),
            may_have_dangling: database.may_have_dangling(),
            is_rebuilding: database.is_rebuilding(),
            lower: Lower::Database(Arc::new(database)),
            ..State::held_in_memory()
        };
        Ok(Index::with(name, store, limits, state))
    }

    /// Whether there is nothing that could be an index of this name.
    pub(crate) fn is_missing(name: &Name) -> bool {
        Database::is_missing(name)
    }

    /// An index with nothing in it that is held in memory. The one of this name stays as it is.
    pub(crate) fn in_memory(name: &Name, store: StoreId) -> Index {
        Index::with(name, store, LIMITS, State::held_in_memory())
    }

    fn with(name: &Name, store: StoreId, limits: Limits, state: State) -> Index {
        Index {
            name: name.clone(),
            store,
            limits,
            state: RwLock::new(state),
            writing: Mutex::new(()),
            durable: name.open_dir().map(|dir| closing::read(&dir)).unwrap_or_default(),
        }
    }

    /// Whether it is held in memory, so that nothing of it is saved.
    pub(crate) fn is_held(&self) -> bool {
        matches!(self.read().lower, Lower::Nothing)
    }

    /// Takes everything into memory if `written` failed for want of room. To be called while `writing` is held.
    fn or_hold(&self, written: Result<(), StoreError>) -> Result<(), StoreError> {
        match written {
            Err(StoreError::DiskFull { .. }) => self.hold(),
            other => other,
        }
    }

    /// Takes everything into memory. To be called while `writing` is held.
    fn hold(&self) -> Result<(), StoreError> {
        let entries = Tree::ALL.map(|tree| self.stored(tree).collect::<Result<Vec<Stored>, _>>());
        let snapshots = self.snapshots()?;
        let mut state = self.write();
        let epoch = state.epoch;
        // What has changed meanwhile is newer.
        for (tree, entries) in Tree::ALL.into_iter().zip(entries) {
            let overlay = &mut state.overlays[tree as usize];
            for (hash, place) in entries? {
                overlay.entry(hash).or_insert(Change { place, epoch });
            }
        }
        for (key, value) in snapshots {
            state.snapshots.entry(key).or_insert((value, epoch));
        }
        state.lower = Lower::Nothing;
        warn_held(&self.name);
        Ok(())
    }

    fn read(&self) -> RwLockReadGuard<'_, State> {
        self.state.read()
    }

    fn write(&self) -> RwLockWriteGuard<'_, State> {
        self.state.write()
    }

    fn writing(&self) -> MutexGuard<'_, ()> {
        self.writing.lock()
    }

    /// Where the object is. Cost: under a microsecond in the overlay, 1 to 7 in the database.
    pub(crate) fn get(&self, tree: Tree, hash: &Hash) -> Result<Option<Location>, StoreError> {
        self.read().get(tree, hash)
    }

    /// Takes in objects that were appended. Cost: half a microsecond each.
    pub(crate) fn insert(&self, entries: &[IndexEntry]) {
        let mut state = self.write();
        for (tree, hash, location) in entries {
            state.change(*tree, hash, location.to_bytes());
            state.unsaved_bytes += location.object_bytes();
        }
    }

    /// Takes in objects that were found in the packs: of several copies one that needs no base. Returns
    /// the deltas that were left out for other deltas, whose bases may not be there.
    pub(crate) fn insert_found(&self, entries: Vec<IndexEntry>) -> Result<Vec<IndexEntry>, StoreError> {
        let (deltas, whole): (Vec<_>, Vec<_>) =
            entries.into_iter().partition(|(_, _, location)| location.is_delta());
        self.insert(&whole);
        let mut others = Vec::new();
        for entry in deltas {
            let (tree, hash, location) = entry;
            match self.get(tree, &hash)? {
                None => self.insert(&[entry]),
                Some(found) if found.is_delta() && found != location => others.push(entry),
                Some(_) => {}
            }
        }
        Ok(others)
    }

    /// Replaces the location of an object, or says that it is gone, if it still is `old`. Returns
    /// whether it was.
    pub(crate) fn replace(
        &self,
        tree: Tree,
        hash: &Hash,
        old: Location,
        new: Option<Location>,
    ) -> Result<bool, StoreError> {
        let mut state = self.write();
        if state.get(tree, hash)? != Some(old) {
            return Ok(false);
        }
        state.change(tree, hash, new.map_or(Location::GONE, Location::to_bytes));
        state.is_precious = true;
        Ok(true)
    }

    /// Takes entries out that are still where they say. Deltas may go before or after their bases: until all
    /// that is on the disk the index is marked, as what is saved meanwhile may have one without the other.
    pub(crate) fn take_out(
        &self,
        mut entries: impl ExactSizeIterator<Item = IndexEntry>,
    ) -> Result<(), StoreError> {
        if entries.len() == 0 {
            return Ok(());
        }
        let had_no_dangling = !self.may_have_dangling();
        self.set_may_have_dangling(true)?;
        entries.try_for_each(|(tree, hash, location)| self.replace(tree, &hash, location, None).map(drop))?;
        self.save()?;
        match had_no_dangling {
            true => self.set_may_have_dangling(false),
            false => Ok(()),
        }
    }

    /// Whether so many changes are made sooner by a [`rewrite`](Self::rewrite).
    pub(crate) fn is_many(&self, changes: u64) -> bool {
        !self.is_held() && changes > self.max_overlay_entries(&self.read()) / 4
    }

    fn max_overlay_entries(&self, state: &State) -> u64 {
        (self.limits.overlay_entries as u64).max(state.bucket_entries() / 4)
    }

    /// All entries in order of their hashes. Entries that change meanwhile may be seen before or after.
    pub(crate) fn entries(&self, tree: Tree) -> impl Iterator<Item = Result<(Hash, Location), StoreError>> {
        let located =
            |(hash, place): Stored| Location::from_bytes(&place).map(|location| Ok((hash, location)));
        self.stored(tree).filter_map(move |entry| entry.map_or_else(|error| Some(Err(error)), located))
    }

    fn stored(&self, tree: Tree) -> Entries<'_> {
        Entries { index: self, tree, from: Some(Hash::ZERO), ready: Vec::new().into_iter() }
    }

    /// All catalog entries by their keys.
    fn snapshots(&self) -> Result<BTreeMap<Vec<u8>, Vec<u8>>, StoreError> {
        let mut snapshots = BTreeMap::new();
        self.read_snapshots(|key, value| {
            match value.is_empty() {
                true => snapshots.remove(key),
                false => snapshots.insert(key.to_vec(), value.to_vec()),
            };
            true
        })?;
        Ok(snapshots)
    }

    /// Hands the keys and values of all catalog entries to `take`, of each key the newest value last, an empty one where there is
    /// none any more. Goes on as long as they make sense to it, and says whether all did.
    pub(crate) fn read_snapshots(
        &self,
        mut take: impl FnMut(&[u8], &[u8]) -> bool,
    ) -> Result<bool, StoreError> {
        let state = self.read();
        if let Some(database) = state.database()?
            && !database.read_snapshots(&mut take)?
        {
            return Ok(false);
        }
        Ok(state.snapshots.iter().all(|(key, (value, _))| take(key, value)))
    }

    /// Sets a catalog entry, or says that it is gone.
    pub(crate) fn set_snapshot(&self, key: Vec<u8>, value: Option<Vec<u8>>) {
        let mut state = self.write();
        let epoch = state.epoch;
        state.snapshots.insert(key, (value.unwrap_or_default(), epoch));
    }

    /// Up to which byte each pack is indexed.
    pub(crate) fn watermarks(&self) -> BTreeMap<u32, Watermark> {
        self.read().watermarks.clone()
    }

    /// Sets a pack's watermark, or says that the pack is gone. What it stands for must be in the index.
    pub(crate) fn set_watermark(&self, pack: u32, indexed: Option<Watermark>) {
        let mut state = self.write();
        match indexed {
            Some(watermark) => state.watermarks.insert(pack, watermark),
            None => state.watermarks.remove(&pack),
        };
        let epoch = state.epoch;
        state.moved_watermarks.insert(pack, epoch);
    }

    /// Up to which byte a pack is known to have been durable: what is damaged there is no torn tail.
    pub(crate) fn durable_bytes(&self, pack: u32, id: PackId) -> u64 {
        self.durable.get(&pack).filter(|durable| durable.pack == id).map_or(0, |durable| durable.end_bytes)
    }

    /// Whether there is known damage.
    pub(crate) fn damage_known(&self) -> bool {
        self.read().damage_known
    }

    /// Remembers whether there is known damage, also if nothing else is saved.
    pub(crate) fn set_damage_known(&self, known: bool) -> Result<(), StoreError> {
        let _writing = self.writing();
        self.write().damage_known = known;
        let Some(database) = self.read().database()?.cloned() else { return Ok(()) };
        match database.damage_known() == known {
            true => Ok(()),
            false => self.or_hold(database.put_damage_known(known)),
        }
    }

    /// Whether there may be deltas whose base is not in the index.
    pub(crate) fn may_have_dangling(&self) -> bool {
        self.read().may_have_dangling
    }

    /// Remembers, durably, whether there may be.
    pub(crate) fn set_may_have_dangling(&self, may: bool) -> Result<(), StoreError> {
        let _writing = self.writing();
        self.write().may_have_dangling = may;
        let Some(database) = self.read().database()?.cloned() else { return Ok(()) };
        self.or_hold(database.put_may_have_dangling(may))
    }

    /// Whether the index is being built from the packs: it does not know yet what was acknowledged.
    pub(crate) fn is_rebuilding(&self) -> bool {
        self.read().is_rebuilding
    }

    /// Remembers, durably, whether it is.
    pub(crate) fn set_rebuilding(&self, rebuilding: bool) -> Result<(), StoreError> {
        let _writing = self.writing();
        self.write().is_rebuilding = rebuilding;
        let Some(database) = self.read().database()?.cloned() else { return Ok(()) };
        self.or_hold(database.put_rebuilding(rebuilding))
    }

    /// Writes all that is not saved to disk. Does nothing if the index is held in memory.
    pub(crate) fn save(&self) -> Result<(), StoreError> {
        let _writing = self.writing();
        let (database, epoch, entries, snapshots, watermarks) = {
            let mut state = self.write();
            let Some(database) = state.database()?.cloned() else { return Ok(()) };
            let saved_epoch = state.saved_epoch;
            let unsaved = |tree| {
                let changes = state.overlays[tree as usize].iter();
                let changes = changes.filter(|(_, change)| change.epoch > saved_epoch);
                (tree, changes.map(|(hash, change)| (*hash, change.place)).collect::<Vec<Stored>>())
            };
            let entries = Tree::ALL.map(unsaved);
            let (snapshots, watermarks) = (state.unsaved_snapshots(), state.unsaved_watermarks());
            (database, state.end_epoch(), entries, snapshots, watermarks)
        };
        let drops =
            entries.iter().flat_map(|(_, changes)| changes).any(|(_, place)| *place == Location::GONE);
        let had_no_dangling = !database.may_have_dangling();
        let write = || {
            if drops {
                // Should we be killed, some may be gone on the disk and others not.
                database.put_may_have_dangling(true)?;
            }
            database.put_run(&entries, &snapshots)?;
            database.flush()?;
            // Now that all is on the disk that they stand for.
            watermarks.iter().try_for_each(|(pack, bytes)| database.put_watermark(*pack, *bytes))?;
            database.flush()?;
            match drops && had_no_dangling {
                true => database.put_may_have_dangling(false),
                false => Ok(()),
            }
        };
        let saved = write();
        drop(database);
        if let Err(error) = saved {
            let mut state = self.write();
            state.is_precious = true;
            state.may_have_dangling |= drops;
            drop(state);
            return self.or_hold(Err(error));
        }
        self.write().saved(epoch);
        // The watermarks say more now.
        closing::remove(&self.dir()?)
    }

    /// Makes room on a full disk: from now on the index is held in memory. Returns whether it made some.
    pub(crate) fn make_room(&self) -> Result<bool, StoreError> {
        let _writing = self.writing();
        if !self.is_held() {
            self.hold()?;
        }
        let there_was = self.name.exists();
        self.leave_disk().map(|()| there_was)
    }

    /// Sees to it that nothing on the disk speaks of packs that are about to be removed.
    ///
    /// What cannot be saved there goes: the next opening builds it anew. Nothing less would do, as the number of a
    /// pack may come back.
    ///
    /// `tell` writes down that they go. Where there is no room for that, nothing on the disk may name them either.
    pub(crate) fn let_packs_go(
        &self,
        tell: impl FnOnce() -> Result<(), StoreError>,
    ) -> Result<(), StoreError> {
        self.save()?;
        if !self.is_held() {
            let _writing = self.writing();
            self.or_hold(tell())?;
        }
        match self.is_held() {
            true => self.leave_disk(),
            false => Ok(()),
        }
    }

    /// Removes the index that is held in memory from the disk, which makes room there.
    fn leave_disk(&self) -> Result<(), StoreError> {
        if !self.name.exists() {
            return Ok(());
        }
        // In one step, as half of one would be taken for a whole one.
        let leaving = self.name.with_extension(UNFINISHED);
        remove(&leaving)?;
        match file::rename(&self.name, &leaving) {
            // There are quotas under which renaming takes room. Without this file there is no index either.
            Err(error) if file::is_no_room(&error) => {
                Database::remove_file(&self.name)?;
                return remove(&self.name);
            }
            other => other.map_err(StoreError::io("take away", &self.name))?,
        }
        let store = self.name.dir();
        file::sync_dir(store).map_err(StoreError::io("make durable", store))?;
        remove(&leaving)
    }

    /// Saves, or writes the whole database anew, if much has come together in memory.
    pub(crate) fn save_if_much(&self) -> Result<(), StoreError> {
        if self.is_held() {
            return Ok(());
        }
        let (overlay_is_large, much_is_unsaved) = {
            let (state, limits) = (self.read(), self.limits);
            let much = state.unsaved_entries >= limits.unsaved_entries
                || state.unsaved_bytes >= limits.unsaved_bytes;
            (state.overlay_entries() as u64 > self.max_overlay_entries(&state), much)
        };
        match (overlay_is_large, much_is_unsaved) {
            (true, _) => self.rewrite(|_, _, location| Some(location)).map(drop),
            (false, true) => self.save(),
            (false, false) => Ok(()),
        }
    }

    /// Saves what the packs do not tell; of the rest only up to where they are durable.
    pub(crate) fn close(&self) -> Result<(), StoreError> {
        if self.is_held() {
            return Ok(());
        }
        if self.read().is_precious {
            return self.save();
        }
        let (durable, is_saved) = {
            let state = self.read();
            (state.watermarks.clone(), state.moved_watermarks.is_empty())
        };
        match is_saved || durable == self.durable {
            true => Ok(()),
            false => closing::write(&self.dir()?, &durable),
        }
    }

    /// The directory that it is in.
    fn dir(&self) -> Result<Dir, StoreError> {
        file::open_dir(&self.name).map_err(StoreError::io("open", &self.name))
    }

    fn open_database(&self, name: &Name) -> Result<Database, StoreError> {
        let (place, store) = (name.clone(), self.store);
        guard(open_within(name), move || Database::open_again(&place, store))
    }

    /// How much disk the index takes.
    pub(crate) fn disk_bytes(&self) -> u64 {
        disk_bytes(&self.name)
    }

    /// Writes the database anew if it takes far more disk than its entries need.
    pub(crate) fn rewrite_if_bloated(&self) -> Result<(), StoreError> {
        if self.is_held() {
            return Ok(());
        }
        let entries = {
            let state = self.read();
            state.bucket_entries() + state.overlay_entries() as u64
        };
        let needed_bytes = entries * ENTRY_BYTES + self.snapshots()?.len() as u64 * SNAPSHOT_BYTES;
        match self.disk_bytes() > 2 * needed_bytes + MIN_BYTES {
            true => self.rewrite(|_, _, location| Some(location)).map(drop),
            false => Ok(()),
        }
    }

    /// Writes everything into a new database, which replaces the present one. On the way `change`
    /// says of each entry where it is to be from now on, or that it is gone; asked in order of the
    /// trees and hashes. What changes otherwise meanwhile stays changed.
    ///
    /// Returns whether there was room for it. Else nothing is changed, and the index is held in memory.
    ///
    /// Cost: half a second for a million entries.
    pub(crate) fn rewrite(
        &self,
        mut change: impl FnMut(Tree, &Hash, Location) -> Option<Location>,
    ) -> Result<bool, StoreError> {
        let _writing = self.writing();
        if self.is_held() {
            return Ok(false);
        }
        let new = self.name.with_extension(UNFINISHED);
        remove(&new)?;
        let snapshots = self.snapshots()?;
        let (epoch, snapshots, watermarks, about_entries, old) = {
            let mut state = self.write();
            let Some(old) = state.database()?.cloned() else { return Ok(false) };
            let about =
                Tree::ALL.map(|tree| old.buckets(tree).entries + state.overlays[tree as usize].len() as u64);
            let mut snapshots = snapshots;
            snapshots.extend(state.unsaved_snapshots());
            snapshots.retain(|_, value| !value.is_empty());
            (state.end_epoch(), snapshots, state.watermarks.clone(), about, old)
        };
        let mut write = || -> Result<Database, StoreError> {
            let mut fresh = self.open_database(&new)?;
            for (tree, about_entries) in Tree::ALL.into_iter().zip(about_entries) {
                let entries = self.entries(tree).filter_map(|entry| match entry {
                    Ok((hash, location)) => {
                        change(tree, &hash, location).map(|location| Ok((hash, location.to_bytes())))
                    }
                    Err(error) => Some(Err(error)),
                });
                fresh.fill(tree, about_entries, entries)?;
            }
            fresh.fill_snapshots(&snapshots)?;
            // No danger in writing these before all else is on the disk: nobody opens it until it is complete.
            watermarks.iter().try_for_each(|(pack, bytes)| fresh.put_watermark(*pack, Some(*bytes)))?;
            fresh.put_damage_known(old.damage_known())?;
            fresh.put_may_have_dangling(old.may_have_dangling())?;
            fresh.put_rebuilding(old.is_rebuilding())?;
            fresh.flush()?;
            Ok(fresh)
        };
        let written = write();
        drop(old);
        let failed = |error| {
            self.write().is_precious = true;
            remove(&new)?;
            self.or_hold(Err(error)).map(|()| false)
        };
        let fresh = match written {
            Ok(fresh) => fresh,
            Err(error) => return failed(error),
        };
        let mut state = self.write();
        // What was taken out meanwhile may be there in part: a delta, and no more its base.
        let is_drop = |change: &Change| change.epoch > epoch && change.place == Location::GONE;
        if state.overlays.iter().flat_map(BTreeMap::values).any(is_drop) {
            state.may_have_dangling = true;
            if let Err(error) = fresh.put_may_have_dangling(true) {
                drop((state, fresh));
                return failed(error);
            }
        }
        let buckets = Tree::ALL.map(|tree| fresh.buckets(tree));
        if let Err(error) = fresh.close() {
            drop(state);
            return failed(error);
        }
        // Nobody else has it: whoever changes it holds the lock for that, and all others the state's.
        state.lower = Lower::Lost;
        let exchanged = file::exchange_dirs(&new, &self.name).map_err(StoreError::io("replace", &self.name));
        let database = self.open_database(&self.name)?;
        if let Err(error) = exchanged {
            state.lower = Lower::Database(Arc::new(database));
            drop(state);
            return failed(error);
        }
        // After an error of the disk sled was seen to open with nothing in it.
        if Tree::ALL.map(|tree| database.buckets(tree)) != buckets {
            let detail = "it was not what had been written when it was opened again".to_owned();
            return Err(StoreError::Index { action: "be rewritten", detail });
        }
        state.lower = Lower::Database(Arc::new(database));
        state.overlays.iter_mut().for_each(|overlay| overlay.retain(|_, change| change.epoch > epoch));
        state.saved(epoch);
        drop(state);
        // The cache of the old database, and what was in memory of the new one.
        heap::give_back();
        remove(&new).map(|()| true)
    }
}

/// Entries in order, of the buckets and the overlay together: a bucket at a time, as they are at that moment.
struct Entries<'a> {
    index: &'a Index,
    tree: Tree,
    /// Where to go on; `None` at the end.
    from: Option<Hash>,
    ready: std::vec::IntoIter<Stored>,
}

impl Iterator for Entries<'_> {
    type Item = Result<Stored, StoreError>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            if let Some(entry) = self.ready.next() {
                return Some(Ok(entry));
            }
            let from = self.from.take()?;
            match self.bucket(&from) {
                Ok((ready, next)) => (self.ready, self.from) = (ready.into_iter(), next),
                Err(error) => return Some(Err(error)),
            }
        }
    }
}

impl Entries<'_> {
    /// The entries from here to the end of the bucket, and where the next one begins.
    fn bucket(&self, from: &Hash) -> Result<(Vec<Stored>, Option<Hash>), StoreError> {
        let state = self.index.read();
        let overlay = &state.overlays[self.tree as usize];
        let Some(database) = state.database()? else {
            let mut rest = overlay.range(*from..).map(|(hash, change)| (*hash, change.place));
            let ready = rest.by_ref().take(HELD_ENTRIES).collect();
            return Ok((ready, rest.next().map(|(hash, _)| hash)));
        };
        let next = database.buckets(self.tree).next(from);
        let older = database.bucket_from(self.tree, from)?;
        let newer = match next {
            Some(next) => overlay.range(*from..next),
            None => overlay.range(*from..),
        };
        Ok((merge(older, newer), next))
    }
}

/// Both in order; where both have a hash, the newer.
fn merge(older: Vec<Stored>, newer: btree_map::Range<'_, Hash, Change>) -> Vec<Stored> {
    let mut newer = newer.map(|(hash, change)| (*hash, change.place)).peekable();
    if newer.peek().is_none() {
        return older;
    }
    let mut merged = Vec::with_capacity(older.len() + BLOCK_ENTRIES);
    for entry in older {
        while let Some(before) = newer.next_if(|(hash, _)| *hash < entry.0) {
            merged.push(before);
        }
        merged.push(newer.next_if(|(hash, _)| *hash == entry.0).unwrap_or(entry));
    }
    merged.extend(newer);
    merged
}

/// How long the index of this name may take to open: a million entries took 14 ms, so this is for disks that are very
/// slow, and ends a sled that turns in circles.
fn open_within(name: &Name) -> Duration {
    #[cfg(feature = "fault-injection")]
    if let Some(millis) = std::env::var("STILLFRAME_INDEX_WITHIN_MS").ok().and_then(|text| text.parse().ok())
    {
        return Duration::from_millis(millis);
    }
    OPEN_WITHIN + Duration::from_secs(disk_bytes(name) / OPEN_BYTES_A_SECOND)
}

fn disk_bytes(name: &Name) -> u64 {
    name.open_dir().and_then(|dir| file::disk_bytes(&dir)).unwrap_or(0)
}

/// Opens the index in a thread of its own, which is left behind if that takes too long. On a damaged database sled
/// may panic where others return an error.
fn guard<T: Send + 'static>(
    within: Duration,
    open: impl FnOnce() -> Result<T, StoreError> + Send + 'static,
) -> Result<T, StoreError> {
    let useless = |detail: String| StoreError::Index { action: "be opened", detail };
    let (done, opened) = crossbeam_channel::bounded(1);
    let work = move || {
        // Nobody waits for it any more if it took too long.
        let _ = done.send(catch_unwind(AssertUnwindSafe(open)));
    };
    std::thread::Builder::new()
        .name(INDEX_THREAD.to_owned())
        .spawn(work)
        .map_err(|error| useless(format!("no thread can be started for it: {error}")))?;
    match opened.recv_timeout(within) {
        Ok(Ok(opened)) => opened,
        Ok(Err(_)) => Err(useless("it panicked".to_owned())),
        Err(_) => Err(useless(format!("it was not done after {} s", within.as_secs_f32()))),
    }
}

/// Says that the index of this name is held in memory.
pub(crate) fn warn_held(name: &Name) {
    tracing::warn!(
        "no space is left to write {}: the index is held in memory, and built anew with each opening until \
         some space is free",
        name.display()
    );
}

/// An error where there is too little room to open the index of this name. To be asked before sled finds out: it
/// writes when it opens, and a database in which that failed was found damaged the next time.
pub(crate) fn check_room(name: &Name) -> Result<(), StoreError> {
    // Where the file system cannot tell, there is room.
    match file::room_bytes(name.dir()).unwrap_or(u64::MAX) < MIN_BYTES + disk_bytes(name) / 16 {
        true => Err(StoreError::io("write", name)(std::io::ErrorKind::StorageFull.into())),
        false => Ok(()),
    }
}

/// An error if there is anything in the index of this name that no stillframe has put there and the database would
/// follow or change: links, files that have names elsewhere, pipes. To be asked before it is opened.
pub(crate) fn check_files(name: &Name) -> Result<(), StoreError> {
    let dir = file::open_dir(name).map_err(StoreError::io("open", name))?;
    match file::stranger(&dir).map_err(StoreError::io("read", &dir))? {
        Some((stranger, what)) => {
            Err(StoreError::Index { action: "be used", detail: format!("{} is {what}", stranger.display()) })
        }
        None => Ok(()),
    }
}

fn remove(dir: &Name) -> Result<(), StoreError> {
    file::remove_dir(dir).map_err(StoreError::io("remove", dir))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codec::Encoding;
    use proptest::prelude::*;
    use std::path::Path;

    fn name(path: &Path) -> Name {
        Name::at(path).unwrap()
    }

    fn location(pack: u32) -> Location {
        Location { pack, offset_bytes: 48, encoding: Encoding::Raw, stored_bytes: 9, plain_bytes: 9 }
    }

    fn watermark(end_bytes: u64) -> Watermark {
        Watermark { pack: PackId(u128::from(end_bytes).to_le_bytes()), end_bytes }
    }

    const STORE: StoreId = StoreId([7; 16]);

    /// So that a few entries are many.
    const SMALL: Limits = Limits { unsaved_entries: 8, unsaved_bytes: 1 << 20, overlay_entries: 24 };

    fn all(index: &Index, tree: Tree) -> BTreeMap<Hash, Location> {
        let entries: Vec<_> = index.entries(tree).collect::<Result<_, _>>().unwrap();
        assert!(entries.is_sorted_by_key(|(hash, _)| *hash));
        entries.into_iter().collect()
    }

    /// What happens to an index. A key is a hash, a pack and a snapshot at once.
    #[derive(Clone, Debug)]
    enum Step {
        Insert(Tree, Vec<u8>, u32),
        Replace(Tree, u8, Option<u32>),
        SetSnapshot(u8, Option<u8>),
        SetWatermark(u8, Option<u64>),
        Save,
        SaveIfMuch,
        /// Keeps the locations of packs with a number below this.
        Rewrite(u32),
        /// Closes the index well or, as a crash does, not at all.
        Reopen {
            close: bool,
        },
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let tree = || prop_oneof![Just(Tree::Regions), Just(Tree::Objects)];
        let keys = proptest::collection::vec(any::<u8>(), 1..12);
        let step = prop_oneof![
            8 => (tree(), keys, 1u32..9).prop_map(|(tree, keys, pack)| Step::Insert(tree, keys, pack)),
            4 => (tree(), any::<u8>(), proptest::option::of(1u32..9))
                .prop_map(|(tree, key, new)| Step::Replace(tree, key, new)),
            2 => (0u8..9, proptest::option::of(any::<u8>())).prop_map(|(key, it)| Step::SetSnapshot(key, it)),
            2 => (0u8..9, proptest::option::of(any::<u64>())).prop_map(|(key, it)| Step::SetWatermark(key, it)),
            2 => Just(Step::Save),
            4 => Just(Step::SaveIfMuch),
            1 => (5u32..10).prop_map(Step::Rewrite),
            2 => any::<bool>().prop_map(|close| Step::Reopen { close }),
        ];
        proptest::collection::vec(step, 0..60)
    }

    #[derive(Clone, Debug, Default, PartialEq)]
    struct Model {
        trees: [BTreeMap<Hash, Location>; 2],
        snapshots: BTreeMap<Vec<u8>, Vec<u8>>,
        watermarks: BTreeMap<u32, Watermark>,
    }

    impl Model {
        fn of(index: &Index) -> Model {
            let trees = Tree::ALL.map(|tree| all(index, tree));
            Model { trees, snapshots: index.snapshots().unwrap(), watermarks: index.watermarks() }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]
        #[test]
        fn it_agrees_with_maps_whatever_happens(steps in steps()) {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("index");
            let mut index = Index::open_with(&name(&path), STORE, SMALL).unwrap();
            let mut model = Model::default();
            // What must be there after a crash.
            let mut saved = Model::default();
            let hash = |key: u8| Hash::of(&[key]);
            for step in steps {
                match step {
                    Step::Insert(tree, keys, pack) => {
                        let entries: Vec<IndexEntry> =
                            keys.iter().map(|key| (tree, hash(*key), location(pack))).collect();
                        index.insert(&entries);
                        model.trees[tree as usize]
                            .extend(entries.into_iter().map(|(_, hash, location)| (hash, location)));
                    }
                    Step::Replace(tree, key, new) => {
                        let entries = &mut model.trees[tree as usize];
                        let old = entries.get(&hash(key)).copied();
                        let new = new.map(location);
                        prop_assert!(!index.replace(tree, &hash(key), location(99), new).unwrap());
                        let replaced = index.replace(tree, &hash(key), old.unwrap_or(location(1)), new);
                        prop_assert_eq!(replaced.unwrap(), old.is_some());
                        match (old, new) {
                            (Some(_), Some(new)) => drop(entries.insert(hash(key), new)),
                            _ => drop(entries.remove(&hash(key))),
                        }
                    }
                    Step::SetSnapshot(key, value) => {
                        index.set_snapshot(vec![key], value.map(|value| vec![value]));
                        match value {
                            Some(value) => drop(model.snapshots.insert(vec![key], vec![value])),
                            None => drop(model.snapshots.remove(&vec![key])),
                        }
                    }
                    Step::SetWatermark(pack, bytes) => {
                        let bytes = bytes.map(watermark);
                        index.set_watermark(pack.into(), bytes);
                        match bytes {
                            Some(bytes) => drop(model.watermarks.insert(pack.into(), bytes)),
                            None => drop(model.watermarks.remove(&pack.into())),
                        }
                    }
                    Step::Save => {
                        index.save().unwrap();
                        saved = model.clone();
                    }
                    Step::SaveIfMuch => {
                        let before = index.read().saved_epoch;
                        index.save_if_much().unwrap();
                        if index.read().saved_epoch > before {
                            saved = model.clone();
                        }
                    }
                    Step::Rewrite(end) => {
                        index.rewrite(|_, _, at| (at.pack < end).then_some(at)).unwrap();
                        model.trees.iter_mut().for_each(|tree| tree.retain(|_, at| at.pack < end));
                        saved = model.clone();
                    }
                    Step::Reopen { close } => {
                        if close {
                            let is_precious = index.read().is_precious;
                            index.close().unwrap();
                            if is_precious {
                                saved = model.clone();
                            }
                        }
                        drop(index);
                        index = Index::open_with(&name(&path), STORE, SMALL).unwrap();
                        model = saved.clone();
                    }
                }
                prop_assert_eq!(&Model::of(&index), &model);
                for tree in Tree::ALL {
                    for key in 0..=255 {
                        let known = model.trees[tree as usize].get(&hash(key)).copied();
                        prop_assert_eq!(index.get(tree, &hash(key)).unwrap(), known);
                    }
                }
            }
        }
    }

    #[test]
    fn what_is_taken_out_while_the_database_is_written_anew_may_be_there_in_part_after_a_kill() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("index");
        let index = Index::open_with(&name(&path), STORE, SMALL).unwrap();
        let hashes: Vec<Hash> = (0..100u8).map(|number| Hash::of(&[number])).collect();
        index.insert(&hashes.iter().map(|hash| (Tree::Regions, *hash, location(1))).collect::<Vec<_>>());
        index.rewrite(|_, _, location| Some(location)).unwrap();
        assert!(!index.may_have_dangling());
        // The last of all, as soon as the first was seen.
        let last = hashes.iter().max().unwrap();
        let change = |tree, _: &Hash, at| {
            index.replace(tree, last, at, None).unwrap();
            Some(at)
        };
        index.rewrite(change).unwrap();
        drop(index);
        let index = Index::open_with(&name(&path), STORE, SMALL).unwrap();
        assert_eq!(index.get(Tree::Regions, last).unwrap(), None);
        assert_eq!(index.entries(Tree::Regions).count(), 99);
        assert!(index.may_have_dangling());
    }

    #[test]
    fn what_is_saved_while_entries_are_taken_out_may_be_there_in_part_after_a_kill() {
        let dir = tempfile::tempdir().unwrap();
        let index = Index::open_with(&name(&dir.path().join("index")), STORE, SMALL).unwrap();
        let hashes: Vec<Hash> = (0..10u8).map(|number| Hash::of(&[number])).collect();
        let entries = hashes.iter().map(|hash| (Tree::Regions, *hash, location(1)));
        index.insert(&entries.clone().collect::<Vec<_>>());
        index.save().unwrap();
        // The settler saves when it likes.
        let amid = entries.inspect(|_| {
            index.save().unwrap();
            assert!(index.may_have_dangling());
        });
        index.take_out(amid).unwrap();
        assert!(!index.may_have_dangling());
        assert_eq!(index.entries(Tree::Regions).count(), 0);
    }

    #[test]
    fn look_ups_go_on_while_the_database_is_written_anew() {
        let dir = tempfile::tempdir().unwrap();
        let index = Index::open_with(&name(&dir.path().join("index")), STORE, SMALL).unwrap();
        let hash = |number: u32| Hash::of(&number.to_le_bytes());
        let known = std::sync::atomic::AtomicU32::new(0);
        let order = std::sync::atomic::Ordering::SeqCst;
        std::thread::scope(|scope| {
            let readers: Vec<_> = (0..3u32)
                .map(|reader| {
                    let (index, known) = (&index, &known);
                    scope.spawn(move || {
                        let mut at = reader;
                        while known.load(order) < 3000 {
                            let count = known.load(order);
                            if reader == 0 {
                                let found = index.entries(Tree::Regions).map(Result::unwrap).count();
                                assert!(found >= count as usize, "{found} of {count}");
                            } else if count > 0 {
                                at = at.wrapping_mul(0x9E37_79B9).wrapping_add(1);
                                let number = at % count;
                                let found = index.get(Tree::Regions, &hash(number)).unwrap();
                                assert_eq!(found, Some(location(1 + number)));
                            }
                        }
                    })
                })
                .collect();
            for number in 0..3000 {
                index.insert(&[(Tree::Regions, hash(number), location(1 + number))]);
                known.store(number + 1, order);
                index.save_if_much().unwrap();
            }
            readers.into_iter().for_each(|reader| reader.join().unwrap());
        });
        assert!(index.read().bucket_entries() > 1000, "it was rewritten");
    }

    #[test]
    fn what_changes_while_the_database_is_written_anew_stays_changed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("index");
        let index = Index::open_with(&name(&path), STORE, SMALL).unwrap();
        let hash = |number: u8| Hash::of(&[number]);
        let entries: Vec<_> = (0..200).map(|number| (Tree::Regions, hash(number), location(1))).collect();
        index.insert(&entries);
        let mut step = 0;
        index
            .rewrite(|tree, found, at| {
                step += 1;
                if step == 100 {
                    for number in 0..50 {
                        index.replace(tree, &hash(number), location(1), None).unwrap();
                        index.replace(tree, &hash(50 + number), location(1), Some(location(2))).unwrap();
                    }
                    index.insert(&[(tree, hash(201), location(3))]);
                    index.set_snapshot(vec![1], Some(vec![2]));
                    index.set_watermark(5, Some(watermark(6)));
                }
                (*found != hash(150)).then_some(at)
            })
            .unwrap();
        let check = |index: &Index| {
            let found = all(index, Tree::Regions);
            assert_eq!(found.len(), 150);
            assert_eq!(found.values().filter(|at| **at == location(2)).count(), 50);
            assert_eq!(found.get(&hash(201)), Some(&location(3)));
            assert!(!found.contains_key(&hash(150)));
            assert_eq!(index.snapshots().unwrap(), BTreeMap::from([(vec![1], vec![2])]));
            assert_eq!(index.watermarks(), BTreeMap::from([(5, watermark(6))]));
        };
        check(&index);
        index.close().unwrap();
        drop(index);
        check(&Index::open_with(&name(&path), STORE, SMALL).unwrap());
    }

    #[test]
    fn a_new_database_that_was_not_finished_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("index");
        let index = Index::open(&name(&path), STORE).unwrap();
        index.insert(&[(Tree::Objects, Hash::of(b"x"), location(1))]);
        index.save().unwrap();
        drop(index);
        let unfinished = path.with_extension(UNFINISHED);
        drop(Database::open(&name(&unfinished), STORE).unwrap());
        let index = Index::open(&name(&path), STORE).unwrap();
        assert_eq!(index.get(Tree::Objects, &Hash::of(b"x")).unwrap(), Some(location(1)));
        assert!(!unfinished.exists());
    }

    #[test]
    fn an_entry_of_a_large_index_takes_less_than_50_bytes_of_disk() {
        let dir = tempfile::tempdir().unwrap();
        let index = Index::open(&name(&dir.path().join("index")), STORE).unwrap();
        let count = 200_000u32;
        let entry = |number: u32| {
            let location = Location { offset_bytes: u64::from(number) * 3000, ..location(1) };
            (Tree::Regions, Hash::of(&number.to_le_bytes()), location)
        };
        index.insert(&(0..count).map(entry).collect::<Vec<_>>());
        index.save_if_much().unwrap();
        assert_eq!(index.read().bucket_entries(), count.into());
        let bytes = index.disk_bytes();
        assert!(bytes < 50 * u64::from(count), "{bytes} bytes");
    }

    #[test]
    fn an_index_of_another_store_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        drop(Index::open(&name(dir.path()), STORE).unwrap());
        assert!(Index::open(&name(dir.path()), StoreId::new()).is_err());
    }
}
