//! Erase: the part of gc that leaves no byte of forgotten snapshots.
//!
//! A plain gc keeps three kinds of data of forgotten snapshots: the bases of live snapshots'
//! deltas, up to a tenth of each pack, and old pages of the index. So before an erasing gc
//! collects, each live delta whose base is in no live snapshot is stored whole:
//!
//! ```text
//! live ──delta──> live ──delta──> dead ──delta──> whole, dead
//!  stays           stored whole     gone           gone
//! ```
//!
//! Then every pack with dead data is rewritten, those with tombstones whose records have been
//! dropped are rewritten again, and the index is written into a new database. The store is whole if
//! this is interrupted at any moment: either copy of an object that is stored twice is valid, and
//! the other steps are those of a gc. No capture runs at the same time: it could refer to a base
//! that is about to be dropped.

use super::mark::{Marking, live_snapshots};
use crate::error::Error;
use crate::progress::Progress;
use crate::store::OpenStore;
use crate::store::error::StoreError;
use crate::store::names::{DAMAGED_DIR, MIGRATION_DIR, UNFINISHED};
use crate::store::packs::batch::Batch;
use crate::store::packs::object;
use crate::store::packs::sealing;
use crate::store::read::{Check, Reader};
use crate::store::tree::{IndexEntry, Tree};
use crate::sys::dir::{Dir, Name};
use crate::sys::file;

/// How many bytes of whole objects are appended at a time.
const APPEND_BYTES: u64 = 4 << 20;

/// The size of an index with few entries.
const INDEX_BYTES: u64 = 1 << 20;

/// The objects to store whole.
pub(crate) struct Lifts {
    entries: Vec<IndexEntry>,
    /// An upper limit of the bytes that they will take.
    bytes: u64,
    /// The present size of everything live.
    live_bytes: u64,
}

impl Lifts {
    /// An upper limit of the bytes that they will take.
    pub(crate) fn most_bytes(&self) -> u64 {
        self.bytes
    }

    /// The size of those that are already stored whole, so that their deltas are dead.
    pub(crate) fn replaced_bytes(&self) -> u64 {
        self.entries.iter().map(|(_, _, location)| location.object_bytes()).sum()
    }
}

/// Returns an error unless everything that may hold bytes of forgotten snapshots can be erased.
/// Changes nothing.
pub(crate) fn check(shared: &OpenStore) -> Result<(), StoreError> {
    let cannot = |why: String| Err(StoreError::CannotErase { why });
    if shared.damage_known() {
        return cannot(
            "the store has damage, and damaged bytes cannot be told from those that are needed; `stillframe verify` \
             names it, and `stillframe repair` sets it aside"
                .to_owned(),
        );
    }
    if let Some(left) = leftover(shared)? {
        return cannot(format!(
            "{} may hold bytes of what is forgotten, and gc does not look into it; remove it first, or move it out of the \
             store",
            left.display()
        ));
    }
    let catalog = shared.catalog();
    let pinned = shared.gate.pinned_snapshots();
    match pinned.into_iter().find(|id| catalog.live(id).is_none()) {
        Some(id) => cannot(format!("the forgotten snapshot {id} is being read; erase when that has ended")),
        None => Ok(()),
    }
}

/// A file or directory that is not part of the open store and may hold data of it.
fn leftover(shared: &OpenStore) -> Result<Option<Name>, StoreError> {
    let listed = |dir: &Dir| file::list(dir).map_err(StoreError::io("list", dir));
    for name in [DAMAGED_DIR, MIGRATION_DIR] {
        let name = shared.dir.join(name);
        let is_empty = |name: &Name| {
            let dir = file::open_dir(name).map_err(StoreError::io("open", name))?;
            Ok::<_, StoreError>(listed(&dir)?.is_empty())
        };
        if name.exists() && (!name.is_dir() || !is_empty(&name)?) {
            return Ok(Some(name));
        }
    }
    let is_unfinished =
        |name: &Name| name.path().extension().is_some_and(|extension| extension == UNFINISHED);
    if let Some(left) = listed(&shared.dir)?.into_iter().find(is_unfinished) {
        return Ok(Some(left));
    }
    let open: Vec<_> = shared.log.packs().into_iter().map(|pack| pack.name.clone()).collect();
    let names: Vec<_> = open.iter().map(Name::name).collect();
    Ok(listed(shared.log.dir())?.into_iter().find(|name| !names.contains(&name.name())))
}

/// What must be stored whole before the bases that no live snapshot has can be dropped. Changes
/// nothing.
pub(crate) fn plan(shared: &OpenStore, progress: &Progress) -> Result<Lifts, Error> {
    let mut marking = Marking::without_bases(shared, progress)?;
    marking.mark_all(live_snapshots(shared))?;
    let mut reader = Reader::new(shared, Check::Checksum);
    let mut lifts = Lifts { entries: Vec::new(), bytes: 0, live_bytes: 0 };
    for tree in Tree::ALL {
        let marks = marking.of(tree);
        for entry in shared.index().entries(tree) {
            let (hash, location) = entry?;
            if !marks.is_marked(&hash) {
                continue;
            }
            lifts.live_bytes += location.object_bytes();
            if !location.is_delta() {
                continue;
            }
            let base = reader.delta_at(location.into())?.filter(|(found, _)| *found == hash);
            // A delta that cannot be read causes an error when it is read whole.
            if base.is_none_or(|(_, base)| !marks.is_marked(&base)) {
                lifts.bytes += object::most_bytes(location.plain_bytes);
                lifts.entries.push((tree, hash, location));
            }
        }
    }
    // The objects are read in the order of the packs.
    lifts.entries.sort_unstable_by_key(|(_, _, location)| (location.pack, location.offset_bytes));
    Ok(lifts)
}

/// Returns an error if there is not enough space. Changes nothing.
pub(crate) fn check_room(shared: &OpenStore, lifts: &Lifts) -> Result<(), StoreError> {
    let index_bytes = shared.index().disk_bytes() + INDEX_BYTES;
    // One new pack at a time is written.
    let pack_bytes = (lifts.live_bytes + lifts.bytes).min(2 * sealing::seal_bytes(shared.log.dir().path()));
    let needed_bytes = lifts.bytes + pack_bytes + index_bytes;
    let dir = shared.log.dir();
    let room_bytes = file::room_bytes(dir).map_err(StoreError::io("look how much room there is for", dir))?;
    match needed_bytes.checked_sub(room_bytes).filter(|missing| *missing > 0) {
        None => Ok(()),
        Some(missing_bytes) => Err(StoreError::DiskFull {
            path: dir.into(),
            missing_bytes: Some(missing_bytes),
            source: std::io::Error::from(std::io::ErrorKind::StorageFull),
        }),
    }
}

/// Stores these objects whole. Returns how many bytes that took.
pub(crate) fn lift(shared: &OpenStore, lifts: Lifts, progress: &Progress) -> Result<u64, Error> {
    let meter = progress.begin(lifts.bytes);
    let mut reader = Reader::new(shared, Check::Full);
    let mut batch = Batch::default();
    let (mut waiting_bytes, mut lifted_bytes) = (0, 0);
    for (tree, hash, location) in lifts.entries {
        let (kind, plain) = match tree {
            Tree::Regions => {
                let mut plain = vec![0; location.plain_bytes as usize];
                reader.region(&hash, &mut plain)?;
                (object::ObjectKind::Region, plain)
            }
            Tree::Objects => {
                let kind = reader.kind_at(location.into())?;
                let kind = kind.ok_or(StoreError::Missing { kind: object::ObjectKind::Table, hash })?;
                (kind, reader.object(kind, &hash)?)
            }
        };
        batch.push(kind, crate::capture::put::codec_for(shared.format.codec, &plain), hash, &plain, None);
        waiting_bytes += plain.len() as u64;
        if waiting_bytes >= APPEND_BYTES {
            lifted_bytes += shared.append(&mut batch)?.bytes;
            batch.clear();
            waiting_bytes = 0;
        }
        meter.advance(object::most_bytes(location.plain_bytes))?;
    }
    lifted_bytes += shared.append(&mut batch)?.bytes;
    shared.sync()?;
    // From here on the index refers to the whole copies.
    shared.settle_all();
    Ok(lifted_bytes)
}

/// Writes the index into a new database: the pages of the old one may contain removed entries.
pub(crate) fn renew_index(shared: &OpenStore) -> Result<(), StoreError> {
    shared.sync()?;
    shared.settle_all();
    let index = shared.index();
    if !index.rewrite(|_, _, location| Some(location))? {
        // The index is held in memory, and the one on the disk is older: it is deleted, and the
        // next opening rebuilds it from the packs.
        index.make_room()?;
    }
    Ok(())
}
