//! What can go wrong in a store.

use std::io;
use std::path::PathBuf;

use super::packs::location::Position;
use super::packs::object::{Header, ObjectKind};
use crate::hash::Hash;
use crate::progress::Interrupted;
use crate::record::{RecordError, SnapshotId};
use crate::sys::fork::ProcessId;
use crate::text::shorten;

/// A store that cannot be opened, read or written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// The operating system refused something.
    #[error("cannot {action} {}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// With what file.
        path: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },
    /// The disk is full. What was stored before is intact; free space and try again.
    #[error(
        "no space is left to write {}; every earlier snapshot is intact: {}",
        path.display(),
        what_helps(*missing_bytes)
    )]
    DiskFull {
        /// The file that could not grow.
        path: PathBuf,
        /// How much must be free besides, where gc itself lacks it.
        missing_bytes: Option<u64>,
        /// What the operating system said.
        source: io::Error,
    },
    /// What is forgotten cannot be erased now. Nothing was changed.
    #[error("nothing was erased: {why}")]
    CannotErase {
        /// Why not, and what to do.
        why: String,
    },
    /// Of what is forgotten something may be left.
    #[error(
        "{} may still have bytes of forgotten snapshots: {why}; all other packs are rewritten",
        path.display()
    )]
    NotErased {
        /// The pack.
        path: PathBuf,
        /// Why it was left.
        why: &'static str,
    },
    /// Nothing can be written where the store is: its file system is read-only, or modes or flags forbid it.
    #[error(
        "the store {} is read-only (its file system, its modes, or an immutable flag): it can be read, but not \
         changed; make it writable, or work on a copy of it",
        path.display()
    )]
    ReadOnly {
        /// Where the store is.
        path: PathBuf,
    },
    /// There is no store here.
    #[error("{} is not a stillframe store: {why}", path.display())]
    NotAStore {
        /// Where a store was expected.
        path: PathBuf,
        /// What was found instead.
        why: String,
    },
    /// There is a store here already.
    #[error("{} is a store already; open it, or choose another directory", path.display())]
    AlreadyAStore {
        /// Where it is.
        path: PathBuf,
    },
    /// The store was written by a newer program.
    #[error(
        "the store {} has format {found}, this program knows formats up to {supported}; \
         use a newer stillframe",
        path.display()
    )]
    NewerFormat {
        /// Where the store is.
        path: PathBuf,
        /// Its format.
        found: u32,
        /// The newest format known.
        supported: u32,
    },
    /// The store was written by an older program.
    #[error(
        "the store {} has format {found}, this program works with format {supported}; \
         `stillframe migrate` upgrades it",
        path.display()
    )]
    OlderFormat {
        /// Where the store is.
        path: PathBuf,
        /// Its format.
        found: u32,
        /// The format needed.
        supported: u32,
    },
    /// The FORMAT file does not say what it should.
    #[error(
        "the file {} is damaged: {detail}; `stillframe repair` rewrites it from the packs",
        path.display()
    )]
    FormatFile {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        detail: String,
    },
    /// The FORMAT file does not say what it should, nor do the packs.
    #[error(
        "the file {} is damaged: {detail}; it cannot be rebuilt from the packs: {why}; replace it by a copy, \
         for example from a backup",
        path.display()
    )]
    FormatLost {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        detail: String,
        /// Why the packs do not tell.
        why: String,
    },
    /// It was cancelled by its [`Progress`](crate::Progress).
    #[error("interrupted before it was complete; the store is intact")]
    Interrupted,
    /// Another process owns the store.
    #[error(
        "the store {} is owned by {}; wait until it closes the store, or use the store in that process",
        path.display(),
        owner.map_or_else(|| "another process".to_owned(), |pid| format!("process {pid}"))
    )]
    Owned {
        /// Where the store is.
        path: PathBuf,
        /// The owner's pid, if it could be read.
        owner: Option<u32>,
    },
    /// The process that uses the store was forked from the one that opened it.
    #[error(
        "the store {} was opened by process {opened_by}; this is process {used_by}, a fork of it; use the \
         store in the process that opened it",
        path.display()
    )]
    OtherPid {
        /// Where the store is.
        path: PathBuf,
        /// The process that opened it.
        opened_by: u32,
        /// The process that would use it.
        used_by: u32,
    },
    /// The process that would open a store was forked from one that has had a store open.
    #[error(
        "cannot open the store {} in process {used_by}: it is a fork of process {opened_by}, which had a store \
         open, and the threads of a store do not survive a fork; fork before the first store is opened, or \
         start a new program (exec)",
        path.display()
    )]
    Forked {
        /// The store that was to be opened.
        path: PathBuf,
        /// The process that had a store open.
        opened_by: u32,
        /// The process that would open one.
        used_by: u32,
    },
    /// The directory of the open store is not where it was.
    #[error(
        "the store that was opened at {} was moved or removed while it was open; nothing at this path was \
         changed; move the store back, or open it at its new path",
        path.display()
    )]
    Moved {
        /// Where it was opened.
        path: PathBuf,
    },
    /// The LOCK of the open store is not the one that it holds.
    #[error(
        "{} was removed or replaced while the store was open, so another program may have opened the store; \
         nothing more is written; close the store in all programs and open it again",
        path.display()
    )]
    LockReplaced {
        /// The file.
        path: PathBuf,
    },
    /// The file system has no locks, without which two programs could change a store at once.
    #[error(
        "cannot lock {}: without file locks (flock) two programs could change the store at once; keep the \
         store on a file system that supports them",
        path.display()
    )]
    CannotLock {
        /// The file that was to be locked.
        path: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },
    /// The directory belongs to another user, who could use what root does in it.
    #[error(
        "the directory {} belongs to the user with id {owner_uid}, who could make root change other files \
         through it; use it as that user, change its owner to root, or accept the risk with --trust-owner \
         (StoreOptions::trust_owner)",
        path.display()
    )]
    OwnedByOther {
        /// The directory.
        path: PathBuf,
        /// Whose it is.
        owner_uid: u32,
    },
    /// There is something in the store's directory that no stillframe has put there.
    #[error("{} is in the way: {why}; check what it is, and move it away", path.display())]
    InTheWay {
        /// What is there.
        path: PathBuf,
        /// Why it cannot be used.
        why: String,
    },
    /// A stored object cannot be read as it was written.
    #[error("the {kind} {hash} in pack {pack} at byte {offset_bytes} is damaged: {detail}")]
    Damaged {
        /// What kind of object it is.
        kind: ObjectKind,
        /// Its address.
        hash: Hash,
        /// The pack it is in.
        pack: u32,
        /// Where in the pack it begins.
        offset_bytes: u64,
        /// What is wrong with it.
        detail: String,
    },
    /// A referenced object is in no pack.
    #[error("the {kind} {hash} is missing from the store; `stillframe verify` lists what needs it")]
    Missing {
        /// What kind of object it is.
        kind: ObjectKind,
        /// Its address.
        hash: Hash,
    },
    /// An object is stored as a difference from another one, which cannot be read.
    #[error("the {kind} {hash} cannot be read: it is stored as a delta of another object")]
    Base {
        /// What kind of object it is.
        kind: ObjectKind,
        /// Its address.
        hash: Hash,
        /// What is wrong with the other.
        source: Box<StoreError>,
    },
    /// A file in the place of a pack cannot be read as one, and what it says is needed is unknown.
    #[error("the pack {} is not usable: {why}; `stillframe repair` recovers its contents", path.display())]
    UnusablePack {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// An object is intact but says something impossible.
    #[error("the {kind} {hash} cannot be used: {detail}")]
    Malformed {
        /// What kind of object it is.
        kind: ObjectKind,
        /// Its address.
        hash: Hash,
        /// What is wrong with it.
        detail: String,
    },
    /// A value cannot be encoded or decoded.
    #[error("a {kind} is not in order")]
    Record {
        /// What kind of object it is.
        kind: ObjectKind,
        /// What is wrong with it.
        source: RecordError,
    },
    /// An object is too large for the format.
    #[error(
        "a {kind} of {found_bytes} bytes is too large, at most {} can be stored",
        ObjectKind::MAX_PLAIN_BYTES
    )]
    TooLarge {
        /// What kind of object it is.
        kind: ObjectKind,
        /// How large it is.
        found_bytes: u64,
    },
    /// An address space in more pieces than a snapshot can have.
    #[error("{found} mappings are too many for a snapshot, which has {most} at most")]
    TooManyMappings {
        /// How many there are.
        found: usize,
        /// How many there may be.
        most: usize,
    },
    /// A snapshot has more than the store keeps of one beside its memory.
    #[error(
        "the snapshot cannot be recorded; give it fewer or shorter attachments, a shorter trigger or labels"
    )]
    Unrecordable {
        /// What is too much.
        source: RecordError,
    },
    /// The index database failed.
    #[error("the index cannot {action}: {detail}; `stillframe repair` rebuilds it from the packs")]
    Index {
        /// What was tried.
        action: &'static str,
        /// What the database said.
        detail: String,
    },
    /// Writing failed for somebody else meanwhile, and what this capture refers to may be lost.
    #[error("another write to the store failed during this capture; nothing was recorded, capture again")]
    WriteFailedMeanwhile,
    /// No snapshot has this id or matches this name.
    #[error("no snapshot is {text}; `stillframe list` lists the snapshots")]
    NoSuchSnapshot {
        /// What was looked for.
        text: String,
    },
    /// No snapshot is of a process of this name.
    #[error("there are no snapshots of a process {process:?}; `stillframe processes` lists the processes")]
    NoSuchProcess {
        /// The name given.
        process: String,
    },
    /// Several snapshots have ids that begin like this.
    #[error("{prefix} is the prefix of {} snapshot ids, give more digits: \
         {}", candidates.len(), shown(candidates))]
    AmbiguousPrefix {
        /// The prefix given.
        prefix: String,
        /// The ids that begin with it.
        candidates: Vec<SnapshotId>,
    },
    /// Not an id, nor anything else that names a snapshot.
    #[error("{text:?} does not name a snapshot: {why}")]
    BadSnapshotName {
        /// The text given.
        text: String,
        /// What is wrong with it.
        why: &'static str,
    },
    /// A process name that cannot be used.
    #[error("{shown:?} cannot name a process: {why}")]
    BadProcessName {
        /// The name given, shortened.
        shown: String,
        /// What is wrong with it.
        why: &'static str,
    },
    /// Two attachments of one name.
    #[error("two attachments are named {name:?}; give each a different name")]
    AttachmentTwice {
        /// The name.
        name: String,
    },
    /// An attachment whose name has a meaning of its own.
    #[error(
        "no attachment can be named {name:?}: names that begin with \"moment:\" are reserved for the order of \
         the snapshots"
    )]
    AttachmentReserved {
        /// The name, shortened.
        name: String,
    },
    /// A label that cannot be used.
    #[error("{shown:?} cannot be a label: {why}")]
    BadLabel {
        /// The label given, shortened.
        shown: String,
        /// What is wrong with it.
        why: &'static str,
    },
}

fn what_helps(missing_bytes: Option<u64>) -> String {
    match missing_bytes {
        Some(bytes) => format!(
            "gc must copy what is still needed before it can free anything; free {bytes} bytes elsewhere on this \
             file system and run gc again"
        ),
        None => "free some space (`forget` and `gc` help) and try again".to_owned(),
    }
}

fn shown(candidates: &[SnapshotId]) -> String {
    let mut text: Vec<String> =
        candidates.iter().take(64).map(|id| id.to_string()[..16].to_owned()).collect();
    if candidates.len() > text.len() {
        text.push("…".to_owned());
    }
    text.join(", ")
}

impl From<Interrupted> for StoreError {
    fn from(_: Interrupted) -> StoreError {
        StoreError::Interrupted
    }
}

impl StoreError {
    /// An operating system's error about `path`, with a full disk told apart.
    pub(crate) fn io(action: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> StoreError {
        let path = path.into();
        move |source| match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                StoreError::DiskFull { path, missing_bytes: None, source }
            }
            _ => StoreError::Io { action, path, source },
        }
    }

    /// That this process was forked from the one that opened the store at `path`.
    pub(crate) fn of_other_process(path: impl Into<PathBuf>, opened_by: ProcessId) -> StoreError {
        let (opened_by, used_by) = (opened_by.pid(), ProcessId::this().pid());
        StoreError::OtherPid { path: path.into(), opened_by, used_by }
    }

    /// This error about the base of the object with this header.
    pub(crate) fn of_base(self, header: &Header) -> StoreError {
        StoreError::Base { kind: header.kind, hash: header.hash, source: Box::new(self) }
    }

    /// The damaged object that is behind this error, and where it is.
    pub(crate) fn culprit(&self) -> Option<(ObjectKind, Hash, Position)> {
        match self {
            StoreError::Base { source, .. } => source.culprit(),
            StoreError::Damaged { kind, hash, pack, offset_bytes, .. } => {
                Some((*kind, *hash, Position { pack: *pack, offset_bytes: *offset_bytes }))
            }
            _ => None,
        }
    }

    /// The error and what is behind it, in one line.
    pub(crate) fn whole_story(&self) -> String {
        match self {
            StoreError::Base { source, .. } => format!("{self}: {}", source.whole_story()),
            _ => self.to_string(),
        }
    }

    /// No snapshot is of the process of this name.
    pub(crate) fn no_such_process(name: &str) -> StoreError {
        StoreError::NoSuchProcess { process: shorten(name) }
    }

    /// Whether this says that stored bytes are not what was written.
    pub fn is_damage(&self) -> bool {
        if let StoreError::Base { source, .. } = self {
            return source.is_damage();
        }
        matches!(
            self,
            StoreError::Damaged { .. }
                | StoreError::Missing { .. }
                | StoreError::UnusablePack { .. }
                | StoreError::Malformed { .. }
                | StoreError::FormatFile { .. }
                | StoreError::FormatLost { .. }
                | StoreError::Record { .. }
        )
    }
}
