//! The overlay: what has changed in the index since its buckets were written, in memory, and what of
//! that is saved in the database.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::block::Place;
use super::database::Database;
use super::error::StoreError;
use super::location::Location;
use super::tree::Tree;
use super::watermark::Watermark;
use crate::hash::Hash;

/// Both tiers as they are now.
pub(super) struct State {
    /// `None` only after it could not be opened again.
    pub(super) database: Option<Arc<Database>>,
    pub(super) overlays: [BTreeMap<Hash, Change>; Tree::ALL.len()],
    /// Catalog entries that are not saved.
    pub(super) snapshots: BTreeMap<Vec<u8>, (Vec<u8>, u64)>,
    pub(super) watermarks: BTreeMap<u32, Watermark>,
    /// The packs whose watermarks are not saved.
    pub(super) moved_watermarks: BTreeMap<u32, u64>,
    /// What changes now belongs to this epoch. A save or a rewrite takes all epochs up to the
    /// present one, and begins another.
    pub(super) epoch: u64,
    /// What belongs to these is in the database.
    pub(super) saved_epoch: u64,
    pub(super) unsaved_entries: usize,
    pub(super) unsaved_bytes: u64,
    /// Whether there is something unsaved that the packs do not tell.
    pub(super) is_precious: bool,
}

/// An entry of the overlay.
#[derive(Clone, Copy)]
pub(super) struct Change {
    pub(super) place: Place,
    pub(super) epoch: u64,
}

impl State {
    pub(super) fn database(&self) -> Result<&Arc<Database>, StoreError> {
        self.database.as_ref().ok_or_else(|| StoreError::Index {
            action: "be used",
            detail: "it could not be opened again after it was rewritten".to_owned(),
        })
    }

    pub(super) fn get(&self, tree: Tree, hash: &Hash) -> Result<Option<Location>, StoreError> {
        let place = match self.overlays[tree as usize].get(hash) {
            Some(change) => Some(change.place),
            None => self.database()?.find(tree, hash)?,
        };
        Ok(place.and_then(|place| Location::from_bytes(&place)))
    }

    pub(super) fn change(&mut self, tree: Tree, hash: &Hash, place: Place) {
        let change = Change { place, epoch: self.epoch };
        self.overlays[tree as usize].insert(*hash, change);
        self.unsaved_entries += 1;
    }

    pub(super) fn overlay_entries(&self) -> usize {
        self.overlays.iter().map(BTreeMap::len).sum()
    }

    pub(super) fn bucket_entries(&self) -> u64 {
        let entries = |database: &Arc<Database>| Tree::ALL.map(|tree| database.buckets(tree).entries);
        self.database.as_ref().map_or(0, |database| entries(database).iter().sum())
    }

    /// Ends the present epoch. What is unsaved belongs to it or to an earlier one.
    pub(super) fn end_epoch(&mut self) -> u64 {
        self.epoch += 1;
        (self.unsaved_entries, self.unsaved_bytes, self.is_precious) = (0, 0, false);
        self.epoch - 1
    }

    /// What belongs to this epoch or an earlier one is saved.
    pub(super) fn saved(&mut self, epoch: u64) {
        self.saved_epoch = epoch;
        self.snapshots.retain(|_, (_, of)| *of > epoch);
        self.moved_watermarks.retain(|_, of| *of > epoch);
    }

    /// The catalog entries that are not saved.
    pub(super) fn unsaved_snapshots(&self) -> BTreeMap<Vec<u8>, Vec<u8>> {
        self.snapshots.iter().map(|(key, (value, _))| (key.clone(), value.clone())).collect()
    }

    /// The watermarks that are not saved.
    pub(super) fn unsaved_watermarks(&self) -> Vec<(u32, Option<Watermark>)> {
        self.moved_watermarks.keys().map(|pack| (*pack, self.watermarks.get(pack).copied())).collect()
    }
}
