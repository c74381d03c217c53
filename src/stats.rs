//! Stats: what a store holds and what it saves.

use crate::error::Error;
use crate::store::Store;
use crate::store::tree::Tree;
use crate::sys::file;

/// What a store holds. All sizes are bytes.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize)]
#[non_exhaustive]
pub struct Stats {
    /// How many snapshots there are.
    pub snapshots: u64,
    /// How many processes they are of.
    pub processes: u64,
    /// What all snapshots would take as raw images.
    pub logical_bytes: u64,
    /// How much of that is zeros.
    pub zero_bytes: u64,
    /// The distinct regions, uncompressed.
    pub unique_bytes: u64,
    /// The distinct regions as they are stored, with their headers.
    pub stored_bytes: u64,
    /// What the index takes on the disk.
    pub index_bytes: u64,
    /// What the whole store takes on the disk.
    pub disk_bytes: u64,
    /// How many distinct regions there are.
    pub regions: u64,
    /// How many of them are stored as a difference from another.
    pub deltas: u64,
    /// Logical bytes that are not zeros, for each unique byte.
    pub dedup_ratio: f64,
    /// Unique bytes for each stored byte.
    pub compression_ratio: f64,
}

impl Store {
    /// What the store holds, also what is forgotten and not yet collected.
    ///
    /// Cost: reads the index, a tenth of a second for a million regions.
    ///
    /// # Errors
    ///
    /// When the index cannot be read.
    pub fn stats(&self) -> Result<Stats, Error> {
        let shared = self.shared();
        shared.check_process()?;
        shared.settle_all();
        let (mut snapshots, mut logical_bytes, mut zero_bytes) = (0, 0, 0);
        let processes = {
            let catalog = shared.catalog();
            for (_, entry) in catalog.all_live() {
                snapshots += 1;
                // What records claim may be anything.
                let record = entry.record();
                logical_bytes = u64::saturating_add(logical_bytes, record.memory_bytes);
                zero_bytes = u64::saturating_add(zero_bytes, record.zero_bytes);
            }
            catalog.processes().count() as u64
        };
        let (mut regions, mut deltas, mut unique_bytes, mut stored_bytes) = (0, 0, 0, 0);
        let index = shared.index();
        for entry in index.entries(Tree::Regions) {
            let (_, location) = entry?;
            regions += 1;
            deltas += u64::from(location.is_delta());
            unique_bytes += u64::from(location.plain_bytes);
            stored_bytes += location.object_bytes();
        }
        Ok(Stats {
            snapshots,
            processes,
            logical_bytes,
            zero_bytes,
            unique_bytes,
            stored_bytes,
            index_bytes: index.disk_bytes(),
            disk_bytes: file::disk_bytes(&shared.dir).unwrap_or(0),
            regions,
            deltas,
            dedup_ratio: ratio(logical_bytes - zero_bytes, unique_bytes),
            compression_ratio: ratio(unique_bytes, stored_bytes),
        })
    }
}

/// `part` for each of `whole`; 1 where there is nothing.
#[allow(clippy::cast_precision_loss)] // A ratio of sizes is read to three digits.
fn ratio(part: u64, whole: u64) -> f64 {
    if whole == 0 { 1.0 } else { part as f64 / whole as f64 }
}
