//! Damage: what is known of it, and what the index is told.
//!
//! A delta is *resolvable* if the index has its base, the base of that, and so on down to an object that is stored whole.
//! Otherwise it is *dangling*. What is damaged, and what dangles, is taken out of the index, so that the next capture of
//! the same bytes stores them again.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use super::error::StoreError;
use super::open_store::OpenStore;
use super::packs::location::{Location, Position};
use super::packs::read::{Check, Reader};
use super::tree::{IndexEntry, Tree};
use crate::hash::Hash;

/// What is known of damage in the store.
pub(crate) struct Damage {
    /// Whether some was found. Then captures look up also what their parent has.
    known: AtomicBool,
    /// How often some was found since the store was opened.
    findings: AtomicU64,
}

impl Damage {
    pub(crate) fn new(known: bool) -> Damage {
        Damage { known: AtomicBool::new(known), findings: AtomicU64::new(0) }
    }
}

impl OpenStore {
    /// Whether damage was found that captures should mend.
    pub(crate) fn damage_known(&self) -> bool {
        self.damage.known.load(Ordering::Relaxed)
    }

    /// Remembers, also after a reopening, that there is damage.
    pub(crate) fn note_damage(&self) {
        self.damage.findings.fetch_add(1, Ordering::Relaxed);
        self.store_damage_known(true);
    }

    /// How often damage was found.
    pub(crate) fn damage_findings(&self) -> u64 {
        self.damage.findings.load(Ordering::Relaxed)
    }

    /// There is no damage, unless some was found after `findings_before`.
    pub(crate) fn no_damage_since(&self, findings_before: u64) {
        self.store_damage_known(false);
        if self.damage_findings() != findings_before {
            self.store_damage_known(true);
        }
    }

    fn store_damage_known(&self, known: bool) {
        self.damage.known.store(known, Ordering::Relaxed);
        if let Err(error) = self.index.set_damage_known(known) {
            tracing::warn!("{error}");
        }
    }

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

    /// Takes what an error says is damaged out of the index.
    pub(crate) fn forget_culprit(&self, error: &StoreError) {
        let Some((kind, hash, at)) = error.culprit() else { return self.note_damage() };
        let tree = Tree::of(kind);
        match self.locate(tree, &hash) {
            Ok(Some(location)) if Position::from(location) == at => {
                self.forget_damaged(tree, &hash, location)
            }
            _ => self.note_damage(),
        }
    }

    /// Takes a damaged object out of the index, so that it is stored anew when it is captured again.
    pub(crate) fn forget_damaged(&self, tree: Tree, hash: &Hash, location: Location) {
        self.note_damage();
        if let Err(error) = self.index.replace(tree, hash, location, None) {
            tracing::warn!("{error}");
        }
    }
}
