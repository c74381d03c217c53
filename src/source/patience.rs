//! How long stopping a process may take, and how it is given up earlier.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::SourceError;
use crate::progress::Progress;

/// How long stopping may take if nobody says otherwise. Threads that run need microseconds; a thread that
/// waits for a disk needs some milliseconds.
pub(crate) const STOP_TIMEOUT: Duration = Duration::from_secs(1);

/// One attempt to stop a process, as the opener and the tracer both see it.
pub(super) struct Patience {
    timeout: Duration,
    started: Instant,
    progress: Progress,
    /// The opener does not wait for the tracer any more.
    given_up: AtomicBool,
}

impl Patience {
    pub(super) fn new(timeout: Duration, progress: &Progress) -> Patience {
        Patience {
            timeout,
            started: Instant::now(),
            progress: progress.clone(),
            given_up: AtomicBool::new(false),
        }
    }

    /// Whether the time is over.
    pub(super) fn is_over(&self) -> bool {
        self.started.elapsed() >= self.timeout
    }

    /// Whether it has been over for so long.
    pub(super) fn is_over_for(&self, duration: Duration) -> bool {
        self.started.elapsed() >= self.timeout.saturating_add(duration)
    }

    /// Tells the tracer that nobody waits for it.
    pub(super) fn give_up(&self) {
        self.given_up.store(true, Ordering::Relaxed);
    }

    /// An error if it is to be given up at once.
    pub(super) fn check(&self) -> Result<(), SourceError> {
        match self.progress.is_cancelled() || self.given_up.load(Ordering::Relaxed) {
            true => Err(SourceError::Interrupted),
            false => Ok(()),
        }
    }

    /// The error that says that the time is over: which thread did not stop, and for how long the others were
    /// paused, if any was.
    pub(super) fn did_not_stop(&self, pid: u32, why: String, paused: Option<Duration>) -> SourceError {
        SourceError::DidNotStop { pid, why, timeout: self.timeout, paused: paused.unwrap_or_default() }
    }
}
