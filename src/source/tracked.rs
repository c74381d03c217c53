//! A source together with a tracker of its changes.

use std::sync::Arc;

use super::{Frozen, Source, SourceError};
use crate::progress::Progress;
use crate::track::{RescanReason, Tracker};

/// Joins sources with trackers.
pub trait SourceExt: Source {
    /// This source; a capture reads only the memory that `tracker` reports as dirty.
    ///
    /// ```
    /// use stillframe::source::SourceExt;
    /// use stillframe::track::DirtyRanges;
    /// use stillframe::{AddressRange, CaptureOptions, Store};
    /// # let dir = tempfile::tempdir()?;
    /// # let store = Store::options().create(dir.path().join("vault"))?;
    /// let vm = store.process("vm");
    /// let mut memory = vec![7u8; 1 << 20];
    /// let dirty = DirtyRanges::new(memory.len() as u64);
    /// vm.capture(&memory[..].tracked_by(&dirty), &CaptureOptions::default())?;
    ///
    /// memory[5000] = 8;
    /// dirty.mark(AddressRange::new(5000, 5001)?)?;
    /// vm.capture(&memory[..].tracked_by(&dirty), &CaptureOptions::default())?; // reads one region
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    fn tracked_by<T: Tracker + Clone + 'static>(&self, tracker: &T) -> Tracked<'_, Self> {
        Tracked { source: self, tracker: Arc::new(tracker.clone()) }
    }
}

impl<S: Source + ?Sized> SourceExt for S {}

/// A source together with a tracker. See [`SourceExt::tracked_by`].
pub struct Tracked<'a, S: ?Sized> {
    source: &'a S,
    tracker: Arc<dyn Tracker>,
}

impl<S: Source + ?Sized> Source for Tracked<'_, S> {
    fn open(&self) -> Result<Box<dyn Frozen + '_>, SourceError> {
        self.source.open()
    }

    fn open_unless_cancelled(&self, progress: &Progress) -> Result<Box<dyn Frozen + '_>, SourceError> {
        self.source.open_unless_cancelled(progress)
    }

    fn tracker(&self) -> Result<Arc<dyn Tracker>, RescanReason> {
        Ok(self.tracker.clone())
    }
}
