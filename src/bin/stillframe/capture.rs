//! `capture`.

use std::path::{Path, PathBuf};

use stillframe::{
    Capture, CaptureOptions, CoreSource, FileSource, LeftOut, ProcessSource, Source, SourceError, Store,
    WhyLeftOut,
};

use crate::context::Context;
use crate::errors::Exit;
use crate::human;
use crate::json::CaptureObject;
use crate::look::source_text;
use crate::output::{Style, print};
use crate::progress::progress;
use crate::{arguments, output::Output};

/// Takes one snapshot.
pub(crate) fn capture(context: &Context, arguments: arguments::Capture) -> anyhow::Result<Exit> {
    let (source, default_name): (Box<dyn Source>, String) = match arguments.pid {
        Some(pid) => {
            check_running(pid)?;
            (Box::new(ProcessSource::new(pid)), format!("pid:{pid}"))
        }
        None => {
            let path = arguments.core.as_ref().or(arguments.file.as_ref()).cloned().unwrap_or_default();
            let name = file_name(&path);
            let source: Box<dyn Source> = match arguments.core.is_some() {
                true => Box::new(CoreSource::new(path)),
                false => Box::new(FileSource::new(path)),
            };
            // A file that cannot be captured must not leave an empty store behind.
            drop(source.open()?);
            (source, name)
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
    let process = arguments.process.unwrap_or(default_name);
    let capture = store.process(&process).capture(&*source, &options)?;
    drop(options);
    warn_of_losses(&capture);
    print_capture(&context.output, &store, &capture)?;
    context.output.hint(&format!("look at it: stillframe show {}", human::short(capture.id)));
    Ok(Exit::Done)
}

fn print_capture(output: &Output, store: &Store, capture: &Capture) -> anyhow::Result<()> {
    if output.json {
        return output.json(&CaptureObject::from(capture));
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
    output.text(&output.lines(&lines))
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

/// An error unless there is such a process: a wrong pid must not leave an empty store behind.
pub(crate) fn check_running(pid: u32) -> Result<(), SourceError> {
    match Path::new(&format!("/proc/{pid}")).exists() {
        true => Ok(()),
        false => Err(SourceError::NoSuchProcess { pid }),
    }
}

/// The name of a file without its directory.
pub(crate) fn file_name(path: &Path) -> String {
    let name = path.file_name().map(PathBuf::from).unwrap_or_else(|| path.to_owned());
    name.to_string_lossy().into_owned()
}
