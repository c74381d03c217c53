//! The attachment `descriptors`: what each number of an open file stood for.
//!
//! It is one version byte and then bincode (`config::standard()`), as in `threads.rs`:
//!
//! ```text
//! 1 | count | number | length, target | flags | mount | inode | born_ns | is_file | position | …
//! ```

use serde::{Deserialize, Serialize};

use crate::record::{self, RecordError};

/// The open files of a process, by number.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Descriptors(pub(crate) Vec<Descriptor>);

/// What a number stands for.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Descriptor {
    pub(crate) number: u32,
    /// Where `/proc/PID/fd/N` leads: a path, `socket:[1234]`, `anon_inode:[eventpoll]` …
    pub(crate) target: Vec<u8>,
    /// As `open` takes them: access mode, `O_APPEND` …
    pub(crate) flags: u32,
    /// Which mount it was opened through.
    pub(crate) mount: u64,
    /// 0 where the kernel does not tell.
    pub(crate) inode: u64,
    /// When the file was made, in nanoseconds since 1970; 0 where the file system does not tell.
    pub(crate) born_ns: u64,
    /// Whether it is a regular file, of which alone the position is known.
    pub(crate) is_file: bool,
    pub(crate) position: u64,
}

impl Descriptors {
    /// The name of the attachment.
    pub(crate) const ATTACHMENT: &'static str = "descriptors";

    /// Reads the attachment of that name.
    pub(crate) fn from_attachment(bytes: &[u8]) -> Result<Self, RecordError> {
        record::decode(bytes)
    }

    /// The attachment's bytes.
    pub(crate) fn to_attachment(&self) -> Result<Vec<u8>, RecordError> {
        record::encode(self)
    }
}

impl Descriptor {
    /// Whether the program may write by this number.
    pub(crate) fn is_for_writing(&self) -> bool {
        const ACCESS_MODE: u32 = libc::O_ACCMODE.cast_unsigned();
        const READ_ONLY: u32 = libc::O_RDONLY.cast_unsigned();
        self.flags & ACCESS_MODE != READ_ONLY && self.flags & libc::O_PATH.cast_unsigned() == 0
    }

    /// Whether both stand for the same open thing, as far as the kernel tells. A file may have been
    /// renamed or removed since; another one may have got its number once it was gone, and is
    /// younger.
    pub(crate) fn is_same(&self, other: &Descriptor) -> bool {
        if !self.is_path() || !other.is_path() || self.inode == 0 || other.inode == 0 {
            return self.name() == other.name();
        }
        let is_same_file = (self.mount, self.inode) == (other.mount, other.inode);
        match (self.born_ns, other.born_ns) {
            (0, _) | (_, 0) => is_same_file && self.name() == other.name(),
            (one, other) => is_same_file && one == other,
        }
    }

    /// What it stands for, whether it has been removed or not.
    pub(crate) fn name(&self) -> &[u8] {
        self.target.strip_suffix(b" (deleted)").unwrap_or(&self.target)
    }

    /// Whether it is something with a place in a file system.
    pub(crate) fn is_path(&self) -> bool {
        self.target.starts_with(b"/")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(target: &str, inode: u64, born_ns: u64) -> Descriptor {
        let target = target.as_bytes().to_vec();
        Descriptor { number: 3, target, flags: 2, mount: 9, inode, born_ns, is_file: true, position: 300 }
    }

    #[test]
    fn the_bytes_are_as_documented_and_come_back() {
        let descriptors = Descriptors(vec![file("/a", 4, 5)]);
        let bytes = descriptors.to_attachment().unwrap();
        assert_eq!(bytes, [1, 1, 3, 2, b'/', b'a', 2, 9, 4, 5, 1, 251, 44, 1]);
        assert_eq!(Descriptors::from_attachment(&bytes).unwrap(), descriptors);
        assert!(Descriptors::from_attachment(&bytes[..5]).is_err());
    }

    #[test]
    fn a_renamed_file_is_the_same_and_a_younger_one_with_its_number_is_not() {
        let log = file("/log", 4, 5);
        assert!(log.is_same(&file("/log.1", 4, 5)) && log.is_same(&file("/log (deleted)", 4, 5)));
        assert!(!log.is_same(&file("/log", 4, 6)) && !log.is_same(&file("/log", 5, 5)));
        // Where it is not known when it was made the name counts.
        assert!(!log.is_same(&file("/log.1", 4, 0)) && log.is_same(&file("/log (deleted)", 4, 0)));
        let socket = |inode| Descriptor { inode, ..file(&format!("socket:[{inode}]"), inode, 0) };
        assert!(socket(1).is_same(&socket(1)) && !socket(1).is_same(&socket(2)) && !socket(1).is_same(&log));
        assert!(log.is_for_writing() && !Descriptor { flags: 0, ..log }.is_for_writing());
    }
}
