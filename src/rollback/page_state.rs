//! The state that a page has besides its bytes, which a rollback must handle too.
//!
//! | page now | action |
//! |---|---|
//! | lazily free (`MADV_FREE`), may be discarded | written even if equal, which removes the mark |
//! | in memory that a userfaultfd serves, and differs | refused: the write would fail (EIO) |
//! | guard (`MADV_GUARD_INSTALL`), content in the snapshot | removed first (`guards.rs`) |
//!
//! | page in the snapshot | action |
//! |---|---|
//! | not captured, and still unreadable | left as it is |
//! | guard, and none now | installed (`guards.rs`) |
//! | not captured, private memory, and has content now | refused: its old content is unknown |
//! | … because a userfaultfd was to fill it | left as it is, and reported |
//! | absent, in memory without permissions | emptied |

use std::ops::Range;

use super::attempt::Attempt;
use super::fit::Reprotected;
use super::guards::Guarding;
use super::held_memory::HeldMemory;
use super::plan::Plan;
use super::remade::Remade;
use super::shared::mapping_at;
use crate::address_space::{Mapping, MappingKind};
use crate::error::Error;
use crate::left_out::{LeftOut, WhyLeftOut};
use crate::ranges::{complement, merge, overlapping};
use crate::source::{Frozen as _, MappingState};
use crate::units::AddressRange;

/// The kernel's state of the mappings of a process: now, and after the rollback has repaired the
/// mappings.
pub(super) struct PageStates {
    /// The mappings as they are now, in address order.
    now: Vec<MappingState>,
    /// The mappings after the repair.
    mended: Vec<MappingState>,
    mappings: Vec<Mapping>,
    /// Mappings that are mapped again, in address order.
    remade: Vec<Remade>,
    /// Guard pages that are installed or removed, in address order.
    guards: Vec<Guarding>,
    /// Memory that is mapped again, or whose protection or guards change: sorted and disjoint.
    changing: Vec<Range<u64>>,
    /// Mappings that have lazily free pages: sorted and disjoint.
    lazily_free: Vec<Range<u64>>,
}

impl PageStates {
    /// Reads the state from the kernel.
    pub(super) fn look(
        attempt: &Attempt<'_>,
        reprotected: &[Reprotected],
        remade: Vec<Remade>,
        guards: Vec<Guarding>,
    ) -> Result<PageStates, Error> {
        attempt.check_interrupt()?;
        let now = attempt.held.mapping_states()?;
        let lazily_free = now.iter().filter(|state| state.lazily_free_bytes > 0);
        let mut lazily_free: Vec<_> = lazily_free.map(|it| it.range.start()..it.range.end()).collect();
        merge(&mut lazily_free);
        let mut replaced: Vec<_> = remade.iter().map(Remade::range).collect();
        merge(&mut replaced);
        let mut changing = replaced.clone();
        changing.extend(reprotected.iter().map(|it| it.range.clone()));
        changing.extend(guards.iter().map(|it| it.range.clone()));
        merge(&mut changing);

        let rest_of = |range: AddressRange| {
            let rest = complement(&replaced, range.start()..range.end());
            rest.into_iter().filter_map(|it| AddressRange::new(it.start, it.end).ok())
        };
        let mut mended: Vec<MappingState> = Vec::new();
        for state in &now {
            mended.extend(rest_of(state.range).map(|range| MappingState { range, ..state.clone() }));
        }
        mended.extend(remade.iter().map(|it| MappingState {
            range: it.mapping.range,
            file: it.file.map(|(file, _)| file),
            lazily_free_bytes: 0,
            userfault: None,
            may_have_guards: false,
            is_pinned: false,
        }));
        mended.sort_unstable_by_key(|it| it.range);

        let mut mappings: Vec<Mapping> = Vec::new();
        for mapping in attempt.held.address_space().mappings() {
            for range in rest_of(mapping.range) {
                mappings.extend(with_protections(&part_of(mapping, range), reprotected));
            }
        }
        mappings.extend(remade.iter().map(|it| it.mapping.clone()));
        mappings.sort_unstable_by_key(|it| it.range);
        Ok(PageStates { now, mended, mappings, remade, guards, changing, lazily_free })
    }

    /// The mapping that has an address after the repair.
    pub(super) fn at(&self, address: u64) -> Option<&MappingState> {
        state_at(&self.mended, address)
    }

    /// The mapping that has the beginning of a range now.
    pub(super) fn range_at(&self, range: AddressRange) -> Option<AddressRange> {
        state_at(&self.now, range.start()).map(|state| state.range)
    }

    /// The mappings after the repair: those that are written to.
    pub(super) fn mappings(&self) -> &[Mapping] {
        &self.mappings
    }

    /// Mappings that are mapped again, in address order.
    pub(super) fn remade(&self) -> &[Remade] {
        &self.remade
    }

    /// Guard pages that are installed or removed, in address order.
    pub(super) fn guards(&self) -> &[Guarding] {
        &self.guards
    }

    /// Memory that is mapped again, or whose protection or guards change: sorted and disjoint.
    pub(super) fn changing(&self) -> &[Range<u64>] {
        &self.changing
    }

    /// Where pages are written even if they are equal: sorted and disjoint.
    pub(super) fn lazily_free(&self) -> &[Range<u64>] {
        &self.lazily_free
    }
}

fn state_at(states: &[MappingState], address: u64) -> Option<&MappingState> {
    let at = states.partition_point(|it| it.range.end() <= address);
    states.get(at).filter(|it| it.range.start() <= address)
}

/// A part of a mapping.
fn part_of(mapping: &Mapping, range: AddressRange) -> Mapping {
    let into = match mapping.kind == MappingKind::File || mapping.protection.shared {
        true => range.start() - mapping.range.start(),
        false => 0,
    };
    let file_offset_bytes = mapping.file_offset_bytes.wrapping_add(into);
    Mapping { range, file_offset_bytes, ..mapping.clone() }
}

/// The parts of a mapping, each with the protection that it gets. `reprotected` are in address
/// order.
fn with_protections(mapping: &Mapping, reprotected: &[Reprotected]) -> Vec<Mapping> {
    let whole = mapping.range.start()..mapping.range.end();
    let first = reprotected.partition_point(|it| it.range.end <= whole.start);
    let mut at = whole.start;
    let mut parts = Vec::new();
    let mut add = |range: Range<u64>, protection| {
        if let Ok(range) = AddressRange::new(range.start, range.end) {
            parts.push(Mapping { protection, ..part_of(mapping, range) });
        }
    };
    for it in reprotected[first..].iter().take_while(|it| it.range.start < whole.end) {
        add(at..it.range.start.max(at), mapping.protection);
        at = it.range.end.min(whole.end);
        add(it.range.start.max(whole.start)..at, it.then);
    }
    add(at..whole.end, mapping.protection);
    parts
}

/// An error if private memory that the snapshot does not have has content now. Returns how many
/// bytes exist now and stay as they are because the snapshot does not have them.
pub(super) fn check_left_out(
    attempt: &Attempt<'_>,
    states: &PageStates,
    memory: &HeldMemory<'_>,
) -> Result<u64, Error> {
    let is_private_memory = |mapping: &Mapping| is_memory(mapping) && !mapping.protection.shared;
    // Older snapshots do not record the reasons.
    let reasons = match &attempt.captured.left_out {
        Some(left_out) => left_out.clone(),
        None => {
            let unreadable = attempt.rollback.space.unreadable().iter();
            unreadable.map(|range| LeftOut { range: *range, why: WhyLeftOut::Refused }).collect()
        }
    };
    let (mut differences, mut left_bytes) = (Vec::new(), 0);
    for LeftOut { range, why } in reasons {
        attempt.check_interrupt()?;
        for there in overlapping(memory.populated(), range.start()..range.end()) {
            let is_private = mapping_at(states.mappings(), there.start).is_some_and(is_private_memory);
            if !memory.is_readable(&there)? {
                continue;
            }
            // A userfaultfd fills a page with the same content now as it would have then.
            if why == WhyLeftOut::Userfault || !is_private {
                left_bytes += there.end - there.start;
                continue;
            }
            let there = AddressRange::new(there.start, there.end).unwrap_or(range);
            differences.push(format!(
                "{there} was a guard page or could not be read when it was captured, and has content now"
            ));
        }
    }
    if differences.is_empty() { Ok(left_bytes) } else { Err(attempt.misfit(differences).into()) }
}

/// Memory that had no permissions and no pages in the snapshot, and has pages now: its content in
/// the snapshot is zeros. Older snapshots do not record whether there was such memory.
pub(super) fn filled_without_permission(attempt: &Attempt<'_>, memory: &HeldMemory<'_>) -> Vec<Range<u64>> {
    let Some(left_out) = &attempt.captured.left_out else { return Vec::new() };
    let mut unknown: Vec<_> = left_out.iter().map(|it| it.range.start()..it.range.end()).collect();
    merge(&mut unknown);
    let space = &attempt.rollback.space;
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

/// An error if the rollback would have to write memory that a userfaultfd serves.
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

/// An error if the rollback would have to read memory that a userfaultfd fills: the read would wait
/// for the process, which is paused.
pub(super) fn check_reads(attempt: &Attempt<'_>, states: &PageStates) -> Result<(), Error> {
    let mappings = attempt.held.address_space().mappings();
    for state in states.mended.iter().filter(|state| state.userfault.is_some()) {
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
