//! The store under test, and what the tests know about it. It is made once and copied for each
//! case.

pub(crate) use crate::folder::copy;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use stillframe::source::Attachment;
use stillframe::store::{ObjectKind, REGIONS_PER_TABLE, StoreError};
use stillframe::verify::{VerifyOptions, VerifyReport};
use stillframe::{CaptureOptions, Error, Hash, RegionSize, SnapshotId, Store};

use crate::noise::noise;

pub(crate) const REGION_BYTES: usize = 4096;
const TABLE_BYTES: usize = REGIONS_PER_TABLE * REGION_BYTES;

/// What the tests know about the snapshots: name, process, memory.
pub(crate) const NAMES: [&str; 4] = ["a1", "a2", "b1", "c1"];

pub(crate) fn process(name: &str) -> &str {
    &name[..1]
}

/// `a` has two tables, and both its snapshots share the second one; `b` has regions of the first.
pub(crate) fn memory(name: &str) -> Vec<u8> {
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

pub(crate) fn options(name: &str) -> CaptureOptions {
    let globals = Attachment { name: "globals".to_owned(), bytes: noise(300, 5) };
    let with_more = name == "c1";
    CaptureOptions::new()
        .attachments(with_more.then_some(globals))
        .labels(with_more.then(|| ("why".to_owned(), "tests".to_owned())))
        // Each object is stored whole here; `deltas.rs` tests differences.
        .deltas(false)
}

pub(crate) fn capture(store: &Store, name: &str) -> SnapshotId {
    store.process(process(name)).capture(&memory(name), &options(name)).unwrap().id
}

/// Captures the memory of these snapshots again.
pub(crate) fn heal(store: &Store, names: &[&str]) {
    for name in names {
        capture(store, name);
    }
}

/// A store in a temporary directory.
pub(crate) struct Vault {
    pub(crate) _dir: tempfile::TempDir,
    pub(crate) path: PathBuf,
    pub(crate) ids: BTreeMap<&'static str, SnapshotId>,
    pub(crate) forgotten: SnapshotId,
    /// The snapshots that need each object.
    pub(crate) needs: HashMap<(ObjectKind, Hash), BTreeSet<&'static str>>,
}

impl Vault {
    /// A copy of the store that was made once.
    pub(crate) fn copy() -> Vault {
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
        // Without this, the object under test could be at the end of the pack, where zeros look
        // like a torn tail.
        store.set_label(ids["a1"], "last", "yes").unwrap();
        let mut needs: HashMap<_, BTreeSet<_>> = HashMap::new();
        for (name, id) in &ids {
            let snapshot = store.snapshot(*id).unwrap();
            let record = snapshot.record();
            let mut need = |kind, hash| {
                needs.entry((kind, hash)).or_default().insert(*name);
            };
            need(ObjectKind::Record, id.0);
            need(ObjectKind::Layout, record.layout);
            need(ObjectKind::Root, record.root);
            record.attachments.iter().for_each(|attachment| need(ObjectKind::Attachment, attachment.hash));
            let regions: Vec<Hash> = snapshot.regions().unwrap().map(|region| region.unwrap().1).collect();
            for table in regions.chunks(REGIONS_PER_TABLE) {
                let bytes: Vec<u8> = table.iter().flat_map(|hash| hash.0).collect();
                need(ObjectKind::Table, Hash::of(&bytes));
                table.iter().filter(|hash| !hash.is_zero()).for_each(|hash| need(ObjectKind::Region, *hash));
            }
        }
        drop(store);
        let made = Vault { _dir: dir, path, ids, forgotten, needs };
        // So few entries are not saved when the index is closed, but they are when it is rebuilt.
        made.lose_the_index();
        drop(made.open());
        made
    }

    pub(crate) fn pack(&self) -> PathBuf {
        self.path.join("packs/00000001.pack")
    }

    pub(crate) fn open(&self) -> Store {
        Store::open(&self.path).unwrap()
    }

    pub(crate) fn lose_the_index(&self) {
        std::fs::remove_dir_all(self.path.join("index")).unwrap();
    }

    /// The only object of this kind that exactly these snapshots need.
    pub(crate) fn object(&self, kind: ObjectKind, needed_by: &[&str]) -> Object {
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

    pub(crate) fn change_pack(&self, change: impl FnOnce(&mut Vec<u8>)) {
        let mut bytes = std::fs::read(self.pack()).unwrap();
        change(&mut bytes);
        std::fs::write(self.pack(), bytes).unwrap();
    }

    /// Asserts that all snapshots are unchanged, except those in `lost`: they fail as damaged, with
    /// an error that contains `says`.
    pub(crate) fn assert_lost(&self, store: &Store, lost: &[&str], says: &str) {
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

    pub(crate) fn assert_whole(&self, store: &Store) {
        self.assert_lost(store, &[], "");
    }

    pub(crate) fn names(&self, ids: impl IntoIterator<Item = SnapshotId>) -> Vec<&'static str> {
        let ids: BTreeSet<SnapshotId> = ids.into_iter().collect();
        let named =
            |id| self.ids.iter().find(|(_, known)| **known == id).map_or("unknown", |(name, _)| *name);
        let mut names: Vec<_> = ids.into_iter().map(named).collect();
        names.sort_unstable();
        names
    }

    /// The snapshots that a report names.
    pub(crate) fn named(&self, report: &VerifyReport) -> Vec<&'static str> {
        self.names(report.problems.iter().flat_map(|problem| &problem.snapshots).copied())
    }
}

pub(crate) fn globals(name: &str) -> Option<Vec<u8>> {
    options(name).attachments.first().map(|attachment| attachment.bytes.clone())
}

/// The memory and the attachment of a snapshot.
pub(crate) fn read(store: &Store, id: SnapshotId) -> Result<(Vec<u8>, Option<Vec<u8>>), Error> {
    let globals = store.snapshot(id)?.attachment("globals")?;
    let restore = store.restore(id)?;
    let mut image = vec![0xEE; restore.image_bytes() as usize];
    restore.into_slice(&mut image)?;
    Ok((image, globals))
}

pub(crate) fn verify(store: &Store) -> VerifyReport {
    store.verify(&VerifyOptions::default()).unwrap()
}

pub(crate) fn is_unknown(store: &Store, id: SnapshotId) -> bool {
    matches!(store.restore(id).err(), Some(Error::Store(StoreError::NoSuchSnapshot { .. })))
}

pub(crate) fn files_in(dir: &Path) -> Vec<PathBuf> {
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
pub(crate) struct Object {
    pub(crate) kind: u8,
    pub(crate) hash: Hash,
    pub(crate) start: usize,
    pub(crate) payload: usize,
    pub(crate) payload_end: usize,
    pub(crate) end: usize,
}

pub(crate) const PACK_HEADER_BYTES: usize = 64;

/// The objects of a pack that replaces no other.
pub(crate) fn objects(pack: &[u8]) -> Vec<Object> {
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

/// Changes the bytes of a file.
pub(crate) fn change(file: &Path, change: impl FnOnce(&mut Vec<u8>)) {
    let mut bytes = std::fs::read(file).unwrap();
    change(&mut bytes);
    std::fs::write(file, bytes).unwrap();
}
