//! An ELF core file: what stands before the memory in it.
//!
//! The memory itself is the image, byte for byte, from a page boundary on. Each captured mapping is a
//! segment of it. What was excluded from it or could not be read is no part of any segment: a debugger then
//! says that it cannot read it. (gdb takes a segment without bytes for zeros, unless a file is mapped there.) A
//! mapping that was not captured is a segment without bytes, as in the kernel's cores: else nobody would
//! know that it was there.

use super::SinkError;
use crate::address_space::{AddressSpace, Mapping, Protection};
use crate::elf::{self, MappedFile, Notes, Segment};
use crate::threads::{self, Thread, Threads};
use crate::units::AddressRange;

/// Memory begins at a multiple of this, so that a debugger may map it.
const PAGE_BYTES: u64 = 4096;

/// What stands before the memory.
pub(crate) struct Head {
    /// From the start of the file.
    pub(crate) bytes: Vec<u8>,
    /// Where the image begins.
    pub(crate) image_at_bytes: u64,
}

impl Head {
    /// The head of a core of this memory, these threads, this auxiliary vector and this command line.
    pub(crate) fn new(
        space: &AddressSpace,
        threads: Option<Threads>,
        auxv: Vec<u8>,
        command: String,
    ) -> Result<Head, SinkError> {
        threads.iter().try_for_each(check)?;
        let machine = threads.as_ref().map_or(threads::MACHINE, |threads| threads.machine);
        let files = space.mappings().iter().filter_map(mapped_file).collect();
        let first =
            threads.iter().flat_map(|it| it.threads.iter().find(|thread| thread.tid == it.pid)).next();
        let name = first.map(|thread| thread.name.clone()).unwrap_or_default();
        let notes = Notes { threads, name, command, auxv, files }.write();
        let of_notes = Segment {
            kind: elf::NOTE,
            flags: 0,
            at_bytes: 0,
            address: 0,
            file_bytes: notes.len() as u64,
            memory_bytes: 0,
            align_bytes: 4,
        };
        // readelf takes a segment without any note for damage.
        let of_notes = (!notes.is_empty()).then_some(of_notes);
        let mut segments: Vec<Segment> = of_notes.into_iter().chain(memory(space)).collect();

        let notes_at_bytes = elf::headers_bytes(segments.len()) as u64;
        let image_at_bytes = (notes_at_bytes + notes.len() as u64).next_multiple_of(PAGE_BYTES);
        for segment in &mut segments {
            let is_memory = segment.kind == elf::LOAD;
            segment.at_bytes += if is_memory { image_at_bytes } else { notes_at_bytes };
            if is_memory && segment.at_bytes % PAGE_BYTES != segment.address % PAGE_BYTES {
                segment.align_bytes = 1;
            }
        }
        let too_many = || SinkError::Core { why: "it has more mappings than ELF can count".to_owned() };
        let mut bytes = elf::headers(machine, &segments).ok_or_else(too_many)?;
        bytes.extend(notes);
        Ok(Head { bytes, image_at_bytes })
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

/// The segments of memory; where their bytes are is counted from the start of the image.
fn memory(space: &AddressSpace) -> Vec<Segment> {
    let mut segments = Vec::new();
    let mut image_bytes = 0;
    for mapping in space.mappings() {
        let whole = mapping.range;
        let segment = |range: AddressRange| Segment {
            kind: elf::LOAD,
            flags: flags(mapping.protection),
            at_bytes: image_bytes + (range.start() - whole.start()),
            address: range.start(),
            file_bytes: range.length_bytes(),
            memory_bytes: range.length_bytes(),
            align_bytes: PAGE_BYTES,
        };
        if mapping.captured {
            segments.extend(what_is_there(whole, space).into_iter().map(segment));
            image_bytes += whole.length_bytes();
        } else {
            segments.push(Segment { file_bytes: 0, ..segment(whole) });
        }
    }
    segments
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

/// A mapping of a file, as the kernel lists it.
fn mapped_file(mapping: &Mapping) -> Option<MappedFile> {
    let is_path = mapping.name.starts_with('/');
    is_path.then(|| MappedFile {
        start: mapping.range.start(),
        end: mapping.range.end(),
        offset_bytes: mapping.file_offset_bytes,
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
        let found: Vec<_> = memory(&space)
            .iter()
            .map(|it| (it.address, it.memory_bytes, it.file_bytes, it.at_bytes))
            .collect();
        let expected = [
            (0x1000, 0x1000, 0x1000, 0),
            (0x3800, 0x1800, 0x1800, 0x2800),
            (0x5000, 0x1000, 0, 0x4000),
            (0x8000, 0x1000, 0x1000, 0x4000),
        ];
        assert_eq!(found, expected);
        assert!(memory(&space).iter().all(|segment| segment.flags == elf::READ | elf::EXECUTE));
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
        let head = Head::new(&AddressSpace::default(), Some(threads), Vec::new(), String::new());
        let why = head.err().unwrap().to_string();
        assert!(why.contains("thread 7") && why.contains("68 bytes, expected 216"), "{why}");
    }
}
