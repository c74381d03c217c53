//! Whole histories of a store, compared with a naive model.
//!
//! The model keeps every snapshot as plain bytes. It computes images, regions, labels, parents and
//! what gc must keep in the simplest way possible, and the store must agree after any sequence of
//! steps. The processes are synthetic: several mappings at odd addresses that appear, disappear,
//! move, grow, shrink and split. Some mappings are not captured, and zeros are often not reported
//! as populated.
//!
//! In some histories the process is killed, or the power fails, in the middle of a step. Afterwards
//! what was acknowledged is there, what was under way is there or not, and nothing else is.
//!
//! `PROPTEST_CASES=1000 cargo test --test crashes history::` runs more cases.

use std::collections::{BTreeSet, HashMap};
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::disk::{Disk, Failure};
use proptest::prelude::*;
use proptest::sample::Index;
use proptest::strategy::ValueTree;
use proptest::test_runner::TestRunner;
use stillframe::address_space::{AddressSpace, Mapping, MappingKind, Protection};
use stillframe::codec::Codec;
use stillframe::diff::DiffOptions;
use stillframe::error::ReadError;
use stillframe::fault_injection::{Watching, watch};
use stillframe::ranges::Ranges;
use stillframe::record::Trigger;
use stillframe::source::{Access, Attachment, CopyOut, Frozen, InPlace, Source, SourceError};
use stillframe::store::{Labels, StoreError};
use stillframe::verify::VerifyOptions;
use stillframe::{
    AddressRange, CaptureOptions, CaptureStats, Error, GcOptions, Hash, RegionSize, SnapshotId, Store,
};

// ---- The processes ------------------------------------------------------------------------------

/// Memory at an address.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Area {
    start: u64,
    bytes: Vec<u8>,
    captured: bool,
}

impl Area {
    fn end(&self) -> u64 {
        self.start + self.bytes.len() as u64
    }

    fn mapping(&self) -> Mapping {
        Mapping {
            range: AddressRange::new(self.start, self.end()).unwrap(),
            protection: Protection::READ_WRITE,
            kind: MappingKind::Anonymous,
            name: format!("area of {} bytes", self.bytes.len()),
            file_offset_bytes: self.start % 7,
            captured: self.captured,
        }
    }
}

/// How the store reads the bytes.
#[derive(Clone, Copy, Debug)]
enum Offered {
    InPlace,
    Shared,
    /// The staging buffer may be so small that the workers start while the source is paused.
    UntilRelease {
        staging_bytes: usize,
    },
}

/// A synthetic process as a source: its areas in address order.
struct Made<'a> {
    areas: &'a [Area],
    access: Offered,
    /// Areas are populated in grains of this size, counted from their start.
    grain_bytes: usize,
}

/// A [`Made`] that a capture has opened.
struct OpenMade<'a> {
    made: &'a Made<'a>,
    space: AddressSpace,
    is_released: AtomicBool,
}

impl Source for Made<'_> {
    fn open(&self) -> Result<Box<dyn Frozen + '_>, SourceError> {
        let space = AddressSpace::new(self.areas.iter().map(Area::mapping).collect())?;
        Ok(Box::new(OpenMade { made: self, space, is_released: AtomicBool::new(false) }))
    }
}

impl OpenMade<'_> {
    /// The bytes of an area, if the store may read them now.
    fn look(&self, mapping_index: usize) -> &[u8] {
        let area = &self.made.areas[mapping_index];
        assert!(area.captured, "bytes of a mapping that is not captured");
        if let Offered::UntilRelease { .. } = self.made.access {
            assert!(!self.is_released.load(Ordering::Relaxed), "bytes after the release");
        }
        &area.bytes
    }
}

impl Frozen for OpenMade<'_> {
    fn address_space(&self) -> &AddressSpace {
        &self.space
    }

    fn attachments(&self) -> Vec<Attachment> {
        // Equal attachments are stored once, and one of them is empty.
        let lengths: Vec<u8> = self.made.areas.iter().map(|area| area.bytes.len() as u8).collect();
        vec![
            Attachment { name: "lengths".to_owned(), bytes: lengths },
            Attachment { name: "nothing".to_owned(), bytes: Vec::new() },
        ]
    }

    fn populated(&self, mapping_index: usize) -> Result<Ranges, SourceError> {
        let bytes = self.look(mapping_index);
        let mut populated = Ranges::new();
        for (at, grain) in bytes.chunks(self.made.grain_bytes).enumerate() {
            let start = (at * self.made.grain_bytes) as u64;
            if grain.iter().any(|byte| *byte != 0) {
                populated.insert(start..start + grain.len() as u64);
            }
        }
        Ok(populated)
    }

    fn access(&self) -> Access<'_> {
        match self.made.access {
            Offered::InPlace => Access::InPlace(self),
            Offered::Shared => Access::Shared(self),
            Offered::UntilRelease { .. } => Access::UntilRelease(self),
        }
    }

    fn release(&self) -> Duration {
        self.is_released.store(true, Ordering::Relaxed);
        Duration::ZERO
    }
}

impl InPlace for OpenMade<'_> {
    fn bytes(&self, mapping_index: usize) -> &[u8] {
        self.look(mapping_index)
    }
}

impl CopyOut for OpenMade<'_> {
    fn copy_out(
        &self,
        mapping_index: usize,
        offset_bytes: u64,
        buffer: &mut [u8],
        _unreadable: &mut Vec<AddressRange>,
    ) -> Result<(), SourceError> {
        buffer.copy_from_slice(&self.look(mapping_index)[offset_bytes as usize..][..buffer.len()]);
        Ok(())
    }
}

// ---- The steps ----------------------------------------------------------------------------------

const PROCESSES: [&str; 3] = ["web-1", "web-2", "a vm: \u{1f4be}"];

/// Areas begin somewhere in slots of this size.
const SLOT_BYTES: u64 = 4 << 20;

#[derive(Clone, Copy, Debug)]
enum Fill {
    Zeros,
    Byte(u8),
    Text,
    /// One of a few seeds, so that equal regions occur at other addresses and in other processes.
    Noise(u8),
    /// Unlike any other.
    Unique(u64),
}

#[derive(Clone, Debug)]
enum Step {
    Map {
        process: usize,
        slot: u64,
        odd: u64,
        length: usize,
        fill: Fill,
        captured: bool,
    },
    Unmap {
        process: usize,
        area: Index,
    },
    Move {
        process: usize,
        area: Index,
        slot: u64,
        odd: u64,
    },
    Resize {
        process: usize,
        area: Index,
        length: usize,
    },
    Split {
        process: usize,
        area: Index,
        at: Index,
    },
    Write {
        process: usize,
        area: Index,
        at: Index,
        length: usize,
        fill: Fill,
    },
    /// Makes the memory of a process equal to a snapshot.
    Rollback {
        process: usize,
        snapshot: Index,
    },
    Capture {
        process: usize,
        access: Offered,
        grain_bytes: usize,
        exclude: Vec<(u64, u64, u64)>,
        label: Option<u8>,
    },
    Label {
        snapshot: Index,
        key: u8,
        value: Option<u8>,
    },
    Forget {
        snapshots: Vec<Index>,
    },
    Gc {
        max_unused_percent: u8,
    },
    Reopen,
    LoseTheIndex,
    /// The process does not survive the step in `during`.
    Crash {
        during: Box<Step>,
        /// How many changes of files still succeed.
        changes: usize,
        how: Crash,
    },
    Check,
}

/// How a process ends.
#[derive(Clone, Copy, Debug)]
enum Crash {
    /// All writes are kept.
    Killed,
    /// Pending writes are lost as in the power failure of this number. Of the index, what
    /// [`crate::disk::Model::crash_index`] writes remains.
    PowerFailure { number: u64, seed: u64, index: u64 },
}

/// Lengths of areas that keep a step short.
fn small_lengths() -> impl Strategy<Value = usize> {
    prop_oneof![
        2 => prop_oneof![Just(512usize), Just(4096)].prop_flat_map(|bytes| bytes - 1..=bytes + 1),
        4 => 1..60_000usize,
    ]
}

fn lengths() -> impl Strategy<Value = usize> {
    prop_oneof![
        // These include every region size and its neighbours.
        4 => prop_oneof![Just(512usize), Just(4096), Just(16384), Just(65536)]
            .prop_flat_map(|bytes| bytes - 1..=bytes + 1),
        4 => 1..20_000usize,
        3 => 20_000..400_000usize,
        // More than one part of a table, and more than one table.
        1 => 1_000_000..3_000_000usize,
    ]
}

fn fills() -> impl Strategy<Value = Fill> {
    prop_oneof![
        2 => Just(Fill::Zeros),
        1 => (1..=255u8).prop_map(Fill::Byte),
        1 => Just(Fill::Text),
        3 => (0..4u8).prop_map(Fill::Noise),
        2 => any::<u64>().prop_map(Fill::Unique),
    ]
}

/// Steps that change the memory of the processes.
fn changes<L: Strategy<Value = usize> + 'static>(lengths: fn() -> L) -> impl Strategy<Value = Step> {
    let process = || 0..PROCESSES.len();
    let odd = || prop_oneof![Just(0u64), 0..5000u64];
    prop_oneof![
        6 => (process(), 0..4u64, odd(), lengths(), fills(), proptest::bool::weighted(0.85)).prop_map(
            |(process, slot, odd, length, fill, captured)| Step::Map { process, slot, odd, length, fill, captured }
        ),
        1 => (process(), any::<Index>()).prop_map(|(process, area)| Step::Unmap { process, area }),
        1 => (process(), any::<Index>(), 0..4u64, odd())
            .prop_map(|(process, area, slot, odd)| Step::Move { process, area, slot, odd }),
        2 => (process(), any::<Index>(), lengths())
            .prop_map(|(process, area, length)| Step::Resize { process, area, length }),
        1 => (process(), any::<Index>(), any::<Index>())
            .prop_map(|(process, area, at)| Step::Split { process, area, at }),
        8 => (process(), any::<Index>(), any::<Index>(), 1..100_000usize, fills()).prop_map(
            |(process, area, at, length, fill)| Step::Write { process, area, at, length, fill }
        ),
        1 => (process(), any::<Index>()).prop_map(|(process, snapshot)| Step::Rollback { process, snapshot }),
    ]
}

/// Operations on the store.
fn operations() -> impl Strategy<Value = Step> {
    let process = || 0..PROCESSES.len();
    let access = prop_oneof![
        Just(Offered::InPlace),
        Just(Offered::Shared),
        prop_oneof![Just(0usize), Just(64 << 20)]
            .prop_map(|staging_bytes| Offered::UntilRelease { staging_bytes }),
    ];
    let exclude = proptest::collection::vec((0..4u64, 0..100_000u64, 1..300_000u64), 0..3);
    prop_oneof![
        10 => (process(), access, prop_oneof![Just(4096usize), Just(1000), Just(1 << 30)], exclude, any::<Option<u8>>())
            .prop_map(|(process, access, grain_bytes, exclude, label)| {
                Step::Capture { process, access, grain_bytes, exclude, label }
            }),
        2 => (any::<Index>(), 0..3u8, any::<Option<u8>>())
            .prop_map(|(snapshot, key, value)| Step::Label { snapshot, key, value }),
        2 => proptest::collection::vec(any::<Index>(), 1..4).prop_map(|snapshots| Step::Forget { snapshots }),
        2 => prop_oneof![Just(0u8), Just(10), 0..=100u8]
            .prop_map(|max_unused_percent| Step::Gc { max_unused_percent }),
        1 => Just(Step::Reopen),
        1 => Just(Step::LoseTheIndex),
    ]
}

fn steps() -> impl Strategy<Value = Step> {
    prop_oneof![20 => changes(lengths), 18 => operations(), 1 => Just(Step::Check)]
}

/// Steps, some of which the process does not survive.
fn steps_and_crashes() -> impl Strategy<Value = Step> {
    let how = prop_oneof![
        1 => Just(Crash::Killed),
        3 => (0..20u64, any::<u64>(), 0..3u64)
            .prop_map(|(number, seed, index)| Crash::PowerFailure { number, seed, index }),
    ];
    // A capture makes some dozens of changes; gc and opening make fewer.
    let crash = (operations(), 0..24usize, how).prop_map(|(during, changes, how)| Step::Crash {
        during: Box::new(during),
        changes,
        how,
    });
    prop_oneof![8 => changes(small_lengths), 8 => operations(), 4 => crash, 1 => Just(Step::Check)]
}

/// Bytes of one kind. Equal noise is equal from its first byte on.
fn filled(fill: Fill, length: usize) -> Vec<u8> {
    let noise = |seed: u64| {
        let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
        let words = std::iter::repeat_with(|| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state.to_le_bytes()
        });
        words.take(length.div_ceil(8)).flatten().take(length).collect()
    };
    match fill {
        Fill::Zeros => vec![0; length],
        Fill::Byte(byte) => vec![byte; length],
        Fill::Text => b"stillframe ".iter().copied().cycle().take(length).collect(),
        Fill::Noise(seed) => noise(u64::from(seed)),
        Fill::Unique(seed) => noise(seed | 1 << 63),
    }
}

// ---- The model ----------------------------------------------------------------------------------

/// What the model knows about a snapshot.
struct Kept {
    process: usize,
    parent: Option<SnapshotId>,
    /// What is captured, with zeros where areas were excluded.
    areas: Vec<Area>,
    labels: Labels,
}

impl Kept {
    fn captured(&self) -> impl Iterator<Item = &Area> {
        self.areas.iter().filter(|area| area.captured)
    }

    fn image(&self) -> Vec<u8> {
        self.captured().flat_map(|area| &area.bytes).copied().collect()
    }

    /// The hash of every region by its address. Zeros have [`Hash::ZERO`].
    fn regions(&self, region_bytes: usize) -> Vec<(AddressRange, Hash)> {
        let of_area = |area: &Area| {
            let start = area.start;
            let region = move |(at, bytes): (usize, &[u8])| {
                let start = start + (at * region_bytes) as u64;
                (AddressRange::with_length(start, bytes.len() as u64).unwrap(), hash(bytes))
            };
            area.bytes.chunks(region_bytes).enumerate().map(region).collect::<Vec<_>>()
        };
        self.captured().flat_map(of_area).collect()
    }
}

fn hash(bytes: &[u8]) -> Hash {
    if bytes.iter().all(|byte| *byte == 0) { Hash::ZERO } else { Hash::of(bytes) }
}

/// An operation that failed, and may have taken effect nevertheless.
struct UnderWay {
    error: Error,
    what: What,
}

enum What {
    Capture(Box<Kept>),
    Forget(Vec<SnapshotId>),
    Label(SnapshotId, Labels),
    /// An operation without a visible effect.
    Other,
}

impl std::fmt::Debug for UnderWay {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:?}", self.error)
    }
}

struct World {
    _dir: tempfile::TempDir,
    path: PathBuf,
    files: PathBuf,
    /// The disk of the store, in histories with crashes.
    disk: Option<(Arc<Disk>, Watching)>,
    store: Option<Store>,
    region_bytes: usize,
    memory: Vec<Vec<Area>>,
    kept: HashMap<SnapshotId, Kept>,
    /// All live snapshots in the order in which they were taken.
    line: Vec<SnapshotId>,
    forgotten: Vec<SnapshotId>,
}

impl World {
    fn new(region_size: RegionSize) -> World {
        World::begin(region_size, false)
    }

    /// A world on a disk that can crash.
    fn that_can_crash(region_size: RegionSize) -> World {
        World::begin(region_size, true)
    }

    fn begin(region_size: RegionSize, can_crash: bool) -> World {
        let dir = crate::disk::scratch();
        let (path, files) = (dir.path().join("disk/store"), dir.path().join("files"));
        std::fs::create_dir(&files).unwrap();
        std::fs::create_dir(path.parent().unwrap()).unwrap();
        let mut world = World {
            _dir: dir,
            path,
            files,
            disk: None,
            store: None,
            region_bytes: region_size.bytes(),
            memory: vec![Vec::new(); PROCESSES.len()],
            kept: HashMap::new(),
            line: Vec::new(),
            forgotten: Vec::new(),
        };
        if can_crash {
            world.put_in();
        }
        world.store = Some(Store::options().region_size(region_size).create(&world.path).unwrap());
        world
    }

    /// Installs the witness of the store's disk.
    fn put_in(&mut self) {
        let root = self.path.parent().unwrap();
        let disk = Disk::new(root);
        disk.watch_index(self.path.join("index"));
        self.disk = Some((disk.clone(), watch(root, disk)));
    }

    fn store(&self) -> &Store {
        self.store.as_ref().unwrap()
    }

    fn apply(&mut self, step: &Step) {
        match step {
            Step::Map { process, slot, odd, length, fill, captured } => {
                let (start, bytes) = (0x10000 + slot * SLOT_BYTES + odd, filled(*fill, *length));
                self.place(*process, Area { start, bytes, captured: *captured });
            }
            Step::Unmap { process, area } => drop(self.take(*process, area)),
            Step::Move { process, area, slot, odd } => {
                if let Some(area) = self.take(*process, area) {
                    self.place(*process, Area { start: 0x10000 + slot * SLOT_BYTES + odd, ..area });
                }
            }
            Step::Resize { process, area, length } => {
                if let Some(mut area) = self.take(*process, area) {
                    area.bytes.resize(*length, 0);
                    self.place(*process, area);
                }
            }
            Step::Split { process, area, at } => {
                if let Some(mut area) = self.take(*process, area) {
                    let bytes = area.bytes.split_off(at.index(area.bytes.len()));
                    let behind = Area { start: area.end(), bytes, captured: area.captured };
                    self.place(*process, behind);
                    self.place(*process, area);
                }
            }
            Step::Write { process, area, at, length, fill } => {
                if !self.memory[*process].is_empty() {
                    let area = area.get_mut(&mut self.memory[*process]);
                    let at = at.index(area.bytes.len());
                    let length = (*length).min(area.bytes.len() - at);
                    area.bytes[at..at + length].copy_from_slice(&filled(*fill, length));
                }
            }
            Step::Rollback { process, snapshot } => {
                if !self.line.is_empty() {
                    self.memory[*process] = self.kept[snapshot.get(&self.line)].areas.clone();
                }
            }
            Step::Gc { max_unused_percent } => self.gc(*max_unused_percent),
            Step::Crash { during, changes, how } => self.crash(during, *changes, *how),
            Step::Check => self.check(),
            operation => self.attempt(operation).unwrap(),
        }
    }

    /// Runs an operation and ends the process in the middle of it, or right after it.
    fn crash(&mut self, during: &Step, changes: usize, how: Crash) {
        let disk = self.disk.as_ref().unwrap().0.clone();
        disk.stop_after(changes);
        let done = self.attempt(during);
        disk.stop_after(0);
        self.store = None;
        let (model, index) = (disk.model(), self.path.join("index"));
        match how {
            Crash::Killed => {
                // The index of the moment of the crash, and not the one that was closed properly
                // since.
                let _ = std::fs::remove_dir_all(&index);
                model.crash_index(1, 0, &index);
                disk.go_on();
            }
            Crash::PowerFailure { number, seed, index: which } => {
                self.disk = None;
                let root = self.path.parent().unwrap();
                std::fs::remove_dir_all(root).unwrap();
                std::fs::create_dir(root).unwrap();
                model.crash(Failure::numbered(number, seed), root);
                model.crash_index(which, seed, &index);
                self.put_in();
            }
        }
        self.store = Some(Store::open(&self.path).unwrap());
        if let Err(under_way) = done {
            self.learn(under_way);
        }
        self.check();
    }

    /// Runs an operation on the store, which may fail.
    fn attempt(&mut self, step: &Step) -> Result<(), UnderWay> {
        let other = |error| UnderWay { error, what: What::Other };
        let open = |path| Store::open(path).map_err(Error::from).map_err(other);
        match step {
            Step::Capture { process, access, grain_bytes, exclude, label } => {
                self.capture(*process, *access, *grain_bytes, exclude, *label)
            }
            Step::Label { snapshot, key, value } => self.label(snapshot, *key, *value),
            Step::Forget { snapshots } => self.forget(snapshots),
            Step::Gc { max_unused_percent } => {
                let options = GcOptions::new().max_unused_percent(*max_unused_percent);
                self.store().gc(&options).map(drop).map_err(other)
            }
            Step::LoseTheIndex | Step::Reopen => {
                self.store = None;
                if matches!(step, Step::LoseTheIndex) {
                    std::fs::remove_dir_all(self.path.join("index")).unwrap();
                }
                self.store = Some(open(&self.path)?);
                Ok(())
            }
            other => panic!("{other:?} is nothing that a store does"),
        }
    }

    /// Asks the store whether an operation that was under way has taken effect.
    fn learn(&mut self, UnderWay { what, .. }: UnderWay) {
        match what {
            What::Capture(kept) => {
                let snapshots = self.store().snapshots();
                let mut new = snapshots.iter().filter(|snapshot| !self.kept.contains_key(&snapshot.id()));
                if let Some(snapshot) = new.next() {
                    let id = snapshot.id();
                    assert!(new.next().is_none() && !self.forgotten.contains(&id));
                    assert_eq!(snapshot.record().process, PROCESSES[kept.process]);
                    // The record may be there without the labels, because the store writes them
                    // after it.
                    let labels = snapshot.labels().clone();
                    assert!(labels == kept.labels || labels.is_empty(), "{labels:?}");
                    self.kept.insert(id, Kept { labels, ..*kept });
                    self.line.push(id);
                }
            }
            What::Forget(ids) => {
                let gone = |id: &SnapshotId| self.store().snapshot(*id).is_err();
                let gone = ids.into_iter().filter(gone).collect();
                self.forgot(gone);
            }
            What::Label(id, labels) => {
                let found = self.store().snapshot(id).unwrap().labels().clone();
                let known = self.kept.get_mut(&id).unwrap();
                assert!(found == known.labels || found == labels, "{found:?}");
                known.labels = found;
            }
            What::Other => {}
        }
    }

    fn label(&mut self, snapshot: &Index, key: u8, value: Option<u8>) -> Result<(), UnderWay> {
        if self.line.is_empty() {
            return Ok(());
        }
        let id = *snapshot.get(&self.line);
        let (key, value) = (format!("key {key}"), value.map(|value| value.to_string()));
        let mut labels = self.kept[&id].labels.clone();
        match &value {
            Some(value) => drop(labels.insert(key.clone(), value.clone())),
            None => drop(labels.remove(&key)),
        }
        let labelled = self.store().change_labels(id, &[(key, value)]);
        let labelled = labelled.map_err(|error| UnderWay { error, what: What::Label(id, labels.clone()) })?;
        assert_eq!(*labelled.labels(), labels);
        self.kept.get_mut(&id).unwrap().labels = labels;
        Ok(())
    }

    fn forget(&mut self, snapshots: &[Index]) -> Result<(), UnderWay> {
        if self.line.is_empty() {
            return Ok(());
        }
        let ids: BTreeSet<SnapshotId> = snapshots.iter().map(|at| *at.get(&self.line)).collect();
        let ids: Vec<SnapshotId> = ids.into_iter().collect();
        let forgotten = self.store().forget(&ids);
        forgotten.map_err(|error| UnderWay { error, what: What::Forget(ids.clone()) })?;
        self.forgot(ids);
        Ok(())
    }

    fn forgot(&mut self, ids: Vec<SnapshotId>) {
        self.line.retain(|id| !ids.contains(id));
        ids.iter().for_each(|id| drop(self.kept.remove(id)));
        self.forgotten.extend(ids);
    }

    /// Adds an area unless it is empty or overlaps another one.
    fn place(&mut self, process: usize, area: Area) {
        let areas = &mut self.memory[process];
        let is_free = areas.iter().all(|other| other.end() <= area.start || area.end() <= other.start);
        if is_free && !area.bytes.is_empty() {
            areas.push(area);
            areas.sort_by_key(|area| area.start);
        }
    }

    fn take(&mut self, process: usize, area: &Index) -> Option<Area> {
        let areas = &mut self.memory[process];
        (!areas.is_empty()).then(|| areas.remove(area.index(areas.len())))
    }

    fn capture(
        &mut self,
        process: usize,
        access: Offered,
        grain_bytes: usize,
        exclude: &[(u64, u64, u64)],
        label: Option<u8>,
    ) -> Result<(), UnderWay> {
        let exclude: Vec<AddressRange> = exclude
            .iter()
            .map(|(slot, odd, length)| {
                AddressRange::with_length(0x10000 + slot * SLOT_BYTES + odd, *length).unwrap()
            })
            .collect();
        let labels: Labels = label.map(|label| ("first".to_owned(), label.to_string())).into_iter().collect();
        let mut options = CaptureOptions::new()
            .trigger(Trigger::Other(format!("step {}", self.line.len())))
            .labels(labels.clone())
            .exclude(exclude.clone())
            .attachments([Attachment { name: "given".to_owned(), bytes: vec![process as u8; 5000] }])
            .codec([None, None, Some(Codec::Zstd), Some(Codec::None)][self.line.len() % 4])
            .deltas(self.line.len() % 7 != 6);
        if let Offered::UntilRelease { staging_bytes } = access {
            options.staging_bytes = staging_bytes;
        }
        let mut areas = self.memory[process].clone();
        for area in &mut areas {
            let range = AddressRange::new(area.start, area.end()).unwrap();
            for left_out in exclude.iter().filter_map(|left_out| left_out.intersection(range)) {
                let offset = (left_out.start() - area.start) as usize;
                area.bytes[offset..offset + left_out.length_bytes() as usize].fill(0);
            }
        }
        let parent = self.line.iter().rfind(|id| self.kept[*id].process == process).copied();
        let kept = Kept { process, parent, areas, labels };
        let made = Made { areas: &self.memory[process], access, grain_bytes };
        let captured = self.store().process(PROCESSES[process]).capture(&made, &options);
        let capture = match captured {
            Ok(capture) => capture,
            Err(error) => return Err(UnderWay { error, what: What::Capture(Box::new(kept)) }),
        };
        self.check_capture(&capture, &kept);
        assert!(self.kept.insert(capture.id, kept).is_none(), "every snapshot has an id of its own");
        self.line.push(capture.id);
        Ok(())
    }

    /// Checks what a capture reports.
    fn check_capture(&self, capture: &CaptureStats, kept: &Kept) {
        let regions = kept.regions(self.region_bytes);
        let zeros = regions.iter().filter(|(_, hash)| hash.is_zero());
        // The parent's counterpart of each mapping: the one at the same address with the same
        // attributes, otherwise the one with the same number among those with the same attributes,
        // otherwise any mapping at the same address.
        let parent: Vec<&Area> = kept.parent.iter().flat_map(|id| self.kept[id].captured()).collect();
        let traits = |area: &Area| {
            let Mapping { kind, name, protection, file_offset_bytes, .. } = area.mapping();
            (kind, name, protection, file_offset_bytes)
        };
        let captured: Vec<&Area> = kept.captured().collect();
        let mut changed = Vec::new();
        for (at, area) in captured.iter().enumerate() {
            let number = captured[..at].iter().filter(|other| traits(other) == traits(area)).count();
            let there = parent.iter().find(|other| other.start == area.start);
            let alike = parent.iter().filter(|other| traits(other) == traits(area)).nth(number);
            let theirs = there.filter(|there| traits(there) == traits(area)).or(alike).or(there);
            let theirs = theirs.map_or(&[][..], |theirs| &theirs.bytes[..]);
            let mut theirs = theirs.chunks(self.region_bytes).map(hash);
            let hashes = area.bytes.chunks(self.region_bytes).map(hash);
            changed.extend(hashes.filter(|hash| *hash != theirs.next().unwrap_or(Hash::ZERO)));
        }
        let not_zero = changed.iter().filter(|hash| !hash.is_zero()).count() as u64;
        assert_eq!(capture.process, PROCESSES[kept.process]);
        assert_eq!(capture.parent, kept.parent);
        assert_eq!(capture.memory_bytes, kept.image().len() as u64);
        assert_eq!(capture.zero_bytes, zeros.map(|(range, _)| range.length_bytes()).sum::<u64>());
        assert_eq!(capture.changed_regions, changed.len() as u64);
        assert_eq!(capture.new_regions + capture.delta_regions + capture.shared_regions, not_zero);
    }

    fn gc(&self, max_unused_percent: u8) {
        let options = GcOptions::new().max_unused_percent(max_unused_percent);
        let would = self.store().gc(&options.clone().dry_run(true)).unwrap();
        let packs_bytes = || -> u64 {
            let packs = std::fs::read_dir(self.path.join("packs")).unwrap();
            packs.map(|pack| pack.unwrap().metadata().unwrap().len()).sum()
        };
        let before_bytes = packs_bytes();
        let did = self.store().gc(&options).unwrap();
        let live = self.kept.values().flat_map(|kept| kept.regions(self.region_bytes));
        let live: BTreeSet<Hash> = live.map(|(_, hash)| hash).filter(|hash| !hash.is_zero()).collect();
        // And the bases of the live deltas.
        assert!(did.live_regions >= live.len() as u64);
        assert_eq!(did.live_regions, self.store().stats().unwrap().regions);
        assert_eq!(did.freed_bytes, before_bytes - packs_bytes());
        assert_eq!((would.freed_bytes, would.dead_regions), (did.freed_bytes, did.dead_regions));
    }

    /// Checks everything that the store reports and holds.
    fn check(&self) {
        let store = self.store();
        for (process, name) in PROCESSES.into_iter().enumerate() {
            let line: Vec<SnapshotId> =
                self.line.iter().filter(|id| self.kept[*id].process == process).copied().collect();
            assert!(
                store.process(name).snapshots().iter().map(|snapshot| snapshot.id()).eq(line.iter().copied())
            );
            assert_eq!(store.process(name).latest(), line.last().copied());
            assert_eq!(store.find(&format!("{name}@latest")).ok(), line.last().copied());
            assert_eq!(store.find(&format!("{name}~1")).ok(), line.iter().rev().nth(1).copied());
            let summaries = store.processes();
            let summary = summaries.iter().find(|summary| summary.process == name);
            assert_eq!(summary.map_or(0, |summary| summary.snapshots), line.len());
            let moments: Vec<_> =
                line.iter().map(|id| store.snapshot(*id).unwrap().record().moment()).collect();
            assert!(moments.is_sorted_by(|a, b| a < b), "{moments:?}");
        }
        let listed: BTreeSet<SnapshotId> = store.snapshots().iter().map(|snapshot| snapshot.id()).collect();
        assert_eq!(listed, self.line.iter().copied().collect());
        for id in &self.forgotten {
            let is_gone = |error| matches!(error, Error::Store(StoreError::NoSuchSnapshot { .. }));
            assert!(store.restore(*id).err().is_some_and(is_gone));
            assert!(store.snapshot(*id).err().is_some_and(is_gone));
            assert!(store.forget(&[*id]).err().is_some_and(is_gone));
        }
        for (id, kept) in &self.kept {
            self.check_snapshot(*id, kept);
        }
        self.check_past();
        let report = store.verify(&VerifyOptions::default()).unwrap();
        assert_eq!(report.problems, []);
        // An index from before the crash may be unusable.
        let damaged = std::fs::read_dir(self.path.join("damaged")).into_iter().flatten().flatten();
        let set_aside: Vec<_> = damaged.map(|entry| entry.file_name()).collect();
        assert!(set_aside.iter().all(|name| self.disk.is_some() && name == "index"), "{set_aside:?}");
    }

    fn check_snapshot(&self, id: SnapshotId, kept: &Kept) {
        let (store, image) = (self.store(), kept.image());
        assert_eq!(store.find(&id.to_string()).unwrap(), id);
        let snapshot = store.snapshot(id).unwrap();
        assert_eq!((snapshot.labels(), snapshot.record().parent), (&kept.labels, kept.parent));
        assert_eq!(snapshot.attachment("given").unwrap().unwrap(), vec![kept.process as u8; 5000]);
        assert_eq!(snapshot.attachment("nothing").unwrap().unwrap(), []);
        assert_eq!(snapshot.attachment("no such").unwrap(), None);
        let mappings: Vec<Mapping> = kept.areas.iter().map(Area::mapping).collect();
        assert_eq!(snapshot.address_space().unwrap().mappings(), mappings);
        let regions: Vec<_> = snapshot.regions().unwrap().collect::<Result<_, _>>().unwrap();
        assert_eq!(regions, kept.regions(self.region_bytes));

        let mut slice = vec![0xEE; image.len()];
        store.restore(id).unwrap().into_slice(&mut slice).unwrap();
        assert!(slice == image, "into a slice");
        match store.restore(id).unwrap().into_mapping() {
            Ok(mapping) => assert!(mapping[..] == image[..], "into a mapping"),
            // A mapping of no bytes cannot exist.
            Err(_) => assert!(image.is_empty()),
        }
        let file = self.files.join("image");
        let stats = store.restore(id).unwrap().overwrite(true).into_file(&file).unwrap();
        assert_eq!(stats.bytes, image.len() as u64);
        assert!(std::fs::read(&file).unwrap() == image, "into a file");

        for area in kept.captured() {
            let (from, to) = (area.bytes.len() / 3, area.bytes.len() / 2 + 1);
            let range = AddressRange::new(area.start + from as u64, area.start + to as u64).unwrap();
            let mut part = Vec::new();
            snapshot.read_range(range, &mut part).unwrap();
            assert!(part == area.bytes[from..to], "a range of it");
        }
    }
}

// ---- History and diff --------------------------------------------------------------------------

/// Where two snapshots differ, in how many bytes, and in how many regions.
type Differing = (Vec<AddressRange>, u64, u64);

impl Kept {
    /// The captured area that contains this address.
    fn at(&self, address: u64) -> Option<&Area> {
        self.captured().find(|area| area.start <= address && address < area.end())
    }

    /// The bytes of a range, if all of it is captured.
    fn bytes(&self, range: AddressRange) -> Option<Vec<u8>> {
        let mut bytes = Vec::new();
        while bytes.len() < range.length_bytes() as usize {
            let next = range.start() + bytes.len() as u64;
            let area = self.at(next)?;
            let end = area.end().min(range.end());
            bytes.extend_from_slice(&area.bytes[(next - area.start) as usize..(end - area.start) as usize]);
        }
        Some(bytes)
    }

    /// Compares byte by byte.
    fn diff(&self, other: &Kept, region_bytes: u64) -> Differing {
        let areas = || self.captured().chain(other.captured());
        let mut ends: BTreeSet<u64> = areas().flat_map(|area| [area.start, area.end()]).collect();
        let (mut ranges, mut regions) = (Vec::<Range<u64>>::new(), BTreeSet::new());
        let mut last_region = None;
        while let Some(start) = ends.pop_first()
            && let Some(end) = ends.first()
        {
            let (a, b) = (self.at(start), other.at(start));
            if a.is_none() && b.is_none() {
                continue;
            }
            for address in start..*end {
                let byte = |area: &Area| area.bytes[(address - area.start) as usize];
                if a.map(byte) == b.map(byte) {
                    continue;
                }
                match ranges.last_mut() {
                    Some(last) if last.end == address => last.end += 1,
                    _ => ranges.push(address..address + 1),
                }
                let area = a.or(b).unwrap();
                let region = Some((a.is_some(), area.start, (address - area.start) / region_bytes));
                if last_region != region {
                    regions.extend(region);
                    last_region = region;
                }
            }
        }
        let bytes = ranges.iter().map(|range| range.end - range.start).sum();
        let range = |range: Range<u64>| AddressRange::new(range.start, range.end).unwrap();
        (ranges.into_iter().map(range).collect(), bytes, regions.len() as u64)
    }
}

impl World {
    /// Checks what the store reports about earlier snapshots without a restore.
    fn check_past(&self) {
        let Some((first, last)) = self.line.first().zip(self.line.last()) else { return };
        let neighbours = self.line.windows(2).rev().take(2).map(|pair| (&pair[0], &pair[1]));
        for (a, b) in neighbours.chain([(first, last), (last, first), (last, last)]) {
            let found = self.store().diff(*a, *b, &DiffOptions::default()).unwrap();
            let found = (found.ranges, found.differing_bytes, found.differing_regions);
            assert_eq!(found, self.kept[a].diff(&self.kept[b], self.region_bytes as u64));
        }
        for (process, name) in PROCESSES.into_iter().enumerate() {
            let line: Vec<_> = self.line.iter().filter(|id| self.kept[*id].process == process).collect();
            let Some(middle) = line.get(line.len() / 2) else { continue };
            for area in self.kept[*middle].captured() {
                let most = area.bytes.len().min(1 << 20) as u64;
                // The whole area, a few bytes in it, and a range that crosses its end.
                for (from, to) in [(0, most), (most / 2, most / 2 + 9), (most - 1, most + 1)] {
                    let range = AddressRange::new(area.start + from, area.start + to).unwrap();
                    self.check_history(name, &line, range);
                }
            }
        }
    }

    fn check_history(&self, process: &str, line: &[&SnapshotId], range: AddressRange) {
        let mut expected: Vec<(SnapshotId, Option<Vec<u8>>)> = Vec::new();
        for id in line {
            let bytes = self.kept[*id].bytes(range);
            if expected.last().map_or(bytes.is_some(), |(_, last)| *last != bytes) {
                expected.push((**id, bytes));
            }
        }
        match self.store().history(process, range) {
            Ok(moments) => {
                let moments = moments.map(Result::unwrap).map(|moment| (moment.id, moment.bytes));
                assert!(moments.collect::<Vec<_>>() == expected, "the history of {range}");
            }
            Err(Error::Read(ReadError::NotCaptured { .. })) => {
                assert!(expected.is_empty(), "the history of {range}");
            }
            Err(error) => panic!("the history of {range}: {error}"),
        }
    }
}

// ---- The tests ----------------------------------------------------------------------------------

/// This many cases, unless the environment asks for more.
fn config(cases: u32) -> ProptestConfig {
    let asked_for = std::env::var("PROPTEST_CASES").is_ok();
    let cases = if asked_for { ProptestConfig::default().cases } else { cases };
    ProptestConfig { cases, failure_persistence: None, max_shrink_iters: 400, ..ProptestConfig::default() }
}

proptest! {
    // These cases take half a minute.
    #![proptest_config(config(160))]

    #[test]
    fn a_store_agrees_with_a_naive_model_after_any_history(
        region_size in prop_oneof![Just(512u32), Just(4096), Just(16384), Just(65536)],
        steps in proptest::collection::vec(steps(), 1..60),
    ) {
        let mut world = World::new(RegionSize::new(region_size).unwrap());
        for (at, step) in steps.iter().enumerate() {
            world.apply(step);
            if at % 15 == 14 {
                world.check();
            }
        }
        world.check();
        world.apply(&Step::LoseTheIndex);
        world.check();
    }
}

proptest! {
    #![proptest_config(config(60))]

    #[test]
    fn a_store_agrees_with_a_naive_model_after_any_history_with_crashes(
        region_size in prop_oneof![Just(512u32), Just(4096)],
        steps in proptest::collection::vec(steps_and_crashes(), 1..40),
    ) {
        let mut world = World::that_can_crash(RegionSize::new(region_size).unwrap());
        steps.iter().for_each(|step| world.apply(step));
        world.check();
        world.apply(&Step::LoseTheIndex);
        world.check();
    }
}

#[test]
fn the_history_of_a_mapping_that_moves_by_a_byte_is_that_of_its_bytes() {
    let mut world = World::new(RegionSize::new(4096).unwrap());
    let any_area = any::<Index>().new_tree(&mut TestRunner::deterministic()).unwrap().current();
    let length = (1 << 20) + 5000;
    let capture = || Step::Capture {
        process: 1,
        access: Offered::InPlace,
        grain_bytes: 4096,
        exclude: Vec::new(),
        label: None,
    };
    world.apply(&Step::Map { process: 1, slot: 3, odd: 0, length, fill: Fill::Text, captured: true });
    world.apply(&capture());
    world.apply(&Step::Move { process: 1, area: any_area, slot: 3, odd: 1 });
    world.apply(&capture());
    world.check();
}

#[test]
fn verify_blames_nobody_while_captures_and_gcs_go_on() {
    let world = World::new(RegionSize::new(512).unwrap());
    let (store, stop) = (world.store(), AtomicBool::new(false));
    std::thread::scope(|scope| {
        for process in 0..2u64 {
            let stop = &stop;
            scope.spawn(move || {
                for step in 0.. {
                    if stop.load(Ordering::Relaxed) {
                        break;
                    }
                    let memory = filled(Fill::Unique(process << 32 | step), 200_000);
                    let id = store
                        .process(PROCESSES[process as usize])
                        .capture(&memory, &CaptureOptions::default());
                    if step % 3 == 2 {
                        store.forget(&[id.unwrap().id]).unwrap();
                        store.gc(&GcOptions::default()).unwrap();
                    }
                }
            });
        }
        // The threads must end even if this panics.
        let reports = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            (0..30).map(|_| store.verify(&VerifyOptions::default()).unwrap().problems).collect::<Vec<_>>()
        }));
        stop.store(true, Ordering::Relaxed);
        assert!(reports.unwrap().iter().all(Vec::is_empty));
    });
}
