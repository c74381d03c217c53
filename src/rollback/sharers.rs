//! Whether it is the only process with its memory.

use super::attempt::Attempt;
use crate::sink::SinkError;

/// Refuses a process whose memory others have without being threads of it: they would go on in the present with memory and stacks of
/// the past.
pub(super) fn check(attempt: &Attempt<'_>) -> Result<(), SinkError> {
    let Some(sharer) = attempt.held.sharers().first().copied() else { return Ok(()) };
    let why = format!(
        "process {sharer} shares its memory without being a thread of it, and would not be rolled back; try again \
         when that one has ended"
    );
    Err(SinkError::NoRollBack { pid: attempt.pid, why })
}
