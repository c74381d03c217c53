//! What only the process itself can do: throw pages away (MADV_DONTNEED), protect its memory (`mprotect`), and set the
//! positions of its files (`lseek`).

use std::ops::Range;

use super::attempt::Attempt;
use super::descriptors;
use super::held_memory::HeldMemory;
use super::memory_limit::Relief;
use super::page_state::PageStates;
use crate::address_space::{Mapping, MappingKind, Protection};
use crate::error::{Error, RollbackError};
use crate::sink::SinkError;
use crate::source::Frozen as _;
use crate::source::injection::{CALL_CODE, Call, InjectionError, SIGRETURN_CODES};
use crate::threads::{MACHINE, X86_64};
use crate::track::complement;

pub(super) use crate::source::injection::Foothold;

const MADVISE: u64 = 28;
const MADV_DONTNEED: u64 = 4;
const MPROTECT: u64 = 10;

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

/// Calls that the process is to make.
pub(super) struct Calls {
    foothold: Foothold,
    /// Each with what it is to return.
    calls: Vec<(Call, i64)>,
    /// Whether memory may be read-only afterwards that is to be written then.
    pub(super) protects: bool,
}

/// Gets the calls ready, if any are needed: those that make room, that protect memory, that set positions.
pub(super) fn prepare(
    attempt: &Attempt<'_>,
    states: &PageStates,
    memory: &HeldMemory<'_>,
    relief: Option<Relief>,
    reprotected: &[(Range<u64>, Protection)],
    seeks: &[(u32, u64)],
) -> Result<Option<Calls>, Error> {
    let seek_calls = descriptors::seek_calls(seeks).into_iter();
    let seek_calls = seek_calls.zip(seeks.iter().map(|(_, position)| position.cast_signed()));
    let protect = |(range, protection): &(Range<u64>, Protection)| {
        let bits = [(protection.read, libc::PROT_READ), (protection.write, libc::PROT_WRITE)];
        let bits = bits.into_iter().chain([(protection.execute, libc::PROT_EXEC)]);
        let bits: i32 = bits.filter(|(has, _)| *has).map(|(_, bit)| bit).sum();
        let arguments = [range.start, range.end - range.start, u64::from(bits.cast_unsigned()), 0, 0, 0];
        (Call { number: MPROTECT, arguments }, 0)
    };
    let others: Vec<(Call, i64)> = reprotected.iter().map(protect).chain(seek_calls).collect();
    let (ranges, foothold) = match relief {
        Some(Relief { ranges, foothold }) => (ranges, Ok(foothold)),
        None if others.is_empty() => return Ok(None),
        None => (Vec::new(), find_foothold(attempt, states, memory)?),
    };
    // What is needed to call must not lose its permissions by one of the calls.
    let is_kept = |foothold: &Foothold| {
        reprotected.iter().all(|(range, protection)| {
            (protection.execute || ![foothold.call, foothold.sigreturn].iter().any(|at| range.contains(at)))
                && (protection.write || !range.contains(&foothold.page))
        })
    };
    let foothold = foothold.and_then(|it| {
        is_kept(&it).then_some(it).ok_or("its own code would become something that it cannot run")
    });
    let foothold = match foothold {
        Ok(foothold) => foothold,
        Err(why) if reprotected.is_empty() => {
            let why = format!(
                "it cannot be made to set the positions of its files, as {why}; do without --seek-files"
            );
            return Err(attempt.refusal(why).into());
        }
        Err(why) => {
            let differences = reprotected.iter().map(|(range, protection)| {
                format!(
                    "{:#x}..{:#x} was {protection} and is not now, and it cannot be made to change that, as {why}",
                    range.start, range.end
                )
            });
            return Err(attempt.misfit(differences.collect()).into());
        }
    };
    let discard = |range: Range<u64>| Call {
        number: MADVISE,
        arguments: [range.start, range.end - range.start, MADV_DONTNEED, 0, 0, 0],
    };
    let discards = ranges.into_iter().map(|range| (discard(range), 0));
    let protects = reprotected.iter().any(|(_, protection)| !protection.write);
    Ok(Some(Calls { foothold, calls: discards.chain(others).collect(), protects }))
}

/// Has the process make them. From the first one on it is rolled back in part.
pub(super) fn make(attempt: &Attempt<'_>, calls: &Calls) -> Result<(), InjectionError> {
    let results =
        attempt.held.make_calls(calls.foothold, calls.calls.iter().map(|(call, _)| *call).collect())?;
    match results.iter().zip(&calls.calls).find(|(result, (_, expected))| *result != expected) {
        None => Ok(()),
        Some((result, _)) => {
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
            let source = SinkError::Process { pid, action: "have calls made by", source };
            RollbackError::InPart { pid, source: Box::new(Error::from(source)) }.into()
        }
    }
}
