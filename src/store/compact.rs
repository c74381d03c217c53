//! Compaction: the objects worth keeping of some packs move into a new one.
//!
//! The new pack gets its name when it is complete and durable, and names the packs it replaces.
//! Then the index is pointed at it, and then the old packs go. A crash in between leaves either the
//! old packs alone or the new one with some old ones beside it, which the next open removes.

use std::path::Path;
use std::sync::Arc;

use memmap2::Mmap;

use super::Shared;
use super::error::StoreError;
use super::index::Tree;
use super::location::Location;
use super::object::{Header, Kind};
use super::open::{self, UNFINISHED};
use super::pack::{self, Pack, Scan, Scanned};
use crate::hash::Hash;
use crate::record::{self, Note, SnapshotId, Tombstone};
use crate::sys::{file, map};

/// Copied objects are written in pieces of this size.
const WRITE_BYTES: usize = 1 << 20;

/// What a compaction did.
#[derive(Debug, Default)]
pub(crate) struct Compacted {
    /// Packs that are gone.
    pub(crate) removed: u64,
    /// Their bytes.
    pub(crate) removed_bytes: u64,
    /// The bytes of the new pack, if there is one.
    pub(crate) written_bytes: u64,
}

/// Somewhere else now.
struct Move {
    header: Header,
    /// What a record, note or tombstone is about.
    snapshot: Option<SnapshotId>,
    old: Location,
    new: Location,
}

/// Replaces `victims` by one new pack with those of their objects that `keep` wants; by none if
/// there are no such objects. With `aside` the old packs are moved to that directory.
///
/// A victim in which there are damaged bytes stays as it is, unless it is to be set aside.
pub(crate) fn compact(
    shared: &Shared,
    victims: &[Arc<Pack>],
    keep: impl Fn(&Header, Option<SnapshotId>, Location) -> bool,
    aside: Option<&Path>,
) -> Result<Compacted, StoreError> {
    let mut whole = Vec::new();
    for victim in victims {
        let bytes = victim.bytes(victim.length_bytes())?;
        let damaged = Scan::new(&bytes, victim.header_bytes()).any(|it| matches!(it, Scanned::Damaged { .. }));
        match damaged && aside.is_none() {
            true => tracing::warn!("{} is damaged and stays as it is; see `verify`", victim.path.display()),
            false => whole.push(victim.clone()),
        }
    }
    if whole.is_empty() {
        return Ok(Compacted::default());
    }
    let origin = |victim: &Arc<Pack>| {
        Ok((victim.number, victim.bytes(victim.length_bytes())?, victim.header_bytes()))
    };
    let origins = whole.iter().map(origin).collect::<Result<Vec<Origin>, StoreError>>()?;
    let replaces = whole.iter().map(|victim| victim.number).collect();
    let (pack, moves) = write(shared, origins, replaces, keep)?;
    let index = shared.index()?;
    let mut gone = Vec::new();
    if let Some(pack) = &pack {
        shared.log.add(pack.clone());
    }
    for Move { header, snapshot, old, new } in &moves {
        match snapshot {
            Some(id) => {
                shared.change_catalog(|catalog| catalog.moved(*id, *old, *new));
                shared.store_catalog_entry(&index, *id)?;
            }
            None => drop(index.replace(open::tree_of(header.kind), &header.hash, *old, Some(*new))?),
        }
    }
    index.flush()?;
    if let Some(pack) = &pack {
        index.set_watermark(pack.number, Some(pack.length_bytes()))?;
    }
    // What is left in the catalog of the old packs goes with them.
    let old_pack = |location: Location| whole.iter().any(|victim| victim.number == location.pack);
    shared.change_catalog(|catalog| {
        let records: Vec<_> =
            catalog.all().filter(|(_, entry)| old_pack(entry.location)).map(|(id, _)| *id).collect();
        let orphans: Vec<_> =
            catalog.orphans().iter().filter(|(_, location)| old_pack(**location)).map(|(id, _)| *id).collect();
        for id in &records {
            catalog.record_gone(*id);
        }
        for id in &orphans {
            catalog.orphan_gone(*id);
        }
        gone = [records, orphans].concat();
    });
    for id in gone {
        shared.store_catalog_entry(&index, id)?;
    }
    for victim in &whole {
        index.set_watermark(victim.number, None)?;
    }
    index.flush()?;

    let mut compacted = Compacted {
        removed: whole.len() as u64,
        written_bytes: pack.map_or(0, |pack| pack.length_bytes()),
        ..Compacted::default()
    };
    for victim in whole {
        shared.log.remove(victim.number);
        let removed = match aside {
            Some(aside) => {
                let name = victim.path.file_name().unwrap_or_default();
                std::fs::rename(&victim.path, aside.join(name))
            }
            None => std::fs::remove_file(&victim.path),
        };
        removed.map_err(StoreError::io("remove", &victim.path))?;
        compacted.removed_bytes += victim.length_bytes();
    }
    file::sync_dir(shared.log.dir()).map_err(StoreError::io("make durable", shared.log.dir()))?;
    Ok(compacted)
}

/// Copies the whole objects out of a file that should be a pack and has no usable header, and
/// takes them into the index. A file of another store has nothing to give.
pub(crate) fn salvage(shared: &Shared, path: &Path) -> Result<(), StoreError> {
    let failed = || StoreError::io("read", path);
    let file = file::open_existing(path).map_err(failed())?;
    let length_bytes = usize::try_from(file.metadata().map_err(failed())?.len()).unwrap_or(usize::MAX);
    if length_bytes == 0 {
        return Ok(());
    }
    let bytes = Arc::new(map::map_pack(&file, length_bytes).map_err(failed())?);
    if pack::is_foreign(&bytes) {
        return Ok(());
    }
    let (pack, moves) = write(shared, vec![(0, bytes, 0)], Vec::new(), |_, _, _| true)?;
    let Some(pack) = pack else { return Ok(()) };
    shared.log.add(pack.clone());
    let index = shared.index()?;
    let bytes = pack.bytes(pack.length_bytes())?;
    // Records first: notes and tombstones are about them.
    let (records, others): (Vec<_>, Vec<_>) = moves.iter().partition(|it| it.header.kind == Kind::Record);
    for Move { header, snapshot, new, .. } in records.into_iter().chain(others) {
        let payload = usize::try_from(new.offset_bytes).ok().and_then(|at| header.payload(bytes.get(at..)?).ok());
        match (snapshot, payload) {
            (None, _) => index.insert(open::tree_of(header.kind), &header.hash, *new)?,
            (Some(id), Some(payload)) => {
                if let Ok(Some(fact)) = open::fact(header, payload, *new) {
                    shared.change_catalog(|catalog| catalog.apply(fact));
                    shared.store_catalog_entry(&index, *id)?;
                }
            }
            (Some(_), None) => {}
        }
    }
    index.flush()?;
    index.set_watermark(pack.number, Some(pack.length_bytes()))
}

/// The bytes of a pack, its number, and where its objects begin.
type Origin = (u32, Arc<Mmap>, u64);

/// Writes the new pack, complete and durable and with its final name.
fn write(
    shared: &Shared,
    origins: Vec<Origin>,
    replaces: Vec<u32>,
    keep: impl Fn(&Header, Option<SnapshotId>, Location) -> bool,
) -> Result<(Option<Arc<Pack>>, Vec<Move>), StoreError> {
    let number = shared.log.reserve_number()?;
    let path = shared.log.dir().join(pack::file_name(number));
    let unfinished = Unfinished(path.with_extension(UNFINISHED));
    let mut new = Pack::create(unfinished.0.clone(), &shared.format, number, replaces)?;
    let mut moves = Vec::new();
    let mut buffer = Vec::with_capacity(WRITE_BYTES);
    for (old_number, bytes, first_bytes) in origins {
        for scanned in Scan::new(&bytes, first_bytes) {
            let Scanned::Object { offset_bytes, header, payload } = scanned else { continue };
            let old = Location::new(old_number, offset_bytes, &header);
            let snapshot = match subject(&header, payload) {
                Ok(snapshot) => snapshot,
                // It says nothing to anybody.
                Err(()) => continue,
            };
            if !keep(&header, snapshot, old) {
                continue;
            }
            let new_bytes = new.length_bytes() + buffer.len() as u64;
            moves.push(Move { header, snapshot, old, new: Location::new(number, new_bytes, &header) });
            let start = usize::try_from(offset_bytes).unwrap_or(usize::MAX);
            buffer.extend_from_slice(&bytes[start..start + header.object_bytes()]);
            if buffer.len() >= WRITE_BYTES {
                new.append(&buffer)?;
                buffer.clear();
            }
        }
    }
    if moves.is_empty() {
        return Ok((None, moves));
    }
    new.append(&buffer)?;
    new.sync()?;
    new.rename(path.clone()).map_err(StoreError::io("give its name to", path))?;
    file::sync_dir(shared.log.dir()).map_err(StoreError::io("make durable", shared.log.dir()))?;
    Ok((Some(Arc::new(new)), moves))
}

/// The snapshot that a record, note or tombstone is about; `None` for other kinds.
fn subject(header: &Header, payload: &[u8]) -> Result<Option<SnapshotId>, ()> {
    let plain = || {
        let mut plain = vec![0; header.plain_bytes as usize];
        crate::codec::decode(header.encoding, payload, &mut plain).map_err(drop)?;
        Ok(plain)
    };
    Ok(match header.kind {
        Kind::Record => Some(SnapshotId(header.hash)),
        Kind::Note => Some(record::decode::<Note>(&plain()?).map_err(drop)?.snapshot),
        Kind::Tombstone => Some(record::decode::<Tombstone>(&plain()?).map_err(drop)?.snapshot),
        _ => None,
    })
}

/// A file that goes unless it was given another name.
struct Unfinished(std::path::PathBuf);

impl Drop for Unfinished {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// Which tree and hash an object is indexed by; `None` for what the catalog has.
pub(crate) fn indexed(header: &Header) -> Option<(Tree, Hash)> {
    let in_catalog = matches!(header.kind, Kind::Record | Kind::Note | Kind::Tombstone);
    (!in_catalog).then(|| (open::tree_of(header.kind), header.hash))
}
