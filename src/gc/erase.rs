//! Erase: the part of gc that leaves nothing of what is forgotten.
//!
//! A plain gc keeps three things of forgotten snapshots: bytes that a live snapshot's deltas are differences from, up to a
//! tenth of each pack, and what an old page of the index may say. So before an erasing gc collects, what is live and stands
//! on a base that no live snapshot has is stored whole:
//!
//! ```text
//! live ──delta──> live ──delta──> dead ──delta──> whole, dead
//!  stays           stored whole     gone           gone
//! ```
//!
//! Then every pack that has anything dead in it is rewritten, and again those in which tombstones are whose records are gone
//! now, and the index is written into a new database. Whenever this is interrupted the store is whole: of what is stored a
//! second time either copy will do, and the rest are the steps of a gc. No capture runs meanwhile: it could refer to a base
//! that is about to go.

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

/// So many bytes that are stored whole are appended at a time.
const APPEND_BYTES: u64 = 4 << 20;

/// What an index of few entries takes.
const INDEX_BYTES: u64 = 1 << 20;

/// What is to be stored whole.
pub(crate) struct Lifts {
    entries: Vec<IndexEntry>,
    /// How much they take, at most.
    bytes: u64,
    /// How much all that is live takes now.
    live_bytes: u64,
}

impl Lifts {
    /// How much they take, at most.
    pub(crate) fn most_bytes(&self) -> u64 {
        self.bytes
    }

    /// Those that are stored whole already, so that the deltas of them are dead.
    pub(crate) fn replaced_bytes(&self) -> u64 {
        self.entries.iter().map(|(_, _, location)| location.object_bytes()).sum()
    }
}

/// An error unless everything that may hold bytes of what is forgotten can be erased. Changes nothing.
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

/// A file or directory that is no part of the open store and may hold what it held.
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

/// What must be stored whole before the bases that no live snapshot has can go. Changes nothing.
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
            // One that cannot be read is an error when it is read whole.
            if base.is_none_or(|(_, base)| !marks.is_marked(&base)) {
                lifts.bytes += object::most_bytes(location.plain_bytes);
                lifts.entries.push((tree, hash, location));
            }
        }
    }
    // As they lie in the packs.
    lifts.entries.sort_unstable_by_key(|(_, _, location)| (location.pack, location.offset_bytes));
    Ok(lifts)
}

/// An error if there is not room enough. Changes nothing.
pub(crate) fn check_room(shared: &OpenStore, lifts: &Lifts) -> Result<(), StoreError> {
    let index_bytes = shared.index().disk_bytes() + INDEX_BYTES;
    // Packs are replaced by one new pack at a time.
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

/// Stores these whole. Returns how many bytes that took.
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
    // From here on the index means the whole copies.
    shared.settle_all();
    Ok(lifted_bytes)
}

/// Writes the index into a new database: the pages of the old one may say what was there.
pub(crate) fn renew_index(shared: &OpenStore) -> Result<(), StoreError> {
    shared.sync()?;
    shared.settle_all();
    let index = shared.index();
    if !index.rewrite(|_, _, location| Some(location))? {
        // It is held in memory, and what is on the disk is older: the next opening builds it from the packs.
        index.make_room()?;
    }
    Ok(())
}
