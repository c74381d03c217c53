//! The mappings of a core: its segments, split where the mapped file changes.

use std::ops::Range;

use super::segments::Loaded;
use crate::address_space::{Mapping, MappingKind, Protection};
use crate::elf::{MappedFile, Notes};
use crate::source::maps::kind_of;
use crate::units::AddressRange;

/// The mappings in address order.
pub(super) fn mappings(loaded: &[Loaded], notes: &Notes) -> Result<Vec<Mapping>, String> {
    let files = &files(&notes.files, &notes.whole);
    if let Some(pair) = files.windows(2).find(|pair| pair[0].end > pair[1].start) {
        return Err(format!(
            "its note about mapped files has two at {:#x}: it is damaged",
            pair[1].start.max(pair[0].start)
        ));
    }
    let mut mappings = Vec::new();
    // Everything before `at` and before the first of `rest` is done.
    let mut rest = &files[..];
    let mut at = 0;
    for Loaded { range, protection, is_there } in loaded {
        uncovered(&mut rest, at, range.start(), &mut mappings)?;
        at = range.start();
        while at < range.end() {
            let file = rest.first().filter(|file| file.start <= at);
            let cut = file.map(|file| file.end).or(rest.first().map(|file| file.start)).unwrap_or(u64::MAX);
            let end = cut.min(range.end());
            mappings.push(mapping(at, end, *protection, *is_there, file, notes)?);
            at = end;
            if file.is_some_and(|file| file.end <= at) {
                rest = &rest[1..];
            }
        }
    }
    uncovered(&mut rest, at, u64::MAX, &mut mappings)?;
    Ok(mappings)
}

/// The files, merged where they are in one memory: in memory with zeros, the note lists only the
/// parts that are in the file.
fn files(listed: &[MappedFile], whole: &[Range<u64>]) -> Vec<MappedFile> {
    let mut files = Vec::with_capacity(listed.len());
    let mut rest = listed;
    while let Some((first, after)) = rest.split_first() {
        rest = after;
        let mut file = first.clone();
        let within = whole.partition_point(|whole| whole.start <= file.start);
        let within = within.checked_sub(1).and_then(|at| whole.get(at)).filter(|whole| file.end <= whole.end);
        let before_bytes = within.map_or(0, |whole| file.start - whole.start);
        if let (Some(whole), Some(offset_bytes)) = (within, file.offset_bytes.checked_sub(before_bytes)) {
            let is_same = |next: &MappedFile| {
                let further_bytes = next.start.checked_sub(whole.start);
                next.end <= whole.end
                    && next.name == file.name
                    && further_bytes.and_then(|by| offset_bytes.checked_add(by)) == Some(next.offset_bytes)
            };
            let same = rest.iter().take_while(|next| is_same(next)).count();
            rest = &rest[same..];
            (file.start, file.end, file.offset_bytes) = (whole.start, whole.end, offset_bytes);
        }
        files.push(file);
    }
    files
}

/// Adds the entries of the file note between `at` and `until`, where no segment is.
fn uncovered(
    rest: &mut &[MappedFile],
    at: u64,
    until: u64,
    mappings: &mut Vec<Mapping>,
) -> Result<(), String> {
    while let Some((file, after)) = rest.split_first().filter(|(file, _)| file.start < until) {
        let (start, end) = (file.start.max(at), file.end.min(until));
        if start < end || file.start >= file.end {
            let none = &Notes::default();
            mappings.push(mapping(start, end, Protection::default(), false, Some(file), none)?);
        }
        if file.end > until {
            break;
        }
        *rest = after;
    }
    Ok(())
}

fn mapping(
    start: u64,
    end: u64,
    protection: Protection,
    captured: bool,
    file: Option<&MappedFile>,
    notes: &Notes,
) -> Result<Mapping, String> {
    let range = AddressRange::new(start, end)
        .map_err(|_| format!("its note about mapped files has {start:#x}..{end:#x}: it is damaged"))?;
    let holds = |address: Option<u64>| address.is_some_and(|address| (start..end).contains(&address));
    let (kind, name, file_offset_bytes) = match file {
        Some(file) => {
            let offset_bytes = file.offset_bytes.checked_add(start - file.start);
            let offset_bytes = offset_bytes.ok_or_else(|| {
                format!("its note about mapped files has one mapped beyond its end at {start:#x}")
            })?;
            (kind_of(&file.name), String::from_utf8_lossy(&file.name).into_owned(), offset_bytes)
        }
        None if holds(notes.vdso_address()) => (MappingKind::Kernel, "[vdso]".to_owned(), 0),
        None if holds(notes.stack_address()) => (MappingKind::Stack, "[stack]".to_owned(), 0),
        None => (MappingKind::Anonymous, String::new(), 0),
    };
    Ok(Mapping { range, protection, kind, name, file_offset_bytes, captured })
}
