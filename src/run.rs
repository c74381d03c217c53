//! The attachment `run`: identifies the process among all that have had its pid.
//!
//! It is one version byte followed by bincode (`config::standard()`), as in `threads.rs`:
//!
//! ```text
//! 1 | length, boot_id | process_start | count | tid, start | tid, start | …
//! ```

use serde::{Deserialize, Serialize};

use crate::record::{self, RecordError};

/// The start times of a process and its threads, and the boot of the machine that they belong to.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Run {
    /// `/proc/sys/kernel/random/boot_id`; empty if it cannot be read.
    pub(crate) boot_id: String,
    /// Field 22 of `/proc/PID/stat`: in clock ticks, 100 a second, since the machine booted.
    pub(crate) process_start: u64,
    /// The same for every thread that had not ended, by thread id.
    pub(crate) thread_starts: Vec<(u32, u64)>,
}

impl Run {
    /// The name of the attachment.
    pub(crate) const ATTACHMENT: &'static str = "run";

    /// Reads the attachment of that name.
    pub(crate) fn from_attachment(bytes: &[u8]) -> Result<Self, RecordError> {
        record::decode(bytes)
    }

    /// The attachment's bytes.
    pub(crate) fn to_attachment(&self) -> Result<Vec<u8>, RecordError> {
        record::encode(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bytes_are_as_documented_and_come_back() {
        let run = Run { boot_id: "ab".to_owned(), process_start: 7, thread_starts: vec![(3, 9), (4, 300)] };
        let bytes = run.to_attachment().unwrap();
        assert_eq!(bytes, [1, 2, b'a', b'b', 7, 2, 3, 9, 4, 251, 44, 1]);
        assert_eq!(Run::from_attachment(&bytes).unwrap(), run);
        assert!(Run::from_attachment(&bytes[..5]).is_err());
    }
}
