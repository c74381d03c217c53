//! Replacing a store: what a migration has written takes the place of the old store, or is thrown away.
//!
//! ```text
//! STORE/migration/            being written: not yet a store, thrown away when found
//! STORE/migration/FORMAT      written last: complete, takes the old one's place when found
//! ```
//!
//! Taking the place is a chain of renamings, each of which is skipped if it is done already:
//! the old packs go to `migration/old-packs`, the new ones to `packs`, the new FORMAT replaces the
//! old, and what is left of `migration` is removed. The index belongs to the old packs and goes
//! first; it is rebuilt when the store is opened. Every opening does this, so that an interrupted migration goes on.

use super::error::StoreError;
use super::format::{self, FORMAT_FILE};
use super::names::{INDEX_DIR, MIGRATION_DIR, PACKS_DIR};
use crate::sys::dir::{Dir, Name};
use crate::sys::file;

pub(crate) const OLD_PACKS_DIR: &str = "old-packs";

/// Throws an incomplete migration away, and puts a complete one in the place of the old store.
///
/// Somebody else may have made the store, so nothing here follows a link, and what is said to be complete must be of
/// this store.
pub(crate) fn finish_interrupted(store: &Dir) -> Result<(), StoreError> {
    let migration = store.join(MIGRATION_DIR);
    let Some(found) = migration.look().map_err(StoreError::io("open", &migration))? else { return Ok(()) };
    if !found.is_dir() {
        return Err(in_the_way(&migration, found.is_no("directory").to_string()));
    }
    let new = file::open_dir(&migration).map_err(StoreError::io("open", &migration))?;
    let (packs, new_packs, old_packs) = (store.join(PACKS_DIR), new.join(PACKS_DIR), new.join(OLD_PACKS_DIR));
    let durable = |dir: &Dir| file::sync_dir(dir).map_err(StoreError::io("make durable", dir));
    // Whoever came this far may have been killed before it was.
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

/// An error if what a migration has written does not belong to this store.
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
