//! A sample of the store: some objects, spread over all packs, and what the store has in all.

use std::collections::{HashMap, HashSet, hash_map};

use rayon::prelude::*;

use super::{BATCH_OBJECTS, Intact, Subject, Verification};
use crate::error::Error;
use crate::hash::Hash;
use crate::progress::{Meter, Progress};
use crate::record::SnapshotId;
use crate::store::error::StoreError;
use crate::store::marks::Marks;
use crate::store::packs::location::Location;
use crate::store::packs::names;
use crate::store::packs::object::ObjectKind;
use crate::store::read::{Check, Reader};
use crate::store::tree::Tree;

/// Something that a sample may take.
pub(super) enum Stock {
    Object(Tree, Hash),
    /// A record, note or tombstone about this snapshot.
    Fact(ObjectKind, SnapshotId),
}

impl Stock {
    fn tree(&self) -> Option<Tree> {
        match self {
            Stock::Object(tree, _) => Some(*tree),
            Stock::Fact(..) => None,
        }
    }

    fn hash(&self) -> &Hash {
        match self {
            Stock::Object(_, hash) => hash,
            Stock::Fact(_, id) => &id.0,
        }
    }
}

impl Verification<'_> {
    /// Hands every object that the index and the catalog know to `look`, and counts them.
    pub(super) fn take_stock(
        &self,
        look: &mut dyn FnMut(Stock, Location) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let (mut objects, mut bytes) = (0, 0);
        let mut take = |stock, location: Location| {
            objects += 1;
            bytes += location.object_bytes();
            look(stock, location)
        };
        for tree in Tree::ALL {
            for entry in self.shared.index().entries(tree) {
                let (hash, location) = entry?;
                take(Stock::Object(tree, hash), location)?;
            }
        }
        for (kind, id, location) in self.facts() {
            take(Stock::Fact(kind, id), location)?;
        }
        *self.total.lock() = (objects, bytes);
        Ok(())
    }

    /// The records, notes and tombstones that count, and where they are.
    fn facts(&self) -> Vec<(ObjectKind, SnapshotId, Location)> {
        let catalog = self.shared.catalog();
        let of_entries = catalog.all().flat_map(|(id, entry)| {
            let note = entry.note().map(|(_, at)| (ObjectKind::Note, *id, at));
            let tombstone = entry.tombstone().map(|at| (ObjectKind::Tombstone, *id, at));
            [Some((ObjectKind::Record, *id, entry.location)), note, tombstone].into_iter().flatten()
        });
        let orphans = catalog.orphans().iter().map(|(id, at)| (ObjectKind::Tombstone, *id, *at));
        of_entries.chain(orphans).collect()
    }

    /// Some of the objects, by chance, but of each pack at least one region, one other object and one fact.
    pub(super) fn sample(&self, percent: u8, progress: &Progress) -> Result<(), Error> {
        let damage_was_known = self.shared.damage_known();
        let salt = jiff::Timestamp::now().as_nanosecond();
        // Which of a pack's objects of a class has the lowest number drawn, so that one is there in any case.
        let mut lowest: HashMap<(u32, Option<Tree>), (u64, Stock, Location)> = HashMap::new();
        let mut sampled: HashSet<(u32, Option<Tree>)> = HashSet::new();
        let meter = progress.begin(self.stored_bytes() / 100 * u64::from(percent));
        let mut batch: Vec<(Stock, Location)> = Vec::new();
        self.take_stock(&mut |stock, location| {
            let class = (location.pack, stock.tree());
            let at = location.offset_bytes.to_le_bytes();
            let number = Hash::of(&[&stock.hash().0[..], &at, &salt.to_le_bytes()].concat()).prefix();
            // The upper 64 bits of a product: an even spread over 0 to 99.
            if (u128::from(number) * 100) >> 64 < u128::from(percent) {
                sampled.insert(class);
                batch.push((stock, location));
            } else if !sampled.contains(&class)
                && lowest.get(&class).is_none_or(|(before, ..)| number < *before)
            {
                lowest.insert(class, (number, stock, location));
            }
            if batch.len() >= BATCH_OBJECTS {
                self.check(&batch, &meter)?;
                batch.clear();
            }
            Ok(())
        })?;
        let left_out = lowest.into_iter().filter(|(class, _)| !sampled.contains(class));
        batch.extend(left_out.map(|(_, (_, stock, location))| (stock, location)));
        batch.chunks(BATCH_OBJECTS).try_for_each(|batch| self.check(batch, &meter))?;
        let found: HashMap<Hash, ObjectKind> = self
            .problems
            .lock()
            .keys()
            .filter_map(|subject| match subject {
                Subject::Object(kind, hash) => Some((*hash, *kind)),
                Subject::Bytes { .. } => None,
            })
            .collect();
        self.who_needs(&found, &meter)?;
        // What was found damaged earlier is in the index no more, where a sample does not meet it.
        if damage_was_known { self.known_losses(progress) } else { Ok(()) }
    }

    fn stored_bytes(&self) -> u64 {
        self.shared.log.packs().iter().map(|pack| pack.length_bytes()).sum()
    }

    /// Checks objects of a sample.
    fn check(&self, batch: &[(Stock, Location)], meter: &Meter) -> Result<(), Error> {
        batch.par_iter().try_for_each_init(
            || Reader::new(self.shared, Check::Full),
            |reader, (stock, location)| match stock {
                Stock::Object(Tree::Regions, hash) => self.object(ObjectKind::Region, hash, reader).map(drop),
                Stock::Object(Tree::Objects, hash) => {
                    // The index does not say. Whatever is not even that is damaged.
                    let kind = reader.kind_at((*location).into())?.unwrap_or(ObjectKind::Table);
                    self.object(kind, hash, reader).map(drop)
                }
                Stock::Fact(kind, id) => self.fact(*kind, *id, *location, reader),
            },
        )?;
        Ok(meter.advance(batch.iter().map(|(_, location)| location.object_bytes()).sum())?)
    }

    /// Checks a record, note or tombstone, unless gc has moved it meanwhile.
    fn fact(
        &self,
        kind: ObjectKind,
        id: SnapshotId,
        location: Location,
        reader: &mut Reader<'_>,
    ) -> Result<(), StoreError> {
        let is_whole = reader.is_whole_at(location)?;
        if self.shared.log.pack(location.pack).is_none() {
            return Ok(());
        }
        self.count(location);
        if is_whole {
            return Ok(());
        }
        let Location { pack, offset_bytes, .. } = location;
        let (subject, snapshot) = match kind {
            ObjectKind::Record => {
                let needs_it = self.shared.catalog().live(&id).map(|_| id);
                (Subject::Object(kind, id.0), needs_it)
            }
            // Their hashes are known to nobody.
            _ => (Subject::Bytes { pack: names::file_name(pack), offset_bytes }, None),
        };
        let detail = format!(
            "a {kind} about the snapshot {id} in pack {pack} at byte {offset_bytes}: its bytes do not match its checks"
        );
        self.problem(subject, detail, snapshot);
        Ok(())
    }

    /// What the snapshots refer to and the index does not have.
    fn known_losses(&self, progress: &Progress) -> Result<(), Error> {
        let index = self.shared.index();
        let of = |tree| -> Result<Marks, Error> {
            let mut marks = Marks::of(index, tree)?;
            for entry in index.entries(tree) {
                marks.mark(&entry?.0);
            }
            Ok(marks)
        };
        let in_index =
            Intact { regions: of(Tree::Regions)?, objects: of(Tree::Objects)?, others: HashSet::new() };
        let snapshots: Vec<SnapshotId> = self.shared.catalog().all_live().map(|(id, _)| *id).collect();
        self.references(&snapshots, &in_index, &progress.begin(0))
    }

    /// Adds to the problems the snapshots that need these objects, which tells also of what kind they
    /// really are.
    fn who_needs(&self, damaged: &HashMap<Hash, ObjectKind>, meter: &Meter) -> Result<(), Error> {
        if damaged.is_empty() {
            return Ok(());
        }
        let mut reader = Reader::new(self.shared, Check::Full);
        let mut tables: HashMap<Hash, Vec<(ObjectKind, Hash)>> = HashMap::new();
        let snapshots: Vec<SnapshotId> = self.shared.catalog().all_live().map(|(id, _)| *id).collect();
        for id in snapshots {
            meter.advance(0)?;
            let Ok(record) = self.shared.record(id) else { continue };
            let mut needed: Vec<(ObjectKind, Hash)> = record
                .attachments
                .iter()
                .map(|attachment| (ObjectKind::Attachment, attachment.hash))
                .collect();
            let both = self.tables((id, &record), &mut reader, &mut |kind, hash| {
                needed.push((kind, hash));
                Ok(())
            })?;
            let of_snapshot = both.unwrap_or_default();
            needed.extend(of_snapshot.root.stored().iter().map(|(_, table)| (ObjectKind::Table, *table)));
            for (table, place) in of_snapshot.iter() {
                if let hash_map::Entry::Vacant(unseen) = tables.entry(table) {
                    let hashes = match reader.hashes(ObjectKind::Table, &table, place.regions) {
                        Err(error) if error.is_damage() => Vec::new(),
                        other => other?,
                    };
                    let regions = hashes.into_iter().map(|hash| (ObjectKind::Region, hash));
                    let wrong = regions.filter(|(_, hash)| damaged.contains_key(hash)).collect();
                    unseen.insert(wrong);
                }
                needed.extend(tables.get(&table).into_iter().flatten().copied());
            }
            for (kind, hash) in needed {
                let Some(guessed) = damaged.get(&hash) else { continue };
                if *guessed != kind {
                    let mut problems = self.problems.lock();
                    if let Some(problem) = problems.remove(&Subject::Object(*guessed, hash)) {
                        problems.insert(Subject::Object(kind, hash), problem);
                    }
                }
                self.missing(kind, hash, id);
            }
        }
        Ok(())
    }
}
