//! Compaction: the objects worth keeping of some packs move into a new one.
//!
//! The new pack gets its name when it is complete and durable, and names the packs it replaces.
//! Then the index is pointed at it, and then the old packs go. A crash in between leaves either the
//! old packs alone or the new one with some old ones beside it, which the next open removes.

use std::path::PathBuf;
use std::sync::Arc;

use crate::hash::Hash;
use crate::record::SnapshotId;
use crate::store::OpenStore;
use crate::store::error::StoreError;
use crate::store::fact;
use crate::store::id::StoreId;
use crate::store::names::UNFINISHED;
use crate::store::packs::collected::{self, Collected, Named};
use crate::store::packs::location::{Location, Position};
use crate::store::packs::names;
use crate::store::packs::object::{self, Header, ObjectKind, Place};
use crate::store::packs::pack::Pack;
use crate::store::packs::scan::{Scan, Scanned};
use crate::store::tree::{self, IndexEntry, Tree};
use crate::sys::dir::Name;
use crate::sys::file;
use crate::sys::map::PackMap;
use crate::units::usize_of;

/// Copied objects are written in pieces of this size.
const WRITE_BYTES: usize = 1 << 20;

/// So many objects at a time are looked at in the order of their hashes: 14 MB.
const SORT_OBJECTS: usize = 256 * 1024;

/// What a compaction did.
#[derive(Debug, Default)]
pub(crate) struct Compacted {
    /// Packs that are gone.
    pub(crate) removed: u64,
    /// Their bytes.
    pub(crate) removed_bytes: u64,
    /// The bytes of the new pack, if there is one.
    pub(crate) written_bytes: u64,
    /// One that stays as it is, as there are damaged bytes in it.
    pub(crate) left: Option<PathBuf>,
}

/// An object of one of the trees, somewhere else now. There may be a million of them: what it is the new pack says.
pub(crate) struct Move {
    old: Position,
    new_bytes: u64,
}

/// A record, note or tombstone, somewhere else now.
pub(crate) struct FactMove {
    pub(crate) header: Header,
    pub(crate) snapshot: SnapshotId,
    pub(crate) old: Location,
    pub(crate) new: Location,
}

/// What is to be kept of the packs that are replaced.
pub(crate) trait Keep {
    /// Whether to keep an object of one of the trees. Asked of very many at a time in the order of the hashes.
    fn object(&self, tree: Tree, hash: &Hash, at: Position) -> bool;

    /// Whether to keep a record, note or tombstone about this snapshot.
    fn fact(&self, kind: ObjectKind, snapshot: SnapshotId, location: Location) -> bool;
}

/// Keeps everything that is whole.
pub(crate) struct KeepAll;

impl Keep for KeepAll {
    fn object(&self, _: Tree, _: &Hash, _: Position) -> bool {
        true
    }

    fn fact(&self, _: ObjectKind, _: SnapshotId, _: Location) -> bool {
        true
    }
}

/// Replaces `victims` by one new pack with what `keep` wants of them; by none if that is nothing.
///
/// A victim in which there are damaged bytes stays as it is, unless `also_damaged`: for packs that have a name
/// elsewhere already, as this takes the name they have here.
pub(crate) fn compact(
    shared: &OpenStore,
    victims: &[Arc<Pack>],
    keep: &dyn Keep,
    also_damaged: bool,
) -> Result<Compacted, StoreError> {
    let mut packs = Vec::new();
    let mut left = None;
    for victim in victims {
        let bytes = victim.bytes(victim.length_bytes())?;
        let mut damaged = false;
        for scanned in victim.scan(&bytes, victim.header_bytes()) {
            damaged |= match scanned? {
                Scanned::Damaged { .. } => true,
                // What a record needs that cannot be decoded nobody knows: it stays where somebody may look at it.
                Scanned::Object { offset_bytes, header, payload } => {
                    fact::read(&header, payload, Location::new(victim.number, offset_bytes, &header)).is_err()
                }
            };
        }
        if damaged && !also_damaged {
            tracing::warn!("{} is damaged and stays as it is; see `verify`", victim.name.display());
            left.get_or_insert(PathBuf::from(&victim.name));
        } else {
            packs.push(victim.clone())
        }
    }
    if packs.is_empty() {
        return Ok(Compacted { left, ..Compacted::default() });
    }
    let origin = |pack: &Arc<Pack>| Ok((pack.number, pack.bytes(pack.length_bytes())?, pack.header_bytes()));
    let origins = packs.iter().map(origin).collect::<Result<Vec<Origin>, StoreError>>()?;
    let replaces = packs.iter().map(|pack| pack.number).collect();
    let written = write(shared, &origins, replaces, keep)?;
    drop(origins);
    let kept_in = written.as_ref().map(|written| (written.pack.number, written.pack.id));
    let written_bytes = written.as_ref().map_or(0, |written| written.pack.length_bytes());
    if let Some(written) = written {
        shared.log.add(written.pack.clone());
        repoint(shared, written)?;
    }
    // Should we be killed before the last of them is removed, the next open finds their objects anew, where
    // nothing replaces them: garbage, and its bases may be gone.
    let index = shared.index();
    let had_no_dangling = !index.may_have_dangling();
    index.set_may_have_dangling(true)?;
    forget_packs(shared, &packs, kept_in)?;
    let removed_bytes = packs.iter().map(|pack| pack.length_bytes()).sum();
    packs.iter().for_each(|pack| drop(shared.log.remove(pack.number)));
    shared.clear_away(packs.iter().map(|pack| pack.name.clone()).collect())?;
    if had_no_dangling {
        index.set_may_have_dangling(false)?;
    }
    Ok(Compacted { removed: packs.len() as u64, written_bytes, removed_bytes, left })
}

/// Points the index and the catalog at the new pack.
fn repoint(shared: &OpenStore, mut written: Written) -> Result<(), StoreError> {
    let index = shared.index();
    let number = written.pack.number;
    let is_rewritten = index.is_many(written.moves.len() as u64) && {
        written.moves.sort_unstable_by_key(|it| it.old);
        index.rewrite(|_, _, location| {
            // Not found where the index means another copy.
            let moved = written.moves.binary_search_by_key(&location.into(), |it| it.old).ok();
            Some(moved.map_or(location, |at| Location {
                pack: number,
                offset_bytes: written.moves[at].new_bytes,
                ..location
            }))
        })?
    };
    if !is_rewritten {
        written.moves.sort_unstable_by_key(|it| it.new_bytes);
        let bytes = written.pack.bytes(written.pack.length_bytes())?;
        for object in objects_of(&written.pack, &bytes) {
            let (tree, hash, new) = object?;
            if let Ok(at) = written.moves.binary_search_by_key(&new.offset_bytes, |it| it.new_bytes) {
                let Position { pack, offset_bytes } = written.moves[at].old;
                index.replace(tree, &hash, Location { pack, offset_bytes, ..new }, Some(new))?;
            }
        }
    }
    for FactMove { snapshot, old, new, .. } in written.facts {
        shared.change_catalog(|catalog| catalog.moved(snapshot, old, new));
        shared.store_catalog_entry(snapshot);
    }
    index.set_watermark(number, Some(written.pack.watermark(written.pack.length_bytes())));
    Ok(())
}

/// Lets the index and the catalog forget these packs. What was of use in them is elsewhere.
fn forget_packs(shared: &OpenStore, packs: &[Arc<Pack>], kept_in: Option<Named>) -> Result<(), StoreError> {
    let index = shared.index();
    let in_them = |location: Location| packs.iter().any(|pack| pack.number == location.pack);
    let gone = shared.change_catalog(|catalog| {
        let records: Vec<_> =
            catalog.all().filter(|(_, entry)| in_them(entry.location)).map(|(id, _)| *id).collect();
        let orphans = catalog.orphans().iter().filter(|(_, location)| in_them(**location));
        let orphans: Vec<_> = orphans.map(|(id, _)| *id).collect();
        records.iter().for_each(|id| catalog.record_gone(*id));
        orphans.iter().for_each(|id| catalog.orphan_gone(*id));
        [records, orphans].concat()
    });
    for id in gone {
        shared.store_catalog_entry(id);
    }
    for pack in packs {
        index.set_watermark(pack.number, None);
    }
    let gone = packs.iter().map(|pack| Collected { pack: (pack.number, pack.id), kept_in });
    let gone: Vec<Collected> = gone.collect();
    index.let_packs_go(|| collected::add(&shared.dir, &gone))?;
    // Where the index is held in memory they were not told.
    if index.is_held() { collected::add_or_forget(&shared.dir, &gone) } else { Ok(()) }
}

/// A pack's number, its bytes, and where its objects begin.
pub(crate) type Origin = (u32, Arc<PackMap>, u64);

/// A new pack, complete and durable, and what came to be where in it.
pub(crate) struct Written {
    pub(crate) pack: Arc<Pack>,
    moves: Vec<Move>,
    pub(crate) facts: Vec<FactMove>,
}

/// Writes the new pack, complete and durable and with its final name; none if there is nothing to
/// keep.
pub(crate) fn write(
    shared: &OpenStore,
    origins: &[Origin],
    replaces: Vec<u32>,
    keep: &dyn Keep,
) -> Result<Option<Written>, StoreError> {
    let wanted = wanted(shared.format.id, origins, keep)?;
    let mut begun: Option<(Pack, Unfinished)> = None;
    let (mut moves, mut facts) = (Vec::new(), Vec::new());
    let mut buffer = Vec::with_capacity(WRITE_BYTES);
    for (old_number, bytes, first_bytes) in origins {
        for scanned in Scan::of_map(bytes, *first_bytes, shared.format.id, *old_number) {
            let Scanned::Object { offset_bytes, header, payload } = scanned? else { continue };
            let old = Location::new(*old_number, offset_bytes, &header);
            let about = match tree::indexed(&header) {
                Some(_) if wanted.binary_search(&old.into()).is_ok() => None,
                Some(_) => continue,
                None => match fact::subject(&header, payload) {
                    Some(snapshot) if keep.fact(header.kind, snapshot, old) => Some(snapshot),
                    _ => continue,
                },
            };
            // Not before: on a full disk packs can still go of which nothing is kept.
            let (new, _) = match &mut begun {
                Some(begun) => begun,
                None => begun.insert(begin(shared, replaces.clone())?),
            };
            let new_bytes = new.length_bytes() + buffer.len() as u64;
            match about {
                Some(snapshot) => {
                    let new = Location::new(new.number, new_bytes, &header);
                    facts.push(FactMove { header, snapshot, old, new });
                }
                None => moves.push(Move { old: old.into(), new_bytes }),
            }
            let start = usize_of(offset_bytes);
            let copied = buffer.len();
            buffer.extend_from_slice(&bytes[start..start + header.object_bytes()]);
            let from = Place::new(shared.format.id, *old_number, offset_bytes);
            object::move_to(&mut buffer[copied..], from, new.place(new_bytes));
            if buffer.len() >= WRITE_BYTES {
                new.append(&buffer)?;
                buffer.clear();
            }
        }
    }
    let Some((mut new, _unfinished)) = begun else { return Ok(None) };
    new.append(&buffer)?;
    new.sync()?;
    // What was appended to before it has a lower number, and must not be torn once this one has its name.
    shared.log.sync_sealed()?;
    let name = shared.log.dir().join(names::file_name(new.number));
    new.rename(name.clone()).map_err(StoreError::io("give its name to", &name))?;
    if let Err(error) = file::sync_dir(shared.log.dir()) {
        // It must not stay: what changes from now on it would not know, and the next opening would believe it.
        if let Err(error) = shared.log.clear_away(vec![name]) {
            tracing::warn!("{error}");
        }
        return Err(StoreError::io("make durable", shared.log.dir())(error));
    }
    Ok(Some(Written { pack: Arc::new(new), moves, facts }))
}

/// Begins the new pack, under the name of one that is not finished.
fn begin(shared: &OpenStore, replaces: Vec<u32>) -> Result<(Pack, Unfinished), StoreError> {
    let number = shared.log.reserve_number()?;
    let unfinished = Unfinished(shared.log.dir().join(names::file_name(number)).with_extension(UNFINISHED));
    Ok((Pack::create(unfinished.0.clone(), &shared.format, number, replaces)?, unfinished))
}

/// Where the objects of the trees are that are to be kept, sorted.
fn wanted(store: StoreId, origins: &[Origin], keep: &dyn Keep) -> Result<Vec<Position>, StoreError> {
    let mut wanted = Vec::new();
    let mut objects: Vec<(Tree, Hash, Position)> = Vec::new();
    let mut choose = |objects: &mut Vec<(Tree, Hash, Position)>| {
        objects.sort_unstable();
        let kept = objects.drain(..).filter(|(tree, hash, at)| keep.object(*tree, hash, *at));
        wanted.extend(kept.map(|(_, _, at)| at));
    };
    for (pack, bytes, first_bytes) in origins {
        for scanned in Scan::of_map(bytes, *first_bytes, store, *pack) {
            if let Scanned::Object { offset_bytes, header, .. } = scanned?
                && let Some((tree, hash)) = tree::indexed(&header)
            {
                objects.push((tree, hash, Position { pack: *pack, offset_bytes }));
                if objects.len() == SORT_OBJECTS {
                    choose(&mut objects);
                }
            }
        }
    }
    choose(&mut objects);
    wanted.sort_unstable();
    Ok(wanted)
}

/// The objects of the trees in a pack.
pub(crate) fn objects_of<'a>(
    pack: &'a Pack,
    bytes: &'a PackMap,
) -> impl Iterator<Item = Result<IndexEntry, StoreError>> + 'a {
    pack.scan(bytes, pack.header_bytes()).filter_map(|scanned| match scanned {
        Ok(Scanned::Object { offset_bytes, header, .. }) => {
            let (tree, hash) = tree::indexed(&header)?;
            Some(Ok((tree, hash, Location::new(pack.number, offset_bytes, &header))))
        }
        Ok(Scanned::Damaged { .. }) => None,
        Err(error) => Some(Err(error)),
    })
}

/// A file that goes unless it was given another name.
struct Unfinished(Name);

impl Drop for Unfinished {
    fn drop(&mut self) {
        let _ = file::remove(&self.0);
    }
}
