//! An ELF core file as a source: of the kernel, of gdb's `gcore`, or of a restore.
//!
//! ```text
//! segment in the core      |##########|  the file has its bytes: a mapping, captured
//!                          |####······|  the file has some of them: two mappings, the second not captured
//!                          |··········|  the file has none: a mapping, not captured
//! file in its notes        |aaa|bbbbbb|  cuts a segment where the file changes
//!              |cccccc|                  no segment at all: a mapping, not captured
//! ```
//!
//! Whoever writes a core leaves out what a debugger finds elsewhere, mostly the code of libraries. That is
//! not zeros, and is not captured as such. What a hole in the file stands for is zeros.

use std::ops::Range;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::maps::kind_of;
use super::regular_file::RegularFile;
use super::{Attachment, CopyOut, Frozen, Memory, Source, SourceError, owner_attachment};
use crate::address_space::{AddressSpace, Mapping, MappingKind, Protection};
use crate::elf::{self, FileHeader, MappedFile, Notes, Segment, SegmentCount};
use crate::record::Origin;
use crate::threads::{self, Threads};
use crate::units::AddressRange;

/// The kernel allows a process 65,530 mappings unless it was told otherwise. A damaged count must not
/// become an allocation.
const MAX_SEGMENTS: u64 = 1 << 20;

/// Ten thousand threads with all registers of x86-64 there are, AMX included, have half of it.
const MAX_NOTES_BYTES: u64 = 256 << 20;

/// How many segment headers are read at once.
const HEADERS_AT_ONCE: usize = 1024;

/// An ELF core file of a 64-bit little-endian Linux program.
///
/// Its mappings are captured as far as the file has their bytes; the others are recorded as not captured.
/// Names come from the notes; a core does not say which mapping is the heap, and whether one is shared.
///
/// Attachments, as far as the core has notes of them: `threads` (see [`Threads`]) in the order of the core, the
/// one that got the signal first, and `auxv`.
///
/// ```no_run
/// use stillframe::{CaptureOptions, CoreSource, Store};
/// let store = Store::open("vault")?;
/// store.process("web-1").capture(&CoreSource::new("core.4711"), &CaptureOptions::default())?;
/// # Ok::<(), stillframe::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct CoreSource {
    path: PathBuf,
}

impl CoreSource {
    /// The core at `path`. Nothing is opened yet.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        CoreSource { path: path.into() }
    }

    /// The path it was made with.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Source for CoreSource {
    fn open(&self) -> Result<Box<dyn Frozen + '_>, SourceError> {
        let file = RegularFile::open(&self.path)?;
        let bad = |why| SourceError::NotACore { path: self.path.clone(), why };
        let header = file_header(&file)?.map_err(bad)?;
        let segments = segments(&file, &header)?.map_err(bad)?;
        let notes = notes(&file, header.machine, &segments)?.map_err(bad)?;
        let loaded = loaded(segments).map_err(bad)?;
        let (mappings, at_bytes): (Vec<_>, Vec<_>) =
            mappings(&loaded, &notes).map_err(bad)?.into_iter().unzip();
        let space = AddressSpace::new(mappings)?;
        let origin = origin(&file, &notes);
        let attachments = attachments(&file, notes);
        Ok(Box::new(FrozenCore { file, space, at_bytes, origin, attachments }))
    }
}

/// The outer error is that the file cannot be read, the inner one that it is no core.
type Parsed<T> = Result<Result<T, String>, SourceError>;

fn file_header(file: &RegularFile) -> Parsed<FileHeader> {
    let mut bytes = [0; elf::FILE_HEADER_BYTES];
    // A file that ends within the header may still be told from something else by how it begins.
    let length_bytes = file.length_bytes().min(bytes.len() as u64);
    let there = usize::try_from(length_bytes).unwrap_or(bytes.len());
    file.read(0, &mut bytes[..there])?;
    let header = FileHeader::read(&bytes);
    Ok(if there < bytes.len() { header.and(Err(truncated(bytes.len() as u64, file))) } else { header })
}

/// The segments that are of any interest, none of which reaches beyond the end of the file.
fn segments(file: &RegularFile, header: &FileHeader) -> Parsed<Vec<Segment>> {
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
    let mut found = Vec::new();
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
            if segment.file_bytes > 0
                && let Err(why) = check_is_there(segment.at_bytes, segment.file_bytes, file)
            {
                return Ok(Err(why));
            }
            found.push(segment);
        }
    }
    // Each has bytes of its own. Without this a small file could stand for any amount of memory.
    let claimed_bytes: u128 = found.iter().map(|segment| u128::from(segment.file_bytes)).sum();
    if claimed_bytes > u128::from(file.length_bytes()) {
        return Ok(Err(format!(
            "its segments have {claimed_bytes} bytes together, more than the {} of the file: it is damaged",
            file.length_bytes()
        )));
    }
    Ok(Ok(found))
}

fn check_is_there(at_bytes: u64, length_bytes: u64, file: &RegularFile) -> Result<(), String> {
    match at_bytes.checked_add(length_bytes) {
        Some(end_bytes) if end_bytes <= file.length_bytes() => Ok(()),
        Some(end_bytes) => Err(truncated(end_bytes, file)),
        None => Err(format!("it has a part at byte {at_bytes} of {length_bytes} bytes: it is damaged")),
    }
}

fn truncated(end_bytes: u64, file: &RegularFile) -> String {
    let found_bytes = file.length_bytes();
    format!(
        "it is cut short: it has {found_bytes} bytes and should have {end_bytes} or more; \
         was it copied whole, was the disk full, or does `ulimit -c` limit cores?"
    )
}

fn notes(file: &RegularFile, machine: u16, segments: &[Segment]) -> Parsed<Notes> {
    let segments = || segments.iter().filter(|segment| segment.kind == elf::NOTE);
    let total_bytes: u64 = segments().map(|segment| segment.file_bytes).sum();
    if total_bytes > MAX_NOTES_BYTES {
        return Ok(Err(format!(
            "it has {total_bytes} bytes of notes; at most {MAX_NOTES_BYTES} can be read"
        )));
    }
    let mut notes = Notes::default();
    for segment in segments() {
        let mut bytes = vec![0; usize::try_from(segment.file_bytes).unwrap_or(usize::MAX)];
        file.read(segment.at_bytes, &mut bytes)?;
        if let Err(why) = notes.read(machine, &bytes) {
            return Ok(Err(why));
        }
    }
    notes.files.sort_by_key(|file| file.start);
    Ok(Ok(notes))
}

/// A range of addresses, and where in the file its bytes are, if they are.
struct Loaded {
    range: AddressRange,
    protection: Protection,
    at_bytes: Option<u64>,
}

/// The memory of the segments, in the order of the addresses and apart.
fn loaded(segments: Vec<Segment>) -> Result<Vec<Loaded>, String> {
    let mut loaded = Vec::new();
    for Segment { flags, at_bytes, address, file_bytes, memory_bytes, .. } in
        segments.into_iter().filter(|segment| segment.kind == elf::LOAD)
    {
        let damaged = || {
            format!(
                "it has a segment of {memory_bytes} bytes at {address:#x}, {file_bytes} of them in the file: \
                 it is damaged"
            )
        };
        let whole = AddressRange::with_length(address, memory_bytes).map_err(|_| damaged())?;
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
        let parts = [(address, cut, Some(at_bytes)), (cut, whole.end(), None)];
        loaded.extend(parts.into_iter().filter_map(|(start, end, at_bytes)| {
            Some(Loaded { range: AddressRange::new(start, end).ok()?, protection, at_bytes })
        }));
    }
    loaded.sort_by_key(|loaded| loaded.range);
    match loaded.windows(2).find(|pair| pair[0].range.end() > pair[1].range.start()) {
        Some(pair) => {
            Err(format!("its segments {} and {} overlap: it is damaged", pair[0].range, pair[1].range))
        }
        None => Ok(loaded),
    }
}

/// The mappings in the order of their addresses, each with the place of its bytes in the file.
fn mappings(loaded: &[Loaded], notes: &Notes) -> Result<Vec<(Mapping, u64)>, String> {
    let files = &notes.files;
    if let Some(pair) = files.windows(2).find(|pair| pair[0].end > pair[1].start) {
        return Err(format!(
            "its note about mapped files has two at {:#x}: it is damaged",
            pair[1].start.max(pair[0].start)
        ));
    }
    let mut mappings = Vec::new();
    // What lies before both `at` and the first of `rest` is done.
    let mut rest = &files[..];
    let mut at = 0;
    for Loaded { range, protection, at_bytes } in loaded {
        uncovered(&mut rest, at, range.start(), &mut mappings)?;
        at = range.start();
        while at < range.end() {
            let file = rest.first().filter(|file| file.start <= at);
            let cut = file.map(|file| file.end).or(rest.first().map(|file| file.start)).unwrap_or(u64::MAX);
            let end = cut.min(range.end());
            let mapping = mapping(at, end, *protection, at_bytes.is_some(), file, notes)?;
            mappings.push((mapping, at_bytes.map_or(0, |at_bytes| at_bytes + (at - range.start()))));
            at = end;
            if file.is_some_and(|file| file.end <= at) {
                rest = &rest[1..];
            }
        }
    }
    uncovered(&mut rest, at, u64::MAX, &mut mappings)?;
    Ok(mappings)
}

/// Adds what the note about files has between `at` and `until`, where no segment is.
fn uncovered(
    rest: &mut &[MappedFile],
    at: u64,
    until: u64,
    mappings: &mut Vec<(Mapping, u64)>,
) -> Result<(), String> {
    while let Some((file, after)) = rest.split_first().filter(|(file, _)| file.start < until) {
        let (start, end) = (file.start.max(at), file.end.min(until));
        if start < end || file.start >= file.end {
            let none = &Notes::default();
            mappings.push((mapping(start, end, Protection::default(), false, Some(file), none)?, 0));
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

fn origin(file: &RegularFile, notes: &Notes) -> Origin {
    let entry = notes.entry_address();
    let of_entry = |file: &&MappedFile| entry.is_some_and(|entry| (file.start..file.end).contains(&entry));
    let executable = notes.files.iter().find(of_entry).map(|file| file.name.clone());
    let pid = notes.threads.as_ref().map(|threads| threads.pid);
    let command = (!notes.command.is_empty()).then(|| notes.command.clone());
    Origin::Core {
        path: file.path().to_owned(),
        pid,
        executable: executable.map(|name| std::ffi::OsString::from_vec(name).into()),
        command: command.into_iter().collect(),
    }
}

fn attachments(file: &RegularFile, notes: Notes) -> Vec<Attachment> {
    // What root owns may be the core of anybody's process.
    let owner = file.owner().filter(|owner| *owner != 0).map(|owner| owner_attachment((owner, owner)));
    // Integers and lists can always be encoded.
    let threads = notes.threads.and_then(|threads| threads.to_attachment().ok());
    let auxv = (!notes.auxv.is_empty()).then_some(notes.auxv);
    let named = |(name, bytes): (&str, Option<Vec<u8>>)| {
        bytes.map(|bytes| Attachment { name: name.to_owned(), bytes })
    };
    let named = [(Threads::ATTACHMENT, threads), (threads::AUXV, auxv)].into_iter().filter_map(named);
    named.chain(owner).collect()
}

/// An open core.
struct FrozenCore {
    file: RegularFile,
    space: AddressSpace,
    /// Where in the file the bytes of each mapping are.
    at_bytes: Vec<u64>,
    origin: Origin,
    attachments: Vec<Attachment>,
}

impl Frozen for FrozenCore {
    fn address_space(&self) -> &AddressSpace {
        &self.space
    }

    fn origin(&self) -> Origin {
        self.origin.clone()
    }

    fn attachments(&self) -> Vec<Attachment> {
        self.attachments.clone()
    }

    fn populated(&self, mapping_index: usize) -> Result<Vec<Range<u64>>, SourceError> {
        let mapping = &self.space.mappings()[mapping_index];
        if !mapping.captured {
            return Ok(Vec::new());
        }
        let start = self.at_bytes[mapping_index];
        let found = self.file.data(start..start + mapping.range.length_bytes())?;
        Ok(found.into_iter().map(|found| found.start - start..found.end - start).collect())
    }

    fn memory(&self) -> Memory<'_> {
        Memory::Shared(self)
    }

    fn release(&self) -> Duration {
        Duration::ZERO
    }
}

impl CopyOut for FrozenCore {
    fn copy_out(
        &self,
        mapping_index: usize,
        offset_bytes: u64,
        buffer: &mut [u8],
        _unreadable: &mut Vec<AddressRange>,
    ) -> Result<(), SourceError> {
        self.file.read(self.at_bytes[mapping_index].saturating_add(offset_bytes), buffer)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::threads::{RegisterSet, Thread};

    /// A segment of memory: its first address, how many bytes it has, and those of them in the file.
    type Load<'a> = (u64, u64, &'a [u8]);

    /// A core as it should be.
    fn core(loads: &[Load<'_>], notes: &Notes) -> Vec<u8> {
        let notes = notes.write();
        let mut at_bytes = elf::headers_bytes(loads.len() + 1) as u64;
        let mut segment = |kind, address, memory_bytes, file_bytes: usize| {
            let segment = Segment {
                kind,
                flags: elf::READ,
                at_bytes,
                address,
                file_bytes: file_bytes as u64,
                memory_bytes,
                align_bytes: 1,
            };
            at_bytes += file_bytes as u64;
            segment
        };
        let mut segments = vec![segment(elf::NOTE, 0, 0, notes.len())];
        segments.extend(
            loads.iter().map(|(address, bytes, file)| segment(elf::LOAD, *address, *bytes, file.len())),
        );
        let mut bytes = elf::headers(62, &segments).unwrap();
        bytes.extend(notes);
        loads.iter().for_each(|(_, _, file)| bytes.extend(*file));
        bytes
    }

    fn file(start: u64, end: u64, offset_bytes: u64, name: &str) -> MappedFile {
        MappedFile { start, end, offset_bytes, name: name.as_bytes().to_vec() }
    }

    fn threads() -> Threads {
        let thread = |tid| Thread {
            tid,
            name: Vec::new(),
            signal_mask: 1,
            pending_signal: 11,
            signal_information: vec![3; 128],
            registers: vec![
                RegisterSet { note_type: 1, bytes: vec![1; 27 * 8] },
                RegisterSet { note_type: 2, bytes: vec![2; 512] },
            ],
        };
        let threads = vec![thread(9), thread(7)];
        Threads { machine: 62, pid: 7, parent_pid: 1, process_group: 7, session: 7, threads }
    }

    /// The mappings of a core, its memory, its attachments.
    type Found = (Vec<Mapping>, Vec<u8>, Vec<Attachment>);

    /// Opens these bytes as a core and reads all it has.
    fn open(bytes: &[u8]) -> Result<Found, SourceError> {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("core");
        std::fs::write(&path, bytes).unwrap();
        let source = CoreSource::new(&path);
        let frozen = source.open()?;
        let Memory::Shared(copy) = frozen.memory() else { panic!("a file can be read by many threads") };
        let mappings = frozen.address_space().mappings();
        let mut memory = Vec::new();
        for (index, mapping) in mappings.iter().enumerate().filter(|(_, mapping)| mapping.captured) {
            let length = usize::try_from(mapping.range.length_bytes()).unwrap();
            let mut plain = vec![0; length];
            for range in frozen.populated(index)? {
                let place = usize::try_from(range.start).unwrap()..usize::try_from(range.end).unwrap();
                copy.copy_out(index, range.start, &mut plain[place], &mut Vec::new())?;
            }
            memory.extend(plain);
        }
        Ok((mappings.to_vec(), memory, frozen.attachments()))
    }

    fn why(bytes: &[u8]) -> String {
        match open(bytes) {
            Err(SourceError::NotACore { why, .. }) => why,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn what_a_core_has_is_captured_and_what_it_lacks_is_not() {
        let auxv: Vec<u8> =
            [25u64, 0x9100, 33, 0x8000, 9, 0x1000, 0, 0].iter().flat_map(|it| it.to_le_bytes()).collect();
        let notes = Notes {
            threads: Some(threads()),
            auxv: auxv.clone(),
            // One that begins before a segment, one that ends a segment early, one without any segment.
            files: vec![
                file(0x800, 0x1400, 0x5000, "/bin/a"),
                file(0x1400, 0x1600, 0, "/lib/b"),
                file(0x3000, 0x5000, 0x7000, "/lib/c"),
            ],
            command: "a b".to_owned(),
            name: b"a".to_vec(),
        };
        let loads: &[Load<'_>] = &[
            (0x1000, 0x1000, &[1; 0x1000]),
            (0x4000, 0x1000, &[2; 0x100]),
            (0x8000, 0x1000, &[]),
            (0x9000, 0x1000, &[3; 0x1000]),
        ];
        let (mappings, memory, attachments) = open(&core(loads, &notes)).unwrap();
        let found: Vec<_> = mappings
            .iter()
            .map(|it| (it.range.start(), it.range.end(), it.captured, &*it.name, it.file_offset_bytes))
            .collect();
        let expected = [
            (0x800, 0x1000, false, "/bin/a", 0x5000),
            (0x1000, 0x1400, true, "/bin/a", 0x5800),
            (0x1400, 0x1600, true, "/lib/b", 0),
            (0x1600, 0x2000, true, "", 0),
            (0x3000, 0x4000, false, "/lib/c", 0x7000),
            (0x4000, 0x4100, true, "/lib/c", 0x8000),
            (0x4100, 0x5000, false, "/lib/c", 0x8100),
            (0x8000, 0x9000, false, "[vdso]", 0),
            (0x9000, 0xa000, true, "[stack]", 0),
        ];
        assert_eq!(found, expected);
        assert_eq!(memory, [&[1; 0x1000][..], &[2; 0x100], &[3; 0x1000]].concat());
        let mut expected = threads();
        // The second one has the id of the process, whose note stands before it.
        expected.threads[1].name = b"a".to_vec();
        assert_eq!(Threads::from_attachment(&attachments[0].bytes).unwrap(), expected);
        assert_eq!(attachments[1], Attachment { name: "auxv".to_owned(), bytes: auxv });
    }

    #[test]
    fn a_core_may_have_more_segments_than_its_header_can_count() {
        let loads: Vec<Load<'_>> = (0..70_000).map(|number| (number * 16, 16, &[5u8; 3][..])).collect();
        let (mappings, memory, _) = open(&core(&loads, &Notes::default())).unwrap();
        assert_eq!(mappings.iter().filter(|mapping| mapping.captured).count(), 70_000);
        assert_eq!(memory, vec![5; 3 * 70_000]);
    }

    #[test]
    fn a_core_without_notes_is_memory_alone() {
        let (mappings, memory, attachments) = open(&core(&[(0, 5, &[1; 5])], &Notes::default())).unwrap();
        assert_eq!((mappings.len(), memory, attachments), (1, vec![1; 5], Vec::new()));
    }

    #[test]
    fn a_core_that_is_cut_short_is_refused_wherever_it_is_cut() {
        let notes = Notes { threads: Some(threads()), ..Notes::default() };
        let whole = core(&[(0x1000, 0x400, &[1; 0x400])], &notes);
        assert!(open(&whole).is_ok());
        for length in (4..whole.len()).step_by(13).chain([whole.len() - 1]) {
            let why = why(&whole[..length]);
            assert!(why.contains("cut short") || length < 64, "{length}: {why}");
        }
        assert!(why(b"\x7fEL").contains("no ELF file"));
        assert!(why(&[b'x'; 5000]).contains("no ELF file"));
    }

    #[test]
    fn what_is_wrong_with_a_damaged_core_is_told() {
        let notes = Notes {
            files: vec![file(0x1000, 0x2000, 0, "/a"), file(0x3000, 0x4000, 0, "/b")],
            ..Notes::default()
        };
        let good = core(&[(0x1000, 0x400, &[1; 0x400]), (0x2000, 0x400, &[2; 0x400])], &notes);
        let (first, second) = (64 + 56, 64 + 2 * 56);
        let table = 64 + 3 * 56 + 12 + 8 + 16;
        // Where a number of 64 bits is, what becomes of it, and what is said.
        for (at, number, word) in [
            (second + 16, 0x1100, "overlap"),
            (second + 16, u64::MAX - 5, "is damaged"),
            (second + 40, 0x3ff, "1024 of them in the file"),
            (second + 40, u64::MAX, "is damaged"),
            (second + 32, 0x500, "cut short"),
            (second + 32, u64::MAX, "is damaged"),
            (first + 8, u64::MAX, "is damaged"),
            (64 + 32, 19, "beyond their end"),
            (32, u64::MAX, "is damaged"),
            (32, 1 << 40, "cut short"),
            (table, 0x2000, "mapped files"),
            (table + 8, 0x3001, "mapped files"),
            (table + 24, 0x9000, "mapped files"),
        ] {
            let mut bytes = good.clone();
            bytes[at..at + 8].copy_from_slice(&u64::to_le_bytes(number));
            let why = why(&bytes);
            assert!(why.contains(word), "{at}, {number:#x}: {why}");
        }
        // A segment that has all of the file beside what the others have.
        let mut bytes = good.clone();
        for (at, number) in [(first + 8, 0), (first + 32, good.len() as u64), (first + 40, 0x1000)] {
            bytes[at..at + 8].copy_from_slice(&u64::to_le_bytes(number));
        }
        assert!(why(&bytes).contains("more than the"), "{}", why(&bytes));
        // A count of segments in a section that is not there, and one that nobody has.
        let mut bytes = good.clone();
        bytes[56..58].copy_from_slice(&[0xff; 2]);
        bytes[40..48].copy_from_slice(&u64::MAX.to_le_bytes());
        assert!(why(&bytes).contains("is damaged"));
        bytes[40..48].copy_from_slice(&(good.len() as u64).to_le_bytes());
        bytes.extend([0xff; 64]);
        assert!(why(&bytes).contains("4294967295 segments"));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(256))]

        #[test]
        fn whatever_the_bytes_are_they_are_refused_or_read(
            flips in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..8),
            words in prop::collection::vec((0usize..40, prop_oneof![any::<u64>(), 0u64..0x3000]), 0..4),
            keep in prop_oneof![4 => Just(usize::MAX), 1 => 0usize..3000],
        ) {
            let notes = Notes {
                threads: Some(threads()),
                files: vec![file(0x1000, 0x2000, 0, "/a"), file(0x3000, 0x4000, 0, "/b")],
                auxv: vec![9; 64],
                command: "a".to_owned(),
                name: Vec::new(),
            };
            let mut bytes = core(&[(0x1000, 0x400, &[1; 0x400]), (0x2000, 0x900, &[2; 0x400])], &notes);
            for (word, number) in words {
                bytes[word * 8..word * 8 + 8].copy_from_slice(&number.to_le_bytes());
            }
            for (at, byte) in flips {
                let at = at.index(bytes.len());
                bytes[at] = byte;
            }
            bytes.truncate(keep);
            if let Ok((mappings, memory, _)) = open(&bytes) {
                prop_assert!(memory.len() <= bytes.len());
                prop_assert!(mappings.len() <= bytes.len());
            }
        }
    }
}
