//! Disk errors: every call that a store makes on its files fails once, in each way that such a call
//! can fail.
//!
//! The test runs one scenario (see [`play`]) without faults to count its calls. Then it runs the
//! scenario once for each call and each suitable fault: with this call failing alone, and with all
//! such calls failing from this one on, until some operations later the disk recovers. An operation
//! must succeed, or fail with an error that says what failed and where. The same open store must be
//! usable when the disk has recovered. Nothing acknowledged may be lost, what was forgotten must
//! not return, and the next process that opens the store must find no problem.
//!
//! By default every second or third fault runs;
//! `STILLFRAME_DISK_ERRORS=all cargo test --test disk errors::` runs all.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, Once};

use stillframe::fault_injection::{Call, Witness, watch};
use stillframe::repair::RepairOptions;
use stillframe::source::Attachment;
use stillframe::store::StoreError;
use stillframe::verify::VerifyOptions;
use stillframe::{CaptureOptions, Error, GcOptions, RegionSize, SnapshotId, Store};

use crate::whole_error::whole_error;

const ENOSPC: i32 = 28;
const EIO: i32 = 5;
const EMFILE: i32 = 24;

/// The disk recovers when this many operations have met its fault.
const ILL_OPERATIONS: usize = 3;

// ---- The faults ---------------------------------------------------------------------------------

/// One way for a call to fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Fault {
    errno: i32,
    /// Whether half of the bytes are written before the error.
    after_half: bool,
}

/// The faults that suit a call of this name.
fn faults(call: &str) -> Vec<Fault> {
    let errnos: &[i32] = match call {
        "create" | "create directory" => &[ENOSPC, EIO, EMFILE],
        "open" | "read" | "list" | "sync directory" => &[EIO, EMFILE],
        "write" | "sync" | "rename" | "exchange" | "link" => &[ENOSPC, EIO],
        "map" | "set length" | "remove" | "remove directory" => &[EIO],
        other => panic!("which faults fit {other:?}?"),
    };
    let half = [ENOSPC, EIO].map(|errno| Fault { errno, after_half: true });
    let whole = errnos.iter().map(|errno| Fault { errno: *errno, after_half: false });
    whole.chain(half.into_iter().filter(|_| call == "write")).collect()
}

/// What fails, and from which call on.
#[derive(Clone, Debug)]
struct Plan {
    at_call: usize,
    name: String,
    fault: Fault,
    alone: bool,
}

impl Plan {
    /// Whether a call fails that is made before the disk recovers.
    fn hits(&self, number: usize, name: &str) -> bool {
        match self.alone {
            true => number == self.at_call,
            // A full disk refuses every call that needs room, and a file limit every call that
            // opens a file. Other errors affect one kind of call.
            false if number < self.at_call => false,
            false if self.fault.errno == EIO => name == self.name,
            false => faults(name).iter().any(|fault| fault.errno == self.fault.errno),
        }
    }
}

/// One call, with its result.
#[derive(Clone, Debug)]
struct Made {
    name: &'static str,
    path: PathBuf,
    failed: bool,
}

#[derive(Default)]
struct Disk {
    plan: Option<Plan>,
    made: Mutex<Vec<Made>>,
    is_well: Mutex<bool>,
    hits: AtomicUsize,
}

impl Disk {
    fn hits(&self) -> usize {
        self.hits.load(Ordering::SeqCst)
    }

    fn recover(&self) {
        *self.is_well.lock().unwrap() = true;
    }
}

impl Witness for Disk {
    fn call(&self, call: &Call<'_>, act: &mut dyn FnMut() -> io::Result<()>) -> io::Result<()> {
        let number = {
            let mut made = self.made.lock().unwrap();
            made.push(Made { name: call.name(), path: call.path().to_owned(), failed: false });
            made.len() - 1
        };
        let is_well = *self.is_well.lock().unwrap();
        let plan = self.plan.as_ref().filter(|plan| !is_well && plan.hits(number, call.name()));
        let Some(Plan { fault, .. }) = plan else {
            // Nothing here depends on what a power failure would lose.
            return if matches!(call, Call::Sync(..) | Call::SyncDir(_)) { Ok(()) } else { act() };
        };
        self.hits.fetch_add(1, Ordering::SeqCst);
        self.made.lock().unwrap()[number].failed = true;
        if let Call::Write { file, at_bytes, bytes, .. } = call
            && fault.after_half
        {
            file.write_all_at(&bytes[..bytes.len() / 2], *at_bytes).unwrap();
        }
        Err(io::Error::from_raw_os_error(fault.errno))
    }
}

// ---- The scenario -------------------------------------------------------------------------------

const REGION_BYTES: usize = 4096;
const MEMORY_BYTES: usize = 10 * REGION_BYTES;

/// The memory of a process at a step: noise, part of which changes a little with each step and part
/// entirely.
fn memory(process: &str, step: usize) -> Vec<u8> {
    let mut state = process.bytes().fold(7, |hash: u64, byte| hash * 31 + u64::from(byte));
    let mut noise = |bytes: &mut [u8]| {
        for byte in bytes {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            *byte = (state >> 33) as u8;
        }
    };
    let mut memory = vec![0; MEMORY_BYTES];
    noise(&mut memory[..MEMORY_BYTES - REGION_BYTES]);
    for step in 1..=step {
        noise(&mut memory[step * 100..step * 100 + 20]);
        noise(&mut memory[3 * REGION_BYTES..5 * REGION_BYTES]);
    }
    memory
}

/// An acknowledged snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Taken {
    process: &'static str,
    step: usize,
    notes: BTreeSet<String>,
}

/// What was acknowledged, and what was not but may have taken effect.
struct Model<'a> {
    path: PathBuf,
    disk: &'a Disk,
    memories: &'a HashMap<(&'static str, usize), Vec<u8>>,
    store: Option<Store>,
    live: BTreeMap<SnapshotId, Taken>,
    forgotten: BTreeSet<SnapshotId>,
    maybe_taken: Vec<(&'static str, usize)>,
    maybe_forgotten: BTreeSet<SnapshotId>,
    /// How many operations have met the fault so far.
    ill: usize,
    errors: BTreeSet<String>,
}

fn gc_options() -> GcOptions {
    GcOptions::new().max_unused_percent(0)
}

impl Model<'_> {
    /// Runs an operation, which may fail only if the disk has just failed, and then with a clear
    /// error.
    fn does<T>(&mut self, what: &str, operation: impl FnOnce(&mut Self) -> Result<T, Error>) -> Option<T> {
        let before = self.disk.hits();
        let done = operation(self);
        let was_hit = self.disk.hits() > before;
        if was_hit {
            self.ill += 1;
            if self.ill == ILL_OPERATIONS {
                self.disk.recover();
            }
        }
        match done {
            Ok(value) => Some(value),
            Err(error) => {
                let text = whole_error(&error);
                assert!(self.disk.hits() > 0, "{what} failed without a cause: {text}");
                self.assert_clear(what, was_hit, &error);
                self.errors.insert(format!("{what}: {}", text.replace(self.path.to_str().unwrap(), "STORE")));
                None
            }
        }
    }

    /// Asserts that the error names the file and contains the disk's error.
    fn assert_clear(&self, what: &str, was_hit: bool, error: &Error) {
        let text = whole_error(error);
        if matches!(error, Error::Store(StoreError::WriteFailedMeanwhile)) {
            return;
        }
        let alone = self.disk.plan.as_ref().is_some_and(|plan| plan.alone);
        assert!(was_hit || !alone, "{what} failed after the disk was well again: {text}");
        assert!(text.contains(self.path.to_str().unwrap()), "{what}: of which file? {text}");
        let errno = self.disk.plan.as_ref().map(|plan| plan.fault.errno);
        match error {
            Error::Store(StoreError::DiskFull { source, .. } | StoreError::Io { source, .. }) => {
                let is_full = matches!(error, Error::Store(StoreError::DiskFull { .. }));
                assert_eq!(source.raw_os_error(), errno, "{what}: {text}");
                assert_eq!(errno == Some(ENOSPC), is_full, "{what}: {text}");
            }
            other => panic!("{what}: not an error of the disk: {other:?}"),
        }
    }

    fn store(&self) -> &Store {
        self.store.as_ref().unwrap()
    }

    fn open(&mut self) {
        for _ in 0..=ILL_OPERATIONS {
            let opened = self.does("open", |it| {
                let options = Store::options().region_size(RegionSize::new(REGION_BYTES as u32).unwrap());
                Ok(options.open_or_create(&it.path)?)
            });
            if opened.is_some() {
                self.store = opened;
                return;
            }
        }
        panic!("it does not open");
    }

    fn close(&mut self) {
        self.does("close", |it| {
            drop(it.store.take());
            Ok(())
        });
    }

    fn capture(&mut self, process: &'static str, step: usize) -> bool {
        let note = format!("of step {step}");
        let options = CaptureOptions::new()
            .labels([("note".to_owned(), note.clone())])
            .attachments([Attachment { name: "registers".into(), bytes: vec![step as u8; 900] }]);
        let memory = &self.memories[&(process, step)];
        let captured = self.does(&format!("capture {process} {step}"), |it| {
            it.store().process(process).capture(&memory[..], &options)
        });
        match &captured {
            Some(done) => {
                self.live.insert(done.id, Taken { process, step, notes: [note].into() });
            }
            None => self.maybe_taken.push((process, step)),
        }
        captured.is_some()
    }

    /// The snapshot of a step, if it was taken.
    fn find(&self, process: &str, step: usize) -> Option<SnapshotId> {
        let found = self.live.iter().find(|(_, taken)| taken.process == process && taken.step == step);
        found.map(|(id, _)| *id)
    }

    fn label(&mut self, process: &str, step: usize, note: &str) {
        let Some(id) = self.find(process, step) else { return };
        let labelled = self.does("label", |it| it.store().set_label(id, "note", note).map(drop));
        let notes = &mut self.live.get_mut(&id).unwrap().notes;
        if labelled.is_some() {
            notes.clear();
        }
        notes.insert(note.to_owned());
    }

    fn restore(&mut self, process: &'static str, step: usize) {
        let Some(id) = self.find(process, step) else { return };
        let restored = self.does("restore", |it| it.store().restore(id)?.into_mapping());
        if let Some(restored) = restored {
            assert!(
                restored[..] == self.memories[&(process, step)][..],
                "{process} {step} is something else"
            );
        }
    }

    fn forget(&mut self, process: &str, step: usize) {
        let Some(id) = self.find(process, step) else { return };
        match self.does("forget", |it| it.store().forget(&[id])) {
            Some(()) => {
                self.live.remove(&id);
                self.forgotten.insert(id);
            }
            None => drop(self.maybe_forgotten.insert(id)),
        }
    }

    fn gc(&mut self) -> bool {
        self.does("gc", |it| it.store().gc(&gc_options())).is_some()
    }

    fn verify(&mut self) {
        let verified = self.does("verify", |it| it.store().verify(&VerifyOptions::default()));
        if let Some(report) = verified {
            assert_eq!(report.problems, [], "the disk failed, and nothing is damaged");
        }
    }

    fn repair(&mut self) {
        let path = self.path.clone();
        let report = self.does("repair", |_| Store::repair(&path, &RepairOptions::default()));
        if let Some(report) = report {
            assert_eq!((report.damaged, report.lost_snapshots), (vec![], vec![]));
        }
    }

    /// Asserts that everything acknowledged is there, byte by byte, and nothing else is.
    fn check(&self, when: &str) {
        let mut maybe_taken = self.maybe_taken.clone();
        let mut found = BTreeSet::new();
        for snapshot in self.store().snapshots() {
            let id = snapshot.id();
            found.insert(id);
            assert!(!self.forgotten.contains(&id), "{when}: {id} was forgotten and is back");
            let (process, step) = match self.live.get(&id) {
                Some(taken) => {
                    let note = &snapshot.labels()["note"];
                    assert!(taken.notes.contains(note), "{when}: {id} has the note {note:?}");
                    (taken.process, taken.step)
                }
                None => {
                    let record = snapshot.record();
                    let at = maybe_taken.iter().position(|(process, _)| *process == record.process);
                    maybe_taken.remove(at.unwrap_or_else(|| panic!("{when}: nobody took {id}")))
                }
            };
            let restored = self.store().restore(id).and_then(|restore| restore.into_mapping());
            let restored = restored.unwrap_or_else(|error| panic!("{when}: {id}: {}", whole_error(&error)));
            let steps = if self.live.contains_key(&id) { step..step + 1 } else { 0..STEPS };
            let is_whole = steps.into_iter().any(|step| restored[..] == self.memories[&(process, step)][..]);
            assert!(is_whole, "{when}: {id} is not {process} {step}");
        }
        for id in self.live.keys() {
            let may_be_gone = self.maybe_forgotten.contains(id);
            assert!(found.contains(id) || may_be_gone, "{when}: {id} is gone");
        }
        let report = self.store().verify(&VerifyOptions::default()).unwrap();
        assert_eq!(report.problems, [], "{when}");
    }
}

const STEPS: usize = 5;
const PROCESSES: [&str; 2] = ["web", "vm"];

/// Every operation on a store, in few calls.
fn play(model: &mut Model<'_>) {
    model.open();
    model.capture("web", 0);
    model.capture("vm", 0);
    model.capture("web", 1);
    model.label("web", 1, "a note");
    model.restore("web", 1);
    model.forget("web", 0);
    model.gc();
    model.capture("vm", 1);
    model.forget("vm", 0);
    model.capture("web", 2);
    model.gc();
    model.forget("web", 1);
    model.gc();
    model.verify();
    model.close();
    model.open();
    model.capture("web", 3);
    model.forget("vm", 1);
    model.gc();
    model.close();
    model.repair();
    model.open();
    model.restore("web", 3);
    // The disk has recovered, and the same open store must be usable.
    model.disk.recover();
    if model.disk.hits() > 0 {
        model.check("in the same store");
    }
    assert!(model.capture("web", 4), "a capture");
    model.forget("web", 2);
    assert!(model.gc(), "a gc");
    assert!(model.gc(), "another gc");
    model.check("after gc");
    model.close();
    model.open();
    model.check("after an opening");
    model.close();
    // The same holds with the packs alone.
    std::fs::remove_dir_all(model.path.join("index")).unwrap();
    model.open();
    model.check("without the index");
}

/// The calls and errors of one run.
struct Played {
    made: Vec<Made>,
    hits: usize,
    errors: BTreeSet<String>,
}

fn play_with(plan: Option<Plan>) -> Played {
    static MEMORIES: std::sync::OnceLock<HashMap<(&'static str, usize), Vec<u8>>> =
        std::sync::OnceLock::new();
    let memories = MEMORIES.get_or_init(|| {
        let steps = |process| (0..STEPS).map(move |step| ((process, step), memory(process, step)));
        PROCESSES.into_iter().flat_map(steps).collect()
    });
    // The database syncs its index needlessly here: in memory a sync costs nothing.
    let shm = Path::new("/dev/shm");
    let dir = tempfile::tempdir_in(shm).or_else(|_| tempfile::tempdir()).unwrap();
    let path = dir.path().join("store");
    let disk = Arc::new(Disk { plan, ..Disk::default() });
    let watching = watch(&path, disk.clone());
    let mut model = Model {
        path,
        disk: &disk,
        memories,
        store: None,
        live: BTreeMap::new(),
        forgotten: BTreeSet::new(),
        maybe_taken: Vec::new(),
        maybe_forgotten: BTreeSet::new(),
        ill: 0,
        errors: BTreeSet::new(),
    };
    play(&mut model);
    let errors = std::mem::take(&mut model.errors);
    drop(model);
    drop(watching);
    let made = std::mem::take(&mut *disk.made.lock().unwrap());
    assert_nothing_follows_a_failed_sync(&made);
    Played { made, hits: disk.hits(), errors }
}

/// The content of a file on disk is unknown after a failed sync, so nothing may be appended to it.
fn assert_nothing_follows_a_failed_sync(made: &[Made]) {
    let mut failed: BTreeSet<&Path> = BTreeSet::new();
    for call in made {
        match call.name {
            "sync" if call.failed => drop(failed.insert(&call.path)),
            // The file is created again, or another opening of the store opens it.
            "create" | "open" => drop(failed.remove(&*call.path)),
            "write" => assert!(!failed.contains(&*call.path), "{} is written to", call.path.display()),
            _ => {}
        }
    }
}

// ---- The tests ----------------------------------------------------------------------------------

/// Counts panics of all threads, including threads that no test joins.
fn panics() -> &'static AtomicUsize {
    static PANICS: AtomicUsize = AtomicUsize::new(0);
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            PANICS.fetch_add(1, Ordering::SeqCst);
            before(info);
        }));
    });
    &PANICS
}

/// Runs the scenario for one in `share` faults.
fn play_all(alone: bool, share: usize) {
    let share = if std::env::var("STILLFRAME_DISK_ERRORS").is_ok_and(|it| it == "all") { 1 } else { share };
    let calls = play_with(None).made;
    let mut plans = Vec::new();
    for (at_call, call) in calls.iter().enumerate() {
        for fault in faults(call.name) {
            plans.push(Plan { at_call, name: call.name.to_owned(), fault, alone });
        }
    }
    let (mut runs, mut hits) = (0, 0);
    let mut errors: BTreeMap<String, usize> = BTreeMap::new();
    let mut wrong = Vec::new();
    for plan in plans.iter().step_by(share) {
        runs += 1;
        let played = std::panic::catch_unwind(|| play_with(Some(plan.clone())));
        match played {
            Ok(played) => {
                hits += played.hits;
                played.errors.into_iter().for_each(|error| *errors.entry(error).or_default() += 1);
            }
            Err(_) => wrong.push(format!("{plan:?} {}", calls[plan.at_call].path.display())),
        }
    }
    println!("{} calls, {} faults, {runs} of them played, {hits} calls failed", calls.len(), plans.len());
    for (error, count) in errors {
        println!("{count:>5} {error}");
    }
    assert!(wrong.is_empty(), "{} of {runs}:\n{}", wrong.len(), wrong.join("\n"));
    assert_eq!(panics().load(Ordering::SeqCst), 0, "something panicked behind the scenes");
}

#[test]
fn every_call_may_fail_alone() {
    play_all(true, 2);
}

#[test]
fn every_call_may_fail_and_all_like_it_after_it() {
    play_all(false, 3);
}
/// Makes the selected calls fail with EIO, and a write after half of its bytes.
struct Fails<F>(F);

impl<F: Fn(&Call<'_>) -> bool + Send + Sync> Witness for Fails<F> {
    fn call(&self, call: &Call<'_>, act: &mut dyn FnMut() -> io::Result<()>) -> io::Result<()> {
        if !(self.0)(call) {
            return act();
        }
        if let Call::Write { file, at_bytes, bytes, .. } = call {
            file.write_all_at(&bytes[..bytes.len() / 2], *at_bytes).unwrap();
        }
        Err(io::Error::from_raw_os_error(EIO))
    }
}

fn capture(store: &Store, memory: &[u8]) -> Result<SnapshotId, Error> {
    store.process("web").capture(memory, &CaptureOptions::default()).map(|done| done.id)
}

#[track_caller]
fn assert_whole(store: &Store, snapshots: &[(SnapshotId, Vec<u8>)]) {
    let found: BTreeSet<SnapshotId> = store.snapshots().iter().map(|snapshot| snapshot.id()).collect();
    assert_eq!(found, snapshots.iter().map(|(id, _)| *id).collect());
    for (id, memory) in snapshots {
        assert!(store.restore(*id).unwrap().into_mapping().unwrap()[..] == memory[..]);
    }
    assert_eq!(store.verify(&VerifyOptions::default()).unwrap().problems, []);
}

#[test]
fn a_record_that_could_not_be_made_durable_does_not_come_back_after_gc_dropped_what_it_needs() {
    for cutting_fails in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("store");
        let store = Store::options().create(&path).unwrap();
        let memories: Vec<Vec<u8>> = (0..3).map(|step| memory("web", step)).collect();
        let first = capture(&store, &memories[0]).unwrap();
        // The first sync of a capture covers what the record refers to, the second the record.
        let syncs = AtomicUsize::new(0);
        let ill = move |call: &Call<'_>| match call {
            Call::Sync(..) => syncs.fetch_add(1, Ordering::SeqCst) == 1,
            Call::SetLength { .. } => cutting_fails,
            _ => false,
        };
        let watching = watch(&path, Arc::new(Fails(ill)));
        capture(&store, &memories[1]).unwrap_err();
        drop(watching);
        // Most of the pack is in use, so gc leaves it as it is.
        let stats = store.gc(&GcOptions::new().max_unused_percent(90)).unwrap();
        assert!(stats.dead_regions > 0);
        assert_eq!(stats.packs_rewritten, 0);
        drop(store);
        let store = Store::open(&path).unwrap();
        assert_whole(&store, &[(first, memories[0].clone())]);
        let last = capture(&store, &memories[2]).unwrap();
        store.gc(&gc_options()).unwrap();
        assert_whole(&store, &[(first, memories[0].clone()), (last, memories[2].clone())]);
    }
}

#[test]
fn what_a_failed_write_left_behind_is_cut_off_before_another_pack_is_begun() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("store");
    let store = Store::options().create(&path).unwrap();
    let memories: Vec<Vec<u8>> = (0..2).map(|step| memory("web", step)).collect();
    let first = capture(&store, &memories[0]).unwrap();
    let ill = |call: &Call<'_>| matches!(call, Call::Write { .. } | Call::SetLength { .. });
    let watching = watch(&path, Arc::new(Fails(ill)));
    for _ in 0..2 {
        let error = capture(&store, &memories[1]).unwrap_err();
        assert!(whole_error(&error).contains("00000001"), "{}", whole_error(&error));
    }
    drop(watching);
    let last = capture(&store, &memories[1]).unwrap();
    let both = [(first, memories[0].clone()), (last, memories[1].clone())];
    assert_whole(&store, &both);
    assert_eq!(std::fs::read_dir(path.join("packs")).unwrap().count(), 2);
    drop(store);
    assert_whole(&Store::open(&path).unwrap(), &both);
}

#[test]
fn an_index_that_cannot_be_replaced_stays_and_is_replaced_later() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("store");
    let store = Store::options().region_size(RegionSize::new(512).unwrap()).create(&path).unwrap();
    // So many regions that gc rewrites the index when they are removed.
    let large: Vec<u8> = (0..9_000u32).flat_map(|region| [region.to_le_bytes(); 128].concat()).collect();
    let small = memory("web", 0);
    let first = capture(&store, &large).unwrap();
    let last = capture(&store, &small).unwrap();
    store.forget(&[first]).unwrap();
    let watching = watch(&path, Arc::new(Fails(|call: &Call<'_>| matches!(call, Call::Exchange(..)))));
    let error = store.gc(&gc_options()).unwrap_err();
    assert!(whole_error(&error).contains("index"), "{}", whole_error(&error));
    assert_whole(&store, &[(last, small.clone())]);
    drop(watching);
    assert!(store.gc(&gc_options()).unwrap().freed_bytes > 1 << 19);
    assert_whole(&store, &[(last, small.clone())]);
    drop(store);
    assert_whole(&Store::open(&path).unwrap(), &[(last, small)]);
}
