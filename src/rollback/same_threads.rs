//! Checks that a process has exactly the threads of the snapshot.

use std::collections::HashMap;

use super::attempt::Attempt;
use super::runtime_threads::starter;
use crate::error::RollbackError;
use crate::threads::Thread;

/// An error that names the threads which have ended or started since.
pub(super) fn check(attempt: &Attempt<'_>) -> Result<(), RollbackError> {
    let (before, now) = (&attempt.captured.threads.threads, attempt.held.threads().threads);
    let then_starts = attempt.captured.run.as_ref().map(|run| starts(&run.thread_starts));
    let now_run = attempt.held.run();
    let now_starts = starts(&now_run.thread_starts);
    let then_ids: HashMap<u32, &Thread> = before.iter().map(|it| (it.tid, it)).collect();
    let now_ids: HashMap<u32, &Thread> = now.iter().map(|it| (it.tid, it)).collect();
    let mut differences = Vec::new();
    for thread in before {
        let start = then_starts.as_ref().and_then(|starts| starts.get(&thread.tid));
        if !now_ids.contains_key(&thread.tid) {
            differences.push(named(thread, "has ended"));
        } else if start.is_some_and(|start| now_starts.get(&thread.tid) != Some(start)) {
            differences.push(named(thread, "has ended, and another thread has its number"));
        }
    }
    let begun = now.iter().filter(|it| !then_ids.contains_key(&it.tid));
    differences.extend(begun.map(|it| named(it, "is new")));
    if differences.is_empty() { Ok(()) } else { Err(attempt.misfit(differences)) }
}

fn starts(starts: &[(u32, u64)]) -> HashMap<u32, u64> {
    starts.iter().copied().collect()
}

fn named(thread: &Thread, became: &str) -> String {
    let name = String::from_utf8_lossy(&thread.name);
    match starter(&thread.name) {
        None => format!("thread {} ({name}) {became}", thread.tid),
        Some(starter) => format!(
            "thread {} ({name}) {became}; such threads are started and ended by {starter}, at any time: \
             another snapshot may fit",
            thread.tid
        ),
    }
}
