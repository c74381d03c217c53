//! Stopping a process: limited in time, interruptible, together with all processes that share its
//! memory, and without deadlock between two captures.

use crate::waiting::{state, until};
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use stillframe::error::RollbackError;
use stillframe::source::{LiveProcessSource, Source, SourceError};
use stillframe::{CaptureOptions, Error, Progress, Store};

/// Compiles a C program; `None` where there is no compiler.
fn compiled(dir: &Path, program: &str) -> Option<PathBuf> {
    let (source, binary) = (dir.join("program.c"), dir.join("program"));
    fs::write(&source, program).unwrap();
    let cc = Command::new("cc").args(["-O1", "-pthread", "-o"]).args([&binary, &source]).status();
    match cc {
        Ok(status) => assert!(status.success(), "it does not compile"),
        Err(_) => passed_over("cc (Debian package gcc)"),
    }
    binary.exists().then_some(binary)
}

fn passed_over(needs: &str) {
    crate::needs::passed_over(&format!("it needs {needs}"));
}

/// A program that is killed when this is dropped.
struct Program {
    child: Child,
    output: BufReader<ChildStdout>,
}

impl Program {
    fn start(command: &mut Command) -> Program {
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let output = BufReader::new(child.stdout.take().unwrap());
        Program { child, output }
    }

    fn sleep() -> Program {
        Program::start(Command::new("sleep").arg("600"))
    }

    fn pid(&self) -> u32 {
        self.child.id()
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.output.read_line(&mut line).unwrap();
        line.trim_end().to_owned()
    }

    fn tell(&mut self, line: &str) {
        writeln!(self.child.stdin.as_mut().unwrap(), "{line}").unwrap();
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn error_of(source: &LiveProcessSource) -> SourceError {
    source.open().map(|_| ()).unwrap_err()
}

// Threads that cannot be stopped

/// One thread calls vfork on request and waits in it; another prints its longest pause, in
/// milliseconds.
const IN_VFORK: &str = r#"
    #define _GNU_SOURCE
    #include <pthread.h>
    #include <signal.h>
    #include <stdio.h>
    #include <sys/prctl.h>
    #include <time.h>
    #include <unistd.h>
    static long now(void) { struct timespec t; clock_gettime(CLOCK_MONOTONIC, &t); return t.tv_sec * 1000 + t.tv_nsec / 1000000; }
    static volatile long longest;
    static void *work(void *unused) {
        for (long last = now();;) {
            usleep(1000);
            long next = now();
            if (next - last > longest) longest = next - last;
            last = next;
        }
    }
    static void *tell(void *unused) {
        while (getchar() != EOF) { printf("%ld\n", longest); fflush(stdout); longest = 0; }
        return 0;
    }
    int main(void) {
        pthread_t t;
        pthread_create(&t, 0, work, 0);
        pthread_create(&t, 0, tell, 0);
        if (vfork() == 0) { prctl(PR_SET_PDEATHSIG, SIGKILL); for (;;) pause(); }
        for (;;) pause();
    }
"#;

#[test]
fn a_thread_in_vfork_pauses_no_other_and_its_child_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let Some(program) = compiled(dir.path(), IN_VFORK) else { return };
    let mut program = Program::start(&mut Command::new(program));
    let pid = program.pid();
    let children = || fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap();
    until("it waits in vfork", || state(pid) == 'D' && !children().trim().is_empty());
    let child = children().trim().to_owned();
    let timeout = Duration::from_millis(300);
    let error = error_of(&LiveProcessSource::new(pid).stop_timeout(timeout));
    let text = error.to_string();
    assert!(
        text.contains(&format!("its thread {pid} (program) waits in vfork for process {child}")),
        "{text}"
    );
    let SourceError::DidNotStop { paused, timeout: told, .. } = error else { panic!("{error:?}") };
    assert_eq!((paused, told), (Duration::ZERO, timeout));
    program.tell("");
    let longest_ms: u64 = program.line().parse().unwrap();
    assert!(longest_ms < 5_000, "paused for {longest_ms} ms");

    // Another thread cancels the same wait: it ends immediately, although a minute is left.
    let cancel = Arc::new(AtomicBool::new(false));
    let store = Store::options().create(dir.path().join("store")).unwrap();
    let options = CaptureOptions::new().progress(Progress::new().cancel_when(cancel.clone()));
    std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(100));
        cancel.store(true, Ordering::Relaxed);
    });
    let source = LiveProcessSource::new(pid).stop_timeout(Duration::from_secs(100));
    let begun = Instant::now();
    let interrupted = store.process("p").capture(&source, &options).unwrap_err();
    assert!(matches!(interrupted, Error::Interrupted), "{interrupted:?}");
    assert!(begun.elapsed() < Duration::from_secs(60));

    // After the child has ended, nothing prevents the stop.
    kill_process(Pid::from_raw(child.parse().unwrap()).unwrap(), Signal::KILL).unwrap();
    until("vfork returns", || state(pid) != 'D');
    LiveProcessSource::new(pid).open().unwrap();
}

/// A new cgroup, which is removed when this is dropped.
struct Cgroup(PathBuf);

impl Cgroup {
    /// `None` where no cgroup can be created.
    fn new(root: &str, file: &str) -> Option<Cgroup> {
        let path = Path::new(root).join(format!("stillframe-test-{}", std::process::id()));
        let made = fs::create_dir(&path).is_ok().then_some(Cgroup(path));
        made.filter(|cgroup| cgroup.0.join(file).exists())
    }

    fn write(&self, file: &str, text: &str) {
        fs::write(self.0.join(file), text).unwrap();
    }

    fn reads(&self, file: &str, expected: &str) {
        until(expected, || fs::read_to_string(self.0.join(file)).unwrap().contains(expected));
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        let _ = fs::write(self.0.join("freezer.state"), "THAWED");
        let _ = fs::write(self.0.join("cgroup.freeze"), "0");
        for _ in 0..500 {
            if fs::remove_dir(&self.0).is_ok() {
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

#[test]
fn a_process_in_a_frozen_cgroup_is_refused_with_its_name_and_captured_when_it_is_thawed() {
    let Some(cgroup) = Cgroup::new("/sys/fs/cgroup/freezer", "freezer.state") else {
        return passed_over("the freezer of cgroup version 1, and root");
    };
    for is_stopped in [false, true] {
        let sleep = Program::sleep();
        cgroup.write("cgroup.procs", &sleep.pid().to_string());
        if is_stopped {
            sleep.signal(Signal::STOP);
            until("it is stopped", || state(sleep.pid()) == 'T');
        }
        cgroup.write("freezer.state", "FROZEN");
        cgroup.reads("freezer.state", "FROZEN");
        let source = LiveProcessSource::new(sleep.pid()).stop_timeout(Duration::from_millis(200));
        let text = error_of(&source).to_string();
        let path = cgroup.0.to_str().unwrap();
        assert!(text.contains(&format!("is in the frozen cgroup {path}; thaw it")), "{text}");
        assert!(text.contains("no thread was paused"), "{text}");
        cgroup.write("freezer.state", "THAWED");
        cgroup.reads("freezer.state", "THAWED");
        source.open().unwrap();
        until("it is as before", || state(sleep.pid()) == if is_stopped { 'T' } else { 'S' });
    }
}

#[test]
fn a_process_in_a_frozen_cgroup_of_version_2_is_captured_and_stays_frozen() {
    let roots = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"];
    let Some(cgroup) = roots.iter().find_map(|root| Cgroup::new(root, "cgroup.freeze")) else {
        return passed_over("cgroup version 2, and root");
    };
    let sleep = Program::sleep();
    cgroup.write("cgroup.procs", &sleep.pid().to_string());
    cgroup.write("cgroup.freeze", "1");
    cgroup.reads("cgroup.events", "frozen 1");
    let source = LiveProcessSource::new(sleep.pid());
    let frozen = source.open().unwrap();
    assert!(frozen.address_space().image_bytes() > 0);
    drop(frozen);
    cgroup.reads("cgroup.events", "frozen 1");
    // The killed process does not end before the cgroup is thawed.
    cgroup.write("cgroup.freeze", "0");
}

// Processes that share memory

/// A process that shares its memory works in parallel, and starts another one on request.
const SHARING: &str = r#"
    #define _GNU_SOURCE
    #include <sched.h>
    #include <signal.h>
    #include <stdio.h>
    #include <stdlib.h>
    #include <sys/prctl.h>
    #include <unistd.h>
    static volatile long counter;
    static int sharing(void *unused) { prctl(PR_SET_PDEATHSIG, SIGKILL); for (;;) counter++; }
    int main(void) {
        for (;;) {
            printf("%d\n", clone(sharing, (char *) malloc(65536) + 65536, CLONE_VM | SIGCHLD, 0)); fflush(stdout);
            if (getchar() == EOF) return 0;
        }
    }
"#;

#[test]
fn processes_that_share_the_memory_are_stopped_with_it_and_a_rollback_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let Some(program) = compiled(dir.path(), SHARING) else { return };
    let mut program = Program::start(&mut Command::new(program));
    let mut sharers: Vec<u32> = vec![program.line().parse().unwrap()];
    for _ in 0..2 {
        let source = LiveProcessSource::new(program.pid());
        let frozen = source.open().unwrap();
        if state(sharers[0]) != 't' && !has_kcmp() {
            return passed_over("the system call kcmp");
        }
        assert_eq!(state(program.pid()), 't');
        sharers.iter().for_each(|sharer| assert_eq!(state(*sharer), 't', "process {sharer} of {sharers:?}"));
        drop(frozen);
        sharers.iter().for_each(|sharer| until("it goes on", || state(*sharer) == 'R'));
        program.tell("");
        sharers.push(program.line().parse().unwrap());
    }
    let store = Store::options().create(dir.path().join("store")).unwrap();
    let source = LiveProcessSource::new(program.pid());
    let id = store.process("p").capture(&source, &CaptureOptions::default()).unwrap().id;
    let error = store.rollback(id).unwrap().live_process(program.pid()).unwrap_err();
    assert!(
        matches!(error, Error::Rollback(RollbackError::NoRollBack { .. } | RollbackError::DoesNotFit { .. })),
        "{error:?}"
    );
    assert!(error.to_string().contains(&format!("process {}", sharers[0])), "{error}");
    sharers.iter().for_each(|sharer| until("it goes on", || state(*sharer) == 'R'));
}

fn has_kcmp() -> bool {
    // Python can make this call without `unsafe` code in this test.
    let program = "import ctypes, os; p = os.getpid(); \
        raise SystemExit(0 if ctypes.CDLL(None).syscall(312, p, p, 1, 0, 0) == 0 else 1)";
    !cfg!(target_arch = "x86_64")
        || Command::new("python3").args(["-c", program]).status().is_ok_and(|status| status.success())
}

// Captures of each other

/// How often each program captures the other one: 30 times, or `STILLFRAME_MUTUAL_CAPTURES` times.
fn rounds() -> u32 {
    std::env::var("STILLFRAME_MUTUAL_CAPTURES").map_or(30, |rounds| rounds.parse().unwrap())
}

/// Not a test: the program that captures the other one, in a separate process.
#[test]
fn a_program_that_captures_another() {
    let Some(dir) = std::env::var_os("STILLFRAME_CAPTURES_ANOTHER") else { return };
    let store = Store::options().create(dir).unwrap();
    println!("\nready {}", std::process::id());
    let mut line = String::new();
    std::io::stdin().read_line(&mut line).unwrap();
    let source = LiveProcessSource::new(line.trim().parse().unwrap());
    let (mut done, mut refused) = (0, 0);
    for round in 0..rounds() {
        let result = match round % 15 {
            0 => store.process("other").capture(&source, &CaptureOptions::default()).map(drop),
            _ => source.open().map(drop).map_err(Error::from),
        };
        match result {
            Ok(()) => done += 1,
            Err(Error::Source(SourceError::Uncapturable { why, .. })) if why.contains("capturing") => {
                refused += 1
            }
            Err(Error::Source(SourceError::DidNotStop { .. })) => refused += 1,
            Err(error) => panic!("{error:?}"),
        }
    }
    println!("\ndone {done} {refused}");
    // The other program continues with this one until it is done too.
    std::io::stdin().read_line(&mut line).unwrap();
}

#[test]
fn two_programs_that_capture_one_another_all_the_time_are_both_done() {
    let dir = tempfile::tempdir().unwrap();
    let start = |name: &str| {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "stopping::a_program_that_captures_another", "--nocapture"]);
        Program::start(command.env("STILLFRAME_CAPTURES_ANOTHER", dir.path().join(name)))
    };
    fn said(program: &mut Program, word: &str) -> Vec<u32> {
        loop {
            let line = program.line();
            if let Some(numbers) = line.strip_prefix(word) {
                return numbers.split_whitespace().map(|number| number.parse().unwrap()).collect();
            }
            assert!(program.child.try_wait().unwrap().is_none(), "it ended early");
        }
    }
    let mut programs = [start("a"), start("b")];
    let pids: Vec<u32> = programs.iter_mut().map(|program| said(program, "ready ")[0]).collect();
    programs[0].tell(&pids[1].to_string());
    programs[1].tell(&pids[0].to_string());
    // If they wait for each other, this ends them and fails the test.
    let (ended, is_done) = (Arc::new(AtomicBool::new(false)), Instant::now());
    let watchdog = std::thread::spawn({
        let ended = ended.clone();
        move || {
            while !ended.load(Ordering::Relaxed) {
                if is_done.elapsed() > Duration::from_secs(400) {
                    pids.iter().for_each(|pid| {
                        let _ = kill_process(Pid::from_raw(pid.cast_signed()).unwrap(), Signal::KILL);
                    });
                    panic!("two captures wait for one another");
                }
                std::thread::sleep(Duration::from_millis(20));
            }
        }
    });
    for program in &mut programs {
        let [done, refused] = said(program, "done ")[..] else { panic!("it says something else") };
        println!("{done} done, {refused} refused");
        assert!(done + refused == rounds() && done > rounds() / 2, "{done} done, {refused} refused");
    }
    ended.store(true, Ordering::Relaxed);
    watchdog.join().unwrap();
}

#[test]
fn captures_of_one_process_at_the_same_time_wait_for_one_another() {
    let sleep = Program::sleep();
    let source = LiveProcessSource::new(sleep.pid()).stop_timeout(Duration::from_secs(60));
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                for _ in 0..20 {
                    let frozen = source.open().unwrap();
                    std::thread::sleep(Duration::from_millis(1));
                    drop(frozen);
                }
            });
        }
    });
    assert_eq!(state(sleep.pid()), 'S');
}
