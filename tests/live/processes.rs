//! Live processes through the whole store: real programs are captured while they run, and the
//! restored bytes are compared with what the kernel showed while the process was paused.

use crate::needs::needs;
use std::collections::HashSet;
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::FileExt;
use std::panic::AssertUnwindSafe;
use std::process::{ChildStdout, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use stillframe::address_space::{AddressSpace, Mapping, MappingKind};
use stillframe::ranges::Ranges;
use stillframe::record::Origin;
use stillframe::source::{Access, Attachment, Frozen, LeftOut, LiveProcessSource, Source, SourceError};
use stillframe::threads::Threads;
use stillframe::verify::VerifyOptions;
use stillframe::{CaptureOptions, CaptureStats, Error, Hash, Progress, SnapshotId, Store};

// ---- A busy program -----------------------------------------------------------------------------

/// One thread builds a large structure and keeps changing it; another thread reports its progress.
const PYTHON: &str = r#"
import sys, threading, random
random.seed(int(sys.argv[1]))
records = {i: {"name": "record %d" % i, "values": [random.random() for _ in range(8)]} for i in range(30000)}
rounds = 0
def work():
    global rounds
    while True:
        for _ in range(200):
            record = records[random.randrange(len(records))]
            record["values"][random.randrange(8)] = random.random()
            record["name"] = "changed %d" % rounds
        rounds += 1
threading.Thread(target=work, daemon=True).start()
print("ready", flush=True)
for line in sys.stdin:
    print(rounds, sum(len(record["values"]) for record in records.values()), flush=True)
"#;

/// A Python process that works until its standard input ends or the test does.
struct Python {
    process: std::process::Child,
    output: BufReader<ChildStdout>,
}

impl Python {
    fn start(seed: u32) -> Python {
        let mut command = Command::new("python3");
        command.args(["-c", PYTHON, &seed.to_string()]).env("PYTHONHASHSEED", "0");
        let mut process =
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("python3 is installed");
        let output = BufReader::new(process.stdout.take().unwrap());
        let mut python = Python { process, output };
        assert_eq!(python.line(), "ready");
        python
    }

    fn pid(&self) -> u32 {
        self.process.id()
    }

    fn source(&self) -> LiveProcessSource {
        LiveProcessSource::new(self.pid())
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.output.read_line(&mut line).unwrap();
        line.trim_end().to_owned()
    }

    /// How many rounds it has completed. Its structure is checked.
    fn rounds(&mut self) -> u64 {
        self.process.stdin.as_mut().unwrap().write_all(b"?\n").unwrap();
        let line = self.line();
        let (rounds, values) = line.split_once(' ').unwrap_or_else(|| panic!("it says {line:?}"));
        assert_eq!(values, "240000");
        rounds.parse().unwrap()
    }

    #[track_caller]
    fn assert_goes_on(&mut self) {
        let before = self.rounds();
        let deadline = Instant::now() + Duration::from_secs(60);
        while self.rounds() == before {
            assert!(Instant::now() < deadline, "it does not go on");
        }
    }
}

impl Drop for Python {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

// ---- A source that reads twice ------------------------------------------------------------------

/// Another source, and what `/proc/PID/mem` showed of it while it was paused.
struct Watched {
    source: LiveProcessSource,
    seen: Mutex<Vec<u8>>,
    /// Called when the process is paused.
    when_stopped: Box<dyn Fn()>,
}

struct WatchedFrozen<'a> {
    watched: &'a Watched,
    frozen: Box<dyn Frozen + 'a>,
}

impl Watched {
    fn new(python: &Python) -> Watched {
        Watched { source: python.source(), seen: Mutex::default(), when_stopped: Box::new(|| {}) }
    }
}

impl Source for Watched {
    fn open(&self) -> Result<Box<dyn Frozen + '_>, SourceError> {
        let frozen = self.source.open()?;
        *self.seen.lock().unwrap() = image_of(self.source.pid(), frozen.address_space());
        (self.when_stopped)();
        Ok(Box::new(WatchedFrozen { watched: self, frozen }))
    }
}

impl Frozen for WatchedFrozen<'_> {
    fn address_space(&self) -> &AddressSpace {
        self.frozen.address_space()
    }

    fn origin(&self) -> Origin {
        self.frozen.origin()
    }

    fn attachments(&self) -> Vec<Attachment> {
        self.frozen.attachments()
    }

    fn left_out(&self) -> Vec<LeftOut> {
        self.frozen.left_out()
    }

    fn populated(&self, mapping_index: usize) -> Result<Ranges, SourceError> {
        self.frozen.populated(mapping_index)
    }

    fn access(&self) -> Access<'_> {
        self.frozen.access()
    }

    fn release(&self) -> Duration {
        // On the first call the process is still paused, and its memory is unchanged since then.
        let is_held = self.frozen.populated(0).is_ok();
        if is_held {
            let now = image_of(self.watched.source.pid(), self.frozen.address_space());
            assert!(*self.watched.seen.lock().unwrap() == now, "it did not stand still");
        }
        self.frozen.release()
    }
}

/// The image of a process as the kernel shows it, read page by page where necessary.
fn image_of(pid: u32, space: &AddressSpace) -> Vec<u8> {
    let memory = File::open(format!("/proc/{pid}/mem")).unwrap();
    let mut image = vec![0; space.image_bytes() as usize];
    for (at, mapping) in space.captured() {
        let bytes = &mut image[at as usize..][..mapping.range.length_bytes() as usize];
        if memory.read_exact_at(bytes, mapping.range.start()).is_err() {
            bytes.fill(0);
            for (page, bytes) in bytes.chunks_mut(4096).enumerate() {
                // A mapping has no bytes beyond the end of its file.
                let _ = memory.read_exact_at(bytes, mapping.range.start() + page as u64 * 4096);
            }
        }
    }
    image
}

fn new_store() -> (tempfile::TempDir, Store) {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::options().create(dir.path().join("store")).unwrap();
    (dir, store)
}

fn capture(store: &Store, name: &str, source: &dyn Source) -> CaptureStats {
    store.process(name).capture(source, &CaptureOptions::default()).unwrap()
}

fn assert_restores(store: &Store, id: SnapshotId, image: &[u8]) {
    let restore = store.restore(id).unwrap();
    let places: Vec<(u64, Mapping)> =
        restore.address_space().captured().map(|(at, mapping)| (at, mapping.clone())).collect();
    let restored = restore.into_mapping().unwrap();
    assert_eq!(restored.len(), image.len());
    for (at, mapping) in places {
        let part = at as usize..(at + mapping.range.length_bytes()) as usize;
        assert!(restored[part.clone()] == image[part], "{} {} differs", mapping.range, mapping.name);
    }
}

fn assert_has_nothing(store: &Store) {
    assert!(store.snapshots().is_empty() && store.processes().is_empty());
    assert_eq!(store.verify(&VerifyOptions::default()).unwrap().problems, []);
}

// ---- The tests ----------------------------------------------------------------------------------

#[test]
fn a_python_that_works_comes_back_as_it_stood_at_each_moment() {
    if !needs(&["python3"]) {
        return;
    }
    let (dir, store) = new_store();
    let mut python = Python::start(1);
    let mut history = Vec::new();
    for staging_bytes in [128 << 20, 0, 4 << 20] {
        let watched = Watched::new(&python);
        let options = CaptureOptions::new().staging_bytes(staging_bytes);
        let taken = store.process("python").capture(&watched, &options).unwrap();
        assert!(taken.paused > Duration::ZERO && taken.paused <= taken.elapsed);
        assert_eq!(taken.parent, history.last().map(|(id, _)| *id));
        let seen = watched.seen.into_inner().unwrap();
        assert!(seen.len() > 10 << 20);
        history.push((taken.id, seen));
        python.assert_goes_on();
    }
    assert!(history[0].1 != history[1].1, "it worked in between");
    for (id, image) in &history {
        assert_restores(&store, *id, image);
    }
    // The same after the process has ended, into a file, and from a store that was opened again.
    drop((python, store));
    let store = Store::open(dir.path().join("store")).unwrap();
    for (id, image) in &history {
        assert_restores(&store, *id, image);
        let path = dir.path().join(id.to_string());
        store.restore(*id).unwrap().into_file(&path).unwrap();
        assert!(std::fs::read(path).unwrap() == *image);
    }
    assert_eq!(store.verify(&VerifyOptions::default()).unwrap().problems, []);
}

#[test]
fn two_processes_of_one_program_share_what_they_have_in_common() {
    if !needs(&["python3"]) {
        return;
    }
    let (_dir, store) = new_store();
    let (first, second) = (Python::start(1), Python::start(2));
    let one = capture(&store, "first", &first.source());
    let other = capture(&store, "second", &second.source());
    let region_hashes = |id| -> Vec<Hash> {
        let snapshot = store.snapshot(id).unwrap();
        snapshot.regions().unwrap().map(|region| region.unwrap().1).filter(|hash| !hash.is_zero()).collect()
    };
    let known: HashSet<Hash> = region_hashes(one.id).into_iter().collect();
    let wanted = region_hashes(other.id);
    let lacking: HashSet<Hash> = wanted.iter().filter(|hash| !known.contains(hash)).copied().collect();
    println!(
        "{} regions, of which {} are shared and {} new; {} bytes of {} were added",
        wanted.len(),
        other.shared_regions,
        other.new_regions,
        other.added_bytes,
        other.memory_bytes
    );
    // Exactly the regions that the first snapshot did not have were stored, many of them as
    // differences.
    assert_eq!(other.new_regions + other.delta_regions, lacking.len() as u64);
    assert!(other.delta_regions > 0);
    assert_eq!(other.shared_regions, (wanted.len() - lacking.len()) as u64);

    // The code of the program and its libraries is the same, wherever it was loaded.
    let snapshot = store.snapshot(other.id).unwrap();
    let is_code = |mapping: &&Mapping| {
        mapping.kind == MappingKind::File && mapping.protection.execute && !mapping.protection.write
    };
    let space = snapshot.address_space().unwrap();
    let code: Vec<_> = space.mappings().iter().filter(is_code).map(|mapping| mapping.range).collect();
    assert!(!code.is_empty());
    let mut code_regions = 0;
    for region in snapshot.regions().unwrap() {
        let (range, hash) = region.unwrap();
        if code.iter().any(|code| code.intersection(range).is_some()) && !hash.is_zero() {
            assert!(known.contains(&hash), "code at {range}");
            code_regions += 1;
        }
    }
    assert!(code_regions > 0 && other.shared_regions >= code_regions);
}

#[test]
fn a_process_that_dies_during_the_capture_leaves_nothing() {
    if !needs(&["python3"]) {
        return;
    }
    let (_dir, store) = new_store();
    // Right after it was stopped, and in the middle of the copy.
    let (mut python, pid) = (Python::start(3), AtomicU32::new(0));
    pid.store(python.pid(), Ordering::Relaxed);
    let mut watched = Watched::new(&python);
    let killed = python.pid();
    watched.when_stopped = Box::new(move || kill(killed));
    let error = store.process("p").capture(&watched, &CaptureOptions::default()).unwrap_err();
    assert!(
        matches!(error, Error::Source(SourceError::LiveProcessEnded { pid }) if pid == killed),
        "{error:?}"
    );
    assert!(!python.process.wait().unwrap().success());
    assert_has_nothing(&store);

    let mut python = Python::start(4);
    let killed = python.pid();
    let pieces = AtomicU32::new(0);
    let progress = Progress::new().on_advance(move |_, _| {
        if pieces.fetch_add(1, Ordering::Relaxed) == 2 {
            kill(killed);
        }
    });
    let options = CaptureOptions::new().staging_bytes(0).progress(progress);
    let error = store.process("p").capture(&python.source(), &options).unwrap_err();
    assert!(
        matches!(error, Error::Source(SourceError::LiveProcessEnded { pid }) if pid == killed),
        "{error:?}"
    );
    assert!(!python.process.wait().unwrap().success());
    assert_has_nothing(&store);

    let python = Python::start(5);
    let watched = Watched::new(&python);
    let id = capture(&store, "p", &watched).id;
    assert_restores(&store, id, &watched.seen.lock().unwrap());
    assert!(store.process("p").snapshots().iter().map(|snapshot| snapshot.id()).eq([id]));
}

fn kill(pid: u32) {
    let pid = rustix::process::Pid::from_raw(pid.cast_signed()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
}

#[test]
fn a_process_goes_on_after_a_capture_that_was_cancelled() {
    if !needs(&["python3"]) {
        return;
    }
    let (_dir, store) = new_store();
    let mut python = Python::start(6);
    // Before the first part, during the copy, and when it runs again and the parts are compressed.
    for (pieces, staging_bytes) in [(1, 0), (3, 0), (1, 128 << 20), (5, 128 << 20)] {
        let cancel = Arc::new(AtomicBool::new(false));
        let (flag, count) = (Arc::clone(&cancel), AtomicU32::new(0));
        let progress = Progress::new().cancel_when(cancel).on_advance(move |_, _| {
            if count.fetch_add(1, Ordering::Relaxed) + 1 == pieces {
                flag.store(true, Ordering::Relaxed);
            }
        });
        let options = CaptureOptions::new().staging_bytes(staging_bytes).progress(progress);
        let error = store.process("p").capture(&python.source(), &options).unwrap_err();
        assert!(matches!(error, Error::Interrupted), "{error:?}");
        python.assert_goes_on();
        assert_has_nothing(&store);
    }
    let watched = Watched::new(&python);
    let id = capture(&store, "p", &watched).id;
    assert_restores(&store, id, &watched.seen.lock().unwrap());
    python.assert_goes_on();
}

#[test]
fn a_process_goes_on_after_a_panic_during_the_capture() {
    if !needs(&["python3"]) {
        return;
    }
    let (_dir, store) = new_store();
    let mut python = Python::start(7);
    for staging_bytes in [0, 128 << 20] {
        let progress =
            Progress::new().on_advance(|_, _| std::panic::resume_unwind(Box::new("a bug of the caller")));
        let options = CaptureOptions::new().staging_bytes(staging_bytes).progress(progress);
        let result = std::panic::catch_unwind(AssertUnwindSafe(|| {
            store.process("p").capture(&python.source(), &options).map(drop)
        }));
        assert!(result.is_err());
        python.assert_goes_on();
        assert_has_nothing(&store);
    }
    let watched = Watched::new(&python);
    let id = capture(&store, "p", &watched).id;
    assert_restores(&store, id, &watched.seen.lock().unwrap());
}

#[test]
fn the_registers_and_the_auxiliary_vector_are_kept_beside_the_memory() {
    if !needs(&["python3"]) {
        return;
    }
    let (_dir, store) = new_store();
    let python = Python::start(8);
    let auxv = std::fs::read(format!("/proc/{}/auxv", python.pid())).unwrap();
    let id = capture(&store, "p", &python.source()).id;
    let snapshot = store.snapshot(id).unwrap();
    let space = snapshot.address_space().unwrap();
    let mapping_at = |address: u64| {
        space.mappings().iter().find(|it| (it.range.start()..it.range.end()).contains(&address))
    };

    let threads =
        Threads::from_attachment(&snapshot.attachment(Threads::ATTACHMENT).unwrap().unwrap()).unwrap();
    assert_eq!((threads.pid, threads.threads[0].tid), (python.pid(), python.pid()));
    assert_eq!(threads.threads.len(), 2, "one that works and one that answers");
    if cfg!(target_arch = "x86_64") {
        for thread in &threads.threads {
            let registers = thread.register_set(1).unwrap();
            let register = |at: usize| u64::from_ne_bytes(registers[8 * at..8 * at + 8].try_into().unwrap());
            let (instruction, stack) = (mapping_at(register(16)).unwrap(), mapping_at(register(19)).unwrap());
            assert!(instruction.protection.execute && stack.protection.write);
        }
    }

    assert_eq!(snapshot.attachment("auxv").unwrap().unwrap(), auxv);
    let (words, rest) = auxv.as_chunks::<{ size_of::<usize>() }>();
    let words: Vec<usize> = words.iter().map(|word| usize::from_ne_bytes(*word)).collect();
    assert!(rest.is_empty());
    let value = |key| words.chunks(2).find(|entry| entry[0] == key).map(|entry| entry[1]).unwrap();
    // AT_PAGESZ, and AT_ENTRY, where the program begins.
    assert_eq!(value(6), rustix::param::page_size());
    assert!(mapping_at(value(9) as u64).unwrap().protection.execute);

    let Origin::LiveProcess { pid, path, command } = &snapshot.record().origin else {
        panic!("it is a process")
    };
    assert_eq!(*pid, python.pid());
    assert!(path.as_ref().is_some_and(|path| path.to_string_lossy().contains("python")));
    assert_eq!(command[1..], ["-c", PYTHON, "8"]);
}
