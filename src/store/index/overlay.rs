//! The overlay: what has changed in the index since its buckets were written, in memory, and which
//! of it is saved in the database. If the index is held in memory, the overlay is all of it.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::block::PackedLocation;
use super::database::Database;
use crate::hash::Hash;
use crate::store::error::StoreError;
use crate::store::packs::location::Location;
use crate::store::packs::watermark::Watermark;
use crate::store::tree::Tree;

/// The tier below the overlay.
pub(super) enum Lower {
    Database(Arc<Database>),
    /// The index is held in memory.
    Nothing,
    /// The database could not be opened again after it was rewritten.
    Lost,
}

/// The present state of both tiers.
pub(super) struct Tiers {
    pub(super) lower: Lower,
    pub(super) overlays: [BTreeMap<Hash, Change>; Tree::ALL.len()],
    /// Catalog entries that are not saved.
    pub(super) snapshots: BTreeMap<Vec<u8>, (Vec<u8>, u64)>,
    pub(super) watermarks: BTreeMap<u32, Watermark>,
    /// The packs whose watermarks are not saved.
    pub(super) moved_watermarks: BTreeMap<u32, u64>,
    /// The epoch of a change that is made now. A save or a rewrite covers all epochs up to the
    /// present one, and begins another.
    pub(super) epoch: u64,
    /// Changes of this epoch and of earlier ones are in the database.
    pub(super) saved_epoch: u64,
    pub(super) unsaved_entries: usize,
    pub(super) unsaved_bytes: u64,
    /// Whether something is unsaved that the packs do not contain.
    pub(super) is_precious: bool,
    pub(super) damage_known: bool,
    pub(super) may_have_dangling: bool,
    /// Whether it is being built from the packs.
    pub(super) is_rebuilding: bool,
}

/// An entry of the overlay.
#[derive(Clone, Copy)]
pub(super) struct Change {
    pub(super) place: PackedLocation,
    pub(super) epoch: u64,
}

impl Tiers {
    /// An index that is held in memory.
    pub(super) fn held_in_memory() -> Tiers {
        Tiers {
            lower: Lower::Nothing,
            overlays: Default::default(),
            snapshots: BTreeMap::new(),
            watermarks: BTreeMap::new(),
            moved_watermarks: BTreeMap::new(),
            epoch: 1,
            saved_epoch: 0,
            unsaved_entries: 0,
            unsaved_bytes: 0,
            is_precious: false,
            damage_known: false,
            may_have_dangling: false,
            is_rebuilding: false,
        }
    }

    /// The database, unless the index is held in memory.
    pub(super) fn database(&self) -> Result<Option<&Arc<Database>>, StoreError> {
        match &self.lower {
            Lower::Database(database) => Ok(Some(database)),
            Lower::Nothing => Ok(None),
            Lower::Lost => Err(StoreError::Index {
                action: "be used",
                detail: "it could not be opened again after it was rewritten".to_owned(),
            }),
        }
    }

    pub(super) fn get(&self, tree: Tree, hash: &Hash) -> Result<Option<Location>, StoreError> {
        let place = match self.overlays[tree as usize].get(hash) {
            Some(change) => Some(change.place),
            None => match self.database()? {
                Some(database) => database.find(tree, hash)?,
                None => None,
            },
        };
        Ok(place.and_then(|place| Location::from_bytes(&place)))
    }

    pub(super) fn change(&mut self, tree: Tree, hash: &Hash, place: PackedLocation) {
        let change = Change { place, epoch: self.epoch };
        self.overlays[tree as usize].insert(*hash, change);
        self.unsaved_entries += 1;
    }

    pub(super) fn overlay_entries(&self) -> usize {
        self.overlays.iter().map(BTreeMap::len).sum()
    }

    pub(super) fn bucket_entries(&self) -> u64 {
        match &self.lower {
            Lower::Database(database) => Tree::ALL.map(|tree| database.buckets(tree).entries).iter().sum(),
            Lower::Nothing | Lower::Lost => 0,
        }
    }

    /// Ends the present epoch. Everything unsaved belongs to it or to an earlier one.
    pub(super) fn end_epoch(&mut self) -> u64 {
        self.epoch += 1;
        (self.unsaved_entries, self.unsaved_bytes, self.is_precious) = (0, 0, false);
        self.epoch - 1
    }

    /// Records that the changes of this epoch and of earlier ones are saved.
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
