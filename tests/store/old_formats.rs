//! Every old format stays readable: `tests/fixtures/format-N` is a store of format N, as the
//! program of that time wrote it.
//!
//! A fixture has the FORMAT file and the packs. It has no index, because opening builds the index
//! from the packs, and no LOCK, because that file has no lasting content. `expected.txt` says what
//! is in the store.

use crate::folder::copy;
use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::{Path, PathBuf};

use stillframe::codec::Codec;
use stillframe::migrate::MigrateOptions;
use stillframe::record::Trigger;
use stillframe::source::Attachment;
use stillframe::store::StoreError;
use stillframe::verify::VerifyOptions;
use stillframe::{AddressRange, CaptureOptions, Error, GcOptions, Hash, RegionSize, SnapshotId, Store};

fn fixture(format: u32) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/fixtures/format-{format}"))
}

/// The format of a new store, as its FORMAT file says.
fn this_format() -> u32 {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("store");
    drop(Store::options().create(&path).unwrap());
    let text = std::fs::read_to_string(path.join("FORMAT")).unwrap();
    text.lines().find_map(|line| line.strip_prefix("format = ")).unwrap().parse().unwrap()
}

// ---- The content of a fixture -------------------------------------------------------------------

/// A line of `expected.txt`, in which `-` means that there is none.
#[derive(Debug, PartialEq, Eq)]
struct Expected {
    id: String,
    process: String,
    parent: String,
    trigger: String,
    image_bytes: u64,
    image: String,
    attachment: String,
    labels: String,
}

impl Expected {
    fn of(store: &Store, id: SnapshotId) -> Expected {
        let snapshot = store.snapshot(id).unwrap();
        let mut image = vec![0; usize::try_from(snapshot.record().memory_bytes).unwrap()];
        store.restore(id).unwrap().into_slice(&mut image).unwrap();
        let attachment = snapshot.attachment("globals").unwrap();
        let labels: Vec<String> =
            snapshot.labels().iter().map(|(key, value)| format!("{key}={value}")).collect();
        Expected {
            id: id.to_string(),
            process: snapshot.record().process.clone(),
            parent: snapshot.record().parent.map_or("-".to_owned(), |parent| parent.to_string()),
            trigger: snapshot.record().trigger.to_string(),
            image_bytes: snapshot.record().memory_bytes,
            image: Hash::of(&image).to_string(),
            attachment: attachment.map_or("-".to_owned(), |bytes| Hash::of(&bytes).to_string()),
            labels: if labels.is_empty() { "-".to_owned() } else { labels.join(",") },
        }
    }

    fn line(&self) -> String {
        let Expected { id, process, parent, trigger, image_bytes, image, attachment, labels } = self;
        format!("{id} {process} {parent} {trigger} {image_bytes} {image} {attachment} {labels}")
    }

    fn from_line(line: &str) -> Expected {
        let mut words = line.split(' ').map(str::to_owned);
        let mut word = || words.next().unwrap();
        Expected {
            id: word(),
            process: word(),
            parent: word(),
            trigger: word(),
            image_bytes: word().parse().unwrap(),
            image: word(),
            attachment: word(),
            labels: word(),
        }
    }
}

/// The live snapshots by id, and the ids of the forgotten ones.
fn expected(format: u32) -> (BTreeMap<String, Expected>, Vec<String>) {
    let text = std::fs::read_to_string(fixture(format).join("expected.txt")).unwrap();
    let lines = || text.lines().filter(|line| !line.starts_with('#'));
    let live = lines().filter(|line| !line.starts_with("forgotten ")).map(Expected::from_line);
    let forgotten = lines().filter_map(|line| line.strip_prefix("forgotten ")).map(str::to_owned);
    (live.map(|expected| (expected.id.clone(), expected)).collect(), forgotten.collect())
}

// ---- The tests ----------------------------------------------------------------------------------

#[test]
fn every_format_up_to_this_one_has_a_fixture() {
    for format in 1..=this_format() {
        let text = std::fs::read_to_string(fixture(format).join("store/FORMAT"));
        let text = text.unwrap_or_else(|error| panic!("format {format} has no fixture: {error}"));
        assert!(text.contains(&format!("\nformat = {format}\n")), "{text}");
        let (live, forgotten) = expected(format);
        assert!(live.len() >= 5 && !forgotten.is_empty());
        assert!(live.values().any(|snapshot| snapshot.labels != "-"));
    }
}

#[test]
fn every_fixture_opens_restores_and_verifies_and_takes_new_snapshots() {
    for format in 1..=this_format() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("store");
        copy(&fixture(format).join("store"), &path);
        let migration = Store::migrate(&path, &MigrateOptions::new()).unwrap();
        assert_eq!((migration.from, migration.to), (format, this_format()));

        let (live, forgotten) = expected(format);
        let newer = {
            let store = Store::open(&path).unwrap();
            check(&store, &live, &forgotten);
            let memory = vec![format.to_le_bytes(); 10_000].concat();
            let taken = store.process("web-1").capture(&memory, &CaptureOptions::default()).unwrap();
            let parent = taken.parent.unwrap().to_string();
            assert_eq!(live[&parent].process, "web-1");
            taken.id
        };
        let store = Store::open(&path).unwrap();
        store.forget(&[newer]).unwrap();
        store.gc(&GcOptions::new().max_unused_percent(0)).unwrap();
        check(&store, &live, &forgotten);
    }
}

fn check(store: &Store, live: &BTreeMap<String, Expected>, forgotten: &[String]) {
    let found = store.snapshots().into_iter().map(|snapshot| Expected::of(store, snapshot.id()));
    let found: BTreeMap<String, Expected> = found.map(|found| (found.id.clone(), found)).collect();
    assert_eq!(&found, live);
    for id in forgotten {
        let error = store.find(id).unwrap_err();
        assert!(matches!(error, Error::Store(StoreError::NoSuchSnapshot { .. })), "{error:?}");
    }
    assert_eq!(store.verify(&VerifyOptions::default()).unwrap().problems, []);
}

// ---- How to make a fixture ----------------------------------------------------------------------

/// Writes the fixture of this program's format, to be committed when the format is released:
///
/// `cargo test --test store make_the_fixture -- --ignored`
#[test]
#[ignore = "writes into the source tree"]
fn make_the_fixture() {
    let fixture = fixture(this_format());
    let path = fixture.join("store");
    let _ = std::fs::remove_dir_all(&fixture);
    std::fs::create_dir_all(&fixture).unwrap();
    let store = Store::options().region_size(RegionSize::new(4096).unwrap()).create(&path).unwrap();
    let capture = |process: &str, memory: &[u8], options: &CaptureOptions| {
        store.process(process).capture(memory, options).unwrap().id
    };
    let label = |id, key: &str, value: Option<&str>| {
        let change = (key.to_owned(), value.map(str::to_owned));
        store.change_labels(id, &[change]).unwrap();
    };
    let plain = CaptureOptions::default();

    // A pack that gc has rewritten, without the first snapshot.
    let mut web = memory(1);
    let collected = capture("web-1", &web, &plain);
    web[100_000..100_100].fill(7);
    let first = capture("web-1", &web, &plain);
    label(first, "release", Some("1.0"));
    store.forget(&[collected]).unwrap();
    store.gc(&GcOptions::new().max_unused_percent(0)).unwrap();

    // A record with every field set.
    web[20_000..30_000].fill(0);
    let options = CaptureOptions::new()
        .trigger(Trigger::Signal("SIGUSR1".to_owned()))
        .labels([("why".to_owned(), "before-upgrade".to_owned())])
        .exclude([AddressRange::new(5_000, 9_000).unwrap()])
        .attachments([Attachment { name: "globals".to_owned(), bytes: (0..200).collect() }]);
    let second = capture("web-1", &web, &options);
    label(second, "reviewed", Some("yes"));
    label(second, "release", Some("1.1"));
    label(second, "reviewed", None);

    // Another process that shares most of it, two lengths that no region size divides, and one
    // snapshot of zeros only.
    let mut vm = memory(1);
    vm.truncate(130_001);
    capture("vm", &vm, &plain.clone().trigger(Trigger::Bootstrap));
    vm.truncate(77_777);
    let forgotten = capture("vm", &vm, &plain);
    capture("vm", &vec![0; 10_000_000], &plain.clone().trigger(Trigger::Periodic));
    vm.extend(memory(2));
    capture("vm", &vm, &plain.clone().trigger(Trigger::Other("nightly".to_owned())));
    store.forget(&[forgotten]).unwrap();

    // Differences from differences, and Zstandard as well as LZ4.
    let mut work = memory(3);
    for step in 0..5u8 {
        work[60_000 + usize::from(step)] ^= 0xFF;
        work[70_000 * usize::from(step & 1)..][..300].fill(step);
        let codec = if step < 3 { Codec::Lz4 } else { Codec::Zstd };
        let options = plain.clone().codec(codec).deltas(step != 3);
        capture("work", &work, &options);
    }

    let version = env!("CARGO_PKG_VERSION");
    let mut text = format!("# Written by stillframe {version}: tests/store/old_formats.rs says how.\n");
    text += "# id process parent trigger image_bytes image_blake3 globals_blake3 labels\n";
    for snapshot in store.snapshots() {
        writeln!(text, "{}", Expected::of(&store, snapshot.id()).line()).unwrap();
    }
    writeln!(text, "forgotten {collected}\nforgotten {forgotten}").unwrap();
    std::fs::write(fixture.join("expected.txt"), text).unwrap();
    drop(store);
    std::fs::remove_dir_all(path.join("index")).unwrap();
    std::fs::remove_file(path.join("LOCK")).unwrap();
}

/// Text, numbers, zeros, and a little incompressible data.
fn memory(seed: u32) -> Vec<u8> {
    let mut bytes = vec![0; 4096];
    bytes.extend(b"stillframe ".iter().copied().cycle().take(50_000));
    bytes.extend((seed..).take(3_000).flat_map(u32::to_le_bytes));
    bytes.resize(bytes.len() + 40_000, 0);
    let noise = (0..188u32).flat_map(|at| Hash::of(&[seed.to_le_bytes(), at.to_le_bytes()].concat()).0);
    bytes.extend(noise.take(6_000));
    bytes.extend(std::iter::repeat_n(0xAB, 30_000));
    bytes
}
