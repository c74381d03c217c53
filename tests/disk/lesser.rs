//! File systems with fewer features: a real one in user space, `lesser_fs.c`, lacks one feature at
//! a time.
//!
//! Where FUSE, its library or mounting is missing, these tests pass over and print a line.

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::fs::{CWD, FallocateFlags, RenameFlags, fallocate, renameat_with};
use rustix::io::Errno;
use stillframe::{CaptureOptions, Store};

use crate::ended::output_of;
use crate::mount::mounting;
use crate::needs::{needs, needs_library, passed_over};
use crate::noise::noise;
use crate::places::every_verb_works;

const STILLFRAME: &str = env!("CARGO_BIN_EXE_stillframe");

/// The feature that the file system lacks, as `lesser_fs.c` names it.
const LACKS: &str = "STILLFRAME_TEST_LACKS";
const MOUNTED: &str = "STILLFRAME_TEST_MOUNTED";

/// Mounts the directory $0/below at $0/mounted without the feature $1, and runs the remaining
/// arguments there. It is unmounted in any case; otherwise the file system would keep itself and
/// the namespace alive.
const MOUNT: &str = r#"
"$0/lesser_fs" "$1" "$0/below" "$0/mounted"
trap 'umount -l "$0/mounted"' EXIT
export STILLFRAME_TEST_LACKS="$1" STILLFRAME_TEST_MOUNTED="$0/mounted"
shift
"$@"
"#;

/// The file system, ready to be mounted.
struct Lesser(tempfile::TempDir);

impl Lesser {
    /// `None` where it cannot be built.
    fn get() -> Option<Lesser> {
        if !needs(&["cc", "pkg-config"]) || !needs_library("fuse3") {
            return None;
        }
        let dir = tempfile::tempdir().unwrap();
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/disk/lesser_fs.c");
        let flags = Command::new("pkg-config").args(["--cflags", "--libs", "fuse3"]).output().unwrap();
        let flags = String::from_utf8(flags.stdout).unwrap();
        let mut compiler = Command::new("cc");
        compiler.args(["-Wall", "-Wextra", "-Werror", "-o"]).arg(dir.path().join("lesser_fs")).arg(source);
        assert!(compiler.args(flags.split_whitespace()).status().unwrap().success());
        for name in ["below", "mounted"] {
            fs::create_dir(dir.path().join(name)).unwrap();
        }
        let may = mounting(MOUNT, &[dir.path(), Path::new("nothing"), Path::new("true")])?;
        if !may.status.success() {
            let why = String::from_utf8_lossy(&may.stderr);
            passed_over(&format!("FUSE cannot be mounted here: {}", why.lines().next().unwrap_or_default()));
            return None;
        }
        Some(Lesser(dir))
    }

    /// Runs one of the tests below on the file system without this feature.
    fn run(&self, lacks: &str, test: &str) {
        let below = self.0.path().join("below");
        fs::remove_dir_all(&below).unwrap();
        fs::create_dir(&below).unwrap();
        let this = std::env::current_exe().unwrap();
        let test = format!("lesser::{test}");
        let test = ["--exact", &test, "--ignored", "--nocapture"].map(Path::new);
        let arguments = [&[self.0.path(), Path::new(lacks), &this], &test[..]].concat();
        let output = mounting(MOUNT, &arguments).unwrap();
        let told = String::from_utf8_lossy(&output.stdout);
        let why = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "without {lacks}: {told}{why}");
        assert!(told.contains("1 passed"), "without {lacks}: {told}");
    }
}

/// The directory in which this process works, and the missing feature.
fn mounted() -> Option<(PathBuf, String)> {
    let mounted = std::env::var_os(MOUNTED)?;
    Some((mounted.into(), std::env::var(LACKS).unwrap()))
}

/// The kernel's result for each call that the file system may lack.
fn answers(at: &Path) -> Vec<(&'static str, Result<(), Errno>)> {
    let name = |name: &str| at.join(name);
    fs::write(name("one"), "one").unwrap();
    let file = fs::File::options().read(true).write(true).open(name("one")).unwrap();
    let code = |error: io::Error| Errno::from_io_error(&error).unwrap();
    let lock = || match file.try_lock() {
        Err(fs::TryLockError::Error(error)) => Err(code(error)),
        other => {
            other.unwrap();
            file.unlock().map_err(code)
        }
    };
    let shared = || memmap2::MmapOptions::new().map_raw_read_only(&file).map(drop).map_err(code);
    let renamed = || renameat_with(CWD, name("one"), CWD, name("two"), RenameFlags::NOREPLACE);
    let found = vec![
        ("link", fs::hard_link(name("one"), name("link")).map_err(code)),
        ("fsyncdir", fs::File::open(at).unwrap().sync_all().map_err(code)),
        ("lock", lock()),
        ("fallocate", fallocate(&file, FallocateFlags::KEEP_SIZE, 0, 5000)),
        ("shared", shared()),
        ("mode", file.set_permissions(fs::Permissions::from_mode(0o600)).map_err(code)),
        ("rename", renamed()),
    ];
    for left in ["one", "two", "link"] {
        let _ = fs::remove_file(name(left));
    }
    found
}

/// Asserts that the file system lacks this feature and no other.
fn lacks_this_and_no_more(at: &Path, lacks: &str) {
    let is_said: &[(&str, &str, Errno)] = &[
        ("link", "link", Errno::PERM),
        ("rename", "rename", Errno::INVAL),
        ("fsyncdir", "fsyncdir", Errno::INVAL),
        ("nosyncdir", "fsyncdir", Errno::OPNOTSUPP),
        ("flock", "lock", Errno::OPNOTSUPP),
        ("nolock", "lock", Errno::NOSYS),
        ("fallocate", "fallocate", Errno::OPNOTSUPP),
        ("shared", "shared", Errno::NODEV),
        ("mode", "mode", Errno::PERM),
    ];
    for (ability, answer) in answers(at) {
        let mut lacking = lacks.split('+').filter_map(|lack| is_said.iter().find(|said| said.0 == lack));
        let expected = match lacking.find(|said| said.1 == ability) {
            Some((_, _, error)) => Err(*error),
            None => Ok(()),
        };
        assert_eq!(answer, expected, "{ability}, where {lacks} is lacking");
    }
}

#[test]
#[ignore = "it is the process that the tests below start in a mount of its own"]
fn every_verb_works_without_this() {
    let Some((at, lacks)) = mounted() else { return };
    lacks_this_and_no_more(&at, &lacks);
    every_verb_works(&at, Path::new(STILLFRAME), &[]);
    a_store_without_an_index_is_opened(&at);
    a_pack_that_grows_while_it_is_mapped_is_read(&at);
}

fn a_store_without_an_index_is_opened(at: &Path) {
    let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/format-1/store");
    let store = at.join("old");
    assert!(Command::new("cp").arg("-r").arg(fixture).arg(&store).status().unwrap().success());
    for verb in ["list", "migrate", "verify"] {
        let output = output_of(Command::new(STILLFRAME).arg("--store").arg(&store).arg(verb));
        assert!(output.status.success(), "{verb}: {}", String::from_utf8_lossy(&output.stderr));
    }
}

/// Each capture ends within a page that is mapped already, because the capture before was read.
fn a_pack_that_grows_while_it_is_mapped_is_read(at: &Path) {
    let store = Store::options().create(at.join("library")).unwrap();
    let memory = |seed: u64| noise(700 + seed as usize * 10, seed);
    let mut taken = Vec::new();
    for seed in 0..40 {
        let process = store.process(format!("p{}", seed % 3));
        taken.push((process.capture(&memory(seed)[..], &CaptureOptions::default()).unwrap().id, seed));
        for (id, seed) in taken.iter().rev().take(4) {
            let restored = store.restore(*id).unwrap().into_mapping().unwrap();
            assert_eq!(restored[..], memory(*seed)[..], "{seed}");
        }
    }
    assert!(store.verify(&Default::default()).unwrap().problems.is_empty());
}

#[test]
#[ignore = "it is the process that a test below starts in a mount of its own"]
fn nothing_is_left_of_a_store_without_locks() {
    let Some((at, lacks)) = mounted() else { return };
    lacks_this_and_no_more(&at, &lacks);
    let store = at.join("vault");
    let run = |verb: &str| output_of(Command::new(STILLFRAME).arg("--store").arg(&store).arg(verb));
    let refused = |verb: &str| {
        let output = run(verb);
        let why = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(1), "{verb}: {why}");
        assert!(why.contains("without file locks (flock)"), "{verb}: {why}");
    };
    refused("init");
    assert_eq!(fs::read_dir(&at).unwrap().count(), 0);
    // An existing directory stays, and remains empty.
    fs::create_dir(&store).unwrap();
    refused("init");
    assert_eq!(fs::read_dir(&store).unwrap().count(), 0);
    // A store that was made elsewhere is not changed.
    let elsewhere = tempfile::tempdir().unwrap();
    drop(Store::options().create(elsewhere.path().join("vault")).unwrap());
    fs::remove_dir(&store).unwrap();
    let copied = Command::new("cp").arg("-r").arg(elsewhere.path().join("vault")).arg(&store).status();
    assert!(copied.unwrap().success());
    refused("list");
    let same = Command::new("diff").arg("-r").arg(elsewhere.path().join("vault")).arg(&store).output();
    let same = same.unwrap();
    assert!(same.status.success(), "{}", String::from_utf8_lossy(&same.stdout));
}

#[test]
fn on_a_file_system_without_one_ability_every_verb_works() {
    let Some(lesser) = Lesser::get() else { return };
    for lacks in [
        "nothing",
        "link",
        "rename",
        "fsyncdir",
        "nosyncdir",
        "fallocate",
        "shared",
        "mode",
        "remove",
        "inode",
        "late",
    ] {
        lesser.run(lacks, "every_verb_works_without_this");
    }
}

#[test]
fn on_a_file_system_that_lacks_all_but_locks_every_verb_works() {
    let Some(lesser) = Lesser::get() else { return };
    let all = "link+rename+fsyncdir+fallocate+shared+mode+remove+inode";
    lesser.run(all, "every_verb_works_without_this");
}

#[test]
fn on_a_file_system_without_locks_a_store_is_refused_and_nothing_is_left_of_it() {
    let Some(lesser) = Lesser::get() else { return };
    for lacks in ["flock", "nolock"] {
        lesser.run(lacks, "nothing_is_left_of_a_store_without_locks");
    }
}
