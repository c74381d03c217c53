//! The head of an ELF core file: everything before the memory.
//!
//! ```text
//! image     |####..####|########000000000000##|  an excluded part; a mapping of mostly zeros
//! segments  |####|  |####||########:           |##|  zeros follow the bytes of a segment
//! file      | head |####|####|########|##|
//! ```
//!
//! Memory that was excluded or could not be read is in no segment, so a debugger reports that it
//! cannot read it. Long runs of zeros take no space in the file, which could not be as long as the
//! address spaces are. Their segment is longer than its bytes in the file. Debuggers take the rest
//! for zeros, and a note tells this to an import of the core. A mapping that was not captured is a
//! segment without bytes, as in the kernel's cores; otherwise a reader would not know of the
//! mapping.

use std::ops::Range;

use super::SinkError;
use crate::address_space::{AddressSpace, Mapping, Protection};
use crate::elf::{self, MappedFile, Notes, Segment};
use crate::threads::{self, Thread, Threads};
use crate::units::AddressRange;

/// Memory begins at a multiple of this, so that a debugger can map it.
const PAGE_BYTES: u64 = 4096;

/// The name of a mapping whose addresses are physical addresses of a machine. Its segment then has
/// them as physical addresses.
const PHYSICAL: &str = "[physical]";

/// The head of a core, and the positions of the memory in the file.
pub(crate) struct Head {
    /// The bytes at the start of the file.
    pub(crate) bytes: Vec<u8>,
    /// The parts of the image that are in the file, in order.
    pub(crate) parts: Vec<Part>,
    /// The length of the file.
    pub(crate) file_bytes: u64,
}

/// A part of the image that is in the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Part {
    pub(crate) image: Range<u64>,
    /// The offset in the file.
    pub(crate) at_bytes: u64,
}

/// The data of a core besides memory.
pub(crate) struct About {
    pub(crate) threads: Option<Threads>,
    pub(crate) auxv: Vec<u8>,
    pub(crate) command: String,
    pub(crate) register_layout: Vec<u8>,
}

impl Head {
    /// Makes the head of a core of this memory. `zeros` are the long runs of zeros in the image,
    /// sorted and disjoint.
    pub(crate) fn new(space: &AddressSpace, zeros: &[Range<u64>], about: About) -> Result<Head, SinkError> {
        let About { threads, auxv, command, register_layout } = about;
        threads.iter().try_for_each(check)?;
        let machine = threads.as_ref().map_or(threads::MACHINE, |threads| threads.machine);
        let first =
            threads.iter().flat_map(|it| it.threads.iter().find(|thread| thread.tid == it.pid)).next();
        let name = first.map(|thread| thread.name.clone()).unwrap_or_default();
        let Memory { parts, mut segments, files, whole } = memory(space, zeros);
        let notes = Notes { threads, name, command, auxv, files, register_layout, whole }.write();
        // readelf reports an empty note segment as damage.
        if !notes.is_empty() {
            let of_notes = Segment {
                kind: elf::NOTE,
                flags: 0,
                at_bytes: 0,
                address: 0,
                physical_address: 0,
                file_bytes: notes.len() as u64,
                memory_bytes: 0,
                align_bytes: 4,
            };
            segments.insert(0, of_notes);
        }
        let notes_at_bytes = elf::headers_bytes(segments.len()) as u64;
        let memory_at_bytes = (notes_at_bytes + notes.len() as u64).next_multiple_of(PAGE_BYTES);
        for segment in &mut segments {
            let is_memory = segment.kind == elf::LOAD;
            segment.at_bytes += if is_memory { memory_at_bytes } else { notes_at_bytes };
            if is_memory && segment.at_bytes % PAGE_BYTES != segment.address % PAGE_BYTES {
                segment.align_bytes = 1;
            }
        }
        let too_many = || SinkError::Core { why: "it has more mappings than ELF can count".to_owned() };
        let mut bytes = elf::headers(machine, &segments).ok_or_else(too_many)?;
        bytes.extend(notes);
        let moved = |part: Part| Part { at_bytes: part.at_bytes + memory_at_bytes, ..part };
        let parts: Vec<Part> = parts.into_iter().map(moved).collect();
        let end = |part: &Part| part.at_bytes + (part.image.end - part.image.start);
        let file_bytes = parts.last().map_or(memory_at_bytes, end);
        Ok(Head { bytes, parts, file_bytes })
    }

    /// The parts of these bytes of the image that are in the file, with their offsets.
    pub(crate) fn parts_in(&self, image: Range<u64>) -> impl Iterator<Item = Part> {
        let first = self.parts.partition_point(|part| part.image.end <= image.start);
        let parts = self.parts[first..].iter().take_while(move |part| part.image.start < image.end);
        parts.map(move |part| {
            let start = part.image.start.max(image.start);
            let at_bytes = part.at_bytes + (start - part.image.start);
            Part { image: start..part.image.end.min(image.end), at_bytes }
        })
    }
}

/// An error unless the registers are those of a 64-bit program.
fn check(threads: &Threads) -> Result<(), SinkError> {
    let expected_bytes = match threads.machine {
        threads::X86_64 => Some(27 * 8),
        threads::AARCH64 => Some(34 * 8),
        _ => None,
    };
    let found = |thread: &Thread| thread.register_set(threads::NT_PRSTATUS).map_or(0, <[u8]>::len);
    let is_wrong = |thread: &&Thread| match (found(thread), expected_bytes) {
        (found_bytes, Some(expected_bytes)) => found_bytes != expected_bytes,
        (found_bytes, None) => found_bytes == 0,
    };
    match threads.threads.iter().find(is_wrong) {
        None => Ok(()),
        Some(thread) => Err(SinkError::Core {
            why: format!(
                "thread {} has general registers of {} bytes, expected {}: is it a 32-bit program? \
                 Its memory can be restored to a file",
                thread.tid,
                found(thread),
                expected_bytes.map_or("some".to_owned(), |bytes| bytes.to_string())
            ),
        }),
    }
}

/// The memory of a core. Offsets in the file are counted from its first byte.
#[derive(Debug, Default)]
struct Memory {
    parts: Vec<Part>,
    segments: Vec<Segment>,
    files: Vec<MappedFile>,
    /// The ranges with zeros that are not in the file.
    whole: Vec<Range<u64>>,
}

fn memory(space: &AddressSpace, zeros: &[Range<u64>]) -> Memory {
    let mut memory = Memory::default();
    let (mut image_bytes, mut at_bytes) = (0, 0);
    for mapping in space.mappings() {
        let whole = mapping.range;
        let segment = |range: &Range<u64>, at_bytes: u64, file_bytes: u64| Segment {
            kind: elf::LOAD,
            flags: flags(mapping.protection),
            at_bytes,
            address: range.start,
            physical_address: if mapping.name == PHYSICAL { range.start } else { 0 },
            file_bytes,
            memory_bytes: range.end - range.start,
            align_bytes: PAGE_BYTES,
        };
        if !mapping.captured {
            let range = whole.start()..whole.end();
            memory.files.extend(mapped_file(mapping, range.clone()));
            memory.segments.push(segment(&range, at_bytes, 0));
            continue;
        }
        let to_image = |address: u64| image_bytes + (address - whole.start());
        for there in what_is_there(whole, space) {
            let (mut at, mut has_zeros) = (there.start(), false);
            // Bytes in the file, and the zeros that follow them.
            while at < there.end() {
                let next = zeros.partition_point(|zeros| zeros.end <= to_image(at));
                let next = zeros.get(next).filter(|zeros| zeros.start < to_image(there.end()));
                let to_address = |image: u64| whole.start() + (image - image_bytes);
                let zeros_at = next.map_or(there.end(), |zeros| to_address(zeros.start.max(to_image(at))));
                let end = next.map_or(there.end(), |zeros| to_address(zeros.end.min(to_image(there.end()))));
                if zeros_at > at {
                    // Small runs are packed without padding, because each page may have as little
                    // as one byte.
                    if zeros_at - at >= PAGE_BYTES {
                        at_bytes = at_bytes.next_multiple_of(PAGE_BYTES) + at % PAGE_BYTES;
                    }
                    memory.parts.push(Part { image: to_image(at)..to_image(zeros_at), at_bytes });
                    memory.files.extend(mapped_file(mapping, at..zeros_at));
                }
                memory.segments.push(segment(&(at..end), at_bytes, zeros_at - at));
                at_bytes += zeros_at - at;
                has_zeros |= zeros_at < end;
                at = end;
            }
            if has_zeros {
                memory.whole.push(there.start()..there.end());
            }
        }
        image_bytes += whole.length_bytes();
    }
    memory
}

/// The parts of a captured mapping that were neither excluded nor unreadable.
fn what_is_there(whole: AddressRange, space: &AddressSpace) -> Vec<AddressRange> {
    let left_out = space.excluded().iter().chain(space.unreadable());
    let mut left_out: Vec<_> = left_out.filter_map(|range| range.intersection(whole)).collect();
    left_out.sort_unstable();
    let mut parts = Vec::new();
    let mut at = whole.start();
    for range in left_out {
        parts.extend(AddressRange::new(at, range.start()));
        at = at.max(range.end());
    }
    parts.extend(AddressRange::new(at, whole.end()));
    parts
}

fn flags(protection: Protection) -> u32 {
    let flag = |is_set, flag| if is_set { flag } else { 0 };
    flag(protection.read, elf::READ)
        | flag(protection.write, elf::WRITE)
        | flag(protection.execute, elf::EXECUTE)
}

/// A part of a mapping of a file, as the kernel lists it. Where this list has a file and no segment
/// has the bytes, a debugger shows the file's present bytes, even if the memory was excluded or is
/// zeros. So only memory that a segment has is listed.
fn mapped_file(mapping: &Mapping, range: Range<u64>) -> Option<MappedFile> {
    let is_path = mapping.name.starts_with('/');
    is_path.then(|| MappedFile {
        start: range.start,
        end: range.end,
        offset_bytes: mapping.file_offset_bytes.saturating_add(range.start - mapping.range.start()),
        name: mapping.name.clone().into_bytes(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::address_space::MappingKind;
    use crate::threads::RegisterSet;

    fn range(start: u64, end: u64) -> AddressRange {
        AddressRange::new(start, end).unwrap()
    }

    fn mapping(start: u64, end: u64, captured: bool) -> Mapping {
        Mapping {
            range: range(start, end),
            protection: Protection { read: true, write: false, execute: true, shared: false },
            kind: MappingKind::Anonymous,
            name: String::new(),
            file_offset_bytes: 0,
            captured,
        }
    }

    #[test]
    fn what_was_left_out_is_in_no_segment() {
        let mappings = vec![
            mapping(0x1000, 0x5000, true),
            mapping(0x5000, 0x6000, false),
            mapping(0x8000, 0x9800, true),
        ];
        let mut space = AddressSpace::new(mappings).unwrap();
        space.exclude(&[range(0x2000, 0x3000), range(0x9000, 0xa000)]);
        space.set_unreadable(vec![range(0x2800, 0x3800)]);
        let found: Vec<_> = memory(&space, &[])
            .segments
            .iter()
            .map(|it| (it.address, it.memory_bytes, it.file_bytes, it.at_bytes))
            .collect();
        let expected = [
            (0x1000, 0x1000, 0x1000, 0),
            (0x3800, 0x1800, 0x1800, 0x1800),
            (0x5000, 0x1000, 0, 0x3000),
            (0x8000, 0x1000, 0x1000, 0x3000),
        ];
        assert_eq!(found, expected);
        let flags = elf::READ | elf::EXECUTE;
        assert!(memory(&space, &[]).segments.iter().all(|segment| segment.flags == flags));
    }

    #[test]
    fn what_is_zeros_for_long_takes_up_nothing_of_the_file_and_is_told() {
        let mut mapped = mapping(0x1000, 0x9000, true);
        mapped.name = "/lib/a".to_owned();
        mapped.file_offset_bytes = 0x7000;
        let space = AddressSpace::new(vec![mapped, mapping(0x20_000, 0x30_000, true)]).unwrap();
        // From the middle of the first mapping into the second; and one inside the second, to its
        // end.
        let found = memory(&space, &[0x3000..0xa000, 0x10_000..0x18_000]);
        let segments: Vec<_> = found
            .segments
            .iter()
            .map(|it| (it.address, it.memory_bytes, it.file_bytes, it.at_bytes))
            .collect();
        assert_eq!(
            segments,
            [(0x1000, 0x8000, 0x3000, 0), (0x20_000, 0x2000, 0, 0x3000), (0x22_000, 0xe000, 0x6000, 0x3000)]
        );
        assert_eq!(found.whole, [0x1000..0x9000, 0x20_000..0x30_000]);
        let parts =
            [Part { image: 0..0x3000, at_bytes: 0 }, Part { image: 0xa000..0x10_000, at_bytes: 0x3000 }];
        assert_eq!(found.parts, parts);
        let files: Vec<_> =
            found.files.iter().map(|file| (file.start, file.end, file.offset_bytes)).collect();
        assert_eq!(files, [(0x1000, 0x4000, 0x7000)]);
    }

    #[test]
    fn registers_of_a_32_bit_program_are_refused() {
        let bytes = vec![0; 68];
        let thread = Thread {
            tid: 7,
            name: Vec::new(),
            signal_mask: 0,
            pending_signal: 0,
            signal_information: Vec::new(),
            registers: vec![RegisterSet { note_type: threads::NT_PRSTATUS, bytes }],
        };
        let threads = Threads {
            machine: threads::X86_64,
            pid: 7,
            parent_pid: 1,
            process_group: 7,
            session: 7,
            threads: vec![thread],
        };
        let (auxv, register_layout, command) = Default::default();
        let about = About { threads: Some(threads), auxv, command, register_layout };
        let head = Head::new(&AddressSpace::default(), &[], about);
        let why = head.err().unwrap().to_string();
        assert!(why.contains("thread 7") && why.contains("68 bytes, expected 216"), "{why}");
    }
}
