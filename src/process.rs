//! A process: a named line of snapshots in a store.

use crate::capture::reference::Reference;
use crate::capture::{self, CaptureOptions, CaptureStats, PendingCapture};
use crate::error::Error;
use crate::labels::check_labels;
use crate::record::SnapshotId;
use crate::snapshot::Snapshot;
use crate::source::Source;
use crate::store::Store;
use crate::store::error::StoreError;
use crate::text::{is_control, shorten};

/// A named line of snapshots in a store.
///
/// ```
/// use stillframe::{CaptureOptions, Store};
/// # let dir = tempfile::tempdir()?;
/// # let store = Store::options().create(dir.path().join("vault"))?;
/// let process = store.process("web-1");
/// for step in 0..3 {
///     process.capture(&vec![step; 100_000], &CaptureOptions::new())?;
/// }
/// let first = &process.snapshots()[0];
/// assert_eq!(store.restore(first.id())?.into_mapping()?[0], 0);
/// assert_eq!(process.latest(), Some(process.snapshots()[2].id()));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug)]
pub struct Process<'a> {
    store: &'a Store,
    name: String,
}

/// The greatest length of a process name.
const MAX_NAME_BYTES: usize = 255;

impl Store {
    /// The process of this name. It may not have any snapshots yet.
    ///
    /// A name has 1 to 255 bytes, no slashes and no [control characters](crate::text::is_control).
    /// [`Process::capture`] refuses other names.
    pub fn process(&self, name: impl Into<String>) -> Process<'_> {
        Process { store: self, name: name.into() }
    }
}

impl<'a> Process<'a> {
    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its snapshots, oldest first. gc does not remove them while the returned values exist, as
    /// with [`Store::snapshots`].
    pub fn snapshots(&self) -> Vec<Snapshot<'a>> {
        self.store.snapshots_of(&self.name)
    }

    /// Its newest snapshot.
    pub fn latest(&self) -> Option<SnapshotId> {
        let shared = self.store.shared();
        if shared.is_elsewhere() { None } else { shared.catalog().of_process(&self.name).next_back() }
    }

    /// Checks whether a capture with these options can begin, as far as is known before its source
    /// is opened.
    ///
    /// # Errors
    ///
    /// As [`capture`](Self::capture): an invalid name, label or attachment; a parent or a `like`
    /// that does not exist; a store that cannot be written.
    pub fn check(&self, options: &CaptureOptions) -> Result<(), Error> {
        self.check_names(options)?;
        capture::check_attachment_names(&options.attachments)?;
        let shared = self.store.shared();
        shared.check_writable()?;
        if let Some(parent) = options.parent {
            Reference::of(shared, parent)?;
        }
        match &options.like {
            Some(name) if options.parent.is_none() && self.latest().is_none() => self
                .store
                .process(name)
                .latest()
                .map(drop)
                .ok_or_else(|| StoreError::no_such_process(name).into()),
            _ => Ok(()),
        }
    }

    /// Takes one snapshot. It is durable when this returns.
    ///
    /// Its parent is the newest snapshot of the process, unless [`CaptureOptions::parent`] names
    /// another. Two captures of the same process queue; captures of different processes run at the
    /// same time.
    ///
    /// Cost (AMD EPYC, 2 cores): populated regions are hashed at 5 GB/s a core; with dirty tracking
    /// only the dirty ones are. Regions that the store does not have are compressed (1.2 GB/s a
    /// core) and appended. A capture needs at most 256 MiB of memory in addition to the source.
    ///
    /// # Errors
    ///
    /// [`Error::Source`] if the source cannot be used, [`Error::Store`] if the store cannot be
    /// written, [`Error::Interrupted`]. After these errors nothing is recorded, and a tracker keeps
    /// its dirty set for the next capture.
    pub fn capture<S: Source + ?Sized>(
        &self,
        source: &S,
        options: &CaptureOptions,
    ) -> Result<CaptureStats, Error> {
        self.check_names(options)?;
        capture::begin(self.store.shared(), &self.name, source, options, false)?.finish()
    }

    /// Takes one snapshot and returns as soon as the source may continue: its memory, or its dirty
    /// memory, has been copied. [`PendingCapture::wait`] returns the durable snapshot.
    ///
    /// If another capture of the process is still running, this waits for it before it opens the
    /// source. Memory for which the staging buffer has no space is processed before this returns.
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
        self.check_names(options)?;
        PendingCapture::new(capture::begin(self.store.shared(), &self.name, source, options, true)?)
    }

    /// An error unless a snapshot can have this process's name and these labels.
    fn check_names(&self, options: &CaptureOptions) -> Result<(), StoreError> {
        check_name(&self.name)?;
        check_labels(&options.labels)
    }
}

/// An error unless a process can have this name.
fn check_name(name: &str) -> Result<(), StoreError> {
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
