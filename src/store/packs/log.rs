//! The log: all packs of a store, the one that is appended to, and what is not yet in the index.
//!
//! The way of an object: [`Log::append`] writes it to the active pack and remembers it as *unsynced*
//! and *pending*; [`Log::sync`] makes it durable and hands it to the settler; the settler puts it into
//! the index and calls [`Log::settled`]. A pending object is found by look-ups all the while.
//!
//! If making a pack durable fails, nobody can say what of it is on the disk. The pack is sealed, its
//! unsynced objects are taken back, and captures that may refer to them fail. They are cut off, too: the next
//! opening would find them, among them records of which gc knows nothing. What cannot be cut off at once is *ragged*,
//! and must be before another pack is begun and before gc drops anything.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, MutexGuard};

use super::batch::{Batch, BatchObject};
use super::location::{Location, MAX_PACK, Position};
use super::names;
use super::object::{self, ObjectKind};
use super::pack::Pack;
use super::watermark::Watermark;
use crate::codec::Encoding;
use crate::hash::Hash;
use crate::store::catalog::Fact;
use crate::store::error::StoreError;
use crate::store::format::Format;
use crate::store::names::UNFINISHED;
use crate::store::tree::{IndexEntry, Tree};
use crate::sync::{Mutex, RwLock};
use crate::sys::dir::{Dir, Name};
use crate::sys::file;

/// From so many unsynced bytes on the settler makes them durable meanwhile, so that the wait at the
/// end of a large capture is for the last of them only.
pub(crate) const SYNC_EARLY_BYTES: u64 = 32 << 20;

/// All packs of a store.
pub(crate) struct Log {
    dir: Dir,
    format: Format,
    packs: RwLock<BTreeMap<u32, Arc<Pack>>>,
    tail: Mutex<OpenEnd>,
    /// Held while a pack is made durable: those who come meanwhile share the next one.
    syncing: Mutex<()>,
    pending: RwLock<Pending>,
    /// Files that gc has no more use for and could not yet remove, durably.
    superfluous: Mutex<Vec<Name>>,
}

#[derive(Default)]
struct OpenEnd {
    active: Option<Arc<Pack>>,
    next_number: u32,
    /// Sealed packs that are not yet durable.
    sealed: Vec<Arc<Pack>>,
    /// Sealed packs with something past their end that could not be cut off.
    ragged: Vec<Arc<Pack>>,
    /// Whether the directory has new entries that are not yet durable.
    directory_changed: bool,
    unsynced: Vec<Unsynced>,
    unsynced_bytes: u64,
    /// How often making a pack durable has failed.
    failures: u64,
}

#[derive(Default)]
struct Pending {
    regions: HashMap<Hash, Location>,
    objects: HashMap<Hash, Location>,
}

impl Pending {
    fn of(&self, tree: Tree) -> &HashMap<Hash, Location> {
        match tree {
            Tree::Regions => &self.regions,
            Tree::Objects => &self.objects,
        }
    }

    fn of_mut(&mut self, tree: Tree) -> &mut HashMap<Hash, Location> {
        match tree {
            Tree::Regions => &mut self.regions,
            Tree::Objects => &mut self.objects,
        }
    }

    /// Removes an object unless it was appended again, somewhere else.
    fn remove(&mut self, tree: Tree, hash: &Hash, location: Location) {
        let objects = self.of_mut(tree);
        if objects.get(hash) == Some(&location) {
            objects.remove(hash);
        }
    }
}

impl OpenEnd {
    /// Nothing is appended to the active pack any more.
    fn seal(&mut self) {
        self.sealed.extend(self.active.take());
    }

    /// Cuts off what failed writes have left behind.
    fn trim(&mut self) -> Result<(), StoreError> {
        while let Some(pack) = self.ragged.last() {
            pack.cut_rest()?;
            self.ragged.pop();
        }
        Ok(())
    }
}

/// What was appended and must be told to the index once it is durable.
#[derive(Clone, Debug)]
pub(crate) enum Unsynced {
    /// An object of one of the trees.
    Object(Tree, Hash, Location),
    /// Something for the catalog.
    Fact(Fact),
}

/// What became durable: the facts in order, and up to which byte of which packs they reach.
#[derive(Default)]
pub(crate) struct Synced {
    pub(crate) entries: Vec<Unsynced>,
    pub(crate) ends: Vec<(u32, Watermark)>,
}

/// What an append did.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Appended {
    pub(crate) objects: u64,
    /// How many of them are differences from others.
    pub(crate) deltas: u64,
    pub(crate) bytes: u64,
    /// How many bytes of the log are not durable now.
    pub(crate) unsynced_bytes: u64,
}

impl Log {
    /// The log of the packs that are open already. The last one goes on if `active` says so. The `ragged` ones have
    /// something past their end, or holes, that could not be mended when they were opened.
    /// Packs made from now on are numbered from `next_number` on.
    pub(crate) fn new(
        dir: Dir,
        format: Format,
        packs: Vec<Arc<Pack>>,
        active: Option<Arc<Pack>>,
        ragged: Vec<Arc<Pack>>,
        next_number: u32,
    ) -> Log {
        let packs = packs.into_iter().map(|pack| (pack.number, pack)).collect();
        Log {
            dir,
            format,
            packs: RwLock::new(packs),
            tail: Mutex::new(OpenEnd { active, next_number, ragged, ..OpenEnd::default() }),
            syncing: Mutex::new(()),
            pending: RwLock::default(),
            superfluous: Mutex::default(),
        }
    }

    fn tail(&self) -> MutexGuard<'_, OpenEnd> {
        self.tail.lock()
    }

    /// The directory of the packs.
    pub(crate) fn dir(&self) -> &Dir {
        &self.dir
    }

    /// Where the next object will be, or before it.
    pub(crate) fn position(&self) -> Position {
        position(&self.tail())
    }

    /// How often making a pack durable has failed so far.
    pub(crate) fn failures(&self) -> u64 {
        self.tail().failures
    }

    /// The pack of this number, if it (still) exists.
    pub(crate) fn pack(&self, number: u32) -> Option<Arc<Pack>> {
        self.packs.read().get(&number).cloned()
    }

    /// All packs, in order of their numbers.
    pub(crate) fn packs(&self) -> Vec<Arc<Pack>> {
        self.packs.read().values().cloned().collect()
    }

    /// Where an object is that may not be in the index yet.
    pub(crate) fn pending(&self, tree: Tree, hash: &Hash) -> Option<Location> {
        let pending = self.pending.read();
        pending.of(tree).get(hash).copied()
    }

    /// How many objects are not in the index yet.
    pub(crate) fn pending_objects(&self) -> usize {
        let pending = self.pending.read();
        pending.regions.len() + pending.objects.len()
    }

    /// Appends the objects of a batch, save those that another thread appended meanwhile.
    pub(crate) fn append(&self, batch: &mut Batch) -> Result<Appended, StoreError> {
        if batch.is_empty() {
            return Ok(Appended::default());
        }
        let mut tail = self.tail();
        let wanted: Vec<&BatchObject> = {
            let pending = self.pending.read();
            let known = |object: &BatchObject| pending.of(object.tree).contains_key(&object.header.hash);
            batch.objects.iter().filter(|object| !known(object)).collect()
        };
        let pack = self.active(&mut tail)?;
        if wanted.len() < batch.objects.len() {
            // Rare: the others move up.
            let bytes =
                wanted.iter().flat_map(|it| &batch.bytes[it.start..][..it.header.object_bytes()]).copied();
            batch.bytes = bytes.collect();
        }
        let headers: Vec<(Tree, object::Header)> = wanted.iter().map(|it| (it.tree, it.header)).collect();
        let bytes = &mut batch.bytes[..];
        put_all(&pack, headers.iter().map(|(_, header)| header), bytes);
        let mut at_bytes = append_to(&mut tail, &pack, bytes)?;
        let mut pending = self.pending.write();
        for (tree, header) in &headers {
            let location = Location::new(pack.number, at_bytes, header);
            at_bytes += location.object_bytes();
            pending.of_mut(*tree).insert(header.hash, location);
            tail.unsynced.push(Unsynced::Object(*tree, header.hash, location));
        }
        drop(pending);
        tail.unsynced_bytes += bytes.len() as u64;
        seal_if_full(&mut tail);
        let unsynced_bytes = tail.unsynced_bytes;
        let deltas = headers.iter().filter(|(_, header)| header.encoding == Encoding::Delta).count() as u64;
        Ok(Appended { objects: headers.len() as u64, deltas, bytes: bytes.len() as u64, unsynced_bytes })
    }

    /// Appends records, notes and tombstones: one write, in this order, together in one pack.
    ///
    /// Fails without having written if making a pack durable failed since `failures_before`.
    pub(crate) fn append_facts(
        &self,
        facts: Vec<(ObjectKind, Vec<u8>, FactAt)>,
        failures_before: u64,
    ) -> Result<u64, StoreError> {
        let mut bytes = Vec::new();
        let objects: Vec<_> = facts
            .into_iter()
            .map(|(kind, plain, fact)| {
                (object::write(kind, self.format.codec, Hash::of(&plain), &plain, &mut bytes), fact)
            })
            .collect();
        let mut tail = self.tail();
        if tail.failures != failures_before {
            return Err(StoreError::WriteFailedMeanwhile);
        }
        let pack = self.active(&mut tail)?;
        put_all(&pack, objects.iter().map(|(header, _)| header), &mut bytes);
        let mut at_bytes = append_to(&mut tail, &pack, &bytes)?;
        for (header, fact) in objects {
            let location = Location::new(pack.number, at_bytes, &header);
            at_bytes += location.object_bytes();
            tail.unsynced.push(Unsynced::Fact(fact(location)));
        }
        tail.unsynced_bytes += bytes.len() as u64;
        seal_if_full(&mut tail);
        Ok(bytes.len() as u64)
    }

    /// The pack that is appended to; a new one where there is none.
    fn active(&self, tail: &mut OpenEnd) -> Result<Arc<Pack>, StoreError> {
        match &tail.active {
            Some(active) if active.is_ours_alone() => return Ok(active.clone()),
            // Somebody has made a backup of hard links meanwhile.
            Some(_) => tail.seal(),
            None => {}
        }
        self.sync_sealed_of(tail)?;
        let number = self.take_number(tail)?;
        let name = self.dir.join(names::file_name(number));
        let mut pack = Pack::create(name.with_extension(UNFINISHED), &self.format, number, Vec::new())?;
        // First its header: a power failure may keep the name and what is appended, and lose the first sector.
        pack.sync()?;
        pack.rename(name.clone()).map_err(StoreError::io("give its name to", &name))?;
        let pack = Arc::new(pack);
        tail.directory_changed = true;
        tail.active = Some(pack.clone());
        self.add(pack.clone());
        Ok(pack)
    }

    /// Makes sealed packs durable, before a pack with a higher number gets its name: only the one with the highest
    /// can be torn.
    pub(crate) fn sync_sealed(&self) -> Result<(), StoreError> {
        self.sync_sealed_of(&mut self.tail())
    }

    fn sync_sealed_of(&self, tail: &mut OpenEnd) -> Result<(), StoreError> {
        tail.trim()?;
        if let Err(error) = tail.sealed.iter().try_for_each(|pack| pack.sync()) {
            self.take_back_unsynced(tail);
            return Err(error);
        }
        Ok(())
    }

    fn take_number(&self, tail: &mut OpenEnd) -> Result<u32, StoreError> {
        let number = tail.next_number;
        if number > MAX_PACK {
            let detail = format!("all {MAX_PACK} pack numbers are used up");
            return Err(StoreError::Index { action: "name another pack", detail });
        }
        tail.next_number += 1;
        Ok(number)
    }

    /// A number for a pack that gc writes. The active pack is sealed, so that whatever is appended
    /// from now on comes later in the order of the numbers.
    pub(crate) fn reserve_number(&self) -> Result<u32, StoreError> {
        let mut tail = self.tail();
        tail.seal();
        self.take_number(&mut tail)
    }

    /// Takes a pack in.
    pub(crate) fn add(&self, pack: Arc<Pack>) {
        self.packs.write().insert(pack.number, pack);
    }

    /// Lets a pack go. Who still reads it may finish.
    pub(crate) fn remove(&self, number: u32) -> Option<Arc<Pack>> {
        self.packs.write().remove(&number)
    }

    /// Removes what should not be there and could not be removed before: what failed writes have left at the
    /// end of packs, and these files with those for which it failed before. Synced when this returns.
    ///
    /// Otherwise the next opening would find there what nobody has kept anything for: snapshots whose tombstones are
    /// gone, or which were never acknowledged.
    pub(crate) fn clear_away(&self, files: Vec<Name>) -> Result<(), StoreError> {
        let mut superfluous = self.superfluous.lock();
        superfluous.extend(files);
        self.tail().trim()?;
        if superfluous.is_empty() {
            return Ok(());
        }
        for name in superfluous.iter() {
            file::remove_if_there(name).map_err(StoreError::io("remove", name))?;
        }
        file::sync_dir(&self.dir).map_err(StoreError::io("make durable", &self.dir))?;
        superfluous.clear();
        Ok(())
    }

    /// Seals the active pack if it is the one of this number, so that nothing is appended to it
    /// any more.
    pub(crate) fn seal(&self, number: u32) {
        let mut tail = self.tail();
        if tail.active.as_ref().is_some_and(|active| active.number == number) {
            tail.seal();
        }
    }

    /// Makes durable what was appended before, and hands it to `settle` (inside the lock, so that
    /// two calls cannot overtake one another).
    pub(crate) fn sync(&self, settle: impl FnOnce(Synced)) -> Result<(), StoreError> {
        let _syncing = self.syncing.lock();
        let (packs, sealed, ends, directory_changed, count, bytes, failures_before) = {
            let mut tail = self.tail();
            if tail.unsynced.is_empty() && !tail.directory_changed {
                // The sealed packs hold nothing that is not durable.
                tail.sealed.clear();
                return Ok(());
            }
            let mut packs = tail.sealed.clone();
            let sealed = packs.len();
            packs.extend(tail.active.clone());
            let end = |pack: &Arc<Pack>| (pack.number, pack.watermark(pack.length_bytes()));
            let ends: Vec<_> = packs.iter().map(end).collect();
            let directory_changed = std::mem::take(&mut tail.directory_changed);
            let failures = tail.failures;
            (packs, sealed, ends, directory_changed, tail.unsynced.len(), tail.unsynced_bytes, failures)
        };
        let directory = || {
            if directory_changed {
                file::sync_dir(&self.dir).map_err(StoreError::io("make durable", &self.dir))
            } else {
                Ok(())
            }
        };
        match packs.iter().try_for_each(|pack| pack.sync()).and_then(|()| directory()) {
            Ok(()) => {
                let mut tail = self.tail();
                if tail.failures != failures_before {
                    // Taken back meanwhile, by whoever began a new pack.
                    return Err(StoreError::WriteFailedMeanwhile);
                }
                let entries = tail.unsynced.drain(..count).collect();
                tail.unsynced_bytes -= bytes;
                // Not before: whoever begins a pack meanwhile must still find them here.
                tail.sealed.drain(..sealed);
                packs.iter().zip(&ends).for_each(|(pack, (_, end))| pack.set_durable(end.end_bytes));
                drop(tail);
                settle(Synced { entries, ends });
                Ok(())
            }
            Err(error) => {
                self.take_back_unsynced(&mut self.tail());
                Err(error)
            }
        }
    }

    fn take_back_unsynced(&self, tail: &mut OpenEnd) {
        tail.failures += 1;
        tail.seal();
        for pack in std::mem::take(&mut tail.sealed) {
            if let Err(error) = pack.take_back() {
                tracing::warn!("{error}");
                tail.ragged.push(pack);
            }
        }
        tail.unsynced_bytes = 0;
        let mut pending = self.pending.write();
        for unsynced in std::mem::take(&mut tail.unsynced) {
            if let Unsynced::Object(tree, hash, location) = unsynced {
                pending.remove(tree, &hash, location);
            }
        }
    }

    /// These objects are in the index now.
    pub(crate) fn settled(&self, entries: &[IndexEntry]) {
        let mut pending = self.pending.write();
        for (tree, hash, location) in entries {
            pending.remove(*tree, hash, *location);
        }
    }
}

/// Makes a fact of the place where its object was appended.
pub(crate) type FactAt = Box<dyn FnOnce(Location) -> Fact + Send>;

fn position(tail: &OpenEnd) -> Position {
    match &tail.active {
        Some(active) => Position { pack: active.number, offset_bytes: active.length_bytes() },
        None => Position { pack: tail.next_number, offset_bytes: 0 },
    }
}

/// Binds objects that stand one after the other to the places where they are about to be appended.
fn put_all<'a>(pack: &Pack, headers: impl Iterator<Item = &'a object::Header>, bytes: &mut [u8]) {
    let (mut at, first_bytes) = (0, pack.length_bytes());
    for header in headers {
        object::put(&mut bytes[at..], pack.place(first_bytes + at as u64));
        at += header.object_bytes();
    }
}

/// Appends to the active pack. If a failed attempt leaves bytes behind, the pack is sealed.
fn append_to(tail: &mut OpenEnd, pack: &Pack, bytes: &[u8]) -> Result<u64, StoreError> {
    let appended = pack.append(bytes);
    if pack.has_rest() {
        tail.ragged.extend(tail.active.clone());
        tail.seal();
    }
    appended
}

fn seal_if_full(tail: &mut OpenEnd) {
    if tail.active.as_ref().is_some_and(|active| active.length_bytes() >= active.seal_bytes()) {
        tail.seal();
    }
}
