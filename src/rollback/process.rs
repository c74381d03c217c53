//! A live process, rolled back in place.
//!
//! ```text
//! hold all threads ─> check: each in its own file ─> compare, decode ─> check what is to be written ─┐
//! let go <── SIGCONT <── registers <── write (`write.rs`) <── SIGSTOP, in case this program dies <───┘
//! ```
//!
//! To the left of the SIGSTOP everything can fail, and the process goes on as if nothing had been. A check is
//! a file with one function `check`, which gets the [`Attempt`] and answers with a refusal.

use std::ops::Range;
use std::time::{Duration, Instant};

use super::attempt::Attempt;
use super::captured::CapturedProcess;
use super::held_memory::HeldMemory;
use super::page_state::{self, PageStates};
use super::plan::{self, Look, Part};
use super::{
    Rollback, RollbackStats, descriptors, devices, fit, guards, identity, injection, memory_limit, registers,
    same_threads, shared, signals, write,
};
use crate::address_space::MappingKind;
use crate::error::{Error, RollbackError};
use crate::ranges::merge;
use crate::source::{Frozen as _, LiveProcessSource, SourceError};
use crate::track::{RescanReason, Tracking};
use crate::units::AddressRange;

impl Rollback<'_> {
    /// Rolls a process back that has mapped more memory since, too: what is new stays as it is, and the
    /// process does not know of it. Only the heap's new part is emptied, as the C library relies on that.
    pub fn leave_new_memory(mut self, leave: bool) -> Self {
        self.leave_new_memory = leave;
        self
    }

    /// How long the threads of a process may take to stop, as [`LiveProcessSource::stop_timeout`].
    pub fn stop_timeout(mut self, timeout: Duration) -> Self {
        self.stop_timeout = timeout;
        self
    }

    /// Rolls a process back although memory that it shares with others differs: that stays as it is.
    /// Memory that no other process has is rolled back in any case.
    pub fn leave_shared_memory(mut self, leave: bool) -> Self {
        self.leave_shared_memory = leave;
        self
    }

    /// Rolls a process back although a number of an open file that it writes to stands for another file now. Descriptors
    /// are not rolled back; [`RollbackStats::left_descriptors`] says what differs.
    pub fn leave_descriptors(mut self, leave: bool) -> Self {
        self.leave_descriptors = leave;
        self
    }

    /// Sets the positions of regular files back, where a number still stands for the file that it stood for. Who shares
    /// them, as a forked child does, sees it.
    pub fn seek_files(mut self, seek: bool) -> Self {
        self.seek_files = seek;
        self
    }

    /// Rolls a process back although it has memory that the kernel or a device works with, too: rings of io_uring,
    /// virtual processors of KVM, memory of devices. Those stay as they are, and hardly any program bears that.
    pub fn leave_devices(mut self, leave: bool) -> Self {
        self.leave_devices = leave;
        self
    }

    /// Rolls the live process `pid` back to this snapshot of it. It stands still meanwhile; then every thread
    /// goes on from where it stood when it was captured.
    ///
    /// Its private memory and the registers and signal masks of its threads become what they were. A system call
    /// in which a thread waited begins again.
    ///
    /// Signals that were on their way to it are again; those that it has sent to itself since are not, nor is what the
    /// kernel was about to raise for an instruction. What others have sent since stays.
    ///
    /// *Not rolled back* is what the kernel keeps or others see: open files and how far they are read
    /// (but see [`seek_files`](Self::seek_files)), what was written to files and sockets, what is in pipes, child
    /// processes and timers. What was excluded from the snapshot is left as it is. It is refused
    /// where a descriptor that it wrote to stands for another file now, unless
    /// [that may stay](Self::leave_descriptors), where it handles other signals than then, and where
    /// [the kernel works with its memory](Self::leave_devices).
    ///
    /// Memory that could be shared and that no other process has is rolled back as private memory is. Where others
    /// have it, or may have it, and it differs, the process is refused, unless
    /// [it may be left](Self::leave_shared_memory). Files that are mapped shared are left as they are, unless another
    /// process maps them too. [`RollbackStats::left_shared`] has what was left.
    ///
    /// It must be the same run of the same program with the same threads, and have all mappings of the snapshot
    /// where they were. It must not have got others, unless [they may stay](Self::leave_new_memory); the stack
    /// may have grown.
    ///
    /// If this program is killed meanwhile, the process is as it was, or rolled back, or stands still (state
    /// T): then roll it back once more, and `kill -CONT PID` lets it go on. A process that stood still before
    /// does so afterwards ([`RollbackStats::is_stopped`]). One that handles SIGCONT gets one.
    ///
    /// Cost: copying its memory out and comparing it takes 3 GB/s a core, while it stands still; what differs is
    /// decoded and its pages are written.
    ///
    /// ```no_run
    /// # let store = stillframe::Store::open("vault")?;
    /// let pid = 4711;
    /// let before = store.find("web-1~3")?;
    /// let stats = store.rollback(before)?.live_process(pid)?;
    /// println!("{} bytes written, still for {:?}", stats.written_bytes, stats.paused);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`RollbackError::DoesNotFit`] with what differs, [`RollbackError::NoRollBack`] for a snapshot or a process where
    /// this is impossible, [`Error::Source`] when it cannot be stopped, damage, [`Error::Interrupted`]:
    /// the process is as it was. [`RollbackError::InPart`] when writing failed.
    pub fn live_process(self, pid: u32) -> Result<RollbackStats, Error> {
        let begun = Instant::now();
        let captured = CapturedProcess::read(&self, pid)?;
        let held = LiveProcessSource::new(pid).stop_timeout(self.stop_timeout);
        let held = held.hold(&self.progress).map_err(|error| refused(pid, error))?;
        let attempt = Attempt { pid, rollback: &self, captured: &captured, held: &held };

        identity::check(&attempt)?;
        same_threads::check(&attempt)?;
        registers::check(&attempt)?;
        devices::check(&attempt)?;
        let settlement = signals::check(&attempt)?;
        let open_files = descriptors::check(&attempt)?;
        let fit::Mendable { grown, reprotected, remade } = fit::check(&attempt)?;

        let guards = guards::plan(&attempt, &remade)?;
        let states = PageStates::look(&attempt, &reprotected, remade, guards)?;
        page_state::check_reads(&attempt, &states)?;
        let memory = HeldMemory::new(&attempt, &states)?;
        let left_not_captured_bytes = page_state::check_left_out(&attempt, &states, &memory)?;
        let mut plan = plan::plan(
            self.shared,
            self.record.region_size.bytes(),
            self.check,
            &self.progress,
            self.parts(memory.populated()),
            &memory,
        )?;
        let left_shared = shared::settle(&attempt, &states, &mut plan)?;
        let closed = page_state::filled_without_permission(&attempt, &memory);
        let mut emptied: Vec<_> = grown.into_iter().chain(closed).collect();
        merge(&mut emptied);
        plan.patches.extend(memory.zeros_for(&emptied));
        page_state::check_writes(&attempt, &states, &plan)?;

        let relief = memory_limit::check(&attempt, &states, &memory, &mut plan)?;

        let calls = injection::prepare(&attempt, &states, &memory, relief, &reprotected, &open_files.seeks)?;

        let write::Written { done, is_stopped } =
            write::write(&attempt, calls.as_ref(), settlement, &states, &plan)?;
        let left_descriptors = open_files.left;
        let paused = held.release();
        let tracking = Tracking::Rescan(RescanReason::NoTracker);
        let stats = self.stats(begun, self.space.image_bytes(), tracking, done);
        Ok(RollbackStats {
            paused,
            is_stopped,
            left_shared,
            left_not_captured_bytes,
            left_descriptors,
            ..stats
        })
    }

    /// All but what the kernel provides: the tables that are stored, and of those of zeros the ones where anything is
    /// now. The others are equal already.
    fn parts(&self, populated: &[Range<u64>]) -> Vec<Part> {
        let places = self.places();
        let mut tables: Vec<usize> = self.root.stored().iter().map(|(at, _)| *at).collect();
        for range in populated {
            let addresses = AddressRange::new(range.start, range.end).ok();
            tables.extend(addresses.into_iter().flat_map(|addresses| places.overlapping(addresses)));
        }
        tables.sort_unstable();
        tables.dedup();
        let part = |at: usize| {
            let place = places.get(at)?;
            let mapping = &self.space.mappings()[place.mapping_index];
            let (table, start) = (self.root.get(at), mapping.range.start() + place.offset_bytes);
            (mapping.kind != MappingKind::Kernel).then_some(Part {
                table,
                place,
                at: start,
                look: Look::Everything,
            })
        };
        tables.into_iter().filter_map(part).collect()
    }
}

/// What the errors of a capture are called here.
pub(super) fn refused(pid: u32, error: SourceError) -> Error {
    match error {
        SourceError::Uncapturable { why, .. } => RollbackError::NoRollBack { pid, why }.into(),
        SourceError::LiveProcessEnded { .. } => {
            RollbackError::NoRollBack { pid, why: "it has ended".to_owned() }.into()
        }
        error => error.into(),
    }
}
