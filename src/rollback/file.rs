//! A memory file, rolled back in place: whoever has it mapped, a virtual machine say, is back at the snapshot.

use std::ops::Range;
use std::path::Path;
use std::time::Instant;

use super::plan::{self, Look, Part, Target};
use super::{Rollback, RollbackStats};
use crate::error::Error;
use crate::ranges::{Ranges, overlapping};
use crate::sink::FileInPlace;
use crate::source::data_in_memory_file;
use crate::track::{RescanReason, Tracking};

impl Rollback<'_> {
    /// Makes the file at `path` the image of the snapshot, by writing what differs into it as it is. Whoever has it
    /// mapped sees that; nobody may write to it meanwhile. What was excluded from the snapshot becomes zeros, as in
    /// any restore.
    ///
    /// It may be any file with bytes: on a disk, in memory (also by its descriptor, as `/proc/PID/fd/N`), of huge
    /// pages. If this program is killed while it writes, a part is written, and the same call completes it.
    ///
    /// Cost: reading and comparing takes 3 GB/s a core, holes of files in memory nothing; what differs is decoded and
    /// its pages are written.
    ///
    /// ```
    /// use stillframe::{CaptureOptions, Store};
    /// use stillframe::source::FileSource;
    /// # let dir = tempfile::tempdir()?;
    /// # let store = Store::options().create(dir.path().join("vault"))?;
    /// let ram = dir.path().join("ram");
    /// std::fs::write(&ram, vec![7; 1 << 20])?;
    /// let before = store.process("vm").capture(&FileSource::new(&ram), &CaptureOptions::default())?.id;
    /// std::fs::write(&ram, vec![8; 1 << 20])?;
    /// store.rollback(before)?.file(&ram)?;
    /// assert_eq!(std::fs::read(&ram)?, vec![7; 1 << 20]);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`SinkError::Length`](crate::sink::SinkError::Length) unless it is exactly as long as the image, [`SinkError::NotAFile`](crate::sink::SinkError::NotAFile), what the
    /// operating system said, damage, [`Error::Interrupted`]: nothing is written then. Where writing fails, a part
    /// may be.
    pub fn file(self, path: impl AsRef<Path>) -> Result<RollbackStats, Error> {
        let begun = Instant::now();
        let file = FileInPlace::open(path.as_ref(), self.space.image_bytes())?;
        let data = data_in_memory_file(file.file(), self.space.image_bytes());
        let target = FileTarget { file: &file, data };
        let places = self.places();
        // Those of zeros too: something may be there now.
        let parts = places.iter().enumerate().map(|(at, place)| Part {
            table: self.root.get(at),
            place,
            at: place.image_bytes,
            look: Look::Everything,
        });
        let region_bytes = self.record.region_size.bytes();
        let plan =
            plan::plan(self.shared, region_bytes, self.check, &self.progress, parts.collect(), &target)?;
        self.progress.check()?;
        let done =
            plan.write(|patch| patch.at, |at, offset, bytes| Ok(file.write_at(bytes, *at + offset as u64)?))?;
        let tracking = Tracking::Rescan(RescanReason::NoTracker);
        Ok(self.stats(begun, self.space.image_bytes(), tracking, done))
    }
}

/// The file that is compared.
struct FileTarget<'a> {
    file: &'a FileInPlace,
    /// Where it has anything but holes, if that is known: sorted and apart.
    data: Option<Ranges>,
}

impl Target for FileTarget<'_> {
    fn bytes<'b>(&'b self, at: u64, length: usize, buffer: &'b mut Vec<u8>) -> Result<&'b [u8], Error> {
        buffer.resize(length, 0);
        self.file.read_at(buffer, at)?;
        Ok(buffer)
    }

    fn is_absent(&self, range: Range<u64>) -> bool {
        self.data.as_ref().is_some_and(|data| overlapping(data, range).next().is_none())
    }
}
