//! Compressed cores, as systemd-coredump and other tools store them. Their first bytes identify
//! them; they are decompressed before they are read.
//!
//! Many threads read a core in any order, and its holes are useful. So the decompressed bytes go
//! into a file without a name, with holes where they are zeros. The maker of a core may be hostile,
//! so the growth of this file is bounded by the headers of the core and by the free disk space.

use std::cell::Cell;
use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use lz4_flex::frame::FrameDecoder;
use rustix::fs::{Mode, OFlags};

use super::segments::{self, CutShort};
use crate::elf::{self, FileHeader};
use crate::progress::Progress;
use crate::source::SourceError;
use crate::source::regular_file::RegularFile;

/// The compression of a core.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Compression {
    /// zstd.
    Zstd,
    /// Frames of lz4.
    Lz4,
    /// gzip.
    Gzip,
}

impl Compression {
    /// Its name: `zstd`, `lz4`, `gzip`.
    pub fn name(self) -> &'static str {
        match self {
            Compression::Zstd => "zstd",
            Compression::Lz4 => "lz4",
            Compression::Gzip => "gzip",
        }
    }
}

/// The first bytes of compressed files.
const BEGINNINGS: [(&[u8], Form); 9] = [
    (b"\x28\xb5\x2f\xfd", Form::Read(Compression::Zstd)),
    (b"\x04\x22\x4d\x18", Form::Read(Compression::Lz4)),
    (b"\x1f\x8b", Form::Read(Compression::Gzip)),
    (b"\xfd7zXZ\x00", Form::Other("xz", "xz -dk")),
    (b"BZh", Form::Other("bzip2", "bzip2 -dk")),
    (b"\x02\x21\x4c\x18", Form::Other("lz4 in its old form", "lz4 -d")),
    (b"LZIP", Form::Other("lzip", "lzip -dk")),
    (b"\x1f\x9d", Form::Other("compress", "uncompress -k")),
    (b"PK\x03\x04", Form::Other("zip", "unzip")),
];

enum Form {
    Read(Compression),
    /// Its name, and the command that decompresses it.
    Other(&'static str, &'static str),
}

/// How many bytes are decompressed, scanned and written at a time.
const CHUNK_BYTES: usize = 1 << 20;
/// Holes consist of whole pages.
const PAGE_BYTES: usize = 4096;
/// The free disk space is checked again after this many bytes.
const LOOK_BYTES: u64 = 16 << 20;
/// This fraction of the file system (one part in `LEFT_FREE`) is left free.
const LEFT_FREE: u64 = 20;

/// Decompresses a core. Returns the result and the compression; `None` for a file that is not
/// compressed.
pub(super) fn decompressed(
    file: &RegularFile,
    cut_short: CutShort,
    progress: &Progress,
) -> Result<Option<(RegularFile, Compression)>, SourceError> {
    let bad = |why| SourceError::NotACore { path: file.path().to_owned(), why };
    let mut beginning = [0; 8];
    let length = usize::try_from(file.length_bytes()).unwrap_or(usize::MAX).min(beginning.len());
    file.read(0, &mut beginning[..length])?;
    let form = BEGINNINGS.iter().find(|(bytes, _)| beginning[..length].starts_with(bytes));
    let compression = match form {
        None => return Ok(None),
        Some((_, Form::Read(compression))) => *compression,
        Some((_, Form::Other(name, command))) => {
            let path = file.path().display();
            return Err(bad(format!("it is compressed by {name}; decompress it first: {command} {path}")));
        }
    };
    let consumed_bytes = Cell::new(0);
    let reader = Compressed { file, at_bytes: &consumed_bytes };
    let failed = |why| bad(format!("it is compressed by {}, and {why}", compression.name()));
    let mut decoder: Box<dyn Read + '_> = match compression {
        Compression::Zstd => {
            let decoder = zstd::stream::read::Decoder::new(reader);
            Box::new(decoder.map_err(|error| failed(format!("cannot be decompressed: {error}")))?)
        }
        Compression::Lz4 => Box::new(Lz4Frames(Some(FrameDecoder::new(reader)))),
        Compression::Gzip => Box::new(flate2::read::MultiGzDecoder::new(reader)),
    };
    let room = Room::new()?;
    let meter = progress.begin(file.length_bytes());
    let mut told_bytes = 0;
    let mut chunk = vec![0; CHUNK_BYTES];
    let (mut at_bytes, mut looked_at_bytes, mut end_bytes) = (0u64, 0, None);
    loop {
        let (length, end) = fill(&mut *decoder, &mut chunk);
        // A failure before the end of a header is reported as that failure.
        let has_header = length >= elf::FILE_HEADER_BYTES || !matches!(end, Some(Err(_)));
        if at_bytes == 0 && has_header {
            check_begins_like_a_core(&chunk[..length]).map_err(&failed)?;
        }
        room.write(&chunk[..length], at_bytes)?;
        at_bytes += length as u64;
        let by_bytes = consumed_bytes.get() - told_bytes;
        told_bytes += by_bytes;
        meter.advance(by_bytes).map_err(|_| SourceError::Interrupted)?;
        match end {
            Some(Ok(())) => break,
            Some(Err(error)) if error.kind() == io::ErrorKind::UnexpectedEof => {
                if cut_short == CutShort::Take {
                    break;
                }
                return Err(failed(format!(
                    "is cut short: its {} bytes end amid the {at_bytes} or more that they decompress to; was it copied \
                     whole, was the disk full? What it has can be captured all the same (--partial)",
                    file.length_bytes()
                )));
            }
            Some(Err(error)) => return Err(failed(format!("is damaged after {at_bytes} bytes: {error}"))),
            None => {}
        }
        if end_bytes.is_none() {
            end_bytes = segments::end_by_headers(&room.as_core(file, at_bytes)?);
        }
        if end_bytes.is_some_and(|end_bytes| end_bytes <= at_bytes) {
            // The data behind the core is not used, but its checksum may follow.
            match fill(&mut *decoder, &mut chunk).1 {
                Some(Err(error))
                    if cut_short == CutShort::Refuse || error.kind() != io::ErrorKind::UnexpectedEof =>
                {
                    return Err(failed(format!("is damaged after {at_bytes} bytes: {error}")));
                }
                _ => break,
            }
        }
        if at_bytes - looked_at_bytes >= LOOK_BYTES {
            looked_at_bytes = at_bytes;
            room.check().map_err(|why| failed(format!("{why} after {at_bytes} bytes of it")))?;
        }
    }
    drop(decoder);
    Ok(Some((room.as_core(file, at_bytes)?, compression)))
}

/// Fills the buffer as far as the decoder has bytes. Returns how many there are, and how the stream
/// ended if it did.
fn fill(decoder: &mut dyn Read, buffer: &mut [u8]) -> (usize, Option<io::Result<()>>) {
    let mut length = 0;
    while length < buffer.len() {
        match decoder.read(&mut buffer[length..]) {
            Ok(0) => return (length, Some(Ok(()))),
            Ok(read) => length += read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return (length, Some(Err(error))),
        }
    }
    (length, None)
}

fn check_begins_like_a_core(beginning: &[u8]) -> Result<(), String> {
    match beginning.first_chunk::<{ elf::FILE_HEADER_BYTES }>() {
        Some(header) => FileHeader::read(header)
            .map(drop)
            .map_err(|why| format!("what it decompresses to is none: {why}")),
        None => Err(format!("decompresses to {} bytes, which is no core", beginning.len())),
    }
}

/// Successive frames of lz4. Each has a separate decoder: that of lz4_flex 0.14 panics if the
/// blocks of a second frame are larger.
struct Lz4Frames<'a>(Option<FrameDecoder<Compressed<'a>>>);

impl Read for Lz4Frames<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            let Some(decoder) = &mut self.0 else { return Ok(0) };
            match decoder.read(buffer) {
                Ok(0) if !buffer.is_empty() => {
                    let rest = self.0.take().map(FrameDecoder::into_inner);
                    // Each frame has at least some bytes, so this terminates.
                    let rest = rest.filter(|rest| rest.at_bytes.get() < rest.file.length_bytes());
                    self.0 = rest.map(FrameDecoder::new);
                }
                answer => return answer,
            }
        }
    }
}

/// The compressed file, from its start.
struct Compressed<'a> {
    file: &'a RegularFile,
    at_bytes: &'a Cell<u64>,
}

impl Read for Compressed<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let left_bytes = self.file.length_bytes().saturating_sub(self.at_bytes.get());
        let length = usize::try_from(left_bytes).unwrap_or(usize::MAX).min(buffer.len());
        self.file.read(self.at_bytes.get(), &mut buffer[..length]).map_err(io::Error::other)?;
        self.at_bytes.set(self.at_bytes.get() + length as u64);
        Ok(length)
    }
}

/// A file without a name.
struct Room {
    file: File,
    directory: PathBuf,
}

impl Room {
    fn new() -> Result<Room, SourceError> {
        let set = std::env::var_os("TMPDIR").map(PathBuf::from).filter(|path| path.is_absolute());
        // A disk rather than memory, because cores are large.
        let var_tmp = Path::new("/var/tmp");
        let directory =
            set.unwrap_or_else(|| if var_tmp.is_dir() { var_tmp.to_owned() } else { std::env::temp_dir() });
        let file = unnamed(&directory).map_err(|source| SourceError::File {
            path: directory.clone(),
            action: "make a file to decompress to (set TMPDIR) beside",
            source,
        })?;
        Ok(Room { file, directory })
    }

    fn failed(&self) -> impl FnOnce(io::Error) -> SourceError {
        let path = self.directory.clone();
        move |source| SourceError::File {
            path,
            action: "decompress, in the directory (set TMPDIR for another),",
            source,
        }
    }

    /// Writes the pages that are not zeros.
    fn write(&self, bytes: &[u8], at_bytes: u64) -> Result<(), SourceError> {
        let is_zero = |page: &[u8]| page.iter().all(|byte| *byte == 0);
        let mut at = 0;
        let pages: Vec<&[u8]> = bytes.chunks(PAGE_BYTES).collect();
        for run in pages.chunk_by(|a, b| is_zero(a) == is_zero(b)) {
            let length: usize = run.iter().map(|page| page.len()).sum();
            if !is_zero(run[0]) {
                self.file
                    .write_all_at(&bytes[at..at + length], at_bytes + at as u64)
                    .map_err(self.failed())?;
            }
            at += length;
        }
        self.file.set_len(at_bytes + bytes.len() as u64).map_err(self.failed())
    }

    /// The reason why no more must be written, if there is one.
    fn check(&self) -> Result<(), String> {
        let Ok(system) = rustix::fs::fstatvfs(&self.file) else { return Ok(()) };
        match system.f_bavail < system.f_blocks / LEFT_FREE {
            true => Err(format!(
                "there is no room for the decompressed core in {}; set TMPDIR to a directory with more space",
                self.directory.display()
            )),
            false => Ok(()),
        }
    }

    /// The decompressed file under the name of the compressed one.
    fn as_core(&self, core: &RegularFile, length_bytes: u64) -> Result<RegularFile, SourceError> {
        let file = self.file.try_clone().map_err(self.failed())?;
        Ok(core.with_content(file, length_bytes))
    }
}

fn unnamed(directory: &Path) -> io::Result<File> {
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    match rustix::fs::open(directory, flags, Mode::RUSR | Mode::WUSR) {
        Ok(file) => Ok(file.into()),
        Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::ISDIR | rustix::io::Errno::INVAL) => {
            let path = directory.join(format!(".stillframe.{}.decompressed", std::process::id()));
            let file = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(&path)?;
            std::fs::remove_file(&path)?;
            Ok(file)
        }
        Err(error) => Err(error.into()),
    }
}
