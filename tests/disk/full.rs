//! A full disk: gc has to copy objects before it can free anything, and frees what it can.
//! Everything else continues as far as possible.
//!
//! Some tests use a simulated disk that only counts, at every degree of fullness, with a stop at
//! every call. Others use small file systems that are really full, where mounting is allowed.

use crate::folder::copy;
use crate::needs::{needs, passed_over};
use std::collections::BTreeSet;
use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicI64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use stillframe::fault_injection::{Call, Witness, seal_packs_at, watch};
use stillframe::gc::GcStats;
use stillframe::store::StoreError;
use stillframe::verify::VerifyOptions;
use stillframe::{CaptureOptions, Error, GcOptions, RegionSize, SnapshotId, Store};

const ENOSPC: i32 = 28;
const EIO: i32 = 5;

const KIB: usize = 1024;

/// All stores here begin with packs of about this size.
const SEAL_BYTES: u64 = 300 * KIB as u64;

/// All tombstones of a store here take less than this.
const TOMBSTONES_BYTES: u64 = 4096;

type Snapshots = Vec<(SnapshotId, Vec<u8>)>;

fn create(path: &Path) -> Store {
    Store::options().region_size(RegionSize::new(4096).unwrap()).create(path).unwrap()
}

fn capture(store: &Store, memory: &[u8], seed: u64) -> Result<SnapshotId, Error> {
    store.process(format!("p{seed}")).capture(memory, &CaptureOptions::default()).map(|done| done.id)
}

/// Asserts that exactly these snapshots are there, byte by byte.
#[track_caller]
fn assert_whole(store: &Store, snapshots: &Snapshots, when: &str) {
    let found: BTreeSet<SnapshotId> = store.snapshots().iter().map(|snapshot| snapshot.id()).collect();
    assert_eq!(found, snapshots.iter().map(|(id, _)| *id).collect(), "{when}");
    for (id, memory) in snapshots {
        assert!(store.restore(*id).unwrap().into_mapping().unwrap()[..] == memory[..], "{when}: {id}");
    }
    assert_eq!(store.verify(&VerifyOptions::default()).unwrap().problems, [], "{when}");
}

fn gc(store: &Store) -> Result<GcStats, Error> {
    store.gc(&GcOptions::new().max_unused_percent(0))
}

/// What gc can still free, without tombstones: the gc after the one that removes their snapshots
/// removes them.
fn unused_bytes(store: &Store) -> u64 {
    let options = GcOptions::new().max_unused_percent(0).dry_run(true);
    let bytes = store.gc(&options).unwrap().freed_bytes;
    if bytes < TOMBSTONES_BYTES { 0 } else { bytes }
}

fn assert_nothing_half(path: &Path, when: &str) {
    for entry in fs::read_dir(path.join("packs")).unwrap() {
        let name = entry.unwrap().file_name();
        assert!(name.to_str().unwrap().ends_with(".pack"), "{when}: {name:?}");
    }
}

// ---- A simulated disk that only counts ----------------------------------------------------------

/// Has this much free space. If it is negative, this much must be freed before any is available.
/// The witness does not see the calls of the database on its own files.
struct SmallDisk {
    room: Mutex<i64>,
    /// After this many calls that change something all calls fail, as if the process had been
    /// killed.
    calls_left: AtomicI64,
    refused: AtomicUsize,
}

impl SmallDisk {
    fn new(room: i64) -> Arc<SmallDisk> {
        SmallDisk::that_ends(room, i64::MAX)
    }

    fn that_ends(room: i64, calls: i64) -> Arc<SmallDisk> {
        let (room, calls_left) = (Mutex::new(room), AtomicI64::new(calls));
        Arc::new(SmallDisk { room, calls_left, refused: AtomicUsize::new(0) })
    }

    fn full(&self) -> io::Result<()> {
        self.refused.fetch_add(1, Ordering::SeqCst);
        Err(io::Error::from_raw_os_error(ENOSPC))
    }
}

fn bytes_below(path: &Path) -> i64 {
    let Ok(metadata) = fs::symlink_metadata(path) else { return 0 };
    match metadata.is_dir() {
        true => fs::read_dir(path).unwrap().map(|entry| bytes_below(&entry.unwrap().path())).sum(),
        false => metadata.len() as i64,
    }
}

impl Witness for SmallDisk {
    fn call(&self, call: &Call<'_>, act: &mut dyn FnMut() -> io::Result<()>) -> io::Result<()> {
        if matches!(call, Call::Open(_) | Call::Read(_) | Call::List(_) | Call::Map(..)) {
            return act();
        }
        if self.calls_left.fetch_sub(1, Ordering::SeqCst) <= 0 {
            return Err(io::Error::from_raw_os_error(EIO));
        }
        let mut room = self.room.lock().unwrap();
        match call {
            // Nothing here depends on what a power failure would lose.
            Call::Sync(..) | Call::SyncDir(_) => Ok(()),
            Call::Create(_) | Call::CreateDir(_) if *room <= 0 => self.full(),
            Call::Write { file, at_bytes, bytes, .. } => {
                let length = file.metadata().unwrap().len();
                let more = (at_bytes + bytes.len() as u64).saturating_sub(length) as i64;
                if more <= *room {
                    *room -= more;
                    return act();
                }
                let fits = bytes.len() - (more - (*room).max(0)) as usize;
                file.write_all_at(&bytes[..fits], *at_bytes).unwrap();
                *room = (*room).min(0);
                self.full()
            }
            Call::SetLength { file, length_bytes, .. } => {
                *room += file.metadata().unwrap().len() as i64 - *length_bytes as i64;
                act()
            }
            Call::Remove(path) | Call::RemoveDir(path) => {
                let gone = bytes_below(path);
                act()?;
                *room += gone;
                Ok(())
            }
            _ => act(),
        }
    }
}

/// A store whose packs contain some garbage, and its live snapshots.
struct Built {
    dir: tempfile::TempDir,
    live: Snapshots,
}

impl Built {
    /// Builds it from snapshots of these sizes in KiB; the flag says whether each is kept.
    fn new(sizes: &[(usize, bool)]) -> Built {
        let dir = tempfile::tempdir().unwrap();
        let _sealing = seal_packs_at(dir.path(), SEAL_BYTES);
        let store = create(&dir.path().join("store"));
        let (mut live, mut dead) = (Snapshots::new(), Vec::new());
        for (seed, (kib, is_kept)) in (1..).zip(sizes) {
            let memory = crate::noise::noise(kib * KIB, seed);
            let id = capture(&store, &memory, seed).unwrap();
            match is_kept {
                true => live.push((id, memory)),
                false => dead.push(id),
            }
        }
        store.forget(&dead).unwrap();
        // From here on packs have their usual size: gc would put all objects into one pack.
        Built { dir, live }
    }

    /// Packs with little garbage, and a last pack that is mostly garbage.
    fn without_a_dead_pack() -> Built {
        Built::new(&[(20, false), (290, true), (20, false), (290, true), (60, false), (8, true)])
    }

    /// Packs, one of which is all garbage.
    fn with_a_dead_pack() -> Built {
        // The record of a snapshot that fills a pack is in the next pack.
        Built::new(&[(290, true), (20, false), (310, false), (60, false), (8, true)])
    }

    fn copy(&self) -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("store");
        copy(&self.dir.path().join("store"), &path);
        (dir, path)
    }

    /// Asserts that the store is sound and usable, also when it is reopened after space was freed.
    fn assert_in_order(&self, store: Store, path: &Path, when: &str) {
        assert_whole(&store, &self.live, when);
        drop(store);
        let store = Store::open(path).unwrap();
        assert_nothing_half(path, when);
        assert_whole(&store, &self.live, when);
        gc(&store).unwrap();
        assert_eq!(unused_bytes(&store), 0, "{when}");
        let mut live = self.live.clone();
        let memory = crate::noise::noise(50 * KIB, 99);
        live.push((capture(&store, &memory, 99).unwrap(), memory));
        assert_whole(&store, &live, when);
    }
}

#[derive(Debug, Default)]
struct Outcomes {
    nothing: usize,
    some: usize,
    all: usize,
}

/// Runs gc with this much free space and checks what it frees.
fn collect(built: &Built, room: i64, outcomes: &mut Outcomes) {
    let when = format!("with a room of {room}");
    let (_dir, path) = built.copy();
    let store = Store::open(&path).unwrap();
    let before = unused_bytes(&store);
    let disk = SmallDisk::new(room);
    let watching = watch(&path, disk.clone());
    let done = gc(&store);
    assert_nothing_half(&path, &when);
    drop(watching);
    let left = unused_bytes(&store);
    match done {
        Ok(stats) => {
            assert!(stats.freed_bytes > 0, "{when}");
            assert!(left < before, "{when}: {left} of {before} bytes are left");
            *(if left == 0 { &mut outcomes.all } else { &mut outcomes.some }) += 1;
        }
        Err(Error::Store(error @ StoreError::DiskFull { missing_bytes: Some(bytes), .. })) => {
            assert!(bytes >= 4096 && error.to_string().contains(&format!("free {bytes} bytes")), "{error}");
            assert!(disk.refused.load(Ordering::SeqCst) > 0, "{when}");
            outcomes.nothing += 1;
        }
        Err(error) => panic!("{when}: {error:?}"),
    }
    built.assert_in_order(store, &path, &when);
}

#[test]
fn gc_frees_what_it_can_however_little_room_there_is() {
    let built = Built::without_a_dead_pack();
    let mut outcomes = Outcomes::default();
    // With the lowest values even deleting the index does not free enough.
    for room in
        [-2_000_000, -300_000, -200_000, -140_000, -100_000, -50_000, 0, 100, 50_000, 200_000, 700_000]
    {
        collect(&built, room, &mut outcomes);
    }
    let Outcomes { nothing, some, all } = outcomes;
    assert!(nothing > 0 && some > 0 && all > 0, "{outcomes:?}");
}

#[test]
fn packs_of_which_nothing_is_needed_go_without_any_room() {
    let built = Built::with_a_dead_pack();
    let mut outcomes = Outcomes::default();
    for room in [-2_000_000, -100_000, 0] {
        collect(&built, room, &mut outcomes);
    }
    let Outcomes { nothing, some, all } = outcomes;
    assert!(nothing == 0 && some > 0 && all > 0, "{outcomes:?}");
}

#[test]
fn gc_on_a_full_disk_may_end_at_any_call() {
    for built in [Built::without_a_dead_pack(), Built::with_a_dead_pack()] {
        let mut ended = 0;
        for calls in 0.. {
            let when = format!("after {calls} calls");
            let (_dir, path) = built.copy();
            let store = Store::open(&path).unwrap();
            let watching = watch(&path, SmallDisk::that_ends(-50_000, calls));
            let done = gc(&store);
            // A killed process would not do what closing the store does.
            drop(store);
            drop(watching);
            let store = Store::open(&path).unwrap();
            built.assert_in_order(store, &path, &when);
            match done {
                Ok(_) => break,
                Err(_) => ended += 1,
            }
        }
        assert!(ended > 5, "it ended {ended} times");
    }
}

// ---- Small file systems that are really full ----------------------------------------------------

/// The path of the mounted small file system.
const MOUNTED: &str = "STILLFRAME_SMALL_FILE_SYSTEM";

/// The exit code for a file system that could not be mounted.
const NOT_MOUNTED: i32 = 77;

/// Runs [`inside_a_small_file_system`] in one that `script` mounts at $0.
fn in_a_small_file_system(script: &str) {
    let dir = tempfile::tempdir().unwrap();
    let mount = dir.path().join("mount");
    fs::create_dir(&mount).unwrap();
    let mount = mount.to_str().unwrap().to_owned();
    let (mounted, program) = (format!("{MOUNTED}={mount}"), std::env::current_exe().unwrap());
    let program = program.to_str().unwrap();
    let test = ["--ignored", "--nocapture", "--exact", "full::inside_a_small_file_system"];
    let arguments = [&[&*mount, "env", &mounted, program][..], &test].concat();
    let Some(output) = crate::mount::mounting(&format!("{script}; exec \"$@\""), &arguments) else { return };
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let (stdout, stderr) = (text(&output.stdout), text(&output.stderr));
    if output.status.code() == Some(NOT_MOUNTED) {
        passed_over(&format!("it cannot be mounted here: {stderr}"));
        return;
    }
    assert!(output.status.success() && stdout.contains("1 passed"), "{stdout}\n{stderr}");
}

#[test]
fn a_full_memory_file_system_is_emptied_by_gc() {
    in_a_small_file_system(r#"mount -t tmpfs -o size=12m,mode=700 tmpfs "$0""#);
}

#[test]
fn a_full_ext4_is_emptied_by_gc() {
    if !needs(&["mkfs.ext4"]) {
        return;
    }
    in_a_small_file_system(
        r#"truncate -s 12m "$0.image"
        mkfs.ext4 -q -F -m 0 -O ^has_journal "$0.image" || exit 77
        mount -o loop "$0.image" "$0" || exit 77"#,
    );
}

/// A file that takes all free space.
struct Filling {
    path: PathBuf,
}

impl Filling {
    fn of(mount: &Path) -> Filling {
        let path = mount.join("filling");
        let mut file = fs::File::create(&path).unwrap();
        for piece in [64 * KIB, 4096, 512, 1] {
            while file.write_all(&vec![7; piece]).is_ok() {}
        }
        // Some errors appear only when the data is written to the disk.
        file.sync_all().unwrap();
        assert!(fs::write(mount.join("more"), [7; 4096]).is_err(), "it is full to the last byte");
        fs::remove_file(mount.join("more")).unwrap();
        Filling { path }
    }

    /// Frees this many bytes.
    fn free(&self, bytes: u64) {
        let file = fs::OpenOptions::new().write(true).open(&self.path).unwrap();
        file.set_len(file.metadata().unwrap().len() - bytes).unwrap();
        file.sync_all().unwrap();
    }
}

impl Drop for Filling {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

/// Runs gc through the command. Returns its exit code and its standard error.
fn gc_command(store: &Path) -> (Option<i32>, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_stillframe"));
    let output = command.arg("--store").arg(store).args(["gc", "--max-unused", "0"]).output().unwrap();
    (output.status.code(), String::from_utf8(output.stderr).unwrap())
}

#[test]
#[ignore = "others start it, where a small file system is mounted"]
fn inside_a_small_file_system() {
    let Some(mount) = std::env::var_os(MOUNTED) else { return };
    let mount = PathBuf::from(mount);
    let path = mount.join("store");
    let _sealing = seal_packs_at(&path, SEAL_BYTES);
    let store = create(&path);
    let mut live = Snapshots::new();
    let error = loop {
        let seed = live.len() as u64 + 1;
        let memory = crate::noise::noise(200 * KIB, seed);
        match capture(&store, &memory, seed) {
            Ok(id) => live.push((id, memory)),
            Err(error) => break error,
        }
    };
    assert!(matches!(error, Error::Store(StoreError::DiskFull { .. })), "{error:?}");
    assert!(live.len() > 30, "{} snapshots", live.len());
    assert_whole(&store, &live, "when a capture found no room");
    drop(store);

    let filling = Filling::of(&mount);
    let store = Store::open(&path).unwrap();
    assert_whole(&store, &live, "when all is full");
    // Snapshots that fill whole packs, and every third of the rest.
    let mut number = 0;
    let forgotten: Vec<SnapshotId> = live
        .extract_if(.., |_| {
            number += 1;
            number <= 6 || number % 3 == 0
        })
        .map(|(id, _)| id)
        .collect();
    store.forget(&forgotten).unwrap();
    assert_whole(&store, &live, "after forget");
    assert!(store.gc(&GcOptions::default()).unwrap().freed_bytes > 1_000_000);
    assert_whole(&store, &live, "after gc");
    let memory = crate::noise::noise(200 * KIB, 99);
    live.push((capture(&store, &memory, 99).unwrap(), memory));
    drop(store);
    drop(filling);
    let store = Store::open(&path).unwrap();
    assert!(path.join("index/db").exists());
    assert_whole(&store, &live, "opened again");
    gc(&store).unwrap();
    assert_eq!(unused_bytes(&store), 0);

    // A pack with much to copy, one with little, and no index whose deletion would free space.
    let mut dead = Vec::new();
    for (seed, (kib, is_kept)) in (200..).zip([(20, false), (290, true), (60, false), (8, true)]) {
        let memory = crate::noise::noise(kib * KIB, seed);
        let id = capture(&store, &memory, seed).unwrap();
        match is_kept {
            true => live.push((id, memory)),
            false => dead.push(id),
        }
    }
    store.forget(&dead).unwrap();
    drop(store);
    fs::remove_dir_all(path.join("index")).unwrap();
    let filling = Filling::of(&mount);
    let (code, said) = gc_command(&path);
    assert_eq!(code, Some(1), "{said}");
    let number = said.split_once("; free ").and_then(|(_, rest)| rest.split_once(" bytes elsewhere"));
    let number = number.unwrap_or_else(|| panic!("how much? {said}")).0;
    filling.free(number.parse().unwrap());
    let (code, said) = gc_command(&path);
    assert_eq!(code, Some(0), "{number} bytes were freed: {said}");
    assert!(said.contains("run gc again"), "{said}");
    assert_nothing_half(&path, "after gc");
    drop(filling);
    let (code, said) = gc_command(&path);
    assert_eq!((code, said.contains("run gc again")), (Some(0), false), "{said}");
    let store = Store::open(&path).unwrap();
    assert_eq!(unused_bytes(&store), 0);
    assert_whole(&store, &live, "at the end");
}
