//! Processes with terabytes of address space and some megabytes of memory: a snapshot holds exactly
//! their memory, byte by byte, and costs in proportion to the memory and not to the address space.

use crate::needs::passed_over;
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};

use stillframe::address_space::MappingKind;
use stillframe::diff::DiffOptions;
use stillframe::sink::SinkError;
use stillframe::source::{FileSource, LiveProcessSource};
use stillframe::verify::VerifyOptions;
use stillframe::{
    AddressRange, CaptureOptions, CaptureStats, Error, GcOptions, LiveMemory, RegionSize, SnapshotId, Store,
};

const PAGE_BYTES: u64 = 4096;
const TIB: u64 = 1 << 40;

/// Maps terabytes without a reserve and prints their addresses, then writes pages on request.
const TERABYTES: &str = r#"
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
int main(int argc, char **argv) {
    size_t tebibytes = atol(argv[1]);
    int kind = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    char *a = mmap(0, tebibytes << 40, PROT_READ | PROT_WRITE, kind, -1, 0);
    char *b = mmap(0, (1ul << 40) + 12345 * 4096ul, PROT_READ | PROT_WRITE, kind, -1, 0);
    if (a == MAP_FAILED || b == MAP_FAILED) { puts("none"); return 0; }
    setvbuf(stdout, 0, _IOLBF, 0);
    printf("%lu %lu\n", (unsigned long)a, (unsigned long)b);
    char line[100];
    while (fgets(line, sizeof line, stdin)) {
        unsigned long address; int value; char what;
        if (sscanf(line, "%c %lu %d", &what, &address, &value) != 3) return 1;
        if (what == 'w') memset((char *)address, value, 4096);
        else madvise((char *)address, 4096, MADV_DONTNEED);
        puts("done");
    }
}
"#;

/// Compiles a program. Where that is impossible, prints a line and returns `None`.
fn compiled(dir: &Path, source: &str, options: &[&str]) -> Option<std::path::PathBuf> {
    let (code, program) = (dir.join("program.c"), dir.join("program"));
    std::fs::write(&code, source).unwrap();
    let mut command = Command::new("cc");
    command.args(["-w", "-g", "-O1"]).args(options).arg(&code).arg("-o").arg(&program);
    match command.output() {
        Ok(output) if output.status.success() => Some(program),
        Ok(_) if !options.is_empty() => {
            passed_over(&format!("it needs cc with {} (Debian package gcc)", options.join(" ")));
            None
        }
        Ok(output) => panic!("{}", String::from_utf8_lossy(&output.stderr)),
        Err(_) => {
            let _ = crate::needs::needs(&["cc"]);
            None
        }
    }
}

struct Program {
    process: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Program {
    fn start(path: &Path, arguments: &[&str]) -> Program {
        let mut command = Command::new(path);
        let mut process =
            command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let (input, output) = (process.stdin.take().unwrap(), process.stdout.take().unwrap());
        Program { process, input, output: BufReader::new(output) }
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.output.read_line(&mut line).unwrap();
        line
    }

    fn ask(&mut self, what: char, address: u64, value: u8) {
        writeln!(self.input, "{what} {address} {value}").unwrap();
        assert_eq!(self.line(), "done\n");
    }

    /// The page at an address, as the kernel shows it.
    fn page(&self, address: u64) -> Vec<u8> {
        let memory = File::open(format!("/proc/{}/mem", self.process.id())).unwrap();
        let mut page = vec![0; PAGE_BYTES as usize];
        memory.read_exact_at(&mut page, address).unwrap();
        page
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Serializes the tests that need much memory.
fn in_turn() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The peak memory of the command during a further capture of a program.
fn most_memory(store: &Path, program: &Program) -> u64 {
    let mut command = Command::new(env!("CARGO_BIN_EXE_stillframe"));
    command.arg("--quiet").arg("--store").arg(store).args(["capture", "--process", "p", "--pid"]);
    let mut command = command.arg(program.process.id().to_string()).spawn().unwrap();
    let status = format!("/proc/{}/status", command.id());
    let mut most_bytes = 0;
    let ended = loop {
        let text = std::fs::read_to_string(&status).unwrap_or_default();
        let line = text.lines().find_map(|line| line.strip_prefix("VmHWM:"));
        if let Some(kib) = line.and_then(|line| line.trim().trim_end_matches(" kB").parse::<u64>().ok()) {
            most_bytes = kib << 10;
        }
        if let Some(ended) = command.try_wait().unwrap() {
            break ended;
        }
        std::thread::sleep(std::time::Duration::from_millis(1));
    };
    assert!(ended.success());
    most_bytes
}

fn create(dir: &Path, region_bytes: u32) -> Store {
    Store::options().region_size(RegionSize::new(region_bytes).unwrap()).create(dir.join("store")).unwrap()
}

fn capture(store: &Store, program: &Program) -> CaptureStats {
    let source = LiveProcessSource::new(program.process.id());
    store.process("p").capture(&source, &CaptureOptions::default()).unwrap()
}

fn bytes(store: &Store, id: SnapshotId, address: u64) -> Vec<u8> {
    let mut found = Vec::new();
    let range = AddressRange::with_length(address, PAGE_BYTES).unwrap();
    store.snapshot(id).unwrap().read_range(range, &mut found).unwrap();
    found
}

#[test]
fn of_terabytes_only_what_is_there_is_kept_and_compared_and_rolled_back() {
    let _turn = in_turn();
    let dir = tempfile::tempdir().unwrap();
    let Some(path) = compiled(dir.path(), TERABYTES, &[]) else { return };
    let mut program = Program::start(&path, &["6"]);
    let line = program.line();
    let Some((a, b)) = line.trim().split_once(' ') else {
        return passed_over("this kernel gives a process no 7 TiB of address space");
    };
    let (a, b): (u64, u64) = (a.parse().unwrap(), b.parse().unwrap());
    let store = create(dir.path(), 16_384);
    // The first and the last page, and some around the borders of tables of 8 MiB.
    let borders =
        [0, PAGE_BYTES, (8 << 20) - PAGE_BYTES, 8 << 20, 3 * TIB - PAGE_BYTES, 6 * TIB - PAGE_BYTES];
    let mut pages: Vec<u64> = borders.iter().map(|offset| a + offset).collect();
    pages.extend((1..60).map(|at| a + at * 97 * (1 << 30) + at * PAGE_BYTES));
    pages.extend([b, b + TIB, b + TIB + 12_344 * PAGE_BYTES]);
    for (at, page) in pages.iter().enumerate() {
        program.ask('w', *page, at as u8 + 1);
    }
    let first = capture(&store, &program);
    let before: Vec<Vec<u8>> = pages.iter().map(|page| program.page(*page)).collect();
    assert!(first.memory_bytes > 7 * TIB && first.memory_bytes - first.zero_bytes < 64 << 20, "{first:?}");
    for (at, page) in pages.iter().enumerate() {
        assert_eq!(bytes(&store, first.id, *page), before[at], "page {at}");
        assert_eq!(before[at], [at as u8 + 1; PAGE_BYTES as usize]);
    }
    assert_eq!(bytes(&store, first.id, a + TIB), [0; PAGE_BYTES as usize]);

    // Some pages change, one is discarded, and one appears where there was none.
    let new = b + (1 << 39);
    program.ask('w', pages[3], 200);
    program.ask('w', pages[40], 201);
    program.ask('w', new, 202);
    program.ask('d', pages[20], 0);
    let second = capture(&store, &program);
    assert_eq!(second.parent, Some(first.id));
    for (page, expected) in [(pages[3], 200), (pages[40], 201), (new, 202), (pages[20], 0), (pages[4], 5)] {
        assert_eq!(bytes(&store, second.id, page), [expected; PAGE_BYTES as usize]);
    }
    let unchanged = capture(&store, &program);
    assert!(unchanged.changed_regions < 8, "{unchanged:?}");

    let diff = store.diff(first.id, second.id, &DiffOptions::default()).unwrap();
    let in_both = |range: &&AddressRange| range.start() >= a.min(b) && range.end() <= a.max(b) + 6 * TIB;
    let mut expected: Vec<_> = [pages[3], pages[40], new, pages[20]]
        .iter()
        .map(|page| AddressRange::with_length(*page, PAGE_BYTES).unwrap())
        .collect();
    expected.sort();
    let found: Vec<_> = diff.ranges.iter().filter(in_both).copied().collect();
    let found: Vec<_> =
        found.into_iter().filter(|range| pages.contains(&range.start()) || range.start() == new).collect();
    assert_eq!(found, expected);
    let range = AddressRange::with_length(pages[40], 8).unwrap();
    let moments: Vec<_> = store.history("p", range).unwrap().collect::<Result<_, _>>().unwrap();
    assert_eq!(moments.iter().map(|it| it.bytes.clone().unwrap()).collect::<Vec<_>>(), [[41; 8], [201; 8]]);

    let stats = store.rollback(first.id).unwrap().live_process(program.process.id()).unwrap();
    assert!(stats.written_bytes < 64 << 20, "{stats:?}");
    for (at, page) in pages.iter().enumerate() {
        assert!(program.page(*page) == before[at], "page {at} is as it was");
    }
    assert_eq!(program.page(new), [0; PAGE_BYTES as usize]);
    // The program continues.
    program.ask('w', pages[0], 99);

    assert_eq!(store.verify(&VerifyOptions::default()).unwrap().problems, []);
    let named = VerifyOptions::new().snapshots([second.id]);
    assert_eq!(store.verify(&named).unwrap().problems, []);
    assert!(store.freeable_bytes(&[first.id]).unwrap() < 64 << 20);
    store.forget(&[first.id]).unwrap();
    store.gc(&GcOptions::new().max_unused_percent(0)).unwrap();
    assert_eq!(bytes(&store, second.id, pages[40]), [201; PAGE_BYTES as usize]);
    // A list of all tables alone took some 27 MB for each TiB.
    drop(store);
    let most = most_memory(&dir.path().join("store"), &program);
    assert!(most < 120 << 20, "{most} bytes of memory");
}

#[test]
fn an_image_that_no_file_of_the_file_system_can_hold_is_refused_with_what_to_do() {
    let _turn = in_turn();
    let dir = tempfile::tempdir().unwrap();
    let Some(path) = compiled(dir.path(), TERABYTES, &[]) else { return };
    let mut program = Program::start(&path, &["20"]);
    if program.line() == "none\n" {
        return passed_over("this kernel gives a process no 21 TiB of address space");
    }
    let store = create(dir.path(), 65_536);
    let taken = capture(&store, &program);
    let image = dir.path().join("image");
    match store.restore(taken.id).unwrap().into_file(&image) {
        Ok(stats) => assert_eq!(stats.bytes, taken.memory_bytes, "a file system that has such files"),
        Err(Error::Sink(error @ SinkError::TooLong { .. })) => {
            assert!(error.to_string().contains("cat --range"), "{error}");
            assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 3, "nothing is left of it");
        }
        Err(error) => panic!("{error:?}"),
    }
}

/// Prints that it begins, and works until it is killed.
const HELLO: &str = r#"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
int main() { char *p = malloc(1 << 20); memset(p, 7, 1 << 20); printf("%lu 0\n", (unsigned long)p); fflush(stdout); for (;;) pause(); }
"#;

fn a_program_with_shadow_memory_costs_by_what_it_has(sanitizer: &str, region_bytes: u32, most_bytes: u64) {
    let _turn = in_turn();
    let dir = tempfile::tempdir().unwrap();
    let Some(path) = compiled(dir.path(), HELLO, &[sanitizer]) else { return };
    let mut program = Program::start(&path, &[]);
    let line = program.line();
    let Some(heap) = line.split_whitespace().next().and_then(|text| text.parse::<u64>().ok()) else {
        return passed_over(&format!("a program with {sanitizer} does not run here"));
    };
    // It has printed where its memory is, but may not wait for input yet.
    while !std::fs::read_to_string(format!("/proc/{}/stat", program.process.id())).unwrap().contains(") S ") {
        std::thread::yield_now();
    }
    let store = create(dir.path(), region_bytes);
    let first = capture(&store, &program);
    let second = capture(&store, &program);
    assert!(first.memory_bytes > TIB && first.memory_bytes - first.zero_bytes < 256 << 20, "{first:?}");
    // The kernel writes the number of the processor into the thread's area for restartable
    // sequences.
    assert!(second.changed_regions <= 1, "{second:?}");
    assert_eq!(second.zero_bytes, first.zero_bytes);
    let inside = heap / PAGE_BYTES * PAGE_BYTES + PAGE_BYTES;
    assert_eq!(bytes(&store, second.id, inside), [7; PAGE_BYTES as usize]);
    assert_eq!(bytes(&store, second.id, inside), program.page(inside));
    let diff = store.diff(first.id, second.id, &DiffOptions::default()).unwrap();
    assert!(diff.differing_bytes <= 16, "{diff:?}");
    let space = store.snapshot(first.id).unwrap().address_space().unwrap();
    let shadow = space.mappings().iter().filter(|it| it.kind == MappingKind::Anonymous);
    assert!(shadow.map(|it| it.range.length_bytes()).max().unwrap() > TIB);
    assert_eq!(store.verify(&VerifyOptions::default()).unwrap().problems, []);
    drop(store);
    let most = most_memory(&dir.path().join("store"), &program);
    assert!(most < most_bytes, "{most} bytes of memory");
}

#[test]
fn a_program_with_an_address_sanitizer_costs_by_what_it_has() {
    a_program_with_shadow_memory_costs_by_what_it_has("-fsanitize=address", 16_384, 120 << 20);
}

#[test]
fn so_it_does_with_small_regions() {
    a_program_with_shadow_memory_costs_by_what_it_has("-fsanitize=address", 4096, 200 << 20);
}

#[test]
fn a_program_with_a_thread_sanitizer_costs_by_what_it_has() {
    a_program_with_shadow_memory_costs_by_what_it_has("-fsanitize=thread", 16_384, 200 << 20);
}

#[test]
fn a_sparse_file_of_terabytes_is_kept_by_what_it_has() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("sparse");
    let file = File::create(&path).unwrap();
    let length = 4 * TIB + 4096;
    if file.set_len(length).is_err() {
        return passed_over("the temporary directory takes no file of 4 TiB");
    }
    let places = [0, 5 << 30, (2 * TIB) - 1000, length - 3000];
    for (at, place) in places.iter().enumerate() {
        file.write_all_at(&[at as u8 + 1; 3000], *place).unwrap();
    }
    let store = create(dir.path(), 16_384);
    let source = FileSource::new(&path);
    let first = store.process("f").capture(&source, &CaptureOptions::default()).unwrap();
    file.write_all_at(&[9; 10], places[1]).unwrap();
    let second = store.process("f").capture(&source, &CaptureOptions::default()).unwrap();
    assert_eq!((second.memory_bytes, second.changed_regions), (length, 1));
    let diff = store.diff(first.id, second.id, &DiffOptions::default()).unwrap();
    assert_eq!(diff.ranges, [AddressRange::with_length(places[1], 10).unwrap()]);
    let back = dir.path().join("back");
    store.restore(second.id).unwrap().into_file(&back).unwrap();
    let back = File::open(&back).unwrap();
    for place in places {
        let (mut found, mut expected) = ([0; 3000], [0; 3000]);
        back.read_exact_at(&mut found, place).unwrap();
        File::open(&path).unwrap().read_exact_at(&mut expected, place).unwrap();
        assert_eq!(found, expected);
    }
    assert_eq!(back.metadata().unwrap().len(), length);
}

#[test]
fn a_slice_is_restored_whole_with_zeros_between_what_is_stored() {
    let dir = tempfile::tempdir().unwrap();
    let store = create(dir.path(), 512);
    // Tables of 256 KiB: stored, zeros, zeros, stored, and zeros that end in the middle of one.
    let mut memory = vec![0u8; 5 * (256 << 10) + 1000];
    memory[..10].fill(1);
    memory[3 * (256 << 10) + 77..][..600].fill(2);
    let taken = store.process("p").capture(&memory, &CaptureOptions::default()).unwrap();
    let mut target = vec![0xAA; memory.len()];
    store.restore(taken.id).unwrap().into_slice(&mut target).unwrap();
    assert!(target == memory);
    assert!(store.restore(taken.id).unwrap().into_mapping().unwrap()[..] == memory[..]);
    // Memory that grows by zeros only, with tracking and without.
    let arena = memmap2::MmapMut::map_anon(64 << 20).unwrap();
    let live = LiveMemory::new(arena.as_ptr(), 8 << 20).track_writes_if_possible();
    let before = store.process("live").capture(&live, &CaptureOptions::default()).unwrap();
    live.set_length_bytes(64 << 20).unwrap();
    let after = store.process("live").capture(&live, &CaptureOptions::default()).unwrap();
    assert_eq!((before.zero_bytes, after.zero_bytes), (8 << 20, 64 << 20));
    assert_eq!((after.memory_bytes, after.changed_regions), (64 << 20, 0));
}
