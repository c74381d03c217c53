//! Whether a process is the one that was captured: the same program in the same run.
//!
//! The auxiliary vector tells runs apart, as it has random bytes; but all processes that were forked after one
//! `execve` have the same. So the start times of process and threads are compared too, which count from the start of
//! the machine, and the machine's boot id.

use std::path::Path;

use super::attempt::Attempt;
use crate::error::RollbackError;
use crate::record::Origin;
use crate::source::Frozen as _;

/// An error unless it is the same run of the same program.
pub(super) fn check(attempt: &Attempt<'_>) -> Result<(), RollbackError> {
    if let (Origin::LiveProcess { path: Some(before), .. }, Origin::LiveProcess { path: Some(now), .. }) =
        (&attempt.rollback.record.origin, &attempt.held.origin())
    {
        let (before, now) = (undeleted(before), undeleted(now));
        if before != now {
            return Err(attempt.misfit(vec![format!("it runs {now}, the snapshot is of {before}")]));
        }
    }
    if attempt.captured.auxv != attempt.held.auxv() {
        return Err(attempt.misfit(vec!["it is another run of the program".to_owned()]));
    }
    if let Some(other) = attempt.held.sharers().first() {
        return Err(attempt.refusal(format!(
            "process {other} shares its memory without being one of its threads (CLONE_VM), and would see it change; \
             end that one first"
        )));
    }
    let Some(then) = &attempt.captured.run else { return Ok(()) };
    let now = attempt.held.run();
    let difference = if then.boot_id != now.boot_id {
        "it was captured before the last boot of this machine"
    } else if then.process_start != now.process_start {
        "it is another process than the one that was captured, and has got that one's pid"
    } else {
        return Ok(());
    };
    Err(attempt.misfit(vec![difference.to_owned()]))
}

/// The executable may have been removed since.
fn undeleted(path: &Path) -> String {
    let path = path.to_string_lossy().into_owned();
    path.strip_suffix(" (deleted)").map(str::to_owned).unwrap_or(path)
}
