//! Where a store lies: moved while it is open, received from another user, on file systems with
//! fewer features, under an exhausted quota, and read-only by its modes.
//!
//! Where FUSE, mounting or root is missing, the test passes over and prints a line.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use crate::ended::output_of;
use crate::mount::mounting;
use crate::needs::{needs, passed_over};
use crate::noise::noise;
use stillframe::store::StoreError;
use stillframe::{CaptureOptions, Error, GcOptions, SnapshotId, Store};

const STILLFRAME: &str = env!("CARGO_BIN_EXE_stillframe");

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

fn run(store: &Path, arguments: &[&str]) -> Output {
    output_of(Command::new(STILLFRAME).arg("--store").arg(store).args(arguments))
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[track_caller]
fn done(output: Output) -> String {
    assert!(output.status.success(), "{:?}: {}", output.status, stderr(&output));
    String::from_utf8(output.stdout).unwrap()
}

fn capture(store: &Store, process: &str, seed: u64) -> Result<SnapshotId, Error> {
    let memory = noise(200_000, seed);
    store.process(process).capture(&memory[..], &CaptureOptions::default()).map(|taken| taken.id)
}

fn is_there(store: &Store, id: SnapshotId, seed: u64) -> bool {
    store
        .restore(id)
        .and_then(|restore| restore.into_mapping())
        .is_ok_and(|map| map[..] == noise(200_000, seed)[..])
}

fn packs(store: &Path) -> Vec<PathBuf> {
    let mut packs: Vec<_> =
        fs::read_dir(store.join("packs")).unwrap().map(|entry| entry.unwrap().path()).collect();
    packs.sort();
    packs
}

// Moved

#[test]
fn an_open_store_that_was_moved_leaves_the_one_in_its_place_alone() {
    let dir = tempfile::tempdir().unwrap();
    let (path, moved) = (dir.path().join("vault"), dir.path().join("moved"));
    let ours = Store::options().create(&path).unwrap();
    let first = capture(&ours, "p", 1).unwrap();
    let second = capture(&ours, "p", 2).unwrap();
    fs::rename(&path, &moved).unwrap();
    let other = Store::options().create(&path).unwrap();
    let theirs: Vec<_> = (10..13).map(|seed| (capture(&other, "q", seed).unwrap(), seed)).collect();
    let before: Vec<_> = packs(&path).iter().map(|pack| fs::read(pack).unwrap()).collect();

    let is_moved = |error: &Error| matches!(error, Error::Store(StoreError::Moved { .. }));
    assert!(ours.forget(&[first]).is_err_and(|error| is_moved(&error)));
    assert!(ours.gc(&GcOptions::new().max_unused_percent(0)).is_err_and(|error| is_moved(&error)));
    assert!(capture(&ours, "p", 3).is_err_and(|error| is_moved(&error)));
    assert!(is_there(&ours, second, 2), "what is in it can be read all the same");
    drop(ours);

    let after: Vec<_> = packs(&path).iter().map(|pack| fs::read(pack).unwrap()).collect();
    assert_eq!(after, before);
    drop(other);
    let other = Store::open(&path).unwrap();
    assert!(theirs.iter().all(|(id, seed)| is_there(&other, *id, *seed)));
    assert!(other.verify(&Default::default()).unwrap().problems.is_empty());
    let ours = Store::open(&moved).unwrap();
    assert!(is_there(&ours, first, 1) && is_there(&ours, second, 2));
}

#[test]
fn a_lock_that_somebody_removes_lets_no_second_program_in() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("vault");
    let store = Store::options().create(&path).unwrap();
    let mut taken = vec![(capture(&store, "p", 1).unwrap(), 1)];
    fs::remove_file(path.join("LOCK")).unwrap();
    assert_eq!(run(&path, &["list"]).status.code(), Some(4));
    taken.push((capture(&store, "p", 2).unwrap(), 2));
    drop(store);
    let store = Store::open(&path).unwrap();
    assert!(taken.iter().all(|(id, seed)| is_there(&store, *id, *seed)));
}

// Received from another user

/// A store next to files that must not change.
struct Given {
    dir: tempfile::TempDir,
    store: PathBuf,
    precious: PathBuf,
}

fn given() -> Given {
    let dir = tempfile::tempdir().unwrap();
    let (store, precious) = (dir.path().join("given"), dir.path().join("precious"));
    let open = Store::options().create(&store).unwrap();
    capture(&open, "p", 1).unwrap();
    drop(open);
    fs::create_dir(&precious).unwrap();
    fs::write(precious.join("file"), "precious").unwrap();
    Given { dir, store, precious }
}

const VERBS: [&[&str]; 12] = [
    &["list"],
    &["show", "latest"],
    &["cat", "latest"],
    &["verify"],
    &["stats"],
    &["label", "latest", "a=b"],
    &["repair", "--dry-run"],
    &["migrate"],
    &["repair"],
    &["forget", "--keep-last", "1"],
    &["gc"],
    &["list"],
];

impl Given {
    /// Everything outside of the store, with its metadata and content.
    fn outside(&self) -> Vec<(PathBuf, u32, Vec<u8>)> {
        let mut found = Vec::new();
        let mut dirs = vec![self.dir.path().to_owned()];
        while let Some(dir) = dirs.pop() {
            for entry in fs::read_dir(&dir).unwrap() {
                let path = entry.unwrap().path();
                if path == self.store {
                    continue;
                }
                let metadata = path.symlink_metadata().unwrap();
                let bytes = if metadata.is_file() { fs::read(&path).unwrap() } else { Vec::new() };
                if metadata.is_dir() {
                    dirs.push(path.clone());
                }
                found.push((path, metadata.mode(), bytes));
            }
        }
        found.sort();
        found
    }

    /// Runs all verbs. Each may succeed or fail, but must end.
    fn nothing_outside_changes(&self) {
        let before = self.outside();
        for verb in VERBS {
            let output = run(&self.store, verb);
            assert!(output.status.code().is_some(), "{verb:?} did not end");
            assert_eq!(self.outside(), before, "after {verb:?}: {}", stderr(&output));
        }
    }
}

#[test]
fn a_link_in_the_place_of_a_migration_moves_nothing_of_another_store() {
    let given = given();
    let other = given.dir.path().join("other");
    drop(Store::options().create(&other).unwrap());
    symlink(&other, given.store.join("migration")).unwrap();
    given.nothing_outside_changes();
    let told = stderr(&run(&given.store, &["list"]));
    assert!(told.contains("migration is in the way: it is a symbolic link and no directory"), "{told}");
    fs::remove_file(given.store.join("migration")).unwrap();
    done(run(&given.store, &["verify"]));
    done(run(&other, &["verify"]));
}

#[test]
fn another_store_in_the_place_of_a_migration_does_not_replace_the_store() {
    let given = given();
    drop(Store::options().create(given.store.join("migration")).unwrap());
    let told = stderr(&run(&given.store, &["list"]));
    assert!(told.contains("there is another store in it"), "{told}");
    fs::rename(given.store.join("migration"), given.dir.path().join("other")).unwrap();
    assert!(done(run(&given.store, &["list", "-q"])).len() > 10);
}

#[test]
fn links_inside_of_the_index_and_in_place_of_every_name_are_not_followed() {
    for name in [
        "index/conf",
        "index/db",
        "index/blobs/7",
        "index/snap.0000000000000000",
        "index/durable",
        "index.unfinished",
    ] {
        for target in ["precious/file", "precious/new", "precious"] {
            let given = given();
            let at = given.store.join(name);
            let _ = fs::remove_file(&at);
            fs::create_dir_all(at.parent().unwrap()).unwrap();
            symlink(given.dir.path().join(target), &at).unwrap();
            given.nothing_outside_changes();
            done(run(&given.store, &["verify"]));
        }
    }
    for name in [
        "LOCK",
        "FORMAT",
        "FORMAT.new",
        "packs",
        "index",
        "damaged",
        "packs/00000001.pack",
        "packs/00000002.pack",
        "packs/00000002.unfinished",
    ] {
        let given = given();
        let at = given.store.join(name);
        if at.is_dir() {
            fs::remove_dir_all(&at).unwrap();
        } else {
            let _ = fs::remove_file(&at);
        }
        symlink(
            if name.contains('.') || name == "LOCK" {
                given.precious.join("file")
            } else {
                given.precious.clone()
            },
            &at,
        )
        .unwrap();
        given.nothing_outside_changes();
    }
}

#[test]
fn files_with_a_name_elsewhere_are_not_changed_there() {
    for name in [
        "LOCK",
        "FORMAT.new",
        "index/conf",
        "index/db",
        "index/durable",
        "damaged/REPORT.txt",
        "packs/00000002.pack",
    ] {
        let given = given();
        let at = given.store.join(name);
        let _ = fs::remove_file(&at);
        fs::create_dir_all(at.parent().unwrap()).unwrap();
        fs::set_permissions(given.precious.join("file"), fs::Permissions::from_mode(0o644)).unwrap();
        fs::hard_link(given.precious.join("file"), &at).unwrap();
        given.nothing_outside_changes();
    }
}

#[test]
fn a_backup_of_hard_links_stays_as_it_was_and_both_are_stores() {
    let dir = tempfile::tempdir().unwrap();
    let (path, backup) = (dir.path().join("vault"), dir.path().join("backup"));
    let store = Store::options().create(&path).unwrap();
    let first = capture(&store, "p", 1).unwrap();
    let copy = || assert!(Command::new("cp").arg("-al").arg(&path).arg(&backup).status().unwrap().success());
    // Once while the store is open, and once while it is not.
    copy();
    let content = || packs(&backup).iter().map(|pack| fs::read(pack).unwrap()).collect::<Vec<_>>();
    let before = content();
    let second = capture(&store, "p", 2).unwrap();
    drop(store);
    assert_eq!(content(), before);
    fs::remove_dir_all(&backup).unwrap();
    copy();
    // The tail that a crash left is cut in the store, but not in the backup.
    let newest = packs(&path).pop().unwrap();
    let tail = fs::OpenOptions::new().append(true).open(&newest).unwrap();
    std::io::Write::write_all(&mut &tail, &[0; 100]).unwrap();
    let before = content();
    let store = Store::open(&path).unwrap();
    let third = capture(&store, "p", 3).unwrap();
    assert_eq!(content(), before);
    for (id, seed) in [(first, 1), (second, 2), (third, 3)] {
        assert!(is_there(&store, id, seed));
    }
    store.forget(&[first]).unwrap();
    store.gc(&GcOptions::new().max_unused_percent(0)).unwrap();
    assert!(store.verify(&Default::default()).unwrap().problems.is_empty());
    assert_eq!(content(), before);
    drop(store);
    let backup = Store::open(&backup).unwrap();
    assert!(is_there(&backup, first, 1) && is_there(&backup, second, 2));
    capture(&backup, "p", 4).unwrap();
    drop(backup);
    assert!(is_there(&Store::open(&path).unwrap(), third, 3));
}

#[test]
fn a_pipe_or_a_directory_in_the_place_of_a_pack_keeps_nobody_waiting() {
    let given = given();
    let fifo = given.store.join("packs/00000007.pack");
    assert!(Command::new("mkfifo").arg(&fifo).status().unwrap().success());
    fs::create_dir(given.store.join("packs/00000008.pack")).unwrap();
    given.nothing_outside_changes();
    assert!(!fifo.exists(), "repair has set it aside");
    done(run(&given.store, &["verify"]));
    let report = fs::read_to_string(given.store.join("damaged/REPORT.txt")).unwrap();
    assert!(report.contains("it is a FIFO and no plain file"), "{report}");
}

#[test]
fn root_is_kept_from_a_directory_of_another_user_unless_it_trusts_him() {
    if !is_root() {
        return passed_over("it needs to be root");
    }
    let given = given();
    std::os::unix::fs::chown(&given.store, Some(12_345), None).unwrap();
    for verb in VERBS {
        let output = run(&given.store, verb);
        assert_eq!(output.status.code(), Some(1), "{verb:?}");
        assert!(stderr(&output).contains("belongs to the user with id 12345"), "{}", stderr(&output));
    }
    for verb in VERBS {
        let output = run(&given.store, &[verb, &["--trust-owner"]].concat());
        assert!(output.status.success(), "{verb:?}: {}", stderr(&output));
    }
    let empty = given.dir.path().join("empty");
    fs::create_dir(&empty).unwrap();
    std::os::unix::fs::chown(&empty, Some(12_345), None).unwrap();
    assert!(matches!(
        Store::options().create(&empty),
        Err(StoreError::OwnedByOther { owner_uid: 12_345, .. })
    ));
    assert_eq!(fs::read_dir(&empty).unwrap().count(), 0);
    Store::options().trust_owner(true).create(&empty).unwrap();
}

#[test]
fn a_restore_replaces_plain_files_only() {
    let given = given();
    let at = |name: &str| given.dir.path().join(name);
    assert!(Command::new("mkfifo").arg(at("fifo")).status().unwrap().success());
    symlink(given.precious.join("file"), at("link")).unwrap();
    symlink(given.precious.join("new"), at("dangling")).unwrap();
    let _socket = std::os::unix::net::UnixListener::bind(at("socket")).unwrap();
    let mut names = vec!["fifo", "link", "dangling", "socket", "precious"];
    if is_root() && Command::new("mknod").arg(at("null")).args(["c", "1", "3"]).status().unwrap().success() {
        names.push("null");
    }
    let before = given.outside();
    for name in names {
        for to in ["--to", "--core"] {
            let path = at(name);
            let output = run(&given.store, &["restore", "latest", to, path.to_str().unwrap(), "--force"]);
            assert_eq!(output.status.code(), Some(6), "{name}: {}", stderr(&output));
            assert_eq!(given.outside(), before, "{name}");
        }
    }
    fs::write(at("plain"), "old").unwrap();
    done(run(&given.store, &["restore", "latest", "--to", at("plain").to_str().unwrap(), "--force"]));
    assert_eq!(fs::read(at("plain")).unwrap(), noise(200_000, 1));
}

// Read-only by modes

#[test]
fn a_store_that_is_read_only_by_its_modes_or_immutable_is_read() {
    let given = given();
    // A directory that other users can reach, in case this test is not root.
    fs::set_permissions(given.dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let change = |program: &str, how: &str| {
        Command::new(program)
            .args(["-R", how])
            .arg(&given.store)
            .output()
            .is_ok_and(|output| output.status.success())
    };
    let reads = |command: &dyn Fn(&[&str]) -> Output| {
        for verb in [&["list"][..], &["show", "latest"], &["cat", "latest"], &["verify"], &["stats"]] {
            let output = command(verb);
            assert!(output.status.success(), "{verb:?}: {}", stderr(&output));
        }
        for verb in [&["label", "latest", "a=b"][..], &["gc"], &["forget", "latest"]] {
            let output = command(verb);
            assert_eq!(output.status.code(), Some(1), "{verb:?}");
            assert!(stderr(&output).contains("is read-only"), "{}", stderr(&output));
        }
    };
    if is_root() {
        match change("chattr", "+i") {
            true => {
                let tried = std::panic::catch_unwind(|| reads(&|verb| run(&given.store, verb)));
                assert!(change("chattr", "-i"));
                tried.unwrap();
            }
            false => passed_over("no file can be made immutable here (chattr, Debian package e2fsprogs)"),
        }
    }
    if !is_root() {
        assert!(change("chmod", "a-w"));
        reads(&|verb| run(&given.store, verb));
        assert!(change("chmod", "u+w"));
        return;
    }
    let command = given.dir.path().join("stillframe");
    fs::copy(STILLFRAME, &command).unwrap();
    assert!(Command::new("chown").args(["-R", "12345:12345"]).arg(&given.store).status().unwrap().success());
    assert!(change("chmod", "a-w"));
    let as_owner = |verb: &[&str]| {
        let mut as_owner = Command::new("setpriv");
        as_owner.args(["--reuid", "12345", "--regid", "12345", "--clear-groups"]).arg(&command);
        as_owner.arg("--store").arg(&given.store).args(verb).output().unwrap()
    };
    reads(&as_owner);
}

// File systems with fewer features

/// Runs the remaining arguments under a seccomp filter, in which some system calls fail as they do
/// on a file system without them. The first argument selects the calls.
const LIMIT: &str = r#"
#include <errno.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <stddef.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>
#define CALL(n, e) BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, n, 0, 1), BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | (e))
#define LOAD(what) BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, what))
#define ALLOW BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW)
#ifndef SYS_link
#define SYS_link -1
#endif
#ifndef SYS_chmod
#define SYS_chmod -1
#endif
int install(struct sock_filter *f, unsigned short n) {
    struct sock_fprog p = { n, f };
    return prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) || prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &p);
}
#define INSTALL(...) do { struct sock_filter f[] = { LOAD(nr), __VA_ARGS__, ALLOW }; \
    if (install(f, sizeof f / sizeof f[0])) return 77; } while (0)
int main(int c, char **v) {
    if (strstr(v[1], "link")) INSTALL(CALL(SYS_link, EPERM), CALL(SYS_linkat, EPERM));
    if (strstr(v[1], "many")) INSTALL(CALL(SYS_link, EMLINK), CALL(SYS_linkat, EMLINK));
    if (strstr(v[1], "rename")) INSTALL(CALL(SYS_renameat2, EINVAL));
    if (strstr(v[1], "flock")) INSTALL(CALL(SYS_flock, EOPNOTSUPP));
    if (strstr(v[1], "mode"))
        INSTALL(CALL(SYS_chmod, EPERM), CALL(SYS_fchmod, EPERM), CALL(SYS_fchmodat, EPERM), CALL(452, EPERM));
    execvp(v[2], v + 2);
    return 77;
}
"#;

/// The compiled program, if `cc` is there.
fn limit(dir: &Path) -> Option<PathBuf> {
    if !needs(&["cc"]) {
        return None;
    }
    let (source, program) = (dir.join("limit.c"), dir.join("limit"));
    fs::write(&source, LIMIT).unwrap();
    assert!(Command::new("cc").arg("-o").arg(&program).arg(&source).status().unwrap().success());
    match Command::new(&program).args(["rename", "true"]).status().unwrap().success() {
        true => Some(program),
        false => {
            passed_over("system calls cannot be filtered here (seccomp)");
            None
        }
    }
}

/// Uses a store at `at` with every verb. `program` and the arguments in `before` run the command.
pub(crate) fn every_verb_works(at: &Path, program: &Path, before: &[&str]) {
    let store = at.join("vault");
    let run = |arguments: &[&str]| {
        let mut command = Command::new(program);
        output_of(command.args(before).arg("--store").arg(&store).args(arguments))
    };
    let name = |name: &str| at.join(name).to_str().unwrap().to_owned();
    let image = name("image");
    fs::write(&image, noise(300_000, 1)).unwrap();
    done(run(&["init"]));
    done(run(&["capture", "--file", &image, "--process", "p"]));
    fs::write(&image, noise(300_000, 2)).unwrap();
    done(run(&["capture", "--file", &image, "--process", "p"]));
    done(run(&["label", "latest", "a=b"]));
    for verb in [
        &["list"][..],
        &["processes"],
        &["show", "latest"],
        &["diff", "p~1", "p@latest"],
        &["stats"],
        &["migrate"],
    ] {
        done(run(verb));
    }
    done(run(&["restore", "latest", "--to", &name("new")]));
    assert_eq!(fs::read(name("new")).unwrap(), noise(300_000, 2));
    let again = run(&["restore", "latest", "--to", &name("new")]);
    assert_eq!(again.status.code(), Some(6), "{}", stderr(&again));
    done(run(&["restore", "p~1", "--to", &name("new"), "--force"]));
    assert_eq!(fs::read(name("new")).unwrap(), noise(300_000, 1));
    assert_eq!(run(&["cat", "latest"]).stdout, noise(300_000, 2));
    done(run(&["forget", "p~1"]));
    done(run(&["gc", "--max-unused", "0"]));
    done(run(&["verify"]));
    // The index is rewritten and replaces the old one.
    fs::write(&image, noise(300_000, 3)).unwrap();
    done(run(&["capture", "--file", &image, "--process", "q"]));
    done(run(&["forget", "q@latest"]));
    done(run(&["gc", "--erase"]));
    assert!(done(run(&["verify"])).contains("all in order"));
    assert_eq!(run(&["cat", "latest"]).stdout, noise(300_000, 2));
    fs::write(&image, noise(300_000, 2)).unwrap();
    let pack = packs(&store).pop().unwrap();
    let mut bytes = fs::read(&pack).unwrap();
    bytes[3000] ^= 1;
    fs::write(&pack, bytes).unwrap();
    for _ in 0..2 {
        let output = run(&["repair"]);
        assert!([Some(0), Some(5)].contains(&output.status.code()), "{}", stderr(&output));
    }
    assert!(fs::read_dir(store.join("damaged")).unwrap().count() >= 2, "the pack and the report");
    done(run(&["capture", "--file", &image, "--process", "p"]));
    assert_eq!(run(&["cat", "latest"]).stdout, noise(300_000, 2));
    let mut left: Vec<_> = fs::read_dir(at).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    left.sort();
    assert_eq!(left, ["image", "new", "vault"]);
}

#[test]
fn without_second_names_or_renaming_flags_or_modes_every_verb_works() {
    let dir = tempfile::tempdir().unwrap();
    let Some(limit) = limit(dir.path()) else { return };
    for lacks in ["link", "many", "rename", "mode", "link+rename+mode"] {
        let at = dir.path().join(lacks);
        fs::create_dir(&at).unwrap();
        every_verb_works(&at, &limit, &[lacks, STILLFRAME]);
    }
    let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/format-1/store");
    let store = dir.path().join("old");
    assert!(Command::new("cp").arg("-r").arg(fixture).arg(&store).status().unwrap().success());
    for verb in ["migrate", "verify"] {
        let mut command = Command::new(&limit);
        done(output_of(command.args(["link+rename", STILLFRAME, "--store"]).arg(&store).arg(verb)));
    }
}

#[test]
fn without_locks_there_can_be_no_store_and_nothing_is_left_of_one() {
    let dir = tempfile::tempdir().unwrap();
    let Some(limit) = limit(dir.path()) else { return };
    let store = dir.path().join("vault");
    let output =
        output_of(Command::new(&limit).args(["flock", STILLFRAME, "--store"]).arg(&store).arg("init"));
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("without file locks (flock)"), "{}", stderr(&output));
    assert!(!store.exists());
}

/// Mounts the directory $0/below at $0/mounted with bindfs, a file system in user space without
/// rename flags, and runs the remaining arguments there.
const BINDFS: &str = r#"bindfs "$0/below" "$0/mounted"; trap 'umount -l "$0/mounted"' EXIT; STILLFRAME_TEST_MOUNTED="$0/mounted" "$@""#;

#[test]
#[ignore = "it is the process that the next test starts in a mount of its own"]
fn every_verb_works_where_it_is_mounted() {
    let Some(mounted) = std::env::var_os("STILLFRAME_TEST_MOUNTED") else { return };
    every_verb_works(Path::new(&mounted), Path::new(STILLFRAME), &[]);
}

#[test]
fn on_a_file_system_in_user_space_every_verb_works() {
    if !needs(&["bindfs"]) || !is_root() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join("below")).unwrap();
    fs::create_dir(dir.path().join("mounted")).unwrap();
    let Some(may) = mounting(r#"bindfs "$0/below" "$0/mounted" && umount "$0/mounted""#, &[dir.path()])
    else {
        return;
    };
    if !may.status.success() {
        return passed_over("FUSE cannot be mounted here");
    }
    let this = std::env::current_exe().unwrap();
    let test = ["--exact", "places::every_verb_works_where_it_is_mounted", "--ignored"].map(Path::new);
    let output = mounting(BINDFS, &[&[dir.path(), &this], &test[..]].concat()).unwrap();
    assert!(output.status.success(), "{}{}", String::from_utf8_lossy(&output.stdout), stderr(&output));
    assert!(String::from_utf8_lossy(&output.stdout).contains("1 passed"));
}

// Quotas

/// Makes a file system of $0 with a quota of 24 MiB for the directory `store`, and fills that with
/// $1, $2 and so on.
const QUOTA: &str = r#"
mount -o loop "$0/disk" "$0/mounted"
btrfs quota enable "$0/mounted"
btrfs subvolume create "$0/mounted/limited" > "$0/told"
btrfs qgroup limit 24M "$0/mounted/limited"
"$1" --store "$0/mounted/limited/vault" init -q > "$0/told"
full=; n=0
while [ $n -lt 40 ]; do
  n=$((n+1)); head -c 2000000 /dev/urandom > "$0/memory"
  if ! "$1" --store "$0/mounted/limited/vault" capture --file "$0/memory" --process p -q > "$0/told" 2>&1; then full=yes; break; fi
done
[ -n "$full" ] || { echo "it is never full"; exit 9; }
# All is in one pack: while any of it is needed gc must copy that before it can free anything, and says so.
for verb in list "show latest" "verify" "stats" "restore latest --to $0/image" "cat latest" "forget --keep-last 2" list \
    "forget p~1 p~0" gc list "capture --file $0/memory --process p"; do
  "$1" --store "$0/mounted/limited/vault" $verb > "$0/told" 2> "$0/why" || { echo "$verb: $(cat "$0/why")"; exit 8; }
done
"#;

#[test]
fn a_quota_that_is_used_up_is_a_full_disk_and_what_is_stored_can_be_read_and_forgotten() {
    if !needs(&["mkfs.btrfs"]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let disk = dir.path().join("disk");
    fs::File::create(&disk).unwrap().set_len(300 << 20).unwrap();
    fs::create_dir(dir.path().join("mounted")).unwrap();
    assert!(Command::new("mkfs.btrfs").arg("-q").arg(&disk).status().unwrap().success());
    let Some(may) =
        mounting(r#"mount -o loop "$0/disk" "$0/mounted" && btrfs quota enable "$0/mounted""#, &[dir.path()])
    else {
        return;
    };
    if !may.status.success() {
        return passed_over("no btrfs with quotas can be mounted from a file here");
    }
    let output = mounting(QUOTA, &[dir.path(), Path::new(STILLFRAME)]).unwrap();
    assert!(output.status.success(), "{}{}", String::from_utf8_lossy(&output.stdout), stderr(&output));
}
