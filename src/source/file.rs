//! A raw memory file as a source: what a hypervisor or a restore wrote, of any length.

use std::path::{Path, PathBuf};

use super::regular_file::RegularFile;
use super::{Attachment, Frozen, OneMemory, Source, SourceError, owner_attachment};
use crate::ranges::Ranges;
use crate::record::Origin;

/// A raw memory file: one mapping from address 0, of any length but 0.
///
/// Holes of a sparse file are not read. Nobody should write to the file while it is captured: one
/// that becomes shorter is an error ([`SourceError::CutShort`]), other changes go unnoticed.
///
/// ```
/// use stillframe::source::{FileSource, Source};
/// let path = std::env::temp_dir().join(format!("stillframe-doc-{}", std::process::id()));
/// std::fs::write(&path, [7; 10_000])?;
/// let source = FileSource::new(&path);
/// assert_eq!(source.open()?.address_space().image_bytes(), 10_000);
/// # std::fs::remove_file(&path)?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug)]
pub struct FileSource {
    path: PathBuf,
}

impl FileSource {
    /// The memory file at `path`. Nothing is opened yet.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        FileSource { path: path.into() }
    }

    /// The path it was made with.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Source for FileSource {
    fn open(&self) -> Result<Box<dyn Frozen + '_>, SourceError> {
        Ok(RegularFile::open(&self.path)?.frozen())
    }
}

impl OneMemory for RegularFile {
    fn length_bytes(&self) -> u64 {
        self.length_bytes()
    }

    fn copy_out(&self, offset_bytes: u64, buffer: &mut [u8]) -> Result<(), SourceError> {
        self.read(offset_bytes, buffer)
    }

    fn name(&self) -> String {
        self.path().file_name().unwrap_or_default().to_string_lossy().into_owned()
    }

    fn origin(&self) -> Origin {
        Origin::File { path: self.path().to_owned() }
    }

    fn attachments(&self) -> Vec<Attachment> {
        self.owner().map(|owner| owner_attachment((owner, owner))).into_iter().collect()
    }

    fn populated(&self) -> Result<Ranges, SourceError> {
        self.data(0..self.length_bytes())
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io;
    use std::os::unix::fs::FileExt;

    use rustix::fs::Mode;

    use super::*;
    use crate::source::Access;

    /// All of a file as a capture reads it: zeros but for what is populated.
    fn read(frozen: &dyn Frozen) -> Result<Vec<u8>, SourceError> {
        let Access::Shared(copy) = frozen.access() else { panic!("a file can be read by many threads") };
        let mut bytes = vec![0; usize::try_from(frozen.address_space().image_bytes()).unwrap()];
        let mut end_bytes = 0;
        for range in frozen.populated(0)? {
            assert!(end_bytes <= range.start && range.start < range.end, "sorted and apart");
            end_bytes = range.end;
            let place = usize::try_from(range.start).unwrap()..usize::try_from(range.end).unwrap();
            copy.copy_out(0, range.start, &mut bytes[place], &mut Vec::new())?;
        }
        Ok(bytes)
    }

    fn scattered(length_bytes: usize) -> Vec<u8> {
        (0..length_bytes).map(|at| u8::try_from((at * 31 + at / 251) % 256).unwrap()).collect()
    }

    #[test]
    fn a_file_of_any_length_is_read_whole() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("memory");
        for length_bytes in [1, 511, 4096, 65_537, 1_000_003] {
            std::fs::write(&path, scattered(length_bytes)).unwrap();
            let source = FileSource::new(&path);
            let frozen = source.open().unwrap();
            assert_eq!(read(&*frozen).unwrap(), scattered(length_bytes));
            assert_eq!(frozen.address_space().mappings()[0].name, "memory");
            assert_eq!(frozen.origin(), Origin::File { path: path.clone() });
        }
    }

    #[test]
    fn holes_are_not_read_and_the_bytes_are_the_same() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("sparse");
        let file = File::create(&path).unwrap();
        file.set_len(64 << 20).unwrap();
        file.write_all_at(&scattered(10_000), 5 << 20).unwrap();
        file.write_all_at(&scattered(3), (40 << 20) + 1).unwrap();
        let source = FileSource::new(&path);
        let frozen = source.open().unwrap();
        assert_eq!(read(&*frozen).unwrap(), std::fs::read(&path).unwrap());
        // Temporary directories of Linux know holes (ext4, xfs, btrfs, tmpfs, overlayfs).
        let data_bytes: u64 = frozen.populated(0).unwrap().iter().map(|range| range.end - range.start).sum();
        assert!(data_bytes < 1 << 20, "{data_bytes} bytes would be read");
    }

    #[test]
    fn a_file_that_becomes_shorter_is_an_error_wherever_it_is_noticed() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("memory");
        std::fs::write(&path, scattered(100_000)).unwrap();
        let source = FileSource::new(&path);
        let frozen = source.open().unwrap();
        let Access::Shared(copy) = frozen.access() else { panic!("a file can be read by many threads") };
        File::options().write(true).open(&path).unwrap().set_len(50_000).unwrap();

        let cut_short = |error: &SourceError| {
            matches!(error, SourceError::CutShort { expected_bytes: 100_000, found_bytes: 50_000, .. })
        };
        let error = copy.copy_out(0, 40_000, &mut [0; 20_000], &mut Vec::new()).unwrap_err();
        assert!(cut_short(&error), "{error:?}");
        let error = frozen.populated(0).unwrap_err();
        assert!(cut_short(&error), "{error:?}");
        copy.copy_out(0, 0, &mut [0; 50_000], &mut Vec::new()).unwrap();
    }

    #[test]
    fn what_is_not_a_memory_file_is_refused_with_its_reason() {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        File::create(at("empty")).unwrap();
        rustix::fs::mknodat(rustix::fs::CWD, at("pipe"), rustix::fs::FileType::Fifo, Mode::RUSR, 0).unwrap();
        let _socket = std::os::unix::net::UnixListener::bind(at("socket")).unwrap();
        for (path, expected) in [
            (at("empty"), "it is empty"),
            (at("pipe"), "it is a pipe"),
            (at("socket"), "it is a socket"),
            (at("."), "it is a directory"),
            ("/dev/null".into(), "it is a device"),
        ] {
            let source = FileSource::new(&path);
            match source.open().err() {
                Some(SourceError::NotAMemoryFile { why, .. }) if why.contains(expected) => {}
                other => panic!("{}: {other:?}", path.display()),
            }
        }
        let source = FileSource::new(at("missing"));
        let Some(SourceError::File { source, .. }) = source.open().err() else { panic!("it is missing") };
        assert_eq!(source.kind(), io::ErrorKind::NotFound);
    }
}
