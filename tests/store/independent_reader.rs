//! A store can be read without this library: `independent_reader.py`, written from `docs/format.md`
//! alone, finds the same snapshots and restores the same bytes.

use crate::needs::needs;
use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs;
use std::io::Write;
use std::ops::Range;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};

use serde_json::{Value, json};
use stillframe::record::{Origin, Trigger};
use stillframe::source::{Attachment, CoreSource, FileSource, LiveProcessSource, Source};
use stillframe::threads::Threads;
use stillframe::{
    AddressRange, CaptureOptions, CaptureStats, GcOptions, Hash, RegionSize, Snapshot, SnapshotId, Store,
};

/// Runs the script, which must succeed.
fn reader(store: &Path, arguments: &[&str]) -> Vec<u8> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/independent_reader.py");
    let output = Command::new("python3").arg(script).arg(store).args(arguments).output();
    let output = output.expect("this test needs python3, which `apt-get install python3` installs");
    let says = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{arguments:?}: {} {says}", output.status);
    output.stdout
}

fn listed(store: &Path) -> Vec<Value> {
    serde_json::from_slice(&reader(store, &["list"])).unwrap()
}

fn restored(store: &Path, id: &str) -> Vec<u8> {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("image");
    reader(store, &["restore", id, image.to_str().unwrap()]);
    fs::read(image).unwrap()
}

/// What the script must list for a snapshot.
fn described(snapshot: &Snapshot<'_>) -> Value {
    let record = snapshot.record();
    let space = snapshot.address_space().unwrap();
    let ranges =
        |ranges: &[AddressRange]| -> Vec<_> { ranges.iter().map(|it| [it.start(), it.end()]).collect() };
    let mappings: Vec<Value> = (space.mappings().iter())
        .map(|mapping| {
            json!({
                "start": mapping.range.start(),
                "end": mapping.range.end(),
                "protection": mapping.protection,
                "kind": mapping.kind as u8,
                "name": mapping.name,
                "file_offset": mapping.file_offset_bytes,
                "captured": mapping.captured,
            })
        })
        .collect();
    let attachments: Vec<Value> = (record.attachments.iter())
        .map(|attachment| {
            let (name, bytes) = (&attachment.name, attachment.length_bytes);
            let mut value = json!({ "name": name, "hash": attachment.hash.to_string(), "bytes": bytes });
            if name == Threads::ATTACHMENT {
                value["threads"] = described_threads(&snapshot.attachment(name).unwrap().unwrap());
            }
            value
        })
        .collect();
    let trigger = match &record.trigger {
        Trigger::Signal(text) => json!({ "kind": "signal", "text": text }),
        Trigger::Other(text) => json!({ "kind": "other", "text": text }),
        named => json!({ "kind": named.to_string() }),
    };
    let source = match &record.origin {
        Origin::Bytes => json!({ "kind": "bytes" }),
        Origin::File { path } => json!({ "kind": "file", "path": path_hex(path) }),
        Origin::LiveProcess { pid, path, command } => {
            let path = path.as_deref().map(path_hex);
            json!({ "kind": "process", "pid": pid, "path": path, "command": command })
        }
        Origin::Core { path, pid, executable, command } => {
            let executable = executable.as_deref().map(path_hex);
            json!({ "kind": "core", "path": path_hex(path), "pid": pid, "executable": executable, "command": command })
        }
        other => panic!("{other:?} is not described in docs/format.md"),
    };
    json!({
        "id": snapshot.id().to_string(),
        "process": record.process,
        "parent": record.parent.map(|id| id.to_string()),
        "time": i64::try_from(record.time.as_nanosecond()).unwrap(),
        "trigger": trigger,
        "source": source,
        "region_size": record.region_size.bytes(),
        "memory_bytes": record.memory_bytes,
        "zero_bytes": record.zero_bytes,
        "regions": record.regions,
        "attachments": attachments,
        "layout": { "mappings": mappings, "excluded": ranges(space.excluded()), "unreadable": ranges(space.unreadable()) },
        "root": record.root.to_string(),
        "labels": snapshot.labels(),
    })
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn path_hex(path: &Path) -> String {
    hex(path.as_os_str().as_bytes())
}

fn described_threads(bytes: &[u8]) -> Value {
    let threads = Threads::from_attachment(bytes).unwrap();
    let each: Vec<Value> = (threads.threads.iter())
        .map(|thread| {
            let registers: Vec<Value> = (thread.registers.iter())
                .map(|set| json!({ "note_type": set.note_type, "bytes": hex(&set.bytes) }))
                .collect();
            json!({
                "tid": thread.tid,
                "name": hex(&thread.name),
                "signal_mask": thread.signal_mask,
                "pending_signal": thread.pending_signal,
                "signal_information": hex(&thread.signal_information),
                "registers": registers,
            })
        })
        .collect();
    json!({
        "machine": threads.machine,
        "pid": threads.pid,
        "parent_pid": threads.parent_pid,
        "process_group": threads.process_group,
        "session": threads.session,
        "threads": each,
    })
}

/// All live snapshots, oldest first: what the script must list, and the image.
fn contents(store: &Store) -> Vec<(Value, Vec<u8>)> {
    let image = |id: SnapshotId| {
        let restore = store.restore(id).unwrap();
        let mut image = vec![0xEE; usize::try_from(restore.image_bytes()).unwrap()];
        restore.into_slice(&mut image).unwrap();
        image
    };
    store.snapshots().iter().map(|snapshot| (described(snapshot), image(snapshot.id()))).collect()
}

fn assert_the_script_agrees(store: &Path, expected: &[(Value, Vec<u8>)]) {
    let listed = listed(store);
    assert_eq!(listed.len(), expected.len());
    for (found, (expected, image)) in listed.iter().zip(expected) {
        assert_eq!(found, expected);
        let id = found["id"].as_str().unwrap();
        assert!(restored(store, id) == *image, "the image of {id} differs");
    }
}

/// Bytes that look like memory: zeros, text, counters, noise.
fn memory(length: usize, seed: u64) -> Vec<u8> {
    let mut state = seed;
    let mut bytes = Vec::with_capacity(length + 20_000);
    while bytes.len() < length {
        state = state.wrapping_mul(0x5851_F42D_4C95_7F2D).wrapping_add(0x1405_7B7E_F767_814F);
        let run = 1000 + (state >> 52) as usize;
        match state >> 62 {
            0 => bytes.resize(bytes.len() + 4 * run, 0),
            1 => bytes.extend(b"what was, still is; ".repeat(run / 20)),
            2 => bytes.extend((0..run as u64 / 8).flat_map(|at| (state ^ at).to_le_bytes())),
            _ => bytes.extend((0..run as u64).map(|at| (state.wrapping_mul(at | 1) >> 40).to_le_bytes()[0])),
        }
    }
    bytes.truncate(length);
    bytes
}

/// The table of 512 regions of 4 KiB. A range of them is left out.
fn table(memory: &[u8], excluded: Range<usize>) -> Vec<u8> {
    let mut memory = memory.to_vec();
    memory[excluded].fill(0);
    let is_zero = |region: &[u8]| region.iter().all(|byte| *byte == 0);
    let regions = memory.chunks(4096);
    regions.flat_map(|region| if is_zero(region) { Hash::ZERO.0 } else { Hash::of(region).0 }).collect()
}

fn capture<S: Source + ?Sized>(
    store: &Store,
    process: &str,
    source: &S,
    options: &CaptureOptions,
) -> CaptureStats {
    store.process(process).capture(source, options).unwrap()
}

fn label(store: &Store, id: SnapshotId, key: &str, value: Option<&str>) {
    store.change_labels(id, &[(key.to_owned(), value.map(str::to_owned))]).unwrap();
}

/// A child that is killed when the test ends, in any way.
struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_store_is_read_without_the_library_to_the_last_byte() {
    if !needs(&["python3"]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("store");
    let store = Store::options().region_size(RegionSize::new(4096).unwrap()).create(&path).unwrap();
    let plain = CaptureOptions::default();

    let mut web = memory(3_000_001, 1);
    let first = capture(&store, "web-1", &web, &plain);
    web[1_000_000..1_700_000].fill(0);
    web[42] = !web[42];
    let options = CaptureOptions::new()
        .trigger(Trigger::Signal("SIGUSR1".to_owned()))
        .labels(
            [("release", "1.4"), ("städtisch", "ja")].map(|(key, value)| (key.to_owned(), value.to_owned())),
        )
        .exclude([AddressRange::new(5000, 70_000).unwrap(), AddressRange::new(1 << 21, 1 << 40).unwrap()])
        .attachments([
            Attachment { name: "globals".to_owned(), bytes: memory(300, 2) },
            Attachment { name: "nothing".to_owned(), bytes: Vec::new() },
            // An attachment with the bytes of a region is another object than the region; a table
            // and an attachment can be the same object.
            Attachment { name: "a region".to_owned(), bytes: web[..4096].to_vec() },
            Attachment { name: "a table".to_owned(), bytes: table(&web[..512 * 4096], 5000..70_000) },
        ]);
    let second = capture(&store, "web-1", &web, &options);
    let table = options.attachments.last().map(|table| Hash::of(&table.bytes)).unwrap();
    let pack = packs(&path).into_values().next().unwrap();
    let stored = pack.windows(48).filter(|header| header[16..] == table.0 && header[0] < 9 && header[1] < 4);
    assert_eq!(stored.count(), 1, "table and attachment are one object");
    label(&store, second.id, "release", Some("1.5"));

    let file = dir.path().join(OsStr::from_bytes(b"not UTF-8: \xff"));
    fs::write(&file, memory(123_457, 3)).unwrap();
    let filed = capture(&store, "vm 7", &FileSource::new(&file), &plain);
    label(&store, filed.id, "gone", Some("soon"));
    label(&store, filed.id, "gone", None);
    let options = CaptureOptions::new().trigger(Trigger::Other("nightly".to_owned()));
    capture(&store, "nothing", &vec![0; 5_000_000], &options);

    let sleep = Killed(Command::new("sleep").arg("1000").spawn().unwrap());
    let source = LiveProcessSource::new(sleep.0.id());
    let slept = capture(&store, "sleep", &source, &plain);
    let core = dir.path().join("sleep.core");
    store.restore(slept.id).unwrap().into_core(&core).unwrap();
    capture(&store, "core", &CoreSource::new(&core), &plain);

    // The first gc removes the record of the forgotten snapshot, the second its tombstone.
    store.forget(&[first.id]).unwrap();
    let mut replaced = BTreeMap::new();
    for _ in 0..2 {
        replaced.append(&mut packs(&path));
        store.gc(&GcOptions::new().max_unused_percent(0)).unwrap();
    }
    replaced.retain(|pack, _| !pack.exists());
    web[2_000_000..2_100_000].copy_from_slice(&memory(100_000, 4));
    let third = capture(&store, "web-1", &web, &plain);
    assert_eq!(third.parent, Some(second.id));
    // Two notes about one snapshot, because gc has not removed the older one yet.
    label(&store, second.id, "release", Some("1.6"));
    capture(&store, "sleep", &source, &plain);
    // Only its tombstone says that this one is forgotten.
    store.forget(&[third.id]).unwrap();

    // Chains of deltas, long and short, of regions, tables and attachments.
    let mut changing = memory(100_000, 5);
    for step in 0..9 {
        changing[50_000 + step] ^= 0x55;
        changing[3 * 4096..3 * 4096 + 40 * step].copy_from_slice(&b"stillframe".repeat(4 * step));
        let attachments = vec![Attachment { name: "first".to_owned(), bytes: changing[..30_000].to_vec() }];
        let taken = capture(&store, "changing", &changing, &plain.clone().attachments(attachments));
        assert!(step == 0 || taken.delta_regions >= 1);
    }

    // Pointers that moved together, in memory whose length is not a multiple of a word.
    let pointers = |to: u64| -> Vec<u8> {
        let word = |at: u64| if at.is_multiple_of(3) { to + at * 16 } else { at };
        (0..5000).flat_map(|at| word(at).to_le_bytes()).chain([1, 2, 3]).collect()
    };
    capture(&store, "moved", &pointers(0x7F00_1234_0000), &plain);
    let moved = capture(&store, "moved", &pointers(0x7FAB_CDEF_0000), &plain);
    assert_eq!((moved.new_regions, moved.delta_regions), (0, 10));

    let expected = contents(&store);
    assert_eq!(expected.len(), 17);
    drop(store);
    assert_the_script_agrees(&path, &expected);

    // What crashes may leave: a torn tail, an unfinished pack, and a pack that was replaced.
    let left = packs(&path);
    let named: Vec<u32> = left.values().flat_map(|pack| replaced_by(pack)).collect();
    let (name, bytes) = (replaced.iter().find(|(_, pack)| named.contains(&u32_at(pack, 12))))
        .expect("gc wrote a pack that replaces others");
    fs::write(name, bytes).unwrap();
    fs::write(path.join("packs/00000099.unfinished"), bytes).unwrap();
    let (last, whole) = left.last_key_value().unwrap();
    // Objects of the same store, which do not count because they lie at another offset.
    fs::OpenOptions::new().append(true).open(last).unwrap().write_all(&bytes[64..5000]).unwrap();
    assert_the_script_agrees(&path, &expected);
    let store = Store::open(&path).unwrap();
    assert_eq!(contents(&store), expected);
    assert!(fs::read(last).unwrap() == *whole, "the torn tail was to be cut");
}

/// The packs of a store and their bytes.
fn packs(store: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let paths = fs::read_dir(store.join("packs")).unwrap().map(|entry| entry.unwrap().path());
    paths.map(|path| (path.clone(), fs::read(path).unwrap())).collect()
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

/// The numbers of the packs that a pack replaces.
fn replaced_by(pack: &[u8]) -> Vec<u32> {
    (0..u32_at(pack, 52) as usize).map(|at| u32_at(pack, 64 + 4 * at)).collect()
}

/// The lines of the example's fenced blocks in the document that `belongs` selects.
fn document_lines(belongs: impl Fn(&str) -> bool) -> Vec<String> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/format.md");
    let document = fs::read_to_string(path).unwrap();
    let (_, example) = document.split_once("## 14.").expect("section 14 has the example");
    let blocks = example.split("```").skip(1).step_by(2).flat_map(|block| block.lines().skip(1));
    blocks.filter(|line| belongs(line)).map(str::to_owned).collect()
}

#[test]
fn the_store_that_the_document_spells_out_is_one() {
    if !needs(&["python3"]) {
        return;
    }
    let is_hex = |line: &str| line.as_bytes().get(..4).is_some_and(|at| at.iter().all(u8::is_ascii_hexdigit));
    let mut pack = Vec::new();
    for line in document_lines(is_hex) {
        assert_eq!(usize::from_str_radix(&line[..4], 16).unwrap(), pack.len(), "{line}");
        let digits: String = line.chars().skip(6).take(35).filter(|letter| *letter != ' ').collect();
        pack.extend(
            (0..digits.len()).step_by(2).map(|at| u8::from_str_radix(&digits[at..at + 2], 16).unwrap()),
        );
    }
    let format = document_lines(|line| line == "stillframe store" || line.contains(" = "));

    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join("packs")).unwrap();
    fs::write(dir.path().join("packs/00000001.pack"), pack).unwrap();
    fs::write(dir.path().join("FORMAT"), format.join("\n") + "\n").unwrap();

    let store = Store::open(dir.path()).unwrap();
    assert!(store.verify(&Default::default()).unwrap().problems.is_empty());
    let expected = contents(&store);
    let mut memory = b"stillframe ".repeat(1000);
    memory.resize(20_000, 0);
    memory[100..200].fill(0);
    assert_eq!(expected.len(), 1);
    assert_eq!(expected[0].1, memory);
    assert_eq!(expected[0].0["labels"], json!({ "why": "test" }));
    drop(store);
    assert_the_script_agrees(dir.path(), &expected);
}
