//! Whether a process still has the mappings that it had in a snapshot, and what it has beyond.

use std::ops::Range;

use super::attempt::Attempt;
use crate::address_space::{AddressSpace, Mapping, MappingKind};
use crate::sink::SinkError;
use crate::source::Frozen as _;
use crate::track::complement;
use crate::units::AddressRange;

/// An error unless the mappings are there. Answers by what the heap has grown.
pub(super) fn check(attempt: &Attempt<'_>) -> Result<Vec<Range<u64>>, SinkError> {
    let roll_back = attempt.roll_back;
    let Fit { missing: mut differences, new, grown_heap } =
        compare(&roll_back.space, attempt.held.address_space());
    let only_new = differences.is_empty();
    if !roll_back.leave_new_memory {
        differences.extend(new);
    }
    match differences.is_empty() {
        true => Ok(grown_heap),
        false => Err(SinkError::DoesNotFit { pid: attempt.pid, differences, only_new }),
    }
}

/// What came of comparing two layouts.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Fit {
    /// What of the snapshot's is not there as it was.
    pub(super) missing: Vec<String>,
    /// What is there that was not, apart from the stack, which grows by itself and whose deeper
    /// part a program that has returned from there does not rely on.
    pub(super) new: Vec<String>,
    /// By how much the heap has grown. The C library takes it for zeros when it grows into it again.
    pub(super) grown_heap: Vec<Range<u64>>,
}

/// Compares the layout in the snapshot with that of now.
pub(super) fn compare(before: &AddressSpace, now: &AddressSpace) -> Fit {
    let (before, now) = (joined(before), joined(now));
    let mut fit = Fit::default();
    let mut fitting = vec![false; now.len()];
    for mapping in &before {
        match now.iter().position(|it| has(it, mapping)) {
            Some(at) => fitting[at] = true,
            None => fit.missing.push(missing(mapping, &before, &now)),
        }
    }
    let ranges: Vec<_> = before.iter().map(|it| it.range.start()..it.range.end()).collect();
    for (mapping, fits) in now.iter().zip(fitting) {
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
            fit.grown_heap.extend(rest);
        }
    }
    fit
}

/// The mappings, those joined that differ in nothing but their addresses: the kernel joins and parts
/// them as it likes.
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

/// Whether two mappings are of the same thing in the same way.
fn is_same(one: &Mapping, other: &Mapping) -> bool {
    let has_offset = one.kind == MappingKind::File || one.protection.shared;
    // Which address stands for the beginning of the file.
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

/// What became of a mapping that is not there as it was.
fn missing(mapping: &Mapping, before: &[Mapping], now: &[Mapping]) -> String {
    let mut there = now.iter().filter(|it| it.range.intersection(mapping.range).is_some());
    let is_alike = |it: &&Mapping| {
        (it.kind, name(it), it.protection, it.range.length_bytes())
            == (mapping.kind, name(mapping), mapping.protection, mapping.range.length_bytes())
    };
    let moved =
        || now.iter().filter(is_alike).find(|it| before.iter().all(|before| before.range != it.range));
    let became = match (there.next(), there.next()) {
        (None, _) => match moved() {
            Some(other) if !mapping.name.is_empty() => format!("was moved to {}", other.range),
            _ => "is gone".to_owned(),
        },
        (Some(one), None) if is_same(one, mapping) => format!("is only {} now", one.range),
        (Some(one), None) if one.range == mapping.range && one.protection != mapping.protection => {
            format!("is {} now", one.protection)
        }
        (Some(one), None) => format!("is {} now", named(one)),
        (Some(one), Some(_)) => format!("is parted now, into {} and others", named(one)),
    };
    format!("{} {became}", named(mapping))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::address_space::Protection;

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

    fn fit(before: Vec<Mapping>, now: Vec<Mapping>) -> Fit {
        compare(&AddressSpace::new(before).unwrap(), &AddressSpace::new(now).unwrap())
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
        let missing = |before, now| fit(before, now).missing;
        let page = |page: u64| format!("{:#x}", page * 4096);
        for (before, now, expected) in [
            (vec![anonymous(1, 4)], vec![], "is gone".to_owned()),
            (vec![anonymous(1, 4)], vec![anonymous(1, 3)], format!("is only {}..{} now", page(1), page(3))),
            (vec![anonymous(1, 4)], vec![read_only(anonymous(1, 4))], "is r--p now".to_owned()),
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
        assert_eq!(grown.missing, [""; 0]);
        assert_eq!(grown.grown_heap, std::slice::from_ref(&(4 * 4096..6 * 4096)));
        assert!(grown.new[0].contains("[heap]) has grown by 8192 bytes"), "{grown:?}");
        assert!(grown.new[1].ends_with("anonymous) is new"), "{grown:?}");
    }
}
