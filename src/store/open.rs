//! Opening a store: produces a log, an index and a catalog that agree.
//!
//! The packs are the truth. Objects that the index lacks are found by scanning the packs, and are
//! added. An index that cannot be opened, or that refers to packs that do not exist, is set aside
//! and rebuilt. If nothing can be written, it is rebuilt in memory.

use std::collections::HashMap;
use std::sync::Arc;

use super::catalog::Catalog;
use super::error::StoreError;
use super::format::Format;
use super::identity;
use super::index::closing::{self, Durable};
use super::index::database::OUTDATED;
use super::index::{self, Index};
use super::lock::Access;
use super::names::{DAMAGED_DIR, INDEX_DIR, PACKS_DIR, UNFINISHED};
use super::packs::collected::{self, Collected};
use super::packs::lost::{self, Lost, Present};
use super::packs::names;
use super::packs::pack::Pack;
use super::recover::{Prior, Recovered, recover};
use super::tree::IndexEntry;
use crate::progress::Progress;
use crate::sys::dir::{Dir, Name};
use crate::sys::file;

/// What the opening found.
pub(crate) struct Opened {
    pub(crate) packs: Vec<Arc<Pack>>,
    pub(crate) active: Option<Arc<Pack>>,
    /// Packs whose torn tails are to be truncated as soon as there is space for it.
    pub(crate) ragged: Vec<Arc<Pack>>,
    /// The directory of the packs.
    pub(crate) dir: Dir,
    /// No pack, and no other file in the directory, has this number or a higher one.
    pub(crate) next_number: u32,
    pub(crate) index: Index,
    pub(crate) catalog: Catalog,
    /// Files with the name of a pack that are not packs, and what is wrong with them.
    pub(crate) unusable: Vec<(Name, String)>,
    /// Packs that are missing.
    pub(crate) lost: Vec<Lost>,
    pub(crate) index_rebuilt: bool,
    /// Deltas that the index does not refer to, because it has other copies of the same objects.
    pub(crate) other_deltas: Vec<IndexEntry>,
    /// Whether the index must be saved in any case, so that the next opening does not repeat long
    /// work and warnings.
    pub(crate) save: bool,
}

/// Opens all packs and brings the index up to date. With `rebuild`, the index is discarded first.
/// If this is interrupted, the next opening continues it.
pub(crate) fn open(
    store: &Dir,
    format: &Format,
    access: Access,
    rebuild: bool,
    progress: &Progress,
) -> Result<Opened, StoreError> {
    if access == Access::Owner {
        // The process that wrote FORMAT may have been killed before the file was durable.
        file::sync_dir(store).map_err(StoreError::io("make durable", store))?;
    }
    let packs = store.join(PACKS_DIR);
    let dir = match access {
        Access::Owner => file::create_dir(&packs).map_err(StoreError::io("create", &packs)),
        Access::Reader => file::open_dir(&packs).map_err(StoreError::io("open", &packs)),
    }?;
    let (packs, unusable) = open_packs(store, &dir, format, access)?;
    if packs.is_empty() {
        identity::check_packs(store, format)?;
    }
    for (name, why) in &unusable {
        tracing::warn!("{} is not usable: {why}; `stillframe repair` recovers its contents", name.display());
    }
    let collected = collected::read(store);
    let present =
        Present { packs: &packs, other_numbers: other_numbers(store, &dir)?, collected: &collected };
    let mut lost = present.lost(durable_at_last_closing(store).into_iter());
    let (index, is_held) = match access {
        Access::Reader => (None, true),
        Access::Owner => match open_index(store, format, &present, &mut lost) {
            Err(StoreError::DiskFull { .. }) => {
                index::warn_held(&store.join(INDEX_DIR));
                (None, true)
            }
            other => (other?, false),
        },
    };
    let (mut lost, is_back) = note_lost(store, &present, lost, access)?;
    // Bytes that were durable once are no torn tail. This must also hold when the index is
    // discarded.
    let mut durable_bytes: HashMap<u32, u64> =
        lost.iter().map(|lost| (lost.pack.0, lost.durable_bytes)).collect();
    let index = match index {
        // The index is dropped first: the database must be closed when it is set aside. An index
        // that was built while part of a pack was missing lacks the object at the cut, so it is
        // rebuilt.
        Some((index, _)) if rebuild || is_back => {
            for pack in &packs {
                let indexed = index.watermarks().get(&pack.number).map_or(0, |it| it.end_bytes);
                let known_bytes = indexed.max(index.durable_bytes(pack.number, pack.id));
                let durable_bytes = durable_bytes.entry(pack.number).or_default();
                *durable_bytes = known_bytes.max(*durable_bytes);
            }
            None
        }
        index => index,
    };
    let (index, mut catalog, index_rebuilt) = match index {
        Some((index, catalog)) => (index, catalog, false),
        None => {
            let index = new_index(store, format, is_held)?;
            if !packs.is_empty() {
                // The rebuilt index has garbage again that gc had dropped.
                index.set_may_have_dangling(true)?;
                index.set_rebuilding(true)?;
            }
            (index, Catalog::default(), true)
        }
    };
    let is_rebuilding = index.is_rebuilding();
    let Recovered { active, ragged, other_deltas, damage_found } = recover(
        &packs,
        &index,
        &mut catalog,
        access,
        &Prior { durable_bytes, last_appended: last_appended(&packs, &unusable), lost: &lost },
        progress,
    )?;
    for it in &mut lost {
        // A snapshot that was found elsewhere, or was forgotten after the index was saved, is not
        // missing.
        it.snapshots.retain(|id| catalog.live(id).is_none() && !catalog.orphans().contains_key(id));
    }
    if !unusable.is_empty() || !lost.is_empty() {
        // Their content is missing, and with it the bases of deltas.
        index.set_damage_known(true)?;
    }
    let next_number = next_number(store, &dir)?;
    let save = damage_found || is_rebuilding;
    Ok(Opened {
        packs,
        active,
        ragged,
        dir,
        next_number,
        index,
        catalog,
        unusable,
        lost,
        index_rebuilt,
        other_deltas,
        save,
    })
}

/// The pack that may have a torn tail: the one with the highest number. All others were durable
/// before a pack with a higher number got its name. So were packs that gc wrote.
fn last_appended(packs: &[Arc<Pack>], unusable: &Unusable) -> Option<u32> {
    let number = |name: &Name| name.name().to_str().and_then(names::number_of);
    let unusable = unusable.iter().filter_map(|(name, _)| number(name)).max();
    let last = packs.last().filter(|pack| pack.replaces.is_empty())?;
    (Some(last.number) > unusable).then_some(last.number)
}

/// The number after the highest, which includes those of unusable packs and of packs that were set
/// aside: no file is ever overwritten.
fn next_number(store: &Dir, packs: &Dir) -> Result<u32, StoreError> {
    let mut numbers = names::list(packs)?;
    let damaged = store.join(DAMAGED_DIR);
    if damaged.is_dir() {
        let damaged = file::open_dir(&damaged).map_err(StoreError::io("open", &damaged))?;
        numbers.extend(names::list(&damaged)?);
    }
    Ok(numbers.into_iter().map(|(number, _)| number.saturating_add(1)).max().unwrap_or(1))
}

type Unusable = Vec<(Name, String)>;

/// What the index says was durable, whether or not the index can be opened.
fn durable_at_last_closing(store: &Dir) -> Durable {
    store.join(INDEX_DIR).open_dir().map(|index| closing::read(&index)).unwrap_or_default()
}

/// The numbers of unusable packs and of packs that were set aside.
fn other_numbers(store: &Dir, packs: &Dir) -> Result<Vec<u32>, StoreError> {
    let mut listed = names::list(packs)?;
    let damaged = store.join(DAMAGED_DIR);
    if damaged.is_dir() {
        listed.extend(names::list(&damaged.open_dir().map_err(StoreError::io("open", &damaged))?)?);
    }
    Ok(listed.into_iter().map(|(number, _)| number).collect())
}

/// Merges the packs that are missing now with what was known of them before, writes the result, and
/// logs a warning. Returns also whether a missing pack is back.
fn note_lost(
    store: &Dir,
    present: &Present<'_>,
    now: Vec<Lost>,
    access: Access,
) -> Result<(Vec<Lost>, bool), StoreError> {
    let before = lost::read(store);
    let still = present.still_lost(before.clone());
    let is_back = still.len() < before.len();
    let lost = lost::join(still, now);
    if lost != before && access == Access::Owner {
        match lost::write(store, &lost) {
            // The next opening finds it again, as long as the index still records it.
            Err(error @ StoreError::DiskFull { .. }) => tracing::warn!("{error}"),
            other => other?,
        }
    }
    for it in &lost {
        let snapshots = match it.snapshots.len() {
            0 => String::new(),
            count => format!("; {count} snapshots are known to be gone with it"),
        };
        tracing::warn!("{}: {}{snapshots}", it.file_name(), it.why());
    }
    Ok((lost, is_back))
}

fn open_packs(
    store: &Dir,
    dir: &Dir,
    format: &Format,
    access: Access,
) -> Result<(Vec<Arc<Pack>>, Unusable), StoreError> {
    // A reader ignores superfluous files.
    let remove = |name: &Name, why: &str| match access {
        Access::Reader => Ok(()),
        Access::Owner => {
            tracing::info!("removing {}, which {why}", name.display());
            file::remove(name).map_err(StoreError::io("remove", name))
        }
    };
    let durable = || match access {
        Access::Reader => Ok(()),
        Access::Owner => file::sync_dir(dir).map_err(StoreError::io("make durable", dir)),
    };
    // Makes the names durable: the process that gave them may have been killed before. From here on
    // the content of the packs is relied on, and the packs that they replace are removed.
    durable()?;
    for name in file::list(dir).map_err(StoreError::io("list", dir))? {
        if name.path().extension().is_some_and(|extension| extension == UNFINISHED) && !name.is_dir() {
            remove(&name, "is not finished")?;
        }
    }
    let (mut packs, mut unusable) = (Vec::new(), Vec::new());
    for (number, name) in names::list(dir)? {
        match Pack::open(name.clone(), format, number, access)? {
            Ok(pack) => packs.push(pack),
            Err(why) => unusable.push((name, why)),
        }
    }
    // A crash may have prevented gc from removing the packs that it had replaced.
    let replaced: Vec<u32> = packs.iter().flat_map(|pack| pack.replaces.iter().copied()).collect();
    let superfluous: Vec<Pack> = packs.extract_if(.., |pack| replaced.contains(&pack.number)).collect();
    if access == Access::Owner && !superfluous.is_empty() {
        let by = |number| packs.iter().find(|pack: &&Pack| pack.replaces.contains(&number));
        let entry = |pack: &Pack| Collected {
            pack: (pack.number, pack.id),
            kept_in: by(pack.number).map(|pack| (pack.number, pack.id)),
        };
        // Without this entry, a copy of an old index may report these packs as missing. That must
        // not prevent freeing space.
        collected::add_or_forget(store, &superfluous.iter().map(entry).collect::<Vec<_>>())?;
    }
    for pack in &superfluous {
        remove(&pack.name, "gc has replaced")?;
    }
    if !superfluous.is_empty() {
        // It must be durable before gc may remove the pack that says which packs were replaced.
        durable()?;
    }
    Ok((packs.into_iter().map(Arc::new).collect(), unusable))
}

/// The index, and the catalog in it. `None`, with a warning, if they must be rebuilt. Adds to
/// `lost` the packs that the index knows and that do not exist.
fn open_index(
    store: &Dir,
    format: &Format,
    present: &Present<'_>,
    lost: &mut Vec<Lost>,
) -> Result<Option<(Index, Catalog)>, StoreError> {
    let (name, packs) = (store.join(INDEX_DIR), present.packs);
    if Index::is_missing(&name) {
        index::check_room(&name)?;
        if !packs.is_empty() {
            tracing::warn!("the index is missing and is rebuilt from the packs");
        }
        return Ok(None);
    }
    let mut load = || -> Result<(Index, Catalog), StoreError> {
        let useless = |detail: String| StoreError::Index { action: "be used", detail };
        index::check_files(&name)?;
        let index = Index::open(&name, format.id)?;
        *lost = lost::join(std::mem::take(lost), present.lost(index.watermarks().into_iter()));
        if !lost.is_empty() {
            let mut catalog = Catalog::default();
            index.read_snapshots(|key, value| {
                // An entry that cannot be read cannot be reported.
                let _ = catalog.load(key, value);
                true
            })?;
            catalog.loaded();
            lost::name_snapshots(lost, &catalog);
        }
        for pack in packs {
            let (found, durable_bytes) = (pack.length_bytes(), index.durable_bytes(pack.number, pack.id));
            if found < durable_bytes {
                let detail = format!("pack {} has {found} bytes, {durable_bytes} were durable", pack.number);
                return Err(useless(detail));
            }
        }
        let watermarks = index.watermarks();
        for pack in packs {
            // The packs that gc replaced are removed, but gc was killed before the index was
            // updated. The index may point into them, whether or not it has their watermarks.
            if !pack.replaces.is_empty() && !watermarks.contains_key(&pack.number) {
                return Err(useless(format!("it does not know pack {}, which gc wrote", pack.number)));
            }
        }
        for (number, watermark) in watermarks {
            match packs.iter().find(|pack| pack.number == number) {
                None => return Err(useless(format!("it speaks of pack {number}, which is not there"))),
                // The number was used again after the pack that had it was removed.
                Some(pack) if pack.id != watermark.pack => {
                    return Err(useless(format!("it speaks of another pack {number} than there is")));
                }
                Some(pack) if pack.length_bytes() < watermark.end_bytes => {
                    let (found, expected) = (pack.length_bytes(), watermark.end_bytes);
                    let detail = format!("pack {number} has {found} bytes, {expected} were indexed");
                    return Err(useless(detail));
                }
                Some(_) => {}
            }
        }
        let mut catalog = Catalog::default();
        if !index.read_snapshots(|key, value| catalog.load(key, value))? {
            return Err(useless("it holds a snapshot that cannot be read".to_owned()));
        }
        catalog.loaded();
        Ok((index, catalog))
    };
    match load() {
        Ok(both) => Ok(Some(both)),
        // A full disk is no damage.
        Err(error @ StoreError::DiskFull { .. }) => Err(error),
        Err(StoreError::Index { action: OUTDATED, .. }) => {
            tracing::info!("rebuilding the index, which an earlier stillframe wrote");
            file::remove_dir(&name).map_err(StoreError::io("remove", &name))?;
            Ok(None)
        }
        Err(error) => {
            let why = match error {
                StoreError::Index { action, detail } => format!("the index cannot {action}: {detail}"),
                other => other.to_string(),
            };
            tracing::warn!("{why}; rebuilding it from the packs now");
            Ok(None)
        }
    }
}

/// An empty index: in place of the old one, or in memory if nothing can be written.
fn new_index(store: &Dir, format: &Format, is_held: bool) -> Result<Index, StoreError> {
    let name = store.join(INDEX_DIR);
    let in_place = || {
        set_index_aside(store)?;
        Index::open(&name, format.id)
    };
    let in_memory = || Index::in_memory(&name, format.id);
    if is_held {
        Ok(in_memory())
    } else {
        in_place().or_else(|error| match error {
            StoreError::DiskFull { .. } => {
                index::warn_held(&name);
                Ok(in_memory())
            }
            other => Err(other),
        })
    }
}

/// Moves the index into the directory for damaged files, where it can be inspected.
fn set_index_aside(store: &Dir) -> Result<(), StoreError> {
    let name = store.join(INDEX_DIR);
    if !name.exists() {
        return Ok(());
    }
    if name.is_dir() && Index::is_missing(&name) {
        // Part of an index is useless.
        return file::remove_dir(&name).map_err(StoreError::io("remove", &name));
    }
    let damaged = store.join(DAMAGED_DIR);
    let damaged = file::create_dir(&damaged).map_err(StoreError::io("create", &damaged))?;
    let aside = damaged.join(INDEX_DIR);
    // One copy is enough: an index holds nothing that the packs do not hold.
    file::remove_dir(&aside).map_err(StoreError::io("remove", &aside))?;
    file::rename(&name, &aside).map_err(StoreError::io("set aside", &name))
}
