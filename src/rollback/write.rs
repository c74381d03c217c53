//! Writes the memory first, then the registers. The process remains stopped if this program dies
//! meanwhile.

use super::attempt::Attempt;
use super::injection::Calls;
use super::page_state::PageStates;
use super::plan::{Done, Patch, Plan};
use super::shared::mapping_at;
use super::{injection, refused, registers};
use crate::address_space::{Mapping, MappingKind};
use crate::error::{Error, RollbackError};
use crate::sink::{ProcessSink, SinkError};
use crate::source::Frozen as _;
use crate::source::injection::InjectionError;
use crate::source::signals::Settlement;

/// The result of writing.
pub(super) struct Written {
    pub(super) done: Done,
    /// Whether the process is stopped after it is resumed, as it was before.
    pub(super) is_stopped: bool,
}

/// Discards and writes as planned. Until the first byte is written, an error leaves the process as
/// it was.
pub(super) fn write(
    attempt: &Attempt<'_>,
    calls: Option<&Calls>,
    settlement: Settlement,
    states: &PageStates,
    plan: &Plan<'_>,
) -> Result<Written, Error> {
    let Attempt { pid, held, .. } = *attempt;
    let threads = registers::prepared(attempt);
    let sink = ProcessSink::new(pid, held.open_memory()?)?;
    check_forced_writes(attempt, calls, states, plan, &sink)?;
    // The comparison is valid only if the process was paused throughout and was not killed.
    held.check_it_stands_still().map_err(|error| refused(pid, error))?;
    attempt.check_interrupt()?;

    let was_stopped = held.was_stopped();
    let is_stopped = was_stopped || held.is_about_to_stop();
    if let Some(calls) = calls {
        // From its first step on, the process remains stopped if this program dies, as after the
        // SIGSTOP below.
        let made = injection::make(attempt, calls);
        if matches!(made, Err(InjectionError::Impossible(_))) && !is_stopped {
            sink.goes_on()?;
        }
        made.map_err(|error| injection::refused(attempt, error))?;
    }
    if !was_stopped {
        sink.stands_still()?;
    }
    let write = || -> Result<Done, Error> {
        if !settlement.is_empty() {
            held.settle_signals(settlement)?;
        }
        let done =
            plan.write(|patch| patch.at, |at, offset, bytes| Ok(sink.write_at(*at + offset as u64, bytes)?))?;
        held.set_registers(threads)?;
        if !is_stopped {
            sink.goes_on()?;
        }
        Ok(done)
    };
    let done = write().map_err(|source| match held.check_it_stands_still() {
        Ok(()) => RollbackError::InPart { pid, source: Box::new(source) }.into(),
        Err(error) => refused(pid, error),
    })?;
    Ok(Written { done, is_stopped })
}

/// An error if memory must be written that the process itself may not write, and the kernel does
/// not allow that.
fn check_forced_writes(
    attempt: &Attempt<'_>,
    calls: Option<&Calls>,
    states: &PageStates,
    plan: &Plan<'_>,
    sink: &ProcessSink,
) -> Result<(), SinkError> {
    let now = attempt.held.address_space().mappings();
    let is_read_only = |it: &Mapping| !it.protection.write;
    let is_forced = |patch: &&Patch| mapping_at(states.mappings(), patch.at).is_some_and(is_read_only);
    let mut forced = plan.patches.iter().filter(is_forced).peekable();
    if forced.peek().is_none() && !calls.is_some_and(|calls| calls.protects) {
        return Ok(());
    }
    if let Some(patch) = forced.find(|patch| mapping_at(now, patch.at).is_some_and(is_read_only)) {
        return sink.try_to_write(patch.at);
    }
    // Memory that is written may not be read-only yet, so another mapping is used to find out.
    let is_like_that = |it: &&Mapping| {
        !it.protection.write && it.protection.read && !it.protection.shared && it.kind == MappingKind::File
    };
    now.iter().find(is_like_that).map_or(Ok(()), |mapping| sink.try_to_write(mapping.range.start()))
}
