//! `restore`: writes the memory of a snapshot to a file or a core.

use std::path::PathBuf;
use std::time::Instant;

use clap::{ArgGroup, Args, ValueHint};
use serde::Serialize;
use stillframe::{SnapshotId, Store};

use super::rollback::{self, Leave};
use crate::context::{Context, display};
use crate::errors::{Exit, wrong_usage};
use crate::human;
use crate::output::{Style, milliseconds};
use crate::progress::progress;
use crate::values::pid;

const EXAMPLES: &str = "\
Examples:
  stillframe restore vm@latest --to vm.img
  stillframe restore vm~1 --to vm.img --in-place
  stillframe restore web~1 --core web.core && gdb /path/to/web web.core";

/// Write the memory of a snapshot to a file or a core
///
/// With --to the file has the captured mappings one after the other, and zeros as holes. If a memory file was captured,
/// it has the same bytes as that file.
///
/// With --in-place the file stays the same file, and only what differs is written. A virtual machine that has it mapped
/// as its memory, and is paused, is then at the snapshot. The file must be as long as the image. It can be a memory file
/// of any kind, also /proc/PID/fd/N and a file on huge pages. If the command fails or is killed, run it again to
/// complete the restore.
///
/// --into-pid PID is the same as `rollback SNAPSHOT --pid PID`.
#[derive(Debug, Args)]
#[command(group = ArgGroup::new("target").required(true), after_long_help = EXAMPLES)]
#[command(override_usage = "\
stillframe restore [OPTIONS] <SNAPSHOT> --to <FILE>
       stillframe restore [OPTIONS] <SNAPSHOT> --core <FILE>
       stillframe restore [OPTIONS] <SNAPSHOT> --into-pid <PID>")]
pub(crate) struct Restore {
    /// Snapshot to restore
    #[arg(value_name = "SNAPSHOT")]
    snapshot: String,
    /// Write the raw image to this file
    #[arg(long, group = "target", value_name = "FILE", value_hint = ValueHint::FilePath)]
    to: Option<PathBuf>,
    /// Write an ELF core to this file
    ///
    /// For gdb and other debuggers: memory, threads with their registers, and the mapped files. If the snapshot has no
    /// threads, as one of a file, the core has the memory only.
    #[arg(long, group = "target", value_name = "FILE", value_hint = ValueHint::FilePath)]
    core: Option<PathBuf>,
    /// Roll this running process back (see rollback)
    #[arg(long, group = "target", value_name = "PID", value_parser = pid)]
    into_pid: Option<u32>,
    /// Replace an existing file
    #[arg(long, conflicts_with = "into_pid")]
    force: bool,
    /// Write only what differs into the file
    #[arg(long, requires = "to", conflicts_with_all = ["force", "core", "into_pid"])]
    in_place: bool,
    #[command(flatten)]
    leave: Leave,
}

#[derive(Serialize)]
struct RestoreJson {
    id: String,
    bytes: u64,
    written_bytes: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    threads: Option<usize>,
    elapsed_ms: f64,
}

/// Restores the memory of a snapshot.
pub(super) fn restore(context: &Context, arguments: &Restore) -> anyhow::Result<Exit> {
    if arguments.into_pid.is_none() && arguments.leave.is_given() {
        return Err(wrong_usage(
            "--leave-new-memory, --leave-shared-memory, --leave-descriptors, --leave-devices and --seek-files need \
             --into-pid",
        ));
    }
    let store = context.open()?;
    let id = store.find(&arguments.snapshot)?;
    match arguments.into_pid {
        Some(pid) => rollback::into_process(context, &store, id, pid, &arguments.leave),
        None => to_file(context, &store, id, arguments),
    }
}

/// Writes the image to a file, or a core.
fn to_file(context: &Context, store: &Store, id: SnapshotId, arguments: &Restore) -> anyhow::Result<Exit> {
    let output = &context.output;
    let started = Instant::now();
    let progress = progress(context, "restoring");
    let (path, bytes, written_bytes, threads) = match (&arguments.core, &arguments.to) {
        (Some(path), _) => {
            let stats = store.restore(id)?.progress(progress).overwrite(arguments.force).into_core(path)?;
            (path, stats.bytes, stats.written_bytes, Some(stats.threads))
        }
        (None, Some(path)) if arguments.in_place => {
            let stats = store.rollback(id)?.progress(progress).file(path)?;
            (path, stats.bytes, stats.written_bytes, None)
        }
        (None, Some(path)) => {
            let stats = store.restore(id)?.progress(progress).overwrite(arguments.force).into_file(path)?;
            (path, stats.bytes, stats.written_bytes, None)
        }
        (None, None) => {
            return Err(wrong_usage("expected a target: --to FILE, --core FILE or --into-pid PID"));
        }
    };
    let elapsed = started.elapsed();
    if output.json {
        output.json(&RestoreJson {
            id: id.to_string(),
            bytes,
            written_bytes,
            threads,
            elapsed_ms: milliseconds(elapsed),
        })?;
    } else if !output.quiet {
        let holes_bytes = bytes.saturating_sub(written_bytes);
        let memory = if arguments.in_place {
            format!("{}, {} differed", human::size(bytes), human::size(written_bytes))
        } else {
            format!("{}, {} holes", human::size(bytes), human::size(holes_bytes))
        };
        let mut lines = vec![
            ("snapshot", output.styled(Style::Id, &human::short(id))),
            ("restored to", display(path)),
            ("memory", memory),
        ];
        lines.extend(threads.map(|threads| match threads {
            0 => (
                "threads",
                "none: the snapshot has no registers, so a debugger shows the memory only".to_owned(),
            ),
            threads => ("threads", human::count(threads as u64)),
        }));
        lines.push(("took", human::duration(elapsed)));
        output.text(&output.lines(&lines))?;
    }
    Ok(Exit::Done)
}
