//! Rewriting the database: everything goes into a new one, which replaces the present one when it
//! is complete.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::database::Database;
use super::overlay::{Change, Lower};
use super::room::MIN_BYTES;
use super::{Index, remove};
use crate::hash::Hash;
use crate::store::error::StoreError;
use crate::store::names::UNFINISHED;
use crate::store::packs::location::Location;
use crate::store::tree::Tree;
use crate::sys::{file, heap};

/// An upper estimate of an entry's size on the disk. Measured: 43 to 46 bytes in buckets, about 50
/// in runs.
const ENTRY_BYTES: u64 = 60;

/// An upper estimate of a snapshot's size on the disk.
const SNAPSHOT_BYTES: u64 = 1024;

impl Index {
    /// Rewrites the database if it takes far more disk space than its entries need.
    pub(crate) fn rewrite_if_bloated(&self) -> Result<(), StoreError> {
        if self.is_held() {
            return Ok(());
        }
        let entries = {
            let state = self.read();
            state.bucket_entries() + state.overlay_entries() as u64
        };
        let needed_bytes = entries * ENTRY_BYTES + self.snapshots()?.len() as u64 * SNAPSHOT_BYTES;
        if self.disk_bytes() > 2 * needed_bytes + MIN_BYTES {
            self.rewrite(|_, _, location| Some(location)).map(drop)
        } else {
            Ok(())
        }
    }

    /// Writes everything into a new database, which replaces the present one. `change` is called
    /// with each entry, in order of the trees and hashes, and returns its new location or that it
    /// is removed. Other changes that are made in the meantime are kept.
    ///
    /// Returns whether there was space for it. If not, nothing is changed, and the index is held in
    /// memory.
    ///
    /// It takes half a second for a million entries (AMD EPYC, 2 cores).
    pub(crate) fn rewrite(
        &self,
        mut change: impl FnMut(Tree, &Hash, Location) -> Option<Location>,
    ) -> Result<bool, StoreError> {
        let _writing = self.writing();
        if self.is_held() {
            return Ok(false);
        }
        let new = self.name.with_extension(UNFINISHED);
        remove(&new)?;
        let snapshots = self.snapshots()?;
        let (epoch, snapshots, watermarks, about_entries, old) = {
            let mut state = self.write();
            let Some(old) = state.database()?.cloned() else { return Ok(false) };
            let about =
                Tree::ALL.map(|tree| old.buckets(tree).entries + state.overlays[tree as usize].len() as u64);
            let mut snapshots = snapshots;
            snapshots.extend(state.unsaved_snapshots());
            snapshots.retain(|_, value| !value.is_empty());
            (state.end_epoch(), snapshots, state.watermarks.clone(), about, old)
        };
        let mut write = || -> Result<Database, StoreError> {
            let mut fresh = self.open_database(&new)?;
            for (tree, about_entries) in Tree::ALL.into_iter().zip(about_entries) {
                let entries = self.entries(tree).filter_map(|entry| match entry {
                    Ok((hash, location)) => {
                        change(tree, &hash, location).map(|location| Ok((hash, location.to_bytes())))
                    }
                    Err(error) => Some(Err(error)),
                });
                fresh.fill(tree, about_entries, entries)?;
            }
            fresh.fill_snapshots(&snapshots)?;
            // These may be written before everything else is on the disk: the new database is not
            // opened until it is complete.
            watermarks.iter().try_for_each(|(pack, bytes)| fresh.put_watermark(*pack, Some(*bytes)))?;
            fresh.put_damage_known(old.damage_known())?;
            fresh.put_may_have_dangling(old.may_have_dangling())?;
            fresh.put_rebuilding(old.is_rebuilding())?;
            fresh.flush()?;
            Ok(fresh)
        };
        let written = write();
        drop(old);
        let failed = |error| {
            self.write().is_precious = true;
            remove(&new)?;
            self.or_hold(Err(error)).map(|()| false)
        };
        let fresh = match written {
            Ok(fresh) => fresh,
            Err(error) => return failed(error),
        };
        let mut state = self.write();
        // Entries that were removed in the meantime may be there in part: a delta without its base.
        let is_drop = |change: &Change| change.epoch > epoch && change.place == Location::GONE;
        if state.overlays.iter().flat_map(BTreeMap::values).any(is_drop) {
            state.may_have_dangling = true;
            if let Err(error) = fresh.put_may_have_dangling(true) {
                drop((state, fresh));
                return failed(error);
            }
        }
        let buckets = Tree::ALL.map(|tree| fresh.buckets(tree));
        if let Err(error) = fresh.close() {
            drop(state);
            return failed(error);
        }
        // No other thread uses the database: those that change it need the `writing` lock, and all
        // others the lock of the tiers.
        state.lower = Lower::Lost;
        let exchanged = file::exchange_dirs(&new, &self.name).map_err(StoreError::io("replace", &self.name));
        let database = self.open_database(&self.name)?;
        if let Err(error) = exchanged {
            state.lower = Lower::Database(Arc::new(database));
            drop(state);
            return failed(error);
        }
        // After a disk error, sled was seen to open with nothing in it.
        if Tree::ALL.map(|tree| database.buckets(tree)) != buckets {
            let detail = "it was not what had been written when it was opened again".to_owned();
            return Err(StoreError::Index { action: "be rewritten", detail });
        }
        state.lower = Lower::Database(Arc::new(database));
        state.overlays.iter_mut().for_each(|overlay| overlay.retain(|_, change| change.epoch > epoch));
        state.saved(epoch);
        drop(state);
        // Frees the cache of the old database and the memory used for the new one.
        heap::give_back();
        remove(&new).map(|()| true)
    }
}
