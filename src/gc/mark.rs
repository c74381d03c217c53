//! Marking: finds out what the live snapshots need.

use std::collections::HashSet;

use crate::error::Error;
use crate::hash::Hash;
use crate::progress::{Meter, Progress};
use crate::record::SnapshotId;
use crate::store::OpenStore;
use crate::store::error::StoreError;
use crate::store::held::Held;
use crate::store::marks::{Marked, Marks};
use crate::store::packs::object::ObjectKind;
use crate::store::read::{Check, Reader};
use crate::store::tables::Layout;
use crate::store::tree::Tree;

/// The live snapshots.
pub(crate) fn live_snapshots(shared: &OpenStore) -> Vec<(SnapshotId, Held)> {
    shared.catalog().all_live().map(|(id, entry)| (*id, entry.held().clone())).collect()
}

/// Marking under way.
pub(crate) struct Marking<'a> {
    pub(super) shared: &'a OpenStore,
    pub(super) meter: Meter,
    pub(super) regions: Marks,
    pub(super) objects: Marks,
    pub(super) marked: HashSet<SnapshotId>,
    /// Roots and tables of which all is marked. That they are marked themselves does not tell: an
    /// attachment may have the same bytes, and marks know only the first bits of a hash.
    pub(super) walked: HashSet<(ObjectKind, Hash)>,
}

impl<'a> Marking<'a> {
    /// Nothing is marked yet of what is in the index.
    pub(super) fn begin(shared: &'a OpenStore, progress: &'a Progress) -> Result<Marking<'a>, Error> {
        shared.sync()?;
        shared.settle_all();
        let mut reader = Reader::new(shared, Check::Checksum);
        let mut marks = |tree| Marks::with_bases(shared.index(), tree, |at| reader.delta_at(at));
        Ok(Marking::with(shared, progress, (marks(Tree::Regions)?, marks(Tree::Objects)?)))
    }

    /// The same, where the bases of deltas are not marked with these.
    pub(crate) fn without_bases(shared: &'a OpenStore, progress: &'a Progress) -> Result<Marking<'a>, Error> {
        shared.sync()?;
        shared.settle_all();
        let marks = |tree| Marks::of(shared.index(), tree);
        Ok(Marking::with(shared, progress, (marks(Tree::Regions)?, marks(Tree::Objects)?)))
    }

    fn with(
        shared: &'a OpenStore,
        progress: &'a Progress,
        (regions, objects): (Marks, Marks),
    ) -> Marking<'a> {
        let (meter, marked, walked) = (progress.begin(0), HashSet::new(), HashSet::new());
        Marking { shared, meter, regions, objects, marked, walked }
    }

    /// The marks of one of the trees.
    pub(crate) fn of(&self, tree: Tree) -> &Marks {
        match tree {
            Tree::Regions => &self.regions,
            Tree::Objects => &self.objects,
        }
    }

    /// Marks all that these snapshots need: distinct tables once.
    pub(crate) fn mark_all(
        &mut self,
        snapshots: impl IntoIterator<Item = (SnapshotId, Held)>,
    ) -> Result<(), Error> {
        let mut reader = Reader::new(self.shared, Check::Full);
        // Snapshots that follow one another mostly have the same one.
        let mut last_layout: Option<(Hash, Layout)> = None;
        for (id, held) in snapshots {
            if !self.marked.insert(id) {
                continue;
            }
            let record = held.record();
            for attachment in &record.attachments {
                self.object(ObjectKind::Attachment, &attachment.hash)?;
            }
            self.object(ObjectKind::Layout, &record.layout)?;
            self.object(ObjectKind::Root, &record.root)?;
            if record.root.is_zero() || !self.walked.insert((ObjectKind::Root, record.root)) {
                continue;
            }
            let layout = match last_layout.take_if(|(layout, _)| *layout == record.layout) {
                Some((_, layout)) => layout,
                None => Layout::read(&mut reader, &record)?,
            };
            let root = layout.root(&mut reader, &record)?;
            for (table, place) in root.places(&layout.places) {
                self.object(ObjectKind::Table, &table)?;
                if !self.walked.insert((ObjectKind::Table, table)) {
                    continue;
                }
                for hash in reader.hashes(ObjectKind::Table, &table, place.regions)? {
                    if !hash.is_zero() {
                        let marked = self.regions.mark(&hash);
                        self.there(marked, ObjectKind::Region, &hash)?;
                    }
                }
                self.meter.advance(place.length_bytes as u64)?;
            }
            last_layout = Some((record.layout, layout));
        }
        Ok(())
    }
}

impl Marking<'_> {
    fn object(&mut self, kind: ObjectKind, hash: &Hash) -> Result<(), StoreError> {
        if hash.is_zero() {
            return Ok(());
        }
        let marked = self.objects.mark(hash);
        self.there(marked, kind, hash)
    }

    /// An error where the index has lost what a snapshot needs. The packs may have it: dropping it there would lose it for
    /// good. Where damage is known it is expected.
    fn there(&self, marked: Marked, kind: ObjectKind, hash: &Hash) -> Result<(), StoreError> {
        if marked != Marked::Unknown || self.shared.damage_known() {
            return Ok(());
        }
        // It may have been appended since the index was read: then it lies past the horizon.
        match self.shared.locate(Tree::of(kind), hash)? {
            Some(_) => Ok(()),
            None => Err(StoreError::Missing { kind, hash: *hash }),
        }
    }
}
