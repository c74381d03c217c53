//! `capture`: takes one snapshot.

use std::path::{Path, PathBuf};

use clap::{ArgGroup, Args, ValueHint};
use serde::Serialize;
use stillframe::record::Trigger;
use stillframe::source::{
    Compression, CoreSource, FileSource, LeftOut, LiveProcessSource, OpenCore, Source, WhyLeftOut,
};
use stillframe::{AddressRange, CaptureOptions, Store};

use super::show::source_text;
use super::stopping::Stopping;
use super::store_as::StoreAs;
use crate::context::Context;
use crate::errors::Exit;
use crate::human;
use crate::output::{Output, Style, print};
use crate::progress::progress;
use crate::values::{label, pid};

const EXAMPLES: &str = "\
Examples:
  stillframe capture --pid 4711 --process web-1 --label stage=ready
  stillframe capture --file vm.img --process vm
  stillframe capture --core core.4711.zst";

/// Take a snapshot of a process, a memory file or a core
///
/// A live process is paused while its memory is copied; compression and writing follow after that.
/// The parent of the snapshot is the latest snapshot of the same process, or the one that --parent
/// names.
///
/// Memory that cannot be read without side effects is left out: pages that a userfaultfd has not
/// filled yet, pages of network and FUSE files that are not in memory, and, without CAP_SYS_ADMIN
/// or CAP_CHECKPOINT_RESTORE, pages of anonymous shared memory that the process has not mapped yet.
/// The command reports their size on standard error. This memory is restored as zeros, and a
/// rollback leaves it unchanged.
#[derive(Debug, Args)]
#[command(group = ArgGroup::new("source").required(true), after_long_help = EXAMPLES)]
pub(crate) struct Capture {
    /// Capture this running process
    #[arg(long, group = "source", value_name = "PID", value_parser = pid)]
    pid: Option<u32>,
    /// Capture this raw memory file
    ///
    /// For example the memory file of a virtual machine.
    #[arg(long, group = "source", value_name = "IMAGE", value_hint = ValueHint::FilePath)]
    file: Option<PathBuf>,
    /// Capture this ELF core file
    ///
    /// A core of the kernel, of gcore, of a virtual machine or of `restore --core`: its memory and
    /// its threads. It must be of a 64-bit little-endian machine. A core that is compressed with
    /// zstd, gzip or lz4 is decompressed to $TMPDIR (default: /var/tmp).
    #[arg(long, group = "source", value_name = "CORE", value_hint = ValueHint::FilePath)]
    core: Option<PathBuf>,
    /// Accept a core that is cut short
    ///
    /// The missing memory is reported, and unreadable in the snapshot.
    #[arg(long, requires = "core", conflicts_with_all = ["pid", "file"])]
    partial: bool,
    /// Process name of the snapshot
    ///
    /// Snapshots with the same name form one history. Default: the name of the file, or pid:PID; or
    /// pid:PID.2, if the snapshots named pid:PID are of an earlier process with this pid.
    #[arg(long, value_name = "NAME")]
    process: Option<String>,
    /// Label the snapshot (repeatable)
    #[arg(long = "label", value_name = "KEY=VALUE", value_parser = label)]
    labels: Vec<(String, String)>,
    /// Parent of the snapshot
    ///
    /// For example after a rollback. Default: the latest snapshot of the process.
    #[arg(long, value_name = "SNAPSHOT")]
    parent: Option<String>,
    /// Reason for the snapshot [default: explicit]
    ///
    /// One of explicit, periodic, idle, first-listen, first-stdin, first-environ, signal:NAME,
    /// bootstrap, or any other word.
    #[arg(long, value_name = "TRIGGER", default_value_t = Trigger::Explicit, hide_default_value = true)]
    trigger: Trigger,
    /// Leave these addresses out (repeatable)
    ///
    /// For example a scratch buffer. Decimal, or hexadecimal after 0x. They are restored as zeros.
    #[arg(long, value_name = "START..END")]
    exclude: Vec<AddressRange>,
    #[command(flatten)]
    stopping: Stopping,
    #[command(flatten)]
    store_as: StoreAs,
}

/// What one capture did.
#[derive(Serialize)]
pub(super) struct CaptureJson<'a> {
    #[serde(flatten)]
    capture: &'a stillframe::CaptureStats,
    unreadable_bytes: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    core: Option<CoreJson>,
}

/// A core that was captured.
#[derive(Serialize)]
struct CoreJson {
    compression: Option<&'static str>,
    missing_bytes: u64,
    physical_addresses: bool,
}

impl<'a> CaptureJson<'a> {
    pub(super) fn new(capture: &'a stillframe::CaptureStats, core: Option<&OpenCore>) -> CaptureJson<'a> {
        let core = core.map(|core| CoreJson {
            compression: core.compression().map(Compression::name),
            missing_bytes: core.missing_bytes(),
            physical_addresses: core.has_physical_addresses(),
        });
        CaptureJson { capture, unreadable_bytes: capture.unreadable_bytes(), core }
    }
}

/// Takes one snapshot.
pub(super) fn capture(context: &Context, arguments: Capture) -> anyhow::Result<Exit> {
    let mut core = None;
    // The source is checked before the store is created: a wrong pid must not leave an empty store.
    let (source, default_name): (Box<dyn Source>, Option<String>) = match (arguments.pid, &arguments.core) {
        (Some(pid), _) => {
            let source = LiveProcessSource::new(pid).stop_timeout(arguments.stopping.stop_timeout);
            source.check()?;
            (Box::new(source), None)
        }
        (None, Some(path)) => {
            let progress = progress(context, "decompressing");
            let source = CoreSource::new(path).partial(arguments.partial).progress(progress).read()?;
            core = Some(source.clone());
            (Box::new(source), Some(file_name(path)))
        }
        (None, None) => {
            let path = arguments.file.clone().unwrap_or_default();
            let source = FileSource::new(&path);
            drop(source.open()?);
            (Box::new(source), Some(file_name(&path)))
        }
    };
    let store = context.open_or_create()?;
    let mut options = CaptureOptions::new()
        .trigger(arguments.trigger)
        .labels(arguments.labels)
        .exclude(arguments.exclude)
        .parent(arguments.parent.map(|parent| store.find(&parent)).transpose()?)
        .codec(arguments.store_as.codec)
        .deltas(!arguments.store_as.no_deltas)
        .progress(progress(context, "capturing"));
    options.like = arguments.store_as.like;
    let process = match (arguments.process.or(default_name), arguments.pid) {
        (Some(name), _) => name,
        (None, pid) => name_of_process(context, &store, pid.unwrap_or_default())?,
    };
    let capture = store.process(&process).capture(&*source, &options)?;
    drop(options);
    warn_of_losses(&capture);
    print_capture(&context.output, &store, &capture, core.as_ref())?;
    context.output.hint(&format!("to see it: stillframe show {}", human::short(capture.id)));
    Ok(Exit::Done)
}

fn print_capture(
    output: &Output,
    store: &Store,
    capture: &stillframe::CaptureStats,
    core: Option<&OpenCore>,
) -> anyhow::Result<()> {
    if output.json {
        return output.json(&CaptureJson::new(capture, core));
    }
    if output.quiet {
        return Ok(print(&format!("{}\n", capture.id))?);
    }
    let changed = match capture.parent {
        Some(parent) => {
            format!("{} since {}", human::counted(capture.changed_regions, "region"), human::short(parent))
        }
        None => "all memory: this is the first snapshot of the process".to_owned(),
    };
    let took = if capture.paused.is_zero() {
        human::duration(capture.elapsed)
    } else {
        format!(
            "{}, process paused for {}{}",
            human::duration(capture.elapsed),
            human::duration(capture.paused),
            if capture.staging_full { ", longer because the staging buffer was full" } else { "" }
        )
    };
    let mut lines = vec![
        ("snapshot", output.styled(Style::Id, &human::short(capture.id))),
        ("process", human::plain(&capture.process)),
        ("source", human::plain(&source_text(&store.snapshot(capture.id)?.record().origin))),
        (
            "memory",
            format!("{}, {} zeros", human::size(capture.memory_bytes), human::size(capture.zero_bytes)),
        ),
        ("changed", changed),
        ("stored", stored_text(capture)),
    ];
    if !capture.left_out.is_empty() {
        lines.push(("left out", left_out_text(&capture.left_out, |_| true)));
    }
    lines.push(("took", took));
    if let Some(core) = core {
        lines.extend(about_core(core).map(|text| ("core", text)));
    }
    output.text(&output.lines(&lines))
}

/// What is special about a core.
fn about_core(core: &OpenCore) -> Option<String> {
    let missing = (core.missing_bytes() > 0).then(|| {
        format!("cut short: {} are missing and unreadable in the snapshot", human::size(core.missing_bytes()))
    });
    let compression = core.compression().map(|by| format!("compressed with {}", by.name()));
    let physical = core.has_physical_addresses().then(|| "physical addresses".to_owned());
    let all: Vec<String> = [missing, compression, physical].into_iter().flatten().collect();
    (!all.is_empty()).then(|| all.join("; "))
}

/// Warns on standard error of memory that the process may have and the snapshot does not have.
fn warn_of_losses(capture: &stillframe::CaptureStats) {
    let lost = left_out_text(&capture.left_out, WhyLeftOut::is_a_loss);
    if !lost.is_empty() {
        eprintln!(
            "stillframe: not in the snapshot: {lost}; this memory is restored as zeros, and a rollback leaves it unchanged"
        );
    }
}

/// How much was left out for each of the reasons that count.
fn left_out_text(left_out: &[LeftOut], counts: impl Fn(WhyLeftOut) -> bool) -> String {
    let sums = LeftOut::sums(left_out).into_iter().filter(|(why, _)| counts(*why));
    let texts: Vec<String> = sums.map(|(why, bytes)| format!("{} {why}", human::size(bytes))).collect();
    texts.join(", ")
}

/// What was added to the store, and which kinds of regions.
fn stored_text(capture: &stillframe::CaptureStats) -> String {
    let kinds: Vec<String> = [
        (capture.new_regions, "whole"),
        (capture.delta_regions, "as deltas"),
        (capture.shared_regions, "already stored"),
    ]
    .into_iter()
    .filter(|(regions, _)| *regions > 0)
    .map(|(regions, how)| format!("{} {how}", human::count(regions)))
    .collect();
    if kinds.is_empty() {
        format!("{} on disk", human::size(capture.added_bytes))
    } else {
        format!("{} on disk; regions: {}", human::size(capture.added_bytes), kinds.join(", "))
    }
}

/// The default name of a live process.
pub(super) fn name_of_process(context: &Context, store: &Store, pid: u32) -> anyhow::Result<String> {
    let plain = format!("pid:{pid}");
    let name = store.name_of_process(pid)?;
    if name != plain {
        let text = format!(
            "the snapshots named {plain} are of an earlier process with this pid; this process is named {name}"
        );
        context.output.note(&text);
    }
    Ok(name)
}

/// The name of a file without its directory.
pub(super) fn file_name(path: &Path) -> String {
    let name = path.file_name().map(PathBuf::from).unwrap_or_else(|| path.to_owned());
    name.to_string_lossy().into_owned()
}
