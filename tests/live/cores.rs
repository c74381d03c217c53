//! Core files, checked with a real debugger on a real program: what gdb prints for a live process
//! and for its snapshots, for a core and for the core that a restore writes.
//!
//! The tests pass over where `gdb` or `readelf` is missing.

use crate::needs::needs;
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Output, Stdio};
use std::sync::OnceLock;

use stillframe::record::Origin;
use stillframe::source::{CoreSource, LiveProcessSource};
use stillframe::threads::Threads;
use stillframe::{AddressRange, CaptureOptions, Hash, SnapshotId, Store};

// ---- The program --------------------------------------------------------------------------------

/// Three workers recurse, deeper in every round, and wait at the bottom. A line on standard input
/// begins a round and sets the counter. With an argument, a worker crashes in the second round.
const PROGRAM: &str = r#"
#include <pthread.h>
#include <semaphore.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/prctl.h>

enum { WORKERS = 3 };
static int counter;
static int is_to_crash;
static sem_t go[WORKERS], at_the_bottom;

static int descend(int worker, int round, int depth) {
    char marker[64] = { 0 };
    snprintf(marker, sizeof marker, "worker %d, round %d, depth %d", worker, round, depth);
    if (depth == 0) {
        if (is_to_crash && round == 2 && worker == 1)
            *(volatile int *)16 = 1;
        sem_post(&at_the_bottom);
        sem_wait(&go[worker]);
        return marker[0];
    }
    return descend(worker, round, depth - 1) + marker[0];
}

static void *work(void *number) {
    int worker = (int)(long)number;
    for (int round = 1;; round++)
        descend(worker, round, worker + 2 * round);
    return 0;
}

int main(int count, char **arguments) {
    char line[64] = { 0 };
    is_to_crash = count > 1;
    /* The debugger is no ancestor of this process. */
    prctl(PR_SET_PTRACER, PR_SET_PTRACER_ANY, 0, 0, 0);
    sem_init(&at_the_bottom, 0, 0);
    for (long worker = 0; worker < WORKERS; worker++) {
        pthread_t thread;
        sem_init(&go[worker], 0, 0);
        pthread_create(&thread, 0, work, (void *)worker);
    }
    for (;;) {
        for (int worker = 0; worker < WORKERS; worker++)
            sem_wait(&at_the_bottom);
        puts("at the bottom");
        fflush(stdout);
        if (!fgets(line, sizeof line, stdin))
            return 0;
        counter = atoi(line);
        for (int worker = 0; worker < WORKERS; worker++)
            sem_post(&go[worker]);
    }
}
"#;

/// The program, compiled once.
fn program() -> &'static Path {
    static BUILT: OnceLock<(tempfile::TempDir, PathBuf)> = OnceLock::new();
    let (_, path) = BUILT.get_or_init(|| {
        let directory = tempfile::tempdir().unwrap();
        let (source, path) = (directory.path().join("workers.c"), directory.path().join("workers"));
        std::fs::write(&source, PROGRAM).unwrap();
        let mut cc = Command::new("cc");
        run(cc.args(["-g", "-O0", "-pthread", "-o"]).arg(&path).arg(&source));
        (directory, path)
    });
    path
}

/// The output of a command, which must succeed.
#[track_caller]
fn run(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}; is it installed?"));
    assert!(output.status.success(), "{command:?}: {}", told(&output));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

pub(super) fn told(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

struct Workers {
    process: Child,
    output: BufReader<ChildStdout>,
}

impl Workers {
    fn start() -> Workers {
        let mut process =
            Command::new(program()).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let output = BufReader::new(process.stdout.take().unwrap());
        let mut workers = Workers { process, output };
        workers.wait();
        workers
    }

    fn pid(&self) -> u32 {
        self.process.id()
    }

    /// Begins a round and waits until all workers are at the bottom again.
    fn round(&mut self, counter: u32) {
        writeln!(self.process.stdin.as_mut().unwrap(), "{counter}").unwrap();
        self.wait();
    }

    fn wait(&mut self) {
        let mut line = String::new();
        self.output.read_line(&mut line).unwrap();
        assert_eq!(line, "at the bottom\n");
        self.wait_until_asleep();
    }

    /// Waits until every thread sleeps. Each then waits for another thread or for a line.
    fn wait_until_asleep(&self) {
        let is_asleep = |stat: &str| stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with('S'));
        loop {
            let tasks = std::fs::read_dir(format!("/proc/{}/task", self.pid())).unwrap();
            let stats = tasks.map(|task| std::fs::read_to_string(task.unwrap().path().join("stat")).unwrap());
            if stats.filter(|stat| !is_asleep(stat)).count() == 0 {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

// ---- The debugger -------------------------------------------------------------------------------

/// What gdb prints for a process or a core.
fn gdb(target: &[&str], commands: &[&str]) -> String {
    run(&mut gdb_command(target, commands))
}

/// gdb with a target and commands, without settings of the user.
pub(super) fn gdb_command(target: &[&str], commands: &[&str]) -> Command {
    let mut gdb = Command::new("gdb");
    gdb.args(["-nx", "-batch"]).args(target).env_remove("DEBUGINFOD_URLS").env("LC_ALL", "C");
    for command in commands {
        gdb.args(["-ex", command]);
    }
    gdb
}

fn gdb_of_core(core: &Path, commands: &[&str]) -> String {
    gdb(&[program().to_str().unwrap(), core.to_str().unwrap()], commands)
}

/// What the tests ask gdb at each moment: a variable, and for each thread every frame with its
/// variables.
const QUESTIONS: [&str; 2] = ["print counter", "thread apply all backtrace full"];

/// The counter, and the backtraces by thread id.
#[derive(Debug, PartialEq, Eq)]
struct Moment {
    counter: String,
    backtraces: BTreeMap<u32, String>,
}

impl Moment {
    fn new(said: &str) -> Moment {
        // gdb before 14 knows one layout of extended registers, and AMD processors use another. It
        // prints this warning for the kernel's own cores too.
        let said: Vec<&str> = said.lines().filter(|line| !line.contains("`.reg-xstate/")).collect();
        let said = &said.join("\n");
        let counter =
            said.lines().find_map(|line| line.strip_prefix("$1 = ")).unwrap_or_else(|| panic!("{said}"));
        let (_, threads) = said.split_once("$1 = ").unwrap();
        let mut backtraces = BTreeMap::new();
        // gdb numbers threads in the order in which it finds them, and a core has no thread names.
        for block in threads.split("\nThread ").skip(1) {
            let (head, backtrace) = block.split_once('\n').unwrap();
            let (_, id) = head.split_once("LWP ").unwrap();
            let id = id.split(|letter: char| !letter.is_ascii_digit()).next().unwrap();
            // For a live process the output ends with a line about detaching.
            let backtrace = backtrace.split("[Inferior 1").next().unwrap().trim_end();
            backtraces.insert(id.parse().unwrap(), backtrace.to_owned());
        }
        Moment { counter: counter.to_owned(), backtraces }
    }

    fn of_process(pid: u32) -> Moment {
        Moment::new(&gdb(&["-p", &pid.to_string()], &QUESTIONS))
    }

    fn of_core(core: &Path) -> Moment {
        Moment::new(&gdb_of_core(core, &QUESTIONS))
    }

    /// Asserts that the state is the right one for this round: otherwise two equal wrong answers
    /// would pass.
    #[track_caller]
    fn check(&self, round: usize, counter: u32) {
        assert_eq!(self.counter, counter.to_string());
        assert_eq!(self.backtraces.len(), 4, "{self:#?}");
        for worker in 0..3 {
            let bottom = format!("marker = \"worker {worker}, round {round}, depth 0\"");
            let backtrace = self.backtraces.values().find(|backtrace| backtrace.contains(&bottom));
            let backtrace = backtrace.unwrap_or_else(|| panic!("{bottom}: {self:#?}"));
            assert_eq!(
                backtrace.matches(" in descend (").count() + backtrace.matches("  descend (").count(),
                worker + 2 * round + 1,
                "{backtrace}"
            );
            assert!(backtrace.contains(" work ("), "{backtrace}");
        }
    }
}

// ---- Stores and cores ---------------------------------------------------------------------------

pub(super) struct Place {
    pub(super) directory: tempfile::TempDir,
    pub(super) store: Store,
}

impl Place {
    pub(super) fn new() -> Place {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::options().create(directory.path().join("store")).unwrap();
        Place { directory, store }
    }

    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn restore(&self, id: SnapshotId, name: &str) -> PathBuf {
        let path = self.path(name);
        self.store.restore(id).unwrap().into_core(&path).unwrap();
        path
    }

    fn capture(&self, core: &Path, process: &str) -> SnapshotId {
        let process = self.store.process(process);
        process.capture(&CoreSource::new(core), &CaptureOptions::default()).unwrap().id
    }

    /// Restores a core from a snapshot of a core. gdb must print the same for both, and a capture
    /// of the restored core must have the same memory. Returns the snapshot and what gdb prints.
    fn check_it_comes_back(&self, core: &Path, commands: &[&str]) -> (SnapshotId, String) {
        let id = self.capture(core, "core");
        let restored = self.restore(id, "restored");
        assert_that_readelf_takes(&restored);
        let (before, after) = (gdb_of_core(core, commands), gdb_of_core(&restored, commands));
        assert_eq!(after, before);

        let again = self.capture(&restored, "again");
        let [first, second] = [id, again].map(|id| self.store.snapshot(id).unwrap().record().clone());
        assert_eq!(second.layout, first.layout);
        assert_eq!(second.root, first.root);
        assert_eq!(second.attachments, first.attachments);
        assert_eq!(second.memory_bytes, first.memory_bytes);
        (id, before)
    }
}

fn assert_that_readelf_takes(core: &Path) {
    let command = |name: &str| {
        let output = Command::new(name).args(["-h", "-l", "-n"]).arg(core).output()?;
        let told = told(&output);
        assert!(output.status.success(), "{told}");
        for complaint in ["Error", "error:", "Warning", "corrupt"] {
            assert!(!told.contains(complaint), "{name}: {told}");
        }
        assert!(told.contains("CORE (Core file)"), "{name}: {told}");
        std::io::Result::Ok(())
    };
    command("readelf").unwrap();
    // `eu-readelf` is stricter, but seldom installed.
    let _ = command("eu-readelf");
}

// ---- The tests ----------------------------------------------------------------------------------

#[test]
fn gdb_sees_each_moment_of_a_process_in_its_snapshots_as_it_saw_it_live() {
    if !needs(&["cc", "gdb", "readelf"]) {
        return;
    }
    let place = Place::new();
    let mut workers = Workers::start();
    let mut moments = Vec::new();
    for (counter, round) in [(17, 2), (1_000_000, 3), (42, 4)] {
        workers.round(counter);
        let source = LiveProcessSource::new(workers.pid());
        let taken = place.store.process("workers").capture(&source, &CaptureOptions::default()).unwrap();
        workers.wait_until_asleep();
        let live = Moment::of_process(workers.pid());
        workers.wait_until_asleep();
        live.check(round, counter);
        moments.push((taken.id, live));
    }
    drop(workers);
    for (id, live) in moments {
        let core = place.restore(id, &format!("{id}.core"));
        assert_that_readelf_takes(&core);
        let restored = Moment::of_core(&core);
        assert_eq!(restored.counter, live.counter);
        for (thread, backtrace) in &live.backtraces {
            assert_eq!(&restored.backtraces[thread], backtrace, "thread {thread} of {:?}", live.counter);
        }
        assert_eq!(restored, live);
    }
}

#[test]
fn a_core_of_gdb_comes_back_and_shares_its_memory_with_a_capture_of_the_process() {
    if !needs(&["cc", "gdb", "readelf"]) {
        return;
    }
    let place = Place::new();
    let mut workers = Workers::start();
    workers.round(5);
    let live = place.store.process("workers");
    let live = live.capture(&LiveProcessSource::new(workers.pid()), &CaptureOptions::default()).unwrap();
    workers.wait_until_asleep();
    let core = place.path("gcore");
    gdb(&["-p", &workers.pid().to_string()], &[&format!("generate-core-file {}", core.display())]);
    Moment::of_core(&core).check(2, 5);

    let (id, _) = place.check_it_comes_back(&core, &QUESTIONS);
    let pid = workers.pid();
    let record = place.store.snapshot(id).unwrap().record().clone();
    let Origin::Core { path, pid: of, executable, command } = record.origin else { panic!("it is a core") };
    assert_eq!((path, of), (core, Some(pid)));
    assert_eq!(executable.unwrap(), program());
    assert_eq!(command, [program().to_str().unwrap()]);

    // Each mapping begins where it did in the process, so the regions are the same.
    let hashes = |id| -> BTreeMap<u64, _> {
        let regions = place.store.snapshot(id).unwrap();
        regions
            .regions()
            .unwrap()
            .map(|region| region.unwrap())
            .map(|(range, hash)| (range.start(), hash))
            .collect()
    };
    let (of_process, of_core) = (hashes(live.id), hashes(id));
    let other: Vec<_> = of_core.iter().filter(|(start, hash)| of_process.get(start) != Some(hash)).collect();
    // gdb writes zeros for memory that it cannot read: the guard pages of stacks, and the kernel's
    // page at the end.
    let other: Vec<_> = other.into_iter().filter(|(_, hash)| **hash != Hash::ZERO).collect();
    assert!(of_core.len() > 100, "{}", of_core.len());
    // The kernel also writes into the memory of each thread the number of the processor on which it
    // runs (rseq(2)).
    assert!(other.len() <= 4, "{other:x?}");
}

#[test]
fn a_core_of_the_kernel_comes_back_with_the_signal_and_the_thread_that_got_it() {
    if !needs(&["cc", "gdb", "readelf"]) {
        return;
    }
    let place = Place::new();
    let core = crash(&place);
    let commands = [
        "backtrace full",
        "print $_siginfo.si_signo",
        "print $_siginfo._sifields._sigfault.si_addr",
        QUESTIONS[0],
        QUESTIONS[1],
    ];
    let (id, said) = place.check_it_comes_back(&core, &commands);
    for expected in
        ["signal SIGSEGV", "worker 1, round 2, depth 0", "$1 = 11\n", "(void *) 0x10\n", "$3 = 7\n"]
    {
        assert!(said.contains(expected), "{expected}: {said}");
    }
    let snapshot = place.store.snapshot(id).unwrap();
    let threads = Threads::from_attachment(&snapshot.attachment("threads").unwrap().unwrap()).unwrap();
    assert_eq!(threads.threads.len(), 4);
    assert_eq!(threads.threads[0].pending_signal, 11);
    assert_ne!(threads.threads[0].tid, threads.pid);
    let first = threads.threads.iter().find(|thread| thread.tid == threads.pid).unwrap();
    assert_eq!(first.name, b"workers");
    // The kernel leaves out the code of libraries, and stillframe does not make it up.
    let space = snapshot.address_space().unwrap();
    let libc = space.mappings().iter().filter(|mapping| mapping.name.contains("libc"));
    assert!(libc.clone().any(|mapping| !mapping.captured) && libc.clone().any(|mapping| mapping.captured));
}

/// The core that the kernel writes when the program crashes. Where the kernel hands cores to a
/// program, or writes none, gdb writes the core at the moment of the crash.
fn crash(place: &Place) -> PathBuf {
    let directory = place.path("crash");
    std::fs::create_dir(&directory).unwrap();
    let mut shell = Command::new("sh");
    shell.args(["-c", "ulimit -c unlimited 2>/dev/null; echo 7 | \"$0\" crash"]).arg(program());
    shell.current_dir(&directory).output().unwrap();
    if let Some(core) = std::fs::read_dir(&directory).unwrap().next() {
        return core.unwrap().path();
    }
    println!("the kernel leaves no core here, gdb does");
    let core = directory.join("core");
    let input = place.path("input");
    std::fs::write(&input, "7\n").unwrap();
    let write = format!("generate-core-file {}", core.display());
    let go = format!("run crash < {}", input.display());
    gdb(&[program().to_str().unwrap()], &["set startup-with-shell on", &go, &write]);
    core
}

#[test]
fn memory_without_threads_is_a_core_that_gdb_reads_and_what_was_excluded_is_not_there() {
    if !needs(&["gdb", "readelf"]) {
        return;
    }
    let place = Place::new();
    let mut memory: Vec<u8> = (0..40_001u32).map(|at| u8::try_from(at % 251).unwrap()).collect();
    memory[20_000..30_000].fill(0);
    let options = CaptureOptions::new().exclude([AddressRange::new(8192, 12288).unwrap()]);
    let taken = place.store.process("bytes").capture(&memory, &options).unwrap();
    let core = place.path("core");
    let stats = place.store.restore(taken.id).unwrap().into_core(&core).unwrap();
    // Excluded memory is not in the file.
    assert_eq!((stats.threads, stats.bytes), (0, 4096 + 40_001 - 4096));
    assert!(stats.written_bytes < stats.bytes);
    assert_that_readelf_takes(&core);

    let gdb = |command: &str| {
        let mut gdb = Command::new("gdb");
        gdb.args(["-nx", "-batch", "-ex"]).arg(format!("core-file {}", core.display()));
        told(&gdb.args(["-ex", command]).output().unwrap())
    };
    assert!(gdb("x/3ub 251").contains("0xfb:\t0\t1\t2\n"), "{}", gdb("x/3ub 251"));
    assert!(gdb("x/2ub 39999").contains(&format!("{}\t{}\n", 39_999 % 251, 40_000 % 251)));
    assert!(gdb("x/2ub 25000").contains("\t0\t0\n"));
    assert!(gdb("x/1ub 9000").contains("Cannot access memory"), "{}", gdb("x/1ub 9000"));

    // The restored core has the same bytes in the same mappings.
    let again = place.capture(&core, "again");
    let space = place.store.snapshot(again).unwrap().address_space().unwrap();
    let captured: Vec<_> = space.captured().map(|(_, it)| (it.range.start(), it.range.end())).collect();
    assert_eq!(captured, [(0, 8192), (12288, 40_001)]);
    assert_eq!(place.store.restore(again).unwrap().into_mapping().unwrap()[8192..], memory[12288..]);
}

// ---- The command --------------------------------------------------------------------------------

fn stillframe(store: &Path, arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_stillframe"));
    command.arg("--store").arg(store).args(arguments).output().unwrap()
}

fn json(output: &Output) -> serde_json::Value {
    assert!(output.status.success(), "{}", told(output));
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn the_command_restores_a_core_and_captures_it() {
    if !needs(&["cc"]) {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();
    let store = directory.path().join("store");
    let workers = Workers::start();
    let pid = workers.pid().to_string();
    json(&stillframe(&store, &["--json", "capture", "--pid", &pid, "--process", "workers"]));

    let restored =
        json(&stillframe(&store, &["--json", "restore", "workers@latest", "--core", &at("a.core")]));
    assert_eq!(restored["threads"], 4);
    assert_eq!(restored["bytes"], std::fs::metadata(at("a.core")).unwrap().len());
    assert!(restored["written_bytes"].as_u64() < restored["bytes"].as_u64());
    assert!(restored["elapsed_ms"].is_f64());
    use std::os::unix::fs::PermissionsExt;
    assert_eq!(std::fs::metadata(at("a.core")).unwrap().permissions().mode() & 0o777, 0o600);
    let refused = stillframe(&store, &["restore", "workers@latest", "--core", &at("a.core")]);
    assert_eq!(refused.status.code(), Some(6), "{}", told(&refused));

    let captured = json(&stillframe(&store, &["--json", "capture", "--core", &at("a.core")]));
    assert_eq!((&captured["process"], &captured["paused_ms"]), (&"a.core".into(), &0.0.into()));
    assert_eq!(captured["new_regions"], 0);
    let shown = json(&stillframe(&store, &["--json", "show", "a.core@latest"]));
    let source = &shown["source"];
    assert_eq!((&source["kind"], &source["pid"]), (&"core".into(), &workers.pid().into()));
    assert_eq!(
        (&source["path"], &source["command"][0]),
        (&at("a.core").into(), &program().to_str().unwrap().into())
    );
    let text = told(&stillframe(&store, &["show", "a.core@latest"]));
    assert!(text.contains(&format!("the core {} of process {pid}", at("a.core"))), "{text}");
    let wrong = stillframe(&store, &["restore", "workers@latest"]);
    assert_eq!(wrong.status.code(), Some(2), "{}", told(&wrong));
    let wrong = stillframe(&store, &["restore", "workers@latest", "--core", &at("b"), "--to", &at("c")]);
    assert_eq!(wrong.status.code(), Some(2), "{}", told(&wrong));
}

#[test]
fn what_is_no_core_ends_with_exit_code_6_and_leaves_no_store() {
    if !needs(&["cc"]) {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name);
    let bytes = vec![7u8; 100_000];
    let place = Place::new();
    let id = place.store.process("x").capture(&bytes, &CaptureOptions::default()).unwrap().id;
    let core = std::fs::read(place.restore(id, "core")).unwrap();
    std::fs::write(at("truncated"), &core[..50_000]).unwrap();
    std::fs::write(at("random"), &bytes).unwrap();
    std::fs::write(at("empty"), b"").unwrap();
    let store = at("store");
    for (path, word) in [
        (at("truncated"), "cut short"),
        (at("random"), "no ELF file"),
        (at("empty"), "it is empty"),
        (at("missing"), "cannot find"),
        (at("."), "is a directory"),
        (program().to_owned(), "an executable or a library, not a core"),
    ] {
        let output = stillframe(&store, &["capture", "--core", path.to_str().unwrap()]);
        assert_eq!(output.status.code(), Some(6), "{}", told(&output));
        assert!(output.stdout.is_empty());
        assert!(told(&output).contains(word), "{word}: {}", told(&output));
        assert!(!store.exists());
    }
}
