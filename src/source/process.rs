//! A live Linux process as a source.
//!
//! Opening it stops all its threads (`stop.rs`), reads what is mapped (`maps.rs`) and what is there
//! (the pagemap); its memory is then copied with `process_vm_readv` until it is released. Nothing
//! is written to the process and no code runs in it.

use std::cell::RefCell;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::Duration;

use super::holes::data_ranges;
use super::maps;
use super::proc_directory::{ProcDirectory, says_gone};
use super::smaps::{self, MappingState};
use super::stop::StoppedProcess;
use super::{Attachment, CopyOut, Frozen, Memory, Source, SourceError, owner_attachment};
use crate::address_space::{AddressSpace, Mapping};
use crate::record::Origin;
use crate::run::Run;
use crate::sys::{pagemap, process_memory};
use crate::threads::{AUXV, Thread, Threads};
use crate::track::{SoftDirty, TrackError, Tracker, Untracked};
use crate::units::AddressRange;

/// A live Linux process, named by its pid.
///
/// It stands still from [`Source::open`] to [`Frozen::release`], or until what was opened is
/// dropped; a process that was stopped before stays stopped. Should this program be killed
/// meanwhile, the kernel lets the process go. A system call that a signal handler would interrupt may
/// return early with `EINTR`, as it may after SIGSTOP and SIGCONT.
///
/// Attachments: `threads` (see [`Threads`]); `auxv`, the raw auxiliary vector; `rseq`, where threads have their
/// areas for restartable sequences; `run`, when process and threads were started; `owner`, its real and effective user.
///
/// The kernel allows it for processes of the same user, subject to
/// `/proc/sys/kernel/yama/ptrace_scope`, or with the capability `CAP_SYS_PTRACE`.
///
/// If it is a child of this program, wait for it between captures only: a stop shows to `waitpid` as
/// that of a child, whatever the options, and `std::process::Child` takes it for an end.
///
/// What another process writes to memory shared with this one changes while this one stands still.
/// Pages that a `userfaultfd` would fill on first touch count as zeros.
///
/// ```
/// use stillframe::{ProcessSource, Source};
/// let mut child = std::process::Command::new("sleep").arg("60").spawn()?;
/// let source = ProcessSource::new(child.id());
/// let frozen = source.open()?;
/// assert!(frozen.address_space().image_bytes() > 0);
/// let stood_still = frozen.release();
/// # assert!(!stood_still.is_zero());
/// # child.kill()?;
/// # child.wait()?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug)]
pub struct ProcessSource {
    pid: u32,
    tracker: Result<Arc<SoftDirty>, Untracked>,
}

impl ProcessSource {
    /// The process with this pid. Nothing is done to it yet.
    pub fn new(pid: u32) -> Self {
        ProcessSource { pid, tracker: Err(Untracked::NoTracker) }
    }

    /// Lets the kernel note what the process writes, by soft-dirty marks: then only that is read.
    /// Use the same source for all captures of the process.
    ///
    /// There is one set of marks for each process: whoever else uses them (CRIU does) must not do so
    /// meanwhile. Many kernels have none, which is found out by trying.
    ///
    /// # Errors
    ///
    /// [`TrackError::Unavailable`] with the reason.
    pub fn track_writes(mut self) -> Result<Self, TrackError> {
        self.tracker = Ok(Arc::new(SoftDirty::new(self.pid)?));
        Ok(self)
    }

    /// The same where it is possible. Where it is not, everything is read, and
    /// [`Capture::tracking`](crate::Capture::tracking) says why.
    pub fn track_writes_if_possible(mut self) -> Self {
        let tracker = SoftDirty::new(self.pid).map(Arc::new);
        self.tracker = tracker.map_err(|error| Untracked::Unavailable(error.to_string()));
        self
    }

    /// The pid it was made with.
    pub fn pid(&self) -> u32 {
        self.pid
    }
}

impl ProcessSource {
    /// Stops the process.
    pub(crate) fn hold(&self) -> Result<FrozenProcess, SourceError> {
        let pid = self.pid;
        let process = Arc::new(find(pid)?);
        // Whatever takes time and does not change is read before the process stands still.
        let origin = Origin::Process { pid, path: process.executable(), command: process.command_line() };
        let users = process.users();
        let stopped = StoppedProcess::stop(&process)?;

        // The first thread may have ended before the others, and then has no memory any more.
        let Some(tid) = stopped.threads().threads.first().map(|thread| thread.tid) else {
            return Err(SourceError::ProcessEnded { pid });
        };
        let read = |name: &str, action| {
            process.read(&format!("task/{tid}/{name}")).map_err(|error| process_error(pid, action, error))
        };
        let maps = read("maps", "read the mappings of")?;
        let auxv = read("auxv", "read the auxiliary vector of")?;
        let state = process
            .open_file(&format!("task/{tid}/stat"))
            .map_err(|error| process_error(pid, "look at", error))?;
        // Without it everything counts as populated.
        let pagemap = process.open_file(&format!("task/{tid}/pagemap")).ok();

        let lines = maps::parse(&maps).map_err(|line| SourceError::Uncapturable {
            pid,
            why: format!("a line of /proc/{pid}/maps has an unknown form: {line:?}"),
        })?;
        let absent_is_zero = lines.iter().map(|line| line.absent_is_zero).collect();
        let space = AddressSpace::new(lines.into_iter().map(|line| line.mapping).collect())?;
        let frozen = FrozenProcess {
            process,
            memory: ProcessMemory { pid, tid },
            space,
            absent_is_zero,
            origin,
            users,
            auxv,
            pagemap,
            state,
            stopped: RefCell::new(stopped),
        };
        frozen.check_it_stands_still()?;
        Ok(frozen)
    }
}

impl Source for ProcessSource {
    fn open(&self) -> Result<Box<dyn Frozen + '_>, SourceError> {
        Ok(Box::new(self.hold()?))
    }

    fn tracker(&self) -> Result<Arc<dyn Tracker>, Untracked> {
        match &self.tracker {
            Ok(tracker) => Ok(tracker.clone()),
            Err(why) => Err(why.clone()),
        }
    }
}

/// The process, if it is one that can be captured.
fn find(pid: u32) -> Result<ProcDirectory, SourceError> {
    let uncapturable = |why: String| SourceError::Uncapturable { pid, why };
    let look_error = |error: io::Error| {
        if says_gone(&error) {
            SourceError::NoSuchProcess { pid }
        } else {
            SourceError::Process { pid, action: "look up", source: error }
        }
    };
    if !std::path::Path::new("/proc/self/stat").exists() {
        let source = io::Error::other("/proc is not mounted; `mount -t proc proc /proc` does it");
        return Err(SourceError::Process { pid, action: "look up", source });
    }
    let process = ProcDirectory::open(pid).map_err(look_error)?;
    let thread_group = process.status_number("status", "Tgid").map_err(look_error)?;
    if thread_group == std::process::id() {
        return Err(uncapturable(
            "it is this process itself; name it in another process, or use its bytes as a slice".to_owned(),
        ));
    }
    if thread_group != pid {
        return Err(uncapturable(format!("it is a thread of process {thread_group}; name that one")));
    }
    let stat = process.stat().map_err(look_error)?;
    if stat.is_kernel_thread {
        return Err(uncapturable("it is a thread of the kernel and has no memory of its own".to_owned()));
    }
    if stat.is_dead() && stat.thread_count <= 1 {
        return Err(uncapturable(
            "it has ended and only waits for its parent to take notice (a zombie)".to_owned(),
        ));
    }
    Ok(process)
}

/// Why the kernel refused something about a thread of a process.
pub(super) fn refusal(
    process: &ProcDirectory,
    tid: u32,
    action: &'static str,
    error: io::Error,
) -> SourceError {
    let pid = process.pid();
    let tracer = process.status_number(&format!("task/{tid}/status"), "TracerPid").unwrap_or(0);
    if tracer != 0 {
        let name = std::fs::read(format!("/proc/{tracer}/comm")).unwrap_or_default();
        let name = String::from_utf8_lossy(name.trim_ascii_end()).into_owned();
        let why = format!("process {tracer} ({name}) traces it already; end that debugger or capture first");
        return SourceError::Uncapturable { pid, why };
    }
    if matches!(error.raw_os_error(), Some(libc::EPERM | libc::EACCES)) {
        SourceError::NotPermitted { pid, action, advice: advice() }
    } else {
        process_error(pid, action, error)
    }
}

/// What helps when the kernel does not permit it.
fn advice() -> String {
    let mut advice =
        "do it as the user that the process runs as, or with the capability CAP_SYS_PTRACE (as root)"
            .to_owned();
    let scope = std::fs::read_to_string("/proc/sys/kernel/yama/ptrace_scope").unwrap_or_default();
    let meaning = match scope.trim() {
        "1" => "only a parent may stop its children",
        "2" => "only CAP_SYS_PTRACE helps",
        "3" => "nobody may stop any process until the next boot",
        _ => return advice,
    };
    advice += &format!("; /proc/sys/kernel/yama/ptrace_scope is {}: {meaning}", scope.trim());
    advice
}

fn process_error(pid: u32, action: &'static str, source: io::Error) -> SourceError {
    if says_gone(&source) {
        SourceError::ProcessEnded { pid }
    } else {
        SourceError::Process { pid, action, source }
    }
}

/// The attachment that says which threads had told the kernel where their area for restartable sequences is.
pub(crate) const RSEQ_ATTACHMENT: &str = "rseq";

/// The kernel's number for files in memory: shared memory, memfd, /dev/shm.
const TMPFS_MAGIC: rustix::fs::FsWord = 0x0102_1994;

/// A process that stands still.
pub(crate) struct FrozenProcess {
    process: Arc<ProcDirectory>,
    memory: ProcessMemory,
    space: AddressSpace,
    /// For each mapping whether a page that is not there is one of zeros.
    absent_is_zero: Vec<bool>,
    origin: Origin,
    users: Option<(u32, u32)>,
    auxv: Vec<u8>,
    pagemap: Option<File>,
    /// `/proc/PID/task/TID/stat`, which is made anew for every read.
    state: File,
    stopped: RefCell<StoppedProcess>,
}

/// The memory of a process, by a thread of it that is alive.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ProcessMemory {
    pid: u32,
    tid: u32,
}

impl FrozenProcess {
    /// Its memory, which any thread may read, but which counts only if it
    /// [stands still](Self::check_it_stands_still) afterwards.
    pub(crate) fn process_memory(&self) -> ProcessMemory {
        self.memory
    }

    /// The same for writing, whatever the protection of a private mapping.
    pub(crate) fn open_memory(&self) -> Result<File, SourceError> {
        let name = format!("task/{}/mem", self.memory.tid);
        let pid = self.process.pid();
        self.process
            .open_for_writing(&name)
            .map_err(|source| process_error(pid, "open the memory of", source))
    }

    /// What the kernel knows of each mapping beyond its layout.
    pub(crate) fn mapping_states(&self) -> Result<Vec<MappingState>, SourceError> {
        let pid = self.process.pid();
        let smaps = self.process.read(&format!("task/{}/smaps", self.memory.tid));
        let smaps = smaps.map_err(|error| process_error(pid, "read the state of the mappings of", error))?;
        smaps::parse(&smaps).map_err(|line| SourceError::Uncapturable {
            pid,
            why: format!("a line of /proc/{pid}/smaps has an unknown form: {line:?}"),
        })
    }

    /// The file that is mapped in all of a range. The kernel shows it only to those with `CAP_SYS_ADMIN` or
    /// `CAP_CHECKPOINT_RESTORE`.
    pub(crate) fn mapped_file(&self, range: AddressRange) -> io::Result<File> {
        self.process.open_file(&format!("map_files/{:x}-{:x}", range.start(), range.end()))
    }

    /// Its threads as they stand.
    pub(crate) fn threads(&self) -> Threads {
        self.stopped.borrow().threads().clone()
    }

    /// Whether the process stood still before, by SIGSTOP say, and will when it is let go.
    pub(crate) fn was_stopped(&self) -> bool {
        self.stopped.borrow().process_was_stopped()
    }

    /// Whether it is about to stand still, because of a SIGSTOP that it has not taken yet.
    pub(crate) fn is_about_to_stop(&self) -> bool {
        let bit = 1 << (libc::SIGSTOP - 1);
        let pending = self.status("ShdPnd").and_then(|mask| u64::from_str_radix(&mask, 16).ok());
        let on_their_way = self.stopped.borrow().signals_on_their_way();
        (pending.unwrap_or(0) | on_their_way) & bit != 0
    }

    /// Whether it runs with shadow stacks, where return addresses stand a second time.
    pub(crate) fn has_shadow_stacks(&self) -> bool {
        self.status("x86_Thread_features").is_some_and(|features| features.contains("shstk"))
    }

    fn status(&self, key: &str) -> Option<String> {
        self.process.status_text(&format!("task/{}/status", self.memory.tid), key).ok().flatten()
    }

    /// Where the kernel writes for the threads by itself: their areas for restartable sequences.
    pub(crate) fn rseq_areas(&self) -> Vec<(u32, Range<u64>)> {
        self.stopped.borrow().rseq_areas().to_vec()
    }

    /// Gives these threads, all of which are its own, their registers and signal masks.
    pub(crate) fn set_registers(&self, threads: Vec<Thread>) -> Result<(), SourceError> {
        self.stopped.borrow().set_registers(threads)
    }

    /// The same as it is attached: thread and address of each, 4 and 8 bytes, little-endian.
    pub(crate) fn rseq_attachment(&self) -> Vec<u8> {
        let areas = self.rseq_areas().into_iter();
        areas.flat_map(|(tid, area)| tid.to_le_bytes().into_iter().chain(area.start.to_le_bytes())).collect()
    }

    /// Which process it is, among all that have had its pid.
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
            Err(SourceError::Released { pid: self.memory.pid })
        }
    }

    /// A killed process leaves its stop at once, while its memory can be read a little longer and
    /// may be in the course of being taken apart (the kernel does so when memory is short). So
    /// what was read counts only if the process stands still afterwards.
    pub(crate) fn check_it_stands_still(&self) -> Result<(), SourceError> {
        // "PID (NAME) STATE": a name has at most 64 bytes.
        let mut line = [0; 128];
        let length = self
            .state
            .read_at(&mut line, 0)
            .map_err(|error| process_error(self.memory.pid, "look at", error))?;
        let line = &line[..length];
        let name_end = line.iter().rposition(|byte| *byte == b')');
        match name_end.and_then(|at| line.get(at + 2)) {
            Some(b't') => Ok(()),
            _ => Err(SourceError::ProcessEnded { pid: self.memory.pid }),
        }
    }

    /// The pages of private anonymous memory that are there, or `None` if that cannot be known.
    fn present_pages(&self, mapping: &Mapping) -> Option<Vec<Range<u64>>> {
        let start = mapping.range.start();
        let found = pagemap::populated(self.pagemap.as_ref()?, start..mapping.range.end()).ok()?;
        Some(found.into_iter().map(|found| found.start - start..found.end - start).collect())
    }

    /// What is there of shared memory, which is a file in memory, or `None` if that cannot be known:
    /// the kernel shows the file only to those with `CAP_SYS_ADMIN` or `CAP_CHECKPOINT_RESTORE`.
    ///
    /// Its holes are not merely slow to read: reading one through the mapping would fill it, and
    /// the process would need more memory because it was captured.
    fn shared_data(&self, mapping: &Mapping) -> Option<Vec<Range<u64>>> {
        let (start, end) = (mapping.range.start(), mapping.range.end());
        let file = self.process.open_file(&format!("map_files/{start:x}-{end:x}")).ok()?;
        // A file on a disk may have been written through the mapping where the disk has a hole yet.
        if rustix::fs::fstatfs(&file).ok()?.f_type != TMPFS_MAGIC {
            return None;
        }
        let first = mapping.file_offset_bytes;
        let within = first..first.checked_add(mapping.range.length_bytes())?;
        let mut found = data_ranges(&file, within.clone()).ok()?;
        // Behind the end of the file nothing can be read, which copying finds out and reports.
        let page_bytes = rustix::param::page_size() as u64;
        let file_end = file.metadata().ok()?.len().checked_next_multiple_of(page_bytes)?;
        if file_end < within.end {
            found.push(file_end.max(first)..within.end);
        }
        Some(found.into_iter().map(|found| found.start - first..found.end - first).collect())
    }
}

impl ProcessMemory {
    /// Fills `buffer` from `address` on, with zeros where nothing can be read.
    pub(crate) fn copy(
        &self,
        mut address: u64,
        mut buffer: &mut [u8],
        unreadable: &mut Vec<AddressRange>,
    ) -> Result<(), SourceError> {
        let page_bytes = rustix::param::page_size();
        while !buffer.is_empty() {
            let done_bytes = match process_memory::read(self.tid, address, buffer) {
                Ok(copied_bytes) if copied_bytes > 0 => copied_bytes,
                Err(error) if error.raw_os_error() == Some(libc::EINTR) => continue,
                Err(error)
                    if !matches!(error.raw_os_error(), Some(libc::EFAULT | libc::EIO | libc::ENOMEM)) =>
                {
                    return Err(process_error(self.pid, "read the memory of", error));
                }
                // The page at `address` cannot be read; the next one may.
                _ => {
                    let into_page = usize::try_from(address % page_bytes as u64).unwrap_or(0);
                    let skipped = (page_bytes - into_page).min(buffer.len());
                    buffer[..skipped].fill(0);
                    unreadable.extend(AddressRange::with_length(address, skipped as u64));
                    skipped
                }
            };
            buffer = &mut buffer[done_bytes..];
            address = address.saturating_add(done_bytes as u64);
        }
        Ok(())
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
        let threads = self.stopped.borrow().threads().to_attachment();
        let run = self.run().to_attachment();
        let named = |name: &str, bytes| Attachment { name: name.to_owned(), bytes };
        // Integers and lists can always be encoded.
        let threads = threads.ok().map(|bytes| named(Threads::ATTACHMENT, bytes));
        let run = run.ok().map(|bytes| named(Run::ATTACHMENT, bytes));
        threads
            .into_iter()
            .chain(run)
            .chain([named(AUXV, self.auxv.clone()), named(RSEQ_ATTACHMENT, self.rseq_attachment())])
            .chain(self.users.map(owner_attachment))
            .collect()
    }

    fn populated(&self, mapping_index: usize) -> Result<Vec<Range<u64>>, SourceError> {
        self.check_it_is_held()?;
        let mapping = &self.space.mappings()[mapping_index];
        let found = if self.absent_is_zero[mapping_index] {
            self.present_pages(mapping)
        } else if mapping.protection.shared && mapping.captured {
            self.shared_data(mapping)
        } else {
            None
        };
        // What a killed process does not have any more must not pass for zeros.
        self.check_it_stands_still()?;
        Ok(found.unwrap_or_else(|| std::iter::once(0..mapping.range.length_bytes()).collect()))
    }

    fn memory(&self) -> Memory<'_> {
        Memory::UntilRelease(self)
    }

    fn release(&self) -> Duration {
        self.stopped.borrow_mut().let_go()
    }
}

impl CopyOut for FrozenProcess {
    /// Cost: memory speed in pieces of a megabyte and more; each call adds some microseconds.
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
