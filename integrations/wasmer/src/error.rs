//! What can go wrong.

use std::io;
use std::path::PathBuf;

use stillframe::SnapshotId;

/// Why a journal cannot be written, read, imported or exported.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The store cannot be read or written, or does not have what was asked for.
    #[error(transparent)]
    Store(#[from] stillframe::Error),
    /// The snapshot was taken by something else than a journal.
    #[error(
        "the snapshot {id} has no journal beside its memory, so it was not taken through one; resume one that was"
    )]
    NotOfAJournal {
        /// The snapshot.
        id: SnapshotId,
    },
    /// What is kept beside the memory of a snapshot is no journal.
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
        /// Where it ends, as the journal has it.
        end: u64,
        /// What is wrong with it.
        why: String,
    },
    /// A mark without all that it takes to resume there.
    #[error("a snapshot mark came before {missing}; nothing could be resumed from it, so it is not kept")]
    Incomplete {
        /// What had not been written yet.
        missing: &'static str,
    },
    /// The runtime was to resume and began anew.
    #[error(
        "the runtime began anew instead of resuming the snapshot {resumed}: that is of the module {expected}, this is \
         {found}; give `WasiEnvBuilder::set_module_hash` the hash of the module's bytes in each life, and each process \
         a journal and a runtime of its own; `Resume::Nothing` begins anew on purpose"
    )]
    BeganAnew {
        /// The snapshot that was handed out.
        resumed: SnapshotId,
        /// The hash of its module.
        expected: String,
        /// The hash of the module that runs.
        found: String,
    },
    /// An entry that cannot be encoded.
    #[error("a journal entry cannot be encoded: {why}")]
    Encode {
        /// What the encoder said.
        why: String,
    },
    /// A journal file that cannot be opened, read or written.
    #[error("cannot {action} the journal file {}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What was tried.
        action: &'static str,
        /// What the operating system said.
        source: io::Error,
    },
    /// A journal file that is damaged or was cut.
    #[error(
        "the journal file {} can be read up to byte {at_bytes} only; {} of its snapshots are in the store",
        path.display(), snapshots.len()
    )]
    Damaged {
        /// The file.
        path: PathBuf,
        /// Where the first record begins that cannot be used.
        at_bytes: u64,
        /// The snapshots that were read before that; they are in the store.
        snapshots: Vec<SnapshotId>,
        /// What is wrong there.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

/// Bytes that are no journal.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Damage {
    /// It begins otherwise.
    #[error("a Wasmer journal begins with the bytes 310d6dd027362979, this does not")]
    NotAJournal,
    /// It ends in the middle of a record.
    #[error("it was cut: a record needs {expected_bytes} bytes, and {found_bytes} are left")]
    Cut {
        /// How long the record is.
        expected_bytes: u64,
        /// How much there is.
        found_bytes: u64,
    },
    /// A record whose writer was killed.
    #[error(
        "a record was begun and never finished: its writer was killed, and what follows was never read by anyone"
    )]
    Unfinished,
    /// A record of no known kind.
    #[error("a record is of kind {kind}, which this version of Wasmer's journal does not have")]
    Kind {
        /// The kind.
        kind: u16,
    },
    /// A record that does not say what its kind should say.
    #[error("a record of kind {kind} and {length_bytes} bytes makes no sense: {why}")]
    Record {
        /// The kind.
        kind: u16,
        /// How long it is.
        length_bytes: u64,
        /// What the decoder said.
        why: String,
    },
    /// The operating system failed.
    #[error("it cannot be read")]
    Read(#[from] io::Error),
}
