//! Compares the index with a model, across saves, rewrites and closings.

use super::*;
use crate::codec::Encoding;
use proptest::prelude::*;
use std::path::Path;

fn name(path: &Path) -> Name {
    Name::at(path).unwrap()
}

fn location(pack: u32) -> Location {
    Location { pack, offset_bytes: 48, encoding: Encoding::Raw, stored_bytes: 9, plain_bytes: 9 }
}

fn watermark(end_bytes: u64) -> Watermark {
    Watermark { pack: PackId(u128::from(end_bytes).to_le_bytes()), end_bytes }
}

const STORE: StoreId = StoreId([7; 16]);

/// Small limits, so that a few entries reach them.
const SMALL: Limits = Limits { unsaved_entries: 8, unsaved_bytes: 1 << 20, overlay_entries: 24 };

fn all(index: &Index, tree: Tree) -> BTreeMap<Hash, Location> {
    let entries: Vec<_> = index.entries(tree).collect::<Result<_, _>>().unwrap();
    assert!(entries.is_sorted_by_key(|(hash, _)| *hash));
    entries.into_iter().collect()
}

/// A step in the life of an index. A key stands for a hash, a pack and a snapshot.
#[derive(Clone, Debug)]
enum Step {
    Insert(Tree, Vec<u8>, u32),
    Replace(Tree, u8, Option<u32>),
    SetSnapshot(u8, Option<u8>),
    SetWatermark(u8, Option<u64>),
    Save,
    SaveIfMuch,
    /// Keeps the locations in packs with a number below this.
    Rewrite(u32),
    /// Closes the index properly or, like a crash, not at all.
    Reopen {
        close: bool,
    },
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let tree = || prop_oneof![Just(Tree::Regions), Just(Tree::Objects)];
    let keys = proptest::collection::vec(any::<u8>(), 1..12);
    let step = prop_oneof![
        8 => (tree(), keys, 1u32..9).prop_map(|(tree, keys, pack)| Step::Insert(tree, keys, pack)),
        4 => (tree(), any::<u8>(), proptest::option::of(1u32..9))
            .prop_map(|(tree, key, new)| Step::Replace(tree, key, new)),
        2 => (0u8..9, proptest::option::of(any::<u8>())).prop_map(|(key, it)| Step::SetSnapshot(key, it)),
        2 => (0u8..9, proptest::option::of(any::<u64>())).prop_map(|(key, it)| Step::SetWatermark(key, it)),
        2 => Just(Step::Save),
        4 => Just(Step::SaveIfMuch),
        1 => (5u32..10).prop_map(Step::Rewrite),
        2 => any::<bool>().prop_map(|close| Step::Reopen { close }),
    ];
    proptest::collection::vec(step, 0..60)
}

#[derive(Clone, Debug, Default, PartialEq)]
struct Model {
    trees: [BTreeMap<Hash, Location>; 2],
    snapshots: BTreeMap<Vec<u8>, Vec<u8>>,
    watermarks: BTreeMap<u32, Watermark>,
}

impl Model {
    fn of(index: &Index) -> Model {
        let trees = Tree::ALL.map(|tree| all(index, tree));
        Model { trees, snapshots: index.snapshots().unwrap(), watermarks: index.watermarks() }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]
    #[test]
    fn it_agrees_with_maps_whatever_happens(steps in steps()) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("index");
        let mut index = Index::open_with(&name(&path), STORE, SMALL).unwrap();
        let mut model = Model::default();
        // What must still be there after a crash.
        let mut saved = Model::default();
        let hash = |key: u8| Hash::of(&[key]);
        for step in steps {
            match step {
                Step::Insert(tree, keys, pack) => {
                    let entries: Vec<IndexEntry> =
                        keys.iter().map(|key| (tree, hash(*key), location(pack))).collect();
                    index.insert(&entries);
                    model.trees[tree as usize]
                        .extend(entries.into_iter().map(|(_, hash, location)| (hash, location)));
                }
                Step::Replace(tree, key, new) => {
                    let entries = &mut model.trees[tree as usize];
                    let old = entries.get(&hash(key)).copied();
                    let new = new.map(location);
                    prop_assert!(!index.replace(tree, &hash(key), location(99), new).unwrap());
                    let replaced = index.replace(tree, &hash(key), old.unwrap_or(location(1)), new);
                    prop_assert_eq!(replaced.unwrap(), old.is_some());
                    match (old, new) {
                        (Some(_), Some(new)) => drop(entries.insert(hash(key), new)),
                        _ => drop(entries.remove(&hash(key))),
                    }
                }
                Step::SetSnapshot(key, value) => {
                    index.set_snapshot(vec![key], value.map(|value| vec![value]));
                    match value {
                        Some(value) => drop(model.snapshots.insert(vec![key], vec![value])),
                        None => drop(model.snapshots.remove(&vec![key])),
                    }
                }
                Step::SetWatermark(pack, bytes) => {
                    let bytes = bytes.map(watermark);
                    index.set_watermark(pack.into(), bytes);
                    match bytes {
                        Some(bytes) => drop(model.watermarks.insert(pack.into(), bytes)),
                        None => drop(model.watermarks.remove(&pack.into())),
                    }
                }
                Step::Save => {
                    index.save().unwrap();
                    saved = model.clone();
                }
                Step::SaveIfMuch => {
                    let before = index.read().saved_epoch;
                    index.save_if_much().unwrap();
                    if index.read().saved_epoch > before {
                        saved = model.clone();
                    }
                }
                Step::Rewrite(end) => {
                    index.rewrite(|_, _, at| (at.pack < end).then_some(at)).unwrap();
                    model.trees.iter_mut().for_each(|tree| tree.retain(|_, at| at.pack < end));
                    saved = model.clone();
                }
                Step::Reopen { close } => {
                    if close {
                        let is_precious = index.read().is_precious;
                        index.close().unwrap();
                        if is_precious {
                            saved = model.clone();
                        }
                    }
                    drop(index);
                    index = Index::open_with(&name(&path), STORE, SMALL).unwrap();
                    model = saved.clone();
                }
            }
            prop_assert_eq!(&Model::of(&index), &model);
            for tree in Tree::ALL {
                for key in 0..=255 {
                    let known = model.trees[tree as usize].get(&hash(key)).copied();
                    prop_assert_eq!(index.get(tree, &hash(key)).unwrap(), known);
                }
            }
        }
    }
}

#[test]
fn what_is_taken_out_while_the_database_is_written_anew_may_be_there_in_part_after_a_kill() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("index");
    let index = Index::open_with(&name(&path), STORE, SMALL).unwrap();
    let hashes: Vec<Hash> = (0..100u8).map(|number| Hash::of(&[number])).collect();
    index.insert(&hashes.iter().map(|hash| (Tree::Regions, *hash, location(1))).collect::<Vec<_>>());
    index.rewrite(|_, _, location| Some(location)).unwrap();
    assert!(!index.may_have_dangling());
    // The last entry is changed as soon as the first one was seen.
    let last = hashes.iter().max().unwrap();
    let change = |tree, _: &Hash, at| {
        index.replace(tree, last, at, None).unwrap();
        Some(at)
    };
    index.rewrite(change).unwrap();
    drop(index);
    let index = Index::open_with(&name(&path), STORE, SMALL).unwrap();
    assert_eq!(index.get(Tree::Regions, last).unwrap(), None);
    assert_eq!(index.entries(Tree::Regions).count(), 99);
    assert!(index.may_have_dangling());
}

#[test]
fn what_is_saved_while_entries_are_taken_out_may_be_there_in_part_after_a_kill() {
    let dir = tempfile::tempdir().unwrap();
    let index = Index::open_with(&name(&dir.path().join("index")), STORE, SMALL).unwrap();
    let hashes: Vec<Hash> = (0..10u8).map(|number| Hash::of(&[number])).collect();
    let entries = hashes.iter().map(|hash| (Tree::Regions, *hash, location(1)));
    index.insert(&entries.clone().collect::<Vec<_>>());
    index.save().unwrap();
    // The settler may save at any time.
    let amid = entries.inspect(|_| {
        index.save().unwrap();
        assert!(index.may_have_dangling());
    });
    index.take_out(amid).unwrap();
    assert!(!index.may_have_dangling());
    assert_eq!(index.entries(Tree::Regions).count(), 0);
}

#[test]
fn look_ups_go_on_while_the_database_is_written_anew() {
    let dir = tempfile::tempdir().unwrap();
    let index = Index::open_with(&name(&dir.path().join("index")), STORE, SMALL).unwrap();
    let hash = |number: u32| Hash::of(&number.to_le_bytes());
    let known = std::sync::atomic::AtomicU32::new(0);
    let order = std::sync::atomic::Ordering::SeqCst;
    std::thread::scope(|scope| {
        let readers: Vec<_> = (0..3u32)
            .map(|reader| {
                let (index, known) = (&index, &known);
                scope.spawn(move || {
                    let mut at = reader;
                    while known.load(order) < 3000 {
                        let count = known.load(order);
                        if reader == 0 {
                            let found = index.entries(Tree::Regions).map(Result::unwrap).count();
                            assert!(found >= count as usize, "{found} of {count}");
                        } else if count > 0 {
                            at = at.wrapping_mul(0x9E37_79B9).wrapping_add(1);
                            let number = at % count;
                            let found = index.get(Tree::Regions, &hash(number)).unwrap();
                            assert_eq!(found, Some(location(1 + number)));
                        }
                    }
                })
            })
            .collect();
        for number in 0..3000 {
            index.insert(&[(Tree::Regions, hash(number), location(1 + number))]);
            known.store(number + 1, order);
            index.save_if_much().unwrap();
        }
        readers.into_iter().for_each(|reader| reader.join().unwrap());
    });
    assert!(index.read().bucket_entries() > 1000, "it was rewritten");
}

#[test]
fn what_changes_while_the_database_is_written_anew_stays_changed() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("index");
    let index = Index::open_with(&name(&path), STORE, SMALL).unwrap();
    let hash = |number: u8| Hash::of(&[number]);
    let entries: Vec<_> = (0..200).map(|number| (Tree::Regions, hash(number), location(1))).collect();
    index.insert(&entries);
    let mut step = 0;
    index
        .rewrite(|tree, found, at| {
            step += 1;
            if step == 100 {
                for number in 0..50 {
                    index.replace(tree, &hash(number), location(1), None).unwrap();
                    index.replace(tree, &hash(50 + number), location(1), Some(location(2))).unwrap();
                }
                index.insert(&[(tree, hash(201), location(3))]);
                index.set_snapshot(vec![1], Some(vec![2]));
                index.set_watermark(5, Some(watermark(6)));
            }
            (*found != hash(150)).then_some(at)
        })
        .unwrap();
    let check = |index: &Index| {
        let found = all(index, Tree::Regions);
        assert_eq!(found.len(), 150);
        assert_eq!(found.values().filter(|at| **at == location(2)).count(), 50);
        assert_eq!(found.get(&hash(201)), Some(&location(3)));
        assert!(!found.contains_key(&hash(150)));
        assert_eq!(index.snapshots().unwrap(), BTreeMap::from([(vec![1], vec![2])]));
        assert_eq!(index.watermarks(), BTreeMap::from([(5, watermark(6))]));
    };
    check(&index);
    index.close().unwrap();
    drop(index);
    check(&Index::open_with(&name(&path), STORE, SMALL).unwrap());
}

#[test]
fn a_new_database_that_was_not_finished_is_removed() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("index");
    let index = Index::open(&name(&path), STORE).unwrap();
    index.insert(&[(Tree::Objects, Hash::of(b"x"), location(1))]);
    index.save().unwrap();
    drop(index);
    let unfinished = path.with_extension(UNFINISHED);
    drop(Database::open(&name(&unfinished), STORE).unwrap());
    let index = Index::open(&name(&path), STORE).unwrap();
    assert_eq!(index.get(Tree::Objects, &Hash::of(b"x")).unwrap(), Some(location(1)));
    assert!(!unfinished.exists());
}

#[test]
fn an_entry_of_a_large_index_takes_less_than_50_bytes_of_disk() {
    let dir = tempfile::tempdir().unwrap();
    let index = Index::open(&name(&dir.path().join("index")), STORE).unwrap();
    let count = 200_000u32;
    let entry = |number: u32| {
        let location = Location { offset_bytes: u64::from(number) * 3000, ..location(1) };
        (Tree::Regions, Hash::of(&number.to_le_bytes()), location)
    };
    index.insert(&(0..count).map(entry).collect::<Vec<_>>());
    index.save_if_much().unwrap();
    assert_eq!(index.read().bucket_entries(), u64::from(count));
    let bytes = index.disk_bytes();
    assert!(bytes < 50 * u64::from(count), "{bytes} bytes");
}

#[test]
fn an_index_of_another_store_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    drop(Index::open(&name(dir.path()), STORE).unwrap());
    assert!(Index::open(&name(dir.path()), StoreId::new()).is_err());
}
