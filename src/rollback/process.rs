//! A live process, rolled back in place.
//!
//! ```text
//! hold all threads ─> the same program, run, threads, mappings? ─> compare, decode ──┐
//! let go <── SIGCONT <── registers <── write <── SIGSTOP, in case this program dies <─┘
//! ```
//!
//! To the left of the SIGSTOP everything can fail, and the process goes on as if nothing had been.

use std::ops::Range;
use std::time::{Duration, Instant};

use super::plan::{self, Look, Part, Patch, Target};
use super::{RollBack, RollBackStats, fit, restart};
use crate::address_space::{Mapping, MappingKind};
use crate::error::Error;
use crate::piece::{PIECE_BYTES, overlapping};
use crate::record::Origin;
use crate::sink::{ProcessSink, SinkError};
use crate::source::{Frozen as _, FrozenProcess, ProcessMemory, ProcessSource, RSEQ_ATTACHMENT, SourceError};
use crate::store::read::{Check, Reader};
use crate::threads::{AUXV, MACHINE, NT_PRSTATUS, Thread, Threads};
use crate::track::{Tracking, Untracked, complement, merge};
use crate::units::AddressRange;

/// What a snapshot says about its process.
struct CapturedProcess {
    threads: Threads,
    auxv: Vec<u8>,
    /// Of which threads the kernel knew the areas for restartable sequences; older snapshots do not say.
    rseq: Option<Vec<u8>>,
}

/// What the kernel alone writes of a thread's area for restartable sequences, beside a pointer (bytes 8
/// to 16): on which processor the thread runs.
const RSEQ_POINTER: Range<u64> = 8..16;

impl RollBack<'_> {
    /// Rolls a process back that has mapped more memory since, too: what is new stays as it is, and the
    /// process does not know of it. Only the heap's new part is emptied, as the C library relies on that.
    pub fn leave_new_memory(mut self, leave: bool) -> Self {
        self.leave_new_memory = leave;
        self
    }

    /// How long the threads of a process may take to stop, as [`ProcessSource::stop_timeout`].
    pub fn stop_timeout(mut self, timeout: Duration) -> Self {
        self.stop_timeout = timeout;
        self
    }

    /// Rolls the live process `pid` back to this snapshot of it. It stands still meanwhile; then every thread
    /// goes on from where it stood when it was captured.
    ///
    /// Its private memory and the registers and signal masks of its threads become what they were. A system call
    /// in which a thread waited begins again.
    ///
    /// *Not rolled back* is what the kernel keeps or others see: open files and how far they are read, what was
    /// written to files and sockets, what is in pipes, child processes, timers, pending signals and what is done
    /// on a signal. Memory shared with others is left as it is; what of it differs is in
    /// [`RollBackStats::left_shared`]. What was excluded from the snapshot is left as it is.
    ///
    /// It must be the same run of the same program with the same threads, and have all mappings of the snapshot
    /// where they were. It must not have got others, unless [they may stay](Self::leave_new_memory); the stack
    /// may have grown.
    ///
    /// If this program is killed meanwhile, the process is as it was, or rolled back, or stands still (state
    /// T): then roll it back once more, and `kill -CONT PID` lets it go on. A process that stood still before
    /// does so afterwards ([`RollBackStats::is_stopped`]). One that handles SIGCONT gets one.
    ///
    /// Cost: copying its memory out and comparing it takes 3 GB/s a core, while it stands still; what differs is
    /// decoded and its pages are written.
    ///
    /// ```no_run
    /// # let store = stillframe::Store::open("vault")?;
    /// let pid = 4711;
    /// let before = store.find("web-1~3")?;
    /// let stats = store.roll_back(before)?.process(pid)?;
    /// println!("{} bytes written, still for {:?}", stats.written_bytes, stats.paused);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`SinkError::DoesNotFit`] with what differs, [`SinkError::NoRollBack`] for a snapshot or a process where
    /// this is impossible, [`Error::Source`] when it cannot be stopped, damage, [`Error::Interrupted`]:
    /// the process is as it was. [`SinkError::InPart`] when writing failed.
    pub fn process(self, pid: u32) -> Result<RollBackStats, Error> {
        let begun = Instant::now();
        let CapturedProcess { threads, auxv, rseq } = self.captured_process(pid)?;
        let held = ProcessSource::new(pid).stop_timeout(self.stop_timeout);
        let held = held.hold(&self.progress).map_err(|error| refused(pid, error))?;
        if let Some(sharer) = held.sharers().first() {
            let why = format!(
                "process {sharer} shares its memory without being a thread of it, and would not be rolled back"
            );
            return Err(SinkError::NoRollBack { pid, why }.into());
        }
        self.check_it_fits(pid, &held, &threads, &auxv)?;
        if rseq.is_some_and(|rseq| rseq != held.rseq_attachment()) {
            // Its C library would tell the kernel a second time, which ends the program.
            let why = "a thread was just starting when it was captured".to_owned();
            return Err(SinkError::NoRollBack { pid, why }.into());
        }
        let grown_heap = self.check_layout(pid, &held)?;

        let mappings = held.address_space().mappings();
        let memory = HeldMemory::new(pid, &self, &held)?;
        let mut plan = plan::plan(
            self.shared,
            self.record.region_size.bytes(),
            self.check,
            &self.progress,
            self.parts().collect(),
            &memory,
        )?;
        let mapping_of = |patch: &Patch| {
            let at = mappings.partition_point(|it| it.range.end() <= patch.at);
            mappings.get(at).filter(|it| it.range.start() <= patch.at)
        };
        let mut left_shared: Vec<Mapping> = Vec::new();
        plan.patches.retain(|patch| match mapping_of(patch) {
            Some(mapping) if mapping.protection.shared => {
                if left_shared.last() != Some(mapping) {
                    left_shared.push(mapping.clone());
                }
                false
            }
            _ => true,
        });
        plan.patches.extend(memory.zeros_for(&grown_heap));
        let threads = threads.threads.into_iter().map(|mut thread| {
            restart::prepare(&mut thread);
            thread
        });
        let threads = threads.collect();

        let sink = ProcessSink::new(pid, held.open_memory()?)?;
        let is_read_only = |patch: &&Patch| mapping_of(patch).is_some_and(|it| !it.protection.write);
        if let Some(patch) = plan.patches.iter().find(is_read_only) {
            sink.try_to_write(patch.at)?;
        }
        // What was read counts only if it stood still, and was not killed meanwhile.
        held.check_it_stands_still().map_err(|error| refused(pid, error))?;
        self.progress.check()?;

        let was_stopped = held.was_stopped();
        let is_stopped = was_stopped || held.is_about_to_stop();
        if !was_stopped {
            sink.stands_still()?;
        }
        let write = || -> Result<plan::Done, Error> {
            let done = plan.write(
                |patch| patch.at,
                |at, offset, bytes| Ok(sink.write_at(*at + offset as u64, bytes)?),
            )?;
            held.set_registers(threads)?;
            if !is_stopped {
                sink.goes_on()?;
            }
            Ok(done)
        };
        let done = write().map_err(|source| match held.check_it_stands_still() {
            Ok(()) => SinkError::InPart { pid, source: Box::new(source) }.into(),
            Err(error) => refused(pid, error),
        })?;
        let paused = held.release();
        let tracking = Tracking::Rescan(Untracked::NoTracker);
        let stats = self.stats(begun, self.space.image_bytes(), tracking, done);
        Ok(RollBackStats { paused, is_stopped, left_shared, ..stats })
    }

    /// What the snapshot says about the process.
    fn captured_process(&self, pid: u32) -> Result<CapturedProcess, Error> {
        let none = |why: &str| SinkError::NoRollBack { pid, why: why.to_owned() };
        let mut reader = Reader::new(self.shared, Check::Full);
        let mut read = |name: &str| reader.attachment(&self.record, name);
        let is_process = matches!(self.record.origin, Origin::Process { .. });
        let threads = read(Threads::ATTACHMENT)?.filter(|_| is_process);
        let threads = threads.ok_or_else(|| {
            none("the snapshot is not one of a live process; it has no registers to go back to")
        })?;
        let threads = Threads::from_attachment(&threads)
            .map_err(|error| none(&format!("the registers in the snapshot cannot be read: {error}")))?;
        if threads.machine != MACHINE {
            return Err(none("the snapshot was taken on a machine of another kind").into());
        }
        let auxv = read(AUXV)?.unwrap_or_default();
        Ok(CapturedProcess { threads, auxv, rseq: read(RSEQ_ATTACHMENT)? })
    }

    /// An error unless this is the run that was captured, with the threads it had.
    fn check_it_fits(
        &self,
        pid: u32,
        held: &FrozenProcess,
        before: &Threads,
        auxv: &[u8],
    ) -> Result<(), SinkError> {
        let does_not_fit = |differences| Err(SinkError::DoesNotFit { pid, differences, only_new: false });
        if let (Origin::Process { path: Some(before), .. }, Origin::Process { path: Some(now), .. }) =
            (&self.record.origin, held.origin())
        {
            let undeleted = |path: &std::path::Path| {
                let path = path.to_string_lossy().into_owned();
                path.strip_suffix(" (deleted)").map(str::to_owned).unwrap_or(path)
            };
            let (before, now) = (undeleted(before), undeleted(&now));
            if before != now {
                return does_not_fit(vec![format!("it runs {now}, the snapshot is of {before}")]);
            }
        }
        let now = held.threads();
        let has = |threads: &Threads, tid| threads.threads.iter().any(|thread| thread.tid == tid);
        let named = |it: &Thread| format!("thread {} ({})", it.tid, String::from_utf8_lossy(&it.name));
        let ended = before.threads.iter().filter(|it| !has(&now, it.tid));
        let begun = now.threads.iter().filter(|it| !has(before, it.tid));
        let mut differences: Vec<String> = ended.map(|it| format!("{} has ended", named(it))).collect();
        differences.extend(begun.map(|it| format!("{} is new", named(it))));
        if auxv != held.auxv() {
            differences.insert(0, "it is another run of the program".to_owned());
        }
        if !differences.is_empty() {
            return does_not_fit(differences);
        }
        if held.has_shadow_stacks() {
            let why = "it runs with shadow stacks, which cannot be set back".to_owned();
            return Err(SinkError::NoRollBack { pid, why });
        }
        let form = |thread: &Thread| -> Vec<(u32, usize)> {
            thread.registers.iter().map(|set| (set.note_type, set.bytes.len())).collect()
        };
        let forms = |threads: &Threads| threads.threads.iter().map(form).collect::<Vec<_>>();
        let general = now.threads.iter().filter_map(|thread| thread.register_set(NT_PRSTATUS));
        let is_known = |set: &[u8]| restart::general_bytes().is_none_or(|bytes| bytes == set.len());
        if forms(before) != forms(&now) || !general.into_iter().all(is_known) {
            return Err(SinkError::NoRollBack {
                pid,
                why: "its registers are not of the form that this program can set".to_owned(),
            });
        }
        Ok(())
    }

    /// An error unless the mappings are there. Answers by what the heap has grown.
    fn check_layout(&self, pid: u32, held: &FrozenProcess) -> Result<Vec<Range<u64>>, SinkError> {
        let fit::Fit { missing: mut differences, new, grown_heap } =
            fit::compare(&self.space, held.address_space());
        let only_new = differences.is_empty();
        if !self.leave_new_memory {
            differences.extend(new);
        }
        match differences.is_empty() {
            true => Ok(grown_heap),
            false => Err(SinkError::DoesNotFit { pid, differences, only_new }),
        }
    }

    /// All but what the kernel provides.
    fn parts(&self) -> impl Iterator<Item = Part> {
        self.work().filter_map(|(table, place)| {
            let mapping = &self.space.mappings()[place.mapping_index];
            let at = mapping.range.start() + place.offset_bytes;
            (mapping.kind != MappingKind::Kernel).then_some(Part { table, place, at, look: Look::Everything })
        })
    }
}

/// What the errors of a capture are called here.
fn refused(pid: u32, error: SourceError) -> Error {
    match error {
        SourceError::Uncapturable { why, .. } => SinkError::NoRollBack { pid, why }.into(),
        SourceError::ProcessEnded { .. } => {
            SinkError::NoRollBack { pid, why: "it ended meanwhile".to_owned() }.into()
        }
        error => error.into(),
    }
}

/// The memory of a process that stands still.
struct HeldMemory {
    pid: u32,
    memory: ProcessMemory,
    /// Where there may be anything but zeros.
    populated: Vec<Range<u64>>,
    /// What the snapshot does not have: zeros in its tables.
    left_out: Vec<Range<u64>>,
    /// This, and what the kernel writes by itself.
    left_alone: Vec<Range<u64>>,
}

impl HeldMemory {
    fn new(pid: u32, roll_back: &RollBack<'_>, held: &FrozenProcess) -> Result<HeldMemory, SourceError> {
        let mut populated = Vec::new();
        for (index, mapping) in held.address_space().mappings().iter().enumerate() {
            if mapping.captured {
                let start = mapping.range.start();
                let found = held.populated(index)?;
                populated.extend(found.into_iter().map(|it| start + it.start..start + it.end));
            }
        }
        merge(&mut populated);
        let space = &roll_back.space;
        let left_out = space.excluded().iter().chain(space.unreadable());
        let mut left_out: Vec<_> = left_out.map(|range| range.start()..range.end()).collect();
        merge(&mut left_out);
        let mut left_alone = left_out.clone();
        for (_, area) in held.rseq_areas() {
            let pointer = area.start + RSEQ_POINTER.start..area.start + RSEQ_POINTER.end;
            left_alone.extend([area.start..pointer.start, pointer.end..area.end]);
        }
        merge(&mut left_alone);
        Ok(HeldMemory { pid, memory: held.process_memory(), populated, left_out, left_alone })
    }

    /// Patches that empty what is there of these ranges.
    fn zeros_for(&self, ranges: &[Range<u64>]) -> Vec<Patch> {
        let there = ranges.iter().flat_map(|range| overlapping(&self.populated, range.clone()));
        there
            .flat_map(|range| {
                let starts = range.clone().step_by(PIECE_BYTES);
                starts.map(move |at| (at, (range.end - at).min(PIECE_BYTES as u64)))
            })
            .map(|(at, length)| Patch::of_zeros(at, usize::try_from(length).unwrap_or(PIECE_BYTES)))
            .collect()
    }

    fn part<'b>(&self, at: u64, buffer: &'b mut [u8], range: &Range<u64>) -> &'b mut [u8] {
        let offset = |address: u64| usize::try_from(address - at).unwrap_or(usize::MAX);
        &mut buffer[offset(range.start)..offset(range.end)]
    }
}

impl Target for HeldMemory {
    fn bytes<'b>(&'b self, at: u64, length: usize, buffer: &'b mut Vec<u8>) -> Result<&'b [u8], Error> {
        let window = at..at + length as u64;
        buffer.resize(length, 0);
        let there: Vec<_> = overlapping(&self.populated, window.clone()).collect();
        for range in complement(&there, window.clone()) {
            self.part(at, buffer, &range).fill(0);
        }
        let mut unreadable = Vec::new();
        for range in there {
            self.memory.copy(range.start, self.part(at, buffer, &range), &mut unreadable)?;
        }
        for range in overlapping(&self.left_out, window) {
            self.part(at, buffer, &range).fill(0);
        }
        let is_left_out = |range: &AddressRange| {
            let overlap = overlapping(&self.left_out, range.start()..range.end());
            overlap.map(|it| it.end - it.start).sum::<u64>() == range.length_bytes()
        };
        match unreadable.into_iter().find(|range| !is_left_out(range)) {
            None => Ok(buffer),
            Some(range) => Err(SinkError::DoesNotFit {
                pid: self.pid,
                differences: vec![format!("{range} cannot be read any more")],
                only_new: false,
            }
            .into()),
        }
    }

    fn is_absent(&self, range: Range<u64>) -> bool {
        overlapping(&self.populated, range).next().is_none()
    }

    fn left_alone(&self) -> &[Range<u64>] {
        &self.left_alone
    }
}
