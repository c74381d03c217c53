//! What a test needs besides a Rust toolchain and `cc`. A test that does not find it passes over
//! and prints a line that says what is missing. Where [`ALL`] is set, as `.ci/run` does, a missing
//! tool that a package provides is a failure.

use std::collections::BTreeSet;
use std::io::Write;
use std::sync::Mutex;

/// Set where every tool is installed: a test that would pass over because a tool is missing fails.
const ALL: &str = "STILLFRAME_ALL_TESTS";

/// Tools and libraries by name, each with its Debian package.
const PACKAGES: [(&str, &str); 27] = [
    ("bindfs", "bindfs"),
    ("cc", "gcc"),
    ("ecj", "ecj"),
    ("fuse3", "libfuse3-dev"),
    ("fusermount3", "fuse3"),
    ("gcore", "gdb"),
    ("gdb", "gdb"),
    ("go", "golang-go"),
    ("gzip", "gzip"),
    ("java", "default-jre-headless"),
    ("javac", "default-jdk-headless"),
    ("lz4", "lz4"),
    ("mkfs.btrfs", "btrfs-progs"),
    ("mkfs.ext4", "e2fsprogs"),
    ("mount", "mount"),
    ("node", "nodejs"),
    ("pkg-config", "pkg-config"),
    ("postgres", "postgresql"),
    ("psql", "postgresql-client"),
    ("python3", "python3"),
    ("readelf", "binutils"),
    ("redis-server", "redis-server"),
    ("sbcl", "sbcl"),
    ("setpriv", "util-linux"),
    ("strace", "strace"),
    ("unshare", "util-linux"),
    ("zstd", "zstd"),
];

/// Whether these tools are installed. If not, this has printed what is missing, and the test must
/// return.
#[must_use]
pub(crate) fn needs(tools: &[&str]) -> bool {
    let missing: Vec<String> =
        tools.iter().filter(|tool| !is_there(tool)).map(|tool| described(tool)).collect();
    missing.is_empty() || miss(&missing.join(", "))
}

/// Whether a C library is installed, by its name for pkg-config. pkg-config itself must be
/// installed.
#[must_use]
pub(crate) fn needs_library(library: &str) -> bool {
    let found = std::process::Command::new("pkg-config").arg("--exists").arg(library).status();
    found.is_ok_and(|found| found.success()) || miss(&described(library))
}

fn miss(missing: &str) -> bool {
    assert!(std::env::var_os(ALL).is_none(), "{ALL} is set, and there is no {missing}");
    passed_over(&format!("it needs {missing}"));
    false
}

/// Prints that a test passes over because this machine lacks an ability that no package provides,
/// such as mounting or write protection of memory. That is never a failure. Each test prints it
/// once.
pub(crate) fn passed_over(why: &str) {
    static SAID: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());
    let thread = std::thread::current();
    let line = format!("passed over: {}: {why}\n", thread.name().unwrap_or("a test"));
    if SAID.lock().unwrap().insert(line.clone()) {
        // Written to the descriptor, because the test harness hides what a passing test prints.
        let _ = std::io::stderr().write_all(line.as_bytes());
    }
}

pub(crate) fn is_there(tool: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    // The path of a user may lack the directories of root's programs.
    let places = std::env::split_paths(&path).chain(["/usr/sbin".into(), "/sbin".into()]);
    places.map(|place| place.join(tool)).any(|file| file.is_file())
}

fn described(tool: &str) -> String {
    match PACKAGES.iter().find(|(name, _)| *name == tool) {
        Some((_, package)) => format!("{tool} (Debian package {package})"),
        None => tool.to_owned(),
    }
}
