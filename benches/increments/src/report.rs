//! Tables, as Markdown.

use std::time::Duration;

use crate::contender::default_name;
use crate::play::Run;

/// The greatest acceptable cost of each further snapshot, for each byte that the journal at 512
/// bytes writes, and for each byte that borg writes.
const WANTED_OF_JOURNAL: f64 = 0.75;
const WANTED_OF_BORG: f64 = 1.0 / 6.0;
/// How many times faster the last moment must be restored than the journal is replayed.
const WANTED_RESTORE: f64 = 5.0;

/// The cost of each further snapshot, compared with the journal at 512 bytes and with borg.
pub fn print_increments(runs: &[Run]) {
    row(&[
        "",
        "bytes a snapshot",
        "of them index",
        "apparent",
        "÷ journal 512",
        "÷ borg",
        "wall",
        "CPU",
        "changed",
        "deltas",
        "the first snapshot",
        "restore of the last",
    ]);
    println!("|---|{}", "---:|".repeat(11));
    for run in runs {
        row(&[
            &run.name,
            &count(run.growth.disk_bytes),
            &if_any(run.index_bytes),
            &count(run.growth.apparent_bytes),
            &ratio(run, peer(runs, "journal 512 B")),
            &ratio(run, peer(runs, "borg")),
            &milliseconds(run.wall),
            &milliseconds(run.cpu),
            &if_any(run.changed),
            &if_any(run.deltas),
            &count(run.first.disk_bytes as f64),
            &run.restore.map(milliseconds).unwrap_or_default(),
        ]);
    }
    println!();
}

/// stillframe with its defaults, compared with the targets.
pub fn print_verdict(runs: &[Run]) {
    let Some(ours) = peer(runs, &default_name()) else { return };
    print!("As it comes ({}): ", ours.name);
    print!(
        "{} of the journal at 512 bytes (wanted: {WANTED_OF_JOURNAL}), ",
        ratio(ours, peer(runs, "journal 512 B"))
    );
    println!("{} of borg (wanted: {WANTED_OF_BORG:.3}).", ratio(ours, peer(runs, "borg")));
    let journal = peer(runs, "journal 512 B").and_then(|run| run.restore);
    if let (Some(restore), Some(replay)) = (ours.restore, journal) {
        let times = replay.as_secs_f64() / restore.as_secs_f64();
        println!(
            "Restoring the last moment is {times:.1} times as fast as replaying the journal (wanted: {WANTED_RESTORE})."
        );
    }
}

fn peer<'a>(runs: &'a [Run], name: &str) -> Option<&'a Run> {
    runs.iter().find(|run| run.name == name)
}

fn ratio(run: &Run, other: Option<&Run>) -> String {
    let of = |other: &Run| format!("{:.3}", run.growth.disk_bytes / other.growth.disk_bytes);
    other.map_or("–".to_owned(), of)
}

fn if_any(value: f64) -> String {
    if value == 0.0 { "–".to_owned() } else { count(value) }
}

/// The effect of the region size.
pub fn print_region_sizes(workload: &str, runs: &[Run]) {
    for run in runs.iter().filter(|run| run.name.starts_with("stillframe")) {
        row(&[
            workload,
            run.name.trim_start_matches("stillframe "),
            &count(run.first.disk_bytes as f64),
            &count(run.growth.disk_bytes),
            &milliseconds(run.first_spent.wall),
            &milliseconds(run.wall),
            &run.restore.map(milliseconds).unwrap_or_default(),
        ]);
    }
}

pub fn print_region_sizes_head() {
    println!("## Choosing the region size\n");
    row(&[
        "workload",
        "region size, codec",
        "first snapshot, bytes",
        "each further one",
        "first capture",
        "a further one",
        "restore",
    ]);
    println!("|---|---|{}", "---:|".repeat(5));
}

pub fn row(cells: &[&str]) {
    println!("| {} |", cells.join(" | "));
}

/// A whole number with separated thousands.
pub fn count(value: f64) -> String {
    let digits = format!("{:.0}", value.abs());
    let mut text = String::new();
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    if value <= -0.5 { format!("-{text}") } else { text }
}

pub fn milliseconds(time: Duration) -> String {
    format!("{:.1} ms", time.as_secs_f64() * 1000.0)
}
