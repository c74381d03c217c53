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

/// The open index.
pub(crate) struct Index {
    name: Name,
    store: StoreId,
    limits: Limits,
    state: RwLock<Tiers>,
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
        let state = Tiers {
            // Of several changes of an object the last one stays.
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

    /// Whether there is nothing that could be an index of this name.
    pub(crate) fn is_missing(name: &Name) -> bool {
        Database::is_missing(name)
    }

    /// An index with nothing in it that is held in memory. The one of this name stays as it is.
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

    fn read(&self) -> RwLockReadGuard<'_, Tiers> {
        self.state.read()
    }

    fn write(&self) -> RwLockWriteGuard<'_, Tiers> {
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
        if had_no_dangling { self.set_may_have_dangling(false) } else { Ok(()) }
    }

    /// Whether so many changes are made sooner by a [`rewrite`](Self::rewrite).
    pub(crate) fn is_many(&self, changes: u64) -> bool {
        !self.is_held() && changes > self.max_overlay_entries(&self.read()) / 4
    }

    fn max_overlay_entries(&self, state: &Tiers) -> u64 {
        (self.limits.overlay_entries as u64).max(state.bucket_entries() / 4)
    }

    /// All entries in order of their hashes. Entries that change meanwhile may be seen before or after.
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
        if database.damage_known() == known { Ok(()) } else { self.or_hold(database.put_damage_known(known)) }
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
        if self.is_held() { self.leave_disk() } else { Ok(()) }
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
        if is_saved || durable == self.durable { Ok(()) } else { closing::write(&self.dir()?, &durable) }
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
}

fn remove(dir: &Name) -> Result<(), StoreError> {
    file::remove_dir(dir).map_err(StoreError::io("remove", dir))
}

#[cfg(test)]
mod tests;
