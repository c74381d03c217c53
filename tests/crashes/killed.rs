//! SIGKILL at any moment: no acknowledged write is lost, and the store needs no repair.
//!
//! A child process, which runs this test binary, works with a store in an order that is drawn from
//! a seed: captures, labels, forgets, gc (with and without concurrent captures), closing, opening,
//! and repair, also of packs that have something to repair. It prints what it begins and what was
//! acknowledged. It is killed in a drawn operation. Either it kills itself, before a drawn call
//! that changes its files or in the middle of a write; or this process kills it at a drawn moment,
//! which may also be inside the database. Afterwards everything acknowledged must be there, byte by
//! byte, with the index and without it. Some stores are not checked between two kills, so that
//! recovery is killed too. A store goes through [`KILLS_OF_A_STORE`] kills, so that damage would
//! accumulate.
//!
//! `STILLFRAME_KILLS=1000 cargo test --test crashes killed:: -- --nocapture` kills this often and
//! prints where the kills happened. `STILLFRAME_KILLS_SEED=7` draws other histories.

use crate::folder::copy;
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use stillframe::fault_injection::{Call, Watching, Witness, watch};
use stillframe::repair::RepairOptions;
use stillframe::store::StoreError;
use stillframe::verify::VerifyOptions;
use stillframe::{CaptureOptions, Error, GcOptions, RegionSize, SnapshotId, Store};

/// They take about 15 seconds.
const KILLS: u64 = 45;
const KILLS_OF_A_STORE: u64 = 15;
/// The child captures one of these at a time.
const PROCESSES: [&str; 3] = ["web-1", "web-2", "vm"];
/// A process with so many regions of 512 bytes that gc rewrites the index when they are removed or
/// moved.
const LARGE: &str = "large";
const LARGE_BYTES: usize = 9 << 19;
const PAGE_BYTES: usize = 4096;

const CHILD_STORE: &str = "STILLFRAME_KILLED_STORE";
const CHILD_SEED: &str = "STILLFRAME_KILLED_SEED";
/// A file to which the child writes the call before which it kills itself.
const CHILD_END: &str = "STILLFRAME_KILLED_END";

// ---- Memory -------------------------------------------------------------------------------------

/// Draws random numbers (SplitMix64).
#[derive(Clone)]
struct Draw(u64);

impl Draw {
    fn new(seeds: &[u64]) -> Draw {
        let mut draw = Draw(0);
        for seed in seeds {
            draw.0 = draw.next() ^ seed;
        }
        draw
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut bits = self.0;
        bits = (bits ^ (bits >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        bits = (bits ^ (bits >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        bits ^ (bits >> 31)
    }

    fn below(&mut self, end: usize) -> usize {
        (self.next() % end as u64) as usize
    }

    fn noise(&mut self, bytes: &mut [u8]) {
        for word in bytes.chunks_mut(8) {
            let noise = self.next().to_le_bytes();
            word.copy_from_slice(&noise[..word.len()]);
        }
    }
}

/// The memory of a process as it changes. The memory of a step follows from the process's name and
/// the step's number.
struct Memory {
    process: String,
    step: u64,
    bytes: Vec<u8>,
}

impl Memory {
    fn new(process: &str) -> Memory {
        let mut memory = Memory { process: process.to_owned(), step: 0, bytes: Vec::new() };
        memory.bytes = match PROCESSES.iter().position(|name| *name == process) {
            Some(at) => vec![0; 200_000 + at * 70_001],
            None => vec![0; LARGE_BYTES],
        };
        let mut draw = memory.draw();
        draw.noise(&mut memory.bytes);
        memory
    }

    fn draw(&self) -> Draw {
        let name = self.process.bytes().map(u64::from).sum();
        Draw::new(&[name, self.step])
    }

    fn at_step(&mut self, step: u64) -> &[u8] {
        if step < self.step {
            *self = Memory::new(&self.process);
        }
        if self.process == LARGE {
            self.step = step;
            self.draw().noise(&mut self.bytes);
        }
        while self.step < step {
            self.step += 1;
            self.change();
        }
        &self.bytes
    }

    /// Mostly changes a few bytes in several places, so that deltas of deltas arise. Some pages
    /// return to contents that have become garbage.
    fn change(&mut self) {
        let mut draw = self.draw();
        for _ in 0..=draw.below(6) {
            let pages = self.bytes.len() / PAGE_BYTES;
            let page = |draw: &mut Draw| {
                let start = draw.below(pages) * PAGE_BYTES;
                start..start + PAGE_BYTES
            };
            let place = page(&mut draw);
            match draw.below(10) {
                0 => self.bytes[place].fill(0),
                1 => self.bytes.copy_within(page(&mut draw), place.start),
                2 | 3 => Draw::new(&[draw.below(8) as u64]).noise(&mut self.bytes[place]),
                4 => draw.noise(&mut self.bytes[place]),
                _ => {
                    let start = place.start + draw.below(PAGE_BYTES - 60);
                    let length = 1 + draw.below(60);
                    draw.noise(&mut self.bytes[start..start + length]);
                }
            }
        }
    }
}

// ---- The child ----------------------------------------------------------------------------------

/// Prints what is begun and what was acknowledged. Each line is one write, so that a kill cuts no
/// line.
struct Voice {
    next: AtomicU64,
    /// Where the child must kill itself, if anywhere.
    aim: Aim,
    fate: Arc<Fate>,
}

impl Voice {
    fn doing<T>(&self, what: &str, operation: impl FnOnce() -> (T, String)) -> T {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let say = |line: String| std::io::stdout().lock().write_all(line.as_bytes()).unwrap();
        say(format!("begin {number} {what}\n"));
        if let Means::Call { calls, .. } = self.aim.means
            && self.aim.is_at(usize::try_from(number).unwrap(), kind(what))
        {
            self.fate.arm(calls);
        }
        let (value, result) = operation();
        say(format!("done {number} {result}\n"));
        value
    }

    fn does<T>(&self, what: &str, operation: impl FnOnce() -> T) -> T {
        self.doing(what, || (operation(), String::new()))
    }
}

/// Counts down the calls that change files, once it is armed. It kills this process before the last
/// of them, or in the middle of it if that is a write.
struct Fate {
    /// Negative until it is armed.
    calls_left: AtomicI64,
    tears: bool,
    end: PathBuf,
}

impl Fate {
    fn arm(&self, calls: i64) {
        let _ = self.calls_left.compare_exchange(-1, calls, Ordering::Relaxed, Ordering::Relaxed);
    }
}

impl Witness for Fate {
    fn call(&self, call: &Call<'_>, act: &mut dyn FnMut() -> io::Result<()>) -> io::Result<()> {
        let changes = !matches!(call, Call::Open(_) | Call::Read(_) | Call::List(_) | Call::Map(..));
        if !changes || self.calls_left.load(Ordering::Relaxed) < 0 {
            return act();
        }
        if self.calls_left.fetch_sub(1, Ordering::Relaxed) != 0 {
            return act();
        }
        let name = match call {
            Call::Write { file, at_bytes, bytes, .. } if self.tears => {
                file.write_all_at(&bytes[..bytes.len() / 2], *at_bytes).unwrap();
                "in a write"
            }
            _ => call.name(),
        };
        std::fs::write(&self.end, name).unwrap();
        let this = rustix::process::getpid();
        rustix::process::kill_process(this, rustix::process::Signal::KILL).unwrap();
        unreachable!("nobody survives SIGKILL");
    }
}

/// Captures the next step of a process and prints what it does.
fn capture_next(store: &Store, memory: &mut Memory, voice: &Voice) {
    let step = next_step(store, &memory.process);
    voice.doing(&format!("capture {} {step}", memory.process), || {
        let id = capture(store, memory, step);
        ((), id.to_string())
    });
}

fn capture(store: &Store, memory: &mut Memory, step: u64) -> SnapshotId {
    let process = store.process(&memory.process);
    process.capture(memory.at_step(step), &CaptureOptions::new().label("step", step.to_string())).unwrap().id
}

fn next_step(store: &Store, process: &str) -> u64 {
    let latest = store.process(process).latest();
    latest.map_or(0, |id| step_of(store, id) + 1)
}

fn step_of(store: &Store, id: SnapshotId) -> u64 {
    store.snapshot(id).unwrap().labels()["step"].parse().unwrap()
}

/// Every other time gc must leave nothing of what is forgotten, unless something prevents that.
fn collect(store: &Store, voice: &Voice) {
    let erase = store.snapshots().len() % 2 == 1;
    let options = |erase| GcOptions::new().max_unused_percent(0).erase(erase);
    voice.does("gc", || match store.gc(&options(erase)) {
        Err(Error::Store(StoreError::CannotErase { .. } | StoreError::NotErased { .. })) => {
            store.gc(&options(false)).unwrap()
        }
        other => other.unwrap(),
    });
}

#[test]
#[ignore = "it is the child that the other test starts and kills"]
fn a_child_works_with_a_store_until_it_is_killed() {
    let Some(path) = std::env::var_os(CHILD_STORE).map(PathBuf::from) else { return };
    let seed = std::env::var(CHILD_SEED).unwrap().parse().unwrap();
    let mut draw = Draw::new(&[seed]);
    let voice = voice(&path, seed);
    let _watching: Watching = watch(&path, voice.fate.clone());
    let mut memories: Vec<Memory> = PROCESSES.iter().map(|process| Memory::new(process)).collect();
    let mut large = Memory::new(LARGE);
    let open = || voice.does("open", || Store::open(&path).unwrap());
    let mut store = open();
    loop {
        let live: Vec<SnapshotId> = store.snapshots().iter().map(|snapshot| snapshot.id()).collect();
        let any = |draw: &mut Draw| live[draw.below(live.len())];
        match draw.below(20) {
            0..=7 => capture_next(&store, &mut memories[draw.below(PROCESSES.len())], &voice),
            8 if store.info().region_size.bytes() == 512 => capture_next(&store, &mut large, &voice),
            8 | 9 if !live.is_empty() => {
                let (id, note) = (any(&mut draw), draw.below(1000).to_string());
                let changes = [("note".to_owned(), Some(note.clone()))];
                voice
                    .does(&format!("label {id} {note}"), || drop(store.change_labels(id, &changes).unwrap()));
            }
            10..=12 if !live.is_empty() => {
                // At most some dozens of snapshots, so that a round stays short.
                let count = if live.len() > 30 { 15 } else { 1 + draw.below(3) };
                let ids: BTreeSet<SnapshotId> = (0..count).map(|_| any(&mut draw)).collect();
                let ids: Vec<SnapshotId> = ids.into_iter().collect();
                let names: Vec<String> = ids.iter().map(SnapshotId::to_string).collect();
                voice.does(&format!("forget {}", names.join(" ")), || store.forget(&ids).unwrap());
            }
            13..=15 => collect(&store, &voice),
            16 => std::thread::scope(|scope| {
                scope.spawn(|| collect(&store, &voice));
                for memory in &mut memories {
                    capture_next(&store, memory, &voice);
                }
            }),
            17 | 18 => {
                voice.does("close", || drop(store));
                store = open();
            }
            19 => {
                voice.does("close", || drop(store));
                let spoils = draw.below(2) == 0 && voice.does("spoil", || spoil(&path));
                voice.does("repair", || {
                    let report = Store::repair(&path, &RepairOptions::default()).unwrap();
                    assert_eq!(report.lost_snapshots, []);
                    // A child that was killed before this may have damaged the packs too.
                    assert!(!report.damaged.is_empty() || !spoils);
                });
                store = open();
            }
            _ => {}
        }
    }
}

fn voice(store: &Path, seed: u64) -> Voice {
    let aim = Aim::draw(seed, std::fs::read_to_string(store.join("FORMAT")).unwrap().contains("= 512"));
    let tears = matches!(aim.means, Means::Call { tears: true, .. });
    let fate =
        Fate { calls_left: AtomicI64::new(-1), tears, end: std::env::var_os(CHILD_END).unwrap().into() };
    Voice { next: AtomicU64::new(0), aim, fate: Arc::new(fate) }
}

/// Appends bytes that are no object to the first of several packs. No snapshot needs these bytes,
/// and they are no torn tail. Returns whether it did.
fn spoil(store: &Path) -> bool {
    let packs = files(&store.join("packs"));
    let packs: Vec<_> = packs.iter().filter(|(name, _)| name.ends_with(".pack")).collect();
    let [(name, length), _, ..] = packs[..] else { return false };
    let pack = std::fs::File::options().write(true).open(store.join("packs").join(name)).unwrap();
    pack.write_all_at(&[0xA5; 64], *length).unwrap();
    true
}

// ---- The expected content ----------------------------------------------------------------------

/// What must be found again of an acknowledged snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Taken {
    process: String,
    step: u64,
}

/// What was acknowledged to the child, and what was not acknowledged but may have taken effect.
#[derive(Default)]
struct Model {
    live: BTreeMap<String, Taken>,
    forgotten: HashSet<String>,
    /// For each snapshot, the possible texts of its note: one, unless a change was under way.
    notes: HashMap<String, Vec<String>>,
    maybe_taken: Vec<Taken>,
    maybe_forgotten: HashSet<String>,
    /// Whether a pack may contain bytes that are no object.
    is_spoiled: bool,
    was_spoiled: bool,
}

impl Model {
    /// Applies an acknowledged operation with its result; `None` for an operation that was under
    /// way.
    fn apply(&mut self, operation: &str, result: Option<&str>) {
        let words: Vec<&str> = operation.split(' ').collect();
        match (&words[..], result) {
            (["capture", process, step], result) => {
                let taken = Taken { process: (*process).to_owned(), step: step.parse().unwrap() };
                match result {
                    Some(id) => drop(self.live.insert(id.to_owned(), taken)),
                    None => self.maybe_taken.push(taken),
                }
            }
            (["forget", ids @ ..], Some(_)) => {
                for id in ids {
                    self.live.remove(*id);
                    self.forgotten.insert((*id).to_owned());
                }
            }
            (["forget", ids @ ..], None) => {
                self.maybe_forgotten.extend(ids.iter().map(|id| (*id).to_owned()));
            }
            (["label", id, note], Some(_)) => {
                self.notes.insert((*id).to_owned(), vec![(*note).to_owned()]);
            }
            (["spoil"], _) => (self.is_spoiled, self.was_spoiled) = (true, true),
            (["repair"], Some(_)) => self.is_spoiled = false,
            (["label", id, note], None) => {
                let notes = self.notes.entry((*id).to_owned()).or_insert_with(|| vec![String::new()]);
                notes.push((*note).to_owned());
            }
            _ => {}
        }
    }

    /// Returns the content of the store, which must be what was acknowledged, and may include what
    /// was under way.
    fn check(&self, store: &Store) -> BTreeMap<String, (Taken, String)> {
        let mut found = BTreeMap::new();
        let mut maybe_taken = self.maybe_taken.clone();
        for snapshot in store.snapshots() {
            let (id, labels) = (snapshot.id().to_string(), snapshot.labels());
            let process = snapshot.record().process.clone();
            let taken = Taken { process, step: labels["step"].parse().unwrap() };
            match self.live.get(&id) {
                Some(acknowledged) => assert_eq!(&taken, acknowledged, "of {id}"),
                None => {
                    assert!(!self.forgotten.contains(&id), "{id} was forgotten and is back");
                    let at = maybe_taken.iter().position(|maybe| *maybe == taken);
                    maybe_taken.swap_remove(at.unwrap_or_else(|| panic!("nobody took {id}: {taken:?}")));
                }
            }
            let note = labels.get("note").cloned().unwrap_or_default();
            match self.notes.get(&id) {
                Some(notes) => assert!(notes.contains(&note), "the note of {id} is {note:?}, not {notes:?}"),
                None => assert_eq!(note, "", "nobody gave {id} a note"),
            }
            found.insert(id, (taken, note));
        }
        for (id, taken) in &self.live {
            let there = found.contains_key(id) || self.maybe_forgotten.contains(id);
            assert!(there, "{id} is gone: {taken:?}");
        }
        assert_restore(store);
        let verified = store.verify(&VerifyOptions::default()).unwrap();
        assert_eq!(verified.problems, [], "verify");
        found
    }

    /// From now on the content that was found is the expected one.
    fn settle(&mut self, found: BTreeMap<String, (Taken, String)>) {
        self.maybe_taken.clear();
        self.notes.clear();
        self.forgotten.extend(self.maybe_forgotten.drain());
        self.forgotten.retain(|id| !found.contains_key(id));
        self.live.clear();
        for (id, (taken, note)) in found {
            self.notes.insert(id.clone(), vec![note]);
            self.live.insert(id, taken);
        }
    }
}

/// Asserts that every snapshot equals the memory at its step.
fn assert_restore(store: &Store) {
    let mut memories: HashMap<String, Memory> = HashMap::new();
    let mut snapshots: Vec<(u64, SnapshotId)> =
        store.snapshots().iter().map(|snapshot| (step_of(store, snapshot.id()), snapshot.id())).collect();
    snapshots.sort_unstable();
    for (step, id) in snapshots {
        let process = store.snapshot(id).unwrap().record().process.clone();
        let memory = memories.entry(process.clone()).or_insert_with(|| Memory::new(&process));
        let restored = store.restore(id).and_then(|restore| restore.into_mapping());
        let restored = restored.unwrap_or_else(|error| panic!("{id}, step {step} of {process}: {error}"));
        assert!(restored[..] == *memory.at_step(step), "{id} is not step {step} of {process}");
    }
}

// ---- The kills ----------------------------------------------------------------------------------

/// When to kill: in the first operation of the kind, from this number on.
struct Aim {
    kind: Option<&'static str>,
    number: usize,
    means: Means,
}

#[derive(Clone, Copy, PartialEq)]
enum Means {
    /// The child kills itself before one of its calls that change files.
    Call {
        /// How many such calls it makes before that.
        calls: i64,
        /// Whether it also makes half of that call, if it is a write.
        tears: bool,
    },
    /// This process kills the child after this share of the time that the last such operation took.
    Time { share: f64 },
}

impl Aim {
    /// After this many operations any kind will do: there may be no operation of the wanted kind.
    const PATIENCE: usize = 60;

    /// This process and the child draw the same value.
    fn draw(seed: u64, has_large: bool) -> Aim {
        let draw = &mut Draw::new(&[seed, 1]);
        // A large capture writes a megabyte at a time, and such a write can be cut in two.
        let large = has_large.then_some("capture-large");
        let kinds = [large, None, None, Some("gc"), Some("gc"), Some("repair"), Some("open"), Some("close")];
        let (kind, number) = (kinds[draw.below(kinds.len())], draw.below(15));
        let means = match draw.below(3) {
            0 => Means::Time { share: draw.below(1100) as f64 / 1000.0 },
            _ => Means::Call { calls: draw.below(12) as i64, tears: draw.below(2) == 0 },
        };
        Aim { kind, number, means }
    }

    fn is_at(&self, number: usize, kind: &str) -> bool {
        number >= self.number
            && (self.kind.is_none_or(|wanted| wanted == kind) || number >= self.number + Aim::PATIENCE)
    }
}

/// Where the kills happened, and what they left.
#[derive(Default)]
struct Tally {
    counts: BTreeMap<String, u64>,
    /// How long the last operation of each kind took.
    took: HashMap<String, Duration>,
}

impl Tally {
    fn count(&mut self, what: impl Into<String>) {
        *self.counts.entry(what.into()).or_default() += 1;
    }
}

/// Runs a child on the store and kills it.
fn kill_one(store: &Path, seed: u64, has_large: bool, model: &mut Model, tally: &mut Tally) {
    let aim = Aim::draw(seed, has_large);
    let errors_path = store.with_extension("errors");
    let end_path = store.with_extension("end");
    let _ = std::fs::remove_file(&end_path);
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args([
            "--exact",
            "killed::a_child_works_with_a_store_until_it_is_killed",
            "--ignored",
            "--nocapture",
        ])
        .env(CHILD_STORE, store)
        .env(CHILD_SEED, seed.to_string())
        .env(CHILD_END, &end_path)
        .stdout(Stdio::piped())
        .stderr(std::fs::File::create(&errors_path).unwrap())
        .spawn()
        .unwrap();
    let mut under_way: BTreeMap<usize, (String, Instant)> = BTreeMap::new();
    let mut is_killed = false;
    for line in BufReader::new(child.stdout.take().unwrap()).lines() {
        let line = line.unwrap();
        let words: Vec<&str> = line.splitn(3, ' ').collect();
        let ["begin" | "done", number, what] = words[..] else { continue };
        let number = number.parse().unwrap();
        if words[0] == "done" {
            let (operation, began) = under_way.remove(&number).unwrap();
            model.apply(&operation, Some(what));
            if !is_killed {
                tally.took.insert(kind(&operation).to_owned(), began.elapsed());
            }
            continue;
        }
        under_way.insert(number, (what.to_owned(), Instant::now()));
        if let Means::Time { share } = aim.means
            && !is_killed
            && aim.is_at(number, kind(what))
        {
            let took = tally.took.get(kind(what)).copied().unwrap_or(Duration::from_millis(5));
            std::thread::sleep(took.mul_f64(share));
            child.kill().unwrap();
            is_killed = true;
        }
    }
    let status = child.wait().unwrap();
    let errors = std::fs::read_to_string(&errors_path).unwrap();
    if let Ok(call) = std::fs::read_to_string(&end_path) {
        tally.count(format!("  … before a {call}").replace("before a in", "in"));
        is_killed = true;
    }
    assert!(is_killed, "the child ended by itself, {status}:\n{errors}");
    let at: Vec<&str> = under_way.values().map(|(operation, _)| kind(operation)).collect();
    tally.count(format!(
        "killed in {}",
        if at.is_empty() { "between".to_owned() } else { at.join(" beside ") }
    ));
    for (operation, _) in under_way.values() {
        model.apply(operation, None);
    }
}

fn kind(operation: &str) -> &str {
    match operation.split(' ').collect::<Vec<_>>()[..] {
        ["capture", LARGE, ..] => "capture-large",
        _ => operation.split(' ').next().unwrap(),
    }
}

/// Checks what the killed child left: the store is as it must be, or the test fails.
fn look_after(dir: &Path, model: &mut Model, tally: &mut Tally) {
    let path = dir.join("store");
    // A copy of the store as it was found, for debugging.
    let before = dir.join("before");
    let without_index = dir.join("without-index");
    for copy in [&before, &without_index] {
        if copy.exists() {
            std::fs::remove_dir_all(copy).unwrap();
        }
    }
    copy(&path, &before);
    copy(&path.join("packs"), &without_index.join("packs"));
    std::fs::copy(path.join("FORMAT"), without_index.join("FORMAT")).unwrap();
    let damaged = path.join("damaged");
    if damaged.exists() {
        // Only an index that was set aside or was about to be, and packs only if they were damaged
        // on purpose.
        let names: Vec<_> = files(&damaged).into_keys().collect();
        let is_right = |name: &String| name == "index" || model.was_spoiled;
        assert!(names.iter().all(is_right), "{names:?} were taken for damaged");
        std::fs::remove_dir_all(&damaged).unwrap();
    }
    if model.is_spoiled {
        tally.count("left a pack that was to be repaired");
        for store in [&path, &without_index] {
            let report = Store::repair(store, &RepairOptions::default()).unwrap();
            assert_eq!(report.lost_snapshots, []);
        }
        std::fs::remove_dir_all(&damaged).unwrap();
    }
    (model.is_spoiled, model.was_spoiled) = (false, false);

    if path.join("index.unfinished").exists() {
        tally.count("left an index half written anew");
    }
    let packs = files(&path.join("packs"));
    if packs.keys().any(|name| name.ends_with(".unfinished")) {
        tally.count("left a pack half written by gc");
    }
    let rebuilt = Store::open(&without_index).unwrap();
    let packs_after = files(&without_index.join("packs"));
    for (name, bytes) in packs {
        match packs_after.get(&name) {
            None if name.ends_with(".pack") => tally.count("left a pack that gc had replaced"),
            Some(after) if *after < bytes => tally.count("left a torn tail"),
            _ => {}
        }
    }
    let found_without_index = model.check(&rebuilt);
    drop(rebuilt);

    let store = Store::open(&path).unwrap();
    if damaged.exists() {
        tally.count("left an index that was built anew");
    }
    let found = model.check(&store);
    assert_eq!(found, found_without_index, "the index says something else than the packs");
    model.settle(found);
    for process in PROCESSES {
        let step = next_step(&store, process);
        let mut memory = Memory::new(process);
        let id = capture(&store, &mut memory, step);
        assert!(store.restore(id).unwrap().into_mapping().unwrap()[..] == *memory.at_step(step));
        model.live.insert(id.to_string(), Taken { process: process.to_owned(), step });
    }
}

/// The files of a directory by name, with their lengths.
fn files(dir: &Path) -> BTreeMap<String, u64> {
    let entries = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap());
    entries.map(|entry| (entry.file_name().into_string().unwrap(), entry.metadata().unwrap().len())).collect()
}

/// A number from the environment.
fn setting(name: &str, otherwise: u64) -> u64 {
    std::env::var(name).map_or(otherwise, |text| text.parse().unwrap())
}

#[test]
fn whatever_was_acknowledged_before_a_kill_is_there_after_it() {
    let kills = setting("STILLFRAME_KILLS", KILLS);
    let first_seed = setting("STILLFRAME_KILLS_SEED", 1);
    let mut tally = Tally::default();
    let mut kill = 0;
    for number in 0.. {
        if kill == kills {
            break;
        }
        let mut dir = tempfile::tempdir().unwrap();
        // Kept if a check fails.
        dir.disable_cleanup(true);
        let path = dir.path().join("store");
        let region_bytes = if number % 3 == 2 { 512 } else { 4096 };
        let region_size = RegionSize::new(region_bytes).unwrap();
        drop(Store::options().region_size(region_size).create(&path).unwrap());
        let mut model = Model::default();
        for at in 0..KILLS_OF_A_STORE.min(kills - kill) {
            let seed = Draw::new(&[first_seed, number, at]).next();
            eprintln!("store {number} in {}, kill {at}, seed {seed}", dir.path().display());
            kill_one(&path, seed, region_bytes == 512, &mut model, &mut tally);
            kill += 1;
            let is_last = at + 1 == KILLS_OF_A_STORE || kill == kills;
            if is_last || !seed.is_multiple_of(3) {
                look_after(dir.path(), &mut model, &mut tally);
            }
        }
        dir.disable_cleanup(false);
    }
    println!("{kills} kills");
    for (what, count) in tally.counts {
        println!("{count:>6} {what}");
    }
}
