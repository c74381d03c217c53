//! Rollback of a live process, in place.
//!
//! ```text
//! pause all threads ─> checks: one file each ─> compare, decode ─> check the planned writes ──┐
//! resume <── SIGCONT <── registers <── write (`write.rs`) <── SIGSTOP, if this program dies <─┘
//! ```
//!
//! Every step before the SIGSTOP can fail, and the process then continues unchanged. A check is a
//! file with one function `check`, which takes the [`Attempt`] and returns an error to refuse.

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
    /// Also rolls back a process that has mapped further memory since the snapshot. The new
    /// mappings stay, and the program that was rolled back does not know of them. Only the new part
    /// of the heap is emptied, because the C library relies on zeros there.
    pub fn leave_new_memory(mut self, leave: bool) -> Self {
        self.leave_new_memory = leave;
        self
    }

    /// How long the threads of a process may take to stop, see [`LiveProcessSource::stop_timeout`].
    pub fn stop_timeout(mut self, timeout: Duration) -> Self {
        self.stop_timeout = timeout;
        self
    }

    /// Also rolls back a process that shares memory with others if that memory differs: the shared
    /// memory stays as it is. Memory that no other process has is rolled back in any case.
    pub fn leave_shared_memory(mut self, leave: bool) -> Self {
        self.leave_shared_memory = leave;
        self
    }

    /// Also rolls back a process if a descriptor that it writes to refers to another file now.
    /// Descriptors are not rolled back; [`RollbackStats::left_descriptors`] lists the differences.
    pub fn leave_descriptors(mut self, leave: bool) -> Self {
        self.leave_descriptors = leave;
        self
    }

    /// Resets the positions of regular files where a descriptor still refers to the same file.
    /// Processes that share the position, such as a forked child, see the change.
    pub fn seek_files(mut self, seek: bool) -> Self {
        self.seek_files = seek;
        self
    }

    /// Also rolls back a process with memory that the kernel or a device uses: io_uring rings,
    /// virtual processors of KVM, device memory. These stay as they are; almost no program survives
    /// that.
    pub fn leave_devices(mut self, leave: bool) -> Self {
        self.leave_devices = leave;
        self
    }

    /// Rolls the live process `pid` back to this snapshot of it. The process is paused meanwhile;
    /// then every thread continues from the instruction at which it was captured.
    ///
    /// Its private memory, and the registers and signal masks of its threads, become those of the
    /// snapshot. A system call in which a thread waited is restarted.
    ///
    /// Signals that were pending in the snapshot are pending again. Signals that the process has
    /// sent to itself since are removed, and so are faults that the kernel was about to raise for
    /// an instruction. Signals from others since then stay.
    ///
    /// *Not rolled back* is state that the kernel keeps or others see: open files and their
    /// positions (but see [`seek_files`](Self::seek_files)), data written to files and sockets,
    /// data in pipes, child processes and timers. Memory that was excluded from the snapshot is
    /// left as it is. The rollback is refused if a descriptor that the process writes to refers to
    /// another file now (but see [`leave_descriptors`](Self::leave_descriptors)), if the process
    /// handles other signals than in the snapshot, and if the kernel or a device uses its memory
    /// (but see [`leave_devices`](Self::leave_devices)).
    ///
    /// Shared memory that no other process has is rolled back like private memory. If other
    /// processes have it, or may have it, and it differs, the rollback is refused (but see
    /// [`leave_shared_memory`](Self::leave_shared_memory)). Shared mappings of files are left as
    /// they are; but if one is writable and another process maps the file too, it is treated as
    /// memory that others have. [`RollbackStats::left_shared`] lists the mappings that were left.
    ///
    /// It must be the same run of the same program with the same threads, and have all mappings of
    /// the snapshot at their addresses. It must have no further mappings (but see
    /// [`leave_new_memory`](Self::leave_new_memory)); the stack may have grown.
    ///
    /// If this program is killed meanwhile, the process is as it was, or is rolled back, or is
    /// stopped (state T). In the last case roll it back again, or continue it with
    /// `kill -CONT PID`. A process that was stopped before the rollback is stopped afterwards
    /// ([`RollbackStats::is_stopped`]). A process that handles SIGCONT receives one.
    ///
    /// Cost: copying its memory and comparing it runs at 3 GB/s a core (AMD EPYC, 2 cores) while
    /// the process is paused. Bytes that differ are decoded, and their pages are written.
    ///
    /// ```no_run
    /// # let store = stillframe::Store::open("vault")?;
    /// let pid = 4711;
    /// let before = store.find("web-1~3")?;
    /// let stats = store.rollback(before)?.live_process(pid)?;
    /// println!("{} bytes written, paused for {:?}", stats.written_bytes, stats.paused);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`RollbackError::DoesNotFit`] with the differences; [`RollbackError::NoRollBack`] if this
    /// snapshot or this process cannot be rolled back; [`Error::Source`] if the process cannot be
    /// stopped; damage; [`Error::Interrupted`]. After these errors the process is as it was.
    /// [`RollbackError::InPart`] if writing failed.
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

    /// The parts to compare: all stored tables, and those tables of zeros where the process has
    /// pages now. The others are equal already. Memory that the kernel provides is left out.
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

/// Translates an error of a capture to one of rollback.
pub(super) fn refused(pid: u32, error: SourceError) -> Error {
    match error {
        SourceError::Uncapturable { why, .. } => RollbackError::NoRollBack { pid, why }.into(),
        SourceError::LiveProcessEnded { .. } => {
            RollbackError::NoRollBack { pid, why: "it has ended".to_owned() }.into()
        }
        error => error.into(),
    }
}
