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
//! if its memory is more than the staging buffer do the workers begin while it still stands. Where a
//! tracker knows what changed since the parent, only that is copied.

use std::ops::Range;
use std::panic::AssertUnwindSafe;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::Receiver;
use jiff::Timestamp;

use crate::address_space::AddressSpace;
use crate::codec::Codec;
use crate::error::Error;
use crate::hash::Hash;
use crate::ingest::{Ingest, Staged, Staging};
use crate::left_out::{LeftOut, WhyLeftOut};
use crate::progress::Progress;
use crate::put::{Put, StoreAs};
use crate::record::{AttachmentRef, MOMENT_PREFIX, Origin, Record, SnapshotId, Trigger};
use crate::reference::Reference;
use crate::source::{Attachment, Frozen, Memory, Source, SourceError};
use crate::store::catalog::Labels;
use crate::store::commit::{check_length, encode};
use crate::store::error::StoreError;
use crate::store::lane::LaneGuard;
use crate::store::packs::object::Kind;
use crate::store::read::{Check, Reader};
use crate::store::{Shared, Store};
use crate::sys::fork::ProcessId;
use crate::table;
use crate::text::is_control;
use crate::track::{Taken, Tracker, Tracking, Untracked, complement};
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
    /// The snapshot that the memory comes from; the newest one of the process if `None`. To be named after
    /// a [rollback](crate::RollBack), so that history branches where the memory did and only
    /// what changed since is looked at, and where the memory began as that of another process.
    pub parent: Option<SnapshotId>,
    /// For the first snapshot of a process: the process whose newest snapshot is most like it, so that
    /// what both have is compared and what differs a little is stored as a difference: then bytes of that process stay in
    /// the store as long as this one's snapshots, also when its own are forgotten ([`GcOptions::erase`](crate::GcOptions)
    /// parts them). If `None`, it is the newest snapshot of the same executable, or of a file of the same name, with the
    /// same owner.
    pub like: Option<String>,
    /// How to encode what is new; the store's codec if `None`.
    pub codec: Option<Codec>,
    /// Whether what is new may be stored as the difference from what was in its place before, where
    /// that is short. Reading it back needs both.
    pub deltas: bool,
    /// Further bytes to keep beside the memory, by name.
    pub attachments: Vec<Attachment>,
    /// How much memory of a source that stands still is copied before the work on it begins. If
    /// this is too little for all of it, the source stands still for longer, and
    /// [`Capture::staging_full`] says so. Only what is needed of it is touched.
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
            parent: None,
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
    /// When it was taken, by the clock.
    pub time: Timestamp,
    /// How much earlier that is than the time of the snapshot before it, if it is by a second or more: one of both times is
    /// wrong. The snapshots stand in the order in which they were taken all the same.
    pub clock_behind: Option<Duration>,
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
    /// How long the source stood still, or had to: for a live process from the first thread that
    /// stopped to the last that went on, for [`LiveMemory`](crate::LiveMemory) as long as it took to find
    /// and copy what changed. Zero for a file and for bytes that are borrowed.
    pub paused: Duration,
    /// Whether the source stood still for longer because the staging buffer was too small.
    pub staging_full: bool,
    /// How it was known what had changed.
    pub tracking: Tracking,
    /// What of its captured mappings the snapshot does not have, and why, in the order of the addresses. It is
    /// restored as zeros, and a rollback leaves it as it is.
    pub left_out: Vec<LeftOut>,
}

impl Capture {
    /// How many bytes of captured mappings are not in the snapshot.
    pub fn unreadable_bytes(&self) -> u64 {
        self.left_out.iter().map(|left_out| left_out.range.length_bytes()).sum()
    }
}

/// A capture whose source goes on already. It is finished in a thread of its own; dropping this does not
/// end it, and the snapshot appears all the same. Dropping the store waits for it.
#[must_use = "the snapshot is durable only when `wait` has returned"]
pub struct PendingCapture {
    /// `None` in a process that was forked from the one that has begun it.
    done: Option<Receiver<std::thread::Result<Result<Capture, Error>>>>,
    process: ProcessId,
    /// Where the store is.
    path: PathBuf,
}

impl PendingCapture {
    /// Waits until the snapshot is durable.
    ///
    /// # Errors
    ///
    /// As [`Process::capture`]. Nothing is recorded then, and what had changed is in the next one.
    pub fn wait(self) -> Result<Capture, Error> {
        if !self.process.is_this() {
            return Err(StoreError::of_other_process(&self.path, self.process).into());
        }
        match self.done.as_ref().map(Receiver::recv) {
            Some(Ok(Ok(result))) => result,
            Some(Ok(Err(panic))) => std::panic::resume_unwind(panic),
            // The thread answers before it ends, however it does.
            Some(Err(_)) | None => Err(Error::Interrupted),
        }
    }

    /// Whether [`wait`](Self::wait) would return at once.
    pub fn is_done(&self) -> bool {
        self.done.as_ref().is_none_or(|done| !done.is_empty())
    }
}

impl Drop for PendingCapture {
    fn drop(&mut self) {
        if !self.process.is_this() {
            // Whoever works on it is in the other process.
            std::mem::forget(self.done.take());
        }
    }
}

impl std::fmt::Debug for PendingCapture {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PendingCapture").field("is_done", &self.is_done()).finish()
    }
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
    /// A name has 1 to 255 bytes, no slashes and no [control characters](crate::is_control); one that breaks this is
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
        match self.store.shared().is_elsewhere() {
            true => Vec::new(),
            false => self.store.shared().catalog().of_process(&self.name).collect(),
        }
    }

    /// Its newest snapshot.
    pub fn latest(&self) -> Option<SnapshotId> {
        match self.store.shared().is_elsewhere() {
            true => None,
            false => self.store.shared().catalog().of_process(&self.name).next_back(),
        }
    }

    /// Whether a capture with these options can begin, as far as that is known before its source is opened.
    ///
    /// # Errors
    ///
    /// As [`capture`](Self::capture): a name, a label or an attachment that cannot be, a parent or a `like` that does not
    /// exist, a store that cannot be written.
    pub fn check(&self, options: &CaptureOptions) -> Result<(), Error> {
        check_name(&self.name)?;
        check_labels(&options.labels)?;
        check_attachment_names(&options.attachments)?;
        let shared = self.store.shared();
        shared.check_writable()?;
        if let Some(parent) = options.parent {
            Reference::of(shared, parent)?;
        }
        match &options.like {
            Some(name) if options.parent.is_none() && self.latest().is_none() => {
                self.store.process(name).latest().map(drop).ok_or_else(|| {
                    StoreError::NoSuchSnapshot { text: format!("of the process {:?}", shorten(name)) }.into()
                })
            }
            _ => Ok(()),
        }
    }

    /// Takes one snapshot. When this returns it is durable.
    ///
    /// Its parent is the newest snapshot of the process unless [`CaptureOptions::parent`] names another. Two captures of the same process queue;
    /// captures of different processes run at the same time.
    ///
    /// Cost: every region that may hold anything, and may have changed if that is tracked, is hashed
    /// (5 GB/s a core); what the store lacks is compressed (1.2 GB/s a core) and appended. It needs at
    /// most 256 MiB beside the source.
    ///
    /// # Errors
    ///
    /// [`Error::Source`] when the source cannot be used, [`Error::Store`] when the store cannot be
    /// written, [`Error::Interrupted`]. Nothing is recorded then, and a tracker keeps what it found
    /// for the next capture.
    pub fn capture<S: Source + ?Sized>(
        &self,
        source: &S,
        options: &CaptureOptions,
    ) -> Result<Capture, Error> {
        self.begin(source, options, false)?.finish()
    }

    /// Takes one snapshot and returns as soon as the source may go on: its memory, or what is known to
    /// have changed of it, has been copied. [`PendingCapture::wait`] gives the durable snapshot.
    ///
    /// If another capture of the process is not done yet, this waits for it before it looks at the
    /// source. What the staging buffer has no room for is worked on before this returns.
    ///
    /// ```
    /// use stillframe::{CaptureOptions, Store};
    /// # let dir = tempfile::tempdir()?;
    /// # let store = Store::options().create(dir.path().join("vault"))?;
    /// let mut memory = vec![7u8; 1 << 20];
    /// let pending = store.process("web-1").start_capture(&memory, &CaptureOptions::default())?;
    /// memory[0] = 8;                                          // not in this snapshot
    /// let taken = pending.wait()?;
    /// assert_eq!(store.restore(taken.id)?.into_mapping()?[0], 7);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// As [`capture`](Self::capture).
    pub fn start_capture<S: Source + ?Sized>(
        &self,
        source: &S,
        options: &CaptureOptions,
    ) -> Result<PendingCapture, Error> {
        let begun = self.begin(source, options, true)?;
        let (answer, done) = crossbeam_channel::bounded(1);
        self.store.shared().in_background(move || {
            let result = std::panic::catch_unwind(AssertUnwindSafe(|| begun.finish()));
            // Nobody need wait for it.
            let _ = answer.send(result);
        })?;
        let path = self.store.shared().path.clone();
        Ok(PendingCapture { done: Some(done), process: ProcessId::this(), path })
    }

    /// The first step: the source stands still and is copied. With `let_go` it is all copied; else
    /// memory that nobody writes is worked on where it is.
    fn begin<S: Source + ?Sized>(
        &self,
        source: &S,
        options: &CaptureOptions,
        let_go: bool,
    ) -> Result<Begun, Error> {
        let started = Instant::now();
        check_name(&self.name)?;
        check_labels(&options.labels)?;
        for attachment in &options.attachments {
            check_length(Kind::Attachment, attachment.bytes.len())?;
        }
        let shared = self.store.shared().clone();
        shared.check_writable()?;
        let lane = shared.lane(&self.name);
        let failures_before = shared.log.failures();
        let guard = shared.gate.begin_capture();
        let newest = Reference::newest_of(&shared, &self.name);
        let before = newest.as_ref().map(|newest| newest.record.time);
        let parent = match options.parent {
            Some(id) => Some(Reference::of(&shared, id)?),
            None => newest,
        };
        let like = match (&parent, &options.like) {
            (None, Some(name)) => Some(Reference::newest_of(&shared, name).ok_or_else(|| {
                StoreError::NoSuchSnapshot { text: format!("of the process {:?}", shorten(name)) }
            })?),
            _ => None,
        };
        let tracker = source.tracker();

        let ready_bytes = match &tracker {
            Ok(tracker) => usize::try_from(tracker.estimate_bytes()).unwrap_or(usize::MAX),
            Err(_) => parent.as_ref().or(like.as_ref()).map_or(0, Reference::copied_bytes),
        };
        let staging = Staging::new(options.staging_bytes, ready_bytes)?;
        let frozen = source.open_unless_cancelled(&options.progress)?;
        let (time, moment) = shared.now();
        let before = before.or_else(|| parent.as_ref().map(|parent| parent.record.time));
        let clock_behind = clock_behind(&self.name, time, before);
        let mut space = frozen.address_space().clone();
        if space.mappings().len() > AddressSpace::MAX_MAPPINGS {
            let found = space.mappings().len();
            return Err(StoreError::TooManyMappings { found, most: AddressSpace::MAX_MAPPINGS }.into());
        }
        space.exclude(&options.exclude);
        // Looked at before anything is planned for so many tables: a sparse file may be of any length.
        let tables = table::count(&space, shared.format.region_size);
        check_length(Kind::Root, tables.saturating_mul(Hash::BYTES))?;
        let mut known = Known::new(tracker, &*frozen, &mut space, parent.as_ref(), &shared)?;
        let changes = known.changes.take();
        let is_tracked = changes.is_some();
        let has_parent = parent.is_some();
        let taken_over_zero_bytes =
            parent.as_ref().filter(|_| is_tracked).map_or(0, |parent| parent.record.zero_bytes);
        let mut reference = parent.or(like);
        let mappings = reference.as_ref().map(|reference| reference.mappings_for(&space, is_tracked));
        let codec = options.codec.unwrap_or(shared.format.codec);
        let mut ingest = Ingest::new(
            (shared.clone(), guard, StoreAs { codec, deltas: options.deltas }),
            &space,
            &*frozen,
            &mappings.unwrap_or_default(),
            has_parent,
            changes,
            &options.progress,
        )?;
        let mut attachments = frozen.attachments();
        let origin = frozen.origin();
        let works_directly = !let_go && matches!(frozen.memory(), Memory::InPlace(_) | Memory::Shared(_));
        let find_like = |ingest: &mut Ingest, attachments: &[Attachment]| {
            let like = Reference::newest_like(&shared, &origin, attachments)?;
            ingest.compare_with(&like.mappings_for(&space, false));
            Some(like)
        };
        // Where all is copied first, the source need not stand still while that is looked for and read.
        if reference.is_none() && (works_directly || ingest.wanted_bytes() > options.staging_bytes as u64) {
            reference = find_like(&mut ingest, &attachments);
        }
        let staged = match works_directly {
            true => {
                ingest.work_directly(&*frozen)?;
                None
            }
            false => Some(ingest.stage(&*frozen, staging)?),
        };
        let left_out = frozen.left_out();
        let paused = frozen.release();
        drop(frozen);
        if reference.is_none() {
            reference = find_like(&mut ingest, &attachments);
        }
        attachments.extend(options.attachments.iter().cloned());
        Ok(Begun {
            shared,
            lane,
            started,
            process: self.name.clone(),
            trigger: options.trigger.clone(),
            labels: options.labels.clone(),
            failures_before,
            time,
            moment,
            clock_behind,
            space,
            origin,
            attachments,
            left_out,
            paused,
            ingest,
            staged,
            known,
            taken_over_zero_bytes,
            store_as: StoreAs { codec, deltas: options.deltas },
            parent: reference.as_ref().filter(|_| has_parent).map(|parent| parent.id),
            reference,
        })
    }
}

/// What a tracker told, and how to tell it that the snapshot is durable.
struct Known {
    changes: Option<Vec<Vec<Range<u64>>>>,
    tracking: Tracking,
    acknowledge: Option<(Arc<dyn Tracker>, u64)>,
}

impl Known {
    /// Asks the tracker, whether or not what it knows can be used: it begins anew in any case. Enters what
    /// cannot be read into `space`.
    fn new(
        tracker: Result<Arc<dyn Tracker>, Untracked>,
        frozen: &dyn Frozen,
        space: &mut AddressSpace,
        parent: Option<&Reference>,
        shared: &Shared,
    ) -> Result<Known, Error> {
        // What cannot be read a tracker may find out first.
        let taken = tracker.as_ref().map(|tracker| tracker.take(space, parent.map(|parent| parent.id)));
        space.set_unreadable(frozen.left_out().into_iter().map(|left_out| left_out.range).collect());
        let Taken { number, changes } = match taken {
            Ok(taken) => taken.map_err(SourceError::Track)?,
            Err(_) => Taken { number: 0, changes: Err(Untracked::NoTracker) },
        };
        let tracker = match tracker {
            Ok(tracker) => tracker,
            Err(why) => {
                return Ok(Known { changes: None, tracking: Tracking::Rescan(why), acknowledge: None });
            }
        };
        let means = tracker.means();
        let acknowledge = Some((tracker, number));
        let usable = changes.and_then(|changes| match parent {
            None => Err(Untracked::NoParent),
            Some(parent) => parent.check_it_fits(space, shared).map(|()| changes),
        });
        Ok(match usable {
            Ok(changes) => Known { changes: Some(changes), tracking: Tracking::By(means), acknowledge },
            Err(why) => Known { changes: None, tracking: Tracking::Rescan(why), acknowledge },
        })
    }
}

/// A capture after its first step: nothing needs the source any more.
struct Begun {
    shared: Arc<Shared>,
    lane: LaneGuard,
    started: Instant,
    process: String,
    trigger: Trigger,
    labels: Labels,
    failures_before: u64,
    time: Timestamp,
    /// Where the snapshot stands among the others.
    moment: Timestamp,
    clock_behind: Option<Duration>,
    space: AddressSpace,
    origin: Origin,
    attachments: Vec<Attachment>,
    left_out: Vec<LeftOut>,
    paused: Duration,
    ingest: Ingest,
    staged: Option<Staged>,
    known: Known,
    /// How many zeros the parent has, if tables are taken over from it.
    taken_over_zero_bytes: u64,
    store_as: StoreAs,
    parent: Option<SnapshotId>,
    reference: Option<Reference>,
}

impl Begun {
    /// The second step.
    fn finish(self) -> Result<Capture, Error> {
        let Begun { shared, mut space, parent, reference, mut attachments, mut left_out, .. } = self;
        let reference = reference.as_ref();
        let staging_full = self.staged.as_ref().is_some_and(|staged| staged.was_full);
        let (done, guard) = self.ingest.finish(self.staged)?;
        left_out.extend(refused(&space, done.unreadable));
        left_out.sort_unstable_by_key(|left_out| left_out.range);
        space.set_unreadable(left_out.iter().map(|left_out| left_out.range).collect());
        if matches!(self.origin, Origin::Process { .. }) {
            let bytes = encode(Kind::Attachment, &left_out)?;
            attachments.push(Attachment { name: LeftOut::ATTACHMENT.to_owned(), bytes });
        }
        let zero_bytes = self.taken_over_zero_bytes + done.zero_bytes - done.parent_zero_bytes;

        let mut added_bytes = done.added_bytes;
        let put = Put { shared: &shared, guard: &guard, store_as: self.store_as };
        let mut reader = Reader::new(&shared, Check::Full);
        let (root, root_bytes) = put.root(&mut reader, &done.root, reference)?;
        added_bytes += root_bytes;
        let mut put = |kind, bytes: &[u8], like| -> Result<Hash, Error> {
            let hash = Hash::of(bytes);
            added_bytes += put.object(&mut reader, kind, hash, bytes, like)?;
            Ok(hash)
        };
        let like = reference.and_then(Reference::layout);
        let layout = put(Kind::Layout, &encode(Kind::Layout, &space)?, like)?;
        check_attachment_names(&attachments)?;
        let mut attachments = attachments
            .into_iter()
            .map(|Attachment { name, bytes }| {
                check_length(Kind::Attachment, bytes.len())?;
                let like = reference.and_then(|reference| reference.attachment(&name));
                let hash = if bytes.is_empty() { Hash::ZERO } else { put(Kind::Attachment, &bytes, like)? };
                Ok(AttachmentRef { name, hash, length_bytes: bytes.len() as u64 })
            })
            .collect::<Result<Vec<_>, Error>>()?;
        if self.moment != self.time {
            attachments.push(AttachmentRef::of_moment(self.moment));
        }
        let record = Record {
            process: self.process.clone(),
            parent,
            time: self.time,
            trigger: self.trigger,
            origin: self.origin.cut(),
            region_size: shared.format.region_size,
            memory_bytes: space.image_bytes(),
            zero_bytes,
            regions: space.regions(shared.format.region_size),
            attachments,
            layout,
            root,
        };
        let memory_bytes = record.memory_bytes;
        let (id, bytes) = shared.commit_snapshot(record, self.labels, self.failures_before)?;
        if let Some((tracker, number)) = &self.known.acknowledge {
            tracker.committed(*number, id);
        }
        drop(self.lane);
        Ok(Capture {
            id,
            process: self.process,
            parent,
            time: self.time,
            clock_behind: self.clock_behind,
            memory_bytes,
            zero_bytes,
            changed_regions: done.changed_regions,
            new_regions: done.new_regions,
            delta_regions: done.delta_regions,
            shared_regions: done.shared_regions,
            added_bytes: added_bytes + bytes,
            elapsed: self.started.elapsed(),
            paused: self.paused,
            staging_full,
            tracking: self.known.tracking,
            left_out,
        })
    }
}

/// A clock that is set right by less is not worth a word.
const CLOCK_SET: Duration = Duration::from_secs(1);

/// By how much `time` is earlier than that of the snapshot before, if it is by much; then it is told.
fn clock_behind(process: &str, time: Timestamp, before: Option<Timestamp>) -> Option<Duration> {
    let before = before?;
    let behind =
        Duration::try_from(before.duration_since(time)).ok().filter(|behind| *behind >= CLOCK_SET)?;
    tracing::warn!(
        "the clock says {time:.0}, which is before {before:.0}, the time of the snapshot before of {process:?}: one of \
         them is wrong. Snapshots stay in the order in which they were taken; keep policies go by the times, and leave out \
         what lies in the future"
    );
    Some(behind)
}

/// What could not be copied, beside what was known to be left out.
fn refused(space: &AddressSpace, mut unreadable: Vec<AddressRange>) -> Vec<LeftOut> {
    unreadable.sort_unstable();
    let known: Vec<Range<u64>> = space.unreadable().iter().map(|range| range.start()..range.end()).collect();
    let rest = unreadable.into_iter().flat_map(|range| complement(&known, range.start()..range.end()));
    let ranges = rest.filter_map(|range| AddressRange::new(range.start, range.end).ok());
    ranges.map(|range| LeftOut { range, why: WhyLeftOut::Refused }).collect()
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
    } else if name.contains(is_control) {
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
        } else if key.contains(is_control) || value.contains(is_control) {
            "it has a line break or another control character in it"
        } else {
            continue;
        };
        return Err(StoreError::BadLabel { shown: shorten(&format!("{key}={value}")), why });
    }
    Ok(())
}

/// An error if two attachments have the same name, or one has a name that says when a snapshot was taken.
fn check_attachment_names(attachments: &[Attachment]) -> Result<(), StoreError> {
    for (at, attachment) in attachments.iter().enumerate() {
        if attachment.name.starts_with(MOMENT_PREFIX) {
            return Err(StoreError::AttachmentReserved { name: shorten(&attachment.name) });
        }
        if attachments[..at].iter().any(|other| other.name == attachment.name) {
            return Err(StoreError::AttachmentTwice { name: shorten(&attachment.name) });
        }
    }
    Ok(())
}
