//! The errors of this crate.

use std::io;
use std::path::PathBuf;

use stillframe::SnapshotId;

/// Why a journal cannot be written, read, imported or exported.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The store cannot be read or written, or does not have the requested snapshot.
    #[error(transparent)]
    Store(#[from] stillframe::Error),
    /// The snapshot was not taken through a journal.
    #[error(
        "the snapshot {id} has no journal beside its memory, so it was not taken through one; resume one that was"
    )]
    NotOfAJournal {
        /// The snapshot.
        id: SnapshotId,
    },
    /// The snapshot's attachment is no journal.
    #[error("the journal beside the memory of the snapshot {id} cannot be read")]
    Beside {
        /// The snapshot.
        id: SnapshotId,
        /// What is wrong with it.
        source: Damage,
    },
    /// A memory extent that makes no sense.
    #[error("the memory extent {start:#x}..{end:#x} cannot be used: {why}")]
    Extent {
        /// Where it begins.
        start: u64,
        /// Its end, as given in the journal.
        end: u64,
        /// What is wrong with it.
        why: String,
    },
    /// A mark at which the process could not be resumed, because something is missing.
    #[error("a snapshot mark came before {missing}; nothing could be resumed from it, so it is not kept")]
    Incomplete {
        /// What had not been written yet.
        missing: &'static str,
    },
    /// The runtime should resume, but it started from the beginning.
    #[error(
        "the runtime began anew instead of resuming the snapshot {resumed}: that is of the module {expected}, this is \
         {found}; give `WasiEnvBuilder::set_module_hash` the hash of the module's bytes in each life, and each process \
         a journal and a runtime of its own; `Resume::Nothing` begins anew on purpose"
    )]
    BeganAnew {
        /// The snapshot to resume.
        resumed: SnapshotId,
        /// The hash of its module.
        expected: String,
        /// The hash of the running module.
        found: String,
    },
    /// An entry that cannot be encoded.
    #[error("a journal entry cannot be encoded: {why}")]
    Encode {
        /// The encoder's message.
        why: String,
    },
    /// A journal file that cannot be opened, read or written.
    #[error("cannot {action} the journal file {}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// The operation that failed.
        action: &'static str,
        /// The error of the operating system.
        source: io::Error,
    },
    /// A journal file that is damaged or was truncated.
    #[error(
        "the journal file {} can be read up to byte {at_bytes} only; {} of its snapshots are in the store",
        path.display(), snapshots.len()
    )]
    Damaged {
        /// The file.
        path: PathBuf,
        /// Where the first unusable record begins.
        at_bytes: u64,
        /// The snapshots that were read before it; they are in the store.
        snapshots: Vec<SnapshotId>,
        /// What is wrong there.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

/// Bytes that are no journal.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Damage {
    /// It does not begin with the journal's magic number.
    #[error("a Wasmer journal begins with the bytes 310d6dd027362979, this does not")]
    NotAJournal,
    /// It ends in the middle of a record.
    #[error("it was cut: a record needs {expected_bytes} bytes, and {found_bytes} are left")]
    Cut {
        /// The length of the record.
        expected_bytes: u64,
        /// How many bytes exist.
        found_bytes: u64,
    },
    /// A record whose writer was killed.
    #[error(
        "a record was begun and never finished: its writer was killed, and what follows was never read by anyone"
    )]
    Unfinished,
    /// A record of an unknown kind.
    #[error("a record is of kind {kind}, which this version of Wasmer's journal does not have")]
    Kind {
        /// The kind.
        kind: u16,
    },
    /// A record whose content does not fit its kind.
    #[error("a record of kind {kind} and {length_bytes} bytes makes no sense: {why}")]
    Record {
        /// The kind.
        kind: u16,
        /// Its length.
        length_bytes: u64,
        /// The decoder's message.
        why: String,
    },
    /// An error of the operating system.
    #[error("it cannot be read")]
    Read(#[from] io::Error),
}
