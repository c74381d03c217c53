//! Who may open a store, read it and write it: one owner, or readers where nothing can be written,
//! and no other user.
//!
//! Where neither root nor a user namespace may mount, the tests of read-only and full file systems
//! print a line and pass over.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::{Arc, Mutex};

use crate::helper::{Done, Running, Vault, everything_below, noise};
use crate::mount::mounting;
use rustix::fs::Mode;
use stillframe::fault_injection::{Call, Witness, watch};
use stillframe::migrate::MigrateOptions;
use stillframe::repair::RepairOptions;
use stillframe::{CaptureOptions, GcOptions, Store};

const STILLFRAME: &str = env!("CARGO_BIN_EXE_stillframe");

fn done(output: Output) -> Done {
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    Done { code: output.status.code(), stdout: output.stdout, stderr: text(output.stderr) }
}

/// The content of a directory: for each path its mode, its modification time and its bytes.
fn content(dir: &Path) -> BTreeMap<PathBuf, (u32, i64, i64, Vec<u8>)> {
    let look = |path: PathBuf| {
        let found = fs::symlink_metadata(&path).unwrap();
        let bytes = if found.is_file() { fs::read(&path).unwrap() } else { Vec::new() };
        (path, (found.mode(), found.mtime(), found.mtime_nsec(), bytes))
    };
    everything_below(dir).into_iter().map(look).collect()
}

// Read-only file systems

/// Mounts $0 onto itself read-only, and runs the remaining arguments.
const READ_ONLY: &str = r#"mount --bind "$0" "$0"; mount -o remount,ro,bind "$0" "$0"; exec "$@""#;

fn read_only(vault: &Vault, before: &[&str], verb: &[&str]) -> Option<Done> {
    let store = vault.store();
    let mut arguments: Vec<&Path> = vec![&store];
    arguments.extend(before.iter().map(Path::new));
    arguments.extend([Path::new(STILLFRAME), Path::new("--store"), &store]);
    arguments.extend(verb.iter().map(Path::new));
    mounting(READ_ONLY, &arguments).map(done)
}

#[test]
fn a_store_on_a_read_only_file_system_is_read_and_not_changed() {
    let vault = Vault::new();
    let image = noise(300_000, 1);
    let file = vault.file("image", &image);
    vault.capture_file(&file, "p");
    // Everything that an owner would clean up: a torn tail, and an unfinished pack.
    let pack = vault.packs().remove(0);
    let mut bytes = fs::read(&pack).unwrap();
    bytes.extend([0; 136]);
    fs::write(&pack, bytes).unwrap();
    let unfinished = vault.store().join("packs/00000007.unfinished");
    fs::write(&unfinished, [0; 100]).unwrap();
    fs::set_permissions(&unfinished, fs::Permissions::from_mode(0o600)).unwrap();
    let back = vault.path("back").to_str().unwrap().to_owned();
    for has_lock in [true, false] {
        if !has_lock {
            fs::remove_file(vault.store().join("LOCK")).unwrap();
        }
        let before = content(&vault.store());
        for verb in [
            &["list"][..],
            &["show", "latest"],
            &["processes"],
            &["stats"],
            &["verify"],
            &["gc", "--dry-run"],
            &["repair", "--dry-run"],
            &["forget", "latest", "--dry-run"],
            &["restore", "latest", "--force", "--to", &back],
        ] {
            let Some(done) = read_only(&vault, &[], verb) else { return };
            assert_eq!((done.code, &*done.stderr), (Some(0), ""), "{verb:?}");
        }
        assert_eq!(fs::read(&back).unwrap(), image);
        assert_eq!(read_only(&vault, &[], &["cat", "latest"]).unwrap().stdout, image);
        for verb in [
            &["capture", "--file", &file][..],
            &["watch", "--", "true"],
            &["forget", "latest"],
            &["label", "latest", "a=b"],
            &["gc"],
            &["repair"],
            &["migrate"],
        ] {
            let done = read_only(&vault, &[], verb).unwrap();
            assert_eq!(done.code, Some(1), "{verb:?}: {}", done.stderr);
            assert!(done.stderr.contains("is read-only (its file system"), "{verb:?}: {}", done.stderr);
            assert_eq!(done.stderr.lines().count(), 1, "{verb:?}: {}", done.stderr);
        }
        assert!(content(&vault.store()) == before, "something was written");
    }
}

#[test]
fn readers_of_a_read_only_store_keep_no_reader_out_and_an_owner_keeps_them_out() {
    let vault = Vault::new();
    vault.capture_file(&vault.file("image", b"memory"), "p");
    let lock = vault.store().join("LOCK").to_str().unwrap().to_owned();
    let Some(beside_reader) = read_only(&vault, &["flock", "--shared", &lock], &["list"]) else { return };
    assert_eq!((beside_reader.code, &*beside_reader.stderr), (Some(0), ""));
    let beside_owner = read_only(&vault, &["flock", "--exclusive", &lock], &["list"]).unwrap();
    assert_eq!(beside_owner.code, Some(4), "{}", beside_owner.stderr);
}

// Full disks

#[test]
fn a_store_on_a_full_disk_opens_forgets_and_has_its_index_again_when_there_is_room() {
    let vault = Vault::new();
    let image = vault.path("image");
    fs::write(&image, noise(1_000_000, 2)).unwrap();
    let script = r#"
        stillframe="$1 --store $0/store"
        mount -t tmpfs -o size=8m,mode=700 tmpfs "$0"
        for process in a b c; do $stillframe capture --file "$2" --process $process -q; done
        rm -r "$0/store/index"
        dd if=/dev/zero of="$0/fill" bs=4096 2>/dev/null || true
        echo "full: $(df --output=avail "$0" | tail -1)" >&2
        $stillframe list
        $stillframe forget a@latest
        $stillframe verify
        $stillframe cat b@latest | cmp - "$2"
        if $stillframe capture --file "$1" --process d; then exit 99; fi
        [ ! -e "$0/store/index" ]
        rm "$0/fill"
        echo "room" >&2
        $stillframe list
        $stillframe gc
        echo "again" >&2
        $stillframe verify
        [ -e "$0/store/index/db" ]
        [ "$($stillframe list --json | grep -o '"id"' | wc -l)" = 2 ]
    "#;
    let mount = vault.path("mount");
    fs::create_dir(&mount).unwrap();
    let Some(output) = mounting(script, &[&mount, Path::new(STILLFRAME), &image]) else { return };
    let done = done(output);
    assert_eq!(done.code, Some(0), "{}\n{}", done.text(), done.stderr);
    let (full, rest) = done.stderr.split_once("room\n").unwrap();
    let (room, again) = rest.split_once("again\n").unwrap();
    assert_eq!(full.lines().next().unwrap().split_whitespace().last(), Some("0"), "{full}");
    let held = full.lines().filter(|line| line.contains("the index is held in memory")).count();
    assert_eq!(held, 5, "a line each: {full}");
    assert!(full.contains("stillframe: no space is left to write"), "{full}");
    assert_eq!(room.lines().count(), 1, "{room}");
    assert!(room.contains("the index is missing and is rebuilt"), "{room}");
    assert_eq!(again, "");
}

// Two owners

#[test]
fn the_lock_of_a_killed_owner_is_taken_over_silently() {
    let vault = Vault::new();
    let sleep = Running::sleep();
    let mut owner = vault.start(&["--json", "watch", "--every", "1h", "--pid", &sleep.pid_text()]);
    owner.line();
    vault.fails(4, &format!("is owned by process {}", owner.pid()), &["list"]);
    owner.kill();
    let listed = vault.run(&["list"]);
    assert_eq!((listed.code, &*listed.stderr), (Some(0), ""));
    sleep.kill();
}

// An index that does not open

#[test]
fn an_index_with_a_pipe_in_it_is_set_aside_unopened_and_rebuilt_with_one_line() {
    let vault = Vault::new();
    let image = noise(100_000, 3);
    vault.capture_file(&vault.file("image", &image), "p");
    let conf = vault.store().join("index/conf");
    fs::remove_file(&conf).unwrap();
    // Opening the pipe would block the database until a writer opens it.
    assert!(Command::new("mkfifo").arg("-m600").arg(&conf).status().unwrap().success());
    let output =
        Command::new(STILLFRAME).arg("--store").arg(vault.store()).args(["cat", "latest"]).output().unwrap();
    let done = done(output);
    assert_eq!((done.code, done.stdout == image), (Some(0), true), "{}", done.stderr);
    assert_eq!(done.stderr.lines().count(), 1, "{}", done.stderr);
    assert!(done.stderr.contains("conf is a FIFO"), "{}", done.stderr);
    assert!(vault.store().join("damaged/index/conf").exists());
    assert_eq!(vault.run(&["list"]).stderr, "");
}

#[test]
fn whatever_becomes_of_the_files_of_the_index_costs_one_line_and_a_rebuild() {
    let vault = Vault::new();
    vault.text(&["init", "--region-size", "512"]);
    let image = noise(8_000_000, 4);
    let file = vault.file("image", &image);
    vault.capture_file(&file, "p");
    let whole: Vec<(PathBuf, Vec<u8>)> = everything_below(&vault.store().join("index"))
        .into_iter()
        .filter(|path| path.is_file())
        .map(|path| (path.clone(), fs::read(&path).unwrap()))
        .collect();
    let db = whole.iter().find(|(path, _)| path.ends_with("db")).unwrap();
    assert!(db.1.len() > 500_000, "it has many blocks");
    let mut damages: Vec<(&Path, Vec<u8>)> = Vec::new();
    for (path, bytes) in &whole {
        damages.push((path, bytes[..bytes.len() / 2].to_vec()));
        damages.push((path, vec![0; bytes.len()]));
        for part in 1..8 {
            let mut flipped = bytes.clone();
            flipped[bytes.len() * part / 8] ^= 0x10;
            damages.push((path, flipped));
        }
    }
    for (path, bytes) in damages {
        let _ = fs::remove_dir_all(vault.store().join("index"));
        fs::create_dir(vault.store().join("index")).unwrap();
        for (path, bytes) in &whole {
            fs::write(path, bytes).unwrap();
        }
        fs::write(path, &bytes).unwrap();
        assert!(Command::new("chmod").arg("-R").arg("go=").arg(vault.store()).status().unwrap().success());
        let done = vault.run(&["cat", "latest"]);
        assert_eq!((done.code, done.stdout == image), (Some(0), true), "{path:?}: {}", done.stderr);
        assert!(done.stderr.lines().count() <= 1, "{path:?}: {}", done.stderr);
        let again = vault.run(&["list"]);
        assert_eq!((again.code, &*again.stderr), (Some(0), ""), "{path:?}");
    }
}

// Other users

/// A witness that checks the mode of every file and directory as soon as it exists.
#[derive(Default)]
struct Modes(Mutex<Vec<String>>);

impl Witness for Modes {
    fn call(&self, call: &Call<'_>, act: &mut dyn FnMut() -> io::Result<()>) -> io::Result<()> {
        act()?;
        if let Call::Create(path) | Call::CreateDir(path) = call {
            let mode = fs::symlink_metadata(path)?.mode() & 0o777;
            let expected = if path.is_dir() { 0o700 } else { 0o600 };
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            self.0.lock().unwrap().push(format!("{name} {mode:o}"));
            assert_eq!(mode, expected, "{path:?}");
        }
        Ok(())
    }
}

/// The umask belongs to the whole process, so this test runs in a child process.
#[test]
fn every_file_is_private_from_its_first_moment_whatever_the_umask() {
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "owners::without_a_umask", "--ignored"])
        .env(WITHOUT_A_UMASK, "1")
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && said.contains("1 passed"), "{output:?}");
}

const WITHOUT_A_UMASK: &str = "STILLFRAME_OWNERS_WITHOUT_A_UMASK";

#[test]
#[ignore = "another test starts it, in a process of its own"]
fn without_a_umask() {
    if std::env::var_os(WITHOUT_A_UMASK).is_none() {
        return;
    }
    rustix::process::umask(Mode::empty());
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("store");
    let modes = Arc::new(Modes::default());
    let watching = watch(&path, modes.clone());
    let assert_private = || {
        for path in everything_below(&path) {
            let mode = fs::symlink_metadata(&path).unwrap().mode() & 0o777;
            assert_eq!(mode, if path.is_dir() { 0o700 } else { 0o600 }, "{path:?}");
        }
    };
    let store = Store::options().create(&path).unwrap();
    for seed in 0..2 {
        store.process("p").capture(&noise(500_000, seed), &CaptureOptions::default()).unwrap();
    }
    let first = store.process("p").snapshots()[0].id();
    store.forget(&[first]).unwrap();
    store.gc(&GcOptions::default()).unwrap();
    drop(store);
    assert_private();
    let index_db = path.join("index/db");
    fs::write(&index_db, b"damaged").unwrap();
    fs::set_permissions(&index_db, fs::Permissions::from_mode(0o600)).unwrap();
    Store::repair(&path, &RepairOptions::default()).unwrap();
    assert_private();
    drop(watching);
    let seen = modes.0.lock().unwrap().join(", ");
    for name in ["store", "packs", "index", "FORMAT.new", "LOCK", "damaged", "00000001.unfinished"] {
        assert!(seen.contains(name), "{name} is not among {seen}");
    }
}

#[test]
fn a_symbolic_link_in_the_place_of_a_file_is_not_followed_on_write() {
    let dir = tempfile::tempdir().unwrap();
    let new_store = |name: &str| {
        let path = dir.path().join(name);
        let store = Store::options().create(&path).unwrap();
        store.process("p").capture(&noise(100_000, 5), &CaptureOptions::default()).unwrap();
        drop(store);
        path
    };
    for (number, place) in [
        "FORMAT",
        "FORMAT.new",
        "LOCK",
        "packs",
        "packs/00000001.pack",
        "packs/00000002.pack",
        "packs/00000002.unfinished",
        "index",
        "index/durable",
        "index.unfinished",
        "damaged",
        "migration",
    ]
    .into_iter()
    .enumerate()
    {
        let store = new_store(&format!("store-{number}"));
        let (path, target) = (store.join(place), dir.path().join(format!("target-{number}")));
        // The file now lies where the link points, as an attacker would arrange it.
        match (path.is_dir(), path.exists()) {
            (true, _) => fs::rename(&path, &target).unwrap(),
            (_, true) => fs::rename(&path, &target).unwrap(),
            _ if place == "damaged" || place == "migration" || place == "index.unfinished" => {
                fs::create_dir(&target).unwrap();
                fs::write(target.join("precious"), "precious").unwrap();
            }
            _ => fs::write(&target, "precious").unwrap(),
        }
        let mode = if target.is_dir() { 0o755 } else { 0o644 };
        fs::set_permissions(&target, fs::Permissions::from_mode(mode)).unwrap();
        symlink(&target, &path).unwrap();
        let before = content(&target);
        // Whether the operations succeed does not matter here.
        if let Ok(store) = Store::open(&store) {
            let _ = store.process("p").capture(&noise(200_000, 6), &CaptureOptions::default());
            let _ = store.process("p").latest().map(|id| store.forget(&[id]));
            let _ = store.gc(&GcOptions::default());
        }
        let _ = Store::repair(&store, &RepairOptions::default());
        let _ = Store::migrate(&store, &MigrateOptions::new());
        assert!(content(&target) == before, "{place} was followed");
    }
}

#[test]
fn a_store_that_others_may_read_is_warned_of_once() {
    let vault = Vault::new();
    vault.capture_file(&vault.file("image", b"memory"), "p");
    let pack = vault.packs().remove(0);
    for path in [vault.store(), vault.store().join("FORMAT"), vault.store().join("packs"), pack] {
        let closed = fs::metadata(&path).unwrap().permissions();
        fs::set_permissions(&path, fs::Permissions::from_mode(closed.mode() | 0o040)).unwrap();
        let done = vault.run(&["list"]);
        assert_eq!((done.code, done.stderr.lines().count()), (Some(0), 1), "{}", done.stderr);
        assert!(done.stderr.contains("WARN") && done.stderr.contains("chmod -R go= "), "{}", done.stderr);
        assert!(
            done.stderr.contains(&format!("{} is open to other users", path.display())),
            "{}",
            done.stderr
        );
        let mended = Command::new("chmod").args(["-R", "go="]).arg(vault.store()).status().unwrap();
        assert!(mended.success());
        assert_eq!(vault.run(&["list"]).stderr, "");
    }
}
