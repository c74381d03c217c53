//! Lazy restore: a mapping that is usable at once and filled by page faults.
//!
//! ```text
//! a thread accesses a missing page ─> sleeps ─────────────────────────────┐
//!                                       │ userfaultfd                     │ wakes
//! handlers (server.rs) ─────────────> which block? ─> read, check ─> UFFDIO_COPY
//! the filler (fill.rs) ─────────────> working set, then by address ───────┘
//! all filled ─> unregister; the threads end and release the snapshot and the store
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

/// How a [lazy mapping](Restore::into_lazy) is filled in addition to page faults.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Fill {
    /// A thread fills the whole mapping: first the [working set](WorkingSet) of the snapshot or, if
    /// it has none, of the newest snapshot of its process that has one; then the rest in address
    /// order.
    #[default]
    WorkingSetFirst,
    /// A thread fills the whole mapping in address order.
    ByAddress,
    /// No thread fills it: only accessed regions and their neighbours are read.
    OnFault,
}

/// How a [lazy mapping](LazyMapping) was restored.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Filled {
    /// It was empty when it was returned.
    Lazily,
    /// It was fully restored before it was returned, because this machine lacks something. Has the
    /// reason.
    AtOnce(String),
}

/// The image of a snapshot in private memory, filled by page faults. Made by
/// [`Restore::into_lazy`].
///
/// Any number of threads can read and write it like other memory. Each region is checked when it is
/// served. Until the mapping is filled ([`is_filled`](Self::is_filled)), these rules hold:
///
/// - **A region that cannot be read** (damage, or an error of the kernel): a thread that accesses
///   it receives the signal `SIGBUS` (`SIGSEGV` before Linux 6.6), which by default ends the
///   process. No thread reads wrong bytes or hangs, and other regions still work.
///   [`error`](Self::error) and the log have the cause. This still holds after everything else is
///   filled.
/// - **System calls** with memory that is still missing (a `read` into it, a `write` from it) block
///   like any other access if this process has `CAP_SYS_PTRACE`, or if
///   `vm.unprivileged_userfaultfd` is 1 ([`serves_system_calls`](Self::serves_system_calls)).
///   Otherwise they fail with `EFAULT`: access the memory before the call, or
///   [`wait_until_filled`](Self::wait_until_filled).
/// - **Captures** of its bytes (`&mapping[..]`) work at any time. Other forms must wait until
///   everything is filled: a [`LiveMemory`](crate::LiveMemory) is read by a system call and cannot
///   be tracked before that; a capture of this process by its pid takes missing memory for zeros;
///   and another program that stops this process (for a rollback) must not write there.
/// - **`fork`**: the child does not get the mapping; an access in the child raises `SIGSEGV`.
/// - **Locked memory** (`mlockall` with `MCL_FUTURE`): pages are locked when they are filled. Pages
///   of zeros in the snapshot are neither present nor locked until they are accessed. `mlock` loads
///   these too, and waits until everything is filled.
/// - **`madvise`** may discard pages (they are zeros then) only after everything is filled. Do not
///   move the mapping, and do not map anything in its place.
/// - **The store**: gc keeps the snapshot. The store stays open, and this process keeps the lock of
///   its directory, even if the [`Store`](crate::Store) is dropped.
///
/// When the mapping is filled, it is memory like any other, and the threads, the snapshot and the
/// store are released. Dropping it first ends the threads, which takes no longer than serving one
/// region.
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
    /// `None` if nothing is missing. Dropped before the memory is unmapped.
    serving: Option<Serving>,
    filled: Filled,
    space: Arc<AddressSpace>,
    memory: Pages,
}

/// The threads that fill a memory. Dropping it ends them. Memory that they have not filled by then
/// must not be accessed.
pub(crate) struct Serving {
    server: Arc<Server>,
    threads: Vec<JoinHandle<()>>,
    /// A forked child has a copy of this value but none of the threads.
    made_by: u32,
}

impl Restore<'_> {
    /// Restores the image into a new private mapping that is usable at once. Page faults fill it,
    /// and so does a background thread. [`LazyMapping`] has the rules for its use.
    ///
    /// If the machine has no `userfaultfd`, or a sandbox forbids it, everything is restored before
    /// this returns. [`LazyMapping::filled`] and the log have the reason.
    ///
    /// Cost (AMD EPYC, 2 cores): this returns after about 100 microseconds, for any size; tables
    /// are read when they are needed. A first access takes about 20 microseconds for its region;
    /// its neighbours are filled afterwards. Until everything is filled, each region takes one byte
    /// of memory.
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
    /// // The next lazy restore fills the accessed regions first.
    /// let working_set = back.touched().to_attachment()?;
    /// let options = CaptureOptions::new().attachments([working_set]);
    /// store.process("vm-7").capture(&back[..], &options)?;
    /// back.wait_until_filled()?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`MemoryError::Mapping`] if the image is too large for this machine, or a thread cannot be
    /// started. Damage is found later, unless everything had to be restored at once.
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

/// The reason why page faults cannot fill the memory here. It is also logged.
pub(crate) fn why_at_once(bytes: u64, error: &io::Error) -> String {
    let why = match error.raw_os_error() {
        _ if bytes == 0 => "there is nothing to fill",
        Some(libc::ENOSYS) => "the kernel was built without userfaultfd",
        Some(libc::EPERM | libc::EACCES) => {
            "userfaultfd is forbidden here; allow it in the sandbox (seccomp, container profile)"
        }
        // If memory is short, a full restore reports the same error.
        Some(_) => "the kernel gives no userfaultfd",
        None => "it cannot be filled at the first page fault",
    };
    let why = format!("{why}: {error}");
    tracing::warn!("restored at once and not lazily: {why}");
    why
}

impl Serving {
    /// Starts to fill the memory of `missing` with the image, by page faults and as `fill` says.
    pub(crate) fn start(
        restore: Restore<'_>,
        missing: Missing,
        space: Arc<AddressSpace>,
        fill: Fill,
    ) -> io::Result<Serving> {
        let server = Arc::new(Server::new(restore, missing, space));
        let mut threads = Vec::new();
        let started = server.start(fill, &mut threads);
        // From here on dropping it, also after an error, ends the threads.
        let serving = Serving { server, threads, made_by: std::process::id() };
        started.map(|()| serving)
    }

    pub(crate) fn is_filled(&self) -> bool {
        self.server.is_filled()
    }

    /// Waits until everything is filled, or until the first error.
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
            // Leaks the server and everything that it holds, because only the parent may close it.
            std::mem::forget((self.server.clone(), std::mem::take(&mut self.threads)));
            return;
        }
        self.server.stop();
        for thread in self.threads.drain(..) {
            // The thread has reported its error.
            let _ = thread.join();
        }
    }
}

impl LazyMapping {
    /// Whether it was restored lazily.
    pub fn filled(&self) -> &Filled {
        &self.filled
    }

    /// Whether system calls with missing memory wait until it is filled, as threads do.
    pub fn serves_system_calls(&self) -> bool {
        self.serving.as_ref().is_none_or(|serving| serving.server.missing.kernel_waits())
    }

    /// Whether all of it is filled. It is then memory like any other.
    pub fn is_filled(&self) -> bool {
        self.serving.as_ref().is_none_or(Serving::is_filled)
    }

    /// Waits until all of it is filled. With [`Fill::OnFault`], where no thread fills it, the
    /// calling thread does.
    ///
    /// # Errors
    ///
    /// The first error in serving a block, see [`error`](Self::error). Everything else is filled,
    /// with two exceptions: the kernel had no memory left, or the restore's
    /// [`Progress`](crate::Progress) cancelled it. After these, missing memory is still served when
    /// it is accessed.
    pub fn wait_until_filled(&self) -> Result<(), Arc<Error>> {
        self.serving.as_ref().map_or(Ok(()), Serving::wait_until_filled)
    }

    /// The first error in serving a block, if there was one.
    pub fn error(&self) -> Option<Arc<Error>> {
        self.serving.as_ref().and_then(Serving::error)
    }

    /// The working set: the regions that were accessed before the mapping was filled, in this
    /// order, after the working set with which it was filled. Attach it to the next snapshot
    /// ([`WorkingSet::to_attachment`]); a lazy restore of that snapshot fills it first.
    pub fn touched(&self) -> WorkingSet {
        self.serving.as_ref().map(Serving::touched).unwrap_or_default()
    }

    /// The mappings. [`AddressSpace::captured`] gives the position of each of them in the image.
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
