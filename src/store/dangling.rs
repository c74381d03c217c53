//! Dangling deltas: those of which the index does not have the base.
//!
//! A delta is *resolvable* if the index has its base, the base of that, and so on down to an object that is stored whole.
//! Otherwise it is *dangling*: garbage, mostly, which comes back when the index is rebuilt. It is taken out of the index, so
//! that the next capture of the same bytes stores them again.

use super::error::StoreError;
use super::open_store::OpenStore;
use super::read::{Check, Reader};
use super::tree::{IndexEntry, Tree};

impl OpenStore {
    /// Takes deltas out of the index whose bases are not in it, if there may be any: garbage that gc
    /// was dropping, or that came back when the index was rebuilt. Where damage is known they may also be
    /// what a snapshot needs, and stay.
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

    /// Points the index at `others`, deltas that it does not mean, where the one that it means lacks a base
    /// and the other does not. That happens where the packs hold garbage from before: its base may be gone,
    /// and the same bytes stored anew since, from another base.
    pub(crate) fn resolve_with(&self, others: &[IndexEntry]) -> Result<(), StoreError> {
        let index = self.index();
        let mut reader = Reader::new(self, Check::Checksum);
        // One that is grounded now may be the base of another.
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
