//! Opening a store: from files to a log, an index and a catalog that agree.
//!
//! The packs are the truth. What the index lacks of them is scanned and added; an index that cannot
//! be opened, or that speaks of packs there are not, is set aside and built anew.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::catalog::{Catalog, Entry, Fact};
use super::error::StoreError;
use super::format::Format;
use super::index::Index;
use super::location::Location;
use super::names::{DAMAGED_DIR, INDEX_DIR, PACKS_DIR, UNFINISHED};
use super::object::{Header, Kind};
use super::pack::{self, Pack, Scanned};
use super::tree::{IndexEntry, Tree};
use crate::codec;
use crate::hash::Hash;
use crate::record::{self, Note, SnapshotId, Tombstone};
use crate::region::is_zero;
use crate::sys::file;

/// What was found.
pub(crate) struct Opened {
    pub(crate) packs: Vec<Arc<Pack>>,
    pub(crate) active: Option<Arc<Pack>>,
    /// No pack has this number or one above it, nor any file in the place of one.
    pub(crate) next_number: u32,
    pub(crate) index: Index,
    pub(crate) catalog: Catalog,
    /// Files in the place of packs that are none, and what is wrong with them.
    pub(crate) unusable: Vec<(PathBuf, String)>,
    pub(crate) index_rebuilt: bool,
    /// What the index knew that was thrown away although it could be used.
    pub(crate) known_before: Option<Catalog>,
    /// Deltas that the index does not mean, as it has others of the same objects.
    pub(crate) other_deltas: Vec<IndexEntry>,
    /// Whether the index must be saved in any case: what took long, and what was warned of, is not to come
    /// again with the next opening.
    pub(crate) save: bool,
}

/// Opens all packs and brings the index up to date. `rebuild` throws the index away first.
pub(crate) fn open(store: &Path, format: &Format, rebuild: bool) -> Result<Opened, StoreError> {
    let (packs, unusable) = open_packs(&store.join(PACKS_DIR), format)?;
    for (path, why) in &unusable {
        tracing::warn!("{} is not usable: {why}", path.display());
    }
    let mut index = open_index(store, format, &packs)?;
    let known_before = if rebuild { index.take().map(|(_, catalog)| catalog) } else { None };
    let (index, mut catalog, index_rebuilt) = match index {
        Some((index, catalog)) => (index, catalog, false),
        None => {
            set_index_aside(store)?;
            let index = Index::open(&store.join(INDEX_DIR), format.id)?;
            // Garbage comes back that gc had dropped.
            index.set_may_have_ungrounded(true)?;
            (index, Catalog::default(), true)
        }
    };
    let CaughtUp { active, other_deltas, damage_found } =
        catch_up(&packs, &index, &mut catalog, index_rebuilt)?;
    if !unusable.is_empty() {
        // What is in them is missing, and the bases of deltas with it.
        index.set_damage_known(true)?;
    }
    let next_number = next_number(store)?;
    let save = damage_found || (index_rebuilt && !packs.is_empty());
    Ok(Opened {
        packs,
        active,
        next_number,
        index,
        catalog,
        unusable,
        index_rebuilt,
        known_before,
        other_deltas,
        save,
    })
}

/// The number after the highest there is, also of files that are no usable packs and of packs that
/// were set aside: nothing is ever written over them.
fn next_number(store: &Path) -> Result<u32, StoreError> {
    let mut numbers = pack::list(&store.join(PACKS_DIR))?;
    let damaged = store.join(DAMAGED_DIR);
    if damaged.is_dir() {
        numbers.extend(pack::list(&damaged)?);
    }
    Ok(numbers.into_iter().map(|(number, _)| number.saturating_add(1)).max().unwrap_or(1))
}

type Unusable = Vec<(PathBuf, String)>;

fn open_packs(dir: &Path, format: &Format) -> Result<(Vec<Arc<Pack>>, Unusable), StoreError> {
    file::create_dir(dir).map_err(StoreError::io("create", dir))?;
    for path in file::list(dir).map_err(StoreError::io("list", dir))? {
        if path.extension().is_some_and(|extension| extension == UNFINISHED) {
            file::remove(&path).map_err(StoreError::io("remove", path))?;
        }
    }
    let (mut packs, mut unusable) = (Vec::new(), Vec::new());
    for (number, path) in pack::list(dir)? {
        match Pack::open(path.clone(), format, number)? {
            Ok(pack) => packs.push(pack),
            // A power failure can leave the name of a pack that was just begun, and not its bytes.
            Err(_) if file::is_zero(&path).map_err(StoreError::io("read", &path))? => {
                tracing::info!("removing {}, which has nothing in it", path.display());
                file::remove(&path).map_err(StoreError::io("remove", &path))?;
            }
            Err(why) => unusable.push((path, why)),
        }
    }
    // A crash may have kept gc from removing what it had replaced.
    let replaced: Vec<u32> = packs.iter().flat_map(|pack| pack.replaces.iter().copied()).collect();
    for pack in packs.extract_if(.., |pack| replaced.contains(&pack.number)) {
        tracing::info!("removing {}, which gc has replaced", pack.path.display());
        file::remove(&pack.path).map_err(StoreError::io("remove", &pack.path))?;
    }
    Ok((packs.into_iter().map(Arc::new).collect(), unusable))
}

/// The index and the catalog in it; `None` with a warning if they must be built anew.
///
/// On a full disk that is an error: nothing can be built there.
fn open_index(
    store: &Path,
    format: &Format,
    packs: &[Arc<Pack>],
) -> Result<Option<(Index, Catalog)>, StoreError> {
    let path = store.join(INDEX_DIR);
    if !path.is_dir() {
        if !packs.is_empty() {
            tracing::warn!("the index is missing and is rebuilt from the packs");
        }
        return Ok(None);
    }
    let load = || -> Result<(Index, Catalog), StoreError> {
        let useless = |detail: String| StoreError::Index { action: "be used", detail };
        let index = Index::open(&path, format.id)?;
        for pack in packs {
            let (found, durable_bytes) = (pack.length_bytes(), index.durable_bytes(pack.number));
            if found < durable_bytes {
                let detail = format!("pack {} has {found} bytes, {durable_bytes} were durable", pack.number);
                return Err(useless(detail));
            }
        }
        let watermarks = index.watermarks();
        for pack in packs {
            // The packs that gc replaced are gone, but it was killed before the index was told. What it has
            // may be in them, whether or not it has their watermarks.
            if !pack.replaces.is_empty() && !watermarks.contains_key(&pack.number) {
                return Err(useless(format!("it does not know pack {}, which gc wrote", pack.number)));
            }
        }
        for (number, indexed_bytes) in watermarks {
            match packs.iter().find(|pack| pack.number == number) {
                None => return Err(useless(format!("it speaks of pack {number}, which is not there"))),
                Some(pack) if pack.length_bytes() < indexed_bytes => {
                    let found = pack.length_bytes();
                    let detail = format!("pack {number} has {found} bytes, {indexed_bytes} were indexed");
                    return Err(useless(detail));
                }
                Some(_) => {}
            }
        }
        let mut catalog = Catalog::default();
        for (key, value) in index.snapshots()? {
            if !catalog.load(&key, &value) {
                return Err(useless("it holds a snapshot that cannot be read".to_owned()));
            }
        }
        Ok((index, catalog))
    };
    match load() {
        Ok(both) => Ok(Some(both)),
        Err(error @ StoreError::DiskFull { .. }) => Err(error),
        Err(error) => {
            tracing::warn!("{error}; rebuilding it from the packs now");
            Ok(None)
        }
    }
}

/// Moves the index out of the way: into the folder for damaged things, where somebody may look at it.
fn set_index_aside(store: &Path) -> Result<(), StoreError> {
    let path = store.join(INDEX_DIR);
    if !path.exists() {
        return Ok(());
    }
    let damaged = store.join(DAMAGED_DIR);
    file::create_dir(&damaged).map_err(StoreError::io("create", &damaged))?;
    let aside = damaged.join(INDEX_DIR);
    // One is enough: an index holds nothing that the packs do not.
    file::remove_dir(&aside).map_err(StoreError::io("remove", &aside))?;
    file::rename(&path, &aside).map_err(StoreError::io("set aside", path))
}

/// What came of scanning the packs.
struct CaughtUp {
    /// The pack to go on appending to.
    active: Option<Arc<Pack>>,
    other_deltas: Vec<IndexEntry>,
    damage_found: bool,
}

/// Scans what the index lacks of the packs.
fn catch_up(
    packs: &[Arc<Pack>],
    index: &Index,
    catalog: &mut Catalog,
    rebuilding: bool,
) -> Result<CaughtUp, StoreError> {
    let watermarks = index.watermarks();
    let mut active = None;
    let mut facts = Vec::new();
    let mut ends = Vec::new();
    let mut damage_found = false;
    let mut other_deltas = Vec::new();
    // What was appended to last. Packs before it were durable before it was begun, and those that
    // gc wrote before they had their names; those are never appended to.
    let last_begun = packs.iter().rev().find(|pack| pack.replaces.is_empty()).map(|pack| pack.number);
    for pack in packs {
        let indexed_bytes = watermarks.get(&pack.number).copied().unwrap_or(0).max(pack.header_bytes());
        let may_be_torn = last_begun == Some(pack.number);
        let mut damaged = false;
        if pack.length_bytes() > indexed_bytes {
            // What was durable once is no torn tail.
            let torn_from = may_be_torn.then(|| indexed_bytes.max(index.durable_bytes(pack.number)));
            let mut tail = Tail::scan(pack, indexed_bytes, torn_from, rebuilding)?;
            if let Some(end_bytes) = tail.torn_at {
                tracing::info!("cutting a torn tail of {} bytes", pack.length_bytes() - end_bytes);
                pack.cut(end_bytes)?;
            }
            for (offset_bytes, why) in &tail.damaged {
                tracing::warn!("pack {} is damaged at byte {offset_bytes}: {why}", pack.number);
                index.set_damage_known(true)?;
                (damaged, damage_found) = (true, true);
            }
            other_deltas.append(&mut index.insert_found(tail.objects)?);
            // Of many packs, not all at once in memory.
            index.save_if_much()?;
            facts.append(&mut tail.facts);
            ends.push((pack.number, pack.length_bytes()));
        }
        // The last one, as it turns out.
        let room = pack.replaces.is_empty()
            && !damaged
            && pack.length_bytes() < pack::SEAL_BYTES
            && pack.length_bytes() % 8 == 0;
        active = room.then(|| pack.clone());
    }
    // Notes and tombstones come after all records: gc may have put a record into a later pack.
    facts.sort_by_key(|fact| !matches!(fact, Fact::Snapshot(..)));
    let snapshots: Vec<SnapshotId> = facts.iter().map(Fact::snapshot).collect();
    facts.into_iter().for_each(|fact| catalog.apply(fact));
    for id in snapshots {
        for (key, value) in catalog.stored(id) {
            index.set_snapshot(key, value);
        }
    }
    for (number, indexed_bytes) in ends {
        index.set_watermark(number, Some(indexed_bytes));
    }
    Ok(CaughtUp { active, other_deltas, damage_found })
}

/// What a pack holds past its watermark.
#[derive(Default)]
struct Tail {
    objects: Vec<IndexEntry>,
    facts: Vec<Fact>,
    damaged: Vec<(u64, &'static str)>,
    /// Where to cut the pack.
    torn_at: Option<u64>,
}

impl Tail {
    /// Scans it. In the pack that was appended to last, what comes after the first bytes that are no
    /// object, and after the last record, note and tombstone, belongs to nothing that was
    /// acknowledged: a torn tail. When the whole index is rebuilt one cannot know where the last
    /// record was; then it is one only if it looks so.
    fn scan(
        pack: &Pack,
        from_bytes: u64,
        torn_from: Option<u64>,
        rebuilding: bool,
    ) -> Result<Tail, StoreError> {
        let bytes = pack.bytes(pack.length_bytes())?;
        let mut tail = Tail::default();
        let mut torn_at = None;
        for scanned in pack.scan(&bytes, from_bytes) {
            match scanned? {
                Scanned::Object { offset_bytes, header, payload } => {
                    let location = Location::new(pack.number, offset_bytes, &header);
                    match fact(&header, payload, location) {
                        Ok(None) => tail.objects.push((Tree::of(header.kind), header.hash, location)),
                        Ok(Some(fact)) => {
                            tail.facts.push(fact);
                            torn_at = None;
                        }
                        Err(why) => {
                            tracing::warn!(
                                "a {} in pack {} is not in order: {why}",
                                header.kind,
                                pack.number
                            );
                        }
                    }
                }
                Scanned::Damaged { offset_bytes, end_bytes, why, .. } => {
                    tail.damaged.push((offset_bytes, why));
                    let at = usize::try_from(offset_bytes).unwrap_or(usize::MAX);
                    let rest = bytes.get(at..);
                    pack::ready(&bytes, at..bytes.len())?;
                    let looks_torn = end_bytes == pack.length_bytes()
                        && (why.starts_with("the pack ends") || rest.is_some_and(is_zero));
                    let may_be_torn = torn_from.is_some_and(|from_bytes| offset_bytes >= from_bytes);
                    if may_be_torn && (!rebuilding || looks_torn) {
                        torn_at = torn_at.or(Some(offset_bytes));
                    }
                }
            }
        }
        if let Some(end_bytes) = torn_at {
            tail.objects.retain(|(_, _, location)| location.offset_bytes < end_bytes);
            tail.damaged.retain(|(offset_bytes, _)| *offset_bytes < end_bytes);
        }
        Ok(Tail { torn_at, ..tail })
    }
}

/// What an object says to the catalog, if it is of a kind that does.
pub(crate) fn fact(header: &Header, payload: &[u8], location: Location) -> Result<Option<Fact>, String> {
    if !matches!(header.kind, Kind::Record | Kind::Note | Kind::Tombstone) {
        return Ok(None);
    }
    let mut plain = vec![0; header.plain_bytes as usize];
    codec::decode(header.encoding, payload, &mut plain).map_err(|error| error.to_string())?;
    if Hash::of(&plain) != header.hash {
        return Err("its bytes do not match its hash".to_owned());
    }
    let text = |error: record::RecordError| error.to_string();
    Ok(Some(match header.kind {
        Kind::Record => {
            let record = record::decode(&plain).map_err(text)?;
            Fact::Snapshot(SnapshotId(header.hash), Box::new(Entry::new(record, location)))
        }
        Kind::Note => Fact::Note(record::decode::<Note>(&plain).map_err(text)?, location),
        _ => Fact::Tombstone(record::decode::<Tombstone>(&plain).map_err(text)?.snapshot, location),
    }))
}
