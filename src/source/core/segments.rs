//! The contents of a core: its headers, its notes, and the positions of its memory in the file.

use std::ops::Range;

use crate::address_space::Protection;
use crate::elf::{self, FileHeader, Notes, Segment, SegmentCount};
use crate::source::SourceError;
use crate::source::regular_file::RegularFile;
use crate::units::AddressRange;

/// The kernel allows a process 65,530 mappings by default. A damaged count must not become an
/// allocation.
const MAX_SEGMENTS: u64 = 1 << 20;

/// The notes of ten thousand threads with all registers of x86-64, AMX included, take half of this.
const MAX_NOTES_BYTES: u64 = 256 << 20;

/// How many segment headers are read at a time.
const HEADERS_AT_ONCE: usize = 1024;

/// The outer error: the file cannot be read. The inner error: it is not a valid core.
pub(super) type Parsed<T> = Result<Result<T, String>, SourceError>;

/// How a truncated core is treated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum CutShort {
    /// It is refused.
    Refuse,
    /// The bytes that it has are used.
    Take,
}

/// The segments that are used.
pub(super) struct Segments {
    pub(super) found: Vec<Segment>,
    /// How many bytes of memory and notes are missing from the file.
    pub(super) missing_bytes: u64,
}

pub(super) fn file_header(file: &RegularFile) -> Parsed<FileHeader> {
    let mut bytes = [0; elf::FILE_HEADER_BYTES];
    // The first bytes can still identify a file that ends within the header.
    let length_bytes = file.length_bytes().min(bytes.len() as u64);
    let there = usize::try_from(length_bytes).unwrap_or(bytes.len());
    file.read(0, &mut bytes[..there])?;
    let header = FileHeader::read(&bytes);
    Ok(if there < bytes.len() { header.and(Err(cut_in_headers(bytes.len() as u64, file))) } else { header })
}

/// The segments. None of them reaches beyond the end of the file, unless truncation is accepted.
pub(super) fn segments(file: &RegularFile, header: &FileHeader, cut_short: CutShort) -> Parsed<Segments> {
    let count = match header.segment_count {
        SegmentCount::Here(count) => u64::from(count),
        SegmentCount::InSection { at_bytes } => {
            let mut section = [0; elf::SECTION_HEADER_BYTES];
            if let Err(why) = check_is_there(at_bytes, section.len() as u64, file) {
                return Ok(Err(why));
            }
            file.read(at_bytes, &mut section)?;
            u64::from(elf::segment_count_of_section(&section))
        }
    };
    if count > MAX_SEGMENTS {
        return Ok(Err(format!("it says that it has {count} segments; at most {MAX_SEGMENTS} can be read")));
    }
    let each_bytes = elf::SEGMENT_HEADER_BYTES as u64;
    if let Err(why) = check_is_there(header.segments_at_bytes, count * each_bytes, file) {
        return Ok(Err(why));
    }
    let (mut found, mut missing_bytes) = (Vec::new(), 0u64);
    // The end of the file according to the headers.
    let mut end_bytes = 0;
    let mut headers = vec![[0; elf::SEGMENT_HEADER_BYTES]; HEADERS_AT_ONCE];
    let mut read = 0;
    while read < count {
        let part = usize::try_from(count - read).unwrap_or(usize::MAX).min(HEADERS_AT_ONCE);
        let part = &mut headers[..part];
        file.read(header.segments_at_bytes + read * each_bytes, part.as_flattened_mut())?;
        read += part.len() as u64;
        for segment in part.iter().map(Segment::read) {
            let is_wanted = matches!(segment.kind, elf::LOAD | elf::NOTE) && segment.file_bytes > 0
                || segment.kind == elf::LOAD && segment.memory_bytes > 0;
            if !is_wanted {
                continue;
            }
            if segment.file_bytes > 0 {
                let Some(segment_end) = segment.at_bytes.checked_add(segment.file_bytes) else {
                    return Ok(Err(beyond_all(segment.at_bytes, segment.file_bytes)));
                };
                let lacks_bytes = segment_end.saturating_sub(file.length_bytes()).min(segment.file_bytes);
                missing_bytes = missing_bytes.saturating_add(lacks_bytes);
                end_bytes = end_bytes.max(segment_end);
            }
            found.push(segment);
        }
    }
    if missing_bytes > 0 && cut_short == CutShort::Refuse {
        return Ok(Err(truncated(end_bytes, file)));
    }
    // Segments do not share bytes. Without this check a small file could stand for any amount of
    // memory.
    let there_bytes: u128 =
        found.iter().map(|segment| u128::from(segment.file_bytes)).sum::<u128>() - u128::from(missing_bytes);
    if there_bytes > u128::from(file.length_bytes()) {
        return Ok(Err(format!(
            "its segments have {there_bytes} bytes together, more than the {} of the file: it is damaged",
            file.length_bytes()
        )));
    }
    Ok(Ok(Segments { found, missing_bytes }))
}

/// The end of a core file according to its headers, if they have it.
pub(super) fn end_by_headers(file: &RegularFile) -> Option<u64> {
    let header = file_header(file).ok()?.ok()?;
    let section_end = match header.segment_count {
        SegmentCount::Here(_) => 0,
        SegmentCount::InSection { at_bytes } => at_bytes.checked_add(elf::SECTION_HEADER_BYTES as u64)?,
    };
    let segments = segments(file, &header, CutShort::Take).ok()?.ok()?;
    let ends = segments.found.iter().map(|segment| segment.at_bytes.saturating_add(segment.file_bytes));
    ends.chain([section_end]).max()
}

fn check_is_there(at_bytes: u64, length_bytes: u64, file: &RegularFile) -> Result<(), String> {
    match at_bytes.checked_add(length_bytes) {
        Some(end_bytes) if end_bytes <= file.length_bytes() => Ok(()),
        Some(end_bytes) => Err(cut_in_headers(end_bytes, file)),
        None => Err(beyond_all(at_bytes, length_bytes)),
    }
}

fn beyond_all(at_bytes: u64, length_bytes: u64) -> String {
    format!("it has a part at byte {at_bytes} of {length_bytes} bytes: it is damaged")
}

/// The headers must be complete.
fn cut_in_headers(end_bytes: u64, file: &RegularFile) -> String {
    let found_bytes = file.length_bytes();
    format!(
        "it is cut short within its headers: it has {found_bytes} bytes and should have {end_bytes} or more; \
         was it copied whole, was the disk full, or does `ulimit -c` limit cores?"
    )
}

fn truncated(end_bytes: u64, file: &RegularFile) -> String {
    let found_bytes = file.length_bytes();
    format!(
        "it is cut short: it has {found_bytes} bytes and should have {end_bytes} or more; was it copied whole, was the \
         disk full, or does `ulimit -c` limit cores? What it has can be captured all the same (--partial)"
    )
}

pub(super) fn notes(
    file: &RegularFile,
    machine: u16,
    segments: &Segments,
    cut_short: CutShort,
) -> Parsed<Notes> {
    let segments = || segments.found.iter().filter(|segment| segment.kind == elf::NOTE);
    let total_bytes: u64 = segments().fold(0, |total, segment| segment.file_bytes.saturating_add(total));
    if total_bytes > MAX_NOTES_BYTES {
        return Ok(Err(format!(
            "it has {total_bytes} bytes of notes; at most {MAX_NOTES_BYTES} can be read"
        )));
    }
    let mut notes = Notes::default();
    for segment in segments() {
        let there_bytes = file.length_bytes().saturating_sub(segment.at_bytes).min(segment.file_bytes);
        let mut bytes = vec![0; usize::try_from(there_bytes).unwrap_or(usize::MAX)];
        file.read(segment.at_bytes, &mut bytes)?;
        match notes.read(machine, &bytes) {
            // The last one is cut off.
            Err(_) if cut_short == CutShort::Take && there_bytes < segment.file_bytes => {}
            Err(why) => return Ok(Err(why)),
            Ok(()) => {}
        }
    }
    notes.files.sort_by_key(|file| file.start);
    notes.whole.sort_by_key(|whole| whole.start);
    Ok(Ok(notes))
}

/// Addresses whose bytes the file has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Piece {
    pub(super) addresses: Range<u64>,
    /// The offset in the file at which they begin.
    pub(super) at_bytes: u64,
}

/// Addresses that form one memory.
pub(super) struct Loaded {
    pub(super) range: AddressRange,
    pub(super) protection: Protection,
    /// Whether its bytes are known: they are in pieces, with zeros in between. If not, the writer
    /// of the core left them out.
    pub(super) is_there: bool,
}

/// Whether the addresses of this core are physical addresses of a machine. Dumps of virtual
/// machines without a process have no other addresses.
pub(super) fn has_physical_addresses(segments: &[Segment]) -> bool {
    let mut loads = segments.iter().filter(|segment| segment.kind == elf::LOAD && segment.memory_bytes > 0);
    let (mut count, mut any) = (0, false);
    // VirtualBox and QEMU write 0, other writers -1.
    let none = loads.all(|segment| {
        count += 1;
        any |= segment.physical_address != 0;
        matches!(segment.address, 0 | u64::MAX)
    });
    none && any && count > 0
}

/// The memory of the segments, in address order and disjoint, and the positions of its bytes.
pub(super) fn loaded(
    segments: Vec<Segment>,
    is_physical: bool,
    whole: &[Range<u64>],
) -> Result<(Vec<Loaded>, Vec<Piece>), String> {
    let (mut loaded, mut pieces) = (Vec::new(), Vec::new());
    for segment in segments.into_iter().filter(|segment| segment.kind == elf::LOAD) {
        let Segment { flags, at_bytes, file_bytes, memory_bytes, .. } = segment;
        let address = if is_physical { segment.physical_address } else { segment.address };
        let damaged = || {
            format!(
                "it has a segment of {memory_bytes} bytes at {address:#x}, {file_bytes} of them in the file: \
                 it is damaged"
            )
        };
        let all = AddressRange::with_length(address, memory_bytes).map_err(|_| damaged())?;
        let protection = Protection {
            read: flags & elf::READ != 0,
            write: flags & elf::WRITE != 0,
            execute: flags & elf::EXECUTE != 0,
            shared: false,
        };
        if file_bytes > memory_bytes {
            return Err(damaged());
        }
        let cut = address + file_bytes;
        for (start, end, is_there) in [(address, cut, true), (cut, all.end(), false)] {
            let Ok(range) = AddressRange::new(start, end) else { continue };
            loaded.push(Loaded { range, protection, is_there });
            if is_there {
                pieces.push(Piece { addresses: start..end, at_bytes });
            }
        }
    }
    loaded.sort_by_key(|loaded| loaded.range);
    pieces.sort_by_key(|piece| piece.addresses.start);
    match loaded.windows(2).find(|pair| pair[0].range.end() > pair[1].range.start()) {
        Some(pair) => {
            Err(format!("its segments {} and {} overlap: it is damaged", pair[0].range, pair[1].range))
        }
        None => Ok((joined(loaded, whole), pieces)),
    }
}

/// Joins the parts of one memory. Entries that do not match the segments are ignored.
fn joined(loaded: Vec<Loaded>, whole: &[Range<u64>]) -> Vec<Loaded> {
    let mut joined: Vec<Loaded> = Vec::with_capacity(loaded.len());
    let mut whole = whole.iter().peekable();
    let mut rest = loaded.into_iter().peekable();
    while let Some(first) = rest.next() {
        while whole.next_if(|whole| whole.start < first.range.start()).is_some() {}
        let Some(wanted) = whole.next_if(|whole| whole.start == first.range.start()) else {
            joined.push(first);
            continue;
        };
        let mut parts = vec![first];
        let mut at = parts[0].range.end();
        while at < wanted.end
            && let Some(next) = rest.next_if(|next| {
                next.range.start() == at
                    && next.range.end() <= wanted.end
                    && next.protection == parts[0].protection
            })
        {
            at = next.range.end();
            parts.push(next);
        }
        match AddressRange::new(wanted.start, wanted.end) {
            Ok(range) if at == wanted.end => {
                joined.push(Loaded { range, protection: parts[0].protection, is_there: true });
            }
            _ => joined.extend(parts),
        }
    }
    joined
}
