//! Capture: a source becomes a snapshot.
//!
//! ```text
//! open the source ─> pieces of tables ─┬─> hash ─> equal to the parent's? ─> pin, look up ─┐
//!   (stands still)     up to 1 MiB     ├─> …  one worker a core                            ├─> append
//!                                      └─> hash ─> …               encode what is new  <───┘
//! all tables done ─> root, layout, attachments ─> record ─> durable ─> the id
//! ```
//!
//! A source that stands still is copied first and let go, and hashed and encoded after that; only
//! if its memory is more than the staging buffer do the workers begin while it still stands.

use std::sync::PoisonError;
use std::time::{Duration, Instant};

use jiff::Timestamp;

use crate::codec::Codec;
use crate::error::Error;
use crate::hash::Hash;
use crate::ingest::{Ingest, Staging};
use crate::progress::Progress;
use crate::put::{Put, StoreAs};
use crate::record::{AttachmentRef, Record, SnapshotId, Trigger};
use crate::reference::Reference;
use crate::source::{Attachment, Source};
use crate::store::catalog::Labels;
use crate::store::error::StoreError;
use crate::store::object::Kind;
use crate::store::read::{Check, Reader};
use crate::store::{Store, check_length, encode, later_than};
use crate::table;
use crate::units::AddressRange;

/// How to take a snapshot. The default is what one mostly wants.
#[derive(Clone, Debug)]
pub struct CaptureOptions {
    /// Why it is taken.
    pub trigger: Trigger,
    /// Labels to begin with; they can be changed later.
    pub labels: Labels,
    /// Address ranges to leave out (scratch buffers, secrets): they are restored as zeros.
    pub exclude: Vec<AddressRange>,
    /// For the first snapshot of a process: the process whose newest snapshot is most like it, so that
    /// what both have is compared and what differs a little is stored as a difference. By itself it
    /// is the newest snapshot of the same executable or of a file of the same name.
    pub like: Option<String>,
    /// How to encode what is new; the store's codec if `None`.
    pub codec: Option<Codec>,
    /// Whether what is new may be stored as the difference from what was in its place before, where
    /// that is short. Reading it back needs both.
    pub deltas: bool,
    /// Further bytes to keep beside the memory, by name.
    pub attachments: Vec<Attachment>,
    /// How much memory of a source that stands still is copied before the work on it begins. If
    /// this is too little for all of it, the source stands still for longer.
    pub staging_bytes: usize,
    /// Watches the capture.
    pub progress: Progress,
}

impl Default for CaptureOptions {
    fn default() -> Self {
        CaptureOptions {
            trigger: Trigger::default(),
            labels: Labels::new(),
            exclude: Vec::new(),
            like: None,
            codec: None,
            deltas: true,
            attachments: Vec::new(),
            staging_bytes: 160 << 20,
            progress: Progress::default(),
        }
    }
}

/// What a capture did.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Capture {
    /// The id of the snapshot.
    pub id: SnapshotId,
    /// Its process.
    pub process: String,
    /// The snapshot it follows.
    pub parent: Option<SnapshotId>,
    /// When it was taken.
    pub time: Timestamp,
    /// The bytes of all captured mappings.
    pub memory_bytes: u64,
    /// How many of them lie in regions of zeros.
    pub zero_bytes: u64,
    /// Regions that differ from the parent's; from zeros, where there is no parent.
    pub changed_regions: u64,
    /// Changed regions that were stored whole.
    pub new_regions: u64,
    /// Changed regions that were stored as a difference from another.
    pub delta_regions: u64,
    /// Changed regions that the store had already.
    pub shared_regions: u64,
    /// What the packs grew by.
    pub added_bytes: u64,
    /// How long it took.
    pub elapsed: Duration,
    /// How long the source stood still; zero unless it is a live process.
    pub paused: Duration,
}

/// A named line of snapshots in a store.
#[derive(Clone, Debug)]
pub struct Process<'a> {
    store: &'a Store,
    name: String,
}

/// Process names are at most this long.
const MAX_NAME_BYTES: usize = 255;

impl Store {
    /// The process of this name, which need not have any snapshot yet.
    ///
    /// A name has 1 to 255 bytes, no slashes and no control characters; one that breaks this is
    /// refused by [`Process::capture`].
    pub fn process(&self, name: impl Into<String>) -> Process<'_> {
        Process { store: self, name: name.into() }
    }
}

impl Process<'_> {
    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The ids of its snapshots, oldest first.
    pub fn snapshots(&self) -> Vec<SnapshotId> {
        self.store.shared().catalog().of_process(&self.name).collect()
    }

    /// Its newest snapshot.
    pub fn latest(&self) -> Option<SnapshotId> {
        self.store.shared().catalog().of_process(&self.name).next_back()
    }

    /// Takes one snapshot. When this returns it is durable.
    ///
    /// Its parent is the newest snapshot of the process. Two captures of the same process queue;
    /// captures of different processes run at the same time.
    ///
    /// Cost: every region that may hold anything is hashed (4.5 GB/s a core); what the store lacks
    /// is compressed (1.2 GB/s a core) and appended. It needs at most 256 MiB beside the source.
    ///
    /// # Errors
    ///
    /// [`Error::Source`] when the source cannot be used, [`Error::Store`] when the store cannot be
    /// written, [`Error::Interrupted`]. Nothing is recorded then.
    pub fn capture<S: Source + ?Sized>(
        &self,
        source: &S,
        options: &CaptureOptions,
    ) -> Result<Capture, Error> {
        let started = Instant::now();
        check_name(&self.name)?;
        check_labels(&options.labels)?;
        for attachment in &options.attachments {
            check_length(Kind::Attachment, attachment.bytes.len())?;
        }
        let shared = &**self.store.shared();
        let lane = shared.lane(&self.name);
        let _lane = lane.lock().unwrap_or_else(PoisonError::into_inner);
        let failures_before = shared.log.failures();
        let guard = shared.gate.begin_capture();
        let parent = Reference::newest_of(shared, &self.name);
        let like = match (&parent, &options.like) {
            (None, Some(name)) => Some(Reference::newest_of(shared, name).ok_or_else(|| {
                StoreError::NoSuchSnapshot { text: format!("of the process {:?}", shorten(name)) }
            })?),
            _ => None,
        };
        let reference = parent.as_ref().or(like.as_ref());

        let mut staging = Staging::new(options.staging_bytes, reference.map_or(0, Reference::copied_bytes))?;
        let frozen = source.open()?;
        let like = match reference {
            None => Reference::newest_like(shared, &frozen.origin()),
            Some(_) => like,
        };
        let reference = parent.as_ref().or(like.as_ref());
        let time = later_than(parent.as_ref().map(|parent| parent.record.time));
        let mut space = frozen.address_space().clone();
        space.exclude(&options.exclude);
        let tables = reference.map(|reference| reference.tables_for(&space)).unwrap_or_default();
        let codec = options.codec.unwrap_or(shared.format.codec);
        let put = Put { shared, guard: &guard, store_as: StoreAs { codec, deltas: options.deltas } };
        let ingest = Ingest::new(put, &space, &*frozen, &tables, parent.is_some(), &options.progress)?;
        let done = ingest.run(&*frozen, &mut staging)?;
        let mut attachments = frozen.attachments();
        let origin = frozen.origin();
        let paused = frozen.release();
        drop(frozen);
        space.set_unreadable(done.unreadable);

        let mut added_bytes = done.added_bytes;
        let mut reader = Reader::new(shared, Check::Full);
        let mut put = |kind, bytes: &[u8], like| -> Result<Hash, Error> {
            let hash = Hash::of(bytes);
            added_bytes += put.object(&mut reader, kind, hash, bytes, like)?;
            Ok(hash)
        };
        let like = reference.and_then(Reference::layout);
        let layout = put(Kind::Layout, &encode(Kind::Layout, &space)?, like)?;
        let root = match done.tables.iter().all(Hash::is_zero) {
            true => Hash::ZERO,
            false => put(Kind::Root, &table::encode(&done.tables), reference.and_then(Reference::root))?,
        };
        attachments.extend(options.attachments.iter().cloned());
        check_attachment_names(&attachments)?;
        let attachments = attachments
            .into_iter()
            .map(|Attachment { name, bytes }| {
                check_length(Kind::Attachment, bytes.len())?;
                let like = reference.and_then(|reference| reference.attachment(&name));
                let hash = if bytes.is_empty() { Hash::ZERO } else { put(Kind::Attachment, &bytes, like)? };
                Ok(AttachmentRef { name, hash, length_bytes: bytes.len() as u64 })
            })
            .collect::<Result<Vec<_>, Error>>()?;
        let record = Record {
            process: self.name.clone(),
            parent: parent.as_ref().map(|parent| parent.id),
            time,
            trigger: options.trigger.clone(),
            origin,
            region_size: shared.format.region_size,
            memory_bytes: space.image_bytes(),
            zero_bytes: done.zero_bytes,
            regions: space.regions(shared.format.region_size),
            attachments,
            layout,
            root,
        };
        let memory_bytes = record.memory_bytes;
        let (id, bytes) = shared.commit_snapshot(record, options.labels.clone(), failures_before)?;
        Ok(Capture {
            id,
            process: self.name.clone(),
            parent: parent.as_ref().map(|parent| parent.id),
            time,
            memory_bytes,
            zero_bytes: done.zero_bytes,
            changed_regions: done.changed_regions,
            new_regions: done.new_regions,
            delta_regions: done.delta_regions,
            shared_regions: done.shared_regions,
            added_bytes: added_bytes + bytes,
            elapsed: started.elapsed(),
            paused,
        })
    }
}

fn shorten(text: &str) -> String {
    match text.char_indices().nth(40) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}

/// An error unless a process can have this name.
pub(crate) fn check_name(name: &str) -> Result<(), StoreError> {
    let why = if name.is_empty() {
        "it is empty"
    } else if name.len() > MAX_NAME_BYTES {
        "it is longer than 255 bytes"
    } else if name.contains(['/', '\\']) {
        "it has a slash in it"
    } else if name.chars().any(char::is_control) {
        "it has a line break or another control character in it"
    } else if name.trim() != name {
        "it begins or ends with white space"
    } else {
        return Ok(());
    };
    Err(StoreError::BadProcessName { shown: shorten(name), why })
}

/// An error unless a snapshot can have these labels.
pub(crate) fn check_labels(labels: &Labels) -> Result<(), StoreError> {
    for (key, value) in labels {
        let why = if key.is_empty() {
            "its key is empty"
        } else if key.contains('=') {
            "its key has a = in it"
        } else if key.len() > MAX_NAME_BYTES || value.len() > 4096 {
            "its key is longer than 255 bytes or its value than 4096"
        } else if key.chars().chain(value.chars()).any(char::is_control) {
            "it has a line break or another control character in it"
        } else {
            continue;
        };
        return Err(StoreError::BadLabel { shown: shorten(&format!("{key}={value}")), why });
    }
    Ok(())
}

/// An error if two attachments have the same name.
fn check_attachment_names(attachments: &[Attachment]) -> Result<(), StoreError> {
    for (at, attachment) in attachments.iter().enumerate() {
        if attachments[..at].iter().any(|other| other.name == attachment.name) {
            return Err(StoreError::AttachmentTwice { name: shorten(&attachment.name) });
        }
    }
    Ok(())
}
