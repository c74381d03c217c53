//! Finds out whether the snapshots under a name belong to the process that has a pid now, or to an
//! earlier process with the same pid.

use std::time::Duration;

use jiff::{SignedDuration, Timestamp};

use crate::error::Error;
use crate::record::Origin;
use crate::run::Run;
use crate::snapshot::Snapshot;
use crate::source::RunningProcess;
use crate::store::Store;
use crate::threads::AUXV;

/// The precision of a process's start time: the kernel counts in hundredths of a second.
const START_IS_EXACT_TO: Duration = Duration::from_millis(50);

impl Store {
    /// The default name for the snapshots of a live process: `pid:PID`. If the snapshots under that
    /// name belong to another process that had the pid, it is `pid:PID.2`, then `pid:PID.3` and so
    /// on.
    ///
    /// It is the same process if the newest snapshot under the name has the same start time and the
    /// same auxiliary vector: `execve` turns a process into another program. A snapshot without a
    /// start time must be younger than the process.
    ///
    /// # Errors
    ///
    /// Damage of a snapshot.
    pub fn name_of_process(&self, pid: u32) -> Result<String, Error> {
        let now = RunningProcess::look(pid);
        for number in 1u64.. {
            let name = if number == 1 { format!("pid:{pid}") } else { format!("pid:{pid}.{number}") };
            let Some(latest) = self.process(&name).latest() else { return Ok(name) };
            if is_of(&self.snapshot(latest)?, pid, &now)? {
                return Ok(name);
            }
        }
        unreachable!("a store has fewer names than there are numbers")
    }
}

/// Whether a snapshot belongs to the process. If the kernel does not provide the needed facts, the
/// answer is yes.
fn is_of(snapshot: &Snapshot<'_>, pid: u32, now: &RunningProcess) -> Result<bool, Error> {
    if !matches!(&snapshot.record().origin, Origin::LiveProcess { pid: then, .. } if *then == pid) {
        return Ok(false);
    }
    let run = snapshot.attachment(Run::ATTACHMENT)?.and_then(|run| Run::from_attachment(&run).ok());
    let is_same_start = match (run, now.start) {
        (Some(run), Some(start)) if !run.boot_id.is_empty() && !now.boot_id.is_empty() => {
            run.boot_id == now.boot_id && run.process_start == start
        }
        // Older snapshots have only their time.
        _ => started_before(now, snapshot.record().time),
    };
    if !is_same_start {
        return Ok(false);
    }
    let auxv = snapshot.attachment(AUXV)?;
    Ok(auxv.is_none_or(|auxv| now.auxv.is_empty() || auxv == now.auxv))
}

/// Whether the process was started before a time; also true if its start time is unknown.
fn started_before(now: &RunningProcess, time: Timestamp) -> bool {
    let age = now.age.and_then(|age| SignedDuration::try_from(age.saturating_sub(START_IS_EXACT_TO)).ok());
    age.and_then(|age| Timestamp::now().checked_sub(age).ok()).is_none_or(|started| started <= time)
}
