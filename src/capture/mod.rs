//! Capture: makes a snapshot of a source.
//!
//! ```text
//! open the source ─> pieces of tables ─┬─> hash ─> equal to the parent's? ─> pin, look up ─┐
//!   (is paused)        up to 1 MiB     ├─> …  one worker a core                            ├─> append
//!                                      └─> hash ─> …               encode what is new  <───┘
//! all tables done ─> root, layout, attachments ─> record ─> durable ─> the id
//! ```
//!
//! A source that is paused is copied first and resumed, and hashed and encoded after that. Only if
//! its memory is more than the staging buffer do the workers begin while it is still paused. Where
//! a tracker knows what changed since the parent, only that is copied.
//!
//! `begin` does what needs the source, `Begun::finish` the rest. Each file of this folder uses
//! those below it only:
//!
//! | file | what is done there |
//! |---|---|
//! | `mod`, `finish`, `pending` | the steps, in order; the record; the background |
//! | `changes` | what the tracker knows |
//! | `stage` | memory is copied while its source is paused |
//! | `work` | pieces of memory become regions |
//! | `tables` | regions are hashed and stored, and come together in tables |
//! | `plan`, `piece`, `dense` | which tables, which pieces of them, which regions of those |
//! | `put` | one object goes into the store, unless the store has it |
//! | `reference` | the snapshot that memory is compared with |

pub(crate) mod piece;
pub(crate) mod put;
pub(crate) mod reference;

mod changes;
mod counts;
mod dense;
mod finish;
mod pending;
mod plan;
mod stage;
mod tables;
mod work;
mod worker;

use std::sync::Arc;
use std::time::{Duration, Instant};

use jiff::Timestamp;

use changes::Changes;
pub(crate) use finish::{Begun, check_attachment_names};
pub use pending::PendingCapture;
use plan::Plan;
use put::StoreAs;
use reference::Reference;
use stage::{Staging, stage};
use tables::Tables;
use work::Work;

use crate::address_space::AddressSpace;
use crate::codec::Codec;
use crate::error::Error;
use crate::hash::Hash;
use crate::left_out::LeftOut;
use crate::progress::Progress;
use crate::record::{SnapshotId, Trigger};
use crate::source::{Access, Attachment, Frozen, Source};
use crate::store::OpenStore;
use crate::store::catalog::Labels;
use crate::store::commit::check_length;
use crate::store::error::StoreError;
use crate::store::packs::object::ObjectKind;
use crate::table;
use crate::track::Tracking;
use crate::units::AddressRange;

/// How to take a snapshot. The default fits most captures.
///
/// ```
/// use stillframe::{CaptureOptions, Store};
/// # let dir = tempfile::tempdir()?;
/// # let store = Store::options().create(dir.path().join("vault"))?;
/// let options = CaptureOptions::new().label("release", "1.4").exclude(["0..4096".parse()?]);
/// let taken = store.process("web-1").capture(&[7; 16_384], &options)?;
/// assert_eq!(store.snapshot(taken.id)?.labels()["release"], "1.4");
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct CaptureOptions {
    /// Why the snapshot is taken.
    pub trigger: Trigger,
    /// The initial labels. They can be changed later.
    pub labels: Labels,
    /// Address ranges to leave out (scratch buffers, secrets). They are restored as zeros.
    pub exclude: Vec<AddressRange>,
    /// The snapshot that the memory comes from; if `None`, the newest snapshot of the process. Set
    /// this after a [rollback](crate::Rollback), so that the history branches where the memory did,
    /// and only later changes are read. Also set it if the memory started as a copy of another
    /// process.
    pub parent: Option<SnapshotId>,
    /// For the first snapshot of a process: the process whose newest snapshot is most similar. The
    /// capture compares with that snapshot and stores small changes as differences from it. As long
    /// as snapshots of this process need bytes of that process, the store keeps them, even if the
    /// snapshots of that process are forgotten. [`GcOptions::erase`](crate::GcOptions) separates
    /// the two. If `None`, it is the newest snapshot of the same executable, or of a file of the
    /// same name, with the same owner.
    pub like: Option<String>,
    /// How to encode new bytes; if `None`, with the store's codec.
    pub codec: Option<Codec>,
    /// Whether a changed region may be stored as the difference from the region that was in its
    /// place, where that is short. Reading it back needs both.
    pub deltas: bool,
    /// Further bytes to store with the memory, by name.
    pub attachments: Vec<Attachment>,
    /// How much memory of a paused source is copied before hashing begins. If the memory to copy
    /// exceeds this, the pause is longer, and [`CaptureStats::staging_full`] is set. Only the part
    /// of the buffer that is needed is allocated.
    pub staging_bytes: usize,
    /// Reports the progress of the capture, and can cancel it.
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

impl CaptureOptions {
    /// The default options.
    pub fn new() -> Self {
        CaptureOptions::default()
    }

    /// Sets [`trigger`](Self::trigger).
    pub fn trigger(mut self, trigger: Trigger) -> Self {
        self.trigger = trigger;
        self
    }

    /// Adds a label.
    pub fn label(mut self, key: impl Into<String>, value: impl Into<String>) -> Self {
        self.labels.insert(key.into(), value.into());
        self
    }

    /// Adds labels.
    pub fn labels(mut self, labels: impl IntoIterator<Item = (String, String)>) -> Self {
        self.labels.extend(labels);
        self
    }

    /// Adds address ranges to leave out.
    pub fn exclude(mut self, ranges: impl IntoIterator<Item = AddressRange>) -> Self {
        self.exclude.extend(ranges);
        self
    }

    /// Sets the parent, or `None` for the newest snapshot of the process.
    pub fn parent(mut self, parent: impl Into<Option<SnapshotId>>) -> Self {
        self.parent = parent.into();
        self
    }

    /// Sets the process whose memory is [most similar](Self::like) to this one.
    pub fn like(mut self, process: impl Into<String>) -> Self {
        self.like = Some(process.into());
        self
    }

    /// Sets the codec, or `None` for the store's codec.
    pub fn codec(mut self, codec: impl Into<Option<Codec>>) -> Self {
        self.codec = codec.into();
        self
    }

    /// Allows or forbids [deltas](Self::deltas). The default is to allow them.
    pub fn deltas(mut self, allowed: bool) -> Self {
        self.deltas = allowed;
        self
    }

    /// Adds attachments.
    pub fn attachments(mut self, attachments: impl IntoIterator<Item = Attachment>) -> Self {
        self.attachments.extend(attachments);
        self
    }

    /// Sets the size of the [staging buffer](Self::staging_bytes). The default is 160 MiB.
    pub fn staging_bytes(mut self, bytes: usize) -> Self {
        self.staging_bytes = bytes;
        self
    }

    /// Sets the progress that the capture reports to.
    pub fn progress(mut self, progress: Progress) -> Self {
        self.progress = progress;
        self
    }
}

/// The result of a capture.
#[derive(Clone, Debug, serde::Serialize)]
#[non_exhaustive]
pub struct CaptureStats {
    /// The id of the snapshot.
    #[serde(serialize_with = "crate::report::text")]
    pub id: SnapshotId,
    /// Its process.
    pub process: String,
    /// The snapshot it follows.
    #[serde(serialize_with = "crate::report::optional_text")]
    pub parent: Option<SnapshotId>,
    /// When it was taken, by the clock.
    #[serde(serialize_with = "crate::report::text")]
    pub time: Timestamp,
    /// How much earlier that is than the time of the snapshot before it, if it is by a second or
    /// more: one of both times is wrong. The snapshots stand in the order in which they were taken
    /// all the same.
    #[serde(rename = "clock_behind_ms", serialize_with = "crate::report::optional_milliseconds")]
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
    #[serde(rename = "elapsed_ms", serialize_with = "crate::report::milliseconds")]
    pub elapsed: Duration,
    /// How long the source stood still, or had to: for a live process from the first thread that
    /// stopped to the last that went on, for [`LiveMemory`](crate::LiveMemory) as long as it took
    /// to find and copy what changed. Zero for a file and for bytes that are borrowed.
    #[serde(rename = "paused_ms", serialize_with = "crate::report::milliseconds")]
    pub paused: Duration,
    /// Whether the source stood still for longer because the staging buffer was too small.
    pub staging_full: bool,
    /// How it was known what had changed.
    pub tracking: Tracking,
    /// What of its captured mappings the snapshot does not have, and why, in the order of the
    /// addresses. It is restored as zeros, and a rollback leaves it as it is.
    #[serde(serialize_with = "crate::left_out::serialize_sums")]
    pub left_out: Vec<LeftOut>,
}

impl CaptureStats {
    /// How many bytes of captured mappings are not in the snapshot.
    pub fn unreadable_bytes(&self) -> u64 {
        self.left_out.iter().map(|left_out| left_out.range.length_bytes()).sum()
    }
}

/// The first step: pauses the source and copies its memory. With `copy_all` it copies everything;
/// otherwise memory that nobody writes is hashed in place.
pub(crate) fn begin<S: Source + ?Sized>(
    shared: &Arc<OpenStore>,
    process: &str,
    source: &S,
    options: &CaptureOptions,
    copy_all: bool,
) -> Result<Begun, Error> {
    let started = Instant::now();
    for attachment in &options.attachments {
        check_length(ObjectKind::Attachment, attachment.bytes.len())?;
    }
    shared.check_writable()?;
    let lane = shared.lane(process);
    let failures_before = shared.log.failures();
    let guard = shared.gate.begin_capture();
    let Others { parent, like, before } = Others::find(shared, process, options)?;
    let tracker = source.tracker();

    let ready_bytes = match &tracker {
        Ok(tracker) => usize::try_from(tracker.estimate_bytes()).unwrap_or(usize::MAX),
        Err(_) => parent.as_ref().or(like.as_ref()).map_or(0, Reference::copied_bytes),
    };
    let staging = Staging::new(options.staging_bytes, ready_bytes)?;
    let frozen = source.open_unless_cancelled(&options.progress)?;
    let (time, moment) = shared.now();
    let clock_behind = clock_behind(process, time, before);
    let mut space = space_of(&*frozen, options, shared)?;
    let mut changes = Changes::take(tracker, &*frozen, &mut space, parent.as_ref(), shared)?;
    let ranges = changes.ranges.take();
    let is_tracked = ranges.is_some();
    let parent_id = parent.as_ref().map(|parent| parent.id);
    let parent_zero_bytes =
        parent.as_ref().filter(|_| is_tracked).map_or(0, |parent| parent.record.zero_bytes);
    let mut reference = parent.or(like);
    let mappings = reference.as_ref().map(|reference| reference.mappings_for(&space, is_tracked));
    let region_size = shared.format.region_size;
    let plan = Plan::new(&space, &*frozen, &mappings.unwrap_or_default(), ranges, region_size)?;
    let codec = options.codec.unwrap_or(shared.format.codec);
    let store_as = StoreAs { codec, deltas: options.deltas };
    let tables = Tables::new((shared.clone(), guard, store_as), plan, parent_id.is_some(), parent_zero_bytes);
    let mut work = Work::new(tables, &options.progress);

    let mut attachments = frozen.attachments();
    let origin = frozen.origin();
    let works_directly = !copy_all && matches!(frozen.access(), Access::InPlace(_) | Access::Shared(_));
    let find_like = |work: &mut Work, attachments: &[Attachment]| {
        let like = Reference::newest_like(shared, &origin, attachments)?;
        work.plan_mut().compare_with(&like.mappings_for(&space, false));
        Some(like)
    };
    // Where all is copied first, the source need not be paused while that is looked for and read.
    if reference.is_none() && (works_directly || work.plan().wanted_bytes() > options.staging_bytes as u64) {
        reference = find_like(&mut work, &attachments);
    }
    let staged = if works_directly {
        work.on_memory(&*frozen, work.plan().pieces())?;
        None
    } else {
        Some(stage(&work, &*frozen, staging)?)
    };
    let left_out = frozen.left_out();
    let paused = frozen.release();
    drop(frozen);
    if reference.is_none() {
        reference = find_like(&mut work, &attachments);
    }
    attachments.extend(options.attachments.iter().cloned());
    Ok(Begun {
        shared: shared.clone(),
        lane,
        started,
        process: process.to_owned(),
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
        work,
        staged,
        changes,
        store_as,
        parent: parent_id,
        reference,
    })
}

/// The other snapshots that a capture refers to.
struct Others {
    parent: Option<Reference>,
    /// The snapshot that the caller named as like this one, which has no parent.
    like: Option<Reference>,
    /// When the snapshot before this one was taken.
    before: Option<Timestamp>,
}

impl Others {
    fn find(shared: &OpenStore, process: &str, options: &CaptureOptions) -> Result<Others, StoreError> {
        let newest = Reference::newest_of(shared, process);
        let before = newest.as_ref().map(|newest| newest.record.time);
        let parent = match options.parent {
            Some(id) => Some(Reference::of(shared, id)?),
            None => newest,
        };
        let like = match (&parent, &options.like) {
            (None, Some(name)) => {
                Some(Reference::newest_of(shared, name).ok_or_else(|| StoreError::no_such_process(name))?)
            }
            _ => None,
        };
        let before = before.or_else(|| parent.as_ref().map(|parent| parent.record.time));
        Ok(Others { parent, like, before })
    }
}

/// The mappings of an open source, without the ranges that the caller excludes.
fn space_of(
    frozen: &dyn Frozen,
    options: &CaptureOptions,
    shared: &OpenStore,
) -> Result<AddressSpace, StoreError> {
    let mut space = frozen.address_space().clone();
    if space.mappings().len() > AddressSpace::MAX_MAPPINGS {
        let found = space.mappings().len();
        return Err(StoreError::TooManyMappings { found, most: AddressSpace::MAX_MAPPINGS });
    }
    space.exclude(&options.exclude);
    // Checked before the plan allocates memory for each table: a sparse file may have any length.
    let tables = table::count(&space, shared.format.region_size);
    check_length(ObjectKind::Root, tables.saturating_mul(Hash::BYTES))?;
    Ok(space)
}

/// Smaller corrections of the clock are not reported.
const CLOCK_SET: Duration = Duration::from_secs(1);

/// By how much `time` is earlier than the time of the previous snapshot, if by at least
/// [`CLOCK_SET`]. This is then logged.
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
