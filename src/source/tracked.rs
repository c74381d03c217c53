//! A source together with a tracker of its changes.

use std::sync::Arc;

use super::{Frozen, Source, SourceError};
use crate::progress::Progress;
use crate::track::{RescanReason, Tracker};

/// Joins sources with trackers.
pub trait SourceExt: Source {
    /// This source; a capture reads only the memory that `tracker` reports as dirty.
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
