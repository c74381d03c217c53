//! Restore into a core: a snapshot becomes a file that debuggers open.
//!
//! What stands in it is in `sink/core.rs`. Here is which parts of the image are zeros for so long that they are left
//! out of the file, and the writing of the others.

use std::ops::Range;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::error::Error;
use crate::record::Origin;
use crate::restore::Restore;
use crate::sink::SparseFile;
use crate::sink::core::{About, Head};
use crate::store::error::StoreError;
use crate::store::packs::object::Kind;
use crate::store::read::{Check, Reader};
use crate::threads::{self, Threads};
use crate::units::usize_of;

/// So many zeros are left out of the file. What is shorter is a hole in it, as each part that is there costs a segment.
const LONG_ZEROS_BYTES: u64 = 1 << 20;

/// What a restore into a core file did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct CoreStats {
    /// The length of the file.
    pub bytes: u64,
    /// How much of it was written; the rest are holes.
    pub written_bytes: u64,
    /// How many threads it has.
    pub threads: usize,
}

impl Restore<'_> {
    /// Writes an ELF core file, which debuggers open: the memory, and if the snapshot has them the
    /// registers of each thread, the auxiliary vector and which files were mapped where. Only
    /// the owner may read the file, and it is there only when it is complete. Where memory is zeros it
    /// has holes.
    ///
    /// A snapshot without threads, of a file or of bytes, becomes a core without threads: a debugger shows
    /// its memory and nothing else. What was excluded or could not be read is not in the core, so that
    /// nobody takes it for zeros. Memory that is zeros for a MiB or more takes up nothing of the file, not even of its length: an
    /// address space of terabytes becomes a core of what is in it.
    ///
    /// Cost: as [`into_file`](Self::into_file).
    ///
    /// ```
    /// use stillframe::{CaptureOptions, ProcessSource, Store};
    /// # let dir = tempfile::tempdir()?;
    /// # let store = Store::options().create(dir.path().join("vault"))?;
    /// # let mut child = std::process::Command::new("sleep").arg("60").spawn()?;
    /// # let pid = child.id();
    /// let taken = store.process("web-1").capture(&ProcessSource::new(pid), &CaptureOptions::default())?;
    /// let core = dir.path().join("web-1.core");
    /// let stats = store.restore(taken.id)?.into_core(&core, false)?;
    /// assert_eq!(stats.threads, 1);
    /// // gdb /path/to/program web-1.core
    /// # child.kill()?;
    /// # child.wait()?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// As [`into_file`](Self::into_file); [`SinkError::Core`](crate::SinkError::Core) if the registers are not those of a
    /// 64-bit program.
    pub fn into_core(self, path: impl AsRef<Path>, overwrite: bool) -> Result<CoreStats, Error> {
        let mut reader = Reader::new(self.shared, Check::Full);
        let threads = match reader.attachment(self.pinned.record(), Threads::ATTACHMENT)? {
            None => None,
            Some(bytes) => Some(
                Threads::from_attachment(&bytes)
                    .map_err(|source| StoreError::Record { kind: Kind::Attachment, source })?,
            ),
        };
        let auxv = reader.attachment(self.pinned.record(), threads::AUXV)?.unwrap_or_default();
        let register_layout =
            reader.attachment(self.pinned.record(), threads::REGISTER_LAYOUT)?.unwrap_or_default();
        let command = match &self.pinned.record().origin {
            Origin::Process { command, .. } | Origin::Core { command, .. } => command.join(" "),
            _ => String::new(),
        };
        let thread_count = threads.as_ref().map_or(0, |threads| threads.threads.len());
        let about = About { threads, auxv, command, register_layout };
        let head = Head::new(self.tables.space(), &self.long_zeros(&mut reader)?, about)?;
        let file = SparseFile::create(path.as_ref(), head.file_bytes, overwrite)?;
        file.write_at(&head.bytes, 0)?;
        // What was left out of the image is not written.
        let written_bytes = AtomicU64::new(head.bytes.len() as u64);
        let write = |bytes: &[u8], offset_bytes: u64| -> Result<(), Error> {
            for part in head.parts_in(offset_bytes..offset_bytes + bytes.len() as u64) {
                // Inside `bytes`, which are in memory.
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

    /// The parts of the image that are zeros for long, sorted and apart.
    fn long_zeros(&self, reader: &mut Reader<'_>) -> Result<Vec<Range<u64>>, Error> {
        let mut zeros: Vec<Range<u64>> = Vec::new();
        let mut add = |next: Range<u64>| match zeros.last_mut() {
            Some(last) if last.end == next.start => last.end = next.end,
            Some(last) if last.end - last.start < LONG_ZEROS_BYTES => *last = next,
            _ => zeros.push(next),
        };
        let region_bytes = self.pinned.record().region_size.bytes() as u64;
        // Up to here it is looked at. In between there are tables of zeros.
        let mut at = 0;
        for (hash, place) in self.tables.iter() {
            self.progress.check()?;
            if at < place.image_bytes {
                add(at..place.image_bytes);
            }
            let end = place.image_bytes + place.length_bytes as u64;
            at = place.image_bytes;
            for hash in reader.hashes(Kind::Table, &hash, place.regions)? {
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
