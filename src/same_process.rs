//! Whether the snapshots of a name are of the process that has a pid now, or of one that had it before.

use std::time::Duration;

use jiff::{SignedDuration, Timestamp};

use crate::error::Error;
use crate::record::Origin;
use crate::run::Run;
use crate::snapshot::Snapshot;
use crate::source::RunningProcess;
use crate::store::Store;
use crate::threads::AUXV;

/// How exactly it is known when a process was started: the kernel counts in hundredths of a second.
const START_IS_EXACT_TO: Duration = Duration::from_millis(50);

impl Store {
    /// The name for the snapshots of a live process that were given none: `pid:PID`; and `pid:PID.2`, `pid:PID.3` …
    /// where the snapshots of the names before are of other processes that had the pid.
    ///
    /// It is the same process if it was started before the newest snapshot of the name, and has still the auxiliary vector
    /// that this has: `execve` makes another program of a process.
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

/// Whether a snapshot is of the process. Where the kernel does not tell, it is.
fn is_of(snapshot: &Snapshot<'_>, pid: u32, now: &RunningProcess) -> Result<bool, Error> {
    if !matches!(&snapshot.record().origin, Origin::Process { pid: then, .. } if *then == pid) {
        return Ok(false);
    }
    let started =
        now.age.and_then(|age| SignedDuration::try_from(age.saturating_sub(START_IS_EXACT_TO)).ok());
    let started = started.and_then(|age| Timestamp::now().checked_sub(age).ok());
    if started.is_some_and(|started| started > snapshot.record().time) {
        return Ok(false);
    }
    if let Some(run) = snapshot.attachment(Run::ATTACHMENT)?.and_then(|run| Run::from_attachment(&run).ok()) {
        let is_known = !run.boot_id.is_empty() && !now.boot_id.is_empty();
        if is_known
            && (run.boot_id != now.boot_id || now.start.is_some_and(|start| start != run.process_start))
        {
            return Ok(false);
        }
    }
    let auxv = snapshot.attachment(AUXV)?;
    Ok(auxv.is_none_or(|auxv| now.auxv.is_empty() || auxv == now.auxv))
}
