//! Processes that cannot be captured, and what to do about it.

use std::io;

use crate::source::SourceError;
use crate::source::proc_directory::{ProcDirectory, says_gone};

/// The process, if it is one that can be captured.
pub(super) fn find(pid: u32) -> Result<ProcDirectory, SourceError> {
    let uncapturable = |why: String| SourceError::Uncapturable { pid, why };
    let look_error = |error: io::Error| {
        if says_gone(&error) {
            SourceError::NoSuchProcess { pid }
        } else {
            SourceError::Process { pid, action: "look up", source: error }
        }
    };
    if !std::path::Path::new("/proc/self/stat").exists() {
        let source = io::Error::other("/proc is not mounted; `mount -t proc proc /proc` does it");
        return Err(SourceError::Process { pid, action: "look up", source });
    }
    let process = ProcDirectory::open(pid).map_err(look_error)?;
    let thread_group = process.status_number("status", "Tgid").map_err(look_error)?;
    if thread_group == std::process::id() {
        return Err(uncapturable(
            "it is this process itself; name it in another process, or use its bytes as a slice".to_owned(),
        ));
    }
    if thread_group != pid {
        return Err(uncapturable(format!("it is a thread of process {thread_group}; name that one")));
    }
    let stat = process.stat().map_err(look_error)?;
    if stat.is_kernel_thread {
        return Err(uncapturable("it is a thread of the kernel and has no memory of its own".to_owned()));
    }
    if stat.is_dead() && stat.thread_count <= 1 {
        return Err(uncapturable(
            "it has ended and only waits for its parent to take notice (a zombie)".to_owned(),
        ));
    }
    Ok(process)
}

/// Why the kernel refused something about a thread of a process.
pub(in crate::source) fn refusal(
    process: &ProcDirectory,
    tid: u32,
    action: &'static str,
    error: io::Error,
) -> SourceError {
    let pid = process.pid();
    let tracer = process.status_number(&format!("task/{tid}/status"), "TracerPid").unwrap_or(0);
    if tracer != 0 {
        let name = std::fs::read(format!("/proc/{tracer}/comm")).unwrap_or_default();
        let name = String::from_utf8_lossy(name.trim_ascii_end()).into_owned();
        let why = format!("process {tracer} ({name}) traces it already; end that debugger or capture first");
        return SourceError::Uncapturable { pid, why };
    }
    if matches!(error.raw_os_error(), Some(libc::EPERM | libc::EACCES)) {
        SourceError::NotPermitted { pid, action, advice: advice() }
    } else {
        process_error(pid, action, error)
    }
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

pub(super) fn process_error(pid: u32, action: &'static str, source: io::Error) -> SourceError {
    if says_gone(&source) {
        SourceError::ProcessEnded { pid }
    } else {
        SourceError::Process { pid, action, source }
    }
}
