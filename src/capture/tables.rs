//! The tables of a capture. Workers enter the hashes of their regions here, and store the regions
//! and tables that the store lacks. The worker that enters the last piece of a table stores the
//! table.

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
use crate::store::OpenStore;
use crate::store::error::StoreError;
use crate::store::gate::CaptureGuard;
use crate::store::packs::object::ObjectKind;
use crate::store::tree::Tree;
use crate::sync::Mutex;
use crate::table;
use crate::units::RegionSize;

/// The tables of one capture, and the store that they are written to.
pub(super) struct Tables {
    pub(super) shared: Arc<OpenStore>,
    /// Pins what the capture finds or stores, while this value exists.
    guard: CaptureGuard,
    store_as: StoreAs,
    /// Whether the reference is the parent. Otherwise it is a similar snapshot.
    has_parent: bool,
    pub(super) plan: Plan,
    /// The progress of each table of the plan.
    progress: Vec<Mutex<TableProgress>>,
    counts: Mutex<CaptureCounts>,
}

/// The progress of one table.
#[derive(Default)]
struct TableProgress {
    pieces_left: usize,
    /// The hashes of its regions. Empty until the first piece is entered.
    hashes: Vec<Hash>,
    reference_hashes: Option<Arc<Vec<Hash>>>,
    /// Its own hash, once all pieces are entered.
    done: Option<Hash>,
}

/// A region that differs from the reference's region in its place.
struct Changed {
    /// The index of the region among those side by side in the buffer.
    at: usize,
    hash: Hash,
    /// The hash of the reference's region; the all-zero hash if the reference has none.
    in_its_place: Hash,
}

impl Tables {
    /// `parent_zero_bytes` is how many bytes of zeros the parent has, if tables are taken over from
    /// it.
    pub(super) fn new(
        (shared, guard, store_as): (Arc<OpenStore>, CaptureGuard, StoreAs),
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

    /// The root. All pieces must be entered.
    pub(super) fn finish(self) -> Result<(Root, CaptureCounts, CaptureGuard), Error> {
        // A table that became zeros has no piece that would finish it.
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

    /// Hashes regions of a piece, whose bytes lie side by side. Stores those that the store lacks,
    /// and enters all into their table.
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

    /// The initial hashes of a table: zeros, or the parent's hashes if only changes are entered.
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
        // The parent's zeros include these; those of this snapshot are counted when the table is
        // finished.
        let mut counts = self.counts.lock();
        counts.zero_bytes = counts.zero_bytes.saturating_sub(zero_bytes as u64);
        hashes
    }

    /// The hashes of the reference's table in the same place. They are read once for each table.
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
                // Unchanged regions cannot be taken over from a table that cannot be read.
                return Err(StoreError::Missing { kind: ObjectKind::Table, hash: table.reference }.into());
            }
            progress.reference_hashes = Some(Arc::new(hashes));
        }
        Ok(progress.reference_hashes.clone())
    }

    /// Reads the reference's table in the same place. Its length differs if the mapping's length
    /// did. If the table is damaged the result is empty: every region is then looked up, and found
    /// or stored again.
    fn read_reference(&self, table: &PlannedTable, worker: &mut Worker<'_>) -> Result<Vec<Hash>, Error> {
        let bytes = match worker.reader.object(ObjectKind::Table, &table.reference) {
            Ok(bytes) => bytes,
            Err(error) if error.is_damage() => {
                tracing::warn!("{}", error.whole_story());
                // If this table has the same hash, its bytes must be stored again too.
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
        // Read after the look-up: damage is recorded before the damaged object is removed from the
        // index.
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
            // The reference's table was not read if it has no hashes.
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

/// The hashes of regions that lie side by side.
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
