//! A capture that is finished in the background.

use std::panic::AssertUnwindSafe;
use std::path::PathBuf;

use crossbeam_channel::Receiver;

use super::{Begun, CaptureStats};
use crate::error::Error;
use crate::store::error::StoreError;
use crate::sys::fork::ProcessId;

/// A capture whose source has already resumed. A separate thread finishes it. Dropping this value
/// does not cancel the capture: the snapshot still appears. Dropping the store waits for it.
#[must_use = "the snapshot is durable only when `wait` has returned"]
pub struct PendingCapture {
    /// `None` in a process that was forked from the one that began the capture.
    done: Option<Receiver<std::thread::Result<Result<CaptureStats, Error>>>>,
    process: ProcessId,
    /// The path of the store.
    path: PathBuf,
}

impl PendingCapture {
    /// Finishes a capture in a thread of the store.
    pub(crate) fn new(begun: Begun) -> Result<PendingCapture, Error> {
        let shared = begun.shared.clone();
        let (answer, done) = crossbeam_channel::bounded(1);
        shared.in_background(move || {
            let result = std::panic::catch_unwind(AssertUnwindSafe(|| begun.finish()));
            // The caller may have dropped the receiver.
            let _ = answer.send(result);
        })?;
        Ok(PendingCapture { done: Some(done), process: ProcessId::this(), path: shared.path.clone() })
    }

    /// Waits until the snapshot is durable.
    ///
    /// # Errors
    ///
    /// As [`Process::capture`](crate::Process::capture). After an error nothing is recorded, and
    /// the changes are part of the next capture.
    pub fn wait(self) -> Result<CaptureStats, Error> {
        if !self.process.is_this() {
            return Err(StoreError::of_other_process(&self.path, self.process).into());
        }
        match self.done.as_ref().map(Receiver::recv) {
            Some(Ok(Ok(result))) => result,
            Some(Ok(Err(panic))) => std::panic::resume_unwind(panic),
            // `Some(Err)` does not happen: the thread sends a result before it ends, even after a
            // panic.
            Some(Err(_)) | None => Err(Error::Interrupted),
        }
    }

    /// Whether [`wait`](Self::wait) would return at once.
    pub fn is_done(&self) -> bool {
        self.done.as_ref().is_none_or(|done| !done.is_empty())
    }
}

impl Drop for PendingCapture {
    fn drop(&mut self) {
        if !self.process.is_this() {
            // The thread that works on it is in the other process.
            std::mem::forget(self.done.take());
        }
    }
}

impl std::fmt::Debug for PendingCapture {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PendingCapture").field("is_done", &self.is_done()).finish()
    }
}
