//! Why the kernel does not let us stop or read a process, and what helps.

use std::io;

use super::SourceError;
use super::mutual::TRACER_NAME;
use super::proc_directory::{ProcDirectory, says_gone};
use super::stuck::name;

/// An attempt to stop a process that failed.
pub(super) enum Refused {
    /// Another capture is at work, which is soon over. The error is for when it is not.
    Busy(SourceError),
    /// Trying again at once would not help.
    Error(SourceError),
}

impl From<SourceError> for Refused {
    fn from(error: SourceError) -> Refused {
        Refused::Error(error)
    }
}

/// Why the kernel refused something about a thread of a process.
pub(super) fn refusal(process: &ProcDirectory, tid: u32, action: &'static str, error: io::Error) -> Refused {
    let pid = process.pid();
    let tracer = process.status_number(&format!("task/{tid}/status"), "TracerPid").unwrap_or(0);
    if tracer != 0 {
        return traced_by(process, tracer);
    }
    match error.raw_os_error() {
        Some(libc::EPERM | libc::EACCES) if is_undumpable(process) => {
            SourceError::Undumpable { pid, action }.into()
        }
        Some(libc::EPERM | libc::EACCES) => {
            SourceError::NotPermitted { pid, action, advice: advice() }.into()
        }
        _ => process_error(pid, action, error).into(),
    }
}

/// The refusal of a process that a thread, `tracer`, traces.
pub(super) fn traced_by(process: &ProcDirectory, tracer: u32) -> Refused {
    let pid = process.pid();
    let tracing = ProcDirectory::open(tracer);
    let comm = tracing.as_ref().map(|it| name(it, "comm")).unwrap_or_default();
    if comm == TRACER_NAME {
        let why = format!("another capture of it is not done (by thread {tracer}); try again then");
        return Refused::Busy(SourceError::Uncapturable { pid, why });
    }
    let why = format!("process {tracer} ({comm}) traces it already; end that debugger or capture first");
    let error = SourceError::Uncapturable { pid, why };
    // One that has ended has let go.
    let has_ended = tracing.map_or(true, |it| it.read("comm").is_err_and(|error| says_gone(&error)));
    if has_ended { Refused::Busy(error) } else { Refused::Error(error) }
}

/// What went wrong with a process that may just have ended.
pub(super) fn process_error(pid: u32, action: &'static str, source: io::Error) -> SourceError {
    if says_gone(&source) {
        SourceError::LiveProcessEnded { pid }
    } else {
        SourceError::LiveProcess { pid, action, source }
    }
}

/// Whether it is a process of our own user that has made itself undumpable. Its files in `/proc` belong to root then.
fn is_undumpable(process: &ProcDirectory) -> bool {
    let own_user = rustix::process::geteuid().as_raw();
    let users = process.status_text("status", "Uid").ok().flatten().unwrap_or_default();
    let runs_as_us = users.split_ascii_whitespace().all(|user| user.parse() == Ok(own_user));
    runs_as_us && !users.is_empty() && process.owner("environ").is_ok_and(|owner| owner != own_user)
}

/// What helps when the kernel does not permit it.
fn advice() -> String {
    let mut advice =
        "do it as the user that the process runs as, or with the capability CAP_SYS_PTRACE (as root)"
            .to_owned();
    let scope = std::fs::read_to_string("/proc/sys/kernel/yama/ptrace_scope").unwrap_or_default();
    let meaning = match scope.trim() {
        "1" => "only a parent may stop its children",
        "2" => "only CAP_SYS_PTRACE helps",
        "3" => "nobody may stop any process until the next boot",
        _ => return advice,
    };
    advice += &format!("; /proc/sys/kernel/yama/ptrace_scope is {}: {meaning}", scope.trim());
    advice
}
