//! Dangling deltas: deltas whose base is not in the index.
//!
//! A delta is *resolvable* if the index has its base, the base of that, and so on down to an object
//! that is stored whole. Otherwise it is *dangling*. Most dangling deltas are garbage that
//! reappears when the index is rebuilt. They are removed from the index, so that the next capture
//! of the same bytes stores them again.

use super::error::StoreError;
use super::open_store::OpenStore;
use super::read::{Check, Reader};
use super::tree::{IndexEntry, Tree};

impl OpenStore {
    /// Removes dangling deltas from the index, if there may be any: garbage that gc was dropping,
    /// or that reappeared when the index was rebuilt. If damage is known, a snapshot may need them,
    /// and they stay.
    pub(crate) fn drop_dangling(&self) -> Result<(), StoreError> {
        let index = self.index();
        if !index.may_have_dangling() {
            return Ok(());
        }
        self.settle_all();
        let mut reader = Reader::new(self, Check::Checksum);
        for tree in [Tree::Regions, Tree::Objects] {
            for entry in index.entries(tree) {
                let (hash, location) = entry?;
                if location.is_delta() && !reader.is_resolvable(tree, &hash)? {
                    index.replace(tree, &hash, location, None)?;
                }
            }
        }
        index.set_may_have_dangling(false)
    }

    /// Points the index at deltas in `others`, to which it does not refer, where the index's own
    /// delta of the same object is dangling and the other is resolvable. This happens if the packs
    /// hold old garbage: its base may have been dropped, and the same bytes stored again since,
    /// from another base.
    pub(crate) fn resolve_with(&self, others: &[IndexEntry]) -> Result<(), StoreError> {
        let index = self.index();
        let mut reader = Reader::new(self, Check::Checksum);
        // A delta that has become resolvable may be the base of another.
        let mut goes_on = true;
        while std::mem::take(&mut goes_on) {
            for (tree, hash, other) in others {
                if reader.is_resolvable(*tree, hash)? {
                    continue;
                }
                let base = reader.delta_at((*other).into())?.filter(|(delta, _)| delta == hash);
                if let (Some((_, base)), Some(present)) = (base, index.get(*tree, hash)?)
                    && reader.is_resolvable(*tree, &base)?
                {
                    index.replace(*tree, hash, present, Some(*other))?;
                    goes_on |= reader.is_resolvable(*tree, hash)?;
                }
            }
        }
        Ok(())
    }
}
