//! The index: a sled database that says where each object is.
//!
//! It is derived from the packs and can be rebuilt from them, so nothing here needs to be durable
//! at any particular moment. Entries of a pack are inserted and flushed before the pack's
//! *watermark*, which says up to which byte it is indexed; what lies past the watermarks when a
//! store is opened is scanned. This is the only file that names sled.
//!
//! ```text
//! tree       key                    value
//! regions    hash (32)              location (16)
//! objects    hash (32)              location (16): tables, roots, layouts, attachments
//! snapshots  's' snapshot id        catalog entry
//!            't' snapshot id        location of a tombstone whose record is gone
//! meta       'p' pack number (BE)   indexed bytes (u64)
//!            "schema"               schema version and store id
//!            "damage"               not empty while there is known damage
//!            "ungrounded"           not empty while there may be deltas without their bases
//! ```

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::error::StoreError;
use super::id::StoreId;
use super::location::Location;
use super::object::Kind;
use crate::hash::Hash;
use crate::sys::file;

/// Which tree an object is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Tree {
    Regions,
    Objects,
}

impl Tree {
    /// The one with objects of this kind.
    pub(crate) fn of(kind: Kind) -> Tree {
        if kind == Kind::Region { Tree::Regions } else { Tree::Objects }
    }
}

/// Changes with what the trees hold. A store with another one gets its index rebuilt.
const SCHEMA: u8 = 1;

/// What sled may keep of its pages in memory, beside its own bookkeeping. With 32 MiB a gc that changes
/// a million entries took 226 MiB in all, with 8 MiB 124; captures were as fast.
const CACHE_BYTES: u64 = 8 << 20;

/// What an entry takes on the disk when it was inserted in order (measured: 176 to 190 bytes).
const ENTRY_BYTES: usize = 190;

/// What a snapshot takes there, generously.
const SNAPSHOT_BYTES: usize = 1024;

/// What an empty database takes there.
const MIN_BYTES: u64 = 1 << 20;

/// A database that was dropped stays locked until threads of its own have ended. Nobody else can
/// have it, as the store has one owner.
const MAX_LOCKED: Duration = Duration::from_secs(10);

fn is_locked(error: &sled::Error) -> bool {
    matches!(error, sled::Error::Io(error) if error.to_string().starts_with("could not acquire lock"))
}

/// The open database.
pub(crate) struct Index {
    path: PathBuf,
    db: sled::Db,
    regions: sled::Tree,
    objects: sled::Tree,
    snapshots: sled::Tree,
    meta: sled::Tree,
}

fn failed(action: &'static str) -> impl FnOnce(sled::Error) -> StoreError {
    move |error| StoreError::Index { action, detail: error.to_string() }
}

impl Index {
    /// Opens the database at `path`, or creates it. An error means that it is not usable and wants
    /// to be rebuilt; that of another store or schema counts as such.
    pub(crate) fn open(path: &Path, store: StoreId) -> Result<Index, StoreError> {
        file::create_dir(path).map_err(StoreError::io("create", path))?;
        let started = Instant::now();
        let index = loop {
            // On a damaged database sled may panic where others return an error.
            let open = catch_unwind(AssertUnwindSafe(|| Index::open_unguarded(path)))
                .unwrap_or_else(|_| Err(sled::Error::Unsupported("it panicked".to_owned())));
            match open {
                Err(error) if is_locked(&error) && started.elapsed() < MAX_LOCKED => {
                    std::thread::sleep(Duration::from_millis(1));
                }
                // That is no damage, and nothing can be rebuilt on a full disk either.
                Err(sled::Error::Io(error)) if error.kind() == std::io::ErrorKind::StorageFull => {
                    return Err(StoreError::io("write", path)(error));
                }
                other => break other.map_err(failed("be opened"))?,
            }
        };
        file::make_private(path).map_err(StoreError::io("protect", path))?;
        let schema = [&[SCHEMA], &store.0[..]].concat();
        match index.meta.get("schema").map_err(failed("be read"))? {
            Some(found) if *found == schema[..] => {}
            Some(_) => {
                let detail = "it has another schema, or belongs to another store".to_owned();
                return Err(StoreError::Index { action: "be used", detail });
            }
            None => index.meta.insert("schema", schema).map(drop).map_err(failed("be written"))?,
        }
        Ok(index)
    }

    fn open_unguarded(path: &Path) -> sled::Result<Index> {
        let db = sled::Config::new()
            .path(path)
            .cache_capacity(CACHE_BYTES)
            .flush_every_ms(None)
            .use_compression(false)
            .open()?;
        Ok(Index {
            path: path.to_owned(),
            regions: db.open_tree("regions")?,
            objects: db.open_tree("objects")?,
            snapshots: db.open_tree("snapshots")?,
            meta: db.open_tree("meta")?,
            db,
        })
    }

    fn tree(&self, tree: Tree) -> &sled::Tree {
        match tree {
            Tree::Regions => &self.regions,
            Tree::Objects => &self.objects,
        }
    }

    /// Where the object is. Cost: 2 to 6 microseconds.
    pub(crate) fn get(&self, tree: Tree, hash: &Hash) -> Result<Option<Location>, StoreError> {
        let value = self.tree(tree).get(hash.0).map_err(failed("be read"))?;
        Ok(value.as_deref().and_then(Location::from_bytes))
    }

    /// Inserts an entry, best in order of the hashes. Cost: 5 to 10 microseconds.
    pub(crate) fn insert(&self, tree: Tree, hash: &Hash, location: Location) -> Result<(), StoreError> {
        self.tree(tree).insert(hash.0, &location.to_bytes()).map(drop).map_err(failed("be written"))
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
        let new = new.map_or(Location::GONE, Location::to_bytes);
        let swapped = self
            .tree(tree)
            .compare_and_swap(hash.0, Some(&old.to_bytes()[..]), Some(&new[..]))
            .map_err(failed("be written"))?;
        Ok(swapped.is_ok())
    }

    /// All entries in order of their hashes.
    pub(crate) fn entries(
        &self,
        tree: Tree,
    ) -> impl Iterator<Item = Result<(Hash, Location), StoreError>> + use<> {
        self.tree(tree).iter().filter_map(|entry| {
            let (key, value) = match entry {
                Ok(entry) => entry,
                Err(error) => return Some(Err(failed("be read")(error))),
            };
            let hash = Hash(key.as_ref().try_into().ok()?);
            Some(Ok((hash, Location::from_bytes(&value)?)))
        })
    }

    /// Whether the database takes far more disk than its entries need. Cost: reads them all.
    pub(crate) fn is_bloated(&self) -> bool {
        let live = self.entries(Tree::Regions).count() + self.entries(Tree::Objects).count();
        let needed_bytes = live * ENTRY_BYTES + self.snapshots().count() * SNAPSHOT_BYTES;
        self.disk_bytes() > 2 * needed_bytes as u64 + MIN_BYTES
    }

    /// All keys and values of the snapshots tree.
    pub(crate) fn snapshots(&self) -> impl Iterator<Item = Result<(Vec<u8>, Vec<u8>), StoreError>> + use<> {
        self.snapshots.iter().filter_map(|entry| match entry {
            Err(error) => Some(Err(failed("be read")(error))),
            Ok((_, value)) if value.is_empty() => None,
            Ok((key, value)) => Some(Ok((key.to_vec(), value.to_vec()))),
        })
    }

    /// Sets a key of the snapshots tree, or says that it is gone.
    pub(crate) fn set_snapshot(&self, key: &[u8], value: Option<Vec<u8>>) -> Result<(), StoreError> {
        let value = value.unwrap_or_default();
        if value.is_empty() && !self.snapshots.contains_key(key).map_err(failed("be read"))? {
            return Ok(());
        }
        self.snapshots.insert(key, value).map(drop).map_err(failed("be written"))
    }

    /// Up to which byte each pack is indexed.
    pub(crate) fn watermarks(&self) -> Result<Vec<(u32, u64)>, StoreError> {
        let mut watermarks = Vec::new();
        for entry in self.meta.scan_prefix(b"p") {
            let (key, value) = entry.map_err(failed("be read"))?;
            if let (Ok(number), Ok(bytes)) = (key[1..].try_into(), value.as_ref().try_into()) {
                watermarks.push((u32::from_be_bytes(number), u64::from_le_bytes(bytes)));
            }
        }
        Ok(watermarks)
    }

    /// Sets a pack's watermark, or says that the pack is gone. To be called when what it stands for
    /// is flushed.
    pub(crate) fn set_watermark(&self, pack: u32, indexed_bytes: Option<u64>) -> Result<(), StoreError> {
        let key = [b"p", &pack.to_be_bytes()[..]].concat();
        let value = indexed_bytes.map_or(Vec::new(), |bytes| bytes.to_le_bytes().to_vec());
        self.meta.insert(key, value).map(drop).map_err(failed("be written"))
    }

    /// Whether there is known damage.
    pub(crate) fn damage_known(&self) -> bool {
        self.meta.get("damage").map_or(true, |value| value.is_some_and(|value| !value.is_empty()))
    }

    /// Remembers whether there is known damage.
    pub(crate) fn set_damage_known(&self, known: bool) -> Result<(), StoreError> {
        let value: &[u8] = if known { b"known" } else { b"" };
        match self.damage_known() == known {
            true => Ok(()),
            false => self.meta.insert("damage", value).map(drop).map_err(failed("be written")),
        }
    }

    /// Whether there may be deltas whose base is not in the index.
    pub(crate) fn may_have_ungrounded(&self) -> bool {
        self.meta.get("ungrounded").map_or(true, |value| value.is_some_and(|value| !value.is_empty()))
    }

    /// Remembers, durably, whether there may be.
    pub(crate) fn set_may_have_ungrounded(&self, may: bool) -> Result<(), StoreError> {
        let value: &[u8] = if may { b"may" } else { b"" };
        if self.may_have_ungrounded() != may {
            self.flush()?;
            self.meta.insert("ungrounded", value).map(drop).map_err(failed("be written"))?;
            self.flush()?;
        }
        Ok(())
    }

    /// Writes everything to disk.
    pub(crate) fn flush(&self) -> Result<(), StoreError> {
        self.db.flush().map_err(failed("be flushed"))?;
        file::make_private(&self.path).map_err(StoreError::io("protect", &self.path))
    }

    /// How much disk the database takes.
    pub(crate) fn disk_bytes(&self) -> u64 {
        file::disk_bytes(&self.path).unwrap_or(0)
    }

    /// Copies every entry that is not gone into the empty `fresh`, in order.
    pub(crate) fn copy_to(&self, fresh: &Index) -> Result<(), StoreError> {
        for (from, to) in [
            (&self.regions, &fresh.regions),
            (&self.objects, &fresh.objects),
            (&self.snapshots, &fresh.snapshots),
            (&self.meta, &fresh.meta),
        ] {
            for entry in from.iter() {
                let (key, value) = entry.map_err(failed("be read"))?;
                if value.is_empty() || *value == Location::GONE {
                    continue;
                }
                to.insert(key, value).map_err(failed("be written"))?;
            }
        }
        fresh.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codec::Encoding;

    fn location(pack: u32) -> Location {
        Location { pack, offset_bytes: 48, encoding: Encoding::Raw, stored_bytes: 9, plain_bytes: 9 }
    }

    #[test]
    fn entries_come_back_in_order_after_a_reopening() {
        let dir = tempfile::tempdir().unwrap();
        let store = StoreId::new();
        let mut entries: Vec<_> = (0..100u8).map(|byte| (Hash::of(&[byte]), location(1))).collect();
        let index = Index::open(dir.path(), store).unwrap();
        for (hash, location) in &entries {
            index.insert(Tree::Regions, hash, *location).unwrap();
        }
        index.set_watermark(1, Some(77)).unwrap();
        drop(index);
        let index = Index::open(dir.path(), store).unwrap();
        entries.sort_unstable_by_key(|(hash, _)| *hash);
        let found: Vec<_> = index.entries(Tree::Regions).collect::<Result<_, _>>().unwrap();
        assert_eq!(found, entries);
        assert_eq!(index.watermarks().unwrap(), [(1, 77)]);
    }

    #[test]
    fn an_entry_is_replaced_only_where_it_was_expected() {
        let dir = tempfile::tempdir().unwrap();
        let index = Index::open(dir.path(), StoreId::new()).unwrap();
        let hash = Hash::of(b"x");
        index.insert(Tree::Objects, &hash, location(1)).unwrap();
        assert!(!index.replace(Tree::Objects, &hash, location(2), None).unwrap());
        assert!(index.replace(Tree::Objects, &hash, location(1), Some(location(3))).unwrap());
        assert_eq!(index.get(Tree::Objects, &hash).unwrap(), Some(location(3)));
    }

    #[test]
    fn an_index_of_another_store_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        drop(Index::open(dir.path(), StoreId::new()).unwrap());
        assert!(Index::open(dir.path(), StoreId::new()).is_err());
    }
}
