//! Live processes rolled back in place: real programs continue from the captured moment, and a
//! process that does not fit stays as it was.

use crate::needs::{needs, passed_over};
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Output, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use stillframe::address_space::MappingKind;
use stillframe::error::RollbackError;
use stillframe::rollback::RollbackStats;
use stillframe::source::LiveProcessSource;
use stillframe::{AddressRange, CaptureOptions, Error, SnapshotId, Store};

// ---- Programs -----------------------------------------------------------------------------------

/// A program that prints one line for each line of input.
pub(super) struct Program {
    pub(super) child: Child,
    output: BufReader<ChildStdout>,
}

impl Program {
    pub(super) fn start(command: Command) -> Program {
        let mut program = Program::silent(command);
        assert_eq!(program.line(), "ready");
        program
    }

    /// A program that does not print when it is ready.
    pub(super) fn silent(mut command: Command) -> Program {
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let output = BufReader::new(child.stdout.take().unwrap());
        Program { child, output }
    }

    fn python(program: &str) -> Program {
        let mut command = Command::new("python3");
        command.args(["-c", program]);
        Program::start(command)
    }

    /// `threads.c`.
    fn c(argument: &str) -> Program {
        let mut command = Command::new(compiled());
        command.arg(argument);
        Program::start(command)
    }

    pub(super) fn pid(&self) -> u32 {
        self.child.id()
    }

    pub(super) fn line(&mut self) -> String {
        let mut line = String::new();
        self.output.read_line(&mut line).unwrap();
        assert!(line.ends_with('\n'), "it has ended after {line:?}");
        line.trim_end().to_owned()
    }

    pub(super) fn tell(&mut self, line: &str) {
        self.child.stdin.as_mut().unwrap().write_all(format!("{line}\n").as_bytes()).unwrap();
    }

    pub(super) fn ask(&mut self, line: &str) -> String {
        self.tell(line);
        self.line()
    }

    fn numbers(&mut self, line: &str) -> Vec<i64> {
        self.ask(line).split(' ').map(|number| number.parse().unwrap()).collect()
    }

    pub(super) fn signal(&self, signal: Signal) {
        kill_process(Pid::from_raw(self.pid().cast_signed()).unwrap(), signal).unwrap();
    }

    /// The state letter; see proc(5).
    fn state(&self) -> char {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.pid())).unwrap();
        stat.rsplit(')').next().unwrap().trim_start().chars().next().unwrap()
    }

    /// Waits until the process is in one of these states: it waits for a line, or for its next
    /// operation.
    pub(super) fn wait_for_state(&self, expected: &[char]) -> char {
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            let state = self.state();
            if expected.contains(&state) {
                return state;
            }
            assert!(Instant::now() < deadline, "it is in state {state}, not in {expected:?}");
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The C program, compiled once.
fn compiled() -> &'static Path {
    static COMPILED: OnceLock<PathBuf> = OnceLock::new();
    COMPILED.get_or_init(|| {
        let directory = Path::new(env!("CARGO_TARGET_TMPDIR"));
        let binary = directory.join(format!("threads-{}", std::process::id()));
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/live/threads.c");
        let status =
            Command::new("cc").args(["-O1", "-pthread", "-o"]).arg(&binary).arg(source).status().unwrap();
        assert!(status.success(), "cc cannot compile it");
        binary
    })
}

// ---- A store, and the two ways to roll back -----------------------------------------------------

pub(super) fn new_store() -> (tempfile::TempDir, Store) {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::options().create(dir.path().join("store")).unwrap();
    (dir, store)
}

pub(super) fn capture(store: &Store, program: &Program) -> SnapshotId {
    let source = LiveProcessSource::new(program.pid());
    store.process("p").capture(&source, &CaptureOptions::default()).unwrap().id
}

#[track_caller]
pub(super) fn rollback(store: &Store, id: SnapshotId, program: &Program) -> RollbackStats {
    store.rollback(id).unwrap().live_process(program.pid()).unwrap()
}

/// The differences, for a process that does not fit.
#[track_caller]
pub(super) fn misfit(store: &Store, id: SnapshotId, pid: u32) -> Vec<String> {
    match store.rollback(id).unwrap().live_process(pid).unwrap_err() {
        Error::Rollback(RollbackError::DoesNotFit { differences, .. }) => differences,
        error => panic!("{error:?}"),
    }
}

// ---- CPython ------------------------------------------------------------------------------------

const PYTHON: &str = r#"
import sys, threading, time
numbers = {n: "record %d" % n for n in range(1000)}
def squares():
    n = 0
    while True:
        yield n * n
        n += 1
generator = squares()
counts = {"busy": 0, "slept": 0, "waited": 0}
condition = threading.Condition()
def busy():
    while True:
        counts["busy"] += 1
def sleep():
    while True:
        time.sleep(0.005)
        counts["slept"] += 1
def wait():
    with condition:
        while True:
            condition.wait()
            counts["waited"] += 1
for work in busy, sleep, wait:
    threading.Thread(target=work, daemon=True).start()
print("ready", flush=True)
for line in sys.stdin:
    word = line.split()
    if word[0] == "set":
        numbers[int(word[1])] = word[2]
    if word[0] == "notify":
        with condition:
            condition.notify()
    if word[0] == "counts":
        print(counts["busy"], counts["slept"], counts["waited"], flush=True)
    elif word[0] == "sleep":
        began = time.monotonic()
        time.sleep(float(word[1]))
        print("slept" if time.monotonic() - began >= float(word[1]) else "woken", flush=True)
    else:
        print(len(numbers), numbers[7], next(generator), flush=True)
"#;

#[test]
fn a_python_goes_on_from_the_captured_moment_variables_and_all() {
    if !needs(&["python3"]) {
        return;
    }
    let (_dir, store) = new_store();
    let mut python = Program::python(PYTHON);
    assert_eq!(python.ask("look"), "1000 record 7 0");
    assert_eq!(python.ask("set 7 seven"), "1000 seven 1");
    let id = capture(&store, &python);
    for round in 0..5 {
        assert_eq!(python.ask("set 7 other"), "1000 other 4");
        assert_eq!(python.ask("set 2000 more"), "1001 other 9");
        assert_eq!(python.ask("notify"), "1001 other 16");
        // Its busy thread may allocate memory now and then.
        let rollback = store.rollback(id).unwrap().leave_new_memory(true);
        let stats = rollback.live_process(python.pid()).unwrap();
        assert!(stats.written_regions > 0 && stats.written_bytes < stats.bytes / 4, "{stats:?}");
        assert!(!stats.paused.is_zero() && !stats.is_stopped);
        assert_eq!(python.ask("look"), "1000 seven 4", "round {round}");
        // The threads continue too, each where it was.
        let back = python.numbers("counts");
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            python.tell("notify");
            python.line();
            let on = python.numbers("counts");
            if on.iter().zip(&back).all(|(on, back)| on > back) {
                break;
            }
            assert!(Instant::now() < deadline, "a thread does not go on: {on:?} after {back:?}");
        }
        roll_back_again(&store, id, &mut python);
    }
}

/// Rolls back a process that has continued since, without a question to it.
fn roll_back_again(store: &Store, id: SnapshotId, python: &mut Program) {
    let stats = store.rollback(id).unwrap().leave_new_memory(true).live_process(python.pid()).unwrap();
    assert!(stats.written_regions > 0);
}

#[test]
fn a_sleep_begins_again_wherever_the_thread_is_when_it_is_rolled_back() {
    if !needs(&["python3"]) {
        return;
    }
    let (_dir, store) = new_store();
    let mut python = Program::python(PYTHON);
    python.tell("sleep 0.4");
    std::thread::sleep(Duration::from_millis(100));
    let id = capture(&store, &python);
    assert_eq!(python.line(), "slept");
    // It waits for a line now, and was captured in a sleep.
    for _ in 0..2 {
        store.rollback(id).unwrap().leave_new_memory(true).live_process(python.pid()).unwrap();
        assert_eq!(python.line(), "slept");
    }
    assert_eq!(python.ask("look"), "1000 record 7 0");
}

// ---- A C program --------------------------------------------------------------------------------

#[test]
fn threads_in_all_kinds_of_system_calls_go_on_from_the_captured_moment() {
    if !needs(&["cc"]) {
        return;
    }
    let (_dir, store) = new_store();
    let mut program = Program::c("threads");
    let served = |program: &mut Program, tickets: i64| {
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            let now = program.numbers("s");
            if now[..3] == [tickets; 3] {
                return now;
            }
            assert!(Instant::now() < deadline, "{now:?} of {tickets} tickets");
        }
    };
    let forward = |program: &mut Program, since: &[i64]| {
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            let now = program.numbers("s");
            if now[3..7].iter().zip(&since[3..7]).all(|(now, since)| now > since) {
                return now;
            }
            assert!(Instant::now() < deadline, "a thread does not go on: {now:?} after {since:?}");
        }
    };
    for ticket in 1..=3 {
        assert_eq!(program.ask("t"), ticket.to_string());
    }
    served(&mut program, 3);
    // The second snapshot is of threads that continued in their system calls after the first.
    let ids = [capture(&store, &program), capture(&store, &program)];
    for id in [ids[0], ids[1], ids[0], ids[1]] {
        program.ask("t");
        let later = served(&mut program, 4);
        forward(&mut program, &later);
        rollback(&store, id, &program);
        let back = served(&mut program, 3);
        // All of them continue, and the server and the reader wait for input.
        let on = forward(&mut program, &back);
        assert_eq!(on[7], 0, "a call has failed");
    }
    program.ask("t");
    served(&mut program, 4);
}

#[test]
fn a_thread_in_a_loop_goes_back_to_its_system_call_and_the_other_way_round() {
    if !needs(&["cc"]) {
        return;
    }
    let (_dir, store) = new_store();
    let mut program = Program::c("");
    program.ask("g");
    program.wait_for_state(&['S']);
    let reading = capture(&store, &program);
    program.tell("l");
    program.wait_for_state(&['R']);
    let looping = capture(&store, &program);
    for _ in 0..3 {
        rollback(&store, reading, &program);
        assert_eq!(program.wait_for_state(&['S']), 'S');
        assert_eq!(program.ask("?"), "1 whole");
        rollback(&store, looping, &program);
        assert_eq!(program.wait_for_state(&['R']), 'R');
    }
}

#[test]
fn the_signals_a_thread_blocks_are_rolled_back() {
    if !needs(&["cc"]) {
        return;
    }
    let (_dir, store) = new_store();
    let mut program = Program::c("");
    let id = capture(&store, &program);
    assert_eq!(program.ask("m"), "blocked");
    assert_eq!(program.ask("b"), "1");
    rollback(&store, id, &program);
    assert_eq!(program.ask("b"), "0");
}

#[test]
fn what_was_excluded_is_left_as_it_is() {
    if !needs(&["cc"]) {
        return;
    }
    let (_dir, store) = new_store();
    let mut program = Program::c("");
    program.ask("g");
    let whole = capture(&store, &program);
    let space = store.snapshot(whole).unwrap().address_space().unwrap();
    // The whole mapping of the large array except its first page, which may hold other variables of
    // the program.
    let large = space.mappings().iter().find(|it| it.range.length_bytes() > 20 << 20 && it.protection.write);
    let large = large.unwrap().range;
    let exclude = vec![AddressRange::new(large.start() + (1 << 20), large.end() - (1 << 20)).unwrap()];
    let options = CaptureOptions::new().exclude(exclude);
    let id = store.process("p").capture(&LiveProcessSource::new(program.pid()), &options).unwrap().id;
    assert_eq!(program.ask("g"), "2");
    rollback(&store, id, &program);
    assert_eq!(program.ask("?"), "1 torn", "the middle of it is of generation 2");
    rollback(&store, whole, &program);
    assert_eq!(program.ask("?"), "1 whole");
}

#[test]
fn a_second_rollback_of_a_process_that_stood_still_writes_nothing_and_it_stays_stopped() {
    if !needs(&["cc"]) {
        return;
    }
    let (_dir, store) = new_store();
    let mut program = Program::c("");
    program.ask("g");
    let id = capture(&store, &program);
    program.ask("g");
    program.signal(Signal::STOP);
    program.wait_for_state(&['T']);
    let first = rollback(&store, id, &program);
    assert!(first.is_stopped && first.written_bytes > 20 << 20, "{first:?}");
    let second = rollback(&store, id, &program);
    assert!(second.is_stopped && second.written_bytes == 0, "{second:?}");
    assert_eq!(program.wait_for_state(&['T']), 'T');
    program.signal(Signal::CONT);
    assert_eq!(program.ask("?"), "1 whole");
}

#[test]
fn a_process_that_is_about_to_stop_does_so_afterwards() {
    if !needs(&["cc"]) {
        return;
    }
    let (_dir, store) = new_store();
    let mut program = Program::c("threads");
    program.ask("g");
    let id = capture(&store, &program);
    for _ in 0..20 {
        // The process may have stopped, or be about to stop, or not have received the signal.
        program.signal(Signal::STOP);
        assert!(rollback(&store, id, &program).is_stopped);
        assert_eq!(program.wait_for_state(&['T']), 'T');
        program.signal(Signal::CONT);
        assert_eq!(program.ask("?"), "1 whole");
        assert!(!rollback(&store, id, &program).is_stopped);
        assert_eq!(program.ask("?"), "1 whole");
    }
}

#[test]
fn a_process_that_does_not_fit_is_left_as_it_was_and_says_what_differs() {
    if !needs(&["cc"]) {
        return;
    }
    let (_dir, store) = new_store();
    for (command, expected) in [("n", "has grown by|is new"), ("h", "[heap]) has grown")] {
        let mut program = Program::c("");
        program.ask("g");
        let id = capture(&store, &program);
        program.ask(command);
        program.ask("g");
        let found = misfit(&store, id, program.pid()).join("; ");
        assert!(expected.split('|').any(|expected| found.contains(expected)), "{command}: {found}");
        assert_eq!(program.ask("?"), "2 whole", "{command}");
        // New memory may stay.
        store.rollback(id).unwrap().leave_new_memory(true).live_process(program.pid()).unwrap();
        assert_eq!(program.ask("?"), "1 whole", "{command}");
        // The heap had grown and been written, and the C library relies on zeros there.
        assert_eq!(program.ask("c"), "0", "{command}");
    }
    // Memory that the process has unmapped since is mapped again.
    let mut program = Program::c("");
    program.ask("g");
    let id = capture(&store, &program);
    program.ask("u");
    program.ask("g");
    store.rollback(id).unwrap().live_process(program.pid()).unwrap();
    assert_eq!(program.ask("?"), "1 whole");
}

#[test]
fn other_threads_another_run_and_another_program_do_not_fit() {
    if !needs(&["python3", "cc"]) {
        return;
    }
    let (_dir, store) = new_store();
    let script = r#"
import sys, threading
stop = threading.Event()
def run(): stop.wait()
first = threading.Thread(target=run); first.start()
print("ready", flush=True)
for line in sys.stdin:
    if line == "end\n": stop.set(); first.join()
    if line == "begin\n": stop.clear(); threading.Thread(target=run, daemon=True).start()
    print("done", flush=True)
"#;
    let mut python = Program::python(script);
    let two = capture(&store, &python);
    python.ask("end");
    let one = capture(&store, &python);
    let found = misfit(&store, two, python.pid()).join("; ");
    assert!(found.contains("thread ") && found.contains("has ended"), "{found}");
    python.ask("begin");
    let found = misfit(&store, one, python.pid()).join("; ");
    assert!(found.contains("thread ") && found.contains("is new"), "{found}");
    assert_eq!(python.ask("look"), "done");

    let other_run = Program::python(script);
    let found = misfit(&store, two, other_run.pid()).join("; ");
    assert!(found.contains("another run of the program"), "{found}");
    let other = Program::c("");
    let found = misfit(&store, two, other.pid()).join("; ");
    assert!(found.contains("it runs ") && found.contains("the snapshot is of "), "{found}");
}

#[test]
fn what_can_never_be_rolled_back_is_refused_with_the_reason() {
    if !needs(&["cc"]) {
        return;
    }
    let (dir, store) = new_store();
    let program = Program::c("");
    let id = capture(&store, &program);
    let refusal = |id, pid| match store.rollback(id).unwrap().live_process(pid).unwrap_err() {
        Error::Rollback(RollbackError::NoRollBack { why, .. }) => why,
        error => format!("{error:?}"),
    };
    assert!(refusal(id, std::process::id()).contains("this process itself"));
    assert!(refusal(id, (1 << 22) + 1).contains("NoSuchPid"));
    let mut zombie = Command::new("true").spawn().unwrap();
    let stat = format!("/proc/{}/stat", zombie.id());
    while !fs::read_to_string(&stat).unwrap().contains(") Z ") {
        std::thread::yield_now();
    }
    assert!(refusal(id, zombie.id()).contains("zombie"));
    zombie.wait().unwrap();
    if fs::read_to_string("/proc/2/comm").is_ok_and(|name| name == "kthreadd\n") {
        assert!(refusal(id, 2).contains("kernel"));
    }
    // Another tracer holds the process.
    let source = LiveProcessSource::new(program.pid());
    let frozen = stillframe::source::Source::open(&source).unwrap();
    assert!(refusal(id, program.pid()).contains("another capture of it is not done"));
    drop(frozen);
    // A snapshot without registers.
    fs::write(dir.path().join("image"), [7; 5000]).unwrap();
    let file = stillframe::source::FileSource::new(dir.path().join("image"));
    let of_file = store.process("f").capture(&file, &CaptureOptions::default()).unwrap().id;
    assert!(refusal(of_file, program.pid()).contains("not one of a live process"));
}

#[test]
fn a_thread_that_was_just_starting_when_it_was_captured_is_refused() {
    if !needs(&["cc"]) {
        return;
    }
    let (_dir, store) = new_store();
    let mut command = Command::new(compiled());
    // The C library leaves the registration to the program, which registers late.
    command.env("GLIBC_TUNABLES", "glibc.pthread.rseq=0");
    let mut program = Program::start(command);
    let id = capture(&store, &program);
    if program.ask("r") != "0" {
        return passed_over("this kernel or C library has no restartable sequences");
    }
    let later = capture(&store, &program);
    let error = store.rollback(id).unwrap().live_process(program.pid()).unwrap_err();
    assert!(error.to_string().contains("just starting"), "{error}");
    rollback(&store, later, &program);
    assert_eq!(program.ask("?"), "0 whole");
}

#[test]
fn damage_leaves_the_process_as_it_was() {
    if !needs(&["cc"]) {
        return;
    }
    let (dir, store) = new_store();
    let mut program = Program::c("");
    program.ask("g");
    let id = capture(&store, &program);
    let space = store.snapshot(id).unwrap().address_space().unwrap();
    assert!(space.mappings().iter().any(|it| it.kind == MappingKind::Stack));
    program.ask("g");
    // Everything after the middle of each pack.
    for pack in fs::read_dir(dir.path().join("store/packs")).unwrap() {
        let path = pack.unwrap().path();
        let mut bytes = fs::read(&path).unwrap();
        let regions = 4096..bytes.len() * 3 / 4;
        for byte in bytes[regions].iter_mut().step_by(100) {
            *byte ^= 0x55;
        }
        fs::write(path, bytes).unwrap();
    }
    let error = store.rollback(id).and_then(|rollback| rollback.live_process(program.pid())).unwrap_err();
    assert!(matches!(&error, Error::Store(error) if error.is_damage()), "{error:?}");
    assert_eq!(program.wait_for_state(&['S']), 'S');
    assert_eq!(program.ask("?"), "2 whole");
}

// ---- The command --------------------------------------------------------------------------------

pub(super) struct Vault {
    pub(super) directory: tempfile::TempDir,
}

impl Vault {
    pub(super) fn new() -> Vault {
        Vault { directory: tempfile::tempdir().unwrap() }
    }

    pub(super) fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_stillframe"));
        command.arg("--store").arg(self.directory.path().join("store")).args(arguments);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    pub(super) fn run(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().unwrap()
    }

    #[track_caller]
    pub(super) fn json(&self, arguments: &[&str]) -> Value {
        let output = self.run(&[&["--json"], arguments].concat());
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        serde_json::from_slice(&output.stdout).unwrap()
    }
}

#[test]
fn the_command_rolls_back_and_says_what_it_did_and_the_next_snapshot_follows() {
    if !needs(&["cc"]) {
        return;
    }
    let vault = Vault::new();
    let mut program = Program::c("");
    let pid = program.pid().to_string();
    program.ask("g");
    let first = vault.json(&["capture", "--pid", &pid, "--process", "p"])["id"].as_str().unwrap().to_owned();
    program.ask("g");
    vault.json(&["capture", "--pid", &pid, "--process", "p"]);

    let done = vault.json(&["rollback", &first, "--pid", &pid]);
    let keys: Vec<&str> = done.as_object().unwrap().keys().map(String::as_str).collect();
    let expected = [
        "id",
        "bytes",
        "written_bytes",
        "elapsed_ms",
        "paused_ms",
        "stopped",
        "left_shared",
        "left_not_captured_bytes",
        "left_descriptors",
    ];
    assert!(keys.len() == expected.len() && expected.iter().all(|key| keys.contains(key)), "{keys:?}");
    assert_eq!(done["id"], first.as_str());
    assert!(done["written_bytes"].as_u64().unwrap() > 20 << 20);
    assert_eq!((&done["stopped"], done["left_shared"].as_array().unwrap().len()), (&Value::Bool(false), 0));
    assert_eq!(program.ask("?"), "1 whole");

    // A branch: its parent is the snapshot that the process was rolled back to.
    let branch = vault.json(&["capture", "--pid", &pid, "--process", "p", "--parent", &first]);
    assert_eq!(branch["parent"], first.as_str());
    assert!(branch["changed_regions"].as_u64().unwrap() < 50, "{branch}");

    let output = vault.run(&["restore", &first, "--into-pid", &pid]);
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.contains("rolled back") && text.contains(&format!("process {pid}")), "{text}");

    program.ask("n");
    let output = vault.run(&["restore", &first, "--into-pid", &pid]);
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!((output.status.code(), output.stdout.len()), (Some(6), 0), "{stderr}");
    let is_named = stderr.contains("is new") || stderr.contains("has grown by");
    assert!(stderr.starts_with("stillframe: process ") && is_named, "{stderr}");
    program.signal(Signal::KILL);
    program.child.wait().unwrap();
    assert_eq!(vault.run(&["restore", &first, "--into-pid", &pid]).status.code(), Some(6));
    for wrong in [
        &["restore", &first][..],
        &["restore", &first, "--into-pid", &pid, "--to", "x"],
        &["restore", &first, "--to", "x", "--leave-new-memory"],
        &["restore", &first, "--to", "x", "--seek-files"],
        &["rollback", &first],
    ] {
        assert_eq!(vault.run(wrong).status.code(), Some(2));
    }
}

/// How many times the command is killed; `STILLFRAME_KILLS` overrides it.
const KILLS: usize = 12;

/// Whether a signal is pending for the process.
fn is_pending(pid: u32, signal: Signal) -> bool {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let pending = status.lines().find_map(|line| line.strip_prefix("ShdPnd:")).unwrap();
    u64::from_str_radix(pending.trim(), 16).unwrap() & 1 << (signal.as_raw() - 1) != 0
}

#[test]
fn a_command_that_is_killed_leaves_the_process_as_it_was_or_rolled_back_or_stopped_to_be_rolled_back_again() {
    if !needs(&["cc"]) {
        return;
    }
    let kills = std::env::var("STILLFRAME_KILLS").map_or(KILLS, |kills| kills.parse().unwrap());
    let vault = Vault::new();
    let mut program = Program::c("");
    let pid = program.pid().to_string();
    program.ask("g");
    program.wait_for_state(&['S']);
    vault.json(&["capture", "--pid", &pid, "--process", "p"]);
    program.ask("g");
    let begun = Instant::now();
    vault.json(&["restore", "p@latest", "--into-pid", &pid]);
    let took = begun.elapsed().as_secs_f64();
    let (mut untouched, mut complete, mut stopped) = (0, 0, 0);
    let mut random = 0x2545_F491_4F6C_DD1Du64;
    for kill in 0..kills {
        assert_eq!(program.ask("g"), "2");
        program.wait_for_state(&['S']);
        let mut tool = vault.command(&["restore", "p@latest", "--into-pid", &pid]).spawn().unwrap();
        if kill % 2 == 0 {
            // At a random moment between its start and its end.
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            std::thread::sleep(Duration::from_secs_f64(took * 1.2 * (random % 1000) as f64 / 1e3));
        } else {
            // While it writes.
            while !is_pending(program.pid(), Signal::STOP) && tool.try_wait().unwrap().is_none() {
                std::hint::spin_loop();
            }
        }
        let _ = tool.kill();
        tool.wait().unwrap();
        if program.wait_for_state(&['S', 'T']) == 'T' {
            stopped += 1;
            let again = vault.json(&["restore", "p@latest", "--into-pid", &pid]);
            assert_eq!(again["stopped"], true);
            assert_eq!(program.wait_for_state(&['T']), 'T');
            program.signal(Signal::CONT);
            assert_eq!(program.ask("?"), "1 whole", "kill {kill}, rolled back again");
            continue;
        }
        match &*program.ask("?") {
            "1 whole" => complete += 1,
            "2 whole" => {
                untouched += 1;
                vault.json(&["restore", "p@latest", "--into-pid", &pid]);
            }
            torn => panic!("kill {kill}: {torn}"),
        }
    }
    println!(
        "{kills} kills: {untouched} untouched, {complete} complete, {stopped} stopped and rolled back again"
    );
    assert!(stopped > 0, "no kill has hit the writing");
}
