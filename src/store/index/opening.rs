//! Opening the database with a time limit: on a damaged database, sled may panic or loop without
//! end.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Duration;

use super::database::INDEX_THREAD;
use super::room::disk_bytes;
use crate::store::error::StoreError;
use crate::sys::dir::Name;

/// An index may take this long to open, and ...
const OPEN_WITHIN: Duration = Duration::from_secs(30);

/// ... another second for each this many bytes.
const OPEN_BYTES_A_SECOND: u64 = 4 << 20;

/// How long the index of this name may take to open. A million entries took 14 ms (AMD EPYC, 2
/// cores), so the limit allows for very slow disks, and ends the wait if sled loops without end.
pub(super) fn open_within(name: &Name) -> Duration {
    #[cfg(feature = "fault-injection")]
    if let Some(millis) = std::env::var("STILLFRAME_INDEX_WITHIN_MS").ok().and_then(|text| text.parse().ok())
    {
        return Duration::from_millis(millis);
    }
    OPEN_WITHIN + Duration::from_secs(disk_bytes(name) / OPEN_BYTES_A_SECOND)
}

/// Opens the index in a new thread, which is left running if that takes too long. On a damaged
/// database sled may panic instead of returning an error.
pub(super) fn guard<T: Send + 'static>(
    within: Duration,
    open: impl FnOnce() -> Result<T, StoreError> + Send + 'static,
) -> Result<T, StoreError> {
    let useless = |detail: String| StoreError::Index { action: "be opened", detail };
    let (done, opened) = crossbeam_channel::bounded(1);
    let work = move || {
        // If it took too long, no thread waits for the result.
        let _ = done.send(catch_unwind(AssertUnwindSafe(open)));
    };
    std::thread::Builder::new()
        .name(INDEX_THREAD.to_owned())
        .spawn(work)
        .map_err(|error| useless(format!("no thread can be started for it: {error}")))?;
    match opened.recv_timeout(within) {
        Ok(Ok(opened)) => opened,
        Ok(Err(_)) => Err(useless("it panicked".to_owned())),
        Err(_) => Err(useless(format!("it was not done after {} s", within.as_secs_f32()))),
    }
}
