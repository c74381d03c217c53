//! The time limit for stopping a process, and its cancellation.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::SourceError;
use crate::progress::Progress;

/// The default time limit for stopping. Running threads need microseconds; a thread that waits for
/// a disk needs some milliseconds. The time restarts with each thread that is handled, within
/// limits: see [`PER_THREAD`].
pub(crate) const STOP_TIMEOUT: Duration = Duration::from_secs(1);

/// The greatest extension of the time for each thread that the process has when stopping begins. It
/// is bounded because a process may create threads as fast as they are stopped. Stopping a thread
/// takes about 0.1 ms.
const PER_THREAD: Duration = Duration::from_millis(1);

/// One attempt to stop a process, shared by the opener and the tracer.
pub(super) struct Patience {
    timeout: Duration,
    started: Instant,
    progress: Progress,
    /// When the tracer last finished with a thread, in microseconds since the start.
    went_on_us: AtomicU64,
    /// How many threads are to be stopped.
    threads: AtomicU64,
    /// The opener does not wait for the tracer any more.
    given_up: AtomicBool,
}

impl Patience {
    pub(super) fn new(timeout: Duration, progress: &Progress) -> Patience {
        Patience {
            timeout,
            started: Instant::now(),
            progress: progress.clone(),
            went_on_us: AtomicU64::new(0),
            threads: AtomicU64::new(0),
            given_up: AtomicBool::new(false),
        }
    }

    /// Whether the time is over.
    pub(super) fn is_over(&self) -> bool {
        self.is_over_for(Duration::ZERO)
    }

    /// Whether the time has been over for at least `duration`.
    pub(super) fn is_over_for(&self, duration: Duration) -> bool {
        let threads = u32::try_from(self.threads.load(Ordering::Relaxed)).unwrap_or(u32::MAX);
        let longer = Duration::from_micros(self.went_on_us.load(Ordering::Relaxed));
        let longer = longer.min(PER_THREAD.saturating_mul(threads));
        self.started.elapsed() >= self.timeout.saturating_add(longer).saturating_add(duration)
    }

    /// Adds to the number of threads that are to be stopped.
    pub(super) fn expect(&self, threads: usize) {
        self.threads.fetch_add(threads as u64, Ordering::Relaxed);
    }

    /// A thread has been examined, stopped or read, so the kernel responds.
    pub(super) fn went_on(&self) {
        let elapsed_us = u64::try_from(self.started.elapsed().as_micros()).unwrap_or(u64::MAX);
        self.went_on_us.store(elapsed_us, Ordering::Relaxed);
    }

    /// Informs the tracer that the opener does not wait any more.
    pub(super) fn give_up(&self) {
        self.given_up.store(true, Ordering::Relaxed);
    }

    /// An error if the attempt is to end at once.
    pub(super) fn check(&self) -> Result<(), SourceError> {
        match self.progress.is_cancelled() || self.given_up.load(Ordering::Relaxed) {
            true => Err(SourceError::Interrupted),
            false => Ok(()),
        }
    }

    /// The error for the end of the time: which thread did not stop, and for how long the others
    /// were paused, if any were.
    pub(super) fn did_not_stop(&self, pid: u32, why: String, paused: Option<Duration>) -> SourceError {
        SourceError::DidNotStop { pid, why, timeout: self.timeout, paused: paused.unwrap_or_default() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_time_begins_again_with_each_thread_but_only_for_those_that_were_there() {
        let timeout = Duration::from_millis(40);
        let patience = Patience::new(timeout, &Progress::new());
        let pause = || std::thread::sleep(Duration::from_millis(45));
        patience.expect(60);
        pause();
        assert!(patience.is_over());
        patience.went_on();
        assert!(!patience.is_over() && !patience.is_over_for(Duration::from_millis(300)));
        pause();
        assert!(patience.is_over());
        // The extension is at most 60 ms.
        pause();
        patience.went_on();
        assert!(patience.is_over());
    }
}
