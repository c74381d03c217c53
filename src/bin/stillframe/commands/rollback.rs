//! `rollback`: rolls a running process back in place. `restore --into-pid` is its other name.

use clap::Args;
use serde::Serialize;
use stillframe::address_space::Mapping;
use stillframe::rollback::RollbackStats;
use stillframe::{SnapshotId, Store};

use super::stopping::Stopping;
use crate::context::Context;
use crate::errors::Exit;
use crate::human;
use crate::output::{Style, milliseconds};
use crate::progress::progress;
use crate::values::pid;

/// How many lines about descriptors are printed.
const MAX_DESCRIPTOR_LINES: usize = 20;

const NOTES: &str = "\
What is rolled back:
  private memory     yes
  mappings           yes, with their protection and guard pages. Mappings of
                     files only if they are shared and the process still has
                     the file open; else refused. The locks (mlock) and the
                     advice (madvise) of what is mapped again: no
  shared memory      yes, if no other process maps it; else refused if it
                     differs, unless --leave-shared-memory. Mapped files: no,
                     but reported
  new memory         refused, unless --leave-new-memory
  devices            io_uring, virtual processors (KVM), memory of devices:
                     refused, unless --leave-devices
  registers          yes, and signal masks. A system call in which a thread
                     waited begins again
  pending signals    yes, or refused. Signals that other processes sent since
                     stay
  signal handlers    no: refused if other signals are handled or ignored now
  descriptors        no: differences are reported, also a connection whose
                     other end is closed. Refused if one that was open for
                     writing is of another file now, unless
                     --leave-descriptors
  file positions     of regular files, with --seek-files; else reported
  files, sockets     no: written data and data in pipes stay
  futexes            their memory: yes. Waiting threads wait again
  threads            refused if one has ended or begun
  timers             no: timers of the kernel run on
  children           no: ended ones stay ended, new ones run on
  credentials        no: users, groups, capabilities and namespaces stay
  working directory  no, nor the root directory and the umask
  limits             no: resource limits and control groups stay
  alternate stacks   no: the address that the kernel has (sigaltstack) stays

If stillframe is killed during a rollback, the process is unchanged, or
rolled back, or stopped (state T). If it is stopped, run the same command
again, and then: kill -CONT PID

Examples:
  stillframe rollback web-1~3 --pid 4711
  stillframe rollback web-1@latest --pid 4711 --seek-files";

/// Roll a running process back to a snapshot in place
///
/// The process continues at the moment of the snapshot: its private memory, the registers of its threads and their
/// signal masks are restored. It must be the process that was captured, in the same execution of the program, with the
/// same threads. Otherwise nothing is changed, the error says what differs, and the exit code is 6.
///
/// On x86-64, memory that the process has unmapped, replaced or protected since is mapped again as it was. On other
/// machines, and where that is impossible, the process is refused.
#[derive(Debug, Args)]
#[command(after_long_help = NOTES)]
pub(crate) struct Rollback {
    /// Snapshot to roll back to
    #[arg(value_name = "SNAPSHOT")]
    snapshot: String,
    /// Process to roll back
    #[arg(long, value_name = "PID", value_parser = pid)]
    pid: u32,
    #[command(flatten)]
    leave: Leave,
}

/// What a rollback may leave unchanged.
#[derive(Debug, Args)]
pub(super) struct Leave {
    /// Keep memory mapped since the snapshot
    ///
    /// The memory stays mapped, and the program does not use it. Without this option such a process is refused. What the
    /// heap and the arenas of the C library have grown by is filled with zeros.
    #[arg(long)]
    leave_new_memory: bool,
    /// Keep memory shared with other processes
    ///
    /// Shared memory that differs from the snapshot stays as it is, and is reported. Without this option such a process
    /// is refused.
    #[arg(long)]
    leave_shared_memory: bool,
    /// Accept descriptors that changed
    ///
    /// A descriptor that was open for writing may be of another file now. Without this option such a process is refused.
    #[arg(long)]
    leave_descriptors: bool,
    /// Keep device memory and io_uring
    ///
    /// An io_uring, virtual processors (KVM) and memory of devices stay as they are. Without this option such a process
    /// is refused.
    #[arg(long)]
    leave_devices: bool,
    /// Restore the positions of regular files
    ///
    /// For each descriptor that is still of the same file.
    #[arg(long)]
    seek_files: bool,
    #[command(flatten)]
    stopping: Stopping,
}

impl Leave {
    /// Whether one of the options of a rollback was given.
    pub(super) fn is_given(&self) -> bool {
        let Leave {
            leave_new_memory, leave_shared_memory, leave_descriptors, leave_devices, seek_files, ..
        } = self;
        [leave_new_memory, leave_shared_memory, leave_descriptors, leave_devices, seek_files]
            .iter()
            .any(|given| **given)
    }
}

#[derive(Serialize)]
struct RollbackJson {
    id: String,
    bytes: u64,
    written_bytes: u64,
    elapsed_ms: f64,
    paused_ms: f64,
    stopped: bool,
    left_shared: Vec<String>,
    left_not_captured_bytes: u64,
    left_descriptors: Vec<String>,
}

/// Rolls a running process back.
pub(super) fn rollback(context: &Context, arguments: &Rollback) -> anyhow::Result<Exit> {
    let store = context.open()?;
    let id = store.find(&arguments.snapshot)?;
    into_process(context, &store, id, arguments.pid, &arguments.leave)
}

/// The same with an open store, for `restore --into-pid` too.
pub(super) fn into_process(
    context: &Context,
    store: &Store,
    id: SnapshotId,
    pid: u32,
    leave: &Leave,
) -> anyhow::Result<Exit> {
    let output = &context.output;
    let stats: RollbackStats = store
        .rollback(id)?
        .leave_new_memory(leave.leave_new_memory)
        .leave_shared_memory(leave.leave_shared_memory)
        .leave_descriptors(leave.leave_descriptors)
        .leave_devices(leave.leave_devices)
        .seek_files(leave.seek_files)
        .stop_timeout(leave.stopping.stop_timeout)
        .progress(progress(context, "rolling back"))
        .live_process(pid)?;
    let named = |mapping: &Mapping| format!("{} {}", mapping.range, human::plain(&mapping.name));
    let left_shared: Vec<String> = stats.left_shared.iter().map(named).collect();
    // The process chose the names of its files.
    let left_descriptors: Vec<String> =
        stats.left_descriptors.iter().map(|line| human::plain(line)).collect();
    if output.json {
        output.json(&RollbackJson {
            id: id.to_string(),
            bytes: stats.bytes,
            written_bytes: stats.written_bytes,
            elapsed_ms: milliseconds(stats.elapsed),
            paused_ms: milliseconds(stats.paused),
            stopped: stats.is_stopped,
            left_shared,
            left_not_captured_bytes: stats.left_not_captured_bytes,
            left_descriptors,
        })?;
        return Ok(Exit::Done);
    }
    if !output.quiet {
        output.text(&output.lines(&[
            ("snapshot", output.styled(Style::Id, &human::short(id))),
            ("rolled back", format!("process {pid}")),
            (
                "memory",
                format!("{}, {} differed", human::size(stats.bytes), human::size(stats.written_bytes)),
            ),
            (
                "took",
                format!(
                    "{}, process paused for {}",
                    human::duration(stats.elapsed),
                    human::duration(stats.paused)
                ),
            ),
        ]))?;
    }
    // Also with --quiet: a part of the process is not of the snapshot.
    for mapping in left_shared {
        output.warning(&format!("left unchanged: shared memory that differs from the snapshot: {mapping}"));
    }
    if stats.left_not_captured_bytes > 0 {
        let left = human::size(stats.left_not_captured_bytes);
        output.warning(&format!("left unchanged: {left} of memory that the snapshot does not have"));
    }
    for line in left_descriptors.iter().take(MAX_DESCRIPTOR_LINES) {
        output.warning(line);
    }
    if let Some(more) = left_descriptors.len().checked_sub(MAX_DESCRIPTOR_LINES).filter(|more| *more > 0) {
        output.warning(&format!("{more} more descriptors differ; --json lists all of them"));
    }
    if stats.is_stopped {
        output
            .hint(&format!("the process was stopped before and still is; to continue it: kill -CONT {pid}"));
    }
    Ok(Exit::Done)
}
