//! An exhaustive model of the order of pins, roots, horizon and condemning: every interleaving of
//! gc with captures, forgets and a restore, on a store of a few objects.
//!
//! Other threads cannot see the middle of a step, in most cases because the thread holds a lock.
//! Each step names the code that it models. In every reachable state each live and each pinned
//! snapshot must be whole, including the bases of its deltas, and gc must find what it has to mark.
//! The test also removes the rules one by one, to show that the model can fail: without any one of
//! them it finds a snapshot that is lost.
//!
//! The model leaves out three things: captures of one process queue, and nothing here depends on
//! that; compaction does not change what the index means, so an object in the index is in the
//! packs; and the files, which tests/crashes/killed.rs and others test.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

/// A rule of the protocol. The model can omit one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Rule {
    /// A look-up does not return a condemned object.
    LookUpsAreGated,
    /// A capture pins a hash and looks it up inside the gate, and gc does not condemn in between.
    PinAndLookUpAreOneStep,
    /// gc reads the pins when it decides what is condemned, and not before the roots.
    PinsAreReadLast,
    /// Pins that are released while gc marks are handed over to it ...
    PinsAreHandedOver,
    /// ... from before gc reads the roots.
    HandOverBeginsBeforeRoots,
    /// gc takes the horizon before it reads the index, and reads the index before it marks.
    HorizonComesFirst,
    /// Everything before the horizon is settled before gc reads the index.
    AllBeforeTheHorizonIsSettled,
    /// A capture pins its parent as a whole.
    ParentsArePinned,
    /// gc also marks pinned snapshots that are not roots.
    PinnedSnapshotsAreMarked,
    /// Marking a delta marks its base.
    BasesAreMarked,
    /// A snapshot is found live and pinned in one step.
    PinningIsOneStep,
    /// A capture keeps its pins until its record is durable.
    PinsOutliveTheCommit,
    /// gc drops only the copy that was condemned, and not one that was stored since.
    DropsAreOfOneCopy,
    /// The gate opens after everything condemned is dropped.
    CondemnedUntilDropped,
}

const RULES: [Rule; 14] = [
    Rule::LookUpsAreGated,
    Rule::PinAndLookUpAreOneStep,
    Rule::PinsAreReadLast,
    Rule::PinsAreHandedOver,
    Rule::HandOverBeginsBeforeRoots,
    Rule::HorizonComesFirst,
    Rule::AllBeforeTheHorizonIsSettled,
    Rule::ParentsArePinned,
    Rule::PinnedSnapshotsAreMarked,
    Rule::BasesAreMarked,
    Rule::PinningIsOneStep,
    Rule::PinsOutliveTheCommit,
    Rule::DropsAreOfOneCopy,
    Rule::CondemnedUntilDropped,
];

// Hashes and snapshots are numbers; a set of them is a bit mask.
const HASHES: usize = 4;
const SNAPSHOTS: usize = 4;
type Set = u8;

fn members(set: Set) -> impl Iterator<Item = usize> {
    (0..8).filter(move |at| set & 1 << at != 0)
}

/// Where an object is in the log, and its base if it is a delta.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Copy {
    at: u8,
    base: Option<u8>,
}

const fn whole(at: u8) -> Option<Copy> {
    Some(Copy { at, base: None })
}

const fn delta(at: u8, base: u8) -> Option<Copy> {
    Some(Copy { at, base: Some(base) })
}

/// The operations that run concurrently.
struct Scenario {
    name: &'static str,
    /// What is stored at the beginning, before position 4.
    index: [Option<Copy>; HASHES],
    /// What each snapshot refers to, including snapshots that are not taken yet.
    contents: [Set; SNAPSHOTS],
    live: Set,
    captures: &'static [Capture],
    /// Snapshots that may be forgotten, each at any time.
    forgets: Set,
    restores: Option<usize>,
    rounds: u8,
}

struct Capture {
    takes: usize,
    parent: Option<usize>,
    /// An object that may be stored as a difference, and its base.
    like: Option<(usize, usize)>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
struct State {
    // store/index/mod.rs, store/packs/log.rs
    index: [Option<Copy>; HASHES],
    pending: [Option<Copy>; HASHES],
    position: u8,
    // store/catalog.rs
    live: Set,
    forgotten: Set,
    // store/gate.rs: `Pins` and `condemned`
    capture_pins: [Set; 2],
    snapshot_pins: [u8; SNAPSHOTS],
    handed_over: Option<(Set, Set)>,
    /// What is marked, once it is published. Together with the horizon it says what is condemned.
    condemned: Option<Set>,
    gc: Gc,
    captures: [CaptureState; 2],
    restore: u8,
}

/// gc.rs: `Collecting` and `Marking`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
struct Gc {
    round: u8,
    step: u8,
    horizon: u8,
    /// `Marks`: what is in the index and may be marked, and the bases of the deltas there.
    known: Set,
    bases: [Option<u8>; HASHES],
    marked: Set,
    marked_snapshots: Set,
    to_mark: Set,
    early_pins: Option<(Set, Set)>,
    dead: [Option<u8>; HASHES],
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
struct CaptureState {
    step: u8,
    has_parent: bool,
    /// What is still to be looked up; the first of these is in progress.
    left: Set,
    base: Option<u8>,
    given_up: bool,
}

/// Steps of a capture.
const BEGIN: u8 = 0;
const LOOK_UP: u8 = 1;
const LATE_PIN: u8 = 2;
const CHOOSE_BASE: u8 = 3;
const APPEND: u8 = 4;
const COMMIT: u8 = 5;
const GIVE_UP_PINS: u8 = 6;
const GIVE_UP_PARENT: u8 = 7;
const DONE: u8 = 8;

impl State {
    fn copy(&self, hash: usize) -> Option<Copy> {
        self.pending[hash].or(self.index[hash])
    }

    fn is_grounded(&self, hash: usize) -> bool {
        let mut next = Some(hash as u8);
        for _ in 0..=HASHES {
            let Some(hash) = next else { return true };
            let Some(copy) = self.copy(hash as usize) else { return false };
            next = copy.base;
        }
        false
    }

    fn is_whole(&self, contents: Set) -> bool {
        members(contents).all(|hash| self.is_grounded(hash))
    }

    fn pinned_snapshots(&self) -> Set {
        (0..SNAPSHOTS).filter(|at| self.snapshot_pins[*at] > 0).fold(0, |set, at| set | 1 << at)
    }

    fn is_condemned(&self, copy: Copy, hash: usize) -> bool {
        self.condemned.is_some_and(|marked| copy.at < self.gc.horizon && marked & 1 << hash == 0)
    }

    /// `Marks::mark_prefix`
    fn mark(&mut self, set: Set, bases: bool) {
        let mut left = set & self.gc.known & !self.gc.marked;
        while let Some(hash) = members(left).next() {
            self.gc.marked |= 1 << hash;
            if let Some(base) = self.gc.bases[hash].filter(|_| bases) {
                left |= 1 << base;
            }
            left &= self.gc.known & !self.gc.marked;
        }
    }

    /// `SnapshotGuard::drop`
    fn unpin(&mut self, snapshot: usize, hand_over: bool) {
        self.snapshot_pins[snapshot] -= 1;
        if let (0, Some((_, snapshots)), true) =
            (self.snapshot_pins[snapshot], &mut self.handed_over, hand_over)
        {
            *snapshots |= 1 << snapshot;
        }
    }
}

struct Model<'a> {
    scenario: &'a Scenario,
    without: Option<Rule>,
}

type Steps = Vec<(&'static str, Result<State, &'static str>)>;

impl Model<'_> {
    fn has(&self, rule: Rule) -> bool {
        self.without != Some(rule)
    }

    fn steps(&self, state: &State, to: &mut Steps) {
        self.gc(state, to);
        (0..self.scenario.captures.len()).for_each(|at| self.capture(at, state, to));
        // settle.rs: durable objects go into the index at any time.
        if state.pending != [None; HASHES] {
            let mut next = *state;
            settle(&mut next);
            to.push(("settle", Ok(next)));
        }
        // `Shared::commit_tombstones`
        for snapshot in members(self.scenario.forgets & state.live) {
            let mut next = *state;
            next.live &= !(1 << snapshot);
            next.forgotten |= 1 << snapshot;
            to.push(("forget", Ok(next)));
        }
        self.restore(state, to);
    }

    /// `Store::restore`: `Shared::pin`, and the end of the `Restore`. Every state is checked for
    /// what is pinned.
    fn restore(&self, state: &State, to: &mut Steps) {
        let Some(snapshot) = self.scenario.restores else { return };
        let mut next = *state;
        let is_live = state.live & 1 << snapshot != 0;
        let label = match state.restore {
            // This step exists only without the rule, as the code once was: the snapshot is seen
            // live, then pinned, then looked up again.
            0 if is_live && !self.has(Rule::PinningIsOneStep) => {
                next.restore = 10;
                "restore: found"
            }
            10 => {
                next.snapshot_pins[snapshot] += 1;
                next.restore = 11;
                "restore: pin what was found"
            }
            11 => {
                if !is_live {
                    next.unpin(snapshot, true);
                }
                next.restore = if is_live { 1 } else { 2 };
                "restore: look again"
            }
            0 if is_live => {
                next.snapshot_pins[snapshot] += 1;
                next.restore = 1;
                "restore: pin"
            }
            1 => {
                next.unpin(snapshot, self.has(Rule::PinsAreHandedOver));
                next.restore = 2;
                "restore: done"
            }
            _ => return,
        };
        to.push((label, Ok(next)));
    }

    fn capture(&self, at: usize, state: &State, to: &mut Steps) {
        let capture = &self.scenario.captures[at];
        let mut next = *state;
        let contents = self.scenario.contents[capture.takes];
        let own = state.captures[at];
        let hash = members(own.left).next();
        let after_one = |next: &mut State| {
            let own = &mut next.captures[at];
            own.left &= own.left.wrapping_sub(1);
            own.step = if own.left == 0 { COMMIT } else { LOOK_UP };
        };
        let label = match own.step {
            BEGIN => {
                // `Gate::begin_capture`, `Reference::newest_of`. Without a parent everything is
                // looked up.
                let parent = capture.parent.filter(|parent| state.live & 1 << parent != 0);
                if let Some(parent) = parent.filter(|_| self.has(Rule::ParentsArePinned)) {
                    next.snapshot_pins[parent] += 1;
                }
                let own = &mut next.captures[at];
                own.has_parent = parent.is_some();
                own.left = contents & !parent.map_or(0, |parent| self.scenario.contents[parent]);
                own.step = if own.left == 0 { COMMIT } else { LOOK_UP };
                "capture: begin, pin the parent"
            }
            LOOK_UP => {
                // `Put::known` in `CaptureGuard::pin_and`
                let hash = hash.unwrap();
                if self.has(Rule::PinAndLookUpAreOneStep) {
                    next.capture_pins[at] |= 1 << hash;
                }
                let found = state
                    .copy(hash)
                    .filter(|copy| !(self.has(Rule::LookUpsAreGated) && state.is_condemned(*copy, hash)));
                match found {
                    Some(_) if !self.has(Rule::PinAndLookUpAreOneStep) => next.captures[at].step = LATE_PIN,
                    Some(_) => after_one(&mut next),
                    None => {
                        next.capture_pins[at] |= 1 << hash;
                        next.captures[at].step = CHOOSE_BASE;
                    }
                }
                "capture: pin and look up"
            }
            LATE_PIN => {
                next.capture_pins[at] |= 1 << hash.unwrap();
                after_one(&mut next);
                "capture: pin too late"
            }
            CHOOSE_BASE => {
                // capture/put.rs `base`: the object in the same place, or one of its bases.
                next.captures[at].step = APPEND;
                let like = capture.like.filter(|(of, _)| own.has_parent && Some(*of) == hash);
                if let Some((_, like)) = like {
                    if !state.is_grounded(like) {
                        return to.push(("capture: read a base", Err("a base cannot be read")));
                    }
                    next.captures[at].base = Some(like as u8);
                    if let Some(base) = state.copy(like).and_then(|copy| copy.base) {
                        let mut other = next;
                        other.captures[at].base = Some(base);
                        to.push(("capture: choose the base of the base", Ok(other)));
                    }
                }
                "capture: choose a base"
            }
            APPEND => {
                // `Log::append`, which skips what another thread has appended meanwhile
                let hash = hash.unwrap();
                if state.pending[hash].is_none() {
                    next.pending[hash] = Some(Copy { at: state.position, base: own.base });
                    next.position += 1;
                }
                next.captures[at].base = None;
                after_one(&mut next);
                "capture: append"
            }
            COMMIT => {
                // `Shared::commit_snapshot`
                if !self.has(Rule::PinsOutliveTheCommit) && !own.given_up {
                    self.give_up(at, &mut next);
                    next.captures[at].given_up = true;
                    to.push(("capture: give up the pins too soon", Ok(next)));
                    return;
                }
                next.live |= 1 << capture.takes;
                next.captures[at].step = GIVE_UP_PINS;
                "capture: commit"
            }
            GIVE_UP_PINS => {
                if !own.given_up {
                    self.give_up(at, &mut next);
                }
                next.captures[at].step = GIVE_UP_PARENT;
                "capture: give up the pins"
            }
            GIVE_UP_PARENT => {
                if let Some(parent) =
                    capture.parent.filter(|_| own.has_parent && self.has(Rule::ParentsArePinned))
                {
                    next.unpin(parent, self.has(Rule::PinsAreHandedOver));
                }
                next.captures[at] = CaptureState { step: DONE, ..CaptureState::default() };
                "capture: give up the parent"
            }
            _ => return,
        };
        to.push((label, Ok(next)));
    }

    /// `CaptureGuard::drop`
    fn give_up(&self, at: usize, next: &mut State) {
        let pins = std::mem::take(&mut next.capture_pins[at]);
        if let (Some((hashes, _)), true) = (&mut next.handed_over, self.has(Rule::PinsAreHandedOver)) {
            *hashes |= pins;
        }
    }

    fn gc(&self, state: &State, to: &mut Steps) {
        if state.gc.round == self.scenario.rounds {
            return;
        }
        let mut next = *state;
        next.gc.step += 1;
        let take_horizon = |next: &mut State| next.gc.horizon = next.position;
        let label = match state.gc.step {
            0 => {
                // `Gate::begin_gc`
                if self.has(Rule::HandOverBeginsBeforeRoots) {
                    next.handed_over = Some((0, 0));
                }
                "gc: begin"
            }
            1 => {
                // `Log::position`
                if self.has(Rule::HorizonComesFirst) {
                    take_horizon(&mut next);
                }
                "gc: take the horizon"
            }
            2 => {
                // `Marking::begin`: `Shared::sync`, `settle_all`
                if self.has(Rule::AllBeforeTheHorizonIsSettled) {
                    settle(&mut next);
                }
                "gc: settle"
            }
            3 => {
                // `Marks::with_bases`
                for hash in 0..HASHES {
                    if let Some(copy) = state.index[hash] {
                        next.gc.known |= 1 << hash;
                        next.gc.bases[hash] = copy.base;
                    }
                }
                "gc: read the index"
            }
            4 => {
                if !self.has(Rule::PinsAreReadLast) {
                    next.gc.early_pins = Some(pins(state));
                }
                // `Collecting::live`
                next.gc.to_mark = state.live;
                "gc: read the roots"
            }
            5 => {
                // `Marking::mark_all`
                for snapshot in members(state.gc.to_mark & !state.gc.marked_snapshots) {
                    let contents = self.scenario.contents[snapshot];
                    if !state.is_whole(contents) {
                        return to.push(("gc: mark", Err("gc cannot read what it is to mark")));
                    }
                    next.mark(contents, self.has(Rule::BasesAreMarked));
                }
                next.gc.marked_snapshots |= state.gc.to_mark;
                if !self.has(Rule::HorizonComesFirst) && state.gc.horizon == 0 {
                    take_horizon(&mut next);
                }
                if !self.has(Rule::HandOverBeginsBeforeRoots) && state.handed_over.is_none() {
                    next.handed_over = Some((0, 0));
                }
                "gc: mark"
            }
            6 => {
                // `Gate::condemn`, with the gate closed and the pins held
                let (hashes, snapshots) = state.gc.early_pins.unwrap_or(pins(state));
                let unmarked = snapshots & !state.gc.marked_snapshots;
                if unmarked != 0 && self.has(Rule::PinnedSnapshotsAreMarked) {
                    next.gc.to_mark = unmarked;
                    next.gc.step = 5;
                    "gc: there are pinned snapshots to mark"
                } else {
                    next.mark(hashes, self.has(Rule::BasesAreMarked));
                    next.condemned = Some(next.gc.marked);
                    next.handed_over = None;
                    "gc: condemn"
                }
            }
            7 => {
                // `Collecting::drop_dead`: which objects are dead, and where
                for hash in 0..HASHES {
                    let dead = state.index[hash].filter(|copy| state.is_condemned(*copy, hash));
                    next.gc.dead[hash] = dead.map(|copy| copy.at);
                }
                if !self.has(Rule::CondemnedUntilDropped) {
                    next.condemned = None;
                }
                "gc: see what is dead"
            }
            8 => match (0..HASHES).find(|hash| state.gc.dead[*hash].is_some()) {
                // `Index::replace`, one after the other
                Some(hash) => {
                    let at = next.gc.dead[hash].take();
                    let is_it = state.index[hash].map(|copy| copy.at) == at;
                    if is_it || !self.has(Rule::DropsAreOfOneCopy) {
                        next.index[hash] = None;
                    }
                    next.gc.step = 8;
                    "gc: drop"
                }
                None => {
                    // `Gate::end_gc`
                    next.condemned = None;
                    next.handed_over = None;
                    next.gc = Gc { round: state.gc.round + 1, ..Gc::default() };
                    "gc: end"
                }
            },
            _ => return,
        };
        to.push((label, Ok(next)));
    }

    /// What is wrong with a state, if anything.
    fn wrong(&self, state: &State) -> Option<&'static str> {
        let whole = |set: Set| members(set).all(|snapshot| state.is_whole(self.scenario.contents[snapshot]));
        // A restore that has not looked up the snapshot again has promised nothing yet.
        let mut pinned = state.pinned_snapshots();
        if let (Some(snapshot), 11) = (self.scenario.restores, state.restore)
            && state.snapshot_pins[snapshot] == 1
        {
            pinned &= !(1 << snapshot);
        }
        match (whole(state.live), whole(pinned)) {
            (false, _) => Some("a live snapshot lacks something"),
            (_, false) => Some("a pinned snapshot lacks something"),
            _ => None,
        }
    }

    /// Visits every reachable state. Returns how many there are, or how the first wrong one arises.
    fn explore(&self) -> Result<usize, String> {
        let start =
            State { index: self.scenario.index, position: 4, live: self.scenario.live, ..State::default() };
        let mut seen: HashMap<State, u32, BuildHasherDefault<Mix>> = HashMap::default();
        let mut all: Vec<(State, u32, &'static str)> = vec![(start, 0, "")];
        seen.insert(start, 0);
        let mut steps = Steps::new();
        let mut at = 0;
        while at < all.len() {
            let state = all[at].0;
            self.steps(&state, &mut steps);
            for (label, next) in steps.drain(..) {
                let wrong = next.as_ref().map_or_else(|why| Some(*why), |next| self.wrong(next));
                if let Some(why) = wrong {
                    let mut path = vec![label];
                    let mut from = at;
                    while from > 0 {
                        path.push(all[from].2);
                        from = all[from].1 as usize;
                    }
                    path.reverse();
                    let (name, count, path) = (self.scenario.name, path.len() - 1, path.join("\n  "));
                    return Err(format!("{name}: {why} after {count} steps:\n  {path}\n{next:#?}"));
                }
                let Ok(next) = next else { continue };
                if let std::collections::hash_map::Entry::Vacant(entry) = seen.entry(next) {
                    entry.insert(all.len() as u32);
                    all.push((next, at as u32, label));
                }
            }
            at += 1;
        }
        Ok(all.len())
    }
}

fn settle(state: &mut State) {
    for (pending, index) in state.pending.iter_mut().zip(&mut state.index) {
        *index = pending.take().or(*index);
    }
}

/// Everything that is pinned or was handed over.
fn pins(state: &State) -> (Set, Set) {
    let (hashes, snapshots) = state.handed_over.unwrap_or_default();
    (hashes | state.capture_pins[0] | state.capture_pins[1], snapshots | state.pinned_snapshots())
}

/// A fast hash function that is good enough for states.
#[derive(Default)]
struct Mix(u64);

impl Hasher for Mix {
    fn finish(&self) -> u64 {
        self.0 ^ self.0 >> 29
    }

    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.write_u64(u64::from(*byte));
        }
    }

    fn write_u8(&mut self, number: u8) {
        self.write_u64(u64::from(number));
    }

    fn write_u64(&mut self, number: u64) {
        self.0 = (self.0.rotate_left(5) ^ number).wrapping_mul(0x517C_C1B7_2722_0A95);
    }
}

/// Hash 0 is a base that only deltas need.
const SCENARIOS: [Scenario; 4] = [
    Scenario {
        name: "two captures find what a forgotten snapshot has, a delta and its base",
        index: [whole(0), delta(1, 0), whole(2), None],
        contents: [0b0110, 0b0000, 0b0110, 0b0010],
        live: 0b0001,
        captures: &[
            Capture { takes: 2, parent: None, like: None },
            Capture { takes: 3, parent: None, like: None },
        ],
        forgets: 0b0001,
        restores: Some(0),
        rounds: 1,
    },
    Scenario {
        name: "a child stores a delta, another finds it, the parent is forgotten",
        index: [whole(0), delta(1, 0), whole(2), None],
        contents: [0b0110, 0b0000, 0b1100, 0b1000],
        live: 0b0001,
        captures: &[
            Capture { takes: 2, parent: Some(0), like: Some((3, 1)) },
            Capture { takes: 3, parent: None, like: None },
        ],
        forgets: 0b0101,
        restores: Some(2),
        rounds: 1,
    },
    Scenario {
        name: "the grandchild of a forgotten parent, both take over a delta without a look-up",
        index: [whole(0), delta(1, 0), None, None],
        contents: [0b0010, 0b0000, 0b0110, 0b1010],
        live: 0b0001,
        captures: &[
            Capture { takes: 2, parent: Some(0), like: Some((2, 1)) },
            Capture { takes: 3, parent: Some(2), like: Some((3, 2)) },
        ],
        forgets: 0b0101,
        restores: None,
        rounds: 1,
    },
    Scenario {
        name: "two rounds of gc, while a forgotten snapshot's content comes back",
        index: [whole(0), delta(1, 0), None, None],
        contents: [0b0010, 0b0000, 0b0110, 0b0000],
        live: 0b0001,
        captures: &[Capture { takes: 2, parent: Some(0), like: Some((2, 1)) }],
        forgets: 0b0101,
        restores: Some(0),
        rounds: 2,
    },
];

#[test]
fn nothing_that_is_needed_is_dropped_in_any_order_of_the_steps() {
    for scenario in &SCENARIOS {
        let states = Model { scenario, without: None }.explore().unwrap_or_else(|why| panic!("{why}"));
        println!("{states:>9} states: {}", scenario.name);
        assert!(states > 1000);
    }
}

#[test]
fn without_any_one_of_the_rules_something_is_lost() {
    for rule in RULES {
        let found =
            SCENARIOS.iter().find_map(|scenario| Model { scenario, without: Some(rule) }.explore().err());
        match found {
            Some(found) => println!("{rule:?}: {}", found.lines().next().unwrap_or_default()),
            None => panic!("without {rule:?} nothing is lost: is it needed, or is the model blind?"),
        }
    }
}
