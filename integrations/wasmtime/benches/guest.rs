//! What snapshots of SQLite at work cost, beside copying its whole memory out and in.
//!
//! ```text
//! cargo bench -p stillframe-wasmtime
//! ```
//!
//! A database of 100,000 rows is in the memory of one instance. Each step updates rows at random
//! and takes a snapshot by each means, one after the other. Times are medians; a snapshot of either
//! means is durable when its time ends. The store lies where `TMPDIR` says.

use std::fs::File;
use std::hint::black_box;
use std::io::Write;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Result;
use stillframe::lazy::Fill;
use stillframe::{CaptureOptions, Store};
use stillframe_wasmtime::{Template, engine};
use wasmtime::Config;

#[path = "../guest/sqlite.rs"]
mod sqlite;
use sqlite::Sqlite;

const STEPS: usize = 100;
const ROUNDS: usize = 15;
/// Fills the database, with text that is neither random nor all the same.
const FILL: &str = "CREATE TABLE page (id INTEGER PRIMARY KEY, hits INTEGER, title TEXT, body TEXT);
    CREATE INDEX by_title ON page (title);
    WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 100000)
    INSERT INTO page SELECT i, 0, 'title ' || (i * 7919 % 100003),
        substr(replace(hex(zeroblob(400)), '00', printf('%x ', i * 2654435761 % 4294967296)), 1, 1200) FROM n";
const QUERY: &str = "SELECT hits, title FROM page WHERE title = 'title 77'";

fn main() -> Result<()> {
    let engine = engine(Config::new())?;
    let compiled = sqlite::compile(&engine)?;
    let dir = tempfile::tempdir()?;
    let vault = Store::options().create(dir.path().join("vault"))?;
    let process = vault.process("wiki");
    let mut wiki = Sqlite::new(&compiled)?;
    wiki.run(FILL)?;
    let expected = wiki.run(QUERY)?;
    let memory_bytes = wiki.memory_bytes();

    let started = Instant::now();
    let first = wiki.guest.capture(&mut wiki.wasm, &process, &CaptureOptions::default())?;
    let first_took = started.elapsed();
    let before_bytes = size_of(dir.path().join("vault").as_path())?;
    println!(
        "SQLite under Wasmtime, a memory of {} MiB, {STEPS} snapshots, each after an update",
        memory_bytes >> 20
    );
    println!("(the first takes {} and {} KB)\n", show(first_took), before_bytes / 1000);

    // ---- Snapshots, while it works --------------------------------------------------------------
    let (mut captured, mut copied, mut written, mut worked) = (vec![], vec![], vec![], vec![]);
    let mut copy = vec![0; memory_bytes];
    let (mut last, mut changed, mut tracking) = (first.id, 0, None);
    for step in 0..STEPS {
        let rows =
            (0..20).map(|nth| ((step * 20 + nth) * 7919 % 100_000 + 1).to_string()).collect::<Vec<_>>();
        let update = format!(
            "UPDATE page SET hits = hits + 1, body = substr(body, 1, 600) || '{step} ' || substr(body, 610) \
             WHERE id IN ({})",
            rows.join(",")
        );
        worked.push(time(|| wiki.run(&update).map(drop))?);
        captured.push(time(|| {
            let taken = wiki.guest.capture(&mut wiki.wasm, &process, &CaptureOptions::default())?;
            (last, changed, tracking) = (taken.id, changed + taken.changed_regions, Some(taken.tracking));
            Ok(())
        })?);
        copied.push(time(|| {
            copy.copy_from_slice(&wiki.guest.memory().data(&wiki.wasm)[..memory_bytes]);
            black_box(&mut copy);
            Ok(())
        })?);
        written.push(time(|| {
            let mut file = File::create(dir.path().join("copy"))?;
            file.write_all(wiki.guest.memory().data(&wiki.wasm))?;
            Ok(file.sync_data()?)
        })?);
    }
    let vault_bytes = (size_of(dir.path().join("vault").as_path())? - before_bytes) / STEPS as u64;
    let per_second = |snapshot: Duration| 1.0 / (median(&worked) + snapshot).as_secs_f64();
    println!("| a snapshot | takes | snapshots a second, with the update | bytes on the disk |");
    println!("|---|---:|---:|---:|");
    let row = |name: &str, took: Duration, bytes: u64| {
        println!("| {name} | {} | {:.0} | {bytes} |", show(took), per_second(took));
    };
    row("stillframe, durable", median(&captured), vault_bytes);
    row("the memory copied out into a file, durable", median(&written), memory_bytes as u64);
    row("the memory copied out into other memory", median(&copied), 0);
    let tracking = tracking.map(|tracking| tracking.to_string()).unwrap_or_default();
    println!(
        "\n(an update takes {}; {} regions change; {tracking})\n",
        show(median(&worked)),
        changed / STEPS as u64
    );

    // ---- Back into an instance ------------------------------------------------------------------
    let saved = wiki.guest.memory().data(&wiki.wasm).to_vec();
    let expected_now = wiki.run(QUERY)?;
    assert_eq!(expected.len(), 1);
    let template = Template::new(&vault, last)?;
    let ways = ["template", "lazily", "in full", "copied in"];
    let (mut set_up, mut answered) = (vec![Vec::new(); ways.len()], vec![Vec::new(); ways.len()]);
    let mut instances = Vec::new();
    for _ in 0..ROUNDS {
        for (nth, way) in ways.iter().enumerate() {
            let started = Instant::now();
            let mut fresh = Sqlite::unborn(&compiled, wiki.database())?;
            let instance = started.elapsed();
            let started = Instant::now();
            let Sqlite { wasm, guest, .. } = &mut fresh;
            match *way {
                "template" => guest.instantiate(wasm, &template)?,
                "lazily" => drop(guest.restore_lazily(wasm, &vault, last, Fill::default())?),
                "in full" => guest.restore(wasm, &vault, last)?,
                _ => {
                    let memory = guest.memory();
                    let pages = (saved.len() - memory.data_size(&*wasm)) as u64 / memory.page_size(&*wasm);
                    memory.grow(&mut *wasm, pages)?;
                    memory.data_mut(wasm).copy_from_slice(&saved);
                }
            }
            set_up[nth].push(started.elapsed());
            assert_eq!(fresh.run(QUERY)?, expected_now);
            answered[nth].push(started.elapsed() + instance);
            instances.push(instance);
        }
    }
    println!("| a new instance with that memory | memory | to its first answer |");
    println!("|---|---:|---:|");
    let names = ["of a template", "restored lazily", "restored in full", "the memory copied in"];
    for ((name, set_up), answered) in names.iter().zip(&set_up).zip(&answered) {
        println!("| {name} | {} | {} |", show(median(set_up)), show(median(answered)));
    }
    println!("\n(of which {} are the instance itself, that the engine makes)\n", show(median(&instances)));

    // ---- Back in time ---------------------------------------------------------------------------
    let moments = process.snapshots();
    let (mut near, mut far, mut whole) = (vec![], vec![], vec![]);
    let (previous, old) = (moments[moments.len() - 2].id(), moments[moments.len() / 2].id());
    for _ in 0..ROUNDS {
        for (id, times) in [(last, None), (previous, Some(&mut near)), (last, None), (old, Some(&mut far))] {
            let took = time(|| {
                wiki.guest.rollback(&mut wiki.wasm, &vault, id)?;
                Ok(())
            })?;
            times.into_iter().for_each(|times| times.push(took));
        }
        whole.push(time(|| {
            wiki.guest.memory().data_mut(&mut wiki.wasm)[..saved.len()].copy_from_slice(&saved);
            Ok(())
        })?);
    }
    println!("| an instance that goes back | takes |\n|---|---:|");
    println!("| by one update | {} |", show(median(&near)));
    println!("| by fifty updates | {} |", show(median(&far)));
    println!("| the memory copied in | {} |", show(median(&whole)));
    Ok(())
}

fn time(work: impl FnOnce() -> Result<()>) -> Result<Duration> {
    let started = Instant::now();
    work()?;
    Ok(started.elapsed())
}

fn median(times: &[Duration]) -> Duration {
    let mut times = times.to_vec();
    times.sort();
    times[times.len() / 2]
}

fn show(time: Duration) -> String {
    match time.as_secs_f64() * 1e6 {
        micros if micros < 1000.0 => format!("{micros:.0} µs"),
        micros if micros < 10_000.0 => format!("{:.1} ms", micros / 1000.0),
        micros => format!("{:.0} ms", micros / 1000.0),
    }
}

/// What a directory takes on the disk.
fn size_of(path: &Path) -> Result<u64> {
    use std::os::unix::fs::MetadataExt;
    let metadata = path.symlink_metadata()?;
    if !metadata.is_dir() {
        return Ok(metadata.blocks() * 512);
    }
    path.read_dir()?.map(|entry| size_of(&entry?.path())).sum()
}
