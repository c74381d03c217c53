//! Replacing a store: what a migration has written replaces the old store, or is discarded.
//!
//! ```text
//! STORE/migration/            being written: not yet a store; the next opening deletes it
//! STORE/migration/FORMAT      written last: complete; the next opening replaces the old store
//! ```
//!
//! The replacement is a chain of renames. Each is skipped if it is already done. The old packs move
//! to `migration/old-packs`, the new packs to `packs`, the new FORMAT replaces the old one, and the
//! rest of `migration` is removed. The index belongs to the old packs and is removed first; the
//! opening rebuilds it. Every opening runs this chain, so an interrupted migration is completed.

use super::error::StoreError;
use super::format::{self, FORMAT_FILE};
use super::names::{INDEX_DIR, MIGRATION_DIR, PACKS_DIR};
use crate::sys::dir::{Dir, Name};
use crate::sys::file;

pub(crate) const OLD_PACKS_DIR: &str = "old-packs";

/// Discards an incomplete migration, and replaces the old store with a complete one.
///
/// Another user may have made the store. So no step follows a symbolic link, and a complete
/// migration must be one of this store.
pub(crate) fn finish_interrupted(store: &Dir) -> Result<(), StoreError> {
    let migration = store.join(MIGRATION_DIR);
    let Some(found) = migration.look().map_err(StoreError::io("open", &migration))? else { return Ok(()) };
    if !found.is_dir() {
        return Err(in_the_way(&migration, found.is_no("directory").to_string()));
    }
    let new = file::open_dir(&migration).map_err(StoreError::io("open", &migration))?;
    let (packs, new_packs, old_packs) = (store.join(PACKS_DIR), new.join(PACKS_DIR), new.join(OLD_PACKS_DIR));
    let durable = |dir: &Dir| file::sync_dir(dir).map_err(StoreError::io("make durable", dir));
    // An earlier run that came this far may have been killed before it made them durable.
    durable(&new)?;
    durable(store)?;
    if new.join(FORMAT_FILE).exists() {
        check_is_of(store, &new)?;
        for name in [&new_packs, &old_packs, &packs] {
            if let Some(found) = name.look().map_err(StoreError::io("open", name))?
                && !found.is_dir()
            {
                return Err(in_the_way(name, found.is_no("directory").to_string()));
            }
        }
        let rename = |from: &Name, to: &Name| {
            file::rename(from, to).map_err(StoreError::io("give its new place to", from))?;
            durable(store)?;
            durable(&new)
        };
        remove(&store.join(INDEX_DIR))?;
        if new_packs.is_dir() {
            if !old_packs.is_dir() {
                rename(&packs, &old_packs)?;
            }
            rename(&new_packs, &packs)?;
        }
        rename(&new.join(FORMAT_FILE), &store.join(FORMAT_FILE))?;
    }
    remove(&migration)?;
    durable(store)
}

/// Returns an error if what a migration has written does not belong to this store.
fn check_is_of(store: &Dir, new: &Dir) -> Result<(), StoreError> {
    if format::id_line(new)? == format::id_line(store)? {
        Ok(())
    } else {
        Err(in_the_way(
            &store.join(MIGRATION_DIR),
            "there is another store in it, and no migration".to_owned(),
        ))
    }
}

fn in_the_way(name: &Name, why: String) -> StoreError {
    StoreError::InTheWay { path: name.into(), why }
}

pub(crate) fn remove(dir: &Name) -> Result<(), StoreError> {
    file::remove_dir(dir).map_err(StoreError::io("remove", dir))
}
