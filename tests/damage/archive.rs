//! The store of the damage table: chains of deltas, a forgotten snapshot with its tombstone,
//! labels, an attachment, a pack that gc wrote and one after it, and earlier versions of its files.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use stillframe::source::Attachment;
use stillframe::store::{ObjectKind, REGIONS_PER_TABLE};
use stillframe::{CaptureOptions, Error, GcOptions, Hash, RegionSize, SnapshotId, Store};

use crate::noise::noise;
use crate::vault::{REGION_BYTES, copy, files_in, verify};

const DELTA: u8 = 3;

/// The process of a snapshot: `line` has eight snapshots, each a difference from earlier ones;
/// `other` has one; and `gone` has one, which is forgotten while its record is still in a pack.
fn process(name: &str) -> &str {
    if name.starts_with('v') { "line" } else { name }
}

/// The same two regions change in each snapshot of `line`; the others stay.
pub(crate) fn memory(name: &str) -> Vec<u8> {
    match name {
        "other" => {
            [noise(3 * REGION_BYTES, 21), vec![0; 600 * REGION_BYTES], noise(2 * REGION_BYTES, 22)].concat()
        }
        "gone" => noise(2 * REGION_BYTES + 9, 23),
        moment => {
            let number: u8 = moment[1..].parse().unwrap();
            let mut memory = noise(10 * REGION_BYTES, 20);
            for at in [REGION_BYTES + 100, 5 * REGION_BYTES + 2000] {
                memory[at..at + 8].copy_from_slice(&[number; 8]);
            }
            memory
        }
    }
}

fn options(name: &str) -> CaptureOptions {
    let is_other = name == "other";
    let globals = Attachment { name: "globals".to_owned(), bytes: noise(400, 24) };
    CaptureOptions::new()
        .attachments(is_other.then_some(globals))
        .labels(is_other.then(|| ("why".to_owned(), "table".to_owned())))
}

pub(crate) fn capture(store: &Store, name: &str) -> SnapshotId {
    store.process(process(name)).capture(&memory(name), &options(name)).unwrap().id
}

/// The position of an object in a pack.
#[derive(Clone, Debug)]
pub(crate) struct Object {
    pub(crate) pack: usize,
    pub(crate) kind: u8,
    pub(crate) hash: Hash,
    /// For a note or tombstone: the snapshot that it refers to.
    pub(crate) about: Option<Hash>,
    /// For a delta: the hash of its base.
    base: Option<Hash>,
    pub(crate) start: usize,
    pub(crate) payload: usize,
    pub(crate) payload_end: usize,
    pub(crate) end: usize,
}

impl Object {
    fn key(&self) -> (bool, Hash) {
        (self.kind == ObjectKind::Region as u8, self.hash)
    }
}

pub(crate) struct Archive {
    _dir: tempfile::TempDir,
    pub(crate) path: PathBuf,
    pub(crate) ids: BTreeMap<&'static str, SnapshotId>,
    pub(crate) objects: Vec<Object>,
    /// The objects that each snapshot needs besides its record, including bases.
    needs: HashMap<&'static str, BTreeSet<(bool, Hash)>>,
    /// Earlier versions of the last pack and of the index.
    pub(crate) earlier_pack: Vec<u8>,
    pub(crate) earlier_index: PathBuf,
}

impl Archive {
    pub(crate) fn copy() -> Archive {
        static MADE: OnceLock<Archive> = OnceLock::new();
        let made = MADE.get_or_init(Archive::make);
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("store");
        copy(&made.path, &path);
        Archive {
            _dir: dir,
            path,
            ids: made.ids.clone(),
            objects: made.objects.clone(),
            needs: made.needs.clone(),
            earlier_pack: made.earlier_pack.clone(),
            earlier_index: made.earlier_index.clone(),
        }
    }

    fn make() -> Archive {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("store");
        let region_size = RegionSize::new(REGION_BYTES as u32).unwrap();
        let store = Store::options().region_size(region_size).create(&path).unwrap();
        let mut ids = BTreeMap::new();
        // Garbage for gc to remove, so that every whole object moves into a pack that gc writes.
        let taken =
            store.process("taken").capture(&noise(60_000, 25), &CaptureOptions::default()).unwrap().id;
        for name in ["v0", "v1", "v2", "other"] {
            ids.insert(name, capture(&store, name));
        }
        store.forget(&[taken]).unwrap();
        store.gc(&GcOptions::new().max_unused_percent(0)).unwrap();
        let earlier_index = dir.path().join("earlier-index");
        for name in ["v3", "v4", "gone"] {
            ids.insert(name, capture(&store, name));
        }
        drop(store);
        copy(&path.join("index"), &earlier_index);
        let earlier_pack = std::fs::read(files_in(&path.join("packs")).pop().unwrap()).unwrap();
        let store = Store::open(&path).unwrap();
        store.forget(&[ids["gone"]]).unwrap();
        for name in ["v5", "v6", "v7"] {
            ids.insert(name, capture(&store, name));
        }
        // The last object is a note about a snapshot in the pack before.
        store.set_label(ids["v0"], "first", "yes").unwrap();
        let objects = objects(&path);
        let bases: HashMap<_, _> = objects
            .iter()
            .filter_map(|object| {
                Some((object.key(), (object.kind == ObjectKind::Region as u8, object.base?)))
            })
            .collect();
        let mut needs: HashMap<&'static str, BTreeSet<(bool, Hash)>> = HashMap::new();
        for (name, id) in ids.iter().filter(|(name, _)| **name != "gone") {
            let snapshot = store.snapshot(*id).unwrap();
            let record = snapshot.record();
            let need = needs.entry(*name).or_default();
            let mut add = |is_region, hash: Hash| {
                let mut next = Some((is_region, hash)).filter(|_| !hash.is_zero());
                while let Some(key) = next.filter(|key| need.insert(*key)) {
                    next = bases.get(&key).copied();
                }
            };
            add(false, record.layout);
            add(false, record.root);
            record.attachments.iter().for_each(|attachment| add(false, attachment.hash));
            let regions: Vec<Hash> = snapshot.regions().unwrap().map(|region| region.unwrap().1).collect();
            for table in regions.chunks(REGIONS_PER_TABLE) {
                let is_zero = table.iter().all(Hash::is_zero);
                let bytes: Vec<u8> = table.iter().flat_map(|hash| hash.0).collect();
                add(false, if is_zero { Hash::ZERO } else { Hash::of(&bytes) });
                table.iter().for_each(|hash| add(true, *hash));
            }
        }
        drop(store);
        // So few entries are not saved when the index is closed, but they are when it is rebuilt.
        std::fs::remove_dir_all(path.join("index")).unwrap();
        drop(Store::open(&path).unwrap());
        assert_eq!(files_in(&path.join("packs")).len(), 2);
        Archive { _dir: dir, path, ids, objects, needs, earlier_pack, earlier_index }
    }

    pub(crate) fn pack(&self, at: usize) -> PathBuf {
        files_in(&self.path.join("packs"))[at].clone()
    }

    pub(crate) fn index(&self) -> PathBuf {
        self.path.join("index")
    }

    pub(crate) fn lose_the_index(&self) {
        std::fs::remove_dir_all(self.index()).unwrap();
    }

    /// Whether this object says that the forgotten snapshot is forgotten.
    pub(crate) fn forgets(&self, object: &Object) -> bool {
        object.kind == ObjectKind::Tombstone as u8 && object.about == Some(self.ids["gone"].0)
    }

    /// The object of this kind that most snapshots need; for the other kinds the last record, the
    /// last note or the tombstone.
    pub(crate) fn object(&self, kind: ObjectKind) -> Object {
        let is_it = |object: &&Object| match kind {
            ObjectKind::Tombstone => self.forgets(object),
            _ => object.kind == kind as u8,
        };
        let of_kind = self.objects.iter().filter(is_it);
        of_kind.max_by_key(|object| (self.needed_by(object).len(), object.base.is_none())).unwrap().clone()
    }

    /// A delta that is itself a base.
    pub(crate) fn middle_of_a_chain(&self) -> Object {
        let is_base = |object: &&Object| self.objects.iter().any(|other| other.base == Some(object.hash));
        let deltas = self.objects.iter().filter(|object| object.base.is_some() && object.kind == 1);
        deltas.filter(is_base).max_by_key(|object| self.needed_by(object).len()).unwrap().clone()
    }

    /// The snapshots that need an object of any kind.
    fn needed_by(&self, object: &Object) -> BTreeSet<&'static str> {
        let names = self.ids.keys().copied();
        names.filter(|name| self.needs.get(name).is_some_and(|need| need.contains(&object.key()))).collect()
    }

    /// The snapshots that cannot be restored without these objects.
    pub(crate) fn cannot_do_without(&self, lost: &[Object]) -> BTreeSet<&'static str> {
        lost.iter().flat_map(|object| self.needed_by(object)).collect()
    }

    /// The snapshots whose records are among these.
    pub(crate) fn records_in(&self, lost: &[Object]) -> BTreeSet<&'static str> {
        let is_in = |id: &SnapshotId| lost.iter().any(|object| object.hash == id.0);
        self.ids.iter().filter(|(_, id)| is_in(id)).map(|(name, _)| *name).collect()
    }

    pub(crate) fn name(&self, id: SnapshotId) -> &'static str {
        self.ids.iter().find(|(_, known)| **known == id).map_or("unknown", |(name, _)| *name)
    }

    /// Asserts that everything is there and sound, as if there had been no damage.
    pub(crate) fn assert_sound(&self, store: &Store) {
        for (name, id) in &self.ids {
            match *name {
                "gone" => assert!(store.snapshot(*id).is_err(), "it stays forgotten"),
                name => assert!(read(store, *id).unwrap() == memory(name), "{name}"),
            }
        }
        assert_eq!(verify(store).problems, []);
    }
}

pub(crate) fn read(store: &Store, id: SnapshotId) -> Result<Vec<u8>, Error> {
    store.snapshot(id)?.attachment("globals")?;
    Ok(store.restore(id)?.into_mapping()?.to_vec())
}

/// All objects of all packs, in order. The list of packs that a pack replaces lies after the 64
/// bytes of its header.
fn objects(store: &Path) -> Vec<Object> {
    let mut objects = Vec::new();
    for (pack, path) in files_in(&store.join("packs")).into_iter().enumerate() {
        let bytes = std::fs::read(path).unwrap();
        let u32_at = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap()) as usize;
        let mut start = (64 + 4 * u32_at(52)).next_multiple_of(8);
        while start < bytes.len() {
            let payload = start + 48;
            let payload_end = payload + u32_at(start + 8);
            let base =
                (bytes[start + 1] == DELTA).then(|| Hash(bytes[payload..payload + 32].try_into().unwrap()));
            let hash = Hash(bytes[start + 16..payload].try_into().unwrap());
            let end = payload_end.next_multiple_of(8);
            // These are stored raw: the version of the value comes first, then the id.
            let is_about = [ObjectKind::Note as u8, ObjectKind::Tombstone as u8].contains(&bytes[start]);
            let about = is_about.then(|| Hash(bytes[payload + 1..payload + 33].try_into().unwrap()));
            objects.push(Object {
                pack,
                kind: bytes[start],
                hash,
                about,
                base,
                start,
                payload,
                payload_end,
                end,
            });
            start = end;
        }
    }
    objects
}
