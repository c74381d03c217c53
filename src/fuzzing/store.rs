//! Opens and uses a store with a well-formed pack to which some changes were made.

use std::fs;
use std::path::Path;

use jiff::Timestamp;

use super::{PACK, STORE};
use crate::address_space::{AddressSpace, Mapping};
use crate::capture::CaptureOptions;
use crate::codec::{self, Codec, Encoding};
use crate::delta::{self, Base};
use crate::gc::GcOptions;
use crate::hash::Hash;
use crate::record::{self, AttachmentRef, Note, Origin, Record, SnapshotId, Tombstone, Trigger};
use crate::repair::RepairOptions;
use crate::store::Store;
use crate::store::format::{FORMAT_VERSION, Format};
use crate::store::id::PackId;
use crate::store::names::PACKS_DIR;
use crate::store::packs::header::PackHeader;
use crate::store::packs::names;
use crate::store::packs::object::{self, HEADER_BYTES, ObjectKind, Place};
use crate::table;
use crate::units::{AddressRange, RegionSize};
use crate::verify::VerifyOptions;

const REGION_BYTES: usize = RegionSize::MIN_BYTES as usize;

/// Images that claim to be longer are not restored: that would only cost memory and time.
const MAX_IMAGE_BYTES: u64 = 64 << 20;

/// A store whose pack has been changed. It is opened, read, verified, captured into, collected and
/// repaired, and the captures made meanwhile are intact afterwards.
///
/// The data is a list of *changes*; each overwrites bytes with others:
///
/// ```text
///  0        1       2        4        5
///  +--------+-------+--------+--------+-------+
///  | object | stage | at     | count  | bytes |
///  |  u8    |  u8   | u16    |  u8    |       |
///  +--------+-------+--------+--------+-------+
/// ```
///
/// The stage says when the change is made: before the object is hashed and encoded, so that all
/// references to it agree with it; to its payload, or to its header, before the checksums are
/// computed; or to the finished pack, where `at` counts from the object's start. `dir` is an empty
/// working directory.
pub fn store(data: &[u8], dir: &Path) {
    let path = dir.join("store");
    write_store(&path, data);
    // If the hashed bytes were changed, nothing is damaged: the pack is forged but consistent.
    let is_forged = changes(data).iter().any(|change| change.stage == Stage::Plain);
    use_it(&path, is_forged);
    assert!(fs::remove_dir_all(&path).is_ok());
}

fn write_store(path: &Path, data: &[u8]) {
    let format = Format { version: FORMAT_VERSION, region_size: region_size(), codec: Codec::Lz4, id: STORE };
    let written = fs::create_dir_all(path.join(PACKS_DIR))
        .and_then(|()| fs::write(path.join("FORMAT"), format.text()))
        .and_then(|()| {
            fs::write(
                path.join(PACKS_DIR).join(names::file_name(PACK)),
                changed_pack(&format, &changes(data)),
            )
        });
    assert!(written.is_ok(), "{written:?}");
}

fn region_size() -> RegionSize {
    RegionSize::new(RegionSize::MIN_BYTES).unwrap_or_default()
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Plain,
    Payload,
    Header,
    Pack,
}

struct Change<'a> {
    object: usize,
    stage: Stage,
    at: usize,
    bytes: &'a [u8],
}

fn changes(mut data: &[u8]) -> Vec<Change<'_>> {
    let mut changes = Vec::new();
    while let Some(([object, stage, low, high, count], rest)) = data.split_first_chunk() {
        let (bytes, rest) = rest.split_at(usize::from(*count).min(rest.len()));
        let stage = [Stage::Plain, Stage::Payload, Stage::Header, Stage::Pack][usize::from(stage % 4)];
        changes.push(Change {
            object: usize::from(*object),
            stage,
            at: usize::from(u16::from_le_bytes([*low, *high])),
            bytes,
        });
        data = rest;
    }
    changes
}

/// A pack under construction.
struct Builder<'a> {
    bytes: Vec<u8>,
    starts: Vec<usize>,
    changes: &'a [Change<'a>],
}

impl Builder<'_> {
    /// Applies the changes of one stage to the next object.
    fn change(&self, stage: Stage, bytes: &mut [u8]) {
        for change in self.changes.iter().filter(|it| it.stage == stage && it.object == self.starts.len()) {
            write_over(bytes, change.at, change.bytes);
        }
    }

    /// Appends an object, encoded by a codec or as the difference from a base. Returns its plain
    /// bytes and hash.
    fn put(
        &mut self,
        kind: ObjectKind,
        codec: Codec,
        base: Option<(&[u8], Hash)>,
        plain: &[u8],
    ) -> (Vec<u8>, Hash) {
        let mut plain = plain.to_vec();
        self.change(Stage::Plain, &mut plain);
        let hash = Hash::of(&plain);
        let mut payload = Vec::new();
        let base = base.map(|(plain, hash)| Base { hash, plain, whole_bytes: 0, number: 1 });
        let encoding = match base {
            Some(base) if delta::encode(base, &plain, plain.len(), &mut payload) => Encoding::Delta,
            _ => codec::encode(codec, &plain, &mut payload),
        };
        self.change(Stage::Payload, &mut payload);
        let start = self.bytes.len();
        object::write_encoded(kind, encoding, hash, plain.len(), &payload, &mut self.bytes);
        let (header, _) = self.bytes[start..].split_at(HEADER_BYTES);
        let mut header = header.to_vec();
        self.change(Stage::Header, &mut header);
        let object = &mut self.bytes[start..];
        object[..HEADER_BYTES].copy_from_slice(&header);
        object::write_checks(object);
        object::put(object, Place::new(STORE, PACK, start as u64));
        self.starts.push(start);
        (plain, hash)
    }

    fn value<T: serde::Serialize>(&mut self, kind: ObjectKind, value: &T) -> Hash {
        let Ok(bytes) = record::encode(value) else { panic!("what is well-formed can be encoded") };
        self.put(kind, Codec::Zstd, None, &bytes).1
    }
}

fn write_over(bytes: &mut [u8], at: usize, with: &[u8]) {
    bytes.iter_mut().skip(at).zip(with).for_each(|(byte, with)| *byte = *with);
}

/// Two snapshots of one process, the second with deltas, a third that is forgotten, and labels.
fn changed_pack(format: &Format, changes: &[Change<'_>]) -> Vec<u8> {
    let mut pack = Builder {
        bytes: PackHeader::new(format, PACK, PackId([9; 16]), Vec::new()).to_bytes(),
        starts: Vec::new(),
        changes,
    };
    let region = |seed: u32| -> Vec<u8> {
        (0..RegionSize::MIN_BYTES).flat_map(|at| (at / 16 * seed).to_le_bytes()).take(REGION_BYTES).collect()
    };
    let first = pack.put(ObjectKind::Region, Codec::Lz4, None, &region(3));
    let second = pack.put(ObjectKind::Region, Codec::Zstd, None, &region(5));
    let third = pack.put(ObjectKind::Region, Codec::None, None, &region(1 << 20 | 7));
    let regions = [first.1, Hash::ZERO, second.1, third.1];
    let table = pack.put(ObjectKind::Table, Codec::Lz4, None, &table::encode(&regions));
    let root = pack.put(ObjectKind::Root, Codec::Lz4, None, &table::encode(&[table.1, Hash::ZERO]));
    let image = AddressSpace::image("a", 4 * REGION_BYTES as u64).mappings().first().cloned();
    let mappings = [(0x1000, 4 * REGION_BYTES), (0x9000, 700)].map(|(start, length)| {
        let range = AddressRange::with_length(start, length as u64).ok()?;
        image.clone().map(|image| Mapping { range, ..image })
    });
    let Ok(space) = AddressSpace::new(mappings.into_iter().flatten().collect()) else {
        panic!("well-formed")
    };
    let layout = pack.value(ObjectKind::Layout, &space);
    let (_, attachment) = pack.put(ObjectKind::Attachment, Codec::Lz4, None, b"kept beside the memory");
    let second_of = |seconds: i64| Timestamp::from_second(1_790_000_000 + seconds).unwrap_or_default();
    let record = Record {
        process: "p".to_owned(),
        parent: None,
        time: second_of(0),
        trigger: Trigger::Explicit,
        origin: Origin::Bytes,
        region_size: format.region_size,
        memory_bytes: 4 * REGION_BYTES as u64 + 700,
        zero_bytes: REGION_BYTES as u64 + 700,
        regions: 6,
        attachments: vec![AttachmentRef { name: "x".to_owned(), hash: attachment, length_bytes: 22 }],
        layout,
        root: root.1,
    };
    let parent = SnapshotId(pack.value(ObjectKind::Record, &record));
    let mut changed = first.0.clone();
    changed[100] ^= 1;
    let changed = pack.put(ObjectKind::Region, Codec::Lz4, Some((&first.0, first.1)), &changed);
    let regions = [changed.1, Hash::ZERO, second.1, third.1];
    let next_table =
        pack.put(ObjectKind::Table, Codec::Lz4, Some((&table.0, table.1)), &table::encode(&regions));
    let next_root = pack.put(
        ObjectKind::Root,
        Codec::Lz4,
        Some((&root.0, root.1)),
        &table::encode(&[next_table.1, Hash::ZERO]),
    );
    let next = Record { parent: Some(parent), time: second_of(1), root: next_root.1, ..record.clone() };
    let next = SnapshotId(pack.value(ObjectKind::Record, &next));
    let forgotten = Record { process: "q".to_owned(), time: second_of(2), ..record };
    let forgotten = SnapshotId(pack.value(ObjectKind::Record, &forgotten));
    let labels = [("key".to_owned(), "value".to_owned())].into();
    pack.value(ObjectKind::Note, &Note { snapshot: next, time: second_of(3), labels });
    pack.value(ObjectKind::Tombstone, &Tombstone { snapshot: forgotten, time: second_of(4) });
    let Builder { mut bytes, starts, .. } = pack;
    for change in changes.iter().filter(|change| change.stage == Stage::Pack) {
        // An index past the last object stands for the start of the pack: its header.
        let start = starts.get(change.object).copied().unwrap_or(0);
        match change.bytes {
            // Without bytes, the change truncates the pack there.
            [] => bytes.truncate(start + change.at),
            with => write_over(&mut bytes, start + change.at, with),
        }
    }
    bytes
}

fn use_it(path: &Path, is_forged: bool) {
    let memory: Vec<u8> = (0..3000u32).flat_map(|at| (at / 7).to_le_bytes()).collect();
    let id = {
        let Ok(store) = Store::open(path) else { panic!("a damaged pack keeps no store from being opened") };
        read(&store, is_forged);
        let _ = store.stats();
        // A process name without earlier snapshots in the store.
        let Ok(taken) = store.process("new").capture(&memory, &CaptureOptions::default()) else {
            panic!("a damaged pack keeps nobody from capturing")
        };
        // And the process whose snapshots may hold anything.
        let _ = store.process("p").capture(&memory, &CaptureOptions::default());
        is_there(&store, taken.id, &memory);
        let _ = store.gc(&GcOptions::default());
        is_there(&store, taken.id, &memory);
        taken.id
    };
    let Ok(store) = Store::open(path) else { panic!("it opens once more") };
    is_there(&store, id, &memory);
    read(&store, is_forged);
    drop(store);
    let _ = Store::repair(path, &RepairOptions::default());
    let Ok(store) = Store::open(path) else { panic!("it opens after a repair") };
    is_there(&store, id, &memory);
    read(&store, is_forged);
}

fn is_there(store: &Store, id: SnapshotId, memory: &[u8]) {
    let mut back = vec![0xAA; memory.len()];
    let restored = store.restore(id).and_then(|restore| restore.into_slice(&mut back));
    assert!(restored.is_ok(), "{restored:?}");
    assert!(back == memory, "what was captured is restored");
}

/// Reads everything that exists of all snapshots. Nothing may go wrong except by an error; readable
/// memory has the length that its snapshot records; and `verify` names every snapshot that cannot
/// be restored because of damage.
fn read(store: &Store, is_forged: bool) {
    let verified = store.verify(&VerifyOptions::default());
    let Ok(report) = verified else { panic!("{verified:?}") };
    for snapshot in store.snapshots() {
        let _ = snapshot.attachment("x");
        if let Ok(regions) = snapshot.regions() {
            regions.take(10_000).for_each(drop);
        }
        let restored = store.restore(snapshot.id()).and_then(|restore| {
            let image_bytes = restore.image_bytes();
            if image_bytes > MAX_IMAGE_BYTES {
                return Ok(());
            }
            let mut image = Vec::new();
            let read_bytes = snapshot.read_image(&mut image)?;
            assert_eq!((read_bytes, image.len() as u64), (image_bytes, image_bytes));
            let mut restored = vec![0xAA; image.len()];
            restore.into_slice(&mut restored)?;
            assert!(image == restored, "both ways lead to the same");
            Ok(())
        });
        let named = report.problems.iter().any(|problem| problem.snapshots.contains(&snapshot.id()));
        assert!(
            restored.is_ok() || named || is_forged,
            "{restored:?}, of which verify says nothing: {report:?}"
        );
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::store::read::{Check, Reader};

    /// Otherwise the target would exercise only damage.
    #[test]
    fn a_pack_without_changes_is_a_store_in_order() {
        let dir = tempfile::tempdir().unwrap();
        write_store(dir.path(), &[]);
        let store = Store::open(dir.path()).unwrap();
        let report = store.verify(&VerifyOptions::default()).unwrap();
        assert_eq!((report.checked_objects, report.problems), (15, vec![]));
        assert_eq!(store.stats().unwrap().deltas, 1);
        let images = store.snapshots().into_iter().map(|snapshot| {
            let mut image = Vec::new();
            snapshot.read_image(&mut image).unwrap();
            (image.len(), snapshot.attachment("x").unwrap().unwrap().len(), snapshot.labels().len())
        });
        assert_eq!(images.collect::<Vec<_>>(), [(2748, 22, 0), (2748, 22, 1)]);
    }

    /// The pack is forged: each object is well-formed, but they do not fit each other.
    #[test]
    fn tables_that_do_not_fit_their_layout_are_named_by_verify() {
        let dir = tempfile::tempdir().unwrap();
        // The first mapping of the layout begins so much lower that it has more regions.
        write_store(dir.path(), &[5, 0, 4, 0, 1, 7]);
        let store = Store::open(dir.path()).unwrap();
        let mut ids: Vec<SnapshotId> = store.snapshots().iter().map(|snapshot| snapshot.id()).collect();
        for id in &ids {
            assert!(store.restore(*id).unwrap().into_mapping().is_err());
        }
        for snapshots in [vec![], ids.clone()] {
            let report = store.verify(&VerifyOptions::new().snapshots(snapshots)).unwrap();
            let mut named: Vec<SnapshotId> =
                report.problems.iter().flat_map(|problem| problem.snapshots.clone()).collect();
            named.sort();
            ids.sort();
            assert_eq!(named, ids, "{report:?}");
            assert!(report.problems.iter().all(|it| it.kind == "table" && it.detail.contains("expected")));
        }
    }

    /// The base of a table is damaged in bytes that its delta overwrites. So the delta can be read
    /// until `verify` removes the base from the index.
    #[test]
    fn verify_names_what_lacks_a_base_that_it_has_taken_out() {
        let dir = tempfile::tempdir().unwrap();
        write_store(dir.path(), &[3, 1, 2, 0, 1, 7]);
        let store = Store::open(dir.path()).unwrap();
        let restores = |id| store.restore(id).unwrap().into_mapping().is_ok();
        let ids: Vec<SnapshotId> = store.snapshots().iter().map(|snapshot| snapshot.id()).collect();
        assert_eq!(ids.iter().filter(|id| restores(**id)).count(), 1);
        let report = store.verify(&VerifyOptions::default()).unwrap();
        let named = |id: &SnapshotId| report.problems.iter().any(|problem| problem.snapshots.contains(id));
        for id in &ids {
            assert_eq!(restores(*id), !named(id), "{report:?}");
        }
        assert_eq!(ids.iter().filter(|id| named(id)).count(), 2);
    }

    /// Only the layout has hostile lengths; its tables are all zeros, which take no storage.
    #[test]
    fn a_layout_of_zeros_without_end_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        write_store(dir.path(), &[]);
        let store = Store::open(dir.path()).unwrap();
        let mut reader = Reader::new(store.shared(), Check::Full);
        assert_eq!(reader.root(&Hash::ZERO, 8 << 20).unwrap().tables(), 8 << 20);
        let error = reader.root(&Hash::ZERO, 1 << 45).unwrap_err();
        assert!(error.to_string().contains("never more than"), "{error}");
    }

    /// The bytes that the fuzzer writes into a plain region are restored.
    #[test]
    fn a_change_before_the_hash_leaves_all_in_order() {
        let dir = tempfile::tempdir().unwrap();
        write_store(dir.path(), &[0, 0, 2, 0, 3, 9, 8, 7]);
        let store = Store::open(dir.path()).unwrap();
        assert_eq!(store.verify(&VerifyOptions::default()).unwrap().problems, []);
        let mut image = Vec::new();
        store.snapshots()[0].read_image(&mut image).unwrap();
        assert_eq!(image[2..5], [9, 8, 7]);
    }
}
