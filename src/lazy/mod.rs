//! Lazy restore: a mapping that is usable at once and filled on first touch.
//!
//! ```text
//! a thread touches a missing page ──> sleeps ─────────────────────────────┐
//!                                       │ userfaultfd                     │ wakes
//! handlers (server.rs) ─────────────> which block? ─> read, check ─> UFFDIO_COPY
//! the filler (fill.rs) ─────────────> the working set, then all by address ───┘
//! all is there ─> unregister; the threads end, and let the snapshot and the store go
//! ```

mod blocks;
mod fill;
mod serve;
mod server;
mod working_set;

use std::fmt;
use std::io;
use std::ops::{Deref, DerefMut};
use std::sync::Arc;
use std::thread::JoinHandle;

use crate::address_space::AddressSpace;
use crate::error::{Error, MemoryError};
use crate::restore::Restore;
use crate::sys::missing::{self, Missing};
use crate::sys::pages::Pages;
use crate::units::usize_of;

use server::Server;
pub use working_set::WorkingSet;

/// What fills a [lazy mapping](Restore::into_lazy) besides the touches.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Fill {
    /// A thread fills all of it: first the [working set](WorkingSet) of the snapshot or, where it has none, that of
    /// the newest snapshot of its process that has one; then the rest in the order of the addresses.
    #[default]
    WorkingSetFirst,
    /// A thread fills all of it in the order of the addresses.
    ByAddress,
    /// Nothing: only what is touched is read, and what lies beside it.
    OnFault,
}

/// How a [lazy mapping](LazyMapping) came to its bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Filled {
    /// It was empty when it was handed out.
    Lazily,
    /// It was restored in full before it was handed out. Says why: what this machine lacks.
    AtOnce(String),
}

/// The image of a snapshot in private memory, filled when it is touched. Made by [`Restore::into_lazy`].
///
/// It can be read and written by any number of threads like any other memory. Each region is checked
/// when it is served. What the rules are while it is not wholly filled
/// ([`is_filled`](Self::is_filled)):
///
/// - **A region that cannot be read** (damage) or a failing kernel: whoever touches it gets the signal
///   `SIGBUS` (`SIGSEGV` before Linux 6.6), whose default is to end the process. Nobody sees wrong bytes,
///   nobody hangs, other regions still work; [`error`](Self::error) says what it was, and the log.
///   It stays so when all else is filled.
/// - **System calls** that are given memory which is not there yet (a `read` into it, a `write` from it) wait
///   like everybody where this process has `CAP_SYS_PTRACE` or `vm.unprivileged_userfaultfd` is 1
///   ([`serves_system_calls`](Self::serves_system_calls)). Else they fail with `EFAULT`: touch the memory
///   first, or [`wait_until_filled`](Self::wait_until_filled).
/// - **Captures**: as bytes (`&mapping[..]`) at any time. A [`LiveMemory`](crate::LiveMemory) is read by a
///   system call, and cannot be tracked before all is filled; a capture of this process by its pid
///   takes what is not there yet for zeros, and nobody else who stops it may write there (a rollback): wait until
///   all is filled.
/// - **`fork`**: the child does not get the mapping; touching it there is `SIGSEGV`.
/// - **Locked memory** (`mlockall` with `MCL_FUTURE`): pages are locked when they are filled. What is zeros in the
///   snapshot is not there, nor locked, before it is touched; `mlock` fetches that too, and waits until all is filled.
/// - **`madvise`** may throw pages away (they read as zeros then) when all is filled, and not before. Do not
///   move the mapping, nor map anything in its place.
/// - **The store**: gc leaves the snapshot alone, and the store stays open and its directory owned by this
///   process also when the [`Store`](crate::Store) is dropped.
///
/// When it is filled it is memory like any other, and the threads, the snapshot and the store are let go.
/// Dropping it ends the threads first, within the time that one region takes.
///
/// ```
/// use stillframe::lazy::Fill;
/// use stillframe::{CaptureOptions, Store};
/// # let dir = tempfile::tempdir()?;
/// # let store = Store::options().create(dir.path().join("vault"))?;
/// let taken = store.process("web-1").capture(&vec![7; 1 << 20], &CaptureOptions::new())?;
/// match store.restore(taken.id)?.into_lazy(Fill::default()) {
///     Ok(memory) => assert_eq!(memory[5000], 7), // read at this access, if it was not filled before
///     Err(error) => println!("{error}"),         // userfaultfd is not available
/// }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct LazyMapping {
    /// None if nothing is missing. Dropped before the memory is unmapped.
    serving: Option<Serving>,
    filled: Filled,
    space: Arc<AddressSpace>,
    memory: Pages,
}

/// The threads that fill a memory. Dropping it ends them; what they have not filled by then nobody may touch.
pub(crate) struct Serving {
    server: Arc<Server>,
    threads: Vec<JoinHandle<()>>,
    /// A child has a copy of all this and none of the threads.
    made_by: u32,
}

impl Restore<'_> {
    /// Restores the image into a fresh private mapping that is usable at once and filled when it is touched,
    /// and by a thread in the background. [`LazyMapping`] says what is to be known about that.
    ///
    /// Where the machine has no `userfaultfd`, or a sandbox forbids it, everything is restored before this
    /// returns; [`LazyMapping::filled`] and the log say why.
    ///
    /// Cost: some 100 microseconds until this returns, whatever the size; tables are read when they are needed.
    /// A first touch takes some 20 microseconds for the region that it touches, the neighbours of which
    /// are filled then too. A byte of memory for each region until all is filled.
    ///
    /// ```
    /// use stillframe::{CaptureOptions, Store};
    /// use stillframe::lazy::Fill;
    /// # let dir = tempfile::tempdir()?;
    /// # let store = Store::options().create(dir.path().join("vault"))?;
    /// let memory = vec![7u8; 1 << 20];
    /// let taken = store.process("vm-7").capture(&memory, &CaptureOptions::default())?;
    ///
    /// let mut back = store.restore(taken.id)?.into_lazy(Fill::default())?;
    /// assert_eq!(back[70_000], 7);                             // these 16 KiB are read now
    /// back[70_000] = 8;
    ///
    /// // What was touched is filled first the next time.
    /// let working_set = back.touched().to_attachment()?;
    /// let options = CaptureOptions::new().attachments([working_set]);
    /// store.process("vm-7").capture(&back[..], &options)?;
    /// back.wait_until_filled()?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`MemoryError::Mapping`] if the image is too large for this machine, or no thread
    /// can be started. Damage is met later, unless everything had to be restored at once.
    pub fn into_lazy(self, fill: Fill) -> Result<LazyMapping, Error> {
        self.shared.check_process()?;
        let bytes = self.image_bytes();
        let failed = |source| Error::from(MemoryError::Mapping { bytes, source });
        let length = usize_of(bytes);
        let space = Arc::new(self.address_space().clone());
        let (memory, missing) = match missing::map_missing(length) {
            Ok(both) => both,
            Err(error) => {
                let why = why_at_once(bytes, &error);
                let mut memory = Pages::zeros(length).map_err(failed)?;
                memory.prefer_huge_pages();
                self.fill(&mut memory, false)?;
                return Ok(LazyMapping { serving: None, filled: Filled::AtOnce(why), space, memory });
            }
        };
        let serving = Serving::start(self, missing, space.clone(), fill).map_err(failed)?;
        Ok(LazyMapping { serving: Some(serving), filled: Filled::Lazily, space, memory })
    }
}

/// Why nothing can be filled on first touch here; says so in the log as well.
pub(crate) fn why_at_once(bytes: u64, error: &io::Error) -> String {
    let why = match error.raw_os_error() {
        _ if bytes == 0 => "there is nothing to fill",
        Some(libc::ENOSYS) => "the kernel was built without userfaultfd",
        Some(libc::EPERM | libc::EACCES) => {
            "userfaultfd is forbidden here; allow it in the sandbox (seccomp, container profile)"
        }
        // Should there be too little memory a full restore says so too.
        Some(_) => "the kernel gives no userfaultfd",
        None => "it cannot be filled at the first page fault",
    };
    let why = format!("{why}: {error}");
    tracing::warn!("restored at once and not lazily: {why}");
    why
}

impl Serving {
    /// Begins to fill the memory of `missing` with the image, on first touch and as `fill` says.
    pub(crate) fn start(
        restore: Restore<'_>,
        missing: Missing,
        space: Arc<AddressSpace>,
        fill: Fill,
    ) -> io::Result<Serving> {
        let server = Arc::new(Server::new(restore, missing, space));
        let mut threads = Vec::new();
        let started = server.start(fill, &mut threads);
        // From here on dropping it, also for an error, ends the threads.
        let serving = Serving { server, threads, made_by: std::process::id() };
        started.map(|()| serving)
    }

    pub(crate) fn is_filled(&self) -> bool {
        self.server.is_filled()
    }

    /// Waits until all is there, or the first error.
    pub(crate) fn wait_until_filled(&self) -> Result<(), Arc<Error>> {
        self.server.wait_until_filled();
        self.server.error().map_or(Ok(()), Err)
    }

    pub(crate) fn error(&self) -> Option<Arc<Error>> {
        self.server.error()
    }

    pub(crate) fn touched(&self) -> WorkingSet {
        self.server.touched()
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        if self.made_by != std::process::id() {
            // For ever, and so what it holds: that is the parent's to close.
            std::mem::forget((self.server.clone(), std::mem::take(&mut self.threads)));
            return;
        }
        self.server.stop();
        for thread in self.threads.drain(..) {
            // It has said what went wrong.
            let _ = thread.join();
        }
    }
}

impl LazyMapping {
    /// Whether it was lazy at all.
    pub fn filled(&self) -> &Filled {
        &self.filled
    }

    /// Whether system calls that are given memory which is not there yet wait for it, as threads do.
    pub fn serves_system_calls(&self) -> bool {
        self.serving.as_ref().is_none_or(|serving| serving.server.missing.kernel_waits())
    }

    /// Whether all of it is there: it is memory like any other then.
    pub fn is_filled(&self) -> bool {
        self.serving.as_ref().is_none_or(Serving::is_filled)
    }

    /// Waits until all of it is there. With [`Fill::OnFault`], where nobody fills it, this thread does.
    ///
    /// # Errors
    ///
    /// The first thing that could not be served: [`error`](Self::error). All else is there, unless the kernel
    /// had no memory to give, or the restore's [`Progress`](crate::Progress) has cancelled it: then
    /// what is not there yet is still served when it is touched.
    pub fn wait_until_filled(&self) -> Result<(), Arc<Error>> {
        self.serving.as_ref().map_or(Ok(()), Serving::wait_until_filled)
    }

    /// The first thing that could not be served, if there was one.
    pub fn error(&self) -> Option<Arc<Error>> {
        self.serving.as_ref().and_then(Serving::error)
    }

    /// What was touched before it was filled, in this order, after the working set with which it was filled. As an
    /// attachment of the next snapshot ([`WorkingSet::to_attachment`]) it is filled first when that is
    /// restored.
    pub fn touched(&self) -> WorkingSet {
        self.serving.as_ref().map(Serving::touched).unwrap_or_default()
    }

    /// The mappings. [`AddressSpace::captured`] tells where in the image each of them lies.
    pub fn address_space(&self) -> &AddressSpace {
        &self.space
    }
}

impl Deref for LazyMapping {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.memory
    }
}

impl DerefMut for LazyMapping {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.memory
    }
}

impl fmt::Debug for LazyMapping {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LazyMapping")
            .field("length_bytes", &self.memory.len())
            .field("filled", &self.filled)
            .field("is_filled", &self.is_filled())
            .finish_non_exhaustive()
    }
}
