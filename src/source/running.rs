//! Data that distinguishes a process from earlier ones with the same pid, read without stopping it.

use std::time::Duration;

use rustix::time::ClockId;

use super::proc_directory::ProcDirectory;

/// A running process.
pub(crate) struct RunningProcess {
    /// How long ago it was started.
    pub(crate) age: Option<Duration>,
    /// Its start time, in clock ticks since the boot.
    pub(crate) start: Option<u64>,
    /// The id of that boot; empty if it cannot be read.
    pub(crate) boot_id: String,
    /// Its auxiliary vector, which `execve` makes; empty without the permission to read it.
    pub(crate) auxv: Vec<u8>,
}

impl RunningProcess {
    /// Reads the data of a process.
    pub(crate) fn look(pid: u32) -> RunningProcess {
        let nothing = RunningProcess { age: None, start: None, boot_id: String::new(), auxv: Vec::new() };
        let Ok(process) = ProcDirectory::open(pid) else { return nothing };
        // The first thread has no auxiliary vector any more if it has ended before others.
        let threads = process.thread_ids().unwrap_or_default();
        let auxv = threads.iter().filter_map(|tid| process.read(&format!("task/{tid}/auxv")).ok());
        let auxv = auxv.into_iter().find(|auxv| !auxv.is_empty());
        let start = process.stat().ok().map(|stat| stat.start);
        let boot_id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
        RunningProcess {
            age: start.and_then(age),
            start,
            boot_id: boot_id.trim().to_owned(),
            auxv: auxv.unwrap_or_default(),
        }
    }
}

/// The time since `ticks`, which are clock ticks since the boot.
fn age(ticks: u64) -> Option<Duration> {
    let ticks_per_second = rustix::param::clock_ticks_per_second().max(1);
    let started = Duration::from_millis(ticks.saturating_mul(1000) / ticks_per_second);
    // The kernel counts from the boot and includes suspended time.
    let now = rustix::time::clock_gettime(ClockId::Boottime);
    Some(Duration::try_from(now).ok()?.saturating_sub(started))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_child_is_as_old_as_it_is_and_has_another_auxiliary_vector() {
        let begun = std::time::Instant::now();
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        std::thread::sleep(Duration::from_millis(100));
        let (me, found) = (RunningProcess::look(std::process::id()), RunningProcess::look(child.id()));
        let elapsed = begun.elapsed();
        child.kill().unwrap();
        child.wait().unwrap();
        let age = found.age.unwrap();
        assert!(age >= Duration::from_millis(80) && age <= elapsed + Duration::from_millis(20), "{age:?}");
        assert!(!me.auxv.is_empty() && !found.auxv.is_empty() && me.auxv != found.auxv);
        assert!(RunningProcess::look(child.id()).age.is_none());
    }
}
