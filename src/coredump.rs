//! Restores a snapshot into a core dump: an ELF core file that debuggers open.
//!
//! `sink/core.rs` builds the content of the file. This module finds the parts of the image that are
//! zeros for long enough to be left out of the file, and writes the others.

use std::ops::Range;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::error::Error;
use crate::record::Origin;
use crate::restore::Restore;
use crate::sink::SparseFile;
use crate::sink::core::{About, Head};
use crate::store::error::StoreError;
use crate::store::packs::object::ObjectKind;
use crate::store::read::{Check, Reader};
use crate::threads::{self, Threads};
use crate::units::usize_of;

/// Runs of zeros of at least this length are left out of the file. A shorter run is a hole in the
/// file, because each separate part costs a segment.
const LONG_ZEROS_BYTES: u64 = 1 << 20;

/// The result of a restore into a core file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[non_exhaustive]
pub struct CoreStats {
    /// The length of the file.
    pub bytes: u64,
    /// How much of it was written; the rest are holes.
    pub written_bytes: u64,
    /// The number of its threads.
    pub threads: usize,
}

impl Restore<'_> {
    /// Writes an ELF core file, which debuggers open. It holds the memory and, if the snapshot has
    /// them, the registers of each thread, the auxiliary vector, and which files were mapped where.
    /// Only the owner may read the file, and it appears only when it is complete. Where memory is
    /// zeros, the file has holes.
    ///
    /// A snapshot without threads (of a file or of bytes) becomes a core file without threads: a
    /// debugger shows its memory and nothing else. Memory that was excluded or could not be read is
    /// not in the core file, so that nobody takes it for zeros. Memory that is zeros for 1 MiB or
    /// more takes no space in the file, not even in its length: an address space of terabytes
    /// becomes a core file of its content.
    ///
    /// Cost: as [`into_file`](Self::into_file).
    ///
    /// ```
    /// use stillframe::{CaptureOptions, Store};
    /// use stillframe::source::LiveProcessSource;
    /// # let dir = tempfile::tempdir()?;
    /// # let store = Store::options().create(dir.path().join("vault"))?;
    /// # let mut child = std::process::Command::new("sleep").arg("60").spawn()?;
    /// # let pid = child.id();
    /// let source = LiveProcessSource::new(pid);
    /// let taken = store.process("web-1").capture(&source, &CaptureOptions::default())?;
    /// let core = dir.path().join("web-1.core");
    /// let stats = store.restore(taken.id)?.into_core(&core)?;
    /// assert_eq!(stats.threads, 1);
    /// // gdb /path/to/program web-1.core
    /// # child.kill()?;
    /// # child.wait()?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// As [`into_file`](Self::into_file); [`SinkError::Core`](crate::sink::SinkError::Core) if the
    /// registers are not those of a 64-bit program.
    pub fn into_core(self, path: impl AsRef<Path>) -> Result<CoreStats, Error> {
        let mut reader = Reader::new(self.shared, Check::Full);
        let threads = match reader.attachment(self.pinned.record(), Threads::ATTACHMENT)? {
            None => None,
            Some(bytes) => Some(
                Threads::from_attachment(&bytes)
                    .map_err(|source| StoreError::Record { kind: ObjectKind::Attachment, source })?,
            ),
        };
        let auxv = reader.attachment(self.pinned.record(), threads::AUXV)?.unwrap_or_default();
        let register_layout =
            reader.attachment(self.pinned.record(), threads::REGISTER_LAYOUT)?.unwrap_or_default();
        let command = match &self.pinned.record().origin {
            Origin::LiveProcess { command, .. } | Origin::Core { command, .. } => command.join(" "),
            _ => String::new(),
        };
        let thread_count = threads.as_ref().map_or(0, |threads| threads.threads.len());
        let about = About { threads, auxv, command, register_layout };
        let head = Head::new(self.tables.space(), &self.long_zeros(&mut reader)?, about)?;
        let file = SparseFile::create(path.as_ref(), head.file_bytes, self.overwrite)?;
        file.write_at(&head.bytes, 0)?;
        // Memory that was left out of the image is not written.
        let written_bytes = AtomicU64::new(head.bytes.len() as u64);
        let write = |bytes: &[u8], offset_bytes: u64| -> Result<(), Error> {
            for part in head.parts_in(offset_bytes..offset_bytes + bytes.len() as u64) {
                // Inside `bytes`, which is in memory.
                let at = |image: u64| usize_of(image - offset_bytes);
                file.write_at(&bytes[at(part.image.start)..at(part.image.end)], part.at_bytes)?;
                written_bytes.fetch_add(part.image.end - part.image.start, Ordering::Relaxed);
            }
            Ok(())
        };
        self.write_to(write)?;
        file.finish()?;
        let written_bytes = written_bytes.into_inner();
        Ok(CoreStats { bytes: head.file_bytes, written_bytes, threads: thread_count })
    }

    /// The long runs of zeros in the image, sorted and disjoint.
    fn long_zeros(&self, reader: &mut Reader<'_>) -> Result<Vec<Range<u64>>, Error> {
        let mut zeros: Vec<Range<u64>> = Vec::new();
        let mut add = |next: Range<u64>| match zeros.last_mut() {
            Some(last) if last.end == next.start => last.end = next.end,
            Some(last) if last.end - last.start < LONG_ZEROS_BYTES => *last = next,
            _ => zeros.push(next),
        };
        let region_bytes = self.pinned.record().region_size.bytes() as u64;
        // The image has been searched up to here. Between stored tables there are tables of zeros.
        let mut at = 0;
        for (hash, place) in self.tables.iter() {
            self.progress.check()?;
            if at < place.image_bytes {
                add(at..place.image_bytes);
            }
            let end = place.image_bytes + place.length_bytes as u64;
            at = place.image_bytes;
            for hash in reader.hashes(ObjectKind::Table, &hash, place.regions)? {
                let next = end.min(at + region_bytes);
                if hash.is_zero() {
                    add(at..next);
                }
                at = next;
            }
        }
        if at < self.image_bytes() {
            add(at..self.image_bytes());
        }
        zeros.retain(|zeros| zeros.end - zeros.start >= LONG_ZEROS_BYTES);
        Ok(zeros)
    }
}
