//! The state that a page has beside its bytes. Rolling back its bytes alone would be half of it.
//!
//! | page now | |
//! |---|---|
//! | lazily free (`MADV_FREE`): the kernel may take it | written even if equal: a write takes the mark off |
//! | in memory that a userfaultfd serves, and differs | refused: the kernel fails such a write in the middle (EIO) |
//! | guard (`MADV_GUARD_INSTALL`), content in the snapshot | refused, when it cannot be read |
//!
//! | page in the snapshot | |
//! |---|---|
//! | not captured, and still not readable | left |
//! | not captured, in private memory, and has content now | refused: what it had then is unknown, or it was a guard |
//! | … as a userfaultfd was to fill it | left and told |
//! | not there, in memory without permissions | emptied |

use std::ops::Range;

use super::attempt::Attempt;
use super::held_memory::HeldMemory;
use super::plan::Plan;
use super::shared::mapping_at;
use crate::address_space::{Mapping, MappingKind};
use crate::error::Error;
use crate::left_out::{LeftOut, WhyLeftOut};
use crate::ranges::{complement, merge, overlapping};
use crate::source::{Frozen as _, MappingState};
use crate::units::AddressRange;

/// What the kernel says about the mappings of a process.
pub(super) struct PageStates {
    /// In the order of their addresses.
    states: Vec<MappingState>,
    /// Mappings in which pages are lazily free: sorted and apart.
    lazily_free: Vec<Range<u64>>,
}

impl PageStates {
    /// Asks the kernel.
    pub(super) fn look(attempt: &Attempt<'_>) -> Result<PageStates, Error> {
        attempt.check_interrupt()?;
        let states = attempt.held.mapping_states()?;
        let lazily_free = states.iter().filter(|state| state.lazily_free_bytes > 0);
        let mut lazily_free: Vec<_> = lazily_free.map(|it| it.range.start()..it.range.end()).collect();
        merge(&mut lazily_free);
        Ok(PageStates { states, lazily_free })
    }

    /// The mapping that an address is in.
    pub(super) fn at(&self, address: u64) -> Option<&MappingState> {
        let at = self.states.partition_point(|it| it.range.end() <= address);
        self.states.get(at).filter(|it| it.range.start() <= address)
    }

    /// The mapping that a range begins in.
    pub(super) fn range_at(&self, range: AddressRange) -> AddressRange {
        self.at(range.start()).map_or(range, |state| state.range)
    }

    /// Where pages are to be written even if they are equal: sorted and apart.
    pub(super) fn lazily_free(&self) -> &[Range<u64>] {
        &self.lazily_free
    }
}

/// An error if memory that the snapshot does not have is private and has content now. Answers how many bytes it does
/// not have that are there now and stay as they are.
pub(super) fn check_left_out(attempt: &Attempt<'_>, memory: &HeldMemory<'_>) -> Result<u64, Error> {
    let mappings = attempt.held.address_space().mappings();
    let is_private_memory = |mapping: &Mapping| is_memory(mapping) && !mapping.protection.shared;
    // Older snapshots do not say why.
    let reasons = match &attempt.captured.left_out {
        Some(left_out) => left_out.clone(),
        None => {
            let unreadable = attempt.roll_back.space.unreadable().iter();
            unreadable.map(|range| LeftOut { range: *range, why: WhyLeftOut::Refused }).collect()
        }
    };
    let (mut differences, mut left_bytes) = (Vec::new(), 0);
    for LeftOut { range, why } in reasons {
        attempt.check_interrupt()?;
        for there in overlapping(memory.populated(), range.start()..range.end()) {
            let is_private = mapping_at(mappings, there.start).is_some_and(is_private_memory);
            if !memory.is_readable(&there)? {
                continue;
            }
            // What a userfaultfd has filled since is what it would have filled then.
            if why == WhyLeftOut::Userfault || !is_private {
                left_bytes += there.end - there.start;
                continue;
            }
            let was = match why {
                WhyLeftOut::Guard => "was guard pages",
                _ => "was a guard page or could not be read",
            };
            let there = AddressRange::new(there.start, there.end).unwrap_or(range);
            differences.push(format!("{there} {was} when it was captured, and has content now"));
        }
    }
    if differences.is_empty() { Ok(left_bytes) } else { Err(attempt.misfit(differences).into()) }
}

/// Where the process had memory without permissions of which no page was there, and has pages now: they were zeros.
/// Older snapshots do not say whether there were any.
pub(super) fn filled_without_permission(attempt: &Attempt<'_>, memory: &HeldMemory<'_>) -> Vec<Range<u64>> {
    let Some(left_out) = &attempt.captured.left_out else { return Vec::new() };
    let mut unknown: Vec<_> = left_out.iter().map(|it| it.range.start()..it.range.end()).collect();
    merge(&mut unknown);
    let space = &attempt.roll_back.space;
    let closed = space
        .mappings()
        .iter()
        .filter(|it| !it.captured && !it.protection.read && is_memory(it) && !it.protection.shared);
    let known = closed.flat_map(|it| complement(&unknown, it.range.start()..it.range.end()));
    known.flat_map(|range| overlapping(memory.populated(), range).collect::<Vec<_>>()).collect()
}

fn is_memory(mapping: &Mapping) -> bool {
    matches!(mapping.kind, MappingKind::Anonymous | MappingKind::Heap | MappingKind::Stack)
}

/// An error if anything is to be written where a userfaultfd stands in the way.
pub(super) fn check_writes(attempt: &Attempt<'_>, states: &PageStates, plan: &Plan<'_>) -> Result<(), Error> {
    for patch in &plan.patches {
        let Some(state) = states.at(patch.at) else { continue };
        if let Some(how) = state.userfault {
            let why = format!(
                "{} differs, and a userfaultfd {how}: the kernel does not let others write there; it fits when the \
                 one who serves it has unregistered it (`um`, `uw`, `ui` in VmFlags of /proc/{}/smaps)",
                state.range, attempt.pid
            );
            return Err(attempt.refusal(why).into());
        }
    }
    Ok(())
}

/// An error if memory would have to be read that a userfaultfd fills: that would wait for the process, which
/// stands still.
pub(super) fn check_reads(attempt: &Attempt<'_>, states: &PageStates) -> Result<(), Error> {
    let mappings = attempt.held.address_space().mappings();
    for state in states.states.iter().filter(|state| state.userfault.is_some()) {
        let is_shared =
            mapping_at(mappings, state.range.start()).is_some_and(|it| it.protection.shared && it.captured);
        if is_shared {
            let why = format!(
                "{} is shared memory, of which a userfaultfd {}: to read it would wait for the process, which stands \
                 still",
                state.range,
                state.userfault.unwrap_or_default()
            );
            return Err(attempt.refusal(why).into());
        }
    }
    Ok(())
}
