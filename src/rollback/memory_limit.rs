//! Checks that there is enough memory: while a rollback writes, the pages of both moments exist.
//!
//! Pages that exist now and did not exist in the snapshot would be overwritten with zeros, and
//! would stay. If that takes too much memory, they are discarded instead, before anything is
//! written (`injection.rs`). If that is still too much, the rollback is refused, because the kernel
//! would kill the process in the middle of it.

use std::ops::Range;

use super::attempt::Attempt;
use super::held_memory::HeldMemory;
use super::injection::{self, Foothold};
use super::page_state::PageStates;
use super::plan::Plan;
use super::shared::mapping_at;
use crate::address_space::MappingKind;
use crate::error::Error;
use crate::ranges::{merge, overlapping};
use crate::sys::memory_limit;

/// Pages to discard before anything is written.
pub(super) struct Relief {
    pub(super) ranges: Vec<Range<u64>>,
    pub(super) foothold: Foothold,
}

/// An error unless there is enough memory. Returns the pages that must be discarded for that, and
/// removes them from the plan.
pub(super) fn check(
    attempt: &Attempt<'_>,
    states: &PageStates,
    memory: &HeldMemory<'_>,
    plan: &mut Plan<'_>,
) -> Result<Option<Relief>, Error> {
    let Some(headroom) = memory_limit::headroom(attempt.pid) else { return Ok(None) };
    let wanted_bytes = new_bytes(states, memory, plan).saturating_add(SLACK_BYTES);
    if wanted_bytes <= headroom.bytes {
        return Ok(None);
    }
    let (ranges, freed_bytes) = discardable(states, memory, plan);
    let refusal = |why: String| {
        attempt.refusal(format!(
            "it would need {wanted_bytes} more bytes, and {} has {} left{why}; give it a higher limit first",
            headroom.of, headroom.bytes
        ))
    };
    if wanted_bytes > headroom.bytes.saturating_add(freed_bytes) {
        let why = match freed_bytes {
            0 => String::new(),
            freed_bytes => format!(", of its own {freed_bytes} would become free"),
        };
        return Err(refusal(why).into());
    }
    match injection::find_foothold(attempt, states, memory)? {
        Ok(foothold) => {
            plan.leave_zeros_out(&ranges);
            Ok(Some(Relief { ranges, foothold }))
        }
        Err(why) => Err(refusal(format!(
            "; {freed_bytes} bytes of its own are not needed, but it cannot be made to give them back, as {why}"
        ))
        .into()),
    }
}

/// An allowance for page tables and similar kernel memory.
const SLACK_BYTES: u64 = 1 << 20;

/// How many bytes of pages the rollback writes that do not exist now.
fn new_bytes(states: &PageStates, memory: &HeldMemory<'_>, plan: &Plan<'_>) -> u64 {
    let mappings = states.mappings();
    let is_file = |at: u64| {
        // The present page belongs to the file; the write makes a copy.
        mapping_at(mappings, at).is_some_and(|it| it.kind == MappingKind::File && !it.protection.shared)
    };
    let pieces = plan.patches.iter().flat_map(|patch| patch.pieces.iter().map(|piece| (patch.at, piece)));
    let needed = pieces.map(|(at, piece)| {
        let range = at + piece.start as u64..at + piece.end as u64;
        let length = range.end - range.start;
        match is_file(at) {
            true => length,
            false => length - overlapping(memory.populated(), range).map(|it| it.end - it.start).sum::<u64>(),
        }
    });
    needed.sum()
}

/// Pages whose whole content becomes zeros, in memory where pages may be discarded, and how many
/// bytes of them exist now.
fn discardable(states: &PageStates, memory: &HeldMemory<'_>, plan: &Plan<'_>) -> (Vec<Range<u64>>, u64) {
    let page_bytes = rustix::param::page_size() as u64;
    let mappings = states.mappings();
    let is_plain_memory = |at: u64| {
        let is_memory = mapping_at(mappings, at).is_some_and(|it| {
            let is_anonymous =
                matches!(it.kind, MappingKind::Anonymous | MappingKind::Heap | MappingKind::Stack);
            is_anonymous && !it.protection.shared
        });
        is_memory && states.at(at).is_some_and(|it| !it.is_pinned && it.userfault.is_none())
    };
    let mut ranges = Vec::new();
    for patch in plan.patches.iter().filter(|patch| patch.hash.is_zero() && is_plain_memory(patch.at)) {
        for piece in &patch.pieces {
            let start = (patch.at + piece.start as u64).next_multiple_of(page_bytes);
            let end = (patch.at + piece.end as u64) / page_bytes * page_bytes;
            if start < end {
                ranges.push(start..end);
            }
        }
    }
    merge(&mut ranges);
    let there = ranges.iter().flat_map(|range| overlapping(memory.populated(), range.clone()));
    let freed_bytes = there.map(|it| it.end - it.start).sum();
    (ranges, freed_bytes)
}
