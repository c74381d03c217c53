//! Live processes as sources: real children are stopped, read, released and killed.
//!
//! Children that need more than a shell run this test binary again, and an environment variable
//! selects their role (`be_a_child`). They end when their standard input ends, so that none
//! outlives the tests.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::process::CommandExt;
use std::panic::AssertUnwindSafe;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Barrier};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use stillframe::AddressRange;
use stillframe::address_space::MappingKind;
use stillframe::record::Origin;
use stillframe::source::{Access, CopyOut, Frozen, LiveProcessSource, Source, SourceError};
use stillframe::threads::Threads;

/// Far longer than anything takes here. Only a test that would otherwise hang waits this long.
const FOR_EVER: Duration = Duration::from_secs(60);

// ---- The children -------------------------------------------------------------------------------

const ROLE: &str = "STILLFRAME_TEST_CHILD";

/// A child that is killed when the test ends, in any way.
struct Child {
    process: std::process::Child,
    lines: Receiver<String>,
}

impl Child {
    fn start(command: &mut Command) -> Child {
        let mut process = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let (to, lines) = channel();
        let output = BufReader::new(process.stdout.take().unwrap());
        std::thread::spawn(move || {
            for line in output.lines().map_while(Result::ok) {
                // The test harness of a child prints lines too; a line of the child itself begins
                // with `>`.
                if let Some(line) = line.strip_prefix('>')
                    && to.send(line.to_owned()).is_err()
                {
                    break;
                }
            }
        });
        Child { process, lines }
    }

    fn shell(script: &str) -> Child {
        Child::start(Command::new("sh").args(["-c", script]))
    }

    /// A shell that has begun to work and never ends.
    fn busy_shell() -> Child {
        let child = Child::shell(BUSY_SHELL);
        assert_eq!(child.line(), "ready");
        child
    }

    /// This test binary in another role.
    fn role(role: &str) -> Child {
        Child::start(&mut Child::role_command(role))
    }

    fn role_command(role: &str) -> Command {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "sources::be_a_child", "--ignored", "--nocapture"]).env(ROLE, role);
        command
    }

    /// A process with many threads, some of which end at any moment.
    fn many_threads() -> Child {
        let child = Child::role("threads");
        assert_eq!(child.line(), "ready");
        child
    }

    fn pid(&self) -> u32 {
        self.process.id()
    }

    fn line(&self) -> String {
        self.lines.recv_timeout(FOR_EVER).expect("the child says something")
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_raw(self.pid().cast_signed()).unwrap(), signal).unwrap();
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

const BUSY_SHELL: &str = "echo '>ready'; i=0; while :; do i=$((i+1)); x=$x.; [ ${#x} -gt 9999 ] && x=; done";

#[test]
#[ignore = "a child of the other tests"]
fn be_a_child() {
    let Ok(role) = std::env::var(ROLE) else { return };
    std::thread::spawn(|| {
        let _ = std::io::stdin().read_to_end(&mut Vec::new());
        std::process::exit(0);
    });
    let (role, argument) = role.split_once(' ').unwrap_or((&role, ""));
    match role {
        "threads" => be_many_threads(),
        "memory" => be_odd_memory(),
        "execute" => be_a_thread_that_executes(),
        "stop" => {
            let source = LiveProcessSource::new(argument.parse().unwrap());
            match source.open() {
                Ok(_frozen) => {
                    say("stopped");
                    std::thread::sleep(FOR_EVER);
                }
                Err(error) => say(&format!("{error:?}")),
            }
        }
        "stop-repeatedly" => {
            let source = LiveProcessSource::new(argument.parse().unwrap());
            drop(source.open().unwrap());
            say("begins");
            loop {
                drop(source.open());
            }
        }
        other => panic!("no such role: {other}"),
    }
}

fn say(line: &str) {
    let mut output = std::io::stdout();
    write!(output, "\n>{line}\n").unwrap();
    output.flush().unwrap();
}

/// Some threads that stay and always do a little work, and one that starts others, which end
/// immediately.
fn be_many_threads() {
    let started = Arc::new(Barrier::new(7));
    for number in 0..6 {
        let started = Arc::clone(&started);
        let body = move || {
            started.wait();
            loop {
                std::thread::sleep(Duration::from_millis(1));
            }
        };
        std::thread::Builder::new().name(format!("worker {number}")).spawn(body).unwrap();
    }
    // A thread sets its own name.
    started.wait();
    say("ready");
    loop {
        let brief: Vec<_> = (0..4).map(|_| std::thread::spawn(|| {})).collect();
        brief.into_iter().for_each(|thread| thread.join().unwrap());
        // The machine has other work too.
        std::thread::sleep(Duration::from_micros(200));
    }
}

/// Threads, one of which repeatedly executes the same program again.
fn be_a_thread_that_executes() {
    for _ in 0..3 {
        std::thread::spawn(|| std::thread::sleep(FOR_EVER));
    }
    say("executed");
    let error = Child::role_command("execute").exec();
    panic!("cannot execute itself: {error}");
}

/// Unusual mappings: a terabyte with few pages, a file that was truncated, and shared memory with
/// few pages.
fn be_odd_memory() {
    let mut sparse = memmap2::MmapOptions::new().len(1 << 40).no_reserve_swap().map_anon().unwrap();
    sparse[3 << 30] = 1;
    sparse[(900 << 30) + 5] = 2;

    let file = tempfile::tempfile().unwrap();
    file.write_all_at(&[7; 5 * 4096], 0).unwrap();
    // SAFETY: the file is truncated below, and this process does not access the mapping.
    let cut = unsafe { memmap2::Mmap::map(&file) }.unwrap();
    file.set_len(2 * 4096).unwrap();

    let shared = rustix::fs::memfd_create("shared", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    let shared = File::from(shared);
    shared.set_len(1 << 30).unwrap();
    shared.write_all_at(&[9; 4096], 500 << 20).unwrap();
    // SAFETY: no process truncates the file, and this process does not access the mapping.
    let shared_mapping = unsafe { memmap2::MmapMut::map_mut(&shared) }.unwrap();
    let addresses = [sparse.as_ptr().addr(), cut.as_ptr().addr(), shared_mapping.as_ptr().addr()];
    say(&addresses.map(|address| address.to_string()).join(" "));
    std::thread::sleep(FOR_EVER);
}

// ---- Checks -------------------------------------------------------------------------------------

/// For each thread its state letter and how often it gave up a processor.
fn threads(pid: u32) -> BTreeMap<u32, (char, u64)> {
    let mut found = BTreeMap::new();
    for entry in std::fs::read_dir(format!("/proc/{pid}/task")).unwrap() {
        let path = entry.unwrap().path();
        // A thread may end at any moment.
        let Ok(status) = std::fs::read_to_string(path.join("status")) else { continue };
        let value = |key: &str| {
            status.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(":")).unwrap_or("0").trim()
        };
        let switches: u64 = value("voluntary_ctxt_switches").parse::<u64>().unwrap()
            + value("nonvoluntary_ctxt_switches").parse::<u64>().unwrap();
        let tid = path.file_name().unwrap().to_str().unwrap().parse().unwrap();
        found.insert(tid, (value("State").chars().next().unwrap(), switches));
    }
    found
}

fn wait_until(what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + FOR_EVER;
    while !is_so() {
        assert!(Instant::now() < deadline, "never so: {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn is_stopped_by_a_signal(pid: u32) -> bool {
    threads(pid).values().all(|(state, _)| *state == 'T')
}

/// Asserts that the process has no tracer, that none of its threads is stopped, and that busy
/// threads make progress.
#[track_caller]
fn assert_goes_on(pid: u32) {
    let before = threads(pid);
    let has_work = |tid: &u32| before.len() == 1 || name(*tid).starts_with("worker");
    let working: Vec<u32> = before.keys().copied().filter(has_work).collect();
    assert!(!working.is_empty());
    wait_until("every thread goes on", || {
        let now = threads(pid);
        now.values().all(|(state, _)| !matches!(state, 't' | 'T'))
            && working.iter().all(|tid| now[tid].1 > before[tid].1)
    });
    assert_not_traced(pid);
}

fn name(tid: u32) -> String {
    std::fs::read_to_string(format!("/proc/{tid}/comm")).unwrap_or_default()
}

#[track_caller]
fn assert_not_traced(pid: u32) {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    assert!(status.contains("TracerPid:\t0\n"), "{status}");
}

#[track_caller]
fn assert_stands_still(pid: u32) {
    let before = threads(pid);
    assert!(before.values().all(|(state, _)| *state == 't'), "{before:?}");
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(threads(pid), before);
}

fn copier(frozen: &dyn Frozen) -> &dyn CopyOut {
    let Access::UntilRelease(copier) = frozen.access() else { panic!("a process is read until its release") };
    copier
}

/// One mapping as a capture reads it.
fn read_mapping(frozen: &dyn Frozen, index: usize, unreadable: &mut Vec<AddressRange>) -> Vec<u8> {
    let length = usize::try_from(frozen.address_space().mappings()[index].range.length_bytes()).unwrap();
    let mut bytes = vec![0; length];
    let mut end = 0;
    for range in frozen.populated(index).unwrap() {
        let (start, next_end) = (usize::try_from(range.start).unwrap(), usize::try_from(range.end).unwrap());
        assert!(end <= start && start < next_end && next_end <= length, "sorted, apart and inside");
        end = next_end;
        copier(frozen).copy_out(index, range.start, &mut bytes[start..end], unreadable).unwrap();
    }
    bytes
}

/// Compares every captured mapping with `/proc/PID/mem`. Returns how many bytes were compared.
fn assert_is_what_the_kernel_shows(frozen: &dyn Frozen, pid: u32) -> usize {
    let memory = File::open(format!("/proc/{pid}/mem")).unwrap();
    let mut compared_bytes = 0;
    for (index, mapping) in frozen.address_space().mappings().iter().enumerate() {
        if !mapping.captured {
            continue;
        }
        let mut unreadable = Vec::new();
        let ours = read_mapping(frozen, index, &mut unreadable);
        assert_eq!(unreadable, [], "{mapping:?}");
        let mut theirs = vec![0; ours.len()];
        memory.read_exact_at(&mut theirs, mapping.range.start()).unwrap();
        assert!(ours == theirs, "{mapping:?}");
        compared_bytes += ours.len();
    }
    compared_bytes
}

#[track_caller]
fn refusal(pid: u32) -> SourceError {
    match LiveProcessSource::new(pid).open() {
        Ok(_) => panic!("{pid} should be refused"),
        Err(error) => error,
    }
}

#[track_caller]
fn assert_uncapturable(error: &SourceError, because: &str) {
    assert!(matches!(error, SourceError::Uncapturable { .. }), "{error:?}");
    assert!(error.to_string().contains(because), "{error}");
}

// ---- Reading ------------------------------------------------------------------------------------

#[test]
fn a_working_shell_is_read_as_the_kernel_shows_it() {
    let child = Child::busy_shell();
    let source = LiveProcessSource::new(child.pid());
    for _ in 0..5 {
        let frozen = source.open().unwrap();
        assert_stands_still(child.pid());
        assert!(assert_is_what_the_kernel_shows(&*frozen, child.pid()) > 100_000);
        drop(frozen);
        assert_goes_on(child.pid());
    }
}

#[test]
fn every_thread_of_many_stands_still_and_goes_on() {
    let child = Child::many_threads();
    let source = LiveProcessSource::new(child.pid());
    for _ in 0..20 {
        let frozen = source.open().unwrap();
        assert_stands_still(child.pid());
        let stood_still = frozen.release();
        assert!(!stood_still.is_zero());
        assert_goes_on(child.pid());
        assert_eq!(frozen.release(), stood_still);
    }
    let frozen = source.open().unwrap();
    assert_is_what_the_kernel_shows(&*frozen, child.pid());
}

#[test]
fn the_mappings_are_those_of_the_kernel_and_what_cannot_be_read_is_not_captured() {
    let child = Child::busy_shell();
    let source = LiveProcessSource::new(child.pid());
    let frozen = source.open().unwrap();
    let maps = std::fs::read_to_string(format!("/proc/{}/maps", child.pid())).unwrap();
    let mappings = frozen.address_space().mappings();
    assert_eq!(mappings.len(), maps.lines().count());
    for kind in [MappingKind::Heap, MappingKind::Stack, MappingKind::File] {
        assert!(mappings.iter().any(|mapping| mapping.kind == kind && mapping.captured), "{kind:?}");
    }
    for mapping in mappings {
        match mapping.name.as_str() {
            "[vdso]" => assert!(mapping.captured),
            "[vvar]" | "[vsyscall]" | "[vvar_vclock]" => assert!(!mapping.captured),
            _ => assert_eq!(mapping.captured, mapping.protection.read),
        }
    }
    let Origin::LiveProcess { pid, path, command } = frozen.origin() else { panic!("it is a process") };
    assert_eq!(pid, child.pid());
    assert_eq!(path, std::fs::read_link(format!("/proc/{pid}/exe")).ok());
    assert_eq!(command, ["sh", "-c", BUSY_SHELL]);
}

#[test]
fn the_registers_of_every_thread_and_the_auxiliary_vector_are_attached() {
    let child = Child::many_threads();
    let source = LiveProcessSource::new(child.pid());
    let frozen = source.open().unwrap();
    let attachments: BTreeMap<_, _> =
        frozen.attachments().into_iter().map(|attachment| (attachment.name, attachment.bytes)).collect();
    assert_eq!(attachments["auxv"], std::fs::read(format!("/proc/{}/auxv", child.pid())).unwrap());

    let process = Threads::from_attachment(&attachments[Threads::ATTACHMENT]).unwrap();
    assert_eq!((process.pid, process.parent_pid), (child.pid(), std::process::id()));
    assert_eq!(process.threads[0].tid, child.pid());
    let tids: Vec<u32> = threads(child.pid()).into_keys().collect();
    let mut found: Vec<u32> = process.threads.iter().map(|thread| thread.tid).collect();
    found.sort_unstable();
    assert_eq!(found, tids);
    assert_eq!(process.threads.iter().filter(|thread| thread.name.starts_with(b"worker ")).count(), 6);

    for thread in &process.threads {
        let general = thread.register_set(1).unwrap();
        assert!(thread.register_set(2).is_some_and(|set| !set.is_empty()));
        if cfg!(target_arch = "x86_64") {
            // The stack pointer is number 20 of 27 registers, and points into a mapping.
            assert_eq!(general.len(), 27 * 8);
            let stack_pointer = u64::from_ne_bytes(general[19 * 8..20 * 8].try_into().unwrap());
            assert!(
                frozen
                    .address_space()
                    .mappings()
                    .iter()
                    .any(|mapping| { (mapping.range.start()..mapping.range.end()).contains(&stack_pointer) })
            );
        }
    }
}

#[test]
fn absent_pages_are_skipped_and_pages_behind_the_end_of_a_file_are_reported() {
    let child = Child::role("memory");
    let line = child.line();
    let addresses: Vec<u64> = line.split(' ').map(|number| number.parse().unwrap()).collect();
    let source = LiveProcessSource::new(child.pid());
    let frozen = source.open().unwrap();
    // The kernel joins adjacent mappings of one kind.
    let find = |address: u64| {
        let mappings = frozen.address_space().mappings();
        let index = mappings
            .iter()
            .position(|mapping| (mapping.range.start()..mapping.range.end()).contains(&address))
            .unwrap();
        (index, address - mappings[index].range.start())
    };

    let (sparse, offset) = find(addresses[0]);
    let populated = frozen.populated(sparse).unwrap();
    let populated_bytes: u64 = populated.iter().map(|range| range.end - range.start).sum();
    assert!(populated_bytes < 64 << 20, "{populated_bytes}");
    for (at, expected) in [(3 << 30, 1), ((900 << 30) + 5, 2)] {
        assert!(populated.iter().any(|range| range.contains(&(offset + at))));
        let mut byte = [0];
        copier(&*frozen).copy_out(sparse, offset + at, &mut byte, &mut Vec::new()).unwrap();
        assert_eq!(byte, [expected]);
    }

    let (cut, offset) = find(addresses[1]);
    assert_eq!(offset, 0);
    let mut unreadable = Vec::new();
    let bytes = read_mapping(&*frozen, cut, &mut unreadable);
    assert_eq!(bytes, [vec![7; 2 * 4096], vec![0; 3 * 4096]].concat());
    assert!(unreadable.is_empty(), "it is known beforehand");
    let range = frozen.address_space().mappings()[cut].range;
    let left_out = frozen.left_out().into_iter().map(|left_out| left_out.range);
    unreadable.extend(left_out.filter(|left_out| left_out.intersection(range).is_some()));
    let lost_bytes: u64 = unreadable.iter().map(|range| range.length_bytes()).sum();
    assert_eq!((unreadable[0].start(), lost_bytes), (addresses[1] + 2 * 4096, 3 * 4096));

    let (shared, offset) = find(addresses[2]);
    let populated = frozen.populated(shared).unwrap();
    let at = offset + (500 << 20);
    let expected = at..at + 4096;
    assert_eq!(populated, [expected]);
    let mut bytes = [0; 4096];
    copier(&*frozen).copy_out(shared, at, &mut bytes, &mut Vec::new()).unwrap();
    assert_eq!(bytes, [9; 4096]);
}

// ---- Release
// -------------------------------------------------------------------------------------

#[test]
fn a_process_that_was_stopped_stays_stopped_and_can_be_continued() {
    for child in [Child::busy_shell(), Child::many_threads()] {
        child.signal(Signal::STOP);
        wait_until("it is stopped", || is_stopped_by_a_signal(child.pid()));
        let source = LiveProcessSource::new(child.pid());
        for _ in 0..5 {
            let frozen = source.open().unwrap();
            assert_stands_still(child.pid());
            frozen.release();
            wait_until("it is stopped again", || is_stopped_by_a_signal(child.pid()));
            assert_not_traced(child.pid());
        }
        child.signal(Signal::CONT);
        assert_goes_on(child.pid());
    }
}

#[test]
fn a_process_that_is_stopped_or_continued_meanwhile_is_so_afterwards() {
    let child = Child::busy_shell();
    let source = LiveProcessSource::new(child.pid());
    let frozen = source.open().unwrap();
    child.signal(Signal::STOP);
    assert_stands_still(child.pid());
    drop(frozen);
    wait_until("it is stopped", || is_stopped_by_a_signal(child.pid()));

    let frozen = source.open().unwrap();
    child.signal(Signal::CONT);
    assert_stands_still(child.pid());
    drop(frozen);
    assert_goes_on(child.pid());
}

#[test]
fn a_panic_lets_the_process_go() {
    let child = Child::many_threads();
    let source = LiveProcessSource::new(child.pid());
    let panicked = std::panic::catch_unwind(AssertUnwindSafe(|| {
        let _frozen = source.open().unwrap();
        assert_stands_still(child.pid());
        std::panic::resume_unwind(Box::new("a bug of the caller"));
    }));
    assert_eq!(panicked.unwrap_err().downcast_ref(), Some(&"a bug of the caller"));
    assert_goes_on(child.pid());
}

#[test]
fn the_kernel_lets_the_process_go_when_the_capturing_one_is_killed() {
    let child = Child::many_threads();
    let capturing = Child::role(&format!("stop {}", child.pid()));
    assert_eq!(capturing.line(), "stopped");
    assert_stands_still(child.pid());
    drop(capturing);
    assert_goes_on(child.pid());
}

#[test]
fn no_signal_is_lost_while_a_process_is_stopped_and_let_go() {
    let child = Child::shell("trap \"echo '>got'\" USR1; echo '>ready'; while :; do :; done");
    assert_eq!(child.line(), "ready");
    let is_done = AtomicBool::new(false);
    let source = LiveProcessSource::new(child.pid());
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !is_done.load(Ordering::Relaxed) {
                drop(source.open());
            }
        });
        // The thread above must end even if this panics.
        let answered = std::panic::catch_unwind(AssertUnwindSafe(|| {
            for _ in 0..500 {
                child.signal(Signal::USR1);
                assert_eq!(child.line(), "got");
            }
        }));
        is_done.store(true, Ordering::Relaxed);
        answered.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    });
    // No signal is lost either when the process that holds the child is killed.
    for _ in 0..20 {
        let capturing = Child::role(&format!("stop-repeatedly {}", child.pid()));
        assert_eq!(capturing.line(), "begins");
        for _ in 0..20 {
            child.signal(Signal::USR1);
            assert_eq!(child.line(), "got");
        }
        child.signal(Signal::USR1);
        drop(capturing);
        assert_eq!(child.line(), "got");
    }
}

#[test]
fn bytes_cannot_be_had_after_the_release() {
    let child = Child::busy_shell();
    let source = LiveProcessSource::new(child.pid());
    let frozen = source.open().unwrap();
    frozen.release();
    let error = copier(&*frozen).copy_out(0, 0, &mut [0; 16], &mut Vec::new()).unwrap_err();
    assert!(matches!(error, SourceError::Released { .. }), "{error:?}");
    assert!(matches!(frozen.populated(0).unwrap_err(), SourceError::Released { .. }));
    assert_goes_on(child.pid());
}

// ---- Processes that end -------------------------------------------------------------------------

#[test]
fn a_process_that_is_killed_while_it_is_copied_is_an_error() {
    for child in [Child::busy_shell(), Child::many_threads()] {
        let source = LiveProcessSource::new(child.pid());
        let frozen = source.open().unwrap();
        let mappings = frozen.address_space().mappings();
        let heap = mappings.iter().position(|mapping| mapping.kind == MappingKind::Heap).unwrap();
        let mut buffer = [0; 4096];
        copier(&*frozen).copy_out(heap, 0, &mut buffer, &mut Vec::new()).unwrap();
        child.signal(Signal::KILL);
        let error = copier(&*frozen).copy_out(heap, 0, &mut buffer, &mut Vec::new()).unwrap_err();
        assert!(matches!(error, SourceError::LiveProcessEnded { pid } if pid == child.pid()), "{error:?}");
        let error = frozen.populated(heap).unwrap_err();
        assert!(matches!(error, SourceError::LiveProcessEnded { .. }), "{error:?}");
        frozen.release();
    }
}

#[test]
fn the_exit_status_of_a_captured_child_stays_for_its_parent() {
    let mut child = Child::shell("echo '>ready'; read line; exit 42");
    assert_eq!(child.line(), "ready");
    let source = LiveProcessSource::new(child.pid());
    drop(source.open().unwrap());
    child.process.stdin.take().unwrap().write_all(b"go\n").unwrap();
    assert_eq!(child.process.wait().unwrap().code(), Some(42));

    let mut killed = Child::busy_shell();
    let source = LiveProcessSource::new(killed.pid());
    let frozen = source.open().unwrap();
    killed.signal(Signal::KILL);
    drop(frozen);
    let status = killed.process.wait().unwrap();
    assert_eq!(std::os::unix::process::ExitStatusExt::signal(&status), Some(9));
}

#[test]
fn a_process_that_executes_another_program_or_ends_meanwhile_is_captured_or_an_error() {
    for round in 0..100 {
        let mut child = Command::new("sh").args(["-c", "sh -c : & exec true"]).spawn().unwrap();
        let source = LiveProcessSource::new(child.id());
        match source.open() {
            Ok(frozen) => drop(frozen),
            Err(SourceError::LiveProcessEnded { .. } | SourceError::Uncapturable { .. }) => {}
            Err(error) => panic!("round {round}: {error:?}"),
        }
        assert!(child.wait().unwrap().success(), "round {round}");
    }
}

#[test]
fn threads_that_execute_another_program_meanwhile_neither_hang_nor_are_refused() {
    let child = Child::role("execute");
    assert_eq!(child.line(), "executed");
    let source = LiveProcessSource::new(child.pid());
    for round in 0..200 {
        match source.open() {
            Ok(frozen) => drop(frozen),
            // Between two programs the first thread may be dead, and the other one not yet in its
            // place.
            Err(SourceError::LiveProcessEnded { .. } | SourceError::Uncapturable { .. }) => {}
            Err(error) => panic!("round {round}: {error:?}"),
        }
    }
    for _ in child.lines.try_iter() {}
    assert_eq!(child.line(), "executed");
}

// ---- Refusals -----------------------------------------------------------------------------------

#[test]
fn what_is_no_process_or_cannot_be_captured_is_refused_with_the_reason() {
    // Linux has no pid above 2^22.
    for pid in [0, u32::MAX, (1 << 22) + 1] {
        assert!(matches!(refusal(pid), SourceError::NoSuchPid { .. }), "{pid}");
    }
    assert_uncapturable(&refusal(std::process::id()), "this process itself");
    let own_tid = rustix::thread::gettid().as_raw_nonzero().get().cast_unsigned();
    assert_uncapturable(&refusal(own_tid), "this process itself");

    let mut zombie = Command::new("true").spawn().unwrap();
    wait_until("it has ended", || threads(zombie.id()).values().all(|(state, _)| *state == 'Z'));
    assert_uncapturable(&refusal(zombie.id()), "zombie");
    zombie.wait().unwrap();

    let child = Child::many_threads();
    let worker = threads(child.pid()).into_keys().find(|tid| name(*tid).starts_with("worker"));
    assert_uncapturable(&refusal(worker.unwrap()), &format!("it is a thread of process {}", child.pid()));
}

#[test]
fn a_thread_of_the_kernel_is_refused() {
    // Most containers hide this process.
    if std::fs::read_to_string("/proc/2/comm").is_ok_and(|name| name == "kthreadd\n") {
        assert_uncapturable(&refusal(2), "a thread of the kernel");
    }
}

#[test]
fn a_process_that_somebody_traces_is_refused_and_not_disturbed() {
    let child = Child::many_threads();
    let source = LiveProcessSource::new(child.pid());
    let frozen = source.open().unwrap();
    assert_uncapturable(&refusal(child.pid()), "another capture of it is not done");
    assert_stands_still(child.pid());
    drop(frozen);
    assert_goes_on(child.pid());
}

#[test]
fn a_process_of_another_user_is_refused_with_advice() {
    let message = if rustix::process::geteuid().is_root() {
        // Another user must be able to run this binary.
        let directory = tempfile::tempdir().unwrap();
        let binary = directory.path().join("tests");
        // A child makes the copy: a program cannot be executed while a process has it open for
        // writing, and a child of another test may have inherited such a descriptor.
        let copied = Command::new("cp").arg(std::env::current_exe().unwrap()).arg(&binary).status().unwrap();
        assert!(copied.success());
        for path in [directory.path(), &binary] {
            let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
            std::fs::set_permissions(path, mode).unwrap();
        }
        let template = Child::role_command(&format!("stop {}", std::process::id()));
        let mut command = Command::new(&binary);
        command.args(template.get_args()).current_dir("/").uid(65534).gid(65534);
        command.envs(template.get_envs().filter_map(|(key, value)| Some((key, value?))));
        Child::start(&mut command).line()
    } else {
        format!("{:?}", refusal(1))
    };
    assert!(message.contains("NotPermitted") && message.contains("CAP_SYS_PTRACE"), "{message}");
}
