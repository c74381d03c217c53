//! Handles two programs that each capture the other.
//!
//! If each stopped the other's threads, including those that copy, both would wait until they are
//! killed. So a process that is capturing cannot be captured until it is done:
//!
//! ```text
//!  A: its tracer has the name   ->  reads the names of B's threads  ->  no tracer: stops B
//!  B: its tracer has the name   ->  reads the names of A's threads  ->  A's tracer: backs off
//! ```
//!
//! A tracer is the thread that stops others. It has a fixed name, from before it reads other names
//! until it has resumed all threads. If two tracers start at the same moment, the one that takes
//! its name last sees the other's name, so at most one continues. The same holds for a ring of any
//! number of programs: the last one sees that the next one is capturing. This needs no file and no
//! lock, and a killed program leaves nothing behind. Names can be read across users and containers.

use std::io;
use std::sync::atomic::{Ordering, fence};

use super::proc_directory::ProcDirectory;

/// The name of every thread that stops others. It has 15 bytes, as many as the kernel keeps.
pub(super) const TRACER_NAME: &str = "stillframe-stop";

/// Why the process must not be stopped now: it is capturing, or it traces this program. The caller
/// must be a thread that already has the name of a tracer. While threads start and end so fast that
/// not all can be listed, this reads them again, until `is_over`.
pub(super) fn conflict(process: &ProcDirectory, is_over: impl Fn() -> bool) -> io::Result<Option<String>> {
    let threads = loop {
        // Taking the name comes before reading other names, on every processor.
        fence(Ordering::SeqCst);
        let listed = process.thread_ids()?;
        let mut named = Vec::with_capacity(listed.len());
        for tid in listed {
            if let Ok(name) = process.thread_name(tid) {
                if name == TRACER_NAME.as_bytes() {
                    return Ok(Some(format!("it is capturing a process itself (by its thread {tid})")));
                }
                named.push(tid);
            }
        }
        // The kernel leaves out threads if the thread at its current position ends meanwhile; that
        // thread then has no name either.
        if named.len() >= process.stat()?.thread_count {
            break named;
        }
        if is_over() {
            return Ok(Some("its threads start and end so fast that they cannot be listed".to_owned()));
        }
        std::thread::yield_now();
    };
    let own = ProcDirectory::open(std::process::id())?;
    for tid in own.thread_ids()? {
        let tracer = own.status_number(&format!("task/{tid}/status"), "TracerPid").unwrap_or(0);
        if tracer != 0 && threads.contains(&tracer) {
            return Ok(Some(format!("it traces this program (by its thread {tracer}), as a debugger does")));
        }
    }
    Ok(None)
}
