//! Tables, as Markdown.

use std::time::Duration;

use crate::play::Run;

/// What each further snapshot costs, beside the journal at 512 bytes and borg.
pub fn print_increments(runs: &[Run]) {
    let peer = |name: &str| runs.iter().find(|run| run.name == name).map(|run| run.growth.disk_bytes);
    let (journal, borg) = (peer("journal 512 B"), peer("borg"));
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
    ]);
    println!("|---|{}", "---:|".repeat(9));
    for run in runs {
        let ratio = |other: Option<f64>| {
            other.map_or("–".to_owned(), |other| format!("{:.3}", run.growth.disk_bytes / other))
        };
        row(&[
            &run.name,
            &count(run.growth.disk_bytes),
            &count(run.index_bytes),
            &count(run.growth.apparent_bytes),
            &ratio(journal),
            &ratio(borg),
            &milliseconds(run.wall),
            &milliseconds(run.cpu),
            &count(run.changed),
            &count(run.deltas),
        ]);
    }
    println!();
}

/// What the region size decides.
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

/// A whole number with its thousands apart.
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
