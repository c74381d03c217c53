//! A store in a temporary directory, the command run on it, and processes to capture.

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tempfile::TempDir;

use crate::ended::output_of;

/// A store that need not exist yet, next to other files of the same test.
pub(crate) struct Vault {
    directory: TempDir,
}

/// Exit code and output of a command that has ended.
#[derive(Debug)]
pub(crate) struct Done {
    pub(crate) code: Option<i32>,
    pub(crate) stdout: Vec<u8>,
    pub(crate) stderr: String,
}

impl Vault {
    pub(crate) fn new() -> Vault {
        Vault { directory: tempfile::tempdir().unwrap() }
    }

    /// The path of the store.
    pub(crate) fn store(&self) -> PathBuf {
        self.path("store")
    }

    /// A path next to the store.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Writes a file next to the store and returns its path as an argument.
    pub(crate) fn file(&self, name: &str, bytes: &[u8]) -> String {
        fs::write(self.path(name), bytes).unwrap();
        self.path(name).to_str().unwrap().to_owned()
    }

    /// Runs the command to its end.
    pub(crate) fn run(&self, arguments: &[&str]) -> Done {
        let mut command = Command::new(env!("CARGO_BIN_EXE_stillframe"));
        let output = output_of(command.arg("--store").arg(self.store()).args(arguments));
        Done {
            code: output.status.code(),
            stdout: output.stdout,
            stderr: String::from_utf8(output.stderr).unwrap(),
        }
    }

    /// Runs the command, which must succeed, and returns what it printed.
    #[track_caller]
    pub(crate) fn text(&self, arguments: &[&str]) -> String {
        let done = self.run(arguments);
        assert_eq!(done.code, Some(0), "{arguments:?}: {}", done.stderr);
        done.text()
    }

    /// Runs the command with --json, which must succeed, and returns the document that it printed.
    #[track_caller]
    pub(crate) fn json(&self, arguments: &[&str]) -> Value {
        serde_json::from_str(&self.text(&[&["--json"], arguments].concat())).unwrap()
    }

    /// Runs the command twice, with and without --json. Both runs must fail with `code` and one
    /// error that contains `expected`, and must print nothing else.
    #[track_caller]
    pub(crate) fn fails(&self, code: i32, expected: &str, arguments: &[&str]) {
        for arguments in [arguments.to_vec(), [&["--json"], arguments].concat()] {
            let done = self.run(&arguments);
            assert_eq!(done.code, Some(code), "{arguments:?}: {}", done.stderr);
            assert_eq!(done.text(), "", "{arguments:?}");
            let mut lines = done.stderr.lines();
            let first = lines.next().unwrap_or_default();
            assert!(first.starts_with("stillframe: "), "{arguments:?}: {}", done.stderr);
            assert!(
                done.stderr.contains(expected),
                "{arguments:?}: expected {expected:?} in {}",
                done.stderr
            );
            assert!(!done.stderr.contains("panicked"), "{arguments:?}: {}", done.stderr);
            if code != 2 {
                let indented = lines.all(|line| line.starts_with("    "));
                assert!(indented, "{arguments:?}: causes are indented: {}", done.stderr);
            }
        }
    }

    /// Captures a file and returns the snapshot's id.
    pub(crate) fn capture_file(&self, file: &str, process: &str) -> String {
        let capture = self.json(&["capture", "--file", file, "--process", process]);
        capture["id"].as_str().unwrap().to_owned()
    }

    /// Starts the command in the background.
    pub(crate) fn start(&self, arguments: &[&str]) -> Running {
        let mut command = Command::new(env!("CARGO_BIN_EXE_stillframe"));
        command.arg("--store").arg(self.store()).args(arguments);
        Running::start(command)
    }

    /// The packs of the store.
    pub(crate) fn packs(&self) -> Vec<PathBuf> {
        fs::read_dir(self.store().join("packs")).unwrap().map(|entry| entry.unwrap().path()).collect()
    }
}

impl Done {
    pub(crate) fn text(&self) -> String {
        String::from_utf8(self.stdout.clone()).unwrap()
    }
}

/// A process in the background. Dropping this kills it.
pub(crate) struct Running {
    child: Child,
    /// `None` after [`Running::close_stdout`].
    stdout: Option<BufReader<ChildStdout>>,
}

impl Running {
    pub(crate) fn start(mut command: Command) -> Running {
        let mut child =
            command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let stdout = child.stdout.take().map(BufReader::new);
        Running { child, stdout }
    }

    /// A program that sleeps for a long time.
    pub(crate) fn sleep() -> Running {
        let mut command = Command::new("sleep");
        command.arg("600");
        Running::start(command)
    }

    /// A Python program.
    pub(crate) fn python(program: &str) -> Running {
        let mut command = Command::new("python3");
        command.args(["-c", program]);
        Running::start(command)
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The pid as an argument.
    pub(crate) fn pid_text(&self) -> String {
        self.pid().to_string()
    }

    /// The next line that it prints.
    pub(crate) fn line(&mut self) -> String {
        let mut line = String::new();
        self.stdout.as_mut().unwrap().read_line(&mut line).unwrap();
        line.trim_end().to_owned()
    }

    /// Waits until the process has installed a handler for a signal.
    pub(crate) fn wait_until_it_handles(&self, signal: Signal) {
        let bit = 1 << (signal.as_raw() - 1);
        loop {
            let status = fs::read_to_string(format!("/proc/{}/status", self.pid())).unwrap();
            let caught = status.lines().find_map(|line| line.strip_prefix("SigCgt:")).unwrap();
            if u64::from_str_radix(caught.trim(), 16).unwrap() & bit != 0 {
                return;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Waits until the process has a pack open. Returns false if it ended before that.
    pub(crate) fn wait_until_it_reads_packs(&mut self) -> bool {
        while self.child.try_wait().unwrap().is_none() {
            let maps = fs::read_to_string(format!("/proc/{}/maps", self.pid())).unwrap_or_default();
            if maps.contains(".pack") {
                return true;
            }
            std::thread::sleep(Duration::from_micros(200));
        }
        false
    }

    pub(crate) fn signal(&self, signal: Signal) {
        let pid = Pid::from_raw(i32::try_from(self.pid()).unwrap()).unwrap();
        kill_process(pid, signal).unwrap();
    }

    /// Stops reading its output.
    pub(crate) fn close_stdout(&mut self) {
        self.stdout = None;
    }

    /// Waits until it ends.
    pub(crate) fn wait(mut self) -> Done {
        let mut stdout = Vec::new();
        if let Some(mut out) = self.stdout.take() {
            out.read_to_end(&mut stdout).unwrap();
        }
        let mut stderr = String::new();
        self.child.stderr.take().unwrap().read_to_string(&mut stderr).unwrap();
        let status = self.child.wait().unwrap();
        Done { code: status.code(), stdout, stderr }
    }

    /// Kills the process and reaps it.
    pub(crate) fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The keys of a JSON object.
#[track_caller]
pub(crate) fn keys(object: &Value) -> BTreeSet<&str> {
    object.as_object().unwrap().keys().map(String::as_str).collect()
}

/// Asserts that the object has exactly these keys, which are separated by blanks.
#[track_caller]
pub(crate) fn has_keys(object: &Value, expected: &str) {
    assert_eq!(keys(object), expected.split_whitespace().collect(), "{object}");
}

/// Bytes that do not compress.
pub(crate) fn noise(length_bytes: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(2).wrapping_add(1);
    let mut bytes = Vec::with_capacity(length_bytes + 8);
    while bytes.len() < length_bytes {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        bytes.extend_from_slice(&(state >> 16).to_le_bytes()[..4]);
    }
    bytes.truncate(length_bytes);
    bytes
}

/// A path and all files and directories below it.
pub(crate) fn everything_below(path: &Path) -> Vec<PathBuf> {
    let mut found = vec![path.to_owned()];
    if path.is_dir() {
        for entry in fs::read_dir(path).unwrap() {
            found.extend(everything_below(&entry.unwrap().path()));
        }
    }
    found
}
