//! Real runtimes under load, rolled back in place. They continue from the captured moment, or the
//! rollback is refused and they continue unchanged.
//!
//! The programs are those of `benches/runtimes`. Several threads move money between accounts and
//! produce garbage. Ten times a second a program checks the sum of all accounts and prints
//! `tick N`. If the sum is wrong it prints `WRONG` and ends. So a rollback was right if the next
//! tick follows the tick of the capture, and the ticks continue without a gap.
//!
//! A refusal is not a failure: memory that a collector has unmapped cannot be restored. But a
//! refusal must have its exit code and leave the program unchanged, and some rollbacks of each
//! runtime must succeed.

use std::ffi::OsStr;
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::rollback::Vault;
use crate::needs::{is_there, needs, passed_over};

/// How many rollbacks of each runtime are tried, for long runs. If it is not set, a test ends after
/// the first rollback that succeeds, and fails after a fixed number of refusals.
const ROLLBACKS: &str = "STILLFRAME_ROLLBACKS";
pub(super) const AT_MOST: usize = 12;

/// How many ticks are between a capture and its rollback. This is more than [`UNREAD`], so that the
/// ticks visibly go back.
const BETWEEN: usize = 8;

/// How many ticks a program may have printed by the end of a capture that have not been read yet.
/// There is at most one, unless the machine is very busy.
const UNREAD: u64 = 4;

/// How many ticks are observed after a rollback: two seconds.
const AFTERWARDS: usize = 20;

/// No two ticks are this far apart, even on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);

// ---- The runtimes -------------------------------------------------------------------------------

#[test]
fn a_c_program_with_threads_signals_and_handled_faults_goes_on() {
    if !needs(&["cc"]) {
        return;
    }
    let built = tempfile::tempdir().unwrap();
    let program = built.path().join("bank");
    let mut cc = Command::new("cc");
    succeeds(cc.args(["-O1", "-pthread", "-o"]).arg(&program).arg(source("bank.c")));
    goes_back("C", bank(&program));
}

#[test]
fn a_cpython_with_threads_and_a_timer_goes_on() {
    if !needs(&["python3"]) {
        return;
    }
    let mut command = bank("python3");
    command.arg(source("bank.py"));
    goes_back("CPython", command);
}

#[test]
fn a_jvm_with_g1_that_handles_null_pointers_goes_on() {
    let Some(classes) = java_classes() else { return };
    // Its second compiler replaces a null check that traps with one that does not.
    goes_back("JVM, G1", java(classes.path(), &["-XX:+UseG1GC", "-XX:TieredStopAtLevel=1"]));
}

#[test]
fn a_jvm_with_zgc_whose_heap_is_a_memfd_goes_on() {
    let Some(classes) = java_classes() else { return };
    goes_back("JVM, ZGC", java(classes.path(), &["-XX:+UseZGC"]));
}

#[test]
fn a_go_program_with_goroutines_that_handle_nil_pointers_goes_on() {
    if !needs(&["go"]) {
        return;
    }
    let built = tempfile::tempdir().unwrap();
    let program = built.path().join("bank");
    let mut go = Command::new("go");
    go.args(["build", "-o"]).arg(&program).arg(source("bank.go"));
    go.env("GO111MODULE", "off").env("GOFLAGS", "");
    // Newer versions of Go compile their library at the first build.
    go.env("GOCACHE", Path::new(env!("CARGO_TARGET_TMPDIR")).join("go"));
    succeeds(&mut go);
    goes_back("Go", bank(&program));
}

#[test]
fn a_node_goes_on() {
    if !needs(&["node"]) {
        return;
    }
    let mut command = bank("node");
    command.arg(source("bank.js"));
    goes_back("Node", command);
}

#[test]
fn an_sbcl_whose_collector_stops_threads_by_signals_goes_on() {
    if !needs(&["sbcl"]) {
        return;
    }
    let mut command = bank("sbcl");
    command.args(["--dynamic-space-size", "256", "--script"]).arg(source("bank.lisp"));
    goes_back("SBCL", command);
}

#[test]
fn a_node_whose_loop_has_an_io_uring_is_refused_by_name_and_works_on() {
    if !needs(&["node"]) {
        return;
    }
    let mut command = bank("node");
    command.arg(source("bank.js")).env("UV_USE_IO_URING", "1");
    let mut bank = Bank::start(command);
    let descriptors = fs::read_dir(format!("/proc/{}/fd", bank.pid())).unwrap();
    let targets = descriptors.filter_map(|descriptor| fs::read_link(descriptor.unwrap().path()).ok());
    if !targets.into_iter().any(|target| target.as_os_str() == "anon_inode:[io_uring]") {
        return passed_over("it needs io_uring and a Node that works with it (of 20.3 to 20.20)");
    }
    let vault = Vault::new();
    match round(&vault, &mut bank) {
        Outcome::Refused(why) if why.contains("io_uring") && why.contains("--leave-devices") => {}
        other => panic!("{other:?}"),
    }
}

// ---- One rollback -------------------------------------------------------------------------------

#[derive(Debug)]
enum Outcome {
    WentOn,
    /// Refused, with the text of standard error.
    Refused(String),
}

/// Rolls a program back several times. Fails unless each rollback was right or refused.
#[track_caller]
fn goes_back(name: &str, command: Command) {
    let tries = tries();
    let vault = Vault::new();
    let mut bank = Bank::start(command);
    let (mut right, mut refused) = (0, Vec::new());
    for _ in 0..tries.unwrap_or(AT_MOST) {
        match round(&vault, &mut bank) {
            Outcome::WentOn => right += 1,
            Outcome::Refused(why) => refused.push(why),
        }
        if tries.is_none() && right > 0 {
            break;
        }
    }
    println!("{name}: {right} went on right, {} refused", refused.len());
    refused.iter().for_each(|why| println!("    {}", why.trim_end()));
    assert!(right > 0, "{name}: all are refused: {refused:#?}");
}

/// How many rollbacks are requested.
pub(super) fn tries() -> Option<usize> {
    std::env::var(ROLLBACKS).ok().map(|tries| tries.parse().unwrap())
}

/// Captures a program, lets it run, rolls it back, and checks its output.
#[track_caller]
fn round(vault: &Vault, bank: &mut Bank) -> Outcome {
    let pid = bank.pid().to_string();
    let then = bank.ticks().len();
    let first = *bank.ticks().last().unwrap();
    let id = capture(vault, &pid);
    let last = *bank.ticks().last().unwrap();
    bank.wait_for_tick(last + UNREAD);
    bank.wait_for_more(BETWEEN);
    let refusal = rollback(vault, &id, &pid);
    // Ticks that were printed before and are read only now are fewer than this.
    bank.wait_for_more(AFTERWARDS);

    let ticks = bank.ticks();
    let new = &ticks[then - 1..];
    let steps = new.windows(2).filter(|pair| pair[1] != pair[0] + 1);
    let steps: Vec<(u64, u64)> = steps.map(|pair| (pair[0], pair[1])).collect();
    let expected = first..=last + UNREAD;
    match (refusal, &steps[..]) {
        (Some(why), []) => Outcome::Refused(why),
        (None, [(_, to)]) if expected.contains(to) => Outcome::WentOn,
        (refusal, steps) => panic!(
            "captured at tick {expected:?}, then {}; it went from tick to tick {steps:?}: {new:?}",
            refusal.as_deref().unwrap_or("rolled back")
        ),
    }
}

/// Returns the snapshot's id. At some moments a capture of a process that starts threads or
/// programs may be refused.
#[track_caller]
pub(super) fn capture(vault: &Vault, pid: &str) -> String {
    let mut why = String::new();
    for _ in 0..5 {
        let output = vault.run(&["--json", "capture", "--pid", pid, "--process", "p"]);
        why = String::from_utf8(output.stderr).unwrap();
        match output.status.code() {
            Some(0) => {
                let done: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
                return done["id"].as_str().unwrap().to_owned();
            }
            Some(6) => {}
            code => panic!("exit code {code:?}: {why}"),
        }
    }
    panic!("five captures were refused: {why}")
}

/// The reason of a refusal, or `None`.
#[track_caller]
pub(super) fn rollback(vault: &Vault, id: &str, pid: &str) -> Option<String> {
    let output = vault.run(&["rollback", id, "--pid", pid, "--leave-new-memory"]);
    let stderr = String::from_utf8(output.stderr).unwrap();
    match output.status.code() {
        Some(0) => None,
        Some(6) => Some(stderr),
        code => panic!("exit code {code:?}: {stderr}"),
    }
}

// ---- Programs -----------------------------------------------------------------------------------

/// A program of `benches/runtimes` at work.
struct Bank {
    child: Child,
    said: Arc<Mutex<Said>>,
}

#[derive(Default)]
struct Said {
    ticks: Vec<u64>,
    /// All other output: a runtime that fails prints the reason.
    others: String,
    has_ended: bool,
}

impl Bank {
    fn start(mut command: Command) -> Bank {
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().unwrap();
        let output = child.stdout.take().unwrap();
        let said = Arc::new(Mutex::new(Said::default()));
        let for_reader = Arc::clone(&said);
        std::thread::spawn(move || read(output, &for_reader));
        let mut bank = Bank { child, said };
        bank.wait_for_more(8);
        bank
    }

    fn pid(&self) -> u32 {
        self.child.id()
    }

    fn ticks(&self) -> Vec<u64> {
        self.said.lock().unwrap().ticks.clone()
    }

    #[track_caller]
    fn wait_for_more(&mut self, ticks: usize) {
        let wanted = self.ticks().len() + ticks;
        self.wait_until(|ticks| ticks.len() >= wanted);
    }

    #[track_caller]
    fn wait_for_tick(&mut self, tick: u64) {
        self.wait_until(|ticks| ticks.last().is_some_and(|last| *last >= tick));
    }

    #[track_caller]
    fn wait_until(&mut self, is_enough: impl Fn(&[u64]) -> bool) {
        let (mut count, mut since) = (0, Instant::now());
        loop {
            let said = self.said.lock().unwrap();
            let others = &said.others;
            assert!(!others.contains("WRONG") && !said.has_ended, "it is wrong, or has ended: {others}");
            if is_enough(&said.ticks) {
                return;
            }
            if said.ticks.len() > count {
                (count, since) = (said.ticks.len(), Instant::now());
            }
            assert!(since.elapsed() < PATIENCE, "it hangs after {:?}: {others}", said.ticks.last());
            drop(said);
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Bank {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn read(output: ChildStdout, said: &Mutex<Said>) {
    for line in BufReader::new(output).split(b'\n').map_while(Result::ok) {
        let line = String::from_utf8_lossy(&line);
        let tick = line.strip_prefix("tick ").and_then(|tick| tick.trim_end().parse().ok());
        let mut said = said.lock().unwrap();
        match tick {
            Some(tick) => said.ticks.push(tick),
            None => said.others.extend([&line, "\n"]),
        }
    }
    said.lock().unwrap().has_ended = true;
}

fn source(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/runtimes").join(name)
}

/// Runs a program with both of its outputs in one.
fn bank(program: impl AsRef<OsStr>) -> Command {
    let mut command = Command::new("sh");
    command.args(["-c", "exec \"$@\" 2>&1", "sh"]).arg(program);
    command
}

fn java(classes: &Path, options: &[&str]) -> Command {
    let mut command = bank("java");
    command.args(["-Xms32m", "-Xmx32m"]).args(options);
    // Threads of its compilers that end make it be refused, rightly.
    command.arg("-XX:-UseDynamicNumberOfCompilerThreads").arg("-cp").arg(classes).arg("Bank");
    // If it crashes it leaves a report.
    command.current_dir(classes);
    command
}

/// A directory with the compiled class. The compiler of Eclipse is a tenth of the JDK.
fn java_classes() -> Option<tempfile::TempDir> {
    let has_javac = is_there("javac");
    if !needs(if has_javac { &["java"] } else { &["java", "ecj"] }) {
        return None;
    }
    let directory = tempfile::tempdir().unwrap();
    let mut compiler = Command::new(if has_javac { "javac" } else { "ecj" });
    if !has_javac {
        compiler.args(["-11", "-nowarn", "-proc:none"]);
    }
    succeeds(compiler.arg("-d").arg(directory.path()).arg(source("Bank.java")));
    Some(directory)
}

#[track_caller]
fn succeeds(command: &mut Command) {
    let output = command.stdin(Stdio::null()).output().unwrap();
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}
