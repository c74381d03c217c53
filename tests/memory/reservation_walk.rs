//! Random walks of one memory in place. After any sequence of operations its bytes and its
//! snapshots equal those of a plain model. In between, pages are discarded, snapshots are
//! forgotten, and gc runs. Other tests check what a forked child keeps alive.
//!
//! `STILLFRAME_RESERVATION_WALKS=2000 cargo test --test memory reservation_walk -- --nocapture`
//! walks longer, and prints how many bytes were compared. A failing walk is shrunk and printed.

use std::cell::Cell;
use std::sync::mpsc;
use std::time::Duration;

use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use stillframe::lazy::{Fill, Filled};
use stillframe::store::StoreError;
use stillframe::track::{TrackMethod, Tracking};
use stillframe::{CaptureOptions, Error, GcOptions, Reservation, SnapshotId, Store, Template};

use crate::noise::noise;
use crate::vault::new_store;

const KIB: usize = 1 << 10;
const MIB: usize = 1 << 20;
/// The reserved length, in bytes.
const RESERVED: usize = 512 * KIB;

fn restored(store: &Store, id: SnapshotId) -> Vec<u8> {
    let restore = store.restore(id).unwrap();
    if restore.image_bytes() == 0 { Vec::new() } else { restore.into_mapping().unwrap().to_vec() }
}

fn throw_away(memory: &mut Reservation, start: usize, length: usize) {
    let start = memory.bytes_mut()[start..].as_mut_ptr();
    // SAFETY: whole pages of the memory, which is private and to which no reference exists.
    let answer = unsafe { libc::madvise(start.cast(), length, libc::MADV_DONTNEED) };
    assert_eq!(answer, 0, "{}", std::io::Error::last_os_error());
}

// ---- The walk -----------------------------------------------------------------------------------

#[derive(Clone, Copy, Debug)]
enum Parent {
    Basis,
    Any(usize),
    None,
}

#[derive(Clone, Debug)]
enum Step {
    Write(usize, usize, u64),
    /// Writes bytes that are there already.
    Touch(usize),
    ThrowAway(usize, usize),
    Resize(usize),
    Track,
    Capture(Parent),
    /// The memory changes between the capture and the moment at which the snapshot is durable.
    StartCapture(usize),
    Restore(usize),
    RestoreLazily(usize, Fill),
    Template(usize),
    Instantiate(usize),
    Rollback(usize),
    Forget(usize),
    Collect,
    Compare,
}

fn walk() -> impl Strategy<Value = (u32, Vec<Step>)> {
    let nth = || 0usize..12;
    let fill = prop_oneof![Just(Fill::WorkingSetFirst), Just(Fill::ByAddress), Just(Fill::OnFault)];
    let parent =
        prop_oneof![6 => Just(Parent::Basis), 2 => nth().prop_map(Parent::Any), 1 => Just(Parent::None)];
    let step = prop_oneof![
        6 => (0..RESERVED, 1..40 * KIB, any::<u64>()).prop_map(|(at, length, seed)| Step::Write(at, length, seed)),
        2 => (0..RESERVED).prop_map(Step::Touch),
        4 => (0..RESERVED / 4096, 1usize..30).prop_map(|(page, pages)| Step::ThrowAway(page, pages)),
        2 => (0..RESERVED).prop_map(Step::Resize),
        1 => (0usize..8).prop_map(|pages| Step::Resize(pages * 64 * KIB)),
        1 => Just(Step::Track),
        5 => parent.prop_map(Step::Capture),
        2 => (0..RESERVED).prop_map(Step::StartCapture),
        1 => nth().prop_map(Step::Restore),
        2 => (nth(), fill).prop_map(|(nth, fill)| Step::RestoreLazily(nth, fill)),
        1 => nth().prop_map(Step::Template),
        3 => nth().prop_map(Step::Instantiate),
        4 => nth().prop_map(Step::Rollback),
        1 => nth().prop_map(Step::Forget),
        1 => Just(Step::Collect),
        1 => Just(Step::Compare),
    ];
    let region_bytes = prop_oneof![Just(512u32), Just(4096), Just(16_384), Just(65_536)];
    (region_bytes, prop::collection::vec(step, 1..60))
}

/// The memory, and what the model knows about it.
struct Walk<'a> {
    store: &'a Store,
    memory: Reservation,
    bytes: Vec<u8>,
    /// The content of a page after it was discarded: a template's byte, or zero.
    beneath: Vec<u8>,
    /// Snapshots that are not forgotten, and their expected bytes.
    moments: Vec<(SnapshotId, Vec<u8>)>,
    templates: Vec<(Template, Vec<u8>)>,
    compared_bytes: &'a Cell<u64>,
}

impl Walk<'_> {
    fn moment(&self, nth: usize) -> Option<(SnapshotId, Vec<u8>)> {
        (!self.moments.is_empty()).then(|| self.moments[nth % self.moments.len()].clone())
    }

    fn options(&self, parent: Parent) -> CaptureOptions {
        let parent = match parent {
            Parent::Basis => self.memory.basis().filter(|basis| self.store.snapshot(*basis).is_ok()),
            Parent::Any(nth) => self.moment(nth).map(|(id, _)| id),
            Parent::None => None,
        };
        CaptureOptions::new().parent(parent)
    }

    /// The memory now has these bytes, in private anonymous pages.
    fn becomes(&mut self, image: Vec<u8>) {
        self.beneath = vec![0; RESERVED];
        self.bytes = image;
    }

    fn compare(&mut self, id: SnapshotId, expected: &[u8]) -> Result<(), TestCaseError> {
        self.compared_bytes.set(self.compared_bytes.get() + expected.len() as u64);
        let found = restored(self.store, id);
        let differs = found.iter().zip(expected).position(|(found, expected)| found != expected);
        prop_assert!(found == expected, "snapshot {id} of {} bytes, from byte {differs:?}", found.len());
        Ok(())
    }

    fn step(&mut self, step: Step) -> Result<(), TestCaseError> {
        match step {
            Step::Write(at, length, seed) => {
                let end = (at + length).min(self.bytes.len());
                if at < end {
                    self.bytes[at..end].copy_from_slice(&noise(end - at, seed));
                    self.memory.bytes_mut()[at..end].copy_from_slice(&self.bytes[at..end]);
                }
            }
            Step::Touch(at) => {
                if let Some(byte) = self.bytes.get(at) {
                    self.memory.bytes_mut()[at] = *byte;
                }
            }
            Step::ThrowAway(page, pages) => {
                // Tracking starts when everything is filled; see `LazyMapping`.
                self.memory.track_writes_if_possible().unwrap();
                let whole = self.bytes.len().next_multiple_of(4096);
                let (start, end) = (page * 4096, whole.min((page + pages) * 4096));
                if start < end && start < self.bytes.len() {
                    throw_away(&mut self.memory, start, end - start);
                    let end = end.min(self.bytes.len());
                    self.bytes[start..end].copy_from_slice(&self.beneath[start..end]);
                }
            }
            Step::Resize(length) => {
                let before = self.bytes.len();
                self.memory.set_length_bytes(length).unwrap();
                self.bytes.resize(length, 0);
                // The part that it had lost by shrinking is now mapped without a file. The last
                // page still belongs to the template.
                let fresh = before.min(length).next_multiple_of(4096);
                self.beneath[fresh.min(RESERVED)..].fill(0);
            }
            Step::Track => self.memory.track_writes_if_possible().unwrap(),
            Step::Capture(parent) => {
                let taken = self.store.process("p").capture(&self.memory, &self.options(parent)).unwrap();
                let image = self.bytes.clone();
                self.compare(taken.id, &image)?;
                self.moments.push((taken.id, image));
            }
            Step::StartCapture(at) => {
                let options = self.options(Parent::Basis);
                let image = self.bytes.clone();
                let pending = self.store.process("p").start_capture(&self.memory, &options).unwrap();
                if at < self.bytes.len() {
                    self.bytes[at] ^= 0x55;
                    self.memory.bytes_mut()[at] ^= 0x55;
                }
                let taken = pending.wait().unwrap();
                self.compare(taken.id, &image)?;
                self.moments.push((taken.id, image));
            }
            Step::Restore(nth) => {
                let Some((id, image)) = self.moment(nth) else { return Ok(()) };
                self.memory.restore(self.store.restore(id).unwrap()).unwrap();
                self.becomes(image);
            }
            Step::RestoreLazily(nth, fill) => {
                let Some((id, image)) = self.moment(nth) else { return Ok(()) };
                self.memory.restore_lazily(self.store.restore(id).unwrap(), fill).unwrap();
                self.becomes(image);
            }
            Step::Template(nth) => {
                let Some((id, image)) = self.moment(nth) else { return Ok(()) };
                self.templates.push((self.store.template(id).unwrap(), image));
            }
            Step::Instantiate(nth) => {
                if self.templates.is_empty() {
                    return self.step(Step::Template(nth));
                }
                let (template, image) = self.templates[nth % self.templates.len()].clone();
                self.memory.instantiate(&template).unwrap();
                self.beneath[..image.len()].copy_from_slice(&image);
                self.beneath[image.len()..].fill(0);
                self.bytes = image;
            }
            Step::Rollback(nth) => {
                let Some((id, image)) = self.moment(nth) else { return Ok(()) };
                let before = self.bytes.len();
                self.memory.rollback(self.store.rollback(id).unwrap()).unwrap();
                let fresh = before.min(image.len()).next_multiple_of(4096);
                self.beneath[fresh.min(RESERVED)..].fill(0);
                self.bytes = image;
            }
            Step::Forget(nth) => {
                let Some((id, _)) = self.moment(nth) else { return Ok(()) };
                self.store.forget(&[id]).unwrap();
                self.moments.retain(|(other, _)| *other != id);
                let again = self.store.forget(&[id]).unwrap_err();
                prop_assert!(matches!(again, Error::Store(StoreError::NoSuchSnapshot { .. })), "{again:?}");
            }
            Step::Collect => {
                self.store.gc(&GcOptions::new().max_unused_percent(0)).unwrap();
            }
            Step::Compare => self.look()?,
        }
        prop_assert_eq!(self.memory.length_bytes(), self.bytes.len());
        Ok(())
    }

    fn look(&mut self) -> Result<(), TestCaseError> {
        self.compared_bytes.set(self.compared_bytes.get() + self.bytes.len() as u64);
        let found = self.memory.bytes_mut();
        let differs = found.iter().zip(&self.bytes).position(|(found, expected)| found != expected);
        prop_assert!(*found == self.bytes[..], "the memory, from byte {differs:?}");
        Ok(())
    }
}

#[test]
fn on_a_random_walk_the_memory_and_all_its_snapshots_are_those_of_a_model() {
    let cases = std::env::var("STILLFRAME_RESERVATION_WALKS").map_or(24, |cases| cases.parse().unwrap());
    let config = Config { cases, failure_persistence: None, max_shrink_iters: 4096, ..Config::default() };
    let (compared_bytes, comparisons) = (Cell::new(0), Cell::new(0u64));
    let run = |(region_bytes, steps): (u32, Vec<Step>)| {
        let (_dir, store) = new_store(region_bytes);
        let mut memory = Reservation::new(RESERVED, 64 * KIB).unwrap();
        memory.set_length_bytes(300_000).unwrap();
        memory.track_writes_if_possible().unwrap();
        let mut walk = Walk {
            store: &store,
            memory,
            bytes: vec![0; 300_000],
            beneath: vec![0; RESERVED],
            moments: Vec::new(),
            templates: Vec::new(),
            compared_bytes: &compared_bytes,
        };
        for step in steps {
            walk.step(step)?;
            comparisons.set(comparisons.get() + 1);
        }
        walk.look()?;
        for (id, image) in std::mem::take(&mut walk.moments) {
            walk.compare(id, &image)?;
            comparisons.set(comparisons.get() + 1);
        }
        Ok(())
    };
    TestRunner::new(config).run(&walk(), run).unwrap();
    println!(
        "{cases} walks, {} steps and snapshots, {} MiB compared",
        comparisons.get(),
        compared_bytes.get() >> 20
    );
}

// ---- Faults that walks have found ---------------------------------------------------------------

#[test]
fn what_a_rollback_writes_is_known_when_it_is_thrown_away() {
    let (_dir, store) = new_store(4096);
    let capture = |name: &str, byte: u8| {
        store.process(name).capture(&vec![byte; MIB], &CaptureOptions::default()).unwrap().id
    };
    let (sevens, nines) = (capture("a", 7), capture("b", 9));
    let template = store.template(sevens).unwrap();
    let options = |parent| CaptureOptions::new().parent(parent);

    let mut memory = Reservation::new(MIB, 4096).unwrap();
    memory.instantiate(&template).unwrap();
    memory.rollback(store.rollback(nines).unwrap()).unwrap();
    throw_away(&mut memory, 64 * KIB, 64 * KIB);
    let taken = store.process("c").capture(&memory, &options(memory.basis())).unwrap();
    assert_eq!((taken.parent, &taken.tracking), (Some(nines), &Tracking::By(TrackMethod::CopyOnWrite)));
    assert!(restored(&store, taken.id) == *memory.bytes_mut());

    // The same for an instance outside of a reservation, with its own tracker.
    use stillframe::source::Source;
    let mut instance = template.instance().unwrap();
    let tracker = instance.tracker().unwrap();
    store.rollback(nines).unwrap().tracked_by(&*tracker).slice(&mut instance).unwrap();
    // SAFETY: whole pages of the instance, which nothing borrows.
    let answer =
        unsafe { libc::madvise(instance[64 * KIB..].as_mut_ptr().cast(), 64 * KIB, libc::MADV_DONTNEED) };
    assert_eq!((answer, instance[64 * KIB], instance[0]), (0, 7, 9));
    let taken = store.process("d").capture(&instance, &options(Some(instance.parent()))).unwrap();
    assert_eq!((taken.parent, &taken.tracking), (Some(nines), &Tracking::By(TrackMethod::CopyOnWrite)));
    assert!(restored(&store, taken.id) == instance[..]);
}

#[test]
fn an_instance_grows_by_zeros_also_where_its_last_page_was_thrown_away() {
    let (_dir, store) = new_store(4096);
    let id = store.process("a").capture(&vec![7; 64 * KIB], &CaptureOptions::default()).unwrap().id;
    let mut memory = Reservation::new(MIB, 0).unwrap();
    memory.instantiate(&store.template(id).unwrap()).unwrap();
    memory.set_length_bytes(5000).unwrap();
    throw_away(&mut memory, 4096, 4096);
    memory.set_length_bytes(9000).unwrap();
    assert_eq!((memory.bytes_mut()[4999], memory.bytes_mut()[5000], memory.bytes_mut()[8999]), (7, 0, 0));
}

// ---- A child ------------------------------------------------------------------------------------

/// A process that was forked from this one and does nothing.
struct Child(libc::pid_t);

impl Child {
    fn fork() -> Child {
        // SAFETY: the child calls only `pause` and `_exit`.
        match unsafe { libc::fork() } {
            0 => loop {
                // SAFETY: as above.
                unsafe {
                    libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                    libc::pause();
                }
            },
            pid => {
                assert!(pid > 0, "{}", std::io::Error::last_os_error());
                Child(pid)
            }
        }
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        // SAFETY: the child is ours, and nothing else waits for it.
        unsafe {
            libc::kill(self.0, libc::SIGKILL);
            libc::waitpid(self.0, std::ptr::null_mut(), 0);
        }
    }
}

#[test]
fn a_memory_that_is_not_filled_becomes_another_one_while_a_forked_child_lives() {
    let (_dir, store) = new_store(4096);
    let capture =
        |length: usize| store.process("p").capture(&noise(length, 3), &CaptureOptions::default()).unwrap().id;
    let (large, odd) = (capture(MIB), capture(200 * KIB + 100));
    let template = store.template(odd).unwrap();
    type Become<'a> = Box<dyn Fn(&mut Reservation) -> Result<(), Error> + Send + 'a>;
    let ways: Vec<(&str, Become<'_>)> = vec![
        ("instantiate", Box::new(|memory| memory.instantiate(&template))),
        ("restore", Box::new(|memory| memory.restore(store.restore(odd).unwrap()))),
        (
            "restore lazily",
            Box::new(|memory| memory.restore_lazily(store.restore(odd).unwrap(), Fill::OnFault).map(drop)),
        ),
        ("roll back", Box::new(|memory| memory.rollback(store.rollback(odd).unwrap()).map(drop))),
        ("resize", Box::new(|memory| memory.set_length_bytes(200 * KIB + 100))),
    ];
    for (name, way) in ways {
        let mut memory = Reservation::new(MIB, 0).unwrap();
        let filled = memory.restore_lazily(store.restore(large).unwrap(), Fill::OnFault).unwrap();
        if filled != Filled::Lazily {
            return eprintln!("passed over: {filled:?}");
        }
        // The child has a copy of the userfaultfd that serves the missing pages.
        let child = Child::fork();
        let (answer, answered) = mpsc::channel();
        std::thread::scope(|scope| {
            scope.spawn(move || {
                let done = way(&mut memory).map(|()| memory.bytes_mut().to_vec());
                answer.send(done.map_err(|error| error.to_string())).unwrap();
            });
            let found = answered.recv_timeout(Duration::from_secs(30));
            // Killed before any assertion: the thread may wait for it.
            drop(child);
            let found = found
                .unwrap_or_else(|_| panic!("{name}: it waits for a process that has nothing to do with it"));
            let found = found.unwrap_or_else(|error| panic!("{name}: {error}"));
            let expected = if name == "resize" {
                noise(MIB, 3)[..200 * KIB + 100].to_vec()
            } else {
                noise(200 * KIB + 100, 3)
            };
            assert!(found == expected, "{name}");
        });
    }
}
