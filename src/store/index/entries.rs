//! The entries of a tree in order: the buckets and the overlay, merged.

use std::collections::btree_map;

use super::block::Stored;
use super::database::BLOCK_ENTRIES;
use super::overlay::{Change, Tiers};
use crate::hash::Hash;
use crate::store::error::StoreError;
use crate::store::tree::Tree;
use crate::sync::RwLock;

/// How many entries are read at a time from an index that is held in memory.
const HELD_ENTRIES: usize = 1024;

/// Entries in order, the buckets and the overlay merged. They are read a bucket at a time, as the
/// bucket is at that moment.
pub(super) struct Entries<'a> {
    tiers: &'a RwLock<Tiers>,
    tree: Tree,
    /// Where to continue. `None` at the end.
    from: Option<Hash>,
    ready: std::vec::IntoIter<Stored>,
}

impl<'a> Entries<'a> {
    /// All entries of a tree. An entry that changes in the meantime may be returned as it was
    /// before or after.
    pub(super) fn new(tiers: &'a RwLock<Tiers>, tree: Tree) -> Entries<'a> {
        Entries { tiers, tree, from: Some(Hash::ZERO), ready: Vec::new().into_iter() }
    }
}

impl Iterator for Entries<'_> {
    type Item = Result<Stored, StoreError>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            if let Some(entry) = self.ready.next() {
                return Some(Ok(entry));
            }
            let from = self.from.take()?;
            match self.bucket(&from) {
                Ok((ready, next)) => (self.ready, self.from) = (ready.into_iter(), next),
                Err(error) => return Some(Err(error)),
            }
        }
    }
}

impl Entries<'_> {
    /// The entries from here to the end of the bucket, and where the next bucket begins.
    fn bucket(&self, from: &Hash) -> Result<(Vec<Stored>, Option<Hash>), StoreError> {
        let state = self.tiers.read();
        let overlay = &state.overlays[self.tree as usize];
        let Some(database) = state.database()? else {
            let mut rest = overlay.range(*from..).map(|(hash, change)| (*hash, change.place));
            let ready = rest.by_ref().take(HELD_ENTRIES).collect();
            return Ok((ready, rest.next().map(|(hash, _)| hash)));
        };
        let next = database.buckets(self.tree).next(from);
        let older = database.bucket_from(self.tree, from)?;
        let newer = match next {
            Some(next) => overlay.range(*from..next),
            None => overlay.range(*from..),
        };
        Ok((merge(older, newer), next))
    }
}

/// Merges both, which are in order. If both have a hash, the newer entry wins.
fn merge(older: Vec<Stored>, newer: btree_map::Range<'_, Hash, Change>) -> Vec<Stored> {
    let mut newer = newer.map(|(hash, change)| (*hash, change.place)).peekable();
    if newer.peek().is_none() {
        return older;
    }
    let mut merged = Vec::with_capacity(older.len() + BLOCK_ENTRIES);
    for entry in older {
        while let Some(before) = newer.next_if(|(hash, _)| *hash < entry.0) {
            merged.push(before);
        }
        merged.push(newer.next_if(|(hash, _)| *hash == entry.0).unwrap_or(entry));
    }
    merged.extend(newer);
    merged
}
