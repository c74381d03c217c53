//! Processes that cannot be captured, and what to do about it.

use std::io;

use crate::source::SourceError;
use crate::source::proc_directory::{ProcDirectory, says_gone};
pub(super) use crate::source::refusal::process_error;

/// The process, if it is one that can be captured.
pub(super) fn find(pid: u32) -> Result<ProcDirectory, SourceError> {
    let uncapturable = |why: String| SourceError::Uncapturable { pid, why };
    let look_error = |error: io::Error| {
        if says_gone(&error) {
            SourceError::NoSuchPid { pid }
        } else {
            SourceError::LiveProcess { pid, action: "look up", source: error }
        }
    };
    if !std::path::Path::new("/proc/self/stat").exists() {
        let source = io::Error::other("/proc is not mounted; `mount -t proc proc /proc` does it");
        return Err(SourceError::LiveProcess { pid, action: "look up", source });
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
