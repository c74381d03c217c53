//! The tables of a capture: the hashes of worked-on regions come together in them, and what the store
//! lacks of the regions and of the tables is stored.

use std::collections::HashSet;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

use super::{Ingest, Worker, lock, total_bytes};
use crate::error::Error;
use crate::hash::{self, Hash};
use crate::piece::Piece;
use crate::put::{Put, base};
use crate::region::is_zero;
use crate::store::error::StoreError;
use crate::store::packs::object::Kind;
use crate::store::tree::Tree;
use crate::table::{self, Place};
use crate::units::RegionSize;

/// One table being filled.
pub(super) struct TableJob {
    /// Which table of the root.
    pub(super) at: usize,
    pub(super) place: Place,
    /// The reference's table in the same place.
    pub(super) reference: Hash,
    /// How much memory the reference's table covers.
    pub(super) reference_bytes: usize,
    pub(super) state: Mutex<TableState>,
}

#[derive(Default)]
pub(super) struct TableState {
    pub(super) pieces_left: usize,
    pub(super) hashes: Vec<Hash>,
    pub(super) reference_hashes: Option<Arc<Vec<Hash>>>,
    pub(super) done: Option<Hash>,
}

/// A region that is not what the reference has in its place.
struct Changed {
    /// Which of those that stand side by side.
    at: usize,
    hash: Hash,
    /// The all-zero hash where the reference has nothing.
    in_its_place: Hash,
}

impl Ingest {
    /// Hashes regions of a piece, whose bytes stand side by side, stores what the store lacks of them,
    /// and enters them into their table.
    pub(super) fn take(
        &self,
        piece: &Piece,
        regions: &[usize],
        bytes: &[u8],
        worker: &mut Worker<'_>,
    ) -> Result<(), Error> {
        let table = &self.tables[piece.table];
        let hashes = hashes_of(bytes, self.region_size);
        let reference = self.reference_hashes(table, worker)?;
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
        let mut state = lock(&table.state);
        if state.hashes.is_empty() {
            state.hashes = self.begin_table(table, reference.as_deref());
        }
        for (region, hash) in regions.iter().zip(&hashes) {
            state.hashes[*region] = *hash;
        }
        state.pieces_left -= 1;
        if state.pieces_left == 0 {
            self.finish_table(piece.table, &mut state, worker)?;
        }
        drop(state);
        Ok(self.meter.advance(total_bytes(&self.wanted_of(piece).collect::<Vec<_>>()) as u64)?)
    }

    /// The hashes of a table before the first of its pieces: zeros, or the parent's where only what
    /// changed is entered.
    fn begin_table(&self, table: &TableJob, reference: Option<&Vec<Hash>>) -> Vec<Hash> {
        let mut hashes = vec![Hash::ZERO; table.place.regions];
        if self.changed.is_none() {
            return hashes;
        }
        for (hash, reference) in hashes.iter_mut().zip(reference.into_iter().flatten()) {
            *hash = *reference;
        }
        let region_bytes = self.region_size.bytes();
        let zero_bytes: usize = (0..table.reference_bytes.div_ceil(region_bytes))
            .filter(|at| hashes[*at].is_zero())
            .map(|at| region_bytes.min(table.reference_bytes - at * region_bytes))
            .sum();
        self.parent_zero_bytes.fetch_add(zero_bytes as u64, Ordering::Relaxed);
        hashes
    }

    /// The hashes of the reference's table in the same place. Read once a table.
    pub(super) fn reference_hashes(
        &self,
        table: &TableJob,
        worker: &mut Worker<'_>,
    ) -> Result<Option<Arc<Vec<Hash>>>, Error> {
        if table.reference.is_zero() {
            return Ok(None);
        }
        let mut state = lock(&table.state);
        if state.reference_hashes.is_none() {
            let hashes = self.read_reference(table, worker)?;
            let expected = table.reference_bytes.div_ceil(self.region_size.bytes());
            if self.changed.is_some() && hashes.len() != expected {
                // What did not change cannot be taken over from what cannot be read.
                return Err(StoreError::Missing { kind: Kind::Table, hash: table.reference }.into());
            }
            state.reference_hashes = Some(Arc::new(hashes));
        }
        Ok(state.reference_hashes.clone())
    }

    /// Reads the reference's table in the same place. It has another length if its mapping had, and
    /// none if it is damaged: then everything is looked up, and found or stored anew.
    fn read_reference(&self, table: &TableJob, worker: &mut Worker<'_>) -> Result<Vec<Hash>, Error> {
        let bytes = match worker.reader.object(Kind::Table, &table.reference) {
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
            let start = it.at * self.region_size.bytes();
            let plain = &bytes[start..bytes.len().min(start + self.region_size.bytes())];
            let base = match deltas {
                true => base(&mut worker.reader, Kind::Region, &it.in_its_place, &mut worker.base)?,
                false => None,
            };
            worker.batch.push(Kind::Region, self.store_as.codec, it.hash, plain, base);
        }
        let appended = self.shared.append(&mut worker.batch)?;
        self.new_regions.fetch_add(appended.objects - appended.deltas, Ordering::Relaxed);
        self.delta_regions.fetch_add(appended.deltas, Ordering::Relaxed);
        self.shared_regions.fetch_add(changed.len() as u64 - appended.objects, Ordering::Relaxed);
        self.added_bytes.fetch_add(appended.bytes, Ordering::Relaxed);
        Ok(())
    }

    /// Counts and stores a table all of whose regions are entered.
    pub(super) fn finish_table(
        &self,
        at: usize,
        state: &mut TableState,
        worker: &mut Worker<'_>,
    ) -> Result<(), Error> {
        let table = &self.tables[at];
        let reference = match state.reference_hashes.take() {
            Some(reference) => reference,
            None => Arc::new(self.read_reference(table, worker)?),
        };
        let hashes = std::mem::take(&mut state.hashes);
        let (mut zero_bytes, mut changed_regions, mut shared_regions) = (0, 0, 0);
        for (region, hash) in hashes.iter().enumerate() {
            let start = region * self.region_size.bytes();
            if hash.is_zero() {
                zero_bytes += self.region_size.bytes().min(table.place.length_bytes - start) as u64;
            }
            let same = *hash == reference.get(region).copied().unwrap_or(Hash::ZERO);
            if self.has_parent {
                changed_regions += u64::from(!same);
            } else if !hash.is_zero() {
                changed_regions += 1;
                shared_regions += u64::from(same);
            }
        }
        self.zero_bytes.fetch_add(zero_bytes, Ordering::Relaxed);
        self.changed_regions.fetch_add(changed_regions, Ordering::Relaxed);
        self.shared_regions.fetch_add(shared_regions, Ordering::Relaxed);
        let done = if hashes.iter().all(Hash::is_zero) {
            Hash::ZERO
        } else {
            let bytes = table::encode(&hashes);
            let hash = Hash::of(&bytes);
            // A reference without hashes could not be read.
            if hash != table.reference || reference.is_empty() {
                let like = Some(table.reference).filter(|_| !reference.is_empty());
                let added_bytes = self.put().object(&mut worker.reader, Kind::Table, hash, &bytes, like)?;
                self.added_bytes.fetch_add(added_bytes, Ordering::Relaxed);
            }
            hash
        };
        state.done = Some(done);
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
