//! The tables of a capture: the hashes of worked-on regions come together in them, and what the store
//! lacks of the regions and of the tables is stored. Whichever worker enters the last piece of a table stores it.

use std::collections::HashSet;
use std::sync::Arc;

use super::counts::CaptureCounts;
use super::piece::Piece;
use super::plan::{Plan, PlannedTable};
use super::put::{Put, StoreAs, base};
use super::worker::Worker;
use crate::error::Error;
use crate::hash::{self, Hash};
use crate::region::is_zero;
use crate::root::Root;
use crate::store::Shared;
use crate::store::error::StoreError;
use crate::store::gate::CaptureGuard;
use crate::store::packs::object::ObjectKind;
use crate::store::tree::Tree;
use crate::sync::Mutex;
use crate::table;
use crate::units::RegionSize;

/// The tables of one capture, and the store that they go into.
pub(super) struct Tables {
    pub(super) shared: Arc<Shared>,
    /// What was found or stored is pinned as long as this is there.
    guard: CaptureGuard,
    store_as: StoreAs,
    /// Whether what memory is compared with is the parent, and not only a snapshot like it.
    has_parent: bool,
    pub(super) plan: Plan,
    /// Of each table of the plan how far it is.
    progress: Vec<Mutex<TableProgress>>,
    counts: Mutex<CaptureCounts>,
}

/// How far one table is.
#[derive(Default)]
struct TableProgress {
    pieces_left: usize,
    /// Empty until the first piece is entered.
    hashes: Vec<Hash>,
    reference_hashes: Option<Arc<Vec<Hash>>>,
    /// Its hash, once all is entered.
    done: Option<Hash>,
}

/// A region that is not what the reference has in its place.
struct Changed {
    /// Which of those that stand side by side.
    at: usize,
    hash: Hash,
    /// The all-zero hash where the reference has nothing.
    in_its_place: Hash,
}

impl Tables {
    /// `parent_zero_bytes`: how many zeros the parent has, if tables are taken over from it.
    pub(super) fn new(
        (shared, guard, store_as): (Arc<Shared>, CaptureGuard, StoreAs),
        plan: Plan,
        has_parent: bool,
        parent_zero_bytes: u64,
    ) -> Tables {
        let progress = (0..plan.tables.len()).map(|at| {
            Mutex::new(TableProgress { pieces_left: plan.pieces_of(at).count(), ..TableProgress::default() })
        });
        let zero_bytes = parent_zero_bytes.saturating_add(plan.zero_bytes);
        let counts = CaptureCounts { zero_bytes, ..CaptureCounts::default() };
        Tables {
            shared,
            guard,
            store_as,
            has_parent,
            progress: progress.collect(),
            counts: Mutex::new(counts),
            plan,
        }
    }

    /// The root, once every piece is entered.
    pub(super) fn finish(self) -> Result<(Root, CaptureCounts, CaptureGuard), Error> {
        // What became zeros has no piece that would finish it.
        let mut worker = Worker::new(&self.shared);
        for (table, progress) in self.plan.tables.iter().zip(&self.progress) {
            let mut progress = progress.lock();
            if progress.done.is_none() {
                progress.hashes = vec![Hash::ZERO; table.place.regions];
                self.finish_table(table, &mut progress, &mut worker)?;
            }
        }
        drop(worker);
        let done = self.progress.iter().map(|progress| progress.lock().done.unwrap_or(Hash::ZERO));
        let done = self.plan.tables.iter().map(|table| table.at).zip(done);
        let root =
            Root::new(self.plan.root_tables, done.chain(self.plan.taken_over.iter().copied()).collect());
        let counts = *self.counts.lock();
        Ok((root, counts, self.guard))
    }

    /// Hashes regions of a piece, whose bytes stand side by side, stores what the store lacks of them,
    /// and enters them into their table.
    pub(super) fn enter(
        &self,
        piece: &Piece,
        regions: &[usize],
        bytes: &[u8],
        worker: &mut Worker<'_>,
    ) -> Result<(), Error> {
        let table = &self.plan.tables[piece.table];
        let hashes = hashes_of(bytes, self.plan.region_size);
        let reference = self.reference_hashes(piece.table, worker)?;
        let in_its_place =
            |region: usize| reference.as_ref().and_then(|reference| reference.get(region)).copied();
        let changed: Vec<Changed> = hashes
            .iter()
            .zip(regions)
            .enumerate()
            .map(|(at, (hash, region))| Changed {
                at,
                hash: *hash,
                in_its_place: in_its_place(*region).unwrap_or(Hash::ZERO),
            })
            .filter(|it| !it.hash.is_zero() && it.hash != it.in_its_place)
            .collect();
        if !changed.is_empty() {
            self.store_regions(bytes, &changed, worker)?;
        }
        let mut progress = self.progress[piece.table].lock();
        if progress.hashes.is_empty() {
            progress.hashes = self.begin_table(table, reference.as_deref());
        }
        for (region, hash) in regions.iter().zip(&hashes) {
            progress.hashes[*region] = *hash;
        }
        progress.pieces_left -= 1;
        if progress.pieces_left == 0 {
            self.finish_table(table, &mut progress, worker)?;
        }
        Ok(())
    }

    /// The hashes of a table before the first of its pieces: zeros, or the parent's where only what
    /// changed is entered.
    fn begin_table(&self, table: &PlannedTable, reference: Option<&Vec<Hash>>) -> Vec<Hash> {
        let mut hashes = vec![Hash::ZERO; table.place.regions];
        if !self.plan.is_tracked() {
            return hashes;
        }
        for (hash, reference) in hashes.iter_mut().zip(reference.into_iter().flatten()) {
            *hash = *reference;
        }
        let region_bytes = self.plan.region_size.bytes();
        let zero_bytes: usize = (0..table.reference_bytes.div_ceil(region_bytes))
            .filter(|at| hashes[*at].is_zero())
            .map(|at| region_bytes.min(table.reference_bytes - at * region_bytes))
            .sum();
        // Among those of the parent; those of this snapshot are counted when it is finished.
        let mut counts = self.counts.lock();
        counts.zero_bytes = counts.zero_bytes.saturating_sub(zero_bytes as u64);
        hashes
    }

    /// The hashes of the reference's table in the same place. Read once a table.
    pub(super) fn reference_hashes(
        &self,
        table_index: usize,
        worker: &mut Worker<'_>,
    ) -> Result<Option<Arc<Vec<Hash>>>, Error> {
        let table = &self.plan.tables[table_index];
        if table.reference.is_zero() {
            return Ok(None);
        }
        let mut progress = self.progress[table_index].lock();
        if progress.reference_hashes.is_none() {
            let hashes = self.read_reference(table, worker)?;
            let expected = table.reference_bytes.div_ceil(self.plan.region_size.bytes());
            if self.plan.is_tracked() && hashes.len() != expected {
                // What did not change cannot be taken over from what cannot be read.
                return Err(StoreError::Missing { kind: ObjectKind::Table, hash: table.reference }.into());
            }
            progress.reference_hashes = Some(Arc::new(hashes));
        }
        Ok(progress.reference_hashes.clone())
    }

    /// Reads the reference's table in the same place. It has another length if its mapping had, and
    /// none if it is damaged: then everything is looked up, and found or stored anew.
    fn read_reference(&self, table: &PlannedTable, worker: &mut Worker<'_>) -> Result<Vec<Hash>, Error> {
        let bytes = match worker.reader.object(ObjectKind::Table, &table.reference) {
            Ok(bytes) => bytes,
            Err(error) if error.is_damage() => {
                tracing::warn!("{}", error.whole_story());
                // Its own bytes are wanted again too, should this table be the same.
                self.shared.forget_culprit(&error);
                Vec::new()
            }
            Err(error) => return Err(error.into()),
        };
        let regions = bytes.len() / Hash::BYTES;
        Ok(table::decode(&bytes, regions).unwrap_or_default())
    }

    fn put(&self) -> Put<'_> {
        Put { shared: &self.shared, guard: &self.guard, store_as: self.store_as }
    }

    /// Appends those of the changed regions that the store lacks.
    fn store_regions(&self, bytes: &[u8], changed: &[Changed], worker: &mut Worker<'_>) -> Result<(), Error> {
        let wanted: Vec<Hash> = changed.iter().map(|it| it.hash).collect();
        let known = self.put().known(&mut worker.reader, Tree::Regions, &wanted)?;
        // Asked after the look-up: what is damaged is made known before it is found no more.
        let deltas = self.store_as.deltas && !self.shared.damage_known();
        worker.batch.clear();
        let mut seen = HashSet::new();
        for (it, known) in changed.iter().zip(known) {
            if known || !seen.insert(it.hash) {
                continue;
            }
            let start = it.at * self.plan.region_size.bytes();
            let plain = &bytes[start..bytes.len().min(start + self.plan.region_size.bytes())];
            let base = if deltas {
                base(&mut worker.reader, ObjectKind::Region, &it.in_its_place, &mut worker.base)?
            } else {
                None
            };
            worker.batch.push(ObjectKind::Region, self.store_as.codec, it.hash, plain, base);
        }
        let appended = self.shared.append(&mut worker.batch)?;
        *self.counts.lock() += CaptureCounts {
            new_regions: appended.objects - appended.deltas,
            delta_regions: appended.deltas,
            shared_regions: changed.len() as u64 - appended.objects,
            added_bytes: appended.bytes,
            ..CaptureCounts::default()
        };
        Ok(())
    }

    /// Counts and stores a table all of whose regions are entered.
    fn finish_table(
        &self,
        table: &PlannedTable,
        progress: &mut TableProgress,
        worker: &mut Worker<'_>,
    ) -> Result<(), Error> {
        let reference = match progress.reference_hashes.take() {
            Some(reference) => reference,
            None => Arc::new(self.read_reference(table, worker)?),
        };
        let hashes = std::mem::take(&mut progress.hashes);
        let mut counts = CaptureCounts::default();
        for (region, hash) in hashes.iter().enumerate() {
            let start = region * self.plan.region_size.bytes();
            if hash.is_zero() {
                counts.zero_bytes +=
                    self.plan.region_size.bytes().min(table.place.length_bytes - start) as u64;
            }
            let same = *hash == reference.get(region).copied().unwrap_or(Hash::ZERO);
            if self.has_parent {
                counts.changed_regions += u64::from(!same);
            } else if !hash.is_zero() {
                counts.changed_regions += 1;
                counts.shared_regions += u64::from(same);
            }
        }
        let done = if hashes.iter().all(Hash::is_zero) {
            Hash::ZERO
        } else {
            let bytes = table::encode(&hashes);
            let hash = Hash::of(&bytes);
            // A reference without hashes could not be read.
            if hash != table.reference || reference.is_empty() {
                let like = Some(table.reference).filter(|_| !reference.is_empty());
                counts.added_bytes +=
                    self.put().object(&mut worker.reader, ObjectKind::Table, hash, &bytes, like)?;
            }
            hash
        };
        progress.done = Some(done);
        *self.counts.lock() += counts;
        Ok(())
    }
}

/// The hashes of regions side by side.
fn hashes_of(bytes: &[u8], region_size: RegionSize) -> Vec<Hash> {
    let regions: Vec<&[u8]> = bytes.chunks(region_size.bytes()).collect();
    let occupied: Vec<usize> = (0..regions.len()).filter(|at| !is_zero(regions[*at])).collect();
    let found = hash::many(&occupied.iter().map(|at| regions[*at]).collect::<Vec<_>>());
    let mut hashes = vec![Hash::ZERO; regions.len()];
    for (at, hash) in occupied.into_iter().zip(found) {
        hashes[at] = hash;
    }
    hashes
}
