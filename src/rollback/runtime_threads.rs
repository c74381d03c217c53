//! Threads that a language's runtime or the kernel starts and ends at will. They are known by their
//! names.
//!
//! A refusal because of such a thread says so, since the program does not control it: a rollback to
//! another snapshot, or a little later, may fit.

/// The beginnings of the names of such threads (a name has at most 15 bytes), and who starts them.
const NAMES: [(&str, &str); 24] = [
    ("iou-wrk-", "the kernel, for io_uring"),
    ("iou-sqp-", "the kernel, for io_uring"),
    ("C1 CompilerThre", "the JVM, to compile"),
    ("C2 CompilerThre", "the JVM, to compile"),
    ("JVMCI", "the JVM, to compile"),
    ("GC Thread#", "the JVM, to collect garbage"),
    ("G1 ", "the JVM, to collect garbage"),
    ("ZWorker#", "the JVM, to collect garbage"),
    ("ZDriver", "the JVM, to collect garbage"),
    ("ZUncommitter", "the JVM, to collect garbage"),
    ("ZUnmapper", "the JVM, to collect garbage"),
    ("XWorker#", "the JVM, to collect garbage"),
    ("Shenandoah", "the JVM, to collect garbage"),
    ("ParGC Thread#", "the JVM, to collect garbage"),
    ("Attach Listener", "the JVM, for its tools"),
    ("VM Periodic Tas", "the JVM"),
    ("VM Thread", "the JVM"),
    ("Common-Cleaner", "the JVM"),
    ("libuv-worker", "Node, to wait for files and names"),
    ("DelayedTaskSche", "Node"),
    ("V8Worker", "Node, to compile and collect garbage"),
    ("SignalInspector", "Node"),
    ("finalizer", "its runtime, to collect garbage"),
    ("jemalloc_bg_thd", "jemalloc, to give memory back"),
];

/// Who starts and ends threads of this name at will, if known.
pub(super) fn starter(name: &[u8]) -> Option<&'static str> {
    NAMES.iter().find(|(start, _)| name.starts_with(start.as_bytes())).map(|(_, starter)| *starter)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_of_runtimes_are_told_from_those_of_a_program() {
        assert_eq!(starter(b"iou-wrk-4711"), Some("the kernel, for io_uring"));
        assert_eq!(starter(b"G1 Conc#0"), Some("the JVM, to collect garbage"));
        assert_eq!(starter(b"worker-1"), None);
        assert!(NAMES.iter().all(|(start, _)| start.len() <= 15));
    }
}
