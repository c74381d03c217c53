//! Erasing: after `gc --erase` no file of the store contains data of forgotten snapshots only.
//!
//! The stores here do not compress, so that a search finds forgotten bytes anywhere: each test
//! searches every file of the store for the bytes, for the hashes of forgotten regions, and for
//! names and labels. Each test finds them before the erase.

use std::os::unix::fs::chown;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::atomic::{AtomicBool, Ordering};

use crate::noise::noise;
use stillframe::codec::Codec;
use stillframe::gc::GcStats;
use stillframe::source::{FileSource, LiveProcessSource};
use stillframe::store::StoreError;
use stillframe::verify::VerifyOptions;
use stillframe::{CaptureOptions, Error, GcOptions, Hash, SnapshotId, Store};

const REGION_BYTES: usize = 16 * 1024;
const SECRET: &[u8] = b"a key that the program wiped: 8c0f1e6f2a";

struct Vault {
    dir: tempfile::TempDir,
    store: Store,
}

impl Vault {
    fn new() -> Vault {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::options().codec(Codec::None).create(dir.path().join("store")).unwrap();
        Vault { dir, store }
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("store")
    }

    fn capture(&self, process: &str, memory: &[u8]) -> SnapshotId {
        self.store.process(process).capture(memory, &CaptureOptions::default()).unwrap().id
    }

    fn gc(&self, erase: bool) -> Result<GcStats, Error> {
        self.store.gc(&GcOptions::new().max_unused_percent(0).erase(erase))
    }

    /// The files that contain these bytes. The store is closed for the search, and opened again.
    fn find(&mut self, bytes: &[u8]) -> Vec<PathBuf> {
        let path = self.path();
        let elsewhere = Store::options().create(self.dir.path().join("other")).unwrap();
        drop(std::mem::replace(&mut self.store, elsewhere));
        let mut found = Vec::new();
        search(&path, bytes, &mut found);
        self.store = Store::open(&path).unwrap();
        std::fs::remove_dir_all(self.dir.path().join("other")).unwrap();
        found
    }

    fn assert_whole(&self, id: SnapshotId, memory: &[u8]) {
        assert!(self.store.restore(id).unwrap().into_mapping().unwrap()[..] == *memory);
        assert_eq!(self.store.verify(&VerifyOptions::default()).unwrap().problems, []);
    }
}

fn search(dir: &Path, bytes: &[u8], found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            search(&path, bytes, found);
        } else if std::fs::read(&path).unwrap().windows(bytes.len()).any(|window| window == bytes) {
            found.push(path);
        }
    }
}

/// The memory with the secret in it, and the same memory after the secret was wiped.
fn memories(seed: u64) -> (Vec<u8>, Vec<u8>) {
    let mut memory = noise(20 * REGION_BYTES, seed);
    let place = 7 * REGION_BYTES + 100..7 * REGION_BYTES + 100 + SECRET.len();
    memory[place.clone()].copy_from_slice(SECRET);
    let mut wiped = memory.clone();
    wiped[place].fill(0);
    (memory, wiped)
}

/// The hash of the region that contains the secret.
fn secret_hash(memory: &[u8]) -> Hash {
    Hash::of(&memory[7 * REGION_BYTES..8 * REGION_BYTES])
}

#[test]
fn what_a_process_has_wiped_and_forgotten_is_in_no_file() {
    let mut vault = Vault::new();
    let (memory, wiped) = memories(1);
    let first = vault.capture("p", &memory);
    let second = vault.capture("p", &wiped);
    let mut changed = wiped.clone();
    changed[12 * REGION_BYTES] ^= 1;
    changed[7 * REGION_BYTES] ^= 1;
    let third = vault.capture("p", &changed);
    vault.store.forget(&[first]).unwrap();
    vault.gc(false).unwrap();
    vault.gc(false).unwrap();
    assert!(!vault.find(SECRET).is_empty(), "a plain gc keeps it as the base of what is live");
    assert!(!vault.find(&secret_hash(&memory).0).is_empty());

    let would = vault.store.gc(&GcOptions::new().erase(true).dry_run(true)).unwrap();
    let stats = vault.gc(true).unwrap();
    assert!(
        stats.erased_bytes > REGION_BYTES as u64 && would.erased_bytes > REGION_BYTES as u64,
        "{stats:?}"
    );
    assert_eq!(vault.find(SECRET), [] as [PathBuf; 0]);
    assert_eq!(vault.find(&secret_hash(&memory).0), [] as [PathBuf; 0]);
    vault.assert_whole(second, &wiped);
    vault.assert_whole(third, &changed);
    let again = vault.gc(true).unwrap();
    assert_eq!((again.erased_bytes, again.packs_rewritten), (0, 0), "nothing is left to erase");
    // The packs alone give the same result.
    let path = vault.path();
    drop(vault.store);
    std::fs::remove_dir_all(path.join("index")).unwrap();
    vault.store = Store::open(&path).unwrap();
    vault.assert_whole(third, &changed);
    assert_eq!(vault.find(SECRET), [] as [PathBuf; 0]);
}

#[test]
fn what_one_process_forgets_does_not_stay_as_the_base_of_another_one() {
    let mut vault = Vault::new();
    let (memory, wiped) = memories(2);
    let alice = vault.capture("alice", &memory);
    let options = CaptureOptions::new().like("alice");
    let bob = vault.store.process("bob").capture(&wiped, &options).unwrap();
    assert_eq!(bob.delta_regions, 1);
    vault.store.forget(&[alice]).unwrap();
    vault.gc(false).unwrap();
    assert!(!vault.find(SECRET).is_empty());
    vault.gc(true).unwrap();
    assert_eq!(vault.find(SECRET), [] as [PathBuf; 0]);
    vault.assert_whole(bob.id, &wiped);
}

#[test]
fn names_labels_and_paths_of_what_is_forgotten_are_in_no_file() {
    let mut vault = Vault::new();
    let image = vault.dir.path().join("image-of-a-customer");
    std::fs::write(&image, noise(100_000, 3)).unwrap();
    let options = CaptureOptions::new().label("customer", "the first label");
    let taken = vault.store.process("a-telling-name").capture(&FileSource::new(&image), &options).unwrap();
    let kept = noise(50_000, 4);
    let other = vault.capture("other", &kept);
    let label = |id, value: &str| {
        vault.store.set_label(id, "customer", value).unwrap();
    };
    label(taken.id, "the second label");
    label(other, "a label that was replaced");
    label(other, "a label that stays");
    vault.store.forget(&[taken.id]).unwrap();
    let telling: [&[u8]; 6] = [
        b"a-telling-name",
        b"image-of-a-customer",
        b"the first label",
        b"the second label",
        b"a label that was replaced",
        &taken.id.0.0,
    ];
    for bytes in telling {
        assert!(!vault.find(bytes).is_empty(), "{}", String::from_utf8_lossy(bytes));
    }
    vault.gc(true).unwrap();
    for bytes in telling {
        assert_eq!(vault.find(bytes), [] as [PathBuf; 0], "{}", String::from_utf8_lossy(bytes));
    }
    vault.assert_whole(other, &kept);
    assert_eq!(vault.store.snapshot(other).unwrap().labels()["customer"], "a label that stays");
}

#[test]
fn what_may_hold_forgotten_bytes_and_is_no_part_of_the_store_is_refused_by_name() {
    let vault = Vault::new();
    let (memory, _) = memories(5);
    let first = vault.capture("p", &memory);
    let second = vault.capture("p", &noise(100_000, 6));
    vault.store.forget(&[first]).unwrap();
    for left in [
        "damaged/00000001.pack",
        "migration/packs",
        "packs/00000007.unfinished",
        "packs/x",
        "index.unfinished",
    ] {
        let before = listing(&vault.path());
        let path = vault.path().join(left);
        let dir = path.parent().unwrap();
        let is_new = !dir.exists();
        std::fs::create_dir_all(dir).unwrap();
        std::fs::write(&path, SECRET).unwrap();
        let error = vault.gc(true).unwrap_err();
        assert!(matches!(error, Error::Store(StoreError::CannotErase { .. })), "{left}: {error}");
        let named = left.split('/').next().unwrap();
        assert!(error.to_string().contains(named), "{left}: {error}");
        std::fs::remove_file(&path).unwrap();
        if is_new {
            std::fs::remove_dir(dir).unwrap();
        }
        assert_eq!(listing(&vault.path()), before, "nothing was changed");
    }
    // The same holds while a restore reads what is forgotten.
    let live = vault.store.restore(second).unwrap();
    vault.store.forget(&[second]).unwrap();
    let error = vault.gc(true).unwrap_err();
    assert!(error.to_string().contains("is being read"), "{error}");
    drop(live);
    assert!(vault.gc(true).unwrap().erased_bytes > memory.len() as u64);
}

#[test]
fn a_damaged_store_is_refused() {
    let vault = Vault::new();
    let (memory, wiped) = memories(7);
    let first = vault.capture("p", &memory);
    vault.capture("p", &wiped);
    vault.store.forget(&[first]).unwrap();
    let path = vault.path().join("packs/00000001.pack");
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[5000] ^= 1;
    std::fs::write(&path, bytes).unwrap();
    assert!(!vault.store.verify(&VerifyOptions::default()).unwrap().problems.is_empty());
    let error = vault.gc(true).unwrap_err();
    assert!(error.to_string().contains("the store has damage"), "{error}");
}

/// The files of a directory with their lengths.
fn listing(dir: &Path) -> Vec<(PathBuf, u64)> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        match path.is_dir() {
            true => files.extend(listing(&path)),
            false => files.push((path.clone(), path.metadata().unwrap().len())),
        }
    }
    files.sort();
    files
}

#[test]
fn captures_that_run_beside_an_erasing_gc_lose_nothing() {
    let vault = Vault::new();
    let ended = AtomicBool::new(false);
    let taken = std::thread::scope(|scope| {
        let captures: Vec<_> = (0..3u64)
            .map(|number| {
                let (vault, ended) = (&vault, &ended);
                scope.spawn(move || {
                    let process = format!("p{number}");
                    let mut memory = noise(30 * REGION_BYTES, number);
                    let mut taken: Vec<(SnapshotId, Vec<u8>)> = Vec::new();
                    let mut round = 0;
                    while !ended.load(Ordering::Relaxed) {
                        round += 1;
                        for at in 0..10 {
                            let place = ((round * 7 + at * 3) % 30) * REGION_BYTES + at;
                            memory[place] = memory[place].wrapping_add(1);
                        }
                        taken.push((vault.capture(&process, &memory), memory.clone()));
                        // Usually one from the middle is forgotten, so that bases without a
                        // snapshot remain.
                        if taken.len() > 4 {
                            let (id, _) = taken.remove(1);
                            vault.store.forget(&[id]).unwrap();
                        }
                    }
                    taken
                })
            })
            .collect();
        let mut collected = Vec::new();
        let erasing = |done: &Result<GcStats, Error>| done.as_ref().is_ok_and(|stats| stats.erased_bytes > 0);
        while collected.iter().filter(|done| erasing(done)).count() < 8 && collected.len() < 1000 {
            collected.push(vault.gc(true));
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        ended.store(true, Ordering::Relaxed);
        let collected: Vec<GcStats> = collected.into_iter().map(Result::unwrap).collect();
        assert!(collected.iter().any(|stats| stats.erased_bytes > 0));
        captures.into_iter().flat_map(|thread| thread.join().unwrap()).collect::<Vec<_>>()
    });
    vault.gc(true).unwrap();
    for (id, memory) in &taken {
        assert!(vault.store.restore(*id).unwrap().into_mapping().unwrap()[..] == memory[..]);
    }
    let (id, memory) = &taken[0];
    vault.assert_whole(*id, memory);
}

// ---- Owners -------------------------------------------------------------------------------------

/// Whether this process may become another user.
fn is_root() -> bool {
    let is_root = rustix::process::geteuid().is_root();
    if !is_root {
        crate::needs::passed_over("it needs root, to own files and to run programs as somebody else");
    }
    is_root
}

#[test]
fn a_first_snapshot_is_not_a_difference_from_what_another_user_owns() {
    if !is_root() {
        return;
    }
    let vault = Vault::new();
    let (memory, wiped) = memories(8);
    let image = |dir: &str, owner: u32, memory: &[u8]| {
        let dir = vault.dir.path().join(dir);
        std::fs::create_dir(&dir).unwrap();
        let path = dir.join("vm.img");
        std::fs::write(&path, memory).unwrap();
        chown(&path, Some(owner), None).unwrap();
        FileSource::new(path)
    };
    let capture = |process: &str, source: &FileSource, like: Option<&str>| {
        let mut options = CaptureOptions::new();
        options.like = like.map(str::to_owned);
        vault.store.process(process).capture(source, &options).unwrap().delta_regions
    };
    assert_eq!(capture("alice", &image("a", 12_001, &memory), None), 0);
    let mut others = [wiped.clone(), wiped.clone(), wiped];
    others.iter_mut().enumerate().for_each(|(at, memory)| memory[7 * REGION_BYTES + at] ^= 1);
    assert_eq!(capture("bob", &image("b", 12_002, &others[0]), None), 0);
    assert_eq!(capture("alice-too", &image("c", 12_001, &others[1]), None), 1);
    assert_eq!(capture("carol", &image("d", 12_003, &others[2]), Some("alice")), 1, "it was asked for");
}

/// A process that is killed when the test ends.
struct Program(Child);

impl Program {
    fn run_by(user: u32) -> Program {
        let mut command = Command::new("sleep");
        Program(command.arg("600").uid(user).gid(user).spawn().unwrap())
    }

    fn source(&self) -> LiveProcessSource {
        LiveProcessSource::new(self.0.id())
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_process_is_not_a_difference_from_one_that_another_user_runs() {
    if !is_root() {
        return;
    }
    let vault = Vault::new();
    let programs = [12_001, 12_002, 12_001].map(Program::run_by);
    // Gives the children time to execute their programs.
    std::thread::sleep(std::time::Duration::from_millis(300));
    let [alice, bob, alice_too] = [0, 1, 2].map(|at: usize| {
        let process = vault.store.process(format!("p{at}"));
        process.capture(&programs[at].source(), &CaptureOptions::default()).unwrap()
    });
    assert_eq!((alice.delta_regions, bob.delta_regions), (0, 0));
    assert!(alice_too.delta_regions > 0, "{alice_too:?}");
    let owner = vault.store.snapshot(bob.id).unwrap().attachment("owner").unwrap().unwrap();
    assert_eq!(owner, [12_002u32.to_le_bytes(), 12_002u32.to_le_bytes()].concat());
}

// ---- A disk that is nearly full -----------------------------------------------------------------

const MOUNTED: &str = "STILLFRAME_ERASE_MOUNTED";

#[test]
fn without_room_for_all_of_it_nothing_is_changed_and_the_error_says_how_much_is_needed() {
    let dir = tempfile::tempdir().unwrap();
    let mount = dir.path().to_str().unwrap().to_owned();
    let (mounted, program) = (format!("{MOUNTED}={mount}"), std::env::current_exe().unwrap());
    let test = ["--ignored", "--nocapture", "--exact", "erase::inside_a_small_file_system"];
    let arguments = [&[&*mount, "env", &mounted, program.to_str().unwrap()][..], &test].concat();
    let script = r#"mount -t tmpfs -o size=12m,mode=700 tmpfs "$0"; exec "$@""#;
    let Some(output) = crate::mount::mounting(script, &arguments) else { return };
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let (stdout, stderr) = (text(&output.stdout), text(&output.stderr));
    assert!(output.status.success() && stdout.contains("1 passed"), "{stdout}\n{stderr}");
}

#[test]
#[ignore = "the other starts it, where a small file system is mounted"]
fn inside_a_small_file_system() {
    let Some(mount) = std::env::var_os(MOUNTED).map(PathBuf::from) else { return };
    let path = mount.join("store");
    let store = Store::options().codec(Codec::None).create(&path).unwrap();
    let mut memory = noise(3 << 20, 1);
    let capture = |memory: &[u8]| store.process("p").capture(memory, &CaptureOptions::default()).unwrap().id;
    let first = capture(&memory);
    (0..memory.len()).step_by(REGION_BYTES).for_each(|at| memory[at] ^= 1);
    let second = capture(&memory);
    store.forget(&[first]).unwrap();
    // Room for what is stored whole, but not for a copy of it too.
    let filling = mount.join("filling");
    std::fs::write(&filling, vec![1; 4 << 20]).unwrap();
    let before = listing(&path.join("packs"));
    let options = GcOptions::new().erase(true);
    let error = store.gc(&options).unwrap_err();
    let Error::Store(StoreError::DiskFull { missing_bytes: Some(missing_bytes), .. }) = error else {
        panic!("{error:?}");
    };
    assert!((1 << 16..12 << 20).contains(&missing_bytes), "{missing_bytes}");
    assert_eq!(listing(&path.join("packs")), before);
    std::fs::remove_file(&filling).unwrap();
    assert!(store.gc(&options).unwrap().erased_bytes > 3 << 20);
    assert!(store.restore(second).unwrap().into_mapping().unwrap()[..] == memory[..]);
}

// ---- The command --------------------------------------------------------------------------------

#[test]
fn the_command_tells_what_it_erased() {
    let mut vault = Vault::new();
    let (memory, wiped) = memories(9);
    let first = vault.capture("p", &memory);
    vault.capture("p", &wiped);
    vault.store.forget(&[first]).unwrap();
    let path = vault.path();
    let other = Store::options().create(vault.dir.path().join("other")).unwrap();
    drop(std::mem::replace(&mut vault.store, other));
    let run = |arguments: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_stillframe"));
        let output = command.arg("--store").arg(&path).args(arguments).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    };
    let erased = |text: &str| {
        let object: serde_json::Value = serde_json::from_str(text).unwrap();
        object["erased_bytes"].as_u64().unwrap()
    };
    assert_eq!(erased(&run(&["--json", "gc", "--dry-run"])), 0);
    assert!(erased(&run(&["--json", "gc", "--erase", "--dry-run"])) > 0);
    assert!(erased(&run(&["--json", "gc", "--erase"])) > REGION_BYTES as u64);
    let mut found = Vec::new();
    search(&path, SECRET, &mut found);
    assert_eq!(found, [] as [PathBuf; 0]);
    assert!(run(&["gc", "--erase"]).contains("erased"));
    assert!(run(&["forget", "--help"]).contains("gc --erase"));
}
