//! Memory that is not in a snapshot although its mapping is captured, and the reason.
//!
//! The layout of a snapshot lists these ranges as unreadable: they are restored as zeros, a core
//! file has no bytes for them, and a rollback does not change them. An attachment of the snapshot
//! holds the reasons.

use serde::{Deserialize, Serialize};

use crate::record::{RecordError, decode};
use crate::units::AddressRange;

/// A range of a captured mapping whose bytes are not in the snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeftOut {
    /// The addresses: whole pages.
    pub range: AddressRange,
    /// Why the bytes are not in the snapshot.
    pub why: WhyLeftOut,
}

/// Why memory is not in a snapshot. (It is stored as a number: new reasons come at the end.)
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[non_exhaustive]
pub enum WhyLeftOut {
    /// A userfaultfd will fill these pages at their first page fault: another program has the
    /// bytes.
    Userfault,
    /// The pages are not in the process's memory, and the file behind them cannot be read here, so
    /// that it is unknown whether the file has a hole there. Reading them through the process would
    /// fill the hole.
    FileClosed,
    /// The pages are not in the process's memory, and the file system behind them asks a server
    /// (FUSE, NFS), which may never answer.
    FileServer,
    /// The mapping is longer than its file: there is no memory, and an access raises a fatal
    /// signal.
    BehindFile,
    /// Guard pages (`MADV_GUARD_INSTALL`): there is no memory, and an access raises a fatal signal.
    Guard,
    /// Secret memory (`memfd_secret`), which the kernel does not let other processes read.
    Secret,
    /// The kernel refused to read them.
    Refused,
}

impl WhyLeftOut {
    /// Its name: `userfault`, `file-closed`, `file-server`, `behind-file`, `guard`, `secret`,
    /// `refused`.
    pub fn name(self) -> &'static str {
        match self {
            WhyLeftOut::Userfault => "userfault",
            WhyLeftOut::FileClosed => "file-closed",
            WhyLeftOut::FileServer => "file-server",
            WhyLeftOut::BehindFile => "behind-file",
            WhyLeftOut::Guard => "guard",
            WhyLeftOut::Secret => "secret",
            WhyLeftOut::Refused => "refused",
        }
    }

    /// Whether the process may have bytes there that the snapshot lacks. Guard pages and addresses
    /// behind a file's end are no memory.
    pub fn is_a_loss(self) -> bool {
        !matches!(self, WhyLeftOut::BehindFile | WhyLeftOut::Guard)
    }
}

impl std::fmt::Display for WhyLeftOut {
    /// The text after the number of bytes: "1 MiB …".
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            WhyLeftOut::Userfault => "that a userfaultfd still has to fill",
            WhyLeftOut::FileClosed => {
                "of files that cannot be read here (CAP_SYS_ADMIN or CAP_CHECKPOINT_RESTORE may help)"
            }
            WhyLeftOut::FileServer => "of files whose file system asks a server (FUSE, NFS)",
            WhyLeftOut::BehindFile => "behind the end of a file",
            WhyLeftOut::Guard => "of guard pages",
            WhyLeftOut::Secret => "of secret memory (memfd_secret)",
            WhyLeftOut::Refused => "that the kernel refused to read",
        })
    }
}

impl LeftOut {
    /// The name of the attachment with this list; every snapshot of a live process has one. A
    /// snapshot without it was taken by an older program, which captured no private memory without
    /// read permission.
    pub const ATTACHMENT: &'static str = "left-out";

    /// The list in an attachment.
    ///
    /// # Errors
    ///
    /// If the bytes are not such a list.
    pub fn from_attachment(bytes: &[u8]) -> Result<Vec<LeftOut>, RecordError> {
        decode(bytes)
    }

    /// The number of bytes for each reason, in the order of the reasons.
    pub fn sums(all: &[LeftOut]) -> Vec<(WhyLeftOut, u64)> {
        let mut sums = std::collections::BTreeMap::new();
        for left_out in all {
            *sums.entry(left_out.why).or_insert(0u64) += left_out.range.length_bytes();
        }
        sums.into_iter().collect()
    }
}

/// The sums of [`LeftOut::sums`] in a report: a list of objects with `why` and `bytes`.
pub(crate) fn serialize_sums<S: serde::Serializer>(all: &[LeftOut], to: S) -> Result<S::Ok, S::Error> {
    #[derive(Serialize)]
    struct Sum {
        why: &'static str,
        bytes: u64,
    }
    let sum = |(why, bytes): (WhyLeftOut, u64)| Sum { why: why.name(), bytes };
    to.collect_seq(LeftOut::sums(all).into_iter().map(sum))
}
