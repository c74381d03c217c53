//! A pack loses its bytes while it is mapped: the result is an error, and not a fatal signal.

use std::path::Path;
use std::process::Command;

use stillframe::repair::RepairOptions;
use stillframe::verify::VerifyOptions;
use stillframe::{CaptureOptions, Error, GcOptions, SnapshotId, Store};

use crate::whole_error::whole_error;

const MEMORY_BYTES: usize = 6 << 20;

fn capture(store: &Store, process: &str, seed: u64) -> (SnapshotId, Vec<u8>) {
    let memory = crate::noise::noise(MEMORY_BYTES, seed);
    let done = store.process(process).capture(&memory[..], &CaptureOptions::default()).unwrap();
    (done.id, memory)
}

fn only(snapshot: SnapshotId) -> VerifyOptions {
    VerifyOptions::new().snapshots([snapshot])
}

fn sample() -> VerifyOptions {
    VerifyOptions::new().sample_percent(99)
}

fn restore(store: &Store, id: SnapshotId) -> Result<Vec<u8>, Error> {
    Ok(store.restore(id)?.into_mapping()?.to_vec())
}

/// Asserts that a verb reports that the pack cannot be read.
#[track_caller]
fn assert_unreadable<T: std::fmt::Debug>(verb: &str, done: Result<T, Error>) {
    let text = whole_error(&done.expect_err(verb));
    assert!(text.contains("00000001") && text.contains("read"), "{verb}: {text}");
}

#[test]
fn a_pack_that_is_cut_under_an_open_store_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("store");
    let store = Store::options().create(&path).unwrap();
    let (first, memory) = capture(&store, "web", 1);
    let (last, _) = capture(&store, "vm", 2);
    store.set_label(first, "kept", "yes").unwrap();
    // The whole pack is mapped, and was read once.
    assert!(restore(&store, first).unwrap() == memory);
    restore(&store, last).unwrap();
    let pack = std::fs::OpenOptions::new().write(true).open(path.join("packs/00000001.pack")).unwrap();
    pack.set_len((MEMORY_BYTES + MEMORY_BYTES / 2) as u64).unwrap();
    assert!(restore(&store, first).unwrap() == memory, "it lies before the cut");
    assert_unreadable("restore", restore(&store, last));
    let file = dir.path().join("image");
    let restored = store.restore(last).and_then(|restore| restore.into_file(&file));
    assert_unreadable("restore", restored);
    assert_unreadable("verify", store.verify(&VerifyOptions::default()));
    assert_unreadable("verify", store.verify(&only(last)));
    assert_unreadable("verify", store.verify(&sample()));
    assert_unreadable("gc", store.gc(&GcOptions::default()));
    drop(store);
    // The next opening reports what is lost, and works.
    let store = Store::open(&path).unwrap();
    assert!(restore(&store, first).unwrap() == memory);
}

#[test]
fn a_base_that_cannot_be_read_is_an_error_and_no_damage() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("store");
    let store = Store::options().create(&path).unwrap();
    let (_, mut memory) = capture(&store, "web", 3);
    // The next capture begins a pack.
    let (garbage, _) = capture(&store, "vm", 4);
    store.forget(&[garbage]).unwrap();
    assert!(store.gc(&GcOptions::default()).unwrap().packs_rewritten > 0);
    let whole = path.join("packs/00000002.pack");
    // Each region differs, and the memory is longer: only the bases of the regions are in another
    // pack.
    memory.iter_mut().step_by(10_000).for_each(|byte| *byte ^= 1);
    memory.extend(crate::noise::noise(100_000, 5));
    let second = store.process("web").capture(&memory[..], &CaptureOptions::default()).unwrap();
    assert!(second.delta_regions > 0, "{second:?}");
    let bytes = std::fs::read(&whole).unwrap();
    let pack = std::fs::OpenOptions::new().write(true).open(&whole).unwrap();
    pack.set_len(4096).unwrap();
    for (verb, options) in [("verify of one", only(second.id)), ("verify of a sample", sample())] {
        let text = whole_error(&store.verify(&options).expect_err(verb));
        assert!(text.contains("cannot read"), "{verb}: {text}");
    }
    // The disk has recovered: the store did not mistake its errors for damage, and dropped nothing.
    std::os::unix::fs::FileExt::write_all_at(&pack, &bytes, 0).unwrap();
    assert!(restore(&store, second.id).unwrap() == memory);
    assert_eq!(store.verify(&VerifyOptions::default()).unwrap().problems, []);
    assert_eq!(store.verify(&only(second.id)).unwrap().problems, []);
}

/// A file system in a file, which root may mount.
struct Mounted {
    dir: tempfile::TempDir,
}

fn run(program: &str, arguments: &[&str]) -> bool {
    let done = Command::new(program).args(arguments).output();
    done.is_ok_and(|done| done.status.success())
}

impl Mounted {
    fn new(megabytes: u64) -> Mounted {
        let dir = tempfile::tempdir().unwrap();
        let mounted = Mounted { dir };
        let image = std::fs::File::create(mounted.image()).unwrap();
        image.set_len(megabytes << 20).unwrap();
        let image = mounted.image();
        let image = image.to_str().unwrap();
        assert!(run("mkfs.ext4", &["-q", "-F", "-O", "^has_journal", image]), "mkfs.ext4");
        std::fs::create_dir(mounted.path()).unwrap();
        let path = mounted.path();
        assert!(run("mount", &["-o", "loop", image, path.to_str().unwrap()]), "mount needs root");
        mounted
    }

    fn image(&self) -> std::path::PathBuf {
        self.dir.path().join("image")
    }

    fn path(&self) -> std::path::PathBuf {
        self.dir.path().join("mounted")
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        run("umount", &["-l", self.path().to_str().unwrap()]);
    }
}

/// Evicts these files from the page cache, so that the next read goes to the disk.
fn drop_from_memory(dir: &Path) {
    for entry in std::fs::read_dir(dir).unwrap() {
        let file = std::fs::File::open(entry.unwrap().path()).unwrap();
        file.sync_all().unwrap();
        rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
    }
}

#[test]
#[ignore = "it mounts a file system, for which it must be root"]
fn a_pack_that_the_disk_cannot_read_is_an_error() {
    let mounted = Mounted::new(40);
    let path = mounted.path().join("store");
    let store = Store::options().create(&path).unwrap();
    let (first, _) = capture(&store, "web", 1);
    drop(store);
    let store = Store::open(&path).unwrap();
    drop_from_memory(&path.join("packs"));
    // The disk loses everything but its first megabytes.
    let image = std::fs::OpenOptions::new().write(true).open(mounted.image()).unwrap();
    image.set_len(2 << 20).unwrap();
    assert_unreadable("restore", restore(&store, first));
    assert_unreadable("verify", store.verify(&VerifyOptions::default()));
    drop(store);
    assert_unreadable("open", Store::open(&path).map_err(Error::from));
    assert_unreadable("repair", Store::repair(&path, &RepairOptions::default()));
}
