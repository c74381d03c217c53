//! A live Linux process as a source.
//!
//! Opening it stops all its threads (`stop.rs`), reads what is mapped (`maps.rs`) and what is there
//! (the pagemap), and finds the files behind its mappings (`file.rs`); `content.rs` decides what of
//! each mapping is read and how. Its memory is then copied until it is released (`memory.rs`).
//! Nothing is written to the process, no code runs in it, and it does not get larger: nothing is
//! read through a mapping that is not in its memory.

mod content;
mod file;
mod memory;
mod mounts;
mod refusal;

use std::cell::RefCell;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::Duration;

use content::contents;
use file::Backings;
pub(crate) use memory::ProcessMemory;
use refusal::{find, process_error};

use super::injection::{Foothold, InjectionError, Step};
use super::mapping_state::{self, MappingState};
use super::maps::{self, MapsLine};
use super::patience::{Patience, STOP_TIMEOUT};
use super::proc_directory::ProcDirectory;
use super::signals::Settlement;
use super::stop::StoppedProcess;
use super::stuck::wait_while_stuck;
use super::tracer::Calls;
use super::{
    Access, Attachment, CopyOut, Frozen, Source, SourceError, connections, descriptors, owner_attachment,
};
use crate::address_space::AddressSpace;
use crate::descriptors::{Descriptor, Descriptors};
use crate::left_out::LeftOut;
use crate::mapped_files::{FileAt, MappedFiles};
use crate::progress::Progress;
use crate::ranges::Ranges;
use crate::record::Origin;
use crate::run::Run;
use crate::signals::Signals;
use crate::sys::mapped::MappedFile;
use crate::sys::{cpu, mapped};
use crate::threads::{AUXV, REGISTER_LAYOUT, Thread, Threads};
use crate::track::{RescanReason, SoftDirty, TrackError, Tracker};
use crate::units::AddressRange;

/// A live Linux process, given by its pid.
///
/// It is paused from [`Source::open`] to [`Frozen::release`], or until the open source is dropped.
/// A process that was already stopped stays stopped. If this program is killed meanwhile, the
/// kernel resumes the process. A system call that a signal handler would interrupt may return early
/// with `EINTR`, as after SIGSTOP and SIGCONT.
///
/// Attachments: `threads` (see [`Threads`]); `auxv`, the raw auxiliary vector; `rseq`, the threads'
/// areas for restartable sequences; `run`, the start times of process and threads; `signals`, the
/// pending signals; `descriptors`, the open files; `mapped-files`, the files of shared mappings;
/// `owner`, the real and effective user; `left-out` (see [`LeftOut`]).
///
/// The kernel permits this for processes of the same user, subject to
/// `/proc/sys/kernel/yama/ptrace_scope`, or with the capability `CAP_SYS_PTRACE`.
///
/// Other processes that share its memory (`clone` with `CLONE_VM`) are stopped with it if the
/// kernel reports them (`kcmp`). We must have permission for them too. If the process itself is
/// capturing, the capture waits until that is done.
///
/// If it is a child process of this program, call `waitpid` for it only between captures. `waitpid`
/// reports a stop as a stop of a child, with any options, and `std::process::Child` takes it for an
/// exit.
///
/// Shared memory that another process writes may change during the pause.
///
/// The process does not get larger by being captured: bytes that are not in its memory are read
/// from its files, not through its mappings. Bytes that cannot be read in this way are left out,
/// recorded as unreadable, and reported with the reason
/// ([`CaptureStats::left_out`](crate::CaptureStats::left_out)). These are: pages that a
/// `userfaultfd` would fill; pages that a file system would have to request from a server; and
/// unmapped pages of unnamed shared memory, unless the caller has `CAP_SYS_ADMIN` or
/// `CAP_CHECKPOINT_RESTORE`. Of memory that the process may not read itself (`PROT_NONE`), only the
/// present pages are captured.
///
/// ```
/// use stillframe::source::{LiveProcessSource, Source};
/// let mut child = std::process::Command::new("sleep").arg("60").spawn()?;
/// let source = LiveProcessSource::new(child.id());
/// let frozen = source.open()?;
/// assert!(frozen.address_space().image_bytes() > 0);
/// let stood_still = frozen.release();
/// # assert!(!stood_still.is_zero());
/// # child.kill()?;
/// # child.wait()?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug)]
pub struct LiveProcessSource {
    pid: u32,
    stop_timeout: Duration,
    tracker: Result<Arc<SoftDirty>, RescanReason>,
}

impl LiveProcessSource {
    /// The process with this pid. Nothing is done to it yet.
    pub fn new(pid: u32) -> Self {
        LiveProcessSource { pid, stop_timeout: STOP_TIMEOUT, tracker: Err(RescanReason::NoTracker) }
    }

    /// How long its threads may take to stop; one second by default. Running threads need
    /// microseconds. With thousands of threads the time limit restarts whenever a thread has
    /// stopped, for at most a millisecond for each thread.
    ///
    /// A thread that waits uninterruptibly in the kernel (for a disk, a file server, a child of
    /// `vfork`, in a frozen cgroup) stops when that wait is over. If this is known in advance, the
    /// other threads are stopped after it. No thread is paused for longer than this time: then all
    /// are resumed, and [`SourceError::DidNotStop`] names the thread that did not stop.
    pub fn stop_timeout(mut self, timeout: Duration) -> Self {
        self.stop_timeout = timeout;
        self
    }

    /// Checks whether the process exists and can be captured: it must not be a thread of another
    /// process, a thread of the kernel, or this program. This call does not change the process.
    ///
    /// # Errors
    ///
    /// [`SourceError::NoSuchPid`], [`SourceError::Uncapturable`].
    pub fn check(&self) -> Result<(), SourceError> {
        find(self.pid).map(drop)
    }

    /// Lets the kernel note what the process writes, by soft-dirty marks: then only that is read.
    /// Use the same source for all captures of the process.
    ///
    /// There is one set of marks for each process: whoever else uses them (CRIU does) must not do
    /// so meanwhile. Many kernels have none, which is found out by trying.
    ///
    /// # Errors
    ///
    /// [`TrackError::Unavailable`] with the reason.
    pub fn track_writes(mut self) -> Result<Self, TrackError> {
        self.tracker = Ok(Arc::new(SoftDirty::new(self.pid)?));
        Ok(self)
    }

    /// The same where it is possible. Where it is not, everything is read, and
    /// [`CaptureStats::tracking`](crate::CaptureStats::tracking) says why.
    pub fn track_writes_if_possible(mut self) -> Self {
        let tracker = SoftDirty::new(self.pid).map(Arc::new);
        self.tracker = tracker.map_err(|error| RescanReason::Unavailable(error.to_string()));
        self
    }

    /// The pid.
    pub fn pid(&self) -> u32 {
        self.pid
    }
}

impl LiveProcessSource {
    /// Stops the process, unless `progress` is cancelled before.
    pub(crate) fn hold(&self, progress: &Progress) -> Result<FrozenProcess, SourceError> {
        let pid = self.pid;
        let process = Arc::new(find(pid)?);
        // A thread that is stuck may block readers of the memory of the process, for example of the
        // command line.
        wait_while_stuck(&process, &Patience::new(self.stop_timeout, progress))?;
        // Slow reads of data that does not change are made before the pause.
        let origin = Origin::LiveProcess { pid, path: process.executable(), command: process.command_line() };
        let users = process.users();
        let descriptors = descriptors::look(&process).unwrap_or_default();
        let stopped = StoppedProcess::stop(&process, self.stop_timeout, progress)?;

        // The first thread may have ended before the others. It then has no memory any more.
        let Some(tid) = stopped.threads().threads.first().map(|thread| thread.tid) else {
            return Err(SourceError::LiveProcessEnded { pid });
        };
        let descriptors = descriptors::look_again(&process, tid, &descriptors);
        let read = |name: &str, action| {
            process.read(&format!("task/{tid}/{name}")).map_err(|error| process_error(pid, action, error))
        };
        let lines = mappings(pid, read)?;
        let mapped_files = shared_files(&lines);
        let auxv = read("auxv", "read the auxiliary vector of")?;
        let state = process
            .open_file(&format!("task/{tid}/stat"))
            .map_err(|error| process_error(pid, "look at", error))?;
        // Without it everything counts as populated.
        let pagemap = process.open_file(&format!("task/{tid}/pagemap")).ok();
        let memory = process.open_file(&format!("task/{tid}/mem")).ok();
        let found = contents(lines, &mut Backings::new(&process), pagemap.as_ref());
        let (mappings, contents) = found.into_iter().unzip();
        let frozen = FrozenProcess {
            memory: ProcessMemory::new(pid, tid, contents, memory),
            process,
            space: AddressSpace::new(mappings)?,
            origin,
            users,
            auxv,
            descriptors,
            mapped_files,
            state,
            stopped: RefCell::new(stopped),
        };
        frozen.check_it_stands_still()?;
        Ok(frozen)
    }
}

impl Source for LiveProcessSource {
    fn open(&self) -> Result<Box<dyn Frozen + '_>, SourceError> {
        self.open_unless_cancelled(&Progress::new())
    }

    fn open_unless_cancelled(&self, progress: &Progress) -> Result<Box<dyn Frozen + '_>, SourceError> {
        Ok(Box::new(self.hold(progress)?))
    }

    fn tracker(&self) -> Result<Arc<dyn Tracker>, RescanReason> {
        match &self.tracker {
            Ok(tracker) => Ok(tracker.clone()),
            Err(why) => Err(why.clone()),
        }
    }
}

/// The lines of smaps, or of maps if the kernel has no smaps. Only smaps shows that a userfaultfd
/// fills memory. Its cost: the kernel walks the page tables, 10 ms for a GiB in pages of 4 KiB,
/// plus 1.5 microseconds for each mapping.
fn mappings(
    pid: u32,
    read: impl Fn(&str, &'static str) -> Result<Vec<u8>, SourceError>,
) -> Result<Vec<MapsLine>, SourceError> {
    let lines = match read("smaps", "read the mappings of") {
        Ok(smaps) if !smaps.is_empty() => maps::parse_smaps(&smaps),
        _ => maps::parse(&read("maps", "read the mappings of")?),
    };
    lines.map_err(|line| unknown_form(pid, &line))
}

fn unknown_form(pid: u32, line: &str) -> SourceError {
    let why = format!("a line of /proc/{pid}/smaps has an unknown form: {line:?}");
    SourceError::Uncapturable { pid, why }
}

/// The files of the shared mappings among these.
fn shared_files(lines: &[MapsLine]) -> MappedFiles {
    let shared = lines.iter().filter(|line| line.mapping.protection.shared && line.inode != 0);
    let file = |line: &MapsLine| {
        let (start, end) = (line.mapping.range.start(), line.mapping.range.end());
        let device = (u64::from(line.device.0) << 20) + u64::from(line.device.1);
        FileAt { start, end, device, inode: line.inode }
    };
    MappedFiles(shared.map(file).collect())
}

/// The attachment that stores the address of each thread's area for restartable sequences, as the
/// thread registered it.
pub(crate) const RSEQ_ATTACHMENT: &str = "rseq";

/// A paused process.
pub(crate) struct FrozenProcess {
    process: Arc<ProcDirectory>,
    memory: ProcessMemory,
    space: AddressSpace,
    origin: Origin,
    users: Option<(u32, u32)>,
    auxv: Vec<u8>,
    descriptors: Option<Descriptors>,
    mapped_files: MappedFiles,
    /// `/proc/PID/task/TID/stat`. The kernel generates it for each read.
    state: File,
    stopped: RefCell<StoppedProcess>,
}

impl FrozenProcess {
    /// Its memory. Any thread may read it. The bytes are only valid if the process [is still
    /// paused](Self::check_it_stands_still) afterwards.
    pub(crate) fn process_memory(&self) -> ProcessMemory {
        self.memory.clone()
    }

    /// Its memory, opened for writing. Writes ignore the protection of private mappings.
    pub(crate) fn open_memory(&self) -> Result<File, SourceError> {
        let name = format!("task/{}/mem", self.memory.tid());
        let pid = self.process.pid();
        self.process
            .open_for_writing(&name)
            .map_err(|source| process_error(pid, "open the memory of", source))
    }

    /// What the kernel reports about each mapping beyond its layout.
    pub(crate) fn mapping_states(&self) -> Result<Vec<MappingState>, SourceError> {
        let pid = self.process.pid();
        let smaps = self.process.read(&format!("task/{}/smaps", self.memory.tid()));
        let smaps = smaps.map_err(|error| process_error(pid, "read the state of the mappings of", error))?;
        mapping_state::parse(&smaps).map_err(|line| unknown_form(pid, &line))
    }

    /// Whether other processes have pages of these mappings mapped. `ranges` must be all mappings
    /// of a file that this process has.
    pub(crate) fn is_mapped_elsewhere(&self, ranges: &[Range<u64>]) -> io::Result<bool> {
        let pagemap = self.process.open_file(&format!("task/{}/pagemap", self.memory.tid()))?;
        mapped::is_mapped_elsewhere(&pagemap, ranges)
    }

    /// The file that is mapped in the whole range. The kernel shows it only to processes with
    /// `CAP_SYS_ADMIN` or `CAP_CHECKPOINT_RESTORE`.
    pub(crate) fn mapped_file(&self, range: AddressRange) -> io::Result<File> {
        self.process.open_file(&format!("map_files/{:x}-{:x}", range.start(), range.end()))
    }

    /// The file of one of its descriptors.
    pub(crate) fn descriptor_file(&self, number: u32) -> io::Result<MappedFile> {
        let at = self.process.open_path(&format!("task/{}/fd/{number}", self.memory.tid()))?;
        Ok(MappedFile::of(&File::from(at).metadata()?))
    }

    /// Opens that file for reading.
    pub(crate) fn open_descriptor(&self, number: u32) -> io::Result<File> {
        self.process.open_file(&format!("task/{}/fd/{number}", self.memory.tid()))
    }

    /// The files of its shared mappings.
    pub(crate) fn mapped_files(&self) -> &MappedFiles {
        &self.mapped_files
    }

    /// The state of its threads.
    pub(crate) fn threads(&self) -> Threads {
        self.stopped.borrow().threads().clone()
    }

    /// Other processes that share its memory. They are stopped too.
    pub(crate) fn sharers(&self) -> Vec<u32> {
        self.stopped.borrow().sharers().to_vec()
    }

    /// Whether the process was already stopped, by SIGSTOP for example. It stays stopped when it is
    /// released.
    pub(crate) fn was_stopped(&self) -> bool {
        self.stopped.borrow().process_was_stopped()
    }

    /// Whether it is about to stop, because of a SIGSTOP that it has not taken yet.
    pub(crate) fn is_about_to_stop(&self) -> bool {
        let bit = 1 << (libc::SIGSTOP - 1);
        let pending = self.status_mask("ShdPnd");
        let on_their_way = self.stopped.borrow().signals_on_their_way();
        (pending.unwrap_or(0) | on_their_way) & bit != 0
    }

    /// The pending signals that no thread was about to receive, and the signal handling of the
    /// process.
    pub(crate) fn signals(&self) -> Signals {
        let (shared, threads) = self.stopped.borrow().queued_signals().clone();
        let mask = |key: &str| self.status_mask(key).unwrap_or(0);
        Signals { ignored: mask("SigIgn"), caught: mask("SigCgt"), shared, threads }
    }

    /// Changes its pending signals. This changes the signal masks of threads.
    pub(crate) fn settle_signals(&self, settlement: Settlement) -> Result<(), SourceError> {
        self.stopped.borrow().settle_signals(settlement)
    }

    /// Its open files; `None` if we may not read them.
    pub(crate) fn descriptors(&self) -> Option<&Descriptors> {
        self.descriptors.as_ref()
    }

    /// Those of its open files that are connections closed by the other end.
    pub(crate) fn closed_connections(&self, descriptors: &[Descriptor]) -> Vec<u32> {
        connections::closed(&self.process, descriptors)
    }

    /// The pid in the pid namespace of the process.
    pub(crate) fn own_pid(&self) -> u32 {
        // The last number is the pid in the innermost namespace.
        let own_pid =
            self.status("NSpid").and_then(|pids| pids.split_ascii_whitespace().last()?.parse().ok());
        own_pid.unwrap_or(self.process.pid())
    }

    /// Makes one of its threads execute these system calls. This changes the registers of that
    /// thread. The process stays stopped when it is released, until it gets a SIGCONT.
    pub(crate) fn make_calls(&self, foothold: Foothold, steps: Vec<Step>) -> Result<(), InjectionError> {
        let impossible = |why: String| InjectionError::Impossible(why);
        let memory = self.open_memory().map_err(|error| impossible(error.to_string()))?;
        let own_pid = self.own_pid();
        self.stopped.borrow().make_calls(Calls { own_pid, foothold, memory, steps })
    }

    /// Whether the kernel may kill it for a system call (seccomp).
    pub(crate) fn is_confined(&self) -> bool {
        self.status("Seccomp").is_some_and(|mode| mode != "0")
    }

    /// Whether it runs with shadow stacks, which hold a second copy of return addresses.
    pub(crate) fn has_shadow_stacks(&self) -> bool {
        self.status("x86_Thread_features").is_some_and(|features| features.contains("shstk"))
    }

    fn status(&self, key: &str) -> Option<String> {
        self.process.status_text(&format!("task/{}/status", self.memory.tid()), key).ok().flatten()
    }

    /// A set of signals: bit `n - 1` for signal `n`.
    fn status_mask(&self, key: &str) -> Option<u64> {
        self.status(key).and_then(|mask| u64::from_str_radix(&mask, 16).ok())
    }

    /// The areas for restartable sequences, which the kernel writes for each thread.
    pub(crate) fn rseq_areas(&self) -> Vec<(u32, Range<u64>)> {
        self.stopped.borrow().rseq_areas().to_vec()
    }

    /// Sets the registers and signal masks of these threads of the process.
    pub(crate) fn set_registers(&self, threads: Vec<Thread>) -> Result<(), SourceError> {
        self.stopped.borrow().set_registers(threads)
    }

    /// The same as the bytes of the attachment: thread and address of each, 4 and 8 bytes,
    /// little-endian.
    pub(crate) fn rseq_attachment(&self) -> Vec<u8> {
        let areas = self.rseq_areas().into_iter();
        areas.flat_map(|(tid, area)| tid.to_le_bytes().into_iter().chain(area.start.to_le_bytes())).collect()
    }

    /// Identifies the process among all that have had its pid.
    pub(crate) fn run(&self) -> Run {
        let boot_id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
        let stopped = self.stopped.borrow();
        let (process_start, starts) = stopped.starts();
        Run { boot_id: boot_id.trim().to_owned(), process_start, thread_starts: starts.to_vec() }
    }

    /// Its auxiliary vector.
    pub(crate) fn auxv(&self) -> &[u8] {
        &self.auxv
    }

    fn check_it_is_held(&self) -> Result<(), SourceError> {
        if self.stopped.borrow().is_held() {
            Ok(())
        } else {
            Err(SourceError::Released { pid: self.memory.pid() })
        }
    }

    /// A killed process leaves its stop at once. Its memory can be read a little longer, while the
    /// kernel may already be freeing it (it does so when memory is short). So bytes that were read
    /// are only valid if the process is still paused afterwards.
    pub(crate) fn check_it_stands_still(&self) -> Result<(), SourceError> {
        // "PID (NAME) STATE": a name has at most 64 bytes.
        let mut line = [0; 128];
        let length = self
            .state
            .read_at(&mut line, 0)
            .map_err(|error| process_error(self.memory.pid(), "look at", error))?;
        let line = &line[..length];
        let name_end = line.iter().rposition(|byte| *byte == b')');
        match name_end.and_then(|at| line.get(at + 2)) {
            Some(b't') => Ok(()),
            _ => Err(SourceError::LiveProcessEnded { pid: self.memory.pid() }),
        }
    }
}

impl Frozen for FrozenProcess {
    fn address_space(&self) -> &AddressSpace {
        &self.space
    }

    fn origin(&self) -> Origin {
        self.origin.clone()
    }

    fn attachments(&self) -> Vec<Attachment> {
        let stopped = self.stopped.borrow();
        let threads = stopped.threads().to_attachment();
        // The layout of this machine: a core may be written on another machine.
        let layout = stopped.threads().extended_features().map(cpu::register_layout).unwrap_or_default();
        let run = self.run().to_attachment();
        let named = |name: &str, bytes| Attachment { name: name.to_owned(), bytes };
        // Integers and lists can always be encoded.
        let threads = threads.ok().map(|bytes| named(Threads::ATTACHMENT, bytes));
        let signals = self.signals().to_attachment();
        let signals = signals.ok().map(|bytes| named(Signals::ATTACHMENT, bytes));
        let descriptors = self.descriptors.as_ref().and_then(|it| it.to_attachment().ok());
        let descriptors = descriptors.map(|bytes| named(Descriptors::ATTACHMENT, bytes));
        let files = Some(&self.mapped_files).filter(|it| !it.0.is_empty());
        let files = files.and_then(|it| it.to_attachment().ok());
        let files = files.map(|bytes| named(MappedFiles::ATTACHMENT, bytes));
        let run = run.ok().map(|bytes| named(Run::ATTACHMENT, bytes));
        threads
            .into_iter()
            .chain(run)
            .chain(signals)
            .chain(descriptors)
            .chain(files)
            .chain([named(AUXV, self.auxv.clone()), named(RSEQ_ATTACHMENT, self.rseq_attachment())])
            .chain((!layout.is_empty()).then(|| named(REGISTER_LAYOUT, layout)))
            .chain(self.users.map(owner_attachment))
            .collect()
    }

    fn populated(&self, mapping_index: usize) -> Result<Ranges, SourceError> {
        self.check_it_is_held()?;
        let content = &self.memory.contents()[mapping_index];
        // Memory that a killed process has lost must not be taken for zeros.
        self.check_it_stands_still()?;
        Ok(content.populated.from_start_of(content.range.clone()))
    }

    fn left_out(&self) -> Vec<LeftOut> {
        self.memory.contents().iter().flat_map(|content| &content.left_out).copied().collect()
    }

    fn access(&self) -> Access<'_> {
        Access::UntilRelease(self)
    }

    fn release(&self) -> Duration {
        self.stopped.borrow_mut().let_go()
    }
}

impl CopyOut for FrozenProcess {
    /// Cost: memory speed for pieces of a megabyte and more. Each call adds some microseconds.
    fn copy_out(
        &self,
        mapping_index: usize,
        offset_bytes: u64,
        buffer: &mut [u8],
        unreadable: &mut Vec<AddressRange>,
    ) -> Result<(), SourceError> {
        self.check_it_is_held()?;
        let address = self.space.mappings()[mapping_index].range.start().saturating_add(offset_bytes);
        self.memory.copy(address, buffer, unreadable)?;
        self.check_it_stands_still()
    }
}
