//! The index: where each object is.
//!
//! It is a cache of the packs and can be rebuilt from them, so nothing here needs to be durable at
//! any particular moment. It has two tiers. The *buckets* are in a sled database (database.rs) and
//! are only ever written all at once. Above them, the *overlay* in memory has everything that has
//! changed since. A look-up finds an entry in the overlay or, with one access to the database, in
//! its bucket.
//!
//! ```text
//!  insert, replace ─> overlay (memory) ─ save ──> a run in the database: read back at opening
//!                        │
//!                        └──────────── rewrite ─> a new database with new buckets, without runs
//! ```
//!
//! Entries that are not *saved* are lost when the store is closed or killed, and are found again in
//! the packs. A pack's *watermark* says up to which byte it is indexed in the database; the next
//! opening scans what lies past it. So a small snapshot does not write to the database: thousands
//! of objects share one write. A watermark is written only after everything before it.
//!
//! When the overlay grows beyond a quarter of the buckets, the database is rewritten. The new one
//! replaces the old one when it is complete. Look-ups continue in the meantime.
//!
//! If the disk is full, or nothing can be written at all, the index is *held in memory*: everything
//! is in the overlay, at about 100 bytes an entry, and nothing is saved until the store is opened
//! again.

pub(crate) mod block;
pub(crate) mod closing;
pub(crate) mod database;
mod entries;
mod opening;
mod overlay;
mod rewrite;
mod room;

use std::collections::BTreeMap;
use std::sync::{Arc, MutexGuard, RwLockReadGuard, RwLockWriteGuard};

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
use block::Stored;
use closing::Durable;
use database::Database;
use entries::Entries;
use opening::{guard, open_within};
use overlay::{Change, Lower, Tiers};
use room::disk_bytes;

pub(crate) use room::{check_files, check_room, warn_held};

/// When entries in memory are written to the database.
#[derive(Clone, Copy, Debug)]
struct Limits {
    /// Entries are saved if this many are unsaved, or ...
    unsaved_entries: usize,
    /// ... if this many bytes of packs are. The next opening reads them again.
    unsaved_bytes: u64,
    /// The overlay may have this many entries, or a quarter of those in the buckets. The next
    /// opening reads them too.
    overlay_entries: usize,
}

/// With 14,000 unsaved entries in 8 MB of packs, an opening took 9 ms more than with none; with
/// 60,000 entries of runs, 12 ms more (AMD EPYC, 2 cores). The limits are half of both.
const LIMITS: Limits =
    Limits { unsaved_entries: 8 * 1024, unsaved_bytes: 4 << 20, overlay_entries: 32 * 1024 };

/// The open index.
pub(crate) struct Index {
    name: Name,
    store: StoreId,
    limits: Limits,
    state: RwLock<Tiers>,
    /// Held by the thread that changes the database. It is locked before the tiers.
    writing: Mutex<()>,
    /// How far the packs were durable when the store was last closed.
    durable: Durable,
}

impl Index {
    /// Opens the index of this name, or creates it. An error means that it is not usable and must
    /// be rebuilt. That includes an index of another store or schema, and one that does not open in
    /// time.
    pub(crate) fn open(name: &Name, store: StoreId) -> Result<Index, StoreError> {
        let place = name.clone();
        guard(open_within(name), move || Index::open_with(&place, store, LIMITS))
    }

    fn open_with(name: &Name, store: StoreId, limits: Limits) -> Result<Index, StoreError> {
        remove(&name.with_extension(UNFINISHED))?;
        check_room(name)?;
        if Database::is_missing(name) {
            // The second opening of a database takes the space of a whole segment. That is part of
            // an empty store, not of its second snapshot.
            drop(Database::open(name, store)?);
        }
        let database = Database::open(name, store)?;
        let mut overlays: [Vec<(Hash, Change)>; Tree::ALL.len()] = Default::default();
        database.read_runs(|tree, (hash, place)| {
            overlays[tree as usize].push((hash, Change { place, epoch: 0 }));
        })?;
        let state = Tiers {
            // Of several changes of an object, the last one stays.
            overlays: overlays.map(|changes| changes.into_iter().collect()),
            watermarks: database.watermarks()?,
            damage_known: database.damage_known(),
            may_have_dangling: database.may_have_dangling(),
            is_rebuilding: database.is_rebuilding(),
            lower: Lower::Database(Arc::new(database)),
            ..Tiers::held_in_memory()
        };
        Ok(Index::with(name, store, limits, state))
    }

    /// Whether there is nothing of this name that could be an index.
    pub(crate) fn is_missing(name: &Name) -> bool {
        Database::is_missing(name)
    }

    /// An empty index that is held in memory. An index of this name on the disk stays as it is.
    pub(crate) fn in_memory(name: &Name, store: StoreId) -> Index {
        Index::with(name, store, LIMITS, Tiers::held_in_memory())
    }

    fn with(name: &Name, store: StoreId, limits: Limits, state: Tiers) -> Index {
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

    /// Loads everything into memory if `written` failed because of a full disk. The caller holds
    /// `writing`.
    fn or_hold(&self, written: Result<(), StoreError>) -> Result<(), StoreError> {
        match written {
            Err(StoreError::DiskFull { .. }) => self.hold(),
            other => other,
        }
    }

    /// Loads everything into memory. The caller holds `writing`.
    fn hold(&self) -> Result<(), StoreError> {
        let entries = Tree::ALL.map(|tree| self.stored(tree).collect::<Result<Vec<Stored>, _>>());
        let snapshots = self.snapshots()?;
        let mut state = self.write();
        let epoch = state.epoch;
        // What has changed in the meantime is newer.
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

    fn read(&self) -> RwLockReadGuard<'_, Tiers> {
        self.state.read()
    }

    fn write(&self) -> RwLockWriteGuard<'_, Tiers> {
        self.state.write()
    }

    fn writing(&self) -> MutexGuard<'_, ()> {
        self.writing.lock()
    }

    /// The location of an object. It takes under 1 µs in the overlay, and 1 to 7 µs in the database
    /// (AMD EPYC, 2 cores).
    pub(crate) fn get(&self, tree: Tree, hash: &Hash) -> Result<Option<Location>, StoreError> {
        self.read().get(tree, hash)
    }

    /// Adds objects that were appended. It takes 0.5 µs an object (AMD EPYC, 2 cores).
    pub(crate) fn insert(&self, entries: &[IndexEntry]) {
        let mut state = self.write();
        for (tree, hash, location) in entries {
            state.change(*tree, hash, location.to_bytes());
            state.unsaved_bytes += location.object_bytes();
        }
    }

    /// Adds objects that were found in the packs. Of several copies it keeps one that needs no
    /// base. Returns the deltas that were left out in favour of other deltas, whose bases may not
    /// exist.
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

    /// If the location of an object still is `old`, replaces it, or removes the entry. Returns
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

    /// Removes the entries whose locations have not changed. Deltas may be removed before or after
    /// their bases. So the index is marked until all of this is on the disk: a save in the meantime
    /// may have one without the other.
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
        if had_no_dangling { self.set_may_have_dangling(false) } else { Ok(()) }
    }

    /// Whether a [`rewrite`](Self::rewrite) is faster for this many changes.
    pub(crate) fn is_many(&self, changes: u64) -> bool {
        !self.is_held() && changes > self.max_overlay_entries(&self.read()) / 4
    }

    fn max_overlay_entries(&self, state: &Tiers) -> u64 {
        (self.limits.overlay_entries as u64).max(state.bucket_entries() / 4)
    }

    /// All entries in order of their hashes. An entry that changes in the meantime may be returned
    /// as it was before or after.
    pub(crate) fn entries(&self, tree: Tree) -> impl Iterator<Item = Result<(Hash, Location), StoreError>> {
        let located =
            |(hash, place): Stored| Location::from_bytes(&place).map(|location| Ok((hash, location)));
        self.stored(tree).filter_map(move |entry| entry.map_or_else(|error| Some(Err(error)), located))
    }

    fn stored(&self, tree: Tree) -> Entries<'_> {
        Entries::new(&self.state, tree)
    }

    /// All catalog entries by their keys.
    fn snapshots(&self) -> Result<BTreeMap<Vec<u8>, Vec<u8>>, StoreError> {
        let mut snapshots = BTreeMap::new();
        self.read_snapshots(|key, value| {
            if value.is_empty() {
                snapshots.remove(key)
            } else {
                snapshots.insert(key.to_vec(), value.to_vec())
            };
            true
        })?;
        Ok(snapshots)
    }

    /// Passes the keys and values of all catalog entries to `take`, for each key the newest value
    /// last. An empty value means that the entry is removed. It stops when `take` rejects one, and
    /// returns whether it accepted all.
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

    /// Sets or removes a catalog entry.
    pub(crate) fn set_snapshot(&self, key: Vec<u8>, value: Option<Vec<u8>>) {
        let mut state = self.write();
        let epoch = state.epoch;
        state.snapshots.insert(key, (value.unwrap_or_default(), epoch));
    }

    /// How far each pack is indexed.
    pub(crate) fn watermarks(&self) -> BTreeMap<u32, Watermark> {
        self.read().watermarks.clone()
    }

    /// Sets or removes a pack's watermark. Everything before the watermark must be in the index.
    pub(crate) fn set_watermark(&self, pack: u32, indexed: Option<Watermark>) {
        let mut state = self.write();
        match indexed {
            Some(watermark) => state.watermarks.insert(pack, watermark),
            None => state.watermarks.remove(&pack),
        };
        let epoch = state.epoch;
        state.moved_watermarks.insert(pack, epoch);
    }

    /// How far a pack is known to have been durable. Damage before that is no torn tail.
    pub(crate) fn durable_bytes(&self, pack: u32, id: PackId) -> u64 {
        self.durable.get(&pack).filter(|durable| durable.pack == id).map_or(0, |durable| durable.end_bytes)
    }

    /// Whether damage is known.
    pub(crate) fn damage_known(&self) -> bool {
        self.read().damage_known
    }

    /// Records whether damage is known, even if nothing else is saved.
    pub(crate) fn set_damage_known(&self, known: bool) -> Result<(), StoreError> {
        let _writing = self.writing();
        self.write().damage_known = known;
        let Some(database) = self.read().database()?.cloned() else { return Ok(()) };
        if database.damage_known() == known { Ok(()) } else { self.or_hold(database.put_damage_known(known)) }
    }

    /// Whether there may be deltas whose base is not in the index.
    pub(crate) fn may_have_dangling(&self) -> bool {
        self.read().may_have_dangling
    }

    /// Sets, durably, whether there may be.
    pub(crate) fn set_may_have_dangling(&self, may: bool) -> Result<(), StoreError> {
        let _writing = self.writing();
        self.write().may_have_dangling = may;
        let Some(database) = self.read().database()?.cloned() else { return Ok(()) };
        self.or_hold(database.put_may_have_dangling(may))
    }

    /// Whether the index is being built from the packs. It then does not know yet what was
    /// acknowledged.
    pub(crate) fn is_rebuilding(&self) -> bool {
        self.read().is_rebuilding
    }

    /// Sets, durably, whether it is being built.
    pub(crate) fn set_rebuilding(&self, rebuilding: bool) -> Result<(), StoreError> {
        let _writing = self.writing();
        self.write().is_rebuilding = rebuilding;
        let Some(database) = self.read().database()?.cloned() else { return Ok(()) };
        self.or_hold(database.put_rebuilding(rebuilding))
    }

    /// Writes everything unsaved to disk. Does nothing if the index is held in memory.
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
                // If this process is killed, the disk may have only some of the removals.
                database.put_may_have_dangling(true)?;
            }
            database.put_run(&entries, &snapshots)?;
            database.flush()?;
            // Only now is everything before the watermarks on the disk.
            watermarks.iter().try_for_each(|(pack, bytes)| database.put_watermark(*pack, *bytes))?;
            database.flush()?;
            if drops && had_no_dangling { database.put_may_have_dangling(false) } else { Ok(()) }
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
        // The watermarks now reach further than this file says.
        closing::remove(&self.dir()?)
    }

    /// Frees space on a full disk: from now on the index is held in memory. Returns whether it
    /// freed any.
    pub(crate) fn make_room(&self) -> Result<bool, StoreError> {
        let _writing = self.writing();
        if !self.is_held() {
            self.hold()?;
        }
        let there_was = self.name.exists();
        self.leave_disk().map(|()| there_was)
    }

    /// Ensures that no index on the disk refers to packs that are about to be removed.
    ///
    /// If it cannot be saved, it is deleted from the disk, and the next opening rebuilds it.
    /// Nothing less would be safe, because a pack's number may be used again.
    ///
    /// `tell` records durably that the packs are removed. If there is no space for that, the index
    /// on the disk must not refer to them either.
    pub(crate) fn let_packs_go(
        &self,
        tell: impl FnOnce() -> Result<(), StoreError>,
    ) -> Result<(), StoreError> {
        self.save()?;
        if !self.is_held() {
            let _writing = self.writing();
            self.or_hold(tell())?;
        }
        if self.is_held() { self.leave_disk() } else { Ok(()) }
    }

    /// Deletes the index, which is held in memory, from the disk, which frees space there.
    fn leave_disk(&self) -> Result<(), StoreError> {
        if !self.name.exists() {
            return Ok(());
        }
        // The index is removed in one step: part of one would be mistaken for a whole one.
        let leaving = self.name.with_extension(UNFINISHED);
        remove(&leaving)?;
        match file::rename(&self.name, &leaving) {
            // Under some quotas, a rename needs space. Without this file there is no index either.
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

    /// Saves, or rewrites the whole database, if much has accumulated in memory.
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

    /// Saves what the packs do not contain. For the rest it saves only how far they are durable.
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
        if is_saved || durable == self.durable { Ok(()) } else { closing::write(&self.dir()?, &durable) }
    }

    /// The directory that contains it.
    fn dir(&self) -> Result<Dir, StoreError> {
        file::open_dir(&self.name).map_err(StoreError::io("open", &self.name))
    }

    fn open_database(&self, name: &Name) -> Result<Database, StoreError> {
        let (place, store) = (name.clone(), self.store);
        guard(open_within(name), move || Database::open_again(&place, store))
    }

    /// How much disk space the index takes.
    pub(crate) fn disk_bytes(&self) -> u64 {
        disk_bytes(&self.name)
    }
}

fn remove(dir: &Name) -> Result<(), StoreError> {
    file::remove_dir(dir).map_err(StoreError::io("remove", dir))
}

#[cfg(test)]
mod tests;
