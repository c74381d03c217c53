//! Restore: turns a snapshot into memory again.
//!
//! It works in parallel over tables. Each region is read from its pack, checked, and decoded
//! directly into the target. If the target is zeros already, regions of zeros are skipped.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use memmap2::MmapMut;

use crate::address_space::AddressSpace;
use crate::error::{Error, MemoryError};
use crate::hash::Hash;
use crate::progress::{Meter, Progress};
use crate::record::SnapshotId;
use crate::sink::{SinkError, SparseFile};
use crate::store::packs::object::ObjectKind;
use crate::store::pinned::Pinned;
use crate::store::read::{Check, Reader};
use crate::store::tables::Tables;
use crate::store::{OpenStore, Store};
use crate::sys::map;
use crate::table::Place;
use crate::units::usize_of;
use crate::workers;

/// How much is decoded before it is written to a file: little enough to stay in the cache.
const WRITE_BYTES: usize = 256 << 10;

/// The number of bytes that are cleared at a time.
const CLEAR_BYTES: usize = 8 << 20;

/// A snapshot that is ready to be restored.
///
/// A restore produces its *image*: the bytes of all captured mappings, one after another in address
/// order. [`AddressSpace::captured`] gives the position of each mapping. Memory that was excluded
/// or could not be read is zeros.
///
/// ```
/// use stillframe::{CaptureOptions, Store};
/// # let dir = tempfile::tempdir()?;
/// # let store = Store::options().create(dir.path().join("vault"))?;
/// let taken = store.process("web-1").capture(&vec![7; 1 << 20], &CaptureOptions::new())?;
/// let mut memory = vec![0; 1 << 20];
/// store.restore(taken.id)?.into_slice(&mut memory)?;
/// assert_eq!(memory[5000], 7);
/// # let path = dir.path().join("image");
/// let stats = store.restore(taken.id)?.overwrite(true).into_file(&path)?;
/// assert_eq!(stats.bytes, 1 << 20);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct Restore<'a> {
    pub(crate) shared: &'a Arc<OpenStore>,
    pub(crate) pinned: Pinned,
    pub(crate) tables: Tables,
    pub(crate) check: Check,
    pub(crate) progress: Progress,
    pub(crate) overwrite: bool,
}

/// The result of a restore into a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[non_exhaustive]
pub struct RestoreStats {
    /// The length of the image.
    pub bytes: u64,
    /// How much of it was written; the rest are holes.
    pub written_bytes: u64,
}

impl Store {
    /// Prepares to restore a snapshot, reading its layout and root.
    ///
    /// # Errors
    ///
    /// [`NoSuchSnapshot`](crate::store::StoreError::NoSuchSnapshot);
    /// [`Damaged`](crate::store::StoreError::Damaged) or
    /// [`Missing`](crate::store::StoreError::Missing) if the layout or the root cannot be read.
    pub fn restore(&self, id: SnapshotId) -> Result<Restore<'_>, Error> {
        let shared = self.shared();
        let pinned = shared.pin(id)?;
        let tables = Tables::read(&mut Reader::new(shared, Check::Full), pinned.record())?;
        let (check, progress) = (Check::default(), Progress::default());
        Ok(Restore { shared, pinned, tables, check, progress, overwrite: false })
    }
}

impl Restore<'_> {
    /// Sets how thoroughly the stored bytes are checked.
    pub fn check(mut self, check: Check) -> Self {
        self.check = check;
        self
    }

    /// Sets a [`Progress`], which reports how far the restore is and can interrupt it.
    pub fn progress(mut self, progress: Progress) -> Self {
        self.progress = progress;
        self
    }

    /// Lets [`into_file`](Self::into_file) and [`into_core`](Self::into_core) replace a file that
    /// exists. No, unless set.
    pub fn overwrite(mut self, overwrite: bool) -> Self {
        self.overwrite = overwrite;
        self
    }

    /// The mappings.
    pub fn address_space(&self) -> &AddressSpace {
        self.tables.space()
    }

    /// The size of the image.
    pub fn image_bytes(&self) -> u64 {
        self.tables.space().image_bytes()
    }

    /// Restores the image into a fresh private mapping.
    ///
    /// Cost: 2.8 GB/s a core for decoding (AMD EPYC, 2 cores), plus populating the pages, in huge
    /// pages where the kernel grants them. Zeros cost nothing.
    ///
    /// # Errors
    ///
    /// [`MemoryError::Mapping`] if the image is empty or too large for this machine; damage.
    pub fn into_mapping(self) -> Result<MmapMut, Error> {
        let bytes = self.image_bytes();
        let length = usize_of(bytes);
        let mut mapping = map::map_zeros(length).map_err(|source| MemoryError::Mapping { bytes, source })?;
        self.fill(&mut mapping, false)?;
        Ok(mapping)
    }

    /// Restores the image into `target`, every byte of it.
    ///
    /// # Errors
    ///
    /// [`SinkError::Length`] unless the target is exactly as long as the image; nothing is written
    /// then. Damage; parts of the target may have been written then.
    pub fn into_slice(self, target: &mut [u8]) -> Result<(), Error> {
        let (expected_bytes, found_bytes) = (self.image_bytes(), target.len() as u64);
        if expected_bytes != found_bytes {
            return Err(SinkError::Length { expected_bytes, found_bytes }.into());
        }
        self.fill(target, true)
    }

    /// Restores the image into a new file, with holes where it is zeros. Only the owner may read
    /// the file, and it appears only when it is complete.
    ///
    /// # Errors
    ///
    /// [`SinkError::Exists`] if the file exists, unless [`overwrite`](Self::overwrite) allows
    /// replacing it; an error
    /// of the operating system; damage.
    pub fn into_file(self, path: impl AsRef<Path>) -> Result<RestoreStats, Error> {
        let bytes = self.image_bytes();
        let file = SparseFile::create(path.as_ref(), bytes, self.overwrite)?;
        let written_bytes = self.write_to(|bytes, offset_bytes| Ok(file.write_at(bytes, offset_bytes)?))?;
        file.finish()?;
        Ok(RestoreStats { bytes, written_bytes })
    }

    /// Passes all bytes that are not zeros to `write_at`, with their offset in the image, from many
    /// threads. Returns how many bytes these were.
    pub(crate) fn write_to(
        &self,
        write_at: impl Fn(&[u8], u64) -> Result<(), Error> + Sync,
    ) -> Result<u64, Error> {
        let work: Vec<(Hash, Place)> = self.tables.iter().collect();
        let meter = self.progress.begin(work.iter().map(|(_, place)| place.length_bytes as u64).sum());
        let region_bytes = self.pinned.record().region_size.bytes();
        let written_bytes = AtomicU64::new(0);
        let start = || (Reader::new(self.shared, self.check), vec![0; WRITE_BYTES.max(region_bytes)]);
        let write = |(reader, buffer): &mut (Reader<'_>, Vec<u8>), (hash, place): (Hash, Place)| {
            let hashes = reader.hashes(ObjectKind::Table, &hash, place.regions)?;
            let mut region = 0;
            for part in hashes.chunks(buffer.len() / region_bytes) {
                // One write for each run of non-zero regions.
                for run in part.chunk_by(|a, b| a.is_zero() == b.is_zero()) {
                    let first_bytes = region * region_bytes;
                    region += run.len();
                    let run_bytes = place.length_bytes.min(region * region_bytes) - first_bytes;
                    if run[0].is_zero() {
                        continue;
                    }
                    let run_of_bytes = &mut buffer[..run_bytes];
                    reader.regions(run, run_of_bytes, region_bytes, true)?;
                    write_at(run_of_bytes, place.image_bytes + first_bytes as u64)?;
                    written_bytes.fetch_add(run_bytes as u64, Ordering::Relaxed);
                }
            }
            Ok::<_, Error>(meter.advance(place.length_bytes as u64)?)
        };
        workers::for_each(work, start, write)?;
        Ok(written_bytes.into_inner())
    }

    /// Decodes everything into `target`, whose length is that of the image. Without `clear_zeros`,
    /// the target must be zeros already.
    pub(crate) fn fill(&self, target: &mut [u8], clear_zeros: bool) -> Result<(), Error> {
        let mut rest = target;
        let mut rest_bytes = 0;
        let mut work = Vec::new();
        let mut zeros: Vec<&mut [u8]> = Vec::new();
        for (hash, place) in self.tables.iter() {
            let gap_bytes = usize_of(place.image_bytes - rest_bytes);
            let (gap, after) = rest.split_at_mut(gap_bytes);
            let (part, after) = after.split_at_mut(place.length_bytes);
            zeros.push(gap);
            work.push((hash, place.regions, part));
            (rest, rest_bytes) = (after, place.image_bytes + place.length_bytes as u64);
        }
        zeros.push(rest);
        let length = |target: &[u8]| target.len() as u64;
        let cleared_bytes = zeros.iter().map(|gap| if clear_zeros { length(gap) } else { 0 }).sum::<u64>();
        let meter =
            self.progress.begin(cleared_bytes + work.iter().map(|(_, _, part)| length(part)).sum::<u64>());
        if clear_zeros {
            let parts: Vec<_> = zeros.into_iter().flat_map(|gap| gap.chunks_mut(CLEAR_BYTES)).collect();
            workers::for_each(
                parts,
                || (),
                |(), part: &mut [u8]| {
                    part.fill(0);
                    meter.advance(length(part))
                },
            )?;
        }
        let start = || Reader::new(self.shared, self.check);
        workers::for_each(work, start, |reader, (hash, regions, part)| {
            self.fill_table(reader, &hash, regions, part, clear_zeros, &meter)
        })
    }

    fn fill_table(
        &self,
        reader: &mut Reader<'_>,
        hash: &Hash,
        regions: usize,
        target: &mut [u8],
        clear_zeros: bool,
        meter: &Meter,
    ) -> Result<(), Error> {
        let hashes = reader.hashes(ObjectKind::Table, hash, regions)?;
        reader.regions(&hashes, target, self.pinned.record().region_size.bytes(), clear_zeros)?;
        Ok(meter.advance(target.len() as u64)?)
    }
}
