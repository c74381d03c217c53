//! What only the process itself can do: map memory (`remade.rs`), protect it (`mprotect`), throw pages away
//! (MADV_DONTNEED), and set the positions of its files (`lseek`).
//!
//! Calls that can be undone come first. If one fails while nothing else has been done the process is as it was.

use std::ops::Range;

use super::attempt::Attempt;
use super::descriptors;
use super::fit::Reprotected;
use super::guards::Guarding;
use super::held_memory::HeldMemory;
use super::memory_limit::Relief;
use super::page_state::PageStates;
use super::remade::{self, Remade};
use crate::address_space::{Mapping, MappingKind, Protection};
use crate::error::{Error, RollbackError};
use crate::ranges::{complement, merge};
use crate::sink::SinkError;
use crate::source::Frozen as _;
use crate::source::injection::{CALL_CODE, Call, InjectionError, SIGRETURN_CODES, Step};
use crate::threads::{MACHINE, X86_64};

pub(super) use crate::source::injection::Foothold;

const MADVISE: u64 = 28;
const MADV_DONTNEED: u64 = 4;

/// How much code is searched at a time.
const SEARCHED_BYTES: usize = 1 << 20;

/// Looks for what is needed in the process to make it call the kernel; or why that cannot be done.
pub(super) fn find_foothold(
    attempt: &Attempt<'_>,
    states: &PageStates,
    memory: &HeldMemory<'_>,
) -> Result<Result<Foothold, &'static str>, Error> {
    if MACHINE != X86_64 {
        return Ok(Err("that is done on x86-64 only"));
    }
    if attempt.held.is_confined() {
        return Ok(Err("it is confined by seccomp"));
    }
    let Some(page) = empty_page(attempt, states, memory) else {
        return Ok(Err("it has no empty page to do it with"));
    };
    let (mut call, mut sigreturn) = (None, None);
    let mappings = attempt.held.address_space().mappings();
    for mapping in mappings.iter().filter(|it| it.protection.execute && it.protection.read && it.captured) {
        if mapping.kind != MappingKind::File {
            continue;
        }
        attempt.check_interrupt()?;
        let mut code = vec![0; SEARCHED_BYTES];
        for at in (mapping.range.start()..mapping.range.end()).step_by(SEARCHED_BYTES) {
            let length =
                usize::try_from(mapping.range.end() - at).map_or(SEARCHED_BYTES, |it| it.min(SEARCHED_BYTES));
            let code = &mut code[..length];
            memory.copy(at, code)?;
            let find = |wanted: &[u8]| {
                code.windows(wanted.len()).position(|it| it == wanted).map(|it| at + it as u64)
            };
            call = call.or_else(|| find(CALL_CODE));
            sigreturn = sigreturn.or_else(|| SIGRETURN_CODES.iter().find_map(|wanted| find(wanted)));
        }
        if let (Some(call), Some(sigreturn)) = (call, sigreturn) {
            return Ok(Ok(Foothold { call, sigreturn, page }));
        }
    }
    Ok(Err("its code has no system call that could be used"))
}

/// A page that is not there now, and that this rollback compares, so that it is zeros again afterwards whatever
/// happens. In the stack if there is one.
fn empty_page(attempt: &Attempt<'_>, states: &PageStates, memory: &HeldMemory<'_>) -> Option<u64> {
    let page_bytes = rustix::param::page_size() as u64;
    let space = &attempt.rollback.space;
    let is_usable = |it: &&Mapping| {
        let is_memory = matches!(it.kind, MappingKind::Anonymous | MappingKind::Heap | MappingKind::Stack);
        let state = states.at(it.range.start());
        is_memory
            && it.protection == Protection::READ_WRITE
            && state
                .is_some_and(|state| state.userfault.is_none() && !state.is_pinned && !state.may_have_guards)
    };
    let page_in = |mapping: &Mapping| {
        let range = mapping.range;
        let then =
            space.mappings().iter().filter(|it| it.captured).filter_map(|it| it.range.intersection(range));
        let mut compared: Vec<Range<u64>> = then.map(|it| it.start()..it.end()).collect();
        let left_out = space.excluded().iter().chain(space.unreadable());
        let mut taken: Vec<Range<u64>> = left_out.map(|it| it.start()..it.end()).collect();
        taken.extend(memory.populated().iter().cloned());
        taken.extend(states.changing().iter().cloned());
        merge(&mut taken);
        merge(&mut compared);
        let empty = compared.into_iter().flat_map(|it| complement(&taken, it));
        empty
            .map(|it| it.start.next_multiple_of(page_bytes)..it.end)
            .find(|it| it.end >= it.start + page_bytes)
    };
    let mappings = attempt.held.address_space().mappings();
    let usable = || mappings.iter().filter(is_usable);
    let stacks = usable().filter(|it| it.kind == MappingKind::Stack);
    stacks.chain(usable()).find_map(page_in).map(|range| range.start)
}

/// Calls that the process is to make.
pub(super) struct Calls {
    foothold: Foothold,
    steps: Vec<Step>,
    /// Whether memory may be read-only afterwards that is to be written then.
    pub(super) protects: bool,
}

/// Gets the calls ready, if any are needed: those that map and protect memory, that make room, that set positions.
pub(super) fn prepare(
    attempt: &Attempt<'_>,
    states: &PageStates,
    memory: &HeldMemory<'_>,
    relief: Option<Relief>,
    reprotected: &[Reprotected],
    seeks: &[(u32, u64)],
) -> Result<Option<Calls>, Error> {
    let mut steps: Vec<Step> = reprotected.iter().map(protect).collect();
    let (lossless, lossy): (Vec<_>, Vec<_>) = states.remade().iter().partition(|it| it.can_be_undone());
    steps.extend(lossless.into_iter().flat_map(|it| it.steps.clone()));
    // Guards in memory that gets its protection again first.
    let guards = states.guards().iter();
    let (lossless_guards, lossy_guards): (Vec<_>, Vec<_>) = guards.partition(|it| it.can_be_undone());
    steps.extend(lossless_guards.into_iter().chain(lossy_guards).map(Guarding::step));
    steps.extend(lossy.into_iter().flat_map(|it| it.steps.clone()));
    let mends = !steps.is_empty();
    if relief.is_none() && !mends && seeks.is_empty() {
        return Ok(None);
    }
    let (ranges, foothold) = match relief {
        Some(Relief { ranges, foothold }) => (ranges, Ok(foothold)),
        None => (Vec::new(), find_foothold(attempt, states, memory)?),
    };
    let foothold = foothold.and_then(|it| {
        is_kept(&it, states, reprotected)
            .then_some(it)
            .ok_or("its own code would become something that it cannot run")
    });
    let foothold = match foothold {
        Ok(foothold) => foothold,
        Err(why) if !mends => {
            let why = format!(
                "it cannot be made to set the positions of its files, as {why}; do without --seek-files"
            );
            return Err(attempt.refusal(why).into());
        }
        Err(why) => {
            let protections = reprotected.iter().map(|Reprotected { range, now, then }| {
                format!("{:#x}..{:#x} was {then} and is {now} now", range.start, range.end)
            });
            let texts = protections.chain(states.remade().iter().map(|it| it.text.clone()));
            let texts = texts.chain(states.guards().iter().map(Guarding::text));
            let mut differences: Vec<String> =
                texts.map(|text| format!("{text}, and it cannot be made to change that, as {why}")).collect();
            differences.dedup();
            return Err(attempt.misfit(differences).into());
        }
    };
    steps.extend(ranges.into_iter().map(|range| Step {
        call: Call {
            number: MADVISE,
            arguments: [range.start, range.end - range.start, MADV_DONTNEED, 0, 0, 0],
        },
        expected: 0,
        undo: None,
        what: "give memory back",
    }));
    steps.extend(descriptors::seek_calls(seeks));
    let protects = reprotected.iter().any(|it| !it.then.write);
    Ok(Some(Calls { foothold, steps, protects }))
}

fn protect(Reprotected { range, now, then }: &Reprotected) -> Step {
    let undo = Some((remade::protect(range, *now), 0));
    Step { call: remade::protect(range, *then), expected: 0, undo, what: "protect memory as it was" }
}

/// Whether what is needed to call is there, with its permissions, until the last call.
fn is_kept(foothold: &Foothold, states: &PageStates, reprotected: &[Reprotected]) -> bool {
    let code = [foothold.call, foothold.sigreturn];
    let is_code_in = |range: &Range<u64>| code.iter().any(|at| range.contains(at));
    reprotected.iter().all(|it| {
        let is_page_in = it.range.contains(&foothold.page);
        (it.then.execute || !is_code_in(&it.range)) && (it.then.write || !is_page_in)
    }) && states.remade().iter().map(Remade::range).all(|it| !is_code_in(&it) && !it.contains(&foothold.page))
}

/// Has the process make them. From the first one on it is rolled back in part, unless the error says that it is
/// [impossible](InjectionError::Impossible).
pub(super) fn make(attempt: &Attempt<'_>, calls: &Calls) -> Result<(), InjectionError> {
    attempt.held.make_calls(calls.foothold, calls.steps.clone())
}

/// What the errors are called in a rollback.
pub(super) fn refused(attempt: &Attempt<'_>, error: InjectionError) -> Error {
    match error {
        InjectionError::Impossible(why) => attempt.refusal(why).into(),
        InjectionError::Failed(source) => {
            let pid = attempt.pid;
            let source = SinkError::LiveProcess { pid, action: "have calls made by", source };
            RollbackError::InPart { pid, source: Box::new(Error::from(source)) }.into()
        }
    }
}
