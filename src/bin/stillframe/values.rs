//! What can be typed: every verb, every option, and the help a newcomer reads.

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use clap::{ArgAction, ArgGroup, Args, Parser, Subcommand, ValueHint};
use jiff::{Span, SpanRelativeTo};
use stillframe::{AddressRange, Codec, RegionSize, Trigger};

const AFTER_HELP: &str = "\
First steps:
  stillframe watch -- python3 app.py    run it, with a snapshot a second
  stillframe capture --pid 4711         one snapshot of what runs already
  stillframe list                       all snapshots
  stillframe show latest                one snapshot and its mappings
  stillframe restore latest --to image  its memory as a file
  stillframe rollback web-1~3 --pid 4711
                                        roll what runs back in place
  stillframe forget --keep-last 10      drop all but the newest ten, then
  stillframe gc                         give their space back

SNAPSHOT is an id, the first 4 or more digits of one, PROCESS@latest,
PROCESS~N (the Nth before the latest), or just latest.

Exit codes:
  0    done
  1    failed
  2    wrong usage
  3    no such snapshot, or several with that prefix
  4    another process owns the store (--wait waits for it)
  5    damage was found
  6    the source or the target cannot be used: no such process,
       no permission, the file exists, the process does not fit
  130  interrupted by ctrl-C or SIGTERM";

/// Keeps snapshots of process memory, stores every distinct piece once, and gives any moment back
/// by id.
#[derive(Debug, Parser)]
#[command(name = "stillframe", version, after_help = AFTER_HELP, max_term_width = 100)]
#[command(subcommand_required = true, arg_required_else_help = false)]
pub(crate) struct Arguments {
    #[command(flatten)]
    pub(crate) global: Global,
    #[command(subcommand)]
    pub(crate) verb: Verb,
}

/// What every verb understands.
#[derive(Debug, Args)]
#[command(next_help_heading = "Options of every command")]
pub(crate) struct Global {
    /// The directory of the store [default: $XDG_DATA_HOME/stillframe, else
    /// ~/.local/share/stillframe]
    #[arg(long, global = true, value_name = "DIR", env = "STILLFRAME_STORE", hide_env_values = true)]
    #[arg(value_hint = ValueHint::DirPath)]
    pub(crate) store: Option<PathBuf>,
    /// Print JSON, made for scripts: sizes in bytes, times in UTC, durations in milliseconds
    #[arg(long, global = true)]
    pub(crate) json: bool,
    /// Say less: no progress, no hints; capture, watch and list print nothing but ids
    #[arg(long, short, global = true)]
    pub(crate) quiet: bool,
    /// Say on standard error what happens inside; -vv says more
    #[arg(long, short, global = true, action = ArgAction::Count, conflicts_with = "quiet")]
    pub(crate) verbose: u8,
    /// How long to wait for a store that another process has open
    #[arg(long, global = true, value_name = "SECONDS", default_value = "0", value_parser = seconds, allow_negative_numbers = true)]
    pub(crate) wait: Duration,
    /// As root, use a store whose directory belongs to another user: that user can make this command
    /// change files elsewhere
    #[arg(long, global = true)]
    pub(crate) trust_owner: bool,
}

/// The verbs.
#[derive(Debug, Subcommand)]
pub(crate) enum Verb {
    /// Create a store; the first capture does so too
    Init(Init),
    /// Take one snapshot of a process, of a memory file or of a core
    Capture(Capture),
    /// Take snapshots at intervals, of a running process or of a command it starts
    Watch(Watch),
    /// List the snapshots, oldest first
    List(List),
    /// Show one snapshot and its mappings
    Show(Show),
    /// List the processes there are snapshots of
    Processes,
    /// Write the memory of a snapshot to a file or a core
    Restore(Restore),
    /// Roll a running process back to a snapshot, in place
    Rollback(Rollback),
    /// Print the memory of a snapshot
    Cat(Cat),
    /// Show where the memory of two snapshots differs
    Diff(Diff),
    /// Show every snapshot at which some bytes changed, and to what
    History(History),
    /// Give a snapshot labels, or take them away
    Label(Label),
    /// Remove snapshots; gc gives their space back
    Forget(Forget),
    /// Give back the space that no snapshot needs
    Gc(Gc),
    /// Read what is stored and check it
    Verify(Verify),
    /// Mend a damaged store as far as that can be done
    Repair(Repair),
    /// Show what is stored and what that saves
    Stats,
    /// Bring a store of an older stillframe to the present format
    Migrate(Migrate),
    /// Print the completions for a shell
    #[command(after_help = "For example: stillframe completions bash > \
        ~/.local/share/bash-completion/completions/stillframe")]
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
    /// Print the manual page
    #[command(after_help = "Read it with: stillframe man | man -l -")]
    Man,
}

#[derive(Debug, Args)]
pub(crate) struct Init {
    /// The size of a region, the unit that is stored once: a power of two from 512 to 65536
    #[arg(long, value_name = "BYTES", value_parser = region_size, default_value_t = RegionSize::default().into())]
    pub(crate) region_size: u32,
    /// How to compress what is stored: lz4, zstd (smaller and slower) or none
    #[arg(long, value_name = "CODEC", default_value_t = Codec::default())]
    pub(crate) codec: Codec,
}

#[derive(Debug, Args)]
#[command(group = ArgGroup::new("source").required(true))]
#[command(
    after_help = "The process stands still only while its memory is copied, and runs on whatever happens. \
    Its latest snapshot becomes the new one's parent, or the one that --parent names.\n\n\
    The process does not get larger by it. Memory that cannot be had without harm is left out, and told on standard \
    error: pages that a userfaultfd has yet to fill, files whose file system asks a server and that are not in \
    memory, and without CAP_SYS_ADMIN or CAP_CHECKPOINT_RESTORE what of nameless shared memory is not mapped yet. It \
    is restored as zeros, and a rollback leaves it as it is."
)]
pub(crate) struct Capture {
    /// Capture the running process with this pid
    #[arg(long, group = "source")]
    pub(crate) pid: Option<u32>,
    /// Capture this raw memory file, of a virtual machine for example
    #[arg(long, group = "source", value_name = "IMAGE", value_hint = ValueHint::FilePath)]
    pub(crate) file: Option<PathBuf>,
    /// Capture this ELF core file, of the kernel, of gcore, of a virtual machine or of a restore: its memory as far
    /// as it is in the core, and its threads. It must be of a 64-bit little-endian machine. One that is compressed by
    /// zstd, gzip or lz4 is decompressed in $TMPDIR, else in /var/tmp
    #[arg(long, group = "source", value_name = "CORE", value_hint = ValueHint::FilePath)]
    pub(crate) core: Option<PathBuf>,
    /// Take what a core has that is cut short. What is missing is told, and unreadable in the snapshot
    #[arg(long, requires = "core")]
    pub(crate) partial: bool,
    /// The name under which its snapshots belong together [default: pid:PID, or the name of the file;
    /// pid:PID.2 if the snapshots named pid:PID are of another process that had the pid before]
    #[arg(long, value_name = "NAME")]
    pub(crate) process: Option<String>,
    /// Give the snapshot a label; may be repeated
    #[arg(long = "label", value_name = "KEY=VALUE", value_parser = label)]
    pub(crate) labels: Vec<(String, String)>,
    /// The snapshot that it follows, after a rollback for example [default: the latest of the process]
    #[arg(long, value_name = "SNAPSHOT")]
    pub(crate) parent: Option<String>,
    /// Why it is taken: explicit, periodic, idle, first-listen, first-stdin, first-environ,
    /// signal:NAME, bootstrap, or a word of your own
    #[arg(long, value_name = "TRIGGER", default_value_t = Trigger::Explicit)]
    pub(crate) trigger: Trigger,
    /// Leave these addresses out, a scratch buffer for example: decimal, or hex after 0x. They
    /// restore as zeros. May be repeated
    #[arg(long, value_name = "START..END")]
    pub(crate) exclude: Vec<AddressRange>,
    #[command(flatten)]
    pub(crate) stopping: Stopping,
    #[command(flatten)]
    pub(crate) store_as: StoreAs,
}

/// How a live process is stopped.
#[derive(Debug, Args)]
pub(crate) struct Stopping {
    /// How long the threads of the process may take to stop, such as 100ms. Then all of them go on, and which one did not
    /// stop is told
    #[arg(long, value_name = "DURATION", default_value = "1s", value_parser = interval)]
    pub(crate) stop_timeout: Duration,
}

/// How what is new is stored.
#[derive(Debug, Args)]
pub(crate) struct StoreAs {
    /// For the first snapshot of a process: store it as the difference from the latest one of this process, whoever owns
    /// that. Its bytes then stay in the store as long as what is a difference from them, also when all of its own
    /// snapshots are forgotten; `gc --erase` parts them [default: the latest of the same executable, or of a file of
    /// the same name, with the same owner]
    #[arg(long, value_name = "NAME")]
    pub(crate) like: Option<String>,
    /// How to compress what is new: lz4, zstd or none [default: the store's]
    #[arg(long, value_name = "CODEC")]
    pub(crate) codec: Option<Codec>,
    /// Store what changed whole and not as the difference from what was there before
    #[arg(long)]
    pub(crate) no_deltas: bool,
}

#[derive(Debug, Args)]
#[command(group = ArgGroup::new("source").required(true))]
#[command(override_usage = "\
stillframe watch [OPTIONS] -- COMMAND [ARGUMENT]...
       stillframe watch [OPTIONS] --pid <PID>")]
#[command(after_help = "\
Ends when the process ends, after --count snapshots, or on ctrl-C, which ends a command that it
started as well (ctrl-C once more kills it). Only the command itself is captured, not what it starts in turn.

A snapshot that cannot be taken, as the store is full or a debugger is attached, say, is told on standard
error and tried again later; the process goes on. The store is closed meanwhile, so that others can make room in it.
The exit code is 0 if at least one snapshot was taken and none failed, or if --count were taken; else that of the
first failure, and 6 if the process ended before the first snapshot.

For example:
  stillframe watch --every 500ms -- python3 app.py --port 8000
  stillframe watch --every 1m --count 60 --process web --pid 4711")]
pub(crate) struct Watch {
    /// The time from one snapshot to the next, such as 500ms, 2s or 1m
    #[arg(long, value_name = "DURATION", default_value = "1s", value_parser = interval)]
    pub(crate) every: Duration,
    /// Stop after so many snapshots; a command that was started then runs on to its end
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) count: Option<u64>,
    /// The name under which the snapshots belong together [default: pid:PID, as for
    /// capture, or the name of the command]
    #[arg(long, value_name = "NAME")]
    pub(crate) process: Option<String>,
    /// Watch the running process with this pid
    #[arg(long, group = "source")]
    pub(crate) pid: Option<u32>,
    #[command(flatten)]
    pub(crate) stopping: Stopping,
    #[command(flatten)]
    pub(crate) store_as: StoreAs,
    /// Start this command and watch it. What it prints goes to standard error, so that standard
    /// output has nothing but the snapshots
    #[arg(last = true, group = "source", value_name = "COMMAND", value_hint = ValueHint::CommandWithArguments)]
    pub(crate) command: Vec<OsString>,
}

#[derive(Debug, Args)]
pub(crate) struct List {
    /// Only the snapshots of this process
    #[arg(long, value_name = "NAME")]
    pub(crate) process: Option<String>,
    /// Only snapshots with this label; repeated, with all of them
    #[arg(long = "label", value_name = "KEY=VALUE", value_parser = label)]
    pub(crate) labels: Vec<(String, String)>,
}

#[derive(Debug, Args)]
pub(crate) struct Show {
    /// The snapshot
    pub(crate) snapshot: String,
}

#[derive(Debug, Args)]
#[command(group = ArgGroup::new("target").required(true))]
#[command(after_help = "\
For example, to look at the snapshot before the last one with a debugger:
  stillframe restore web~1 --core web.core
  gdb /path/to/web web.core

With --in-place the file stays the one that it is, and only what differs is written: a virtual machine
that has it mapped as its memory, and is paused, is back at the snapshot. It must be as long as the image. This works
for memory files of all kinds, by their names or as /proc/PID/fd/N, on huge pages too. If it is
killed or fails in the middle, the same command completes it.

With --into-pid it does what rollback does.")]
pub(crate) struct Restore {
    /// The snapshot
    pub(crate) snapshot: String,
    /// Write the image to this file: the captured mappings one after the other, zeros as holes; the
    /// same bytes if a file was captured
    #[arg(long, group = "target", value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub(crate) to: Option<PathBuf>,
    /// Write an ELF core to this file, for gdb and other debuggers: memory, threads and their registers,
    /// which files were mapped. Of a snapshot without threads, of a file say, it shows the memory alone
    #[arg(long, group = "target", value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub(crate) core: Option<PathBuf>,
    /// Roll the running process with this pid back in place
    #[arg(long, group = "target", value_name = "PID")]
    pub(crate) into_pid: Option<u32>,
    /// Replace the file if there is one
    #[arg(long, conflicts_with = "into_pid")]
    pub(crate) force: bool,
    /// Write into the file that is there, and only what differs
    #[arg(long, requires = "to", conflicts_with = "force")]
    pub(crate) in_place: bool,
    #[command(flatten)]
    pub(crate) leave: Leave,
}

/// What a rollback may leave as it is.
#[derive(Debug, Args)]
pub(crate) struct Leave {
    /// Roll the process back although it has mapped more memory since; that then stays, unused
    #[arg(long)]
    pub(crate) leave_new_memory: bool,
    /// Roll the process back although memory differs that it shares with others; that then stays as it is
    #[arg(long)]
    pub(crate) leave_shared_memory: bool,
    /// Roll the process back although a descriptor that it wrote to stands for another file now
    #[arg(long)]
    pub(crate) leave_descriptors: bool,
    /// Roll the process back although it has an io_uring, virtual processors or memory of a device; those then stay
    /// as they are
    #[arg(long)]
    pub(crate) leave_devices: bool,
    /// Set the positions of its regular files back, where a descriptor still stands for the same file
    #[arg(long)]
    pub(crate) seek_files: bool,
    #[command(flatten)]
    pub(crate) stopping: Stopping,
}

impl Leave {
    /// Whether anything about a live process was said.
    pub(crate) fn is_given(&self) -> bool {
        let Leave {
            leave_new_memory, leave_shared_memory, leave_descriptors, leave_devices, seek_files, ..
        } = self;
        [leave_new_memory, leave_shared_memory, leave_descriptors, leave_devices, seek_files]
            .iter()
            .any(|it| **it)
    }
}

#[derive(Debug, Args)]
#[command(after_help = "\
The process, of which the snapshot is, goes on from the captured moment: its private memory, the
registers of its threads and their signal masks become what they were, and a system call in which a
thread waited begins again. It must be the same process in the same run of the program, with the same
threads, and have its mappings where they were; else nothing is changed, what differs is said, and the
exit code is 6.

Memory that could be shared, and that no other process has (a memfd that a JVM has its heap in, say), is
rolled back too. Where others have it, and it differs, the process is refused, unless --leave-shared-memory
is given. What is left is said on standard error.

Memory that is new since the snapshot is refused unless --leave-new-memory is given: it then stays, and
the program does not know of it. What the heap and the arenas of the C library have grown by is emptied.

A signal that was on its way is on its way again. One that the process sent to itself since, or that the
kernel was about to raise for an instruction, is dropped; what others sent stays.

What is and is not rolled back:
  memory            private: yes. Shared: see above. Of devices and kernel rings (KVM, io_uring):
                    refused, unless --leave-devices
  registers         yes, and signal masks; a system call that waited begins again
  pending signals   yes, or refused
  signal handlers   no: refused if other signals are handled or ignored now than then
  descriptors       no, but told; refused if one that was open for writing stands for another file
                    now, unless --leave-descriptors
  positions         of regular files, with --seek-files; else told
  files, sockets    no: what was written to them and what is in pipes stays
  futexes           who waits begins to wait again
  timers, children, credentials, working directory, limits, alternate stacks: no

If stillframe is killed in the middle of it, the process is as it was, or rolled back, or stopped
(state T). If it is stopped, run the same command again, and then: kill -CONT PID")]
pub(crate) struct Rollback {
    /// The snapshot
    pub(crate) snapshot: String,
    /// Roll back the running process with this pid
    #[arg(long)]
    pub(crate) pid: u32,
    #[command(flatten)]
    pub(crate) leave: Leave,
}

#[derive(Debug, Args)]
pub(crate) struct Cat {
    /// The snapshot
    pub(crate) snapshot: String,
    /// Only these addresses: decimal, or hex after 0x. Without it, all that was captured
    #[arg(long, value_name = "START..END")]
    pub(crate) range: Option<AddressRange>,
    /// Print a hex dump with addresses instead of raw bytes
    #[arg(long)]
    pub(crate) hex: bool,
}

#[derive(Debug, Args)]
#[command(
    after_help = "Compares by address; the snapshots may be of different processes. Memory that only one of them has \
    differs. What was excluded counts as zeros."
)]
pub(crate) struct Diff {
    /// The one snapshot
    #[arg(value_name = "A")]
    pub(crate) a: String,
    /// The other
    #[arg(value_name = "B")]
    pub(crate) b: String,
}

#[derive(Debug, Args)]
#[command(
    after_help = "The first line is the first snapshot that has these bytes. With --json bytes are hex digits, and null \
    from when they are not all captured memory any more. A range has 1 MiB at the most.\n\nFor example:\n  \
    stillframe history --process web-1 --range 0x7f12a0..0x7f12a8"
)]
pub(crate) struct History {
    /// The addresses: decimal, or hex after 0x
    #[arg(long, value_name = "START..END")]
    pub(crate) range: AddressRange,
    /// The process; needed if there are snapshots of several
    #[arg(long, value_name = "NAME")]
    pub(crate) process: Option<String>,
}

#[derive(Debug, Args)]
pub(crate) struct Label {
    /// The snapshot
    pub(crate) snapshot: String,
    /// The labels to set; KEY= takes one away
    #[arg(required = true, value_name = "KEY=VALUE", value_parser = label_change)]
    pub(crate) changes: Vec<(String, Option<String>)>,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Name snapshots, or say which to keep and the others are forgotten. What several --keep options
name is all kept; each process is looked at by itself.

Hours, days, weeks and months are those of the local time, as `list` shows it (the variable TZ, else the
machine's time zone); with --utc those of UTC. A week begins on Monday.

Snapshots whose time lies in the future, as a clock was wrong, are left out by the --keep options: they do not
count, and are kept. Name them to forget them.

What is forgotten cannot be had back, but its bytes are not erased. They stay until gc, and a plain gc leaves some of
them: what snapshots that are kept are stored as the difference from, and up to a tenth of each file. If memory
with a secret in it is forgotten: stillframe gc --erase

For example:
  stillframe forget web-1~3 3f9a0c1b
  stillframe forget --keep-last 10 --keep-daily 7 --dry-run")]
pub(crate) struct Forget {
    /// The snapshots to forget
    #[arg(value_name = "SNAPSHOT")]
    pub(crate) snapshots: Vec<String>,
    /// Keep the last N
    #[arg(long, value_name = "N")]
    pub(crate) keep_last: Option<u32>,
    /// Keep the newest of each of the last N hours that have one
    #[arg(long, value_name = "N")]
    pub(crate) keep_hourly: Option<u32>,
    /// Keep the newest of each of the last N days that have one
    #[arg(long, value_name = "N")]
    pub(crate) keep_daily: Option<u32>,
    /// Keep the newest of each of the last N weeks that have one
    #[arg(long, value_name = "N")]
    pub(crate) keep_weekly: Option<u32>,
    /// Keep the newest of each of the last N months that have one
    #[arg(long, value_name = "N")]
    pub(crate) keep_monthly: Option<u32>,
    /// Count hours, days, weeks and months in UTC, not in local time
    #[arg(long)]
    pub(crate) utc: bool,
    /// Keep what is younger than this, such as 90m, 12h or 7d
    #[arg(long, value_name = "DURATION", value_parser = duration)]
    pub(crate) keep_within: Option<Duration>,
    /// Keep what has this label; may be repeated, any of them will do
    #[arg(long = "keep-label", value_name = "KEY=VALUE", value_parser = label)]
    pub(crate) keep_labels: Vec<(String, String)>,
    /// Only snapshots of this process
    #[arg(long, value_name = "NAME")]
    pub(crate) process: Option<String>,
    /// Only say what would be forgotten, and how much space gc would give back
    #[arg(long)]
    pub(crate) dry_run: bool,
    /// Go on even if the --keep options keep nothing at all
    #[arg(long)]
    pub(crate) allow_empty: bool,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Without --erase some bytes of forgotten snapshots stay: those that a kept snapshot is stored as the difference from, and
up to --max-unused percent of each file. With it none are left in the store's files. Not in its hands are copies
of the store, snapshots of the file system, and blocks that the file system or an SSD has let go and not yet overwritten.")]
pub(crate) struct Gc {
    /// Only say how much space would be given back
    #[arg(long)]
    pub(crate) dry_run: bool,
    /// Leave nothing of what is forgotten: store whole what is a difference from it, rewrite every file that has any of
    /// it, and the index. Refused before anything is changed where that cannot be done wholly
    #[arg(long)]
    pub(crate) erase: bool,
    /// How much of a pack may be unused before it is rewritten, in percent: less means a smaller
    /// store, more means a faster gc
    #[arg(long, value_name = "PERCENT", default_value = "10", value_parser = percent(0))]
    pub(crate) max_unused: u8,
}

#[derive(Debug, Args)]
#[command(after_help = "Exits with 5 if anything is damaged.")]
pub(crate) struct Verify {
    /// Only what these snapshots need
    #[arg(value_name = "SNAPSHOT")]
    pub(crate) snapshots: Vec<String>,
    /// Only so many percent of the objects, picked by chance over all packs
    #[arg(long, value_name = "PERCENT", value_parser = percent(1))]
    pub(crate) sample: Option<u8>,
}

#[derive(Debug, Args)]
#[command(
    after_help = "Rebuilds the index from the packs, cuts torn tails, writes a damaged FORMAT file anew, and copies \
    what is whole out of damaged packs. It deletes nothing: what it cannot use is moved to the folder damaged/ of the \
    store, where REPORT.txt says what lies there, why, and which snapshots lost what. Interrupted, it has done no \
    harm; run it again. Exits with 5 if snapshots were lost or objects were damaged; capturing the same memory \
    again heals them."
)]
pub(crate) struct Repair {
    /// Only say what is wrong
    #[arg(long)]
    pub(crate) dry_run: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Migrate {
    /// Only say from which format to which
    #[arg(long)]
    pub(crate) dry_run: bool,
}

fn seconds(text: &str) -> Result<Duration, String> {
    let seconds: f64 =
        text.parse().map_err(|_| "expected a number of seconds, such as 5 or 0.5".to_owned())?;
    Duration::try_from_secs_f64(seconds)
        .map_err(|_| "expected 0 or more seconds, and not too many".to_owned())
}

fn region_size(text: &str) -> Result<u32, String> {
    let bytes = text.parse().map_err(|_| "expected a number of bytes, such as 4096".to_owned())?;
    RegionSize::new(bytes).map(u32::from).map_err(|error| error.to_string())
}

fn percent(least: i64) -> clap::builder::RangedI64ValueParser<u8> {
    clap::value_parser!(u8).range(least..=100)
}

fn label(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() && !value.is_empty() => Ok((key.to_owned(), value.to_owned())),
        _ => Err("expected KEY=VALUE, such as stage=ready".to_owned()),
    }
}

fn label_change(text: &str) -> Result<(String, Option<String>), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => {
            Ok((key.to_owned(), (!value.is_empty()).then(|| value.to_owned())))
        }
        _ => Err("expected KEY=VALUE to set a label, or KEY= to take it away".to_owned()),
    }
}

/// A duration as people write it. Days have 24 hours here; months have no length.
fn duration(text: &str) -> Result<Duration, String> {
    let expected = "expected a duration such as 500ms, 2s, 1m, 12h or 7d";
    let span: Span = text.parse().map_err(|_| expected.to_owned())?;
    let duration = span
        .to_duration(SpanRelativeTo::days_are_24_hours())
        .map_err(|_| format!("{expected}; months and years have no fixed length"))?;
    Duration::try_from(duration).map_err(|_| format!("{expected}, and not a negative one"))
}

fn interval(text: &str) -> Result<Duration, String> {
    match duration(text)? {
        short if short < Duration::from_millis(1) => Err("expected at least 1ms".to_owned()),
        interval => Ok(interval),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_definition_of_the_arguments_is_consistent() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn durations_read_as_people_write_them() {
        for (text, expected_ms) in
            [("500ms", 500), ("2s", 2_000), ("1m", 60_000), ("1h 30m", 5_400_000), ("7d", 604_800_000)]
        {
            assert_eq!(duration(text), Ok(Duration::from_millis(expected_ms)), "{text}");
        }
        for text in ["", "5", "soon", "-1s", "1 month"] {
            assert!(duration(text).is_err(), "{text}");
        }
        assert!(interval("0s").is_err());
    }

    #[test]
    fn a_label_needs_a_key_and_only_a_change_may_lack_its_value() {
        assert_eq!(label("a=b=c"), Ok(("a".to_owned(), "b=c".to_owned())));
        assert_eq!(label_change("a="), Ok(("a".to_owned(), None)));
        assert!(label("a=").is_err() && label("=b").is_err() && label("ab").is_err());
        assert!(label_change("=b").is_err() && label_change("ab").is_err());
    }
}
