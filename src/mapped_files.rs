//! The attachment `mapped-files`: which file each shared mapping was of.
//!
//! Names do not tell: two memory files may have the same one. It is one version byte and then
//! bincode (`config::standard()`), as in `threads.rs`:
//!
//! ```text
//! 1 | count | start | end | device | inode | …
//! ```

use serde::{Deserialize, Serialize};

use crate::record::{self, RecordError};

/// The files of the shared mappings of a process, in the order of their addresses.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct MappedFiles(pub(crate) Vec<FileAt>);

/// The file of one mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct FileAt {
    pub(crate) start: u64,
    pub(crate) end: u64,
    /// As `/proc/PID/maps` has it: major number, and 20 bits of the minor one.
    pub(crate) device: u64,
    pub(crate) inode: u64,
}

impl MappedFiles {
    /// The name of the attachment.
    pub(crate) const ATTACHMENT: &'static str = "mapped-files";

    /// Reads the attachment of that name.
    pub(crate) fn from_attachment(bytes: &[u8]) -> Result<Self, RecordError> {
        record::decode(bytes)
    }

    /// The attachment's bytes.
    pub(crate) fn to_attachment(&self) -> Result<Vec<u8>, RecordError> {
        record::encode(self)
    }

    /// Those that share addresses with `start..end`.
    pub(crate) fn overlapping(&self, start: u64, end: u64) -> &[FileAt] {
        let first = self.0.partition_point(|it| it.end <= start);
        let count = self.0[first..].partition_point(|it| it.start < end);
        &self.0[first..first + count]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bytes_are_as_documented_and_come_back() {
        let at = |start| FileAt { start, end: start + 2, device: 1, inode: 300 };
        let files = MappedFiles(vec![at(4), at(8)]);
        let bytes = files.to_attachment().unwrap();
        assert_eq!(bytes, [1, 2, 4, 6, 1, 251, 44, 1, 8, 10, 1, 251, 44, 1]);
        assert_eq!(MappedFiles::from_attachment(&bytes).unwrap(), files);
        assert!(MappedFiles::from_attachment(&bytes[..5]).is_err());
        assert_eq!(files.overlapping(5, 8), [at(4)]);
        assert_eq!(files.overlapping(6, 8), []);
        assert_eq!(files.overlapping(0, 9).len(), 2);
    }
}
