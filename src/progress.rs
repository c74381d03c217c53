//! Progress: reports of a long operation, and its cancellation.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// The operation was cancelled by its [`Progress`].
#[derive(Clone, Copy, Debug)]
pub(crate) struct Interrupted;

type OnAdvance = dyn Fn(u64, u64) + Send + Sync;

/// Reports the progress of a long operation and can cancel it. The default reports nothing and
/// never cancels.
///
/// ```
/// use std::sync::{Arc, atomic::AtomicBool};
/// use stillframe::Progress;
/// let cancel = Arc::new(AtomicBool::new(false));
/// let progress = Progress::new()
///     .on_advance(|done_bytes, total_bytes| eprintln!("{done_bytes} of {total_bytes}"))
///     .cancel_when(cancel);
/// ```
#[derive(Clone, Default)]
pub struct Progress {
    on_advance: Option<Arc<OnAdvance>>,
    cancel: Option<Arc<AtomicBool>>,
}

impl Progress {
    /// Reports nothing and never cancels.
    pub fn new() -> Self {
        Self::default()
    }

    /// Calls `report` with the bytes done and the total bytes, about once a megabyte, from any
    /// thread.
    pub fn on_advance(mut self, report: impl Fn(u64, u64) + Send + Sync + 'static) -> Self {
        self.on_advance = Some(Arc::new(report));
        self
    }

    /// Ends the operation with [`Error::Interrupted`](crate::Error::Interrupted) soon after the
    /// flag is set. Nothing is recorded then, and no data is harmed.
    pub fn cancel_when(mut self, flag: Arc<AtomicBool>) -> Self {
        self.cancel = Some(flag);
        self
    }

    /// Whether the operation must stop.
    pub(crate) fn is_cancelled(&self) -> bool {
        self.cancel.as_ref().is_some_and(|cancel| cancel.load(Ordering::Relaxed))
    }

    /// An error if the operation must stop.
    pub(crate) fn check(&self) -> Result<(), Interrupted> {
        if self.is_cancelled() { Err(Interrupted) } else { Ok(()) }
    }

    /// Begins to count towards `total_bytes`.
    pub(crate) fn begin(&self, total_bytes: u64) -> Meter {
        Meter { progress: self.clone(), done_bytes: AtomicU64::new(0), total_bytes }
    }
}

impl std::fmt::Debug for Progress {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Progress").finish_non_exhaustive()
    }
}

/// Counts the work of one operation.
pub(crate) struct Meter {
    progress: Progress,
    done_bytes: AtomicU64,
    total_bytes: u64,
}

impl Meter {
    /// Adds to the bytes done; an error if the operation must stop.
    pub(crate) fn advance(&self, by_bytes: u64) -> Result<(), Interrupted> {
        let done_bytes = self.done_bytes.fetch_add(by_bytes, Ordering::Relaxed) + by_bytes;
        if let Some(report) = &self.progress.on_advance {
            report(done_bytes, self.total_bytes.max(done_bytes));
        }
        self.progress.check()
    }
}
