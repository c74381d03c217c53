//! An ELF core file as a source: of the kernel, of gdb's `gcore`, of a virtual machine, or of a restore.
//!
//! ```text
//! segment in the core      |##########|  the file has its bytes: a mapping, captured
//!                          |####······|  the file has some of them: two mappings, the second not captured
//!                          |··········|  the file has none: a mapping, not captured
//!                          |####000000|  a note of a restore says that the rest is zeros: captured
//! file in its notes        |aaa|bbbbbb|  cuts a segment where the file changes
//!              |cccccc|                  no segment at all: a mapping, not captured
//! ```
//!
//! Whoever writes a core leaves out what a debugger finds elsewhere, mostly the code of libraries. That is
//! not zeros, and is not captured as such. What a hole in the file stands for is zeros. What a core that is cut short
//! should have and has not is captured as unreadable.

mod compressed;
mod mappings;
mod segments;

use std::ops::Range;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::regular_file::RegularFile;
use super::{Access, Attachment, CopyOut, Frozen, Source, SourceError, owner_attachment};
use crate::address_space::AddressSpace;
use crate::elf::{MappedFile, Notes};
use crate::progress::Progress;
use crate::ranges::Ranges;
use crate::record::Origin;
use crate::threads::{self, Threads};
use crate::units::AddressRange;

pub use compressed::Compression;
use segments::{CutShort, Piece};

/// The name of a mapping whose addresses are those of a machine's memory.
const PHYSICAL: &str = "[physical]";

/// An ELF core file of a 64-bit little-endian Linux program, or of a virtual machine.
///
/// Its mappings are captured as far as the file has their bytes; the others are recorded as not captured.
/// Names come from the notes; a core does not say which mapping is the heap, and whether one is shared. A dump of a virtual
/// machine that has physical addresses only is captured by those, in mappings with the name `[physical]`.
///
/// Attachments, as far as the core has notes of them: `threads` (see [`Threads`]) in the order of the core, the
/// one that got the signal first, `auxv`, and `xsave-layout`.
///
/// **Compressed** cores (zstd, gzip, frames of lz4) are decompressed first, into a file without a name in `$TMPDIR`, else
/// `/var/tmp`, which has holes where the core is zeros. That ends with an error before a twentieth of that file
/// system is all that is left, at the first bytes that are no core, and where the core ends by its headers. So a
/// small file that claims to be large costs time and no more.
///
/// ```no_run
/// use stillframe::{CaptureOptions, Store};
/// use stillframe::source::CoreSource;
/// let store = Store::open("vault")?;
/// store.process("web-1").capture(&CoreSource::new("core.4711"), &CaptureOptions::default())?;
/// # Ok::<(), stillframe::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct CoreSource {
    path: PathBuf,
    cut_short: CutShort,
    progress: Progress,
}

impl CoreSource {
    /// The core at `path`. Nothing is opened yet.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        CoreSource { path: path.into(), cut_short: CutShort::Refuse, progress: Progress::default() }
    }

    /// Takes what a core has that is cut short (by a full disk, by `ulimit -c`), which is refused otherwise. What is
    /// missing is recorded as unreadable.
    pub fn partial(mut self, take_what_is_there: bool) -> Self {
        self.cut_short = if take_what_is_there { CutShort::Take } else { CutShort::Refuse };
        self
    }

    /// Watches the decompression.
    pub fn progress(mut self, progress: Progress) -> Self {
        self.progress = progress;
        self
    }

    /// The path it was made with.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Opens it and reads its headers and notes; a compressed one is decompressed. What comes back is the source of any
    /// number of captures.
    ///
    /// # Errors
    ///
    /// When it is no core, a damaged one or, unless that is [asked for](Self::partial), one that is cut short; when it
    /// cannot be read or decompressed.
    pub fn read(&self) -> Result<OpenCore, SourceError> {
        let bad = |why| SourceError::NotACore { path: self.path.clone(), why };
        let file = RegularFile::open(&self.path)?;
        let (file, compression) = match compressed::decompressed(&file, self.cut_short, &self.progress)? {
            Some((decompressed, compression)) => (decompressed, Some(compression)),
            None => (file, None),
        };
        let header = segments::file_header(&file)?.map_err(bad)?;
        let segments = segments::segments(&file, &header, self.cut_short)?.map_err(bad)?;
        let mut notes = segments::notes(&file, header.machine, &segments, self.cut_short)?.map_err(bad)?;
        let missing_bytes = segments.missing_bytes;
        let is_physical = segments::has_physical_addresses(&segments.found);
        if is_physical {
            // They are about other addresses.
            (notes.files, notes.auxv, notes.whole) = Default::default();
        }
        let (loaded, pieces) = segments::loaded(segments.found, is_physical, &notes.whole).map_err(bad)?;
        let mut mappings = mappings::mappings(&loaded, &notes).map_err(bad)?;
        if is_physical {
            mappings.iter_mut().for_each(|mapping| PHYSICAL.clone_into(&mut mapping.name));
        }
        let space = AddressSpace::new(mappings)?;
        let origin = origin(&file, &notes);
        let attachments = attachments(&file, notes);
        let content =
            Content { file, space, pieces, origin, attachments, compression, missing_bytes, is_physical };
        Ok(OpenCore(Arc::new(content)))
    }
}

impl Source for CoreSource {
    fn open(&self) -> Result<Box<dyn Frozen + '_>, SourceError> {
        Ok(Box::new(FrozenCore(self.read()?.0)))
    }
}

/// A core whose headers are read. Made by [`CoreSource::read`].
#[derive(Clone)]
pub struct OpenCore(Arc<Content>);

struct Content {
    /// The core itself, or what it was decompressed to.
    file: RegularFile,
    space: AddressSpace,
    /// Where the bytes are, by addresses: sorted and apart. What is captured and in no piece is zeros.
    pieces: Vec<Piece>,
    origin: Origin,
    attachments: Vec<Attachment>,
    compression: Option<Compression>,
    missing_bytes: u64,
    is_physical: bool,
}

impl OpenCore {
    /// What it is compressed by.
    pub fn compression(&self) -> Option<Compression> {
        self.0.compression
    }

    /// How many bytes it lacks that it should have, as it is cut short.
    pub fn missing_bytes(&self) -> u64 {
        self.0.missing_bytes
    }

    /// Whether its addresses are those of a machine's memory.
    pub fn has_physical_addresses(&self) -> bool {
        self.0.is_physical
    }
}

impl std::fmt::Debug for OpenCore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("OpenCore")
            .field("path", &self.0.file.path())
            .field("compression", &self.0.compression)
            .field("missing_bytes", &self.0.missing_bytes)
            .finish_non_exhaustive()
    }
}

impl Source for OpenCore {
    fn open(&self) -> Result<Box<dyn Frozen + '_>, SourceError> {
        Ok(Box::new(FrozenCore(self.0.clone())))
    }
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
    let layout = (!notes.register_layout.is_empty()).then_some(notes.register_layout);
    let named = [(Threads::ATTACHMENT, threads), (threads::AUXV, auxv), (threads::REGISTER_LAYOUT, layout)]
        .into_iter()
        .filter_map(named);
    named.chain(owner).collect()
}

impl Content {
    /// The pieces of these addresses.
    fn pieces_in(&self, addresses: Range<u64>) -> impl Iterator<Item = Piece> {
        let first = self.pieces.partition_point(|piece| piece.addresses.end <= addresses.start);
        let pieces =
            self.pieces[first..].iter().take_while(move |piece| piece.addresses.start < addresses.end);
        pieces.map(move |piece| {
            let start = piece.addresses.start.max(addresses.start);
            let at_bytes = piece.at_bytes + (start - piece.addresses.start);
            Piece { addresses: start..piece.addresses.end.min(addresses.end), at_bytes }
        })
    }

    /// How many bytes of a piece the file has: one that is cut short lacks some.
    fn there_bytes(&self, piece: &Piece) -> u64 {
        let length_bytes = piece.addresses.end - piece.addresses.start;
        self.file.length_bytes().saturating_sub(piece.at_bytes).min(length_bytes)
    }
}

/// A core during one capture.
struct FrozenCore(Arc<Content>);

impl Frozen for FrozenCore {
    fn address_space(&self) -> &AddressSpace {
        &self.0.space
    }

    fn origin(&self) -> Origin {
        self.0.origin.clone()
    }

    fn attachments(&self) -> Vec<Attachment> {
        self.0.attachments.clone()
    }

    fn populated(&self, mapping_index: usize) -> Result<Ranges, SourceError> {
        let mapping = &self.0.space.mappings()[mapping_index];
        if !mapping.captured {
            return Ok(Ranges::new());
        }
        let start = mapping.range.start();
        let mut found: Vec<Range<u64>> = Vec::new();
        for piece in self.0.pieces_in(start..mapping.range.end()) {
            let in_mapping = piece.addresses.start - start;
            let there_bytes = self.0.there_bytes(&piece);
            if there_bytes > 0 {
                let data = self.0.file.data(piece.at_bytes..piece.at_bytes + there_bytes)?;
                let to_mapping = |at_bytes: u64| in_mapping + (at_bytes - piece.at_bytes);
                found.extend(data.into_iter().map(|data| to_mapping(data.start)..to_mapping(data.end)));
            }
            // What the file should have and has not is unreadable, which shows when it is copied.
            if piece.addresses.start + there_bytes < piece.addresses.end {
                found.push(in_mapping + there_bytes..piece.addresses.end - start);
            }
        }
        Ok(found.into())
    }

    fn access(&self) -> Access<'_> {
        Access::Shared(self)
    }
}

impl CopyOut for FrozenCore {
    fn copy_out(
        &self,
        mapping_index: usize,
        offset_bytes: u64,
        buffer: &mut [u8],
        unreadable: &mut Vec<AddressRange>,
    ) -> Result<(), SourceError> {
        let start = self.0.space.mappings()[mapping_index].range.start() + offset_bytes;
        // What is in no piece, or missing, is zeros here.
        buffer.fill(0);
        for piece in self.0.pieces_in(start..start.saturating_add(buffer.len() as u64)) {
            let there_bytes = self.0.there_bytes(&piece);
            let there = piece.addresses.start..piece.addresses.start + there_bytes;
            // Inside the buffer.
            let place = |address: u64| usize::try_from(address - start).unwrap_or(usize::MAX);
            self.0.file.read(piece.at_bytes, &mut buffer[place(there.start)..place(there.end)])?;
            unreadable.extend(AddressRange::new(there.end, piece.addresses.end));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::address_space::Mapping;
    use crate::elf::{self, Segment};
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
                physical_address: 0,
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
        let Access::Shared(copy) = frozen.access() else { panic!("a file can be read by many threads") };
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
            ..Notes::default()
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
                ..Notes::default()
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
