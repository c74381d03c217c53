//! Checks whether the threads can be given the registers of the snapshot.

use super::attempt::Attempt;
use super::restart;
use crate::error::RollbackError;
use crate::threads::{NT_PRSTATUS, Thread, Threads};

/// An error unless the threads' registers have the same form as in the snapshot and may be set.
pub(super) fn check(attempt: &Attempt<'_>) -> Result<(), RollbackError> {
    let held = attempt.held;
    if held.has_shadow_stacks() {
        return Err(attempt.refusal("it runs with shadow stacks, which cannot be set back"));
    }
    let now = held.threads();
    let forms = |threads: &Threads| threads.threads.iter().map(form).collect::<Vec<_>>();
    let mut general = now.threads.iter().filter_map(|thread| thread.register_set(NT_PRSTATUS));
    let is_known = |set: &[u8]| restart::general_bytes().is_none_or(|bytes| bytes == set.len());
    if forms(&attempt.captured.threads) != forms(&now) || !general.all(is_known) {
        return Err(attempt.refusal("its registers are not of the form that this program can set"));
    }
    if attempt.captured.rseq.as_ref().is_some_and(|rseq| *rseq != held.rseq_attachment()) {
        // The thread's C library would register with the kernel a second time, which ends the
        // program.
        return Err(attempt.refusal("a thread was just starting when it was captured"));
    }
    Ok(())
}

/// The register sets that a thread has, and the length of each.
fn form(thread: &Thread) -> Vec<(u32, usize)> {
    thread.registers.iter().map(|set| (set.note_type, set.bytes.len())).collect()
}

/// The registers to set: those of the snapshot, adjusted so that interrupted system calls restart.
pub(super) fn prepared(attempt: &Attempt<'_>) -> Vec<Thread> {
    let mut threads = attempt.captured.threads.threads.clone();
    threads.iter_mut().for_each(restart::prepare);
    threads
}
