//! Memory that is not present or not readable: which pages a capture of a live process takes for
//! zeros, which it reads, which it leaves out and reports, and that the process is as large
//! afterwards as before.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Output, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use serde_json::Value;
use stillframe::source::{Access, LeftOut, LiveProcessSource, Source, WhyLeftOut};
use stillframe::{AddressRange, CaptureOptions, CaptureStats, LiveMemory, Store};
use tempfile::TempDir;

use crate::needs;

const PAGE: u64 = 4096;
const MIB: u64 = 1 << 20;

// ---- A program with memory of one kind
// -----------------------------------------------------------

struct Program {
    process: Child,
    output: BufReader<ChildStdout>,
    directory: TempDir,
    at: u64,
    length: u64,
}

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

fn compiled() -> Option<&'static Path> {
    if !needs::needs(&["cc"]) {
        return None;
    }
    static PROGRAM: OnceLock<Option<(TempDir, std::path::PathBuf)>> = OnceLock::new();
    let compile = || {
        let directory = tempfile::tempdir().unwrap();
        let program = directory.path().join("program");
        let source = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/live/absent.c");
        let mut cc = Command::new("cc");
        let compiled = cc.args(["-O1", "-w", "-pthread", "-o"]).arg(&program).arg(source).status();
        compiled.is_ok_and(|status| status.success()).then_some((directory, program))
    };
    Some(&PROGRAM.get_or_init(compile).as_ref().expect("absent.c compiles").1)
}

impl Program {
    /// `None` where the machine lacks something, which is printed.
    fn start(what: &str) -> Option<Program> {
        Program::start_by(what, Command::new(compiled()?))
    }

    /// Starts it as another user without privileges.
    fn start_as_nobody(what: &str) -> Option<Program> {
        Program::start_by(what, unprivileged(compiled()?)?)
    }

    fn start_by(what: &str, mut command: Command) -> Option<Program> {
        let directory = tempfile::tempdir().unwrap();
        if is_root() {
            for path in [directory.path(), compiled()?.parent().unwrap(), compiled()?] {
                std::fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(0o777)).unwrap();
            }
        }
        command.arg(what).arg(directory.path()).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut process = command.spawn().unwrap();
        let mut output = BufReader::new(process.stdout.take().unwrap());
        let mut line = String::new();
        output.read_line(&mut line).unwrap();
        if let Some(needs) = line.strip_prefix("lacks ") {
            process.wait().unwrap();
            needs::passed_over(&format!("it needs {}", needs.trim()));
            return None;
        }
        let numbers: Vec<u64> = line.split_ascii_whitespace().filter_map(|word| word.parse().ok()).collect();
        let [at, length] = numbers[..] else { panic!("{what} says {line:?}") };
        Some(Program { process, output, directory, at, length })
    }

    fn pid(&self) -> u32 {
        self.process.id()
    }

    fn range(&self) -> AddressRange {
        AddressRange::with_length(self.at, self.length).unwrap()
    }

    /// Asks the program, which returns how many page faults it has served.
    fn ask(&mut self, what: &str) -> u64 {
        writeln!(self.process.stdin.as_mut().unwrap(), "{what}").unwrap();
        let mut line = String::new();
        self.output.read_line(&mut line).unwrap();
        line.trim().parse().unwrap()
    }

    /// All memory that the kernel counts for the process, in KiB, once the process waits for its
    /// input.
    fn resident_kib(&self) -> u64 {
        let stat = || std::fs::read_to_string(format!("/proc/{}/stat", self.pid())).unwrap();
        while !stat().rsplit_once(") ").unwrap().1.starts_with('S') {
            std::thread::sleep(Duration::from_millis(1));
        }
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid())).unwrap();
        let number = |key: &str| -> u64 {
            let line = status.lines().find_map(|line| line.strip_prefix(key)).unwrap();
            line.trim_end_matches("kB").trim().parse().unwrap()
        };
        ["RssAnon:", "RssFile:", "RssShmem:", "VmSwap:", "HugetlbPages:"].into_iter().map(number).sum()
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // The program cleans up when its input ends.
        drop(self.process.stdin.take());
        let deadline = Instant::now() + Duration::from_secs(5);
        while Instant::now() < deadline && matches!(self.process.try_wait(), Ok(None)) {
            std::thread::sleep(Duration::from_millis(5));
        }
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// A command without the privileges that a capture needs to see the files behind mappings. If this
/// test is root, it runs as another user.
fn unprivileged(program: &Path) -> Option<Command> {
    if !is_root() {
        return Some(Command::new(program));
    }
    if !needs::needs(&["setpriv"]) {
        return None;
    }
    let mut command = Command::new("setpriv");
    command.args(["--reuid=65534", "--regid=65534", "--clear-groups"]).arg(program);
    Some(command)
}

// ---- Captures -----------------------------------------------------------------------------------

struct Taken {
    store: Store,
    _directory: TempDir,
    capture: CaptureStats,
}

fn capture(program: &Program) -> Taken {
    let directory = tempfile::tempdir().unwrap();
    let store = Store::options().create(directory.path().join("store")).unwrap();
    let source = LiveProcessSource::new(program.pid());
    let capture = store.process("p").capture(&source, &CaptureOptions::default()).unwrap();
    Taken { store, _directory: directory, capture }
}

impl Taken {
    /// The restored bytes at an address.
    fn bytes(&self, at: u64, length: usize) -> Vec<u8> {
        let restore = self.store.restore(self.capture.id).unwrap();
        let range = AddressRange::with_length(at, length as u64).unwrap();
        let space = restore.address_space().clone();
        let (offset, mapping) = space
            .captured()
            .find(|(_, mapping)| mapping.range.intersection(range) == Some(range))
            .unwrap_or_else(|| panic!("{at:#x} is captured"));
        let file = tempfile::NamedTempFile::new().unwrap();
        let path = file.path().with_extension("image");
        restore.into_file(&path).unwrap();
        let mut bytes = vec![0; length];
        File::open(&path).unwrap().read_exact_at(&mut bytes, offset + at - mapping.range.start()).unwrap();
        std::fs::remove_file(path).unwrap();
        bytes
    }

    /// What was left out of the program's mapping, in bytes for each reason.
    fn left_out(&self, program: &Program) -> Vec<(WhyLeftOut, u64)> {
        left_out_of(&self.capture.left_out, program)
    }
}

fn left_out_of(all: &[LeftOut], program: &Program) -> Vec<(WhyLeftOut, u64)> {
    let inside: Vec<LeftOut> =
        all.iter().filter(|it| it.range.intersection(program.range()).is_some()).copied().collect();
    LeftOut::sums(&inside)
}

/// Runs the command, and fails if it has not ended after a minute.
#[track_caller]
fn run(mut command: Command) -> Output {
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let deadline = Instant::now() + Duration::from_secs(60);
    while child.try_wait().unwrap().is_none() {
        if Instant::now() > deadline {
            child.kill().unwrap();
            panic!("{command:?} does not end");
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    child.wait_with_output().unwrap()
}

fn stillframe() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_stillframe"))
}

#[track_caller]
fn json(output: &Output) -> Value {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

// ---- Pages that a server provides
// ----------------------------------------------------------------

#[test]
fn pages_that_a_userfaultfd_would_fill_are_left_out_and_no_zeros() {
    for (what, there) in [("missing", 2), ("missing-waits", 1), ("missing-shared", 1), ("minor", 1)] {
        let Some(mut program) = Program::start(what) else { continue };
        let faults = program.ask("faults");
        let store = tempfile::tempdir().unwrap();
        // Through the command: it must end, and its JSON must report what it left out.
        let mut command = Command::new(stillframe());
        command.arg("--store").arg(store.path()).args(["--json", "--quiet", "capture", "--process", "p"]);
        let output = run({
            command.args(["--pid", &program.pid().to_string()]);
            command
        });
        let taken = json(&output);
        let missing_bytes = program.length - there * PAGE;
        assert_eq!(taken["unreadable_bytes"], missing_bytes, "{what}");
        assert_eq!(taken["left_out"][0]["why"], "userfault");
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(said.contains("userfaultfd still has to fill"), "{what}: {said:?}");
        let mut show = Command::new(stillframe());
        show.arg("--store").arg(store.path()).args(["--json", "show", "latest"]);
        let shown = json(&run(show));
        assert_eq!(shown["unreadable_bytes"], missing_bytes);
        assert_eq!(program.ask("faults"), faults, "{what}: the capture had pages filled");

        let taken = capture(&program);
        assert_eq!(taken.left_out(&program), [(WhyLeftOut::Userfault, missing_bytes)], "{what}");
        assert_eq!(taken.bytes(program.at, 1), [1], "{what}");
        assert_eq!(program.ask("faults"), faults);
    }
}

#[test]
fn a_file_system_whose_server_is_silent_is_not_asked() {
    let Some(program) = Program::start("server") else { return };
    let store = tempfile::tempdir().unwrap();
    let mut command = Command::new(stillframe());
    command.arg("--store").arg(store.path()).args(["--json", "capture", "--pid", &program.pid().to_string()]);
    let output = run(command);
    let taken = json(&output);
    assert_eq!(taken["left_out"][0]["why"], "file-server");
    // The page that the process has seen is present.
    assert!(taken["unreadable_bytes"].as_u64().unwrap() < program.length);
    assert!(String::from_utf8_lossy(&output.stderr).contains("asks a server"));
}

// ---- The process does not get larger
// -------------------------------------------------------------

#[test]
fn a_capture_leaves_the_process_as_large_as_it_was() {
    // The mappings that are read where the files behind mappings can be seen. Where they cannot,
    // these two kinds cannot be read.
    let closed = ["shared", "memfd-closed"];
    for what in ["memfd", "memfd-private", "memfd-closed", "shared", "shm", "disk", "disk-private", "zero"] {
        let Some(program) = Program::start(what) else { continue };
        let before = program.resident_kib();
        let taken = capture(&program);
        assert_eq!(program.resident_kib(), before, "{what}, as it is");
        assert_eq!(taken.bytes(program.at, 8192), [1; 8192], "{what}");
        let left_out = taken.left_out(&program);
        assert!(left_out.is_empty() || !is_root() && closed.contains(&what), "{what}: {left_out:?}");
        if what.starts_with("memfd") && what != "memfd-closed" {
            assert_eq!(taken.bytes(program.at + 5 * MIB, 4), b"file"[..], "{what}");
        }
        drop(program);

        let Some(program) = Program::start_as_nobody(what) else { continue };
        let before = program.resident_kib();
        let store = tempfile::tempdir().unwrap();
        std::fs::set_permissions(store.path(), std::os::unix::fs::PermissionsExt::from_mode(0o777)).unwrap();
        let Some(mut command) = unprivileged(stillframe()) else { return };
        command.arg("--store").arg(store.path().join("s")).args(["--json", "capture", "--pid"]);
        command.arg(program.pid().to_string());
        let output = run(command);
        if !output.status.success() && String::from_utf8_lossy(&output.stderr).contains("Permission denied") {
            return needs::passed_over("it needs a build directory that other users may enter");
        }
        let taken = json(&output);
        assert_eq!(program.resident_kib(), before, "{what}, as nobody");
        // A mapped library has a file name, so all its pages can be read.
        let expected = if closed.contains(&what) { program.length - MIB } else { 0 };
        assert_eq!(taken["unreadable_bytes"], expected, "{what}, as nobody: {taken}");
    }
}

#[test]
fn holes_of_files_stay_holes() {
    for what in ["memfd", "shm", "disk"] {
        let Some(program) = Program::start(what) else { continue };
        let range = program.range();
        let mapped = format!("/proc/{}/map_files/{:x}-{:x}", program.pid(), range.start(), range.end());
        let Ok(file) = File::open(mapped) else { return needs::passed_over("it needs root") };
        let before = file.metadata().unwrap().blocks();
        drop(capture(&program));
        assert_eq!(file.metadata().unwrap().blocks(), before, "{what}");
    }
}

#[test]
fn huge_pages_are_not_taken_out_of_the_pool() {
    let pool = "/proc/sys/vm/nr_hugepages";
    let number =
        |path: &str| std::fs::read_to_string(path).ok().and_then(|text| text.trim().parse::<u64>().ok());
    let Some(before) = number(pool).filter(|_| is_root()) else {
        return needs::passed_over("it needs root, huge pages");
    };
    struct PutBack(u64);
    impl Drop for PutBack {
        fn drop(&mut self) {
            let _ = std::fs::write("/proc/sys/vm/nr_hugepages", self.0.to_string());
        }
    }
    let _put_back = PutBack(before);
    std::fs::write(pool, (before + 8).to_string()).unwrap();
    for what in ["huge", "huge-shared"] {
        let Some(program) = Program::start(what) else { continue };
        let resident = program.resident_kib();
        let taken = capture(&program);
        assert_eq!(program.resident_kib(), resident, "{what}");
        assert_eq!(taken.left_out(&program), [], "{what}");
        assert_eq!(
            (taken.bytes(program.at, 2), taken.bytes(program.at + 4 * MIB, 2)),
            (vec![1; 2], vec![0; 2])
        );
    }
}

#[test]
fn what_lies_behind_the_end_of_a_file_is_left_out_and_not_asked_for() {
    let Some(program) = Program::start("longer") else { return };
    let taken = capture(&program);
    assert_eq!(taken.left_out(&program), [(WhyLeftOut::BehindFile, program.length - 4 * PAGE)]);
    // The last page of the file was written beyond the file's end, and no file has such bytes.
    assert_eq!(
        (taken.bytes(program.at, 2), taken.bytes(program.at + 4 * PAGE - 1, 1)),
        (vec![1; 2], vec![9])
    );
}

#[test]
fn a_file_that_is_cut_while_it_is_copied_is_left_out_from_there() {
    let Some(program) = Program::start("cut") else { return };
    let source = LiveProcessSource::new(program.pid());
    let frozen = source.open().unwrap();
    let mappings = frozen.address_space().mappings();
    let index = mappings.iter().position(|mapping| mapping.range == program.range()).unwrap();
    let length = 3 * PAGE + 100;
    assert_eq!(frozen.populated(index).unwrap(), std::slice::from_ref(&(0..length)));
    File::options().write(true).open(program.directory.path().join("cut")).unwrap().set_len(PAGE).unwrap();
    let Access::UntilRelease(memory) = frozen.access() else {
        panic!("a process is copied until it is let go")
    };
    let (mut bytes, mut unreadable) = (vec![7; length as usize], Vec::new());
    memory.copy_out(index, 0, &mut bytes, &mut unreadable).unwrap();
    assert!(
        bytes[..PAGE as usize] == [1; PAGE as usize] && bytes[PAGE as usize..].iter().all(|byte| *byte == 0)
    );
    assert_eq!(unreadable, [AddressRange::new(program.at + PAGE, program.at + length).unwrap()]);
}

// ---- Memory that the process may not read
// --------------------------------------------------------

#[test]
fn a_page_without_read_permission_is_captured_and_reserves_of_terabytes_are_not() {
    let Some(program) = Program::start("no-access") else { return };
    let before = program.resident_kib();
    let taken = capture(&program);
    assert_eq!(program.resident_kib(), before);
    assert_eq!(taken.bytes(program.at + 512 * MIB, PAGE as usize), [6; PAGE as usize]);
    let space = taken.store.restore(taken.capture.id).unwrap().address_space().clone();
    assert!(space.image_bytes() < 64 * MIB, "{}", space.image_bytes());
    // The record has the whole mapping, split at the captured part.
    let parts: Vec<_> = space
        .mappings()
        .iter()
        .filter_map(|mapping| Some((mapping.range.intersection(program.range())?, mapping.captured)))
        .collect();
    assert_eq!(parts.iter().map(|(range, _)| range.length_bytes()).sum::<u64>(), program.length);
    let captured: Vec<_> = parts.iter().filter(|(_, captured)| *captured).map(|(range, _)| *range).collect();
    assert_eq!(captured, [AddressRange::with_length(program.at + 512 * MIB, PAGE).unwrap()]);

    let core = taken._directory.path().join("core");
    taken.store.restore(taken.capture.id).unwrap().into_core(&core).unwrap();
    let bytes = std::fs::read(core).unwrap();
    assert!(bytes.windows(PAGE as usize).any(|window| window == [6; PAGE as usize]), "the core has the page");
}

#[test]
fn memory_of_every_kind_without_read_permission_is_captured() {
    for what in ["write-only", "no-access-shared", "no-access-copied"] {
        let Some(program) = Program::start(what) else { continue };
        let taken = capture(&program);
        assert_eq!(taken.bytes(program.at + PAGE, PAGE as usize), [6; PAGE as usize], "{what}");
        assert_eq!(taken.left_out(&program), [], "{what}");
    }
}

// ---- Guard pages
// ---------------------------------------------------------------------------------

#[test]
fn guards_are_left_out_and_told_and_what_was_a_guard_is_read_again() {
    let Some(mut program) = Program::start("guard") else { return };
    let taken = capture(&program);
    assert_eq!(taken.left_out(&program), [(WhyLeftOut::Guard, 65536)]);
    assert_eq!((taken.bytes(program.at, 2), taken.bytes(program.at + 65536, 2)), (vec![1; 2], vec![0; 2]));
    program.ask("u");
    let taken = capture(&program);
    assert_eq!((taken.left_out(&program), taken.bytes(program.at + 65536, 2)), (vec![], vec![2; 2]));
}

#[test]
fn secret_memory_is_left_out() {
    let Some(program) = Program::start("secret") else { return };
    assert_eq!(capture(&program).left_out(&program), [(WhyLeftOut::Secret, program.length)]);
}

/// Installs or removes guard pages in this process; `None` where the kernel has no guard pages.
fn guard(memory: &mut memmap2::MmapMut, from: usize, length: usize, install: bool) -> Option<()> {
    let advice = if install { 102 } else { 103 };
    // SAFETY: the pages lie inside the memory, which is borrowed mutably, and no access to them
    // happens while they are guards.
    let answer = unsafe { libc::madvise(memory.as_mut_ptr().add(from).cast(), length, advice) };
    (answer == 0).then_some(()).or_else(|| {
        needs::passed_over("it needs a kernel with guard pages (Linux 6.13)");
        None
    })
}

#[test]
fn a_guard_inside_live_memory_does_not_make_captures_fail() {
    let mut memory = memmap2::MmapMut::map_anon(MIB as usize).unwrap();
    memory.fill(1);
    let directory = tempfile::tempdir().unwrap();
    let store = Store::options().create(directory.path().join("store")).unwrap();
    let plain = LiveMemory::new(memory.as_ptr(), memory.len());
    let tracked = LiveMemory::new(memory.as_ptr(), memory.len()).track_writes_if_possible();
    let take = |name: &str, live: &LiveMemory| {
        store.process(name).capture(live, &CaptureOptions::default()).unwrap()
    };
    let bytes = |capture: &CaptureStats| store.restore(capture.id).unwrap().into_mapping().unwrap();
    take("tracked", &tracked);

    if guard(&mut memory, 65536, 65536, true).is_none() {
        return;
    }
    let expected = [LeftOut { range: AddressRange::new(65536, 131_072).unwrap(), why: WhyLeftOut::Guard }];
    let unreadable = [expected[0].range];
    for (name, live) in [("plain", &plain), ("tracked", &tracked), ("tracked", &tracked)] {
        let capture = take(name, live);
        let space = store.snapshot(capture.id).unwrap().address_space().unwrap();
        assert_eq!(space.unreadable(), unreadable, "{name}");
        let restored = bytes(&capture);
        assert!(restored[..65536] == [1; 65536] && restored[65536..131_072] == [0; 65536], "{name}");
        assert_eq!(restored[131_072], 1);
    }
    memory[0] = 5;
    let capture = take("tracked", &tracked);
    assert_eq!((bytes(&capture)[0], &capture.left_out[..]), (5, &expected[..]));
    if let stillframe::track::Tracking::By(_) = capture.tracking {
        // A page that became a guard counts as changed, and of the others only those that were
        // written.
        assert!(capture.changed_regions <= 1, "{}", capture.changed_regions);
    }

    guard(&mut memory, 65536, 65536, false).unwrap();
    memory[65536..131_072].fill(8);
    for (name, live) in [("plain", &plain), ("tracked", &tracked)] {
        let capture = take(name, live);
        assert!(bytes(&capture)[65536..131_072] == [8; 65536] && capture.left_out.is_empty(), "{name}");
    }
}

// ---- The capture's own memory
// ---------------------------------------------------------------------

#[test]
fn a_capture_without_room_for_its_staging_buffer_says_so() {
    let directory = tempfile::tempdir().unwrap();
    let memory = directory.path().join("memory");
    std::fs::write(&memory, vec![1; MIB as usize]).unwrap();
    // Less than the buffer needs, and enough for everything else.
    let script = "ulimit -v $((140 << 10)) && exec \"$0\" --store \"$1/store\" capture --file \"$2\"";
    let mut command = Command::new("sh");
    command.args(["-c", script]).arg(stillframe()).arg(directory.path()).arg(&memory);
    let output = run(command);
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("to copy the source into") && said.contains("ulimit -v"), "{said}");
}
