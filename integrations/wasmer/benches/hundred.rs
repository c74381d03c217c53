//! A hundred snapshots of one guest, with Wasmer's log file and with a store: bytes on disk, time
//! to write them and time to resume. `cargo bench -p stillframe-wasmer` prints the table of the
//! README.

#[path = "../examples/host/mod.rs"]
mod host;

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use host::{Guest, Life};
use stillframe::Store;
use stillframe_wasmer::{Resume, StoreJournal};
use wasmer_wasix::journal::{
    DynJournal, DynReadableJournal, DynWritableJournal, Journal, JournalEntry, LogFileJournal, LogReadResult,
    LogWriteResult, ReadableJournal, WritableJournal,
};

const SNAPSHOTS: usize = 100;
const RESUMES: usize = 5;

/// Adds up how long a journal takes to be written.
#[derive(Debug)]
struct Timed {
    inner: Arc<DynJournal>,
    /// A file to be synced at each flush.
    sync: Option<File>,
    spent: Mutex<Duration>,
}

impl Timed {
    fn time<T>(&self, run: impl FnOnce(&DynJournal) -> T) -> T {
        let started = Instant::now();
        let result = run(&*self.inner);
        if let Ok(mut spent) = self.spent.lock() {
            *spent += started.elapsed();
        }
        result
    }

    fn take(&self) -> Duration {
        self.spent.lock().map(|mut spent| std::mem::take(&mut *spent)).unwrap_or_default()
    }
}

impl WritableJournal for Timed {
    fn write<'a>(&'a self, entry: JournalEntry<'a>) -> Result<LogWriteResult> {
        self.time(|journal| journal.write(entry))
    }

    fn flush(&self) -> Result<()> {
        self.time(|journal| {
            journal.flush()?;
            self.sync.as_ref().map_or(Ok(()), File::sync_data)?;
            Ok(())
        })
    }
}

impl ReadableJournal for Timed {
    fn read(&self) -> Result<Option<LogReadResult<'_>>> {
        self.inner.read()
    }

    fn as_restarted(&self) -> Result<Box<DynReadableJournal>> {
        self.inner.as_restarted()
    }
}

impl Journal for Timed {
    fn split(self) -> (Box<DynWritableJournal>, Box<DynReadableJournal>) {
        unreachable!("nobody splits it")
    }
}

/// What a hundred snapshots took.
struct Row {
    name: &'static str,
    first: Duration,
    further: Vec<Duration>,
    steps: Vec<Duration>,
    bytes: (u64, u64),
    latest: Vec<Duration>,
    fiftieth: Vec<Duration>,
}

fn size(path: &Path) -> Result<u64> {
    let metadata = std::fs::metadata(path)?;
    if !metadata.is_dir() {
        return Ok(metadata.len());
    }
    std::fs::read_dir(path)?.map(|entry| size(&entry?.path())).sum()
}

/// For each snapshot how long the journal took, and how long the guest for its step and all of the
/// snapshot.
type Lives = Vec<(Duration, Duration)>;

/// A life of a hundred snapshots, and how long the journal took for each.
fn live(
    guest: &Guest,
    journal: Arc<DynJournal>,
    path: &Path,
    sync: Option<File>,
) -> Result<(Lives, u64, Vec<String>)> {
    let timed = Arc::new(Timed { inner: journal, sync, spent: Mutex::default() });
    let mut life = Life::start(guest, timed.clone(), &[])?;
    let (mut spent, mut said, mut first_bytes) = (Vec::new(), Vec::new(), 0);
    for at in 0..SNAPSHOTS {
        // Wasmer's own journal would begin anew after an exit.
        life.process().lock().disable_journaling_after_checkpoint = at == SNAPSHOTS - 1;
        timed.take();
        let started = Instant::now();
        said.push(life.snapshot("s")?);
        spent.push((timed.take(), started.elapsed()));
        if at == 0 {
            first_bytes = size(path)?;
        }
    }
    life.end()?;
    Ok((spent, first_bytes, said))
}

/// From opening the journal until the guest says what it said after that snapshot.
fn resume(guest: &Guest, expected: &str, open: impl Fn() -> Result<Arc<DynJournal>>) -> Result<Duration> {
    let started = Instant::now();
    let mut life = Life::start(guest, open()?, &[])?;
    while life.line()? != expected {}
    let elapsed = started.elapsed();
    life.end()?;
    Ok(elapsed)
}

fn log_file(guest: &Guest, dir: &Path) -> Result<Row> {
    log_file_of(guest, dir, "Wasmer's log file", false)
}

fn synced_log_file(guest: &Guest, dir: &Path) -> Result<Row> {
    log_file_of(guest, dir, "the same, synced at each mark", true)
}

fn log_file_of(guest: &Guest, dir: &Path, name: &'static str, synced: bool) -> Result<Row> {
    let path = dir.join("counter.journal");
    let journal = Arc::new(LogFileJournal::new(&path)?);
    let sync = synced.then(|| File::open(&path)).transpose()?;
    let (spent, first_bytes, said) = live(guest, journal, &path, sync)?;
    let bytes = size(&path)?;
    let mut latest = Vec::new();
    for at in 0..RESUMES {
        // Each life adds to the log, so each has a copy.
        let copy: PathBuf = dir.join(format!("{at}.journal"));
        std::fs::copy(&path, &copy)?;
        latest.push(resume(guest, said.last().context("it said nothing")?, || {
            Ok(Arc::new(LogFileJournal::new(&copy)?))
        })?);
        std::fs::remove_file(&copy)?;
    }
    let (first, further) = spent.split_first().context("no snapshots")?;
    let bytes = (first_bytes, bytes);
    Ok(Row {
        name,
        first: first.0,
        further: further.iter().map(|it| it.0).collect(),
        steps: further.iter().map(|it| it.1).collect(),
        bytes,
        latest,
        fiftieth: vec![],
    })
}

fn store(guest: &Guest, dir: &Path) -> Result<Row> {
    let path = dir.join("vault");
    let store = Arc::new(Store::options().create(&path)?);
    let journal = Arc::new(StoreJournal::open(&store, "counter", Resume::Latest)?);
    let (spent, first_bytes, said) = live(guest, journal, &path, None)?;
    let taken = store.process("counter").snapshots();
    let resumes = |at: usize| -> Result<Vec<Duration>> {
        let open = || Ok(Arc::new(StoreJournal::open(&store, "again", Resume::At(taken[at].id()))?) as _);
        (0..RESUMES).map(|_| resume(guest, &said[at], open)).collect()
    };
    let (latest, fiftieth) = (resumes(SNAPSHOTS - 1)?, resumes(SNAPSHOTS / 2 - 1)?);
    drop(store);
    let (first, further) = spent.split_first().context("no snapshots")?;
    let bytes = (first_bytes, size(&path)?);
    Ok(Row {
        name: "stillframe",
        first: first.0,
        further: further.iter().map(|it| it.0).collect(),
        steps: further.iter().map(|it| it.1).collect(),
        bytes,
        latest,
        fiftieth,
    })
}

fn median(times: &[Duration]) -> f64 {
    let mut times: Vec<f64> = times.iter().map(|time| time.as_secs_f64() * 1000.0).collect();
    times.sort_by(f64::total_cmp);
    times.get(times.len() / 2).copied().unwrap_or(f64::NAN)
}

fn main() -> Result<()> {
    let guest = Guest::build("counter")?;
    println!(
        "| | first, MB | all {SNAPSHOTS}, MB | first, ms | further, ms | step and snapshot, ms | resume latest, ms | resume the 50th, ms |"
    );
    println!("|---|---:|---:|---:|---:|---:|---:|---:|");
    let mut rows = Vec::new();
    for run in [log_file, synced_log_file, store] {
        let dir = tempfile::tempdir()?;
        let row = run(&guest, dir.path())?;
        let megabytes = |bytes: u64| bytes as f64 / 1e6;
        let fiftieth = match row.fiftieth.is_empty() {
            true => "not possible".to_owned(),
            false => format!("{:.0}", median(&row.fiftieth)),
        };
        println!(
            "| {} | {:.1} | {:.1} | {:.0} | {:.1} | {:.0} | {:.0} | {fiftieth} |",
            row.name,
            megabytes(row.bytes.0),
            megabytes(row.bytes.1),
            row.first.as_secs_f64() * 1000.0,
            median(&row.further),
            median(&row.steps),
            median(&row.latest),
        );
        rows.push(row);
    }
    if let [log, synced, store] = &rows[..] {
        println!();
        println!(
            "The log takes {:.1} times the bytes of the store. A further snapshot is written in {:.1} times as long as to a log \
             that is synced, in {:.0} times as long as to one that is not; the latest is resumed in {:.2} of the time.",
            log.bytes.1 as f64 / store.bytes.1 as f64,
            median(&store.further) / median(&synced.further),
            median(&store.further) / median(&log.further),
            median(&store.latest) / median(&log.latest),
        );
    }
    Ok(())
}
