//! Whether a process has the threads that it had when it was captured: no other, and no fewer.

use std::collections::HashSet;

use super::attempt::Attempt;
use crate::sink::SinkError;
use crate::threads::{Thread, Threads};

/// An error that names the threads which have ended or begun since.
pub(super) fn check(attempt: &Attempt<'_>) -> Result<(), SinkError> {
    let (before, now) = (&attempt.captured.threads, attempt.held.threads());
    let ids = |threads: &Threads| threads.threads.iter().map(|it| it.tid).collect::<HashSet<_>>();
    let (then_ids, now_ids) = (ids(before), ids(&now));
    let named = |it: &Thread| format!("thread {} ({})", it.tid, String::from_utf8_lossy(&it.name));
    let ended = before.threads.iter().filter(|it| !now_ids.contains(&it.tid));
    let begun = now.threads.iter().filter(|it| !then_ids.contains(&it.tid));
    let mut differences: Vec<String> = ended.map(|it| format!("{} has ended", named(it))).collect();
    differences.extend(begun.map(|it| format!("{} is new", named(it))));
    if differences.is_empty() { Ok(()) } else { Err(attempt.misfit(differences)) }
}
