//! Guard pages (`MADV_GUARD_INSTALL`, Linux 6.13), which protect the stacks of threads, for
//! example. They are a state of pages and not of mappings, so the process itself must install and
//! remove them by system calls.
//!
//! | snapshot | now | action |
//! |---|---|---|
//! | guards | guards | none |
//! | guards | memory | guards are installed; the present content is lost |
//! | memory | guards | guards are removed; the pages are then zeros, and are written like others |
//! | no mapping | guards | none, as for all new memory |

use std::ops::Range;

use super::attempt::Attempt;
use super::fit;
use super::remade::Remade;
use crate::address_space::MappingKind;
use crate::error::Error;
use crate::left_out::{LeftOut, WhyLeftOut};
use crate::ranges::{complement, merge, overlapping};
use crate::source::Frozen as _;
use crate::source::injection::{Call, Step};
use crate::units::AddressRange;

const MADVISE: u64 = 28;
const MADV_GUARD_INSTALL: u64 = 102;
const MADV_GUARD_REMOVE: u64 = 103;

/// Guards to install or to remove.
#[derive(Debug)]
pub(super) struct Guarding {
    pub(super) range: Range<u64>,
    is_removed: bool,
    /// Whether the range has no content now that would be lost.
    is_empty: bool,
}

/// The differences in guards, in address order, outside the mappings that are mapped again. Older
/// snapshots do not record guards.
pub(super) fn plan(attempt: &Attempt<'_>, remade: &[Remade]) -> Result<Vec<Guarding>, Error> {
    let Some(then) = &attempt.captured.left_out else { return Ok(Vec::new()) };
    let mut elsewhere: Vec<Range<u64>> = remade.iter().map(Remade::range).collect();
    merge(&mut elsewhere);
    let is_memory = |kind| matches!(kind, MappingKind::Anonymous | MappingKind::Heap | MappingKind::Stack);
    let space = attempt.rollback.space.mappings().iter();
    let space = space.filter(|it| it.captured && is_memory(it.kind) && !it.protection.shared);
    let mut memory: Vec<_> = space.map(|it| it.range.start()..it.range.end()).collect();
    merge(&mut memory);
    memory = memory.into_iter().flat_map(|it| complement(&elsewhere, it)).collect();
    let (then, now) = (of(then), of(&attempt.held.left_out()));
    let only = |ranges: &[Range<u64>], others: &[Range<u64>]| -> Vec<Range<u64>> {
        let rest = ranges.iter().flat_map(|it| complement(others, it.clone()));
        rest.flat_map(|it| overlapping(&memory, it).collect::<Vec<_>>()).collect()
    };
    let mut all = Vec::new();
    for range in only(&now, &then) {
        all.push(Guarding { range, is_removed: true, is_empty: true });
    }
    for range in only(&then, &now) {
        attempt.check_interrupt()?;
        let is_empty = is_empty(attempt, &range)?;
        all.push(Guarding { range, is_removed: false, is_empty });
    }
    all.sort_unstable_by_key(|it| it.range.start);
    Ok(all)
}

/// Whether the range has no page now.
fn is_empty(attempt: &Attempt<'_>, range: &Range<u64>) -> Result<bool, Error> {
    let mappings = attempt.held.address_space().mappings();
    let Ok(addresses) = AddressRange::new(range.start, range.end) else { return Ok(true) };
    for index in fit::overlapping(mappings, addresses) {
        let mapping = &mappings[index];
        if mapping.captured {
            let populated = attempt.held.populated(index)?;
            let start = mapping.range.start();
            let within = range.start.max(start) - start..range.end.min(mapping.range.end()) - start;
            if overlapping(&populated, within).next().is_some() {
                return Ok(false);
            }
        }
    }
    Ok(true)
}

fn of(left_out: &[LeftOut]) -> Vec<Range<u64>> {
    let guards = left_out.iter().filter(|it| it.why == WhyLeftOut::Guard);
    let mut ranges: Vec<_> = guards.map(|it| it.range.start()..it.range.end()).collect();
    merge(&mut ranges);
    ranges
}

impl Guarding {
    /// Whether the step can be undone.
    pub(super) fn can_be_undone(&self) -> bool {
        self.is_removed || self.is_empty
    }

    /// The system call.
    pub(super) fn step(&self) -> Step {
        let (advice, undo, what) = match self.is_removed {
            true => (MADV_GUARD_REMOVE, MADV_GUARD_INSTALL, "remove guard pages"),
            false => (MADV_GUARD_INSTALL, MADV_GUARD_REMOVE, "install guard pages"),
        };
        let call = |advice| Call {
            number: MADVISE,
            arguments: [self.range.start, self.range.end - self.range.start, advice, 0, 0, 0],
        };
        let undo = self.can_be_undone().then(|| (call(undo), 0));
        Step { call: call(advice), expected: 0, undo, what }
    }

    /// The description for the user.
    pub(super) fn text(&self) -> String {
        let range = AddressRange::new(self.range.start, self.range.end);
        let range = range.map_or_else(|_| String::new(), |it| it.to_string());
        match self.is_removed {
            true => format!("{range} is guard pages, which it was not when it was captured"),
            false => format!("{range} was guard pages when it was captured, and is not now"),
        }
    }
}
