//! ELF core files: the format in which debuggers get the memory and registers of a process.
//!
//! ```text
//!  0           64                          notes                 memory
//!  +-----------+-----------------+- … -----+---------------------+----------------------- …
//!  | file      | segment headers, 56 each  | names, registers …  | one mapping after another
//!  | header    | (then one section header, | (notes.rs)          |
//!  |           |  if they are too many)    |                     |
//!  +-----------+-----------------+- … -----+---------------------+----------------------- …
//! ```
//!
//! A header of type `NOTE` locates notes; one of type `LOAD` locates the bytes of a range of
//! addresses. The count of segments in the file header has 16 bits; if it is too small, the one
//! section header holds the count. This module has only this part of ELF, for 64-bit little-endian
//! machines. The source and the sink of core dumps share it. The format is that of
//! [elf(5)](https://man7.org/linux/man-pages/man5/elf.5.html).

mod notes;
mod numbers;

pub(crate) use notes::{MappedFile, Notes};
use numbers::Numbers;

/// The size of the file header.
pub(crate) const FILE_HEADER_BYTES: usize = 64;

/// The size of a segment header.
pub(crate) const SEGMENT_HEADER_BYTES: usize = 56;

/// The size of a section header.
pub(crate) const SECTION_HEADER_BYTES: usize = 64;

/// The type of a segment whose bytes are memory.
pub(crate) const LOAD: u32 = 1;
/// The type of a segment of notes.
pub(crate) const NOTE: u32 = 4;

/// Executable memory.
pub(crate) const EXECUTE: u32 = 1;
/// Writable memory.
pub(crate) const WRITE: u32 = 2;
/// Readable memory.
pub(crate) const READ: u32 = 4;

const MAGIC: [u8; 4] = *b"\x7fELF";
const CLASS_64: u8 = 2;
const LITTLE_ENDIAN: u8 = 1;
const CURRENT_VERSION: u8 = 1;
const TYPE_CORE: u16 = 4;

/// The value in the file header for a count that does not fit there.
const COUNT_ELSEWHERE: u16 = 0xffff;

/// The content of a core dump's file header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct FileHeader {
    /// The machine: 62 is x86-64, 183 is AArch64.
    pub(crate) machine: u16,
    /// Where the segment headers begin.
    pub(crate) segments_at_bytes: u64,
    /// How many segment headers there are.
    pub(crate) segment_count: SegmentCount,
}

/// How many segments a core dump has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SegmentCount {
    /// This many.
    Here(u16),
    /// The number is in a section header.
    InSection {
        /// Where that section header begins.
        at_bytes: u64,
    },
}

impl FileHeader {
    /// Reads it; the error says why this is not the header of a supported core dump.
    pub(crate) fn read(bytes: &[u8; FILE_HEADER_BYTES]) -> Result<FileHeader, String> {
        let [m0, m1, m2, m3, class, order, version, ..] = *bytes;
        if [m0, m1, m2, m3] != MAGIC {
            return Err("it is no ELF file, which begins with 7f 45 4c 46".to_owned());
        }
        if class != CLASS_64 {
            return Err("it is of a 32-bit program; only cores of 64-bit programs can be read".to_owned());
        }
        if order != LITTLE_ENDIAN {
            return Err("it is of a big-endian machine; only little-endian cores can be read".to_owned());
        }
        if version != CURRENT_VERSION {
            return Err(format!("expected version {CURRENT_VERSION} of ELF, found {version}"));
        }
        let fields = Self::fields(Numbers::new(&bytes[16..]));
        let (file_type, header, each_bytes) = fields.ok_or("it ends within its header")?;
        match file_type {
            TYPE_CORE => {}
            1 => return Err("it is an object file, not a core".to_owned()),
            2 | 3 => return Err("it is an executable or a library, not a core".to_owned()),
            other => return Err(format!("it is an ELF file of type {other}; a core has type {TYPE_CORE}")),
        }
        if usize::from(each_bytes) != SEGMENT_HEADER_BYTES {
            return Err(format!(
                "expected segment headers of {SEGMENT_HEADER_BYTES} bytes, found {each_bytes}: it is damaged"
            ));
        }
        Ok(header)
    }

    /// The type of the file, the fields that are kept, and the size of a segment header, from the
    /// bytes after the first 16.
    fn fields(mut numbers: Numbers<'_>) -> Option<(u16, FileHeader, u16)> {
        let (file_type, machine) = (numbers.u16()?, numbers.u16()?);
        // The version again, and the entry point.
        numbers.skip(4 + 8)?;
        let (segments_at_bytes, section_at_bytes) = (numbers.u64()?, numbers.u64()?);
        // Flags, and the size of this header.
        numbers.skip(4 + 2)?;
        let (each_bytes, count) = (numbers.u16()?, numbers.u16()?);
        let segment_count = match count {
            COUNT_ELSEWHERE => SegmentCount::InSection { at_bytes: section_at_bytes },
            count => SegmentCount::Here(count),
        };
        Some((file_type, FileHeader { machine, segments_at_bytes, segment_count }, each_bytes))
    }

    /// The header's bytes, and the section header if `segment_count` needs one.
    fn write(machine: u16, segment_count: u32) -> (Vec<u8>, Option<Vec<u8>>) {
        let here = u16::try_from(segment_count).unwrap_or(COUNT_ELSEWHERE);
        let is_elsewhere = here == COUNT_ELSEWHERE;
        let section_at_bytes =
            FILE_HEADER_BYTES as u64 + u64::from(segment_count) * SEGMENT_HEADER_BYTES as u64;
        let mut bytes = Vec::with_capacity(FILE_HEADER_BYTES);
        bytes.extend(MAGIC);
        bytes.extend([CLASS_64, LITTLE_ENDIAN, CURRENT_VERSION]);
        bytes.resize(16, 0);
        bytes.extend(TYPE_CORE.to_le_bytes());
        bytes.extend(machine.to_le_bytes());
        bytes.extend(u32::from(CURRENT_VERSION).to_le_bytes());
        bytes.extend(0u64.to_le_bytes());
        bytes.extend((FILE_HEADER_BYTES as u64).to_le_bytes());
        bytes.extend(if is_elsewhere { section_at_bytes } else { 0 }.to_le_bytes());
        bytes.extend(0u32.to_le_bytes());
        // The sizes of this header and of a segment header, the count of segments, the same for
        // sections, and no names.
        let (section_bytes, sections) = if is_elsewhere { (SECTION_HEADER_BYTES, 1) } else { (0, 0) };
        let size = |bytes: usize| u16::try_from(bytes).unwrap_or(u16::MAX);
        let sizes = [size(FILE_HEADER_BYTES), size(SEGMENT_HEADER_BYTES), here];
        for number in sizes.into_iter().chain([size(section_bytes), sections, 0]) {
            bytes.extend(number.to_le_bytes());
        }
        let section = is_elsewhere.then(|| {
            let mut section = vec![0; SECTION_HEADER_BYTES];
            // Its size field holds the count of sections, its information field the count of
            // segments.
            section[32..40].copy_from_slice(&1u64.to_le_bytes());
            section[44..48].copy_from_slice(&segment_count.to_le_bytes());
            section
        });
        (bytes, section)
    }
}

/// The count of segments in a section header.
pub(crate) fn segment_count_of_section(section: &[u8; SECTION_HEADER_BYTES]) -> u32 {
    let [.., a, b, c, d] = *section.first_chunk::<48>().unwrap_or(&[0; 48]);
    u32::from_le_bytes([a, b, c, d])
}

/// The header of a segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Segment {
    /// [`LOAD`], [`NOTE`], or a type that is ignored.
    pub(crate) kind: u32,
    /// [`READ`], [`WRITE`] and [`EXECUTE`].
    pub(crate) flags: u32,
    /// Where its bytes are in the file.
    pub(crate) at_bytes: u64,
    /// Its first address.
    pub(crate) address: u64,
    /// Its address in the machine's physical memory. For a process it is 0.
    pub(crate) physical_address: u64,
    /// How many bytes of it the file holds.
    pub(crate) file_bytes: u64,
    /// How many bytes of memory it is.
    pub(crate) memory_bytes: u64,
    /// `at_bytes` and `address` are equal modulo this.
    pub(crate) align_bytes: u64,
}

impl Segment {
    /// Reads a complete header.
    pub(crate) fn read(bytes: &[u8; SEGMENT_HEADER_BYTES]) -> Segment {
        let (words, _) = bytes.as_chunks::<8>();
        let number = |word: usize| u64::from_le_bytes(words[word]);
        let [k0, k1, k2, k3, f0, f1, f2, f3] = words[0];
        Segment {
            kind: u32::from_le_bytes([k0, k1, k2, k3]),
            flags: u32::from_le_bytes([f0, f1, f2, f3]),
            at_bytes: number(1),
            address: number(2),
            physical_address: number(3),
            file_bytes: number(4),
            memory_bytes: number(5),
            align_bytes: number(6),
        }
    }

    fn write(&self, out: &mut Vec<u8>) {
        out.extend(self.kind.to_le_bytes());
        out.extend(self.flags.to_le_bytes());
        let places = [self.at_bytes, self.address, self.physical_address];
        let sizes = [self.file_bytes, self.memory_bytes, self.align_bytes];
        places.iter().chain(&sizes).for_each(|word| out.extend(word.to_le_bytes()));
    }
}

/// How many bytes precede the notes in a core dump with this many segments.
pub(crate) fn headers_bytes(segment_count: usize) -> usize {
    let section_bytes = if segment_count >= usize::from(COUNT_ELSEWHERE) { SECTION_HEADER_BYTES } else { 0 };
    FILE_HEADER_BYTES + segment_count * SEGMENT_HEADER_BYTES + section_bytes
}

/// The headers of a core dump with these segments: [`headers_bytes`] bytes. `None` if there are
/// more segments than ELF can count.
pub(crate) fn headers(machine: u16, segments: &[Segment]) -> Option<Vec<u8>> {
    let (mut bytes, section) = FileHeader::write(machine, u32::try_from(segments.len()).ok()?);
    segments.iter().for_each(|segment| segment.write(&mut bytes));
    bytes.extend(section.unwrap_or_default());
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn segment(number: u64) -> Segment {
        Segment {
            kind: LOAD,
            flags: READ | WRITE,
            at_bytes: number << 12,
            address: number << 20,
            physical_address: number << 30,
            file_bytes: 1,
            memory_bytes: 2,
            align_bytes: 4096,
        }
    }

    #[test]
    fn headers_come_back_however_many_there_are() {
        for count in [0, 1, 3, 65_534, 65_535, 65_536, 70_000] {
            let segments: Vec<Segment> = (0..count).map(segment).collect();
            let bytes = headers(183, &segments).unwrap();
            assert_eq!(bytes.len(), headers_bytes(segments.len()));
            let header = FileHeader::read(bytes.first_chunk().unwrap()).unwrap();
            assert_eq!(header.machine, 183);
            let found = match header.segment_count {
                SegmentCount::Here(found) => u32::from(found),
                SegmentCount::InSection { at_bytes } => {
                    let at = usize::try_from(at_bytes).unwrap();
                    segment_count_of_section(bytes[at..].first_chunk().unwrap())
                }
            };
            assert_eq!(u64::from(found), count);
            let at = usize::try_from(header.segments_at_bytes).unwrap();
            let read = bytes[at..].as_chunks().0.iter().take(segments.len()).map(Segment::read);
            assert_eq!(read.collect::<Vec<_>>(), segments);
        }
    }

    #[test]
    fn what_is_no_core_is_told_by_name() {
        let good: [u8; FILE_HEADER_BYTES] = *headers(62, &[]).unwrap().first_chunk().unwrap();
        // The offset, the new byte, and a word of the expected message.
        for (at, byte, word) in [
            (0, b'E', "no ELF file"),
            (4, 1, "32-bit"),
            (5, 2, "big-endian"),
            (6, 9, "version"),
            (16, 2, "executable"),
            (16, 3, "library"),
            (16, 1, "object"),
            (16, 77, "77"),
            (54, 32, "damaged"),
        ] {
            let mut bytes = good;
            bytes[at] = byte;
            let why = FileHeader::read(&bytes).unwrap_err();
            assert!(why.contains(word), "{why}");
        }
    }
}
