//! Whether a process still has the mappings of a snapshot, and which further ones it has now.

use std::collections::{HashMap, HashSet};
use std::ops::Range;

use super::attempt::Attempt;
use super::content;
use super::remade::{self, Remade};
use crate::address_space::{AddressSpace, Mapping, MappingKind, Protection};
use crate::error::{Error, RollbackError};
use crate::ranges::complement;
use crate::source::Frozen as _;
use crate::units::AddressRange;

/// How often the loop checks for an interruption: 1,024 mappings take less than a millisecond.
const MAPPINGS_BETWEEN_CHECKS: usize = 1024;

/// Differences in the mappings that the rollback can undo.
pub(super) struct Mendable {
    /// Memory by which mappings have grown. Its populated pages must be emptied.
    pub(super) grown: Vec<Range<u64>>,
    /// Memory whose protection changed and must be set back.
    pub(super) reprotected: Vec<Reprotected>,
    /// Mappings that were unmapped or replaced, and are mapped again.
    pub(super) remade: Vec<Remade>,
}

/// Memory that is still mapped, but with another protection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Reprotected {
    pub(super) range: Range<u64>,
    pub(super) now: Protection,
    pub(super) then: Protection,
}

/// Addresses at which another mapping is now, or none.
pub(super) type Part = (Range<u64>, Option<Mapping>);

/// A mapping of the snapshot that is missing or changed now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Changed {
    /// What happened to it, for the user.
    pub(super) text: String,
    pub(super) before: Mapping,
    pub(super) parts: Vec<Part>,
}

/// An error unless every mapping of the snapshot is there, or can be mapped again.
pub(super) fn check(attempt: &Attempt<'_>) -> Result<Mendable, Error> {
    let rollback = attempt.rollback;
    let now = attempt.held.address_space();
    let Fit { mut changed, mut new, grown, opened, mut reprotected } =
        compare(&rollback.space, now, &|| attempt.check_interrupt())?;
    changed.extend(of_other_files(attempt)?);
    let mut emptied = grown;
    for Opened { text, ranges } in opened {
        // Memory that had content and no permissions loses its permissions again.
        match content::filled(rollback, &ranges)?.is_empty() {
            true => {
                new.push(text);
                emptied.extend(ranges);
            }
            false => reprotected.extend(ranges.into_iter().map(|range| Reprotected {
                range,
                now: Protection::READ_WRITE,
                then: Protection::default(),
            })),
        }
    }
    reprotected.sort_unstable_by_key(|it| it.range.start);
    let (remade, mut differences) = remade::plan(attempt, &changed)?;
    let only_new = differences.is_empty();
    if !rollback.leave_new_memory {
        differences.extend(new);
    }
    match differences.is_empty() {
        true => Ok(Mendable { grown: emptied, reprotected, remade }),
        false => {
            Err(RollbackError::DoesNotFit { pid: attempt.pid, differences, only_new, advice: None }.into())
        }
    }
}

/// Shared mappings whose name is the same but whose file is another one. Older snapshots do not
/// record which file it was.
fn of_other_files(attempt: &Attempt<'_>) -> Result<Vec<Changed>, Error> {
    let Some(then) = &attempt.captured.mapped_files else { return Ok(Vec::new()) };
    let (before, now) = (attempt.rollback.space.mappings(), attempt.held.address_space().mappings());
    let mut changed = Vec::new();
    for (count, mapping) in before.iter().filter(|it| it.protection.shared).enumerate() {
        if count % MAPPINGS_BETWEEN_CHECKS == 0 {
            attempt.check_interrupt()?;
        }
        let mut parts = Vec::new();
        let is_alike = |it: &&Mapping| {
            let protection = mapping.protection;
            it.protection.shared && is_same(&Mapping { protection, ..(*it).clone() }, mapping)
        };
        for other in now[overlapping(now, mapping.range)].iter().filter(is_alike) {
            let Some(both) = other.range.intersection(mapping.range) else { continue };
            for was in then.overlapping(both.start(), both.end()) {
                for is in attempt.held.mapped_files().overlapping(both.start(), both.end()) {
                    let range =
                        both.start().max(was.start).max(is.start)..both.end().min(was.end).min(is.end);
                    if (was.device, was.inode) != (is.device, is.inode) && !range.is_empty() {
                        parts.push((range, Some(other.clone())));
                    }
                }
            }
        }
        if !parts.is_empty() {
            let text = format!("{} is another file of the same name now", named(mapping));
            changed.push(Changed { text, before: mapping.clone(), parts });
        }
    }
    Ok(changed)
}

/// The result of comparing two layouts.
#[derive(Debug, Default, PartialEq, Eq)]
struct Fit {
    /// Mappings of the snapshot that are missing or changed.
    changed: Vec<Changed>,
    /// Mappings that are new. The stack is not among them: the kernel grows it, and a program that
    /// has returned does not rely on the deeper part.
    new: Vec<String>,
    /// The memory by which the heap has grown. The C library expects zeros when it grows into this
    /// memory again.
    grown: Vec<Range<u64>>,
    /// Reserved memory without permissions that has become usable memory; the arenas of the C
    /// library grow like this. The C library expects zeros there too.
    opened: Vec<Opened>,
    /// Memory whose protection changed, with the protection to set.
    reprotected: Vec<Reprotected>,
}

/// Parts of a mapping without permissions that have become usable memory.
#[derive(Debug, PartialEq, Eq)]
struct Opened {
    /// The description for the user.
    text: String,
    ranges: Vec<Range<u64>>,
}

/// Compares the layout of the snapshot with that of now. Both are in address order, so each step is
/// a binary search. `check` is called regularly and returns an error to stop.
fn compare(
    before: &AddressSpace,
    now: &AddressSpace,
    check: &dyn Fn() -> Result<(), Error>,
) -> Result<Fit, Error> {
    let (before, now) = (joined(before), joined(now));
    let mut fit = Fit::default();
    let mut fitting = vec![false; now.len()];
    let mut moved = Moved { before: &before, now: &now, by_look: None };
    for (count, mapping) in before.iter().enumerate() {
        if count % MAPPINGS_BETWEEN_CHECKS == 0 {
            check()?;
        }
        let there = overlapping(&now, mapping.range);
        if let Some(at) = there.clone().find(|at| has(&now[*at], mapping)) {
            fitting[at] = true;
        } else if let Some(ranges) = opened(mapping, &now[there.clone()]) {
            let bytes: u64 = ranges.iter().map(|it| it.end - it.start).sum();
            let text = format!("{bytes} bytes of {}, set aside then, are memory now", named(mapping));
            fit.opened.push(Opened { text, ranges });
        } else {
            // The remaining part of a heap is still the heap.
            for at in there.clone() {
                fitting[at] |= mapping.kind == MappingKind::Heap && is_same(&now[at], mapping);
            }
            let (reprotected, parts) = differing(mapping, &now[there.clone()]);
            fit.reprotected.extend(reprotected);
            if !parts.is_empty() {
                let text = missing(mapping, &now[there], &mut moved);
                fit.changed.push(Changed { text, before: mapping.clone(), parts });
            }
        }
    }
    let ranges: Vec<_> = before.iter().map(|it| it.range.start()..it.range.end()).collect();
    for (count, (mapping, fits)) in now.iter().zip(fitting).enumerate() {
        if count % MAPPINGS_BETWEEN_CHECKS == 0 {
            check()?;
        }
        let range = mapping.range;
        let rest = complement(&ranges, range.start()..range.end());
        if rest.is_empty() || fits && mapping.kind == MappingKind::Stack {
            continue;
        }
        let bytes: u64 = rest.iter().map(|it| it.end - it.start).sum();
        fit.new.push(match fits {
            true => format!("{} has grown by {bytes} bytes", named(mapping)),
            false => format!("{} is new", named(mapping)),
        });
        if fits && mapping.kind == MappingKind::Heap {
            fit.grown.extend(rest);
        }
    }
    Ok(fit)
}

/// The indexes of the mappings that overlap `range`. `mappings` are in address order.
pub(super) fn overlapping(mappings: &[Mapping], range: AddressRange) -> Range<usize> {
    let first = mappings.partition_point(|it| it.range.end() <= range.start());
    let count = mappings[first..].partition_point(|it| it.range.start() < range.end());
    first..first + count
}

/// The parts of a mapping without permissions that have become usable memory. `None` if part of the
/// mapping is missing or differs in another way. `there` are the mappings that overlap it.
fn opened(before: &Mapping, there: &[Mapping]) -> Option<Vec<Range<u64>>> {
    let is_private_memory = |it: &Mapping| it.kind == MappingKind::Anonymous && !it.protection.shared;
    let is_closed = |it: &Mapping| it.protection == Protection::default();
    if !is_private_memory(before) || !is_closed(before) {
        return None;
    }
    let (mut at, mut opened) = (before.range.start(), Vec::new());
    for mapping in there {
        let is_open = mapping.protection == Protection::READ_WRITE;
        if mapping.range.start() > at || !is_private_memory(mapping) || !(is_open || is_closed(mapping)) {
            return None;
        }
        let end = mapping.range.end().min(before.range.end());
        if is_open {
            opened.push(at..end);
        }
        at = end;
    }
    (at == before.range.end() && !opened.is_empty()).then_some(opened)
}

/// The parts of a mapping whose protection alone has changed, and the parts where another mapping
/// is now, or none. Garbage collectors protect pages to detect writes. `there` are the mappings
/// that overlap it.
fn differing(before: &Mapping, there: &[Mapping]) -> (Vec<Reprotected>, Vec<Part>) {
    let (mut reprotected, mut parts) = (Vec::new(), Vec::new());
    let (mut at, end) = (before.range.start(), before.range.end());
    for mapping in there {
        if mapping.range.start() > at {
            parts.push((at..mapping.range.start(), None));
        }
        let range = mapping.range.start().max(at)..mapping.range.end().min(end);
        at = range.end;
        if is_same(before, mapping) {
            continue;
        }
        match can_be_reprotected(before, mapping) {
            true => {
                let (now, then) = (mapping.protection, before.protection);
                reprotected.push(Reprotected { range, now, then });
            }
            false => parts.push((range, Some(mapping.clone()))),
        }
    }
    if at < end {
        parts.push((at..end, None));
    }
    (reprotected, parts)
}

/// Whether two mappings differ in their protection alone, and the content of both is known. Of a
/// file that could not be read, only the written pages are known.
fn can_be_reprotected(before: &Mapping, now: &Mapping) -> bool {
    let alike = Mapping { protection: before.protection, ..now.clone() };
    let is_memory = matches!(before.kind, MappingKind::Anonymous | MappingKind::Heap | MappingKind::Stack);
    let is_private_memory = is_memory && !before.protection.shared;
    let are_readable = before.protection.read && now.protection.read;
    before.protection.shared == now.protection.shared
        && is_same(before, &alike)
        && (is_private_memory || (is_memory || before.kind == MappingKind::File) && are_readable)
}

/// The mappings, with neighbours merged if they differ only in their addresses: the kernel merges
/// and splits mappings at will.
fn joined(space: &AddressSpace) -> Vec<Mapping> {
    let mut joined: Vec<Mapping> = Vec::new();
    for mapping in space.mappings() {
        match joined.last_mut() {
            Some(last) if last.range.end() == mapping.range.start() && is_same(last, mapping) => {
                last.range = AddressRange::new(last.range.start(), mapping.range.end()).unwrap_or(last.range);
            }
            _ => joined.push(mapping.clone()),
        }
    }
    joined
}

/// Whether two mappings map the same object in the same way.
fn is_same(one: &Mapping, other: &Mapping) -> bool {
    let has_offset = one.kind == MappingKind::File || one.protection.shared;
    // The address that corresponds to the beginning of the file.
    let origin = |it: &Mapping| it.range.start().wrapping_sub(it.file_offset_bytes);
    one.kind == other.kind
        && one.protection == other.protection
        && name(one) == name(other)
        && (!has_offset || origin(one) == origin(other))
}

/// The file may have been removed since.
fn name(mapping: &Mapping) -> &str {
    mapping.name.strip_suffix(" (deleted)").unwrap_or(&mapping.name)
}

fn has(now: &Mapping, before: &Mapping) -> bool {
    is_same(now, before) && now.range.start() <= before.range.start() && before.range.end() <= now.range.end()
}

fn named(mapping: &Mapping) -> String {
    let what = if mapping.name.is_empty() { mapping.kind.name() } else { &mapping.name };
    format!("{} ({} {what})", mapping.range, mapping.protection)
}

/// Describes what happened to a mapping that is missing or changed. `there` are the mappings that
/// overlap it.
fn missing(mapping: &Mapping, there: &[Mapping], moved: &mut Moved<'_>) -> String {
    let became = match there {
        [] => match moved.find(mapping).filter(|_| !mapping.name.is_empty()) {
            Some(other) => format!("was moved to {}", other.range),
            None => "is gone".to_owned(),
        },
        [one] if is_same(one, mapping) => format!("is only {} now", one.range),
        [one] if one.range == mapping.range && one.protection != mapping.protection => {
            format!("is {} now", one.protection)
        }
        [one] => format!("is {} now", named(one)),
        [one, ..] => format!("is parted now, into {} and others", named(one)),
    };
    format!("{} {became}", named(mapping))
}

/// Finds mappings that were moved. It builds its map at the first use.
struct Moved<'a> {
    before: &'a [Mapping],
    now: &'a [Mapping],
    by_look: Option<HashMap<Look<'a>, &'a Mapping>>,
}

/// All properties of a mapping except its address.
type Look<'a> = (MappingKind, &'a str, Protection, u64);

impl<'a> Moved<'a> {
    /// The first mapping with the same properties at an address where no mapping was.
    fn find(&mut self, mapping: &Mapping) -> Option<&'a Mapping> {
        let (before, now) = (self.before, self.now);
        let by_look = self.by_look.get_or_insert_with(|| {
            let ranges: HashSet<AddressRange> = before.iter().map(|it| it.range).collect();
            let is_new = |it: &&Mapping| !ranges.contains(&it.range);
            // Of several with the same properties, the first one remains in the map.
            now.iter().rev().filter(is_new).map(|it| (look(it), it)).collect()
        });
        by_look.get(&look(mapping)).copied()
    }
}

fn look(mapping: &Mapping) -> Look<'_> {
    (mapping.kind, name(mapping), mapping.protection, mapping.range.length_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mapping(start: u64, end: u64, kind: MappingKind, name: &str) -> Mapping {
        let range = AddressRange::new(start * 4096, end * 4096).unwrap();
        let (protection, name) = (Protection::READ_WRITE, name.to_owned());
        Mapping { range, protection, kind, name, file_offset_bytes: 0, captured: true }
    }

    fn anonymous(start: u64, end: u64) -> Mapping {
        mapping(start, end, MappingKind::Anonymous, "")
    }

    fn file(start: u64, end: u64, offset_pages: u64) -> Mapping {
        let file = mapping(start, end, MappingKind::File, "/lib/x");
        Mapping { file_offset_bytes: offset_pages * 4096, ..file }
    }

    fn read_only(mapping: Mapping) -> Mapping {
        Mapping { protection: Protection { write: false, ..mapping.protection }, ..mapping }
    }

    fn closed(mapping: Mapping) -> Mapping {
        Mapping { protection: Protection::default(), ..mapping }
    }

    fn fit(before: Vec<Mapping>, now: Vec<Mapping>) -> Fit {
        compare(&AddressSpace::new(before).unwrap(), &AddressSpace::new(now).unwrap(), &|| Ok(())).unwrap()
    }

    #[test]
    fn what_the_kernel_joins_and_parts_still_fits() {
        let parted = || vec![anonymous(1, 4), anonymous(4, 9), file(20, 22, 0), file(22, 23, 2)];
        let whole = || vec![anonymous(1, 9), file(20, 23, 0)];
        assert_eq!(fit(parted(), whole()), Fit::default());
        assert_eq!(fit(whole(), parted()), Fit::default());
        let deleted = mapping(1, 2, MappingKind::File, "/lib/x (deleted)");
        assert_eq!(fit(vec![file(1, 2, 0)], vec![deleted]), Fit::default());
    }

    #[test]
    fn each_kind_of_difference_is_told() {
        let missing = |before, now| {
            let changed = fit(before, now).changed.into_iter();
            changed.map(|it| it.text).collect::<Vec<_>>()
        };
        let page = |page: u64| format!("{:#x}", page * 4096);
        for (before, now, expected) in [
            (vec![anonymous(1, 4)], vec![], "is gone".to_owned()),
            (vec![anonymous(1, 4)], vec![anonymous(1, 3)], format!("is only {}..{} now", page(1), page(3))),
            (vec![file(1, 4, 0)], vec![closed(file(1, 4, 0))], "is ---p now".to_owned()),
            (vec![file(1, 4, 0)], vec![file(11, 14, 0)], format!("was moved to {}..{}", page(11), page(14))),
            (vec![file(1, 4, 0)], vec![file(1, 4, 5)], "/lib/x) now".to_owned()),
            (vec![anonymous(1, 4)], vec![anonymous(1, 2), anonymous(3, 4)], "is parted now".to_owned()),
        ] {
            let found = missing(before, now);
            assert!(found.len() == 1 && found[0].contains(&expected), "{found:?} has no {expected:?}");
        }
    }

    #[test]
    fn what_is_new_is_told_but_for_a_deeper_stack() {
        let heap = |end| mapping(1, end, MappingKind::Heap, "[heap]");
        let stack = |start| mapping(start, 90, MappingKind::Stack, "[stack]");
        assert_eq!(fit(vec![heap(4), stack(80)], vec![heap(4), stack(70)]), Fit::default());
        let grown = fit(vec![heap(4)], vec![heap(6), anonymous(10, 12)]);
        assert_eq!(grown.changed, []);
        assert_eq!(grown.grown, std::slice::from_ref(&(4 * 4096..6 * 4096)));
        assert!(grown.new[0].contains("[heap]) has grown by 8192 bytes"), "{grown:?}");
        assert!(grown.new[1].ends_with("anonymous) is new"), "{grown:?}");
    }

    #[test]
    fn memory_that_was_set_aside_and_is_memory_now_is_new_and_to_be_emptied() {
        let closed = |start, end| Mapping { protection: Protection::default(), ..anonymous(start, end) };
        let pages = |start: u64, end: u64| start * 4096..end * 4096;
        // An arena: its used memory, and the reserved rest.
        let arena = |used| {
            let rest = (used < 20).then(|| closed(used, 20));
            std::iter::once(anonymous(1, used)).chain(rest).collect::<Vec<_>>()
        };
        let grown = fit(arena(4), arena(9));
        assert!(grown.changed.is_empty() && grown.new.is_empty(), "{grown:?}");
        assert_eq!(grown.opened[0].ranges, [pages(4, 9)]);
        assert!(grown.opened.len() == 1 && grown.opened[0].text.contains("20480 bytes"), "{grown:?}");
        assert_eq!(fit(arena(4), vec![anonymous(1, 20)]).opened[0].ranges, [pages(4, 20)]);
        assert_eq!(fit(arena(4), arena(4)), Fit::default());
        // In the middle, and twice.
        let twice = vec![
            anonymous(1, 4),
            closed(4, 6),
            anonymous(6, 7),
            closed(7, 9),
            anonymous(9, 10),
            closed(10, 20),
        ];
        assert_eq!(fit(arena(4), twice).opened[0].ranges, [pages(6, 7), pages(9, 10)]);
        // A hole, another protection, a file, and memory that has lost its permissions.
        let found = fit(arena(4), vec![anonymous(1, 6), closed(7, 20)]);
        assert_eq!(found.changed[0].parts, [(pages(6, 7), None)]);
        let other = vec![anonymous(1, 4), read_only(anonymous(4, 6)), closed(6, 20)];
        let found = fit(arena(4), other);
        assert!(found.changed.is_empty() && found.reprotected[0].range == pages(4, 6), "{found:?}");
        let found = fit(arena(4), vec![anonymous(1, 4), file(4, 6, 0), closed(6, 20)]);
        assert_eq!(found.changed[0].parts, [(pages(4, 6), Some(file(4, 6, 0)))]);
        let found = fit(arena(9), arena(4));
        let then = Protection::READ_WRITE;
        let expected = Reprotected { range: pages(4, 9), now: Protection::default(), then };
        assert!(found.changed.is_empty() && found.reprotected == [expected], "{found:?}");
    }

    #[test]
    fn memory_that_was_protected_since_is_to_get_its_protection_again() {
        let parted = vec![anonymous(1, 4), read_only(anonymous(4, 6)), anonymous(6, 9)];
        let (writable, read_only_then) = (Protection::READ_WRITE, read_only(anonymous(4, 6)).protection);
        let range = 4 * 4096..6 * 4096;
        let found = fit(vec![anonymous(1, 9)], parted.clone());
        let expected = Reprotected { range: range.clone(), now: read_only_then, then: writable };
        assert_eq!(found.reprotected, [expected]);
        assert!(found.changed.is_empty() && found.new.is_empty(), "{found:?}");
        let found = fit(parted, vec![anonymous(1, 9)]);
        assert_eq!(found.reprotected, [Reprotected { range, now: writable, then: read_only_then }]);
        // Another file, a hole, and a file that cannot be read.
        for now in [
            vec![file(1, 3, 0), read_only(file(3, 9, 7))],
            vec![file(1, 3, 0), file(4, 9, 3)],
            vec![file(1, 3, 0), closed(file(3, 9, 2))],
        ] {
            let found = fit(vec![file(1, 9, 0)], now);
            assert!(found.changed.len() == 1 && found.reprotected.is_empty(), "{found:?}");
        }
        // Both.
        let found = fit(vec![anonymous(1, 9)], vec![read_only(anonymous(1, 2)), anonymous(5, 9)]);
        assert_eq!(found.changed[0].parts, [(2 * 4096..5 * 4096, None)]);
        assert_eq!(found.reprotected[0].range, 4096..2 * 4096);
    }

    #[test]
    fn many_mappings_are_compared_with_few_steps_each() {
        // 60,000 mappings that are all gone, each with a new one of the same properties. Comparing
        // each with each would take 3.6 billion steps.
        let named = |start: u64| mapping(start, start + 1, MappingKind::File, "/x");
        let before: Vec<_> = (0..60_000).map(|at| named(at * 4 + 2)).collect();
        let now: Vec<_> = (0..60_000).map(|at| named(at * 4 + 4)).collect();
        let found = fit(before, now);
        assert_eq!((found.changed.len(), found.new.len()), (60_000, 60_000));
        let text = &found.changed[7].text;
        assert!(text.ends_with("was moved to 0x4000..0x5000"), "{text}");
    }

    #[test]
    fn comparing_can_be_interrupted() {
        let space = AddressSpace::new(vec![anonymous(1, 2)]).unwrap();
        assert!(matches!(compare(&space, &space, &|| Err(Error::Interrupted)), Err(Error::Interrupted)));
    }
}
