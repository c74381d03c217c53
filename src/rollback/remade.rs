//! Mappings that the process has unmapped or replaced since the snapshot. The process is made to
//! map them again at the same addresses.
//!
//! | in the snapshot | action |
//! |---|---|
//! | private memory without a file or name | mapped again, empty; its content is then written |
//! | … with guard pages | the guard pages are installed again |
//! | the heap, which has become shorter | extended to its length (`brk`) |
//! | shared memory with a file (memfd, `/dev/shm`) | mapped again by a descriptor of this file |
//! | anything else | refused |
//!
//! Mappings that are now at these addresses are replaced, like everything that is newer than the
//! snapshot. Only stacks, the heap, and mappings of the kernel or of a device are not. If a call
//! fails, the calls before it are undone if that loses nothing (`injection.rs`); so the calls that
//! lose something come last.

use std::collections::HashMap;
use std::ops::Range;

use super::attempt::Attempt;
use super::fit::{Changed, Part, overlapping};
use crate::address_space::{Mapping, MappingKind, Protection};
use crate::descriptors::Descriptor;
use crate::error::Error;
use crate::left_out::WhyLeftOut;
use crate::mapped_files::FileAt;
use crate::source::Frozen as _;
use crate::source::injection::{Call, Step};
use crate::sys::mapped::MappedFile;
use crate::units::AddressRange;

const MMAP: u64 = 9;
const MPROTECT: u64 = 10;
const MUNMAP: u64 = 11;
const BRK: u64 = 12;
const MADVISE: u64 = 28;
/// Linux 6.13.
const MADV_GUARD_INSTALL: u64 = 102;

/// A mapping, or a part of one, that is mapped again.
#[derive(Debug)]
pub(super) struct Remade {
    /// The mapping after the calls.
    pub(super) mapping: Mapping,
    /// The file of the mapping, and the descriptor by which the process maps it.
    pub(super) file: Option<(MappedFile, u32)>,
    /// What happened to the mapping, for the user.
    pub(super) text: String,
    /// The system calls.
    pub(super) steps: Vec<Step>,
}

impl Remade {
    pub(super) fn range(&self) -> Range<u64> {
        self.mapping.range.start()..self.mapping.range.end()
    }

    /// Whether undoing the calls loses nothing.
    pub(super) fn can_be_undone(&self) -> bool {
        self.steps.iter().all(|step| step.undo.is_some())
    }
}

/// The mappings that can be mapped again, in address order, and descriptions of those that cannot.
pub(super) fn plan(attempt: &Attempt<'_>, changed: &[Changed]) -> Result<(Vec<Remade>, Vec<String>), Error> {
    let (mut remade, mut differences) = (Vec::new(), Vec::new());
    let mut files = None;
    for change in changed {
        attempt.check_interrupt()?;
        let files = files.get_or_insert_with(|| Files::look(attempt));
        let parts: Result<Vec<_>, _> =
            change.parts.iter().map(|part| again(attempt, files, change, part)).collect();
        match parts {
            Ok(parts) => remade.extend(parts.into_iter().flatten()),
            Err("") => differences.push(change.text.clone()),
            Err(why) => differences.push(format!("{}, and {why}", change.text)),
        }
    }
    remade.sort_unstable_by_key(|it| it.mapping.range);
    Ok((remade, differences))
}

/// How a part of a mapping is mapped again. An error says why it cannot be; its text is empty where
/// nothing needs saying.
fn again(
    attempt: &Attempt<'_>,
    files: &Files,
    change: &Changed,
    (range, now): &Part,
) -> Result<Vec<Remade>, &'static str> {
    let before = &change.before;
    if now.as_ref().is_some_and(|it| !matches!(it.kind, MappingKind::Anonymous | MappingKind::File)) {
        return Err("");
    }
    let addresses = AddressRange::new(range.start, range.end).map_err(|_| "")?;
    check_known(attempt, before, addresses)?;
    let into_mapping = range.start - before.range.start();
    let offset = before.file_offset_bytes.wrapping_add(into_mapping);
    let whole = Mapping { range: addresses, file_offset_bytes: offset, ..before.clone() };
    let one = |mapping, file, step| {
        Ok(vec![Remade { mapping, file, text: change.text.clone(), steps: vec![step] }])
    };
    let undo = undo(attempt, files, range, now.as_ref());
    let is_replaced = now.is_some();
    match before.kind {
        MappingKind::Anonymous if !before.protection.shared => {
            if !before.name.is_empty() {
                return Err("its name (prctl) could not be given to it again");
            }
            let call = map(range, before.protection, None, is_replaced);
            let mut steps = vec![step(call, range.start, undo, "map memory again")];
            steps.extend(guards(attempt, addresses));
            let mapping = Mapping { file_offset_bytes: 0, ..whole };
            Ok(vec![Remade { mapping, file: None, text: change.text.clone(), steps }])
        }
        MappingKind::Heap if !is_replaced && range.end == before.range.end() && change.parts.len() == 1 => {
            let undo = Call { number: BRK, arguments: [range.start, 0, 0, 0, 0, 0] };
            let undo = Some((undo, range.start.cast_signed()));
            let call = Call { number: BRK, arguments: [range.end, 0, 0, 0, 0, 0] };
            one(whole, None, step(call, range.end, undo, "make its heap as long as it was"))
        }
        MappingKind::Anonymous | MappingKind::File if before.protection.shared => {
            // Reading another file may ask a server, which may never answer.
            if !is_memory_file(before.name.as_bytes()) {
                return Err("only memory files (memfd, /dev/shm) are mapped again");
            }
            let Some(then) = &attempt.captured.mapped_files else {
                return Err("the snapshot, of an older program, does not say which file it was");
            };
            let all = then.overlapping(range.start, range.end);
            let [FileAt { start, end, device, inode }] = *all else {
                return Err("the snapshot does not say which file it was");
            };
            if start > range.start || end < range.end {
                return Err("the snapshot does not say which file it was");
            }
            let file = MappedFile { device, inode };
            let number = files.number(file, before.protection)?;
            let call = map(range, before.protection, Some((number, offset)), is_replaced);
            one(whole, Some((file, number)), step(call, range.start, undo, "map a file again"))
        }
        _ => Err(""),
    }
}

/// An error unless the content of these addresses of a mapping is known.
fn check_known(attempt: &Attempt<'_>, before: &Mapping, range: AddressRange) -> Result<(), &'static str> {
    let space = &attempt.rollback.space;
    if space.excluded().iter().any(|it| it.intersection(range).is_some()) {
        return Err("what was in it was left out of the snapshot when it was captured");
    }
    let is_private = before.kind == MappingKind::Anonymous && !before.protection.shared;
    let Some(left_out) = &attempt.captured.left_out else {
        let is_unknown = is_private && !before.protection.read
            || space.unreadable().iter().any(|it| it.intersection(range).is_some());
        return if is_unknown {
            Err("the snapshot, of an older program, does not say what was in it")
        } else {
            Ok(())
        };
    };
    let here = left_out.iter().filter(|it| it.range.intersection(range).is_some());
    for it in here {
        match it.why {
            WhyLeftOut::Guard if is_private => {}
            WhyLeftOut::BehindFile if !is_private => {}
            WhyLeftOut::Guard => return Err("it had guard pages"),
            WhyLeftOut::Userfault => return Err("a userfaultfd served it"),
            _ => return Err("not all that was in it could be read when it was captured"),
        }
    }
    Ok(())
}

/// The calls that install the guard pages of a range again, in memory without any.
fn guards(attempt: &Attempt<'_>, range: AddressRange) -> Vec<Step> {
    let left_out = attempt.captured.left_out.iter().flatten();
    let there =
        left_out.filter(|it| it.why == WhyLeftOut::Guard).filter_map(|it| it.range.intersection(range));
    let call = |it: AddressRange| Call {
        number: MADVISE,
        arguments: [it.start(), it.length_bytes(), MADV_GUARD_INSTALL, 0, 0, 0],
    };
    // The guard pages vanish with the mapping, so undoing needs no call: `getpid` does nothing.
    there
        .map(|it| Step {
            call: call(it),
            expected: 0,
            undo: Some(Step::NOTHING),
            what: "install guard pages in",
        })
        .collect()
}

fn step(call: Call, expected: u64, undo: Option<(Call, i64)>, what: &'static str) -> Step {
    Step { call, expected: expected.cast_signed(), undo, what }
}

/// The call that maps a range: memory, or the file of a descriptor from an offset on.
fn map(range: &Range<u64>, protection: Protection, file: Option<(u32, u64)>, is_replaced: bool) -> Call {
    let fixed = if is_replaced { libc::MAP_FIXED } else { libc::MAP_FIXED_NOREPLACE };
    // Reserved memory is not to be counted as used memory.
    let reserve = if protection == Protection::default() { libc::MAP_NORESERVE } else { 0 };
    let (kind, number, offset) = match file {
        None => (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | reserve, u64::MAX, 0),
        Some((number, offset)) => (libc::MAP_SHARED, number.into(), offset),
    };
    let flags = u64::from((fixed | kind).cast_unsigned());
    let length = range.end - range.start;
    Call { number: MMAP, arguments: [range.start, length, bits(protection), flags, number, offset] }
}

/// The call that sets the protection of memory.
pub(super) fn protect(range: &Range<u64>, protection: Protection) -> Call {
    let arguments = [range.start, range.end - range.start, bits(protection), 0, 0, 0];
    Call { number: MPROTECT, arguments }
}

fn bits(protection: Protection) -> u64 {
    let bits = [(protection.read, libc::PROT_READ), (protection.write, libc::PROT_WRITE)];
    let bits = bits.into_iter().chain([(protection.execute, libc::PROT_EXEC)]);
    bits.filter(|(has, _)| *has).map(|(_, bit)| u64::from(bit.cast_unsigned())).sum()
}

/// The call that makes a range as it is now, with its expected result; `None` where something would
/// be lost.
fn undo(
    attempt: &Attempt<'_>,
    files: &Files,
    range: &Range<u64>,
    now: Option<&Mapping>,
) -> Option<(Call, i64)> {
    let Some(now) = now else {
        return Some((
            Call { number: MUNMAP, arguments: [range.start, range.end - range.start, 0, 0, 0, 0] },
            0,
        ));
    };
    let protection = now.protection;
    if now.kind == MappingKind::Anonymous && !protection.shared && now.name.is_empty() {
        let all = attempt.held.address_space().mappings();
        let addresses = AddressRange::new(range.start, range.end).ok()?;
        let is_empty = all[overlapping(all, addresses)].iter().all(|it| !it.captured);
        let call = map(range, protection, None, true);
        return (is_empty && protection == Protection::default())
            .then_some((call, range.start.cast_signed()));
    }
    let [is] = *attempt.held.mapped_files().overlapping(range.start, range.end) else { return None };
    let number = files.number(MappedFile { device: is.device, inode: is.inode }, protection).ok()?;
    let offset = now.file_offset_bytes.checked_add(range.start.checked_sub(now.range.start())?)?;
    let call = map(range, protection, Some((number, offset)), true);
    protection.shared.then_some((call, range.start.cast_signed()))
}

fn is_memory_file(name: &[u8]) -> bool {
    name.starts_with(b"/memfd:") || name.starts_with(b"/dev/shm/")
}

/// The memory files that the process has open now.
struct Files(HashMap<MappedFile, Vec<Descriptor>>);

impl Files {
    fn look(attempt: &Attempt<'_>) -> Files {
        let mut files: HashMap<MappedFile, Vec<Descriptor>> = HashMap::new();
        // Only files that are mapped, now or in the snapshot, matter; others need not be examined.
        let then = attempt.captured.mapped_files.iter().flat_map(|it| &it.0);
        let inodes: Vec<u64> = then.chain(&attempt.held.mapped_files().0).map(|it| it.inode).collect();
        for descriptor in attempt.held.descriptors().map_or(&[][..], |it| &it.0) {
            if !is_memory_file(&descriptor.target) || !inodes.contains(&descriptor.inode) {
                continue;
            }
            if let Ok(file) = attempt.held.descriptor_file(descriptor.number) {
                files.entry(file).or_default().push(descriptor.clone());
            }
        }
        Files(files)
    }

    /// A descriptor by which the file can be mapped shared with this protection. An error says why
    /// there is none.
    fn number(&self, file: MappedFile, protection: Protection) -> Result<u32, &'static str> {
        let all = self.0.get(&file).ok_or("the process has no descriptor of that file any more")?;
        let is_enough = |it: &&Descriptor| {
            const PATH: u32 = libc::O_PATH.cast_unsigned();
            match it.flags & libc::O_ACCMODE.cast_unsigned() {
                _ if it.flags & PATH != 0 => false,
                0 => !protection.write,
                mode => mode == libc::O_RDWR.cast_unsigned(),
            }
        };
        let found = all.iter().find(is_enough).map(|it| it.number);
        found.ok_or("the process has that file open only so that it cannot map it again")
    }
}
