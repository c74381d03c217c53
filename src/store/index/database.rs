//! The database of the index: what sled holds, and how. This is the only file that uses sled.
//!
//! ```text
//! tree       key                    value
//! regions    bucket (u32 BE)        a block (block.rs) of all entries in the bucket
//! objects    bucket (u32 BE)        the same: tables, roots, layouts, attachments
//! snapshots  page (u32 BE)          catalog entries: 's' and a snapshot id, or 't' and an id if only
//!                                   the location of its tombstone is left
//! runs       slot (u32 BE)          newer entries: 'r' or 'o' and a block, 's' and a page
//! meta       'p' pack number (BE)   how far the pack is indexed: a watermark (watermark.rs)
//!            "schema"               schema version and store id
//!            "buckets"              for each tree: buckets (u32), entries (u64)
//!            "pages", "slots"       how many of them are not empty (u32)
//!            "damage"               not empty while damage is known
//!            "ungrounded"           not empty while there may be deltas without their bases
//!            "rebuilding"           not empty until all packs from before its creation are indexed
//!
//! page: for each entry the length of its key (u32), the length of its value (u32), key, value
//! ```
//!
//! Hashes are evenly distributed, so a *bucket* is a share of the number space: take the first 64
//! bits of a hash as a fraction and multiply it by the number of buckets; the integer part is the
//! hash's bucket.
//!
//! The buckets are written once, into a new database: first all keys, without values, and then each
//! value. The reason is how sled stores a tree. A leaf splits at 17 keys and then rewrites its
//! content; in this order, it splits only while there is no content. A million entries of 48 bytes
//! took 90 bytes each when keys and values were written together, and 52 in two steps. Written one
//! entry at a time, which is sled's usual way, they took 200. For the same reason there are always
//! some slots without values for the next runs.
//!
//! Nothing is ever removed from a tree: after a removal, sled's iterators were seen to loop without
//! end while other threads were reading.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use super::block::{self, Block, PackedLocation, Stored};
use crate::hash::Hash;
use crate::store::error::StoreError;
use crate::store::id::StoreId;
use crate::store::packs::watermark::Watermark;
use crate::store::tree::Tree;
use crate::sys::dir::{Dir, Name};
use crate::sys::fork::{self, NotInherited};
use crate::sys::{file, heap};

/// Sled's file in its directory.
const FILE: &str = "db";

/// This changes when the content of the trees changes. The index of a store with another schema is
/// rebuilt.
const SCHEMA: u8 = 3;

/// The action in the error about a database of an earlier schema, which is not damaged.
pub(crate) const OUTDATED: &str = "be used any more";

/// The limit for sled's page cache. Sled's other data in memory is not counted.
const CACHE_BYTES: u64 = 8 << 20;

/// The file grows in steps of this size, so this is also the size of an almost empty index. A
/// record of sled's log that is longer than a quarter of it would become a file of its own; a leaf
/// of 16 blocks is shorter. With sled's default of 512 KiB, the index would take most of the space
/// of twenty small snapshots.
const SEGMENT_BYTES: usize = 128 << 10;

/// How many entries a bucket should have. A look-up reads a leaf of 8 to 16 blocks from the file,
/// unless it is in the cache. Measured with a million entries of 48 bytes (AMD EPYC, 2 cores), in
/// bytes an entry and microseconds a look-up: 16 entries: 59 and 16; 32 entries: 54 and 11; 64
/// entries: 53 and 7; 128 entries: 52 and 5. The larger ones need larger segments.
pub(crate) const BLOCK_ENTRIES: usize = 32;

/// How many slots are created at a time.
const SLOTS: u32 = 128;

/// A page gets another entry while it is shorter than this, which is about the length of a block.
const PAGE_BYTES: usize = 1250;

/// From this many entries on, it is worth freeing the memory that sled keeps after reading them
/// all: 4 MiB.
const MANY_ENTRIES: u64 = 100_000;

/// A database stays locked after it was dropped until sled's threads have ended. No other process
/// can have it, because the store has one owner.
const MAX_LOCKED: Duration = Duration::from_secs(10);

/// The name of the thread that opens and closes the index. The command does not print its panics,
/// which are handled as errors.
pub(crate) const INDEX_THREAD: &str = "stillframe-index";

fn is_locked(error: &sled::Error) -> bool {
    matches!(error, sled::Error::Io(error) if error.to_string().starts_with("could not acquire lock"))
}

/// Converts an error of sled. A full disk has its own variant: it is no damage, and a rebuild would
/// fail too.
fn failed(action: &'static str, name: &Name) -> impl FnOnce(sled::Error) -> StoreError {
    move |error| match error {
        sled::Error::Io(error) if file::is_no_room(&error) => StoreError::io("write", name)(error),
        error => StoreError::Index { action, detail: error.to_string() },
    }
}

fn not_in_order(what: &str) -> StoreError {
    StoreError::Index { action: "be read", detail: format!("{what} in it is not in order") }
}

/// The buckets of a tree.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Buckets {
    count: u32,
    /// How many entries they hold in total.
    pub(crate) entries: u64,
}

impl Buckets {
    /// Buckets for about this many entries.
    fn of(entries: u64) -> Buckets {
        let count = entries.div_ceil(BLOCK_ENTRIES as u64).max(1);
        Buckets { count: u32::try_from(count).unwrap_or(u32::MAX), entries: 0 }
    }

    /// The bucket of a hash, if there are any buckets.
    fn bucket(self, hash: &Hash) -> u32 {
        let product = u128::from(hash.prefix()) * u128::from(self.count);
        u32::try_from(product >> 64).unwrap_or(u32::MAX)
    }

    /// The first hash of the bucket after that of `hash`. `None` after the last.
    pub(crate) fn next(self, hash: &Hash) -> Option<Hash> {
        let bucket = self.bucket(hash).checked_add(1).filter(|bucket| *bucket < self.count)?;
        let prefix = (u128::from(bucket) << 64).div_ceil(u128::from(self.count));
        let mut first = Hash::ZERO;
        first.0[..8].copy_from_slice(&u64::try_from(prefix).ok()?.to_be_bytes());
        Some(first)
    }
}

/// An open database.
pub(crate) struct Database {
    name: Name,
    /// The directory that sled uses, by a path that is valid while this is open.
    dir: Dir,
    not_inherited: Vec<NotInherited>,
    /// `None` when it is closed.
    sled: Option<Sled>,
    buckets: [Buckets; Tree::ALL.len()],
    next_slot: AtomicU32,
}

/// The open trees of sled.
struct Sled {
    db: sled::Db,
    regions: sled::Tree,
    objects: sled::Tree,
    runs: sled::Tree,
    snapshots: sled::Tree,
    meta: sled::Tree,
}

impl Database {
    /// Whether there is no database of this name.
    pub(crate) fn is_missing(name: &Name) -> bool {
        !name.open_dir().is_ok_and(|dir| dir.join(FILE).exists())
    }

    /// Removes the file without which there is no database of this name.
    pub(crate) fn remove_file(name: &Name) -> Result<(), StoreError> {
        let dir = file::open_dir(name).map_err(StoreError::io("open", name))?;
        file::remove_if_there(&dir.join(FILE)).map_err(StoreError::io("take away", name))?;
        file::sync_dir(&dir).map_err(StoreError::io("make durable", name))
    }

    /// Opens the database of this name, or creates it, and counts its entries. An error means that
    /// it is not usable and must be rebuilt. That includes a database of another store or schema.
    ///
    /// Cost: it reads the whole database, 0.16 s for a million entries (AMD EPYC, 2 cores). Sled
    /// then keeps 43 MiB of it in memory, regardless of its cache limit. So a large database is
    /// closed and opened once more.
    pub(crate) fn open(name: &Name, store: StoreId) -> Result<Database, StoreError> {
        let database = Database::open_again(name, store)?;
        database.check_whole()?;
        if database.buckets.iter().map(|buckets| buckets.entries).sum::<u64>() < MANY_ENTRIES {
            return Ok(database);
        }
        drop(database);
        heap::give_back();
        Database::open_again(name, store)
    }

    /// As [`open`](Self::open) without counting, for a database that was verified a moment ago.
    pub(crate) fn open_again(name: &Name, store: StoreId) -> Result<Database, StoreError> {
        let dir = file::create_dir(name).map_err(StoreError::io("create", name))?;
        let started = Instant::now();
        let mut database = loop {
            match Database::open_sled(name, &dir) {
                Err(error) if is_locked(&error) && started.elapsed() < MAX_LOCKED => {
                    std::thread::sleep(Duration::from_millis(1));
                }
                other => break other.map_err(failed("be opened", name))?,
            }
        };
        file::make_private(&dir).map_err(StoreError::io("protect", name))?;
        let schema = [&[SCHEMA], &store.0[..]].concat();
        match database.sled()?.meta.get("schema").map_err(failed("be read", name))? {
            Some(found) if *found == schema[..] => {}
            Some(found) if found.first() < schema.first() && found[1..] == schema[1..] => {
                let detail = "an earlier stillframe wrote it".to_owned();
                return Err(StoreError::Index { action: OUTDATED, detail });
            }
            Some(_) => {
                let detail = "it has another schema, or belongs to another store".to_owned();
                return Err(StoreError::Index { action: "be used", detail });
            }
            None => database
                .sled()?
                .meta
                .insert("schema", schema)
                .map(drop)
                .map_err(failed("be written", name))?,
        }
        if let Some(bytes) = database.sled()?.meta.get("buckets").map_err(failed("be read", name))? {
            let (of_trees, []) = bytes.as_chunks::<12>() else { return Err(not_in_order("a number")) };
            for (buckets, [a, b, c, d, entries @ ..]) in database.buckets.iter_mut().zip(of_trees) {
                *buckets = Buckets {
                    count: u32::from_le_bytes([*a, *b, *c, *d]),
                    entries: u64::from_le_bytes(*entries),
                };
            }
        }
        database.next_slot = AtomicU32::new(database.slots_in_use()?);
        Ok(database)
    }

    /// Returns an error if the database lacks something that was in it. If bytes of its file are
    /// damaged, sled may still open it, and return an old version of a leaf or none. That must not
    /// go unnoticed, because gc drops objects that the index does not know.
    ///
    /// Cost: it reads the whole database, 0.1 s for a million entries (AMD EPYC, 2 cores).
    fn check_whole(&self) -> Result<(), StoreError> {
        let lost = |what: &str, found: u64, expected: u64| StoreError::Index {
            action: "be used",
            detail: format!("it has {found} {what}, {expected} were written"),
        };
        for tree in Tree::ALL {
            let (mut found, expected) = (0, self.buckets(tree).entries);
            for value in self.tree(tree)?.iter().values() {
                let value = value.map_err(failed("be read", &self.name))?;
                found += Block::parse(&value).ok_or_else(|| not_in_order("a block"))?.entry_count();
            }
            if found != expected {
                return Err(lost("entries", found, expected));
            }
        }
        for (name, tree) in [(PAGES, &self.sled()?.snapshots), (FULL_SLOTS, &self.sled()?.runs)] {
            let expected = self.sled()?.meta.get(name).map_err(failed("be read", &self.name))?;
            let expected =
                expected.and_then(|bytes| Some(u32::from_le_bytes(bytes.as_ref().try_into().ok()?)));
            let mut found = 0;
            for value in tree.iter().values() {
                found += u64::from(!value.map_err(failed("be read", &self.name))?.is_empty());
            }
            let expected = expected.unwrap_or(0).into();
            if found < expected {
                return Err(lost(name, found, expected));
            }
        }
        Ok(())
    }

    fn put_count(&self, name: &str, count: u32) -> Result<(), StoreError> {
        self.sled()?
            .meta
            .insert(name, &count.to_le_bytes())
            .map(drop)
            .map_err(failed("be written", &self.name))
    }

    fn open_sled(name: &Name, dir: &Dir) -> sled::Result<Database> {
        // The path is not used: another store may be there by the time that something is written.
        let db = sled::Config::new()
            .path(dir.held_path())
            .cache_capacity(CACHE_BYTES)
            .segment_size(SEGMENT_BYTES)
            .flush_every_ms(None)
            .use_compression(false)
            .open()?;
        let sled = Sled {
            regions: db.open_tree("regions")?,
            objects: db.open_tree("objects")?,
            runs: db.open_tree("runs")?,
            snapshots: db.open_tree("snapshots")?,
            meta: db.open_tree("meta")?,
            db,
        };
        // Sled locks this file, and the child of a fork would keep the lock.
        let locked = dir.join(FILE).look()?;
        let not_inherited = locked.map_or_else(Vec::new, |it| fork::all_not_inherited(it.identity(), dir));
        Ok(Database {
            name: name.clone(),
            not_inherited,
            dir: dir.clone(),
            sled: Some(sled),
            buckets: [Buckets::default(); Tree::ALL.len()],
            next_slot: AtomicU32::new(0),
        })
    }

    fn sled(&self) -> Result<&Sled, StoreError> {
        let closed = || StoreError::Index { action: "be used", detail: "it is closed".to_owned() };
        self.sled.as_ref().ok_or_else(closed)
    }

    /// Closes the database and returns an error of the disk, if there is one.
    pub(crate) fn close(mut self) -> Result<(), StoreError> {
        self.shut()
    }

    /// Drops sled in a new thread: sled panics if it cannot make its writes durable.
    fn shut(&mut self) -> Result<(), StoreError> {
        let Some(sled) = self.sled.take() else { return Ok(()) };
        self.not_inherited.clear();
        let failed = |detail: String| StoreError::Index { action: "be closed", detail };
        let thread = std::thread::Builder::new().name(INDEX_THREAD.to_owned()).spawn(move || drop(sled));
        let thread = thread.map_err(|error| failed(format!("no thread can be started for it: {error}")))?;
        thread.join().map_err(|_| failed("it could not be made durable".to_owned()))
    }

    fn tree(&self, tree: Tree) -> Result<&sled::Tree, StoreError> {
        let sled = self.sled()?;
        Ok(match tree {
            Tree::Regions => &sled.regions,
            Tree::Objects => &sled.objects,
        })
    }

    /// The buckets of a tree.
    pub(crate) fn buckets(&self, tree: Tree) -> Buckets {
        self.buckets[tree as usize]
    }

    /// Passes the block of the bucket of `hash` to `look`.
    fn look<T: Default>(
        &self,
        tree: Tree,
        hash: &Hash,
        look: impl FnOnce(Block<'_>) -> T,
    ) -> Result<T, StoreError> {
        let buckets = self.buckets(tree);
        if buckets.count == 0 {
            return Ok(T::default());
        }
        let key = buckets.bucket(hash).to_be_bytes();
        let value = self.tree(tree)?.get(key).map_err(failed("be read", &self.name))?;
        // Every bucket has a value. After a disk error, sled was seen to open without some of them.
        let value = value.ok_or_else(|| not_in_order("a bucket"))?;
        Block::parse(&value).map(look).ok_or_else(|| not_in_order("a block"))
    }

    /// The location of an object, if it is in a bucket. It takes 1 to 7 µs (AMD EPYC, 2 cores).
    pub(crate) fn find(&self, tree: Tree, hash: &Hash) -> Result<Option<PackedLocation>, StoreError> {
        self.look(tree, hash, |block| block.find(hash))
    }

    /// The entries in the bucket of `hash`, from `hash` on.
    pub(crate) fn bucket_from(&self, tree: Tree, hash: &Hash) -> Result<Vec<Stored>, StoreError> {
        self.look(tree, hash, |block| block.entries().filter(|(other, _)| other >= hash).collect())
    }

    /// Fills the buckets of a tree that has none, from about this many entries, which are in order.
    pub(crate) fn fill(
        &mut self,
        tree: Tree,
        about_entries: u64,
        entries: impl Iterator<Item = Result<Stored, StoreError>>,
    ) -> Result<(), StoreError> {
        let mut buckets = Buckets::of(about_entries);
        for bucket in 0..buckets.count {
            self.tree(tree)?.insert(bucket.to_be_bytes(), &[]).map_err(failed("be written", &self.name))?;
        }
        let mut bytes = Vec::new();
        let mut put = |bucket: u32, entries: &[Stored]| {
            block::write(entries, &mut bytes);
            self.tree(tree)?
                .insert(bucket.to_be_bytes(), &bytes[..])
                .map(drop)
                .map_err(failed("be written", &self.name))
        };
        let (mut present, mut in_present) = (0, Vec::new());
        let mut count = 0;
        for entry in entries {
            let entry = entry?;
            let bucket = buckets.bucket(&entry.0);
            if bucket != present {
                put(present, &in_present)?;
                in_present.clear();
                present = bucket;
            }
            in_present.push(entry);
            count += 1;
        }
        put(present, &in_present)?;
        buckets.entries = count;
        self.buckets[tree as usize] = buckets;
        let of_trees: Vec<u8> = self
            .buckets
            .iter()
            .flat_map(|it| [&it.count.to_le_bytes()[..], &it.entries.to_le_bytes()[..]].concat())
            .collect();
        self.sled()?.meta.insert("buckets", of_trees).map(drop).map_err(failed("be written", &self.name))
    }

    /// The number of slots up to the last one that is not empty.
    fn slots_in_use(&self) -> Result<u32, StoreError> {
        let mut in_use = 0;
        for slot in self.sled()?.runs.iter().rev() {
            let (key, value) = slot.map_err(failed("be read", &self.name))?;
            if !value.is_empty() {
                let number = key.as_ref().try_into().map_err(|_| not_in_order("a run"))?;
                in_use = u32::from_be_bytes(number).saturating_add(1);
                break;
            }
        }
        Ok(in_use)
    }

    fn put_slot(&self, letter: u8, content: &[u8]) -> Result<(), StoreError> {
        let slot = self.next_slot.fetch_add(1, Ordering::Relaxed);
        if slot.is_multiple_of(SLOTS) {
            for slot in slot..slot.saturating_add(SLOTS) {
                self.sled()?
                    .runs
                    .insert(slot.to_be_bytes(), &[])
                    .map_err(failed("be written", &self.name))?;
            }
        }
        let value = [&[letter], content].concat();
        self.sled()?
            .runs
            .insert(slot.to_be_bytes(), value)
            .map(drop)
            .map_err(failed("be written", &self.name))
    }

    /// Writes a run: entries, for each tree in order, and catalog entries. It is newer than all
    /// earlier runs. An empty catalog value means that the entry is removed.
    pub(crate) fn put_run(
        &self,
        of_trees: &[(Tree, Vec<Stored>)],
        snapshots: &BTreeMap<Vec<u8>, Vec<u8>>,
    ) -> Result<(), StoreError> {
        let mut bytes = Vec::new();
        for (tree, entries) in of_trees {
            for entries in entries.chunks(BLOCK_ENTRIES) {
                block::write(entries, &mut bytes);
                self.put_slot(LETTERS[*tree as usize], &bytes)?;
            }
        }
        pages(snapshots).iter().try_for_each(|page| self.put_slot(SNAPSHOTS_LETTER, page))?;
        self.put_count(FULL_SLOTS, self.next_slot.load(Ordering::Relaxed))
    }

    /// Passes the entries of all runs to `take`, the newest one of each object last.
    pub(crate) fn read_runs(&self, mut take: impl FnMut(Tree, Stored)) -> Result<(), StoreError> {
        for slot in self.sled()?.runs.iter() {
            let (_, value) = slot.map_err(failed("be read", &self.name))?;
            let Some((letter, block)) = value.split_first() else { continue };
            let Some(tree) = Tree::ALL.into_iter().find(|tree| LETTERS[*tree as usize] == *letter) else {
                continue;
            };
            let block = Block::parse(block).ok_or_else(|| not_in_order("a block"))?;
            block.entries().for_each(|entry| take(tree, entry));
        }
        Ok(())
    }

    /// Passes the keys and values of all catalog entries to `take`, those of one key from the
    /// oldest on. An empty value means that the entry is removed. Returns whether `take` accepted
    /// all.
    pub(crate) fn read_snapshots(
        &self,
        mut take: impl FnMut(&[u8], &[u8]) -> bool,
    ) -> Result<bool, StoreError> {
        let mut read = |page: &[u8]| read_page(page, &mut take).ok_or_else(|| not_in_order("a page"));
        for page in self.sled()?.snapshots.iter() {
            let (_, page) = page.map_err(failed("be read", &self.name))?;
            if !read(&page)? {
                return Ok(false);
            }
        }
        for slot in self.sled()?.runs.iter() {
            let (_, value) = slot.map_err(failed("be read", &self.name))?;
            if let Some((&SNAPSHOTS_LETTER, page)) = value.split_first()
                && !read(page)?
            {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Writes all catalog entries of a new database.
    pub(crate) fn fill_snapshots(&self, snapshots: &BTreeMap<Vec<u8>, Vec<u8>>) -> Result<(), StoreError> {
        let pages = pages(snapshots);
        let put = |at: u32, page: &[u8]| {
            self.sled()?
                .snapshots
                .insert(at.to_be_bytes(), page)
                .map(drop)
                .map_err(failed("be written", &self.name))
        };
        (0..).zip(&pages).try_for_each(|(at, _)| put(at, &[]))?;
        (0..).zip(&pages).try_for_each(|(at, page)| put(at, page))?;
        self.put_count(PAGES, u32::try_from(pages.len()).unwrap_or(u32::MAX))
    }

    /// How far each pack is indexed.
    pub(crate) fn watermarks(&self) -> Result<BTreeMap<u32, Watermark>, StoreError> {
        let mut watermarks = BTreeMap::new();
        for entry in self.sled()?.meta.scan_prefix(b"p") {
            let (key, value) = entry.map_err(failed("be read", &self.name))?;
            if let (Ok(number), Ok(bytes)) = (key[1..].try_into(), <&[u8; _]>::try_from(value.as_ref())) {
                watermarks.insert(u32::from_be_bytes(number), Watermark::from_bytes(bytes));
            }
        }
        Ok(watermarks)
    }

    /// Sets a pack's watermark, or removes it with the pack. To be called after everything before
    /// the watermark was flushed.
    pub(crate) fn put_watermark(&self, pack: u32, indexed: Option<Watermark>) -> Result<(), StoreError> {
        let key = [b"p", &pack.to_be_bytes()[..]].concat();
        let value = indexed.map_or(Vec::new(), |watermark| watermark.to_bytes().to_vec());
        self.sled()?.meta.insert(key, value).map(drop).map_err(failed("be written", &self.name))
    }

    /// Whether this mark is set. If it cannot be read, it counts as set.
    fn says(&self, mark: &str) -> bool {
        let is_set = |value: Option<sled::IVec>| value.is_some_and(|value| !value.is_empty());
        self.sled().map_or(true, |sled| sled.meta.get(mark).map_or(true, is_set))
    }

    /// Whether there may be deltas whose base is in no tree.
    pub(crate) fn may_have_dangling(&self) -> bool {
        self.says("ungrounded")
    }

    /// Sets, durably, whether there may be.
    pub(crate) fn put_may_have_dangling(&self, may: bool) -> Result<(), StoreError> {
        if self.may_have_dangling() == may {
            return Ok(());
        }
        let value: &[u8] = if may { b"may" } else { b"" };
        self.sled()?.meta.insert("ungrounded", value).map_err(failed("be written", &self.name))?;
        self.flush()
    }

    /// Whether it is being built from the packs.
    pub(crate) fn is_rebuilding(&self) -> bool {
        self.says("rebuilding")
    }

    /// Sets, durably, whether it is being built.
    pub(crate) fn put_rebuilding(&self, rebuilding: bool) -> Result<(), StoreError> {
        if self.is_rebuilding() == rebuilding {
            return Ok(());
        }
        let value: &[u8] = if rebuilding { b"rebuilding" } else { b"" };
        self.sled()?.meta.insert("rebuilding", value).map_err(failed("be written", &self.name))?;
        self.flush()
    }

    /// Whether damage is known.
    pub(crate) fn damage_known(&self) -> bool {
        self.says("damage")
    }

    /// Records whether damage is known.
    pub(crate) fn put_damage_known(&self, known: bool) -> Result<(), StoreError> {
        let value: &[u8] = if known { b"known" } else { b"" };
        self.sled()?.meta.insert("damage", value).map(drop).map_err(failed("be written", &self.name))
    }

    /// Writes everything to disk.
    pub(crate) fn flush(&self) -> Result<(), StoreError> {
        self.sled()?.db.flush().map_err(failed("be flushed", &self.name))?;
        file::make_private(&self.dir).map_err(StoreError::io("protect", &self.name))
    }
}

impl Drop for Database {
    fn drop(&mut self) {
        if let Err(error) = self.shut() {
            tracing::warn!("{error}");
        }
    }
}

/// The letters that mark a slot with a block of each tree.
const LETTERS: [u8; Tree::ALL.len()] = *b"ro";

const PAGES: &str = "pages";
const FULL_SLOTS: &str = "slots";

const SNAPSHOTS_LETTER: u8 = b's';

fn pages(snapshots: &BTreeMap<Vec<u8>, Vec<u8>>) -> Vec<Vec<u8>> {
    let mut pages: Vec<Vec<u8>> = Vec::new();
    for (key, value) in snapshots {
        if pages.last().is_none_or(|page| page.len() >= PAGE_BYTES) {
            pages.push(Vec::new());
        }
        let Some(page) = pages.last_mut() else { break };
        for bytes in [key, value] {
            page.extend(u32::try_from(bytes.len()).unwrap_or(u32::MAX).to_le_bytes());
        }
        page.extend(key);
        page.extend(value);
    }
    pages
}

/// Passes the entries of a page to `take` until it rejects one. Returns whether it accepted all, or
/// `None` if the bytes are not a page.
fn read_page(mut page: &[u8], take: &mut impl FnMut(&[u8], &[u8]) -> bool) -> Option<bool> {
    while !page.is_empty() {
        let (key_bytes, rest) = page.split_first_chunk::<4>()?;
        let (value_bytes, rest) = rest.split_first_chunk::<4>()?;
        let (key, rest) = rest.split_at_checked(usize::try_from(u32::from_le_bytes(*key_bytes)).ok()?)?;
        let (value, rest) = rest.split_at_checked(usize::try_from(u32::from_le_bytes(*value_bytes)).ok()?)?;
        if !take(key, value) {
            return Some(false);
        }
        page = rest;
    }
    Some(true)
}
