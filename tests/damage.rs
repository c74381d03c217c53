//! Damage: place × kind of damage × what must happen.
//!
//! One store is made once and copied for each case. The tests find the objects in its packs by
//! themselves, after `docs/format.md`, and know who needs an object from what the snapshots are.

// A helper of a test may fail as the test itself may.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::cast_possible_truncation)]

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use stillframe::{
    Attachment, CaptureOptions, Error, GcOptions, Hash, Kind, REGIONS_PER_TABLE, RegionSize, RepairOptions,
    SnapshotId, Store, StoreError, VerifyOptions, VerifyReport,
};

#[path = "common/noise.rs"]
mod noise;
use noise::noise;

const REGION_BYTES: usize = 4096;
const TABLE_BYTES: usize = REGIONS_PER_TABLE * REGION_BYTES;

// ---- The store ----------------------------------------------------------------------------------

/// What the tests know of the snapshots: name, process, memory.
const NAMES: [&str; 4] = ["a1", "a2", "b1", "c1"];

fn process(name: &str) -> &str {
    &name[..1]
}

/// `a` has two tables, the second of which both its snapshots have; `b` has regions of the first.
fn memory(name: &str) -> Vec<u8> {
    let mut a = noise(20 * REGION_BYTES, 1);
    a.extend(b"stillframe ".iter().cycle().take(100_000));
    a.resize(TABLE_BYTES, 0);
    a.extend(noise(5 * REGION_BYTES + 77, 2));
    match name {
        "a1" => a,
        "a2" => {
            a[3 * REGION_BYTES..4 * REGION_BYTES].fill(9);
            a
        }
        "b1" => [noise(4 * REGION_BYTES, 3), a[10 * REGION_BYTES..30 * REGION_BYTES].to_vec()].concat(),
        _ => noise(9 * REGION_BYTES + 1, 4),
    }
}

fn options(name: &str) -> CaptureOptions {
    let globals = Attachment { name: "globals".to_owned(), bytes: noise(300, 5) };
    let with_more = name == "c1";
    CaptureOptions {
        attachments: with_more.then_some(globals).into_iter().collect(),
        labels: with_more.then(|| ("why".to_owned(), "tests".to_owned())).into_iter().collect(),
        // Each object stands for itself here; `deltas.rs` has those that do not.
        deltas: false,
        ..CaptureOptions::default()
    }
}

fn capture(store: &Store, name: &str) -> SnapshotId {
    store.process(process(name)).capture(&memory(name), &options(name)).unwrap().id
}

/// Captures the memory of these once more.
fn heal(store: &Store, names: &[&str]) {
    for name in names {
        capture(store, name);
    }
}

/// A store in a directory of its own.
struct Vault {
    _dir: tempfile::TempDir,
    path: PathBuf,
    ids: BTreeMap<&'static str, SnapshotId>,
    forgotten: SnapshotId,
    /// Which snapshots need an object.
    needs: HashMap<(Kind, Hash), BTreeSet<&'static str>>,
}

impl Vault {
    /// A copy of the store that was made once.
    fn copy() -> Vault {
        static MADE: OnceLock<Vault> = OnceLock::new();
        let made = MADE.get_or_init(Vault::make);
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("store");
        copy(&made.path, &path);
        Vault { _dir: dir, path, ids: made.ids.clone(), needs: made.needs.clone(), ..*made }
    }

    fn make() -> Vault {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("store");
        let region_size = RegionSize::new(REGION_BYTES as u32).unwrap();
        let store = Store::options().region_size(region_size).create(&path).unwrap();
        let forgotten = store.process("d").capture(&noise(50_000, 6), &CaptureOptions::default()).unwrap().id;
        store.forget(&[forgotten]).unwrap();
        let ids: BTreeMap<_, _> = NAMES.into_iter().map(|name| (name, capture(&store, name))).collect();
        // What is damaged below is never at the end of the pack, where zeros pass for a torn tail.
        store.label(ids["a1"], &[("last".to_owned(), Some("yes".to_owned()))]).unwrap();
        let mut needs: HashMap<_, BTreeSet<_>> = HashMap::new();
        for (name, id) in &ids {
            let snapshot = store.snapshot(*id).unwrap();
            let record = snapshot.record();
            let mut need = |kind, hash| {
                needs.entry((kind, hash)).or_default().insert(*name);
            };
            need(Kind::Record, id.0);
            need(Kind::Layout, record.layout);
            need(Kind::Root, record.root);
            record.attachments.iter().for_each(|attachment| need(Kind::Attachment, attachment.hash));
            let regions: Vec<Hash> = snapshot.regions().unwrap().map(|region| region.unwrap().1).collect();
            for table in regions.chunks(REGIONS_PER_TABLE) {
                let bytes: Vec<u8> = table.iter().flat_map(|hash| hash.0).collect();
                need(Kind::Table, Hash::of(&bytes));
                table.iter().filter(|hash| !hash.is_zero()).for_each(|hash| need(Kind::Region, *hash));
            }
        }
        drop(store);
        let made = Vault { _dir: dir, path, ids, forgotten, needs };
        // So little is not saved to the index when it is closed, but when it is built anew.
        made.lose_the_index();
        drop(made.open());
        made
    }

    fn pack(&self) -> PathBuf {
        self.path.join("packs/00000001.pack")
    }

    fn open(&self) -> Store {
        Store::open(&self.path).unwrap()
    }

    fn lose_the_index(&self) {
        std::fs::remove_dir_all(self.path.join("index")).unwrap();
    }

    /// The one object of this kind that exactly these snapshots need.
    fn object(&self, kind: Kind, needed_by: &[&str]) -> Object {
        let is_it = |object: &Object| {
            object.kind == kind as u8
                && self
                    .needs
                    .get(&(kind, object.hash))
                    .is_some_and(|names| names.iter().copied().eq(needed_by.iter().copied()))
        };
        objects(&std::fs::read(self.pack()).unwrap())
            .into_iter()
            .find(is_it)
            .expect("there is such an object")
    }

    fn change_pack(&self, change: impl FnOnce(&mut Vec<u8>)) {
        let mut bytes = std::fs::read(self.pack()).unwrap();
        change(&mut bytes);
        std::fs::write(self.pack(), bytes).unwrap();
    }

    /// Everything of the snapshots is as it was, save of `lost`, which fail as damage that `says`
    /// what it is about.
    fn assert_lost(&self, store: &Store, lost: &[&str], says: &str) {
        for (name, id) in &self.ids {
            match (read(store, *id), lost.contains(name)) {
                (Ok(found), false) => assert!(found == (memory(name), globals(name)), "{name} is changed"),
                (Ok(_), true) => panic!("{name} must fail"),
                (Err(error), false) => panic!("{name} must be whole: {error:?}"),
                (Err(error), true) => {
                    let Error::Store(error) = error else { panic!("{error:?}") };
                    assert!(error.is_damage(), "{name}: {error:?}");
                    assert!(error.to_string().contains(says), "{name}: expected {says} in {error}");
                }
            }
        }
    }

    fn assert_whole(&self, store: &Store) {
        self.assert_lost(store, &[], "");
    }

    fn names(&self, ids: impl IntoIterator<Item = SnapshotId>) -> Vec<&'static str> {
        let ids: BTreeSet<SnapshotId> = ids.into_iter().collect();
        let named =
            |id| self.ids.iter().find(|(_, known)| **known == id).map_or("unknown", |(name, _)| *name);
        let mut names: Vec<_> = ids.into_iter().map(named).collect();
        names.sort_unstable();
        names
    }

    /// The snapshots that a report names.
    fn named(&self, report: &VerifyReport) -> Vec<&'static str> {
        self.names(report.problems.iter().flat_map(|problem| &problem.snapshots).copied())
    }
}

fn globals(name: &str) -> Option<Vec<u8>> {
    options(name).attachments.first().map(|attachment| attachment.bytes.clone())
}

/// All there is of a snapshot.
fn read(store: &Store, id: SnapshotId) -> Result<(Vec<u8>, Option<Vec<u8>>), Error> {
    let globals = store.snapshot(id)?.attachment("globals")?;
    let restore = store.restore(id)?;
    let mut image = vec![0xEE; restore.image_bytes() as usize];
    restore.into_slice(&mut image)?;
    Ok((image, globals))
}

fn verify(store: &Store) -> VerifyReport {
    store.verify(&VerifyOptions::default()).unwrap()
}

fn is_unknown(store: &Store, id: SnapshotId) -> bool {
    matches!(store.restore(id).err(), Some(Error::Store(StoreError::NoSuchSnapshot { .. })))
}

fn copy(from: &Path, to: &Path) {
    std::fs::create_dir(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        match entry.file_type().unwrap().is_dir() {
            true => copy(&entry.path(), &target),
            false => drop(std::fs::copy(entry.path(), target).unwrap()),
        }
    }
}

fn files_in(dir: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() { files.extend(files_in(&path)) } else { files.push(path) }
    }
    files.sort();
    files
}

/// An object in a pack.
#[derive(Clone, Copy, Debug)]
struct Object {
    kind: u8,
    hash: Hash,
    start: usize,
    payload: usize,
    payload_end: usize,
    end: usize,
}

const PACK_HEADER_BYTES: usize = 64;

/// The objects of a pack that replaces none.
fn objects(pack: &[u8]) -> Vec<Object> {
    let mut objects = Vec::new();
    let mut start = PACK_HEADER_BYTES;
    while start < pack.len() {
        let header = &pack[start..start + 48];
        let stored_bytes = u32::from_le_bytes(header[8..12].try_into().unwrap()) as usize;
        let payload = start + 48;
        let payload_end = payload + stored_bytes;
        let end = payload_end.next_multiple_of(8);
        let hash = Hash(header[16..48].try_into().unwrap());
        objects.push(Object { kind: header[0], hash, start, payload, payload_end, end });
        start = end;
    }
    assert_eq!(start, pack.len());
    objects
}

// ---- One object ---------------------------------------------------------------------------------

/// What is damaged: its kind, and the snapshots that need it; and whether gc must refuse, as it
/// could not know what else is needed.
const PLACES: [(Kind, &[&str], bool); 7] = [
    (Kind::Region, &["b1"], false),
    (Kind::Region, &["a1", "a2", "b1"], false),
    (Kind::Table, &["a1"], true),
    (Kind::Table, &["a1", "a2"], true),
    (Kind::Root, &["c1"], true),
    (Kind::Layout, &["a1", "a2"], true),
    (Kind::Attachment, &["c1"], false),
];

type Damage = fn(&mut [u8], &Object);

/// How: what becomes of the bytes of an object.
const KINDS: [(&str, Damage); 7] = [
    ("a bit of its payload flipped", |pack, object| pack[(object.payload + object.payload_end) / 2] ^= 0x10),
    ("its payload zeroed", |pack, object| pack[object.payload..object.payload_end].fill(0)),
    ("its kind changed", |pack, object| pack[object.start] = pack[object.start] % 8 + 1),
    ("its length flipped", |pack, object| pack[object.start + 10] ^= 0x40),
    ("its hash flipped", |pack, object| pack[object.start + 20] ^= 1),
    ("its checksum flipped", |pack, object| pack[object.start + 13] ^= 0x80),
    ("all of it zeroed", |pack, object| pack[object.start..object.end].fill(0)),
];

/// Runs `check` for each place and kind, with the index as it was and without, and tells of all that
/// fail.
fn for_each_case(check: impl Fn(&Vault, &Object, &[&str], bool)) {
    let mut failed = Vec::new();
    for (kind, needed_by, gc_refuses) in PLACES {
        for (how, damage) in KINDS {
            for index_is_lost in [false, true] {
                let vault = Vault::copy();
                let object = vault.object(kind, needed_by);
                vault.change_pack(|bytes| damage(bytes, &object));
                if index_is_lost {
                    vault.lose_the_index();
                }
                let result = catch_unwind(AssertUnwindSafe(|| check(&vault, &object, needed_by, gc_refuses)));
                if result.is_err() {
                    let index = if index_is_lost { ", and the index lost" } else { "" };
                    failed.push(format!("the {kind} that {needed_by:?} need: {how}{index}"));
                }
            }
        }
    }
    assert!(failed.is_empty(), "{} cases failed, as said above:\n{}", failed.len(), failed.join("\n"));
}

#[test]
fn only_the_snapshots_that_need_a_damaged_object_fail_and_verify_lists_exactly_those() {
    for_each_case(|vault, object, needed_by, _| {
        let says = object.hash.to_string();
        let store = vault.open();
        assert_eq!(store.snapshots().len(), NAMES.len());
        vault.assert_lost(&store, needed_by, &says);
        let report = verify(&store);
        assert_eq!(vault.named(&report), needed_by);
        assert!(report.problems.iter().any(|problem| problem.object == says), "{report:?}");
        // Nor does looking once change what is found the next time, and after a reopening.
        assert_eq!(vault.named(&verify(&store)), needed_by);
        drop(store);
        let store = vault.open();
        assert_eq!(vault.named(&verify(&store)), needed_by);
        vault.assert_lost(&store, needed_by, &says);
    });
}

#[test]
fn a_sample_of_everything_and_a_look_at_one_snapshot_find_it_too() {
    for_each_case(|vault, object, needed_by, _| {
        let says = object.hash.to_string();
        let store = vault.open();
        for (name, id) in &vault.ids {
            let options = VerifyOptions { snapshots: vec![*id], ..VerifyOptions::default() };
            let report = store.verify(&options).unwrap();
            let names: &[&str] = if needed_by.contains(name) { &[name] } else { &[] };
            assert_eq!(vault.named(&report), names, "{report:?}");
            assert_eq!(names.is_empty(), report.problems.is_empty(), "{report:?}");
            assert!(report.problems.iter().all(|problem| problem.object == says), "{report:?}");
        }
    });
    for_each_case(|vault, object, needed_by, _| {
        let store = vault.open();
        let options = VerifyOptions { sample_percent: Some(100), ..VerifyOptions::default() };
        let report = store.verify(&options).unwrap();
        assert_eq!(vault.named(&report), needed_by, "{report:?}");
        assert!(report.problems.iter().any(|problem| problem.object == object.hash.to_string()));
    });
}

#[test]
fn repeated_samples_find_it_in_the_end_and_blame_the_right_snapshots() {
    for (kind, needed_by, _) in PLACES {
        let vault = Vault::copy();
        let object = vault.object(kind, needed_by);
        vault.change_pack(|bytes| bytes[object.start] ^= 0x10);
        let store = vault.open();
        let options = VerifyOptions { sample_percent: Some(50), ..VerifyOptions::default() };
        let mut samples = std::iter::repeat_with(|| store.verify(&options).unwrap());
        let report = samples.by_ref().take(100).find(|report| !report.problems.is_empty()).unwrap();
        let [problem] = &report.problems[..] else { panic!("{report:?}") };
        assert_eq!((&*problem.kind, &*problem.object), (kind.name(), &*object.hash.to_string()));
        assert_eq!(vault.named(&report), needed_by);
    }
}

#[test]
fn capturing_the_same_memory_again_heals_the_earlier_snapshots() {
    for_each_case(|vault, _, needed_by, _| {
        let store = vault.open();
        verify(&store);
        heal(&store, needed_by);
        vault.assert_whole(&store);
        assert_eq!(vault.named(&verify(&store)), [""; 0]);
        drop(store);
        let store = vault.open();
        vault.assert_whole(&store);
        drop(store);
        vault.lose_the_index();
        vault.assert_whole(&vault.open());
    });
}

#[test]
fn repair_brings_back_everything_else_and_sets_the_pack_aside() {
    for_each_case(|vault, object, needed_by, _| {
        let damaged = std::fs::read(vault.pack()).unwrap();
        let would =
            Store::repair(&vault.path, &RepairOptions { dry_run: true, ..Default::default() }).unwrap();
        assert_eq!(vault.names(would.lost_snapshots), needed_by);
        assert!(std::fs::read(vault.pack()).unwrap() == damaged, "a dry run changes nothing");

        let report = Store::repair(&vault.path, &RepairOptions::default()).unwrap();
        assert_eq!(vault.names(report.lost_snapshots), needed_by);
        assert_eq!((report.index_rebuilt, report.damaged.len()), (true, 1), "{:?}", report.damaged);
        assert!(std::fs::read(vault.path.join("damaged/00000001.pack")).unwrap() == damaged);

        let store = vault.open();
        vault.assert_lost(&store, needed_by, &object.hash.to_string());
        assert_eq!(vault.named(&verify(&store)), needed_by);
        heal(&store, needed_by);
        vault.assert_whole(&store);
        assert_eq!(verify(&store).problems, []);
        assert!(is_unknown(&store, vault.forgotten));
        drop(store);
        let report = Store::repair(&vault.path, &RepairOptions::default()).unwrap();
        assert_eq!((report.damaged, report.lost_snapshots), (vec![], vec![]));
    });
}

#[test]
fn gc_refuses_rather_than_drop_what_a_damaged_table_may_need() {
    for_each_case(|vault, object, needed_by, gc_refuses| {
        let store = vault.open();
        let options = GcOptions { max_unused_percent: 0, ..GcOptions::default() };
        match store.gc(&options) {
            Ok(_) => assert!(!gc_refuses, "gc must refuse"),
            Err(Error::Store(error)) => {
                assert!(gc_refuses && error.is_damage(), "{error:?}");
                assert!(error.to_string().contains(&object.hash.to_string()), "{error}");
            }
            Err(error) => panic!("{error:?}"),
        }
        vault.assert_lost(&store, needed_by, &object.hash.to_string());
        verify(&store);
        heal(&store, needed_by);
        store.gc(&options).unwrap();
        vault.assert_whole(&store);
    });
}

// ---- Records, notes and tombstones --------------------------------------------------------------

/// The object of this kind; of its kind there is only one that is not a record.
fn fact(vault: &Vault, kind: Kind, snapshot: &str) -> Object {
    let id = vault.ids[snapshot].0;
    let is_it = |object: &Object| object.kind == kind as u8 && (kind != Kind::Record || object.hash == id);
    objects(&std::fs::read(vault.pack()).unwrap()).into_iter().find(is_it).unwrap()
}

#[test]
fn a_damaged_record_costs_its_snapshot_alone_and_only_when_the_index_is_lost_too() {
    for damage in [KINDS[0], KINDS[1], KINDS[4], KINDS[5]] {
        println!("{}", damage.0);
        let vault = Vault::copy();
        let object = fact(&vault, Kind::Record, "b1");
        vault.change_pack(|bytes| damage.1(bytes, &object));
        // The index has the record still.
        let store = vault.open();
        vault.assert_whole(&store);
        let report = verify(&store);
        assert_eq!(vault.named(&report), ["b1"], "{report:?}");
        drop(store);

        vault.lose_the_index();
        let store = vault.open();
        assert_eq!(store.snapshots().len(), NAMES.len() - 1);
        assert!(is_unknown(&store, vault.ids["b1"]));
        for name in ["a1", "a2", "c1"] {
            assert!(read(&store, vault.ids[name]).unwrap() == (memory(name), globals(name)));
        }
        assert!(!verify(&store).problems.is_empty());
        // The memory is still there, and only the record is written when it is captured again.
        let capture = store.process("b").capture(&memory("b1"), &options("b1")).unwrap();
        assert_eq!((capture.new_regions, capture.parent), (0, None));
    }
}

#[test]
fn repair_brings_back_what_only_the_index_knows() {
    for kind in [Kind::Record, Kind::Note, Kind::Tombstone] {
        for (how, damage) in KINDS {
            println!("{kind}, {how}");
            let vault = Vault::copy();
            let object = fact(&vault, kind, "b1");
            vault.change_pack(|bytes| damage(bytes, &object));
            let report = Store::repair(&vault.path, &RepairOptions::default()).unwrap();
            assert_eq!((report.damaged.len(), report.lost_snapshots), (1, vec![]));
            vault.lose_the_index();
            let store = vault.open();
            vault.assert_whole(&store);
            assert_eq!(*store.snapshot(vault.ids["c1"]).unwrap().labels(), options("c1").labels);
            assert!(is_unknown(&store, vault.forgotten));
            assert_eq!(verify(&store).problems, []);
        }
    }
}

#[test]
fn a_damaged_note_costs_labels_and_a_damaged_tombstone_forgets_nothing_else() {
    for kind in [Kind::Note, Kind::Tombstone] {
        for (how, damage) in KINDS {
            println!("{kind}, {how}");
            let vault = Vault::copy();
            let object = fact(&vault, kind, "c1");
            vault.change_pack(|bytes| damage(bytes, &object));
            let store = vault.open();
            vault.assert_whole(&store);
            assert_eq!(*store.snapshot(vault.ids["c1"]).unwrap().labels(), options("c1").labels);
            assert!(is_unknown(&store, vault.forgotten));
            let report = verify(&store);
            assert_eq!((report.problems.len(), vault.named(&report)), (1, vec![]), "{report:?}");
            drop(store);
            vault.lose_the_index();
            let store = vault.open();
            vault.assert_whole(&store);
            let report = verify(&store);
            assert_eq!((report.problems.len(), vault.named(&report)), (1, vec![]), "{report:?}");
        }
    }
}

// ---- The tail -----------------------------------------------------------------------------------

/// The store of [`Vault`] with bytes after its pack, as a crash leaves them: the index does not know.
fn with_tail(tail: &[u8], index_is_lost: bool) -> Vault {
    let vault = Vault::copy();
    vault.change_pack(|bytes| bytes.extend_from_slice(tail));
    if index_is_lost {
        vault.lose_the_index();
    }
    vault
}

/// What the next snapshot appends.
fn next_snapshot() -> (Vec<u8>, SnapshotId) {
    let vault = Vault::copy();
    let before = std::fs::read(vault.pack()).unwrap();
    let store = vault.open();
    let id =
        store.process("e").capture(&noise(5 * REGION_BYTES + 9, 7), &CaptureOptions::default()).unwrap().id;
    drop(store);
    (std::fs::read(vault.pack()).unwrap()[before.len()..].to_vec(), id)
}

#[test]
fn a_pack_cut_at_any_interesting_byte_loses_nothing_that_was_acknowledged() {
    let (tail, id) = next_snapshot();
    let whole = [vec![0; PACK_HEADER_BYTES], tail.clone()].concat();
    let ends: BTreeSet<usize> = objects(&whole).iter().map(|object| object.end - PACK_HEADER_BYTES).collect();
    let interesting: BTreeSet<usize> = objects(&whole)
        .iter()
        .flat_map(|it| {
            [it.start, it.start + 7, it.start + 16, it.payload, it.payload + 1, it.payload_end - 1, it.end]
        })
        .flat_map(|at| [at - 1, at, at + 1])
        .map(|at| at.saturating_sub(PACK_HEADER_BYTES).min(tail.len()))
        .collect();
    assert!(interesting.len() > 50);
    for cut in interesting {
        for index_is_lost in [false, true] {
            println!("cut at {cut}, the index lost: {index_is_lost}");
            let vault = with_tail(&tail[..cut], index_is_lost);
            let acknowledged_bytes = std::fs::metadata(vault.pack()).unwrap().len() as usize - cut;
            let store = vault.open();
            vault.assert_whole(&store);
            assert_eq!(is_unknown(&store, id), cut < tail.len());
            assert_eq!(verify(&store).problems, []);
            // It is cut at the last whole object, and what is captured now goes on there.
            let kept = ends.iter().rfind(|end| **end <= cut).copied().unwrap_or(0);
            assert_eq!(std::fs::metadata(vault.pack()).unwrap().len() as usize, acknowledged_bytes + kept);
            let memory = noise(5 * REGION_BYTES + 9, 7);
            let again = store.process("e").capture(&memory, &CaptureOptions::default()).unwrap().id;
            drop(store);
            let store = vault.open();
            assert!(read(&store, again).unwrap().0 == memory);
            vault.assert_whole(&store);
            assert_eq!(verify(&store).problems, []);
            assert!(!vault.path.join("damaged").exists());
            assert_eq!(files_in(&vault.path.join("packs")).len(), 1);
        }
    }
}

#[test]
fn garbage_and_zeros_after_the_pack_are_cut_silently() {
    let (next, _) = next_snapshot();
    let shifted = [&[0; 8][..], &next[8..]].concat();
    let tails: [(&str, Vec<u8>); 6] = [
        ("a byte", vec![0x53]),
        ("noise", noise(10_000, 8)),
        ("noise of odd length", noise(777, 9)),
        ("zeros", vec![0; 4096]),
        ("zeros of odd length", vec![0; 3]),
        ("a snapshot without its first header, of which the rest was written", shifted[..48].to_vec()),
    ];
    for (what, tail) in tails {
        for index_is_lost in [false, true] {
            println!("{what}, the index lost: {index_is_lost}");
            let vault = with_tail(&tail, index_is_lost);
            let acknowledged_bytes = std::fs::metadata(vault.pack()).unwrap().len() - tail.len() as u64;
            let store = vault.open();
            vault.assert_whole(&store);
            // What lost the index as well may be something worse than a crash, and stays to be seen.
            if !index_is_lost || tail.iter().all(|byte| *byte == 0) {
                assert_eq!(verify(&store).problems, []);
                assert_eq!(std::fs::metadata(vault.pack()).unwrap().len(), acknowledged_bytes);
            }
            let id = store.process("e").capture(&memory("b1"), &CaptureOptions::default()).unwrap().id;
            drop(store);
            let store = vault.open();
            assert!(read(&store, id).unwrap().0 == memory("b1"));
            vault.assert_whole(&store);
            drop(store);
            let report = Store::repair(&vault.path, &RepairOptions::default()).unwrap();
            assert_eq!(report.lost_snapshots, []);
            let store = vault.open();
            vault.assert_whole(&store);
            assert!(read(&store, id).unwrap().0 == memory("b1"));
            assert_eq!(verify(&store).problems, []);
        }
    }
}

#[test]
fn a_pack_cut_into_what_was_acknowledged_costs_what_lay_there_alone() {
    let vault = Vault::copy();
    // Everything up to the record of `a2` is kept: `b1` and `c1` lie after it.
    let end = fact(&vault, Kind::Record, "a2").end;
    vault.change_pack(|bytes| bytes.truncate(end + 20));
    let store = vault.open();
    for name in ["a1", "a2"] {
        assert!(read(&store, vault.ids[name]).unwrap() == (memory(name), globals(name)));
    }
    for name in ["b1", "c1"] {
        assert!(is_unknown(&store, vault.ids[name]));
    }
    capture(&store, "b1");
    assert_eq!(verify(&store).problems, []);
}

// ---- Packs --------------------------------------------------------------------------------------

#[test]
fn a_pack_with_a_damaged_header_is_named_left_alone_and_brought_back_by_repair() {
    for at in 0..PACK_HEADER_BYTES {
        let vault = Vault::copy();
        vault.change_pack(|bytes| bytes[at] ^= 4);
        let damaged = std::fs::read(vault.pack()).unwrap();
        let store = vault.open();
        assert_eq!(store.snapshots().len(), 0);
        let report = verify(&store);
        let [problem] = &report.problems[..] else { panic!("byte {at}: {report:?}") };
        assert!(problem.kind == "pack" && problem.object.contains("00000001.pack"), "{problem:?}");
        // Life goes on, in another pack.
        let id = store.process("e").capture(&memory("b1"), &CaptureOptions::default()).unwrap().id;
        assert!(read(&store, id).unwrap().0 == memory("b1"));
        drop(store);
        assert!(std::fs::read(vault.pack()).unwrap() == damaged, "byte {at}");

        let report = Store::repair(&vault.path, &RepairOptions::default()).unwrap();
        assert_eq!((report.damaged.len(), report.lost_snapshots), (1, vec![]), "byte {at}");
        assert!(std::fs::read(vault.path.join("damaged/00000001.pack")).unwrap() == damaged);
        let store = vault.open();
        vault.assert_whole(&store);
        assert!(read(&store, id).unwrap().0 == memory("b1"));
        assert!(is_unknown(&store, vault.forgotten));
        assert_eq!(*store.snapshot(vault.ids["c1"]).unwrap().labels(), options("c1").labels);
        assert_eq!(verify(&store).problems, [], "byte {at}");
    }
}

/// A store of two packs: the records of `b1` and `c1` are in the second, the regions of `b1` in the first.
fn two_packs() -> Vault {
    let vault = Vault::copy();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("store");
    let region_size = RegionSize::new(REGION_BYTES as u32).unwrap();
    let store = Store::options().region_size(region_size).create(&path).unwrap();
    let plain = CaptureOptions::default();
    let forgotten = store.process("d").capture(&noise(50_000, 6), &plain).unwrap().id;
    let mut ids = vault.ids.clone();
    for name in ["a1", "a2"] {
        ids.insert(name, capture(&store, name));
    }
    // The regions of `b1` come into the first pack by another snapshot, which is forgotten later.
    let first = store.process("f").capture(&memory("b1"), &plain).unwrap().id;
    store.forget(&[forgotten]).unwrap();
    store.gc(&GcOptions { max_unused_percent: 0, ..GcOptions::default() }).unwrap();
    for name in ["b1", "c1"] {
        ids.insert(name, capture(&store, name));
    }
    store.forget(&[first]).unwrap();
    drop(store);
    let packs = files_in(&path.join("packs"));
    let packs: Vec<_> = packs.iter().map(|pack| pack.file_name().unwrap().to_owned()).collect();
    assert_eq!(packs, ["00000002.pack", "00000003.pack"]);
    Vault { _dir: dir, path, ids, forgotten, ..vault }
}

#[test]
fn a_pack_that_is_gone_costs_the_snapshots_that_need_it() {
    let vault = two_packs();
    std::fs::remove_file(vault.path.join("packs/00000002.pack")).unwrap();
    let store = vault.open();
    // The records of `a` were in it.
    for name in ["a1", "a2"] {
        assert!(is_unknown(&store, vault.ids[name]));
    }
    assert!(read(&store, vault.ids["c1"]).unwrap() == (memory("c1"), globals("c1")));
    assert!(matches!(read(&store, vault.ids["b1"]), Err(Error::Store(error)) if error.is_damage()));
    assert_eq!(vault.named(&verify(&store)), ["b1"]);
    capture(&store, "b1");
    assert!(read(&store, vault.ids["b1"]).unwrap().0 == memory("b1"));
    assert_eq!(verify(&store).problems, []);
}

#[test]
fn gc_takes_nothing_that_an_unreadable_pack_may_need() {
    for number in [2, 3] {
        println!("pack {number}");
        let vault = two_packs();
        let path = vault.path.join(format!("packs/0000000{number}.pack"));
        let mut bytes = std::fs::read(&path).unwrap();
        bytes[40] ^= 1;
        std::fs::write(&path, bytes).unwrap();
        let store = vault.open();
        let error = store.gc(&GcOptions { max_unused_percent: 0, ..GcOptions::default() }).unwrap_err();
        assert!(error.to_string().contains(&format!("0000000{number}.pack")), "{error}");
        drop(store);
        let report = Store::repair(&vault.path, &RepairOptions::default()).unwrap();
        assert_eq!(report.lost_snapshots, []);
        let store = vault.open();
        vault.assert_whole(&store);
        assert_eq!(verify(&store).problems, []);
    }
}

// ---- The index ----------------------------------------------------------------------------------

type FileDamage = fn(&Path);

/// How a file of the index is damaged.
const INDEX_KINDS: [(&str, FileDamage); 7] = [
    ("removed", |file| std::fs::remove_file(file).unwrap()),
    ("emptied", |file| std::fs::write(file, []).unwrap()),
    ("cut in half", |file| change(file, |bytes| bytes.truncate(bytes.len() / 2))),
    ("cut by a byte", |file| change(file, |bytes| bytes.truncate(bytes.len().saturating_sub(1)))),
    ("zeroed", |file| change(file, |bytes| bytes.fill(0))),
    ("zeroed from the middle on", |file| {
        change(file, |bytes| {
            let half = bytes.len() / 2;
            bytes[half..].fill(0)
        })
    }),
    ("noise", |file| change(file, |bytes| *bytes = noise(bytes.len(), 11))),
];

fn change(file: &Path, change: impl FnOnce(&mut Vec<u8>)) {
    let mut bytes = std::fs::read(file).unwrap();
    change(&mut bytes);
    std::fs::write(file, bytes).unwrap();
}

/// The store is as if nothing had happened, and works.
fn assert_costs_a_rebuild_at_most(vault: &Vault) {
    for _ in 0..2 {
        let store = vault.open();
        assert_eq!(store.snapshots().len(), NAMES.len());
        vault.assert_whole(&store);
        assert!(is_unknown(&store, vault.forgotten));
        assert_eq!(*store.snapshot(vault.ids["c1"]).unwrap().labels(), options("c1").labels);
        assert_eq!(verify(&store).problems, []);
    }
    let store = vault.open();
    let id = store.process("e").capture(&noise(30_000, 12), &CaptureOptions::default()).unwrap().id;
    store.gc(&GcOptions { max_unused_percent: 0, ..GcOptions::default() }).unwrap();
    vault.assert_whole(&store);
    assert!(read(&store, id).unwrap().0 == noise(30_000, 12));
    assert_eq!(verify(&store).problems, []);
}

#[test]
fn a_damaged_file_of_the_index_costs_a_rebuild_at_most() {
    let count = files_in(&Vault::copy().path.join("index")).len();
    for at in 0..count {
        for (how, damage) in INDEX_KINDS {
            let vault = Vault::copy();
            let file = files_in(&vault.path.join("index"))[at].clone();
            println!("{} {how}", file.strip_prefix(&vault.path).unwrap().display());
            damage(&file);
            assert_costs_a_rebuild_at_most(&vault);
        }
    }
}

#[test]
fn a_flipped_bit_anywhere_in_the_index_costs_a_rebuild_at_most() {
    let used = |file: &Path| std::fs::read(file).unwrap().iter().rposition(|byte| *byte != 0).unwrap_or(0);
    let files: Vec<usize> =
        files_in(&Vault::copy().path.join("index")).iter().map(|file| used(file)).collect();
    for (number, used_bytes) in files.into_iter().enumerate() {
        for step in 0..40usize {
            let vault = Vault::copy();
            let file = files_in(&vault.path.join("index"))[number].clone();
            let at = (used_bytes * step / 40 + step % 7).min(used_bytes);
            println!("{} byte {at} of {used_bytes}", file.strip_prefix(&vault.path).unwrap().display());
            change(&file, |bytes| bytes[at] ^= 1 << (step % 8));
            assert_costs_a_rebuild_at_most(&vault);
        }
    }
}

#[test]
fn an_index_that_is_missing_or_something_else_costs_a_rebuild() {
    let things: [(&str, FileDamage); 4] = [
        ("nothing", |_| {}),
        ("an empty directory", |index| std::fs::create_dir(index).unwrap()),
        ("a file", |index| std::fs::write(index, "not an index").unwrap()),
        ("a directory of other files", |index| {
            std::fs::create_dir(index).unwrap();
            std::fs::write(index.join("db"), "not an index").unwrap();
        }),
    ];
    for (what, make) in things {
        println!("{what}");
        let vault = Vault::copy();
        vault.lose_the_index();
        make(&vault.path.join("index"));
        assert_costs_a_rebuild_at_most(&vault);
    }
}

#[test]
fn an_index_of_an_older_moment_costs_a_rebuild_at_most() {
    let gc = GcOptions { max_unused_percent: 0, ..GcOptions::default() };
    type Since = fn(&Store, &GcOptions);
    let since: [(&str, Since); 4] = [
        ("a snapshot", |store, _| heal(store, &["b1"])),
        ("labels", |store, _| {
            let id = store.find("a@latest").unwrap();
            store.label(id, &[("k".to_owned(), Some("v".to_owned()))]).unwrap();
        }),
        ("a forgotten snapshot", |store, _| {
            let id = store.process("e").capture(&noise(9_000, 13), &CaptureOptions::default()).unwrap().id;
            store.forget(&[id]).unwrap();
        }),
        ("a gc that moved everything", |store, gc| {
            store.gc(gc).unwrap();
            capture(store, "c1");
        }),
    ];
    for (what, happened) in since {
        println!("{what}");
        let vault = Vault::copy();
        let older = vault.path.with_extension("older");
        copy(&vault.path.join("index"), &older);
        let store = vault.open();
        happened(&store, &gc);
        let listed: Vec<_> =
            store.snapshots().iter().map(|snapshot| (snapshot.id(), snapshot.labels().clone())).collect();
        drop(store);
        vault.lose_the_index();
        copy(&older, &vault.path.join("index"));
        let store = vault.open();
        let found: Vec<_> =
            store.snapshots().iter().map(|snapshot| (snapshot.id(), snapshot.labels().clone())).collect();
        assert_eq!(found, listed);
        vault.assert_whole(&store);
        assert_eq!(verify(&store).problems, []);
    }
}

/// It may hold places in the packs that are gone, without having been told up to where it knows them.
#[test]
fn an_index_that_does_not_know_a_pack_which_gc_wrote_is_rebuilt() {
    let dir = tempfile::tempdir().unwrap();
    let (path, older) = (dir.path().join("store"), dir.path().join("older"));
    drop(Store::options().create(&path).unwrap());
    copy(&path.join("index"), &older);
    let store = Store::open(&path).unwrap();
    let plain = CaptureOptions::default();
    let kept = store.process("p").capture(&noise(50_000, 1), &plain).unwrap().id;
    let forgotten = store.process("q").capture(&noise(50_000, 2), &plain).unwrap().id;
    store.forget(&[forgotten]).unwrap();
    store.gc(&GcOptions { max_unused_percent: 0, ..GcOptions::default() }).unwrap();
    drop(store);
    std::fs::remove_dir_all(path.join("index")).unwrap();
    copy(&older, &path.join("index"));
    let dry_run = RepairOptions { dry_run: true, ..RepairOptions::default() };
    assert!(Store::repair(&path, &dry_run).unwrap().index_rebuilt);
    assert!(!Store::repair(&path, &dry_run).unwrap().index_rebuilt);
    assert!(read(&Store::open(&path).unwrap(), kept).unwrap().0 == noise(50_000, 1));
}

#[test]
fn what_was_committed_last_is_there_whether_the_store_was_closed_or_killed() {
    let vault = Vault::copy();
    for closed in [true, false] {
        let before = vault.path.with_extension("before");
        copy(&vault.path.join("index"), &before);
        let store = vault.open();
        let id = store.process("e").capture(&noise(30_000, 14), &CaptureOptions::default()).unwrap().id;
        store.label(id, &[("k".to_owned(), Some("v".to_owned()))]).unwrap();
        drop(store);
        if !closed {
            vault.lose_the_index();
            copy(&before, &vault.path.join("index"));
        }
        std::fs::remove_dir_all(&before).unwrap();
        let store = vault.open();
        assert!(read(&store, id).unwrap().0 == noise(30_000, 14));
        assert_eq!(store.snapshot(id).unwrap().labels().len(), 1);
        vault.assert_whole(&store);
        let again = store.process("f").capture(&noise(30_000, 14), &CaptureOptions::default()).unwrap();
        assert_eq!(again.new_regions, 0, "all of it is found again");
        store.forget(&[id, again.id]).unwrap();
        drop(store);
        assert!(is_unknown(&vault.open(), id));
        let gc = GcOptions { max_unused_percent: 0, ..GcOptions::default() };
        assert!(vault.open().gc(&gc).unwrap().dead_regions > 0);
        vault.assert_whole(&vault.open());
    }
}

#[test]
fn damage_to_what_was_committed_last_is_no_torn_tail_after_a_clean_close() {
    for (how, damage) in KINDS {
        println!("{how}");
        let vault = Vault::copy();
        let store = vault.open();
        let id = store.process("e").capture(&noise(9_000, 15), &CaptureOptions::default()).unwrap().id;
        drop(store);
        let length = std::fs::metadata(vault.pack()).unwrap().len();
        let record = objects(&std::fs::read(vault.pack()).unwrap()).into_iter().find(|it| it.hash == id.0);
        vault.change_pack(|bytes| damage(bytes, &record.unwrap()));
        for _ in 0..2 {
            let store = vault.open();
            assert_eq!(std::fs::metadata(vault.pack()).unwrap().len(), length, "nothing is cut");
            assert!(is_unknown(&store, id));
            vault.assert_whole(&store);
            assert_eq!(verify(&store).problems.len(), 1);
        }
    }
}

#[test]
fn what_verify_took_out_of_the_index_is_healed_by_another_process() {
    let vault = Vault::copy();
    let store = vault.open();
    let memory = noise(30_000, 16);
    let id = store.process("e").capture(&memory, &CaptureOptions::default()).unwrap().id;
    let damaged = store.snapshot(id).unwrap().regions().unwrap().next().unwrap().unwrap().1;
    let object =
        objects(&std::fs::read(vault.pack()).unwrap()).into_iter().find(|it| it.hash == damaged).unwrap();
    // While it is open and knows of the region from before.
    let pack = std::fs::File::options().read(true).write(true).open(vault.pack()).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&pack, &[0xAA; 3], object.payload as u64 + 5).unwrap();
    assert_eq!(verify(&store).problems.len(), 1);
    drop(store);
    let store = vault.open();
    let healing = store.process("e").capture(&memory, &CaptureOptions::default()).unwrap();
    assert_eq!(healing.new_regions, 1);
    assert!(read(&store, id).unwrap().0 == memory);
}

#[test]
fn a_pack_that_was_just_begun_when_the_power_failed_is_in_nobodys_way() {
    for content in [vec![], vec![0; 64], vec![0; 5000]] {
        let vault = Vault::copy();
        let begun = vault.pack().with_file_name("00000099.pack");
        std::fs::write(&begun, content).unwrap();
        let store = vault.open();
        vault.assert_whole(&store);
        heal(&store, &["b1"]);
        assert_eq!(verify(&store).problems, []);
        assert!(!begun.exists());
    }
}

#[test]
fn damage_in_a_pack_before_the_last_is_no_torn_tail_and_nothing_is_cut_there() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("store");
    drop(Store::options().region_size(RegionSize::new(65536).unwrap()).create(&path).unwrap());
    let older = dir.path().join("older");
    copy(&path.join("index"), &older);
    // More than a pack: the record is in the second.
    let memory = noise(270 << 20, 21);
    let store = Store::open(&path).unwrap();
    let id = store.process("p").capture(&memory, &CaptureOptions::default()).unwrap().id;
    drop(store);
    // As if the program had been killed before anything was indexed.
    std::fs::remove_dir_all(path.join("index")).unwrap();
    copy(&older, &path.join("index"));
    let first = path.join("packs/00000001.pack");
    let length = std::fs::metadata(&first).unwrap().len();
    let file = std::fs::File::options().write(true).open(&first).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &[0xAA; 3], 10_000_000).unwrap();
    let store = Store::open(&path).unwrap();
    assert_eq!(std::fs::metadata(&first).unwrap().len(), length);
    assert!(
        matches!(store.restore(id).unwrap().into_mapping(), Err(Error::Store(error)) if error.is_damage())
    );
    store.process("p").capture(&memory, &CaptureOptions::default()).unwrap();
    assert!(store.restore(id).unwrap().into_mapping().unwrap()[..] == memory[..], "healed");
}
