//! `capture`.

use std::path::{Path, PathBuf};

use stillframe::{
    Capture, CaptureOptions, CoreSource, FileSource, LeftOut, OpenCore, ProcessSource, Source, Store,
    WhyLeftOut,
};

use crate::context::Context;
use crate::errors::Exit;
use crate::human;
use crate::json::{CaptureObject, CoreObject};
use crate::look::source_text;
use crate::output::{Style, print};
use crate::progress::progress;
use crate::{arguments, output::Output};

/// Takes one snapshot.
pub(crate) fn capture(context: &Context, arguments: arguments::Capture) -> anyhow::Result<Exit> {
    let mut core = None;
    // A file that cannot be captured, or a wrong pid, must not leave an empty store behind.
    let (source, default_name): (Box<dyn Source>, Option<String>) = match (arguments.pid, &arguments.core) {
        (Some(pid), _) => {
            let source = ProcessSource::new(pid).stop_timeout(arguments.stopping.stop_timeout);
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
    let options = CaptureOptions {
        trigger: arguments.trigger,
        labels: arguments.labels.into_iter().collect(),
        exclude: arguments.exclude,
        parent: arguments.parent.map(|parent| store.find(&parent)).transpose()?,
        like: arguments.store_as.like,
        codec: arguments.store_as.codec,
        deltas: !arguments.store_as.no_deltas,
        progress: progress(context, "capturing"),
        ..Default::default()
    };
    let process = match (arguments.process.or(default_name), arguments.pid) {
        (Some(name), _) => name,
        (None, pid) => name_of_process(context, &store, pid.unwrap_or_default())?,
    };
    let capture = store.process(&process).capture(&*source, &options)?;
    drop(options);
    warn_of_losses(&capture);
    print_capture(&context.output, &store, &capture, core.as_ref())?;
    context.output.hint(&format!("look at it: stillframe show {}", human::short(capture.id)));
    Ok(Exit::Done)
}

fn print_capture(
    output: &Output,
    store: &Store,
    capture: &Capture,
    core: Option<&OpenCore>,
) -> anyhow::Result<()> {
    if output.json {
        let mut object = CaptureObject::from(capture);
        object.core = core.map(CoreObject::from);
        return output.json(&object);
    }
    if output.quiet {
        return Ok(print(&format!("{}\n", capture.id))?);
    }
    let changed = match capture.parent {
        Some(parent) => {
            format!("{} since {}", human::counted(capture.changed_regions, "region"), human::short(parent))
        }
        None => "everything: it is the first snapshot of this process".to_owned(),
    };
    let took = match capture.paused.is_zero() {
        true => human::duration(capture.elapsed),
        false => format!(
            "{}, the process stood still for {}{}",
            human::duration(capture.elapsed),
            human::duration(capture.paused),
            if capture.staging_full { ", longer as it did not fit into the staging buffer" } else { "" }
        ),
    };
    let mut lines = vec![
        ("snapshot", output.styled(Style::Id, &human::short(capture.id))),
        ("process", human::plain(&capture.process)),
        ("source", human::plain(&source_text(&store.snapshot(capture.id)?.record().origin))),
        (
            "memory",
            format!("{}, {} of it zeros", human::size(capture.memory_bytes), human::size(capture.zero_bytes)),
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

/// What is unusual about a core.
fn about_core(core: &OpenCore) -> Option<String> {
    let missing = (core.missing_bytes() > 0).then(|| {
        format!("cut short: {} are missing, and unreadable here", human::size(core.missing_bytes()))
    });
    let compression = core.compression().map(|by| format!("compressed by {}", by.name()));
    let physical = core.has_physical_addresses().then(|| "physical addresses".to_owned());
    let all: Vec<String> = [missing, compression, physical].into_iter().flatten().collect();
    (!all.is_empty()).then(|| all.join("; "))
}

/// Says on standard error, to people and scripts, what the process may have and the snapshot has not.
fn warn_of_losses(capture: &Capture) {
    let lost = left_out_text(&capture.left_out, WhyLeftOut::is_a_loss);
    if !lost.is_empty() {
        eprintln!(
            "stillframe: not in the snapshot: {lost}; it is restored as zeros, and a rollback leaves it as it is"
        );
    }
}

/// How much was left out for which of these reasons.
fn left_out_text(left_out: &[LeftOut], counts: impl Fn(WhyLeftOut) -> bool) -> String {
    let sums = LeftOut::sums(left_out).into_iter().filter(|(why, _)| counts(*why));
    let texts: Vec<String> = sums.map(|(why, bytes)| format!("{} {why}", human::size(bytes))).collect();
    texts.join(", ")
}

/// What was added to the store, and by which kinds of regions.
fn stored_text(capture: &Capture) -> String {
    let kinds: Vec<String> = [
        (capture.new_regions, "whole"),
        (capture.delta_regions, "as deltas"),
        (capture.shared_regions, "there before"),
    ]
    .into_iter()
    .filter(|(regions, _)| *regions > 0)
    .map(|(regions, how)| format!("{} {how}", human::count(regions)))
    .collect();
    match kinds.is_empty() {
        true => format!("{} on disk", human::size(capture.added_bytes)),
        false => format!("{} on disk; regions: {}", human::size(capture.added_bytes), kinds.join(", ")),
    }
}

/// The name of a live process whose snapshots were given none.
pub(crate) fn name_of_process(context: &Context, store: &Store, pid: u32) -> anyhow::Result<String> {
    let plain = format!("pid:{pid}");
    let name = store.name_of_process(pid)?;
    if name != plain {
        let text = format!(
            "the snapshots named {plain} are of another process that had this pid; this one is named {name}"
        );
        context.output.note(&text);
    }
    Ok(name)
}

/// The name of a file without its directory.
pub(crate) fn file_name(path: &Path) -> String {
    let name = path.file_name().map(PathBuf::from).unwrap_or_else(|| path.to_owned());
    name.to_string_lossy().into_owned()
}
