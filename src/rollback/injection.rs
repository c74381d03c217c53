//! Having the process throw pages away (MADV_DONTNEED), which no other process can do for it.

use std::ops::Range;

use super::attempt::Attempt;
use super::held_memory::HeldMemory;
use super::page_state::PageStates;
use crate::address_space::{Mapping, MappingKind, Protection};
use crate::error::Error;
use crate::sink::SinkError;
use crate::source::Frozen as _;
use crate::source::injection::{CALL_CODE, Call, InjectionError, SIGRETURN_CODES};
use crate::threads::{MACHINE, X86_64};
use crate::track::complement;

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
    let space = &attempt.roll_back.space;
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
        crate::track::merge(&mut taken);
        crate::track::merge(&mut compared);
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

/// Has the process throw the pages of these ranges away. From the first one on it is rolled back in part.
pub(super) fn discard(
    attempt: &Attempt<'_>,
    foothold: Foothold,
    ranges: &[Range<u64>],
) -> Result<(), InjectionError> {
    let call = |range: &Range<u64>| Call {
        number: MADVISE,
        arguments: [range.start, range.end - range.start, MADV_DONTNEED, 0, 0, 0],
    };
    let results = attempt.held.make_calls(foothold, ranges.iter().map(call).collect())?;
    match results.iter().find(|result| **result != 0) {
        None => Ok(()),
        Some(result) => {
            let errno = i32::try_from(-result).unwrap_or(libc::EIO);
            Err(InjectionError::Failed(std::io::Error::from_raw_os_error(errno)))
        }
    }
}

/// What the errors are called in a rollback.
pub(super) fn refused(attempt: &Attempt<'_>, error: InjectionError) -> Error {
    match error {
        InjectionError::Impossible(why) => attempt.refusal(why).into(),
        InjectionError::Failed(source) => {
            let pid = attempt.pid;
            let source = SinkError::Process { pid, action: "throw away pages of", source };
            SinkError::InPart { pid, source: Box::new(source.into()) }.into()
        }
    }
}
