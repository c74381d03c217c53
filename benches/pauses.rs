//! How long a capture pauses a live process, and how much CPU time it takes, compared with gdb's
//! `gcore` of the same process.
//!
//! `cargo bench --bench pauses [ROUNDS]`, 5 by default. In earlier versions, the pause of these
//! programs depended on what is mapped and not on what is populated: a mapping longer than its
//! file, the shadow memory of an address sanitizer, a thread that waits in vfork, guard pages, and
//! empty memory that is armed for write tracking. Each program has a thread that only reads the
//! clock; its longest gap is the pause, as the process observes it, for both tools. A round is a
//! first capture, a further capture and a `gcore`, one after another; the printed results are
//! medians.
//!
//! It needs `cc` with the address sanitizer, and `gcore` (Debian packages gcc and gdb); without
//! `gcore`, its columns are empty.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used)]

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

/// The common part of every program: it prints `ready`, and then, for each line that it reads, the
/// longest gap since the last line, in microseconds.
const COMMON: &str = r#"
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
static volatile long longest;
static long now() { struct timespec t; clock_gettime(CLOCK_MONOTONIC, &t); return t.tv_sec * 1000000 + t.tv_nsec / 1000; }
static void *clock_watcher(void *a) { for (long before = now(), at;; before = at) { usleep(200); at = now(); if (at - before > longest) longest = at - before; } }
static void prepare();
static void *answerer(void *a) { char line[100]; while (fgets(line, sizeof line, stdin)) { printf("%ld\n", longest); fflush(stdout); longest = 0; } _exit(0); }
static void waits_in_vfork() { if (!vfork()) { struct timespec t = { 600, 0 }; syscall(SYS_nanosleep, &t, 0); _exit(0); } }
int main() {
    pthread_t t; prepare(); pthread_create(&t, 0, clock_watcher, 0); pthread_create(&t, 0, answerer, 0);
    puts("ready"); fflush(stdout);
    if (VFORK) { usleep(100000); waits_in_vfork(); }
    for (;;) pause();
}
"#;

struct Kind {
    name: &'static str,
    prepare: &'static str,
    options: &'static [&'static str],
}

const KINDS: [Kind; 6] = [
    Kind {
        name: "16 MiB of memory",
        prepare: "static void prepare() { memset(malloc(16 << 20), 1, 16 << 20); }",
        options: &["-DVFORK=0"],
    },
    Kind {
        name: "8 GiB mapped of a file of 12 KiB",
        prepare: "static void prepare() { char name[] = \"/tmp/pausesXXXXXX\"; int f = mkstemp(name); unlink(name); \
                  ftruncate(f, 12288); mmap(0, 8ul << 30, PROT_READ | PROT_WRITE, MAP_SHARED, f, 0); }",
        options: &["-DVFORK=0"],
    },
    Kind {
        name: "address sanitizer, 14 TiB mapped",
        prepare: "static void prepare() { memset(malloc(1 << 20), 1, 1 << 20); }",
        options: &["-DVFORK=0", "-fsanitize=address"],
    },
    Kind { name: "a thread in vfork", prepare: "static void prepare() {}", options: &["-DVFORK=1"] },
    Kind {
        name: "1 GiB of guards (Linux 6.13)",
        prepare: "static void prepare() { size_t n = 1ul << 30; char *m = mmap(0, n, 3, MAP_PRIVATE | MAP_ANONYMOUS | \
                  MAP_NORESERVE, -1, 0); m[0] = 1; if (madvise(m + 4096, n - 4096, 102)) _exit(1); }",
        options: &["-DVFORK=0"],
    },
    Kind {
        name: "1 GiB of armed empty memory (Linux 6.7)",
        prepare: "static void prepare() { size_t n = 1ul << 30; char *m = mmap(0, n, 3, MAP_PRIVATE | MAP_ANONYMOUS | \
                  MAP_NORESERVE, -1, 0); m[0] = 1; int u = syscall(SYS_userfaultfd, O_CLOEXEC | 1); \
                  struct uffdio_api a = { UFFD_API, 1 << 13 | 1 << 15 }; \
                  struct uffdio_register r = { { (uintptr_t)m, n }, UFFDIO_REGISTER_MODE_WP }; \
                  struct uffdio_writeprotect w = { { (uintptr_t)m, n }, 1 }; \
                  if (ioctl(u, UFFDIO_API, &a) || ioctl(u, UFFDIO_REGISTER, &r) || ioctl(u, UFFDIO_WRITEPROTECT, &w)) \
                  _exit(1); }",
        options: &["-DVFORK=0"],
    },
];

/// A tool that takes longer is killed, and the result is the time until then.
const AT_MOST_SECONDS: &str = "60";

fn main() {
    let rounds: usize = std::env::args().filter_map(|text| text.parse().ok()).next().unwrap_or(5);
    let dir =
        tempfile::tempdir_in(std::env::var_os("STILLFRAME_BENCH_DIR").unwrap_or_else(|| "target".into()));
    let dir = dir.unwrap();
    let has_gcore = Command::new("gcore").stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok();
    println!("pause as a thread of the process sees it / CPU of the tool, in ms; medians of {rounds} rounds");
    println!("{:40} {:>18} {:>18} {:>18}", "", "first capture", "further capture", "gcore");
    for (number, kind) in KINDS.iter().enumerate() {
        let dir = dir.path().join(number.to_string());
        std::fs::create_dir(&dir).unwrap();
        match program(&dir, kind) {
            Some(program) => measure(&dir, kind, program, rounds, has_gcore),
            None => println!("{:40} cannot be had here", kind.name),
        }
    }
}

fn measure(dir: &Path, kind: &Kind, mut program: Program, rounds: usize, has_gcore: bool) {
    let pid = program.process.id().to_string();
    let mut took: [Vec<Took>; 3] = Default::default();
    for round in 0..rounds {
        let store = dir.join(format!("store-{round}"));
        for took in took.iter_mut().take(2) {
            let mut command = Command::new("timeout");
            command.args([AT_MOST_SECONDS, env!("CARGO_BIN_EXE_stillframe"), "--quiet", "--store"]);
            command.arg(&store).args(["capture", "--pid", &pid]);
            took.push(program.during(command));
        }
        if has_gcore {
            let mut command = Command::new("timeout");
            command.args([AT_MOST_SECONDS, "gcore", "-o"]).arg(dir.join("core")).arg(&pid);
            took[2].push(program.during(command));
            let _ = std::fs::remove_file(dir.join(format!("core.{pid}")));
        }
        let _ = std::fs::remove_dir_all(&store);
    }
    let column = |took: &Vec<Took>| {
        if took.is_empty() {
            return String::new();
        }
        let middle = |of: fn(&Took) -> Duration| {
            let mut values: Vec<_> = took.iter().map(of).collect();
            values.sort();
            values[values.len() / 2].as_secs_f64() * 1e3
        };
        let refused = if took.iter().all(|it| it.is_done) { "" } else { " !" };
        format!("{:.1} / {:.0}{refused}", middle(|it| it.pause), middle(|it| it.cpu))
    };
    let [first, further, gcore] = [0, 1, 2].map(|at: usize| column(&took[at]));
    println!("{:40} {first:>18} {further:>18} {gcore:>18}", kind.name);
    if took.iter().flatten().any(|it| !it.is_done) {
        println!("{:40} ! refused, or ended after {AT_MOST_SECONDS} s", "");
    }
}

struct Took {
    pause: Duration,
    cpu: Duration,
    is_done: bool,
}

struct Program {
    process: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Program {
    /// The longest gap since the last request.
    fn gap(&mut self) -> Duration {
        writeln!(self.input).unwrap();
        Duration::from_micros(self.line().trim().parse().unwrap())
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.output.read_line(&mut line).unwrap();
        line
    }

    fn during(&mut self, mut command: Command) -> Took {
        std::thread::sleep(Duration::from_millis(50));
        self.gap();
        let before = cpu_of_children();
        let begun = Instant::now();
        let status =
            command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).status().unwrap();
        std::thread::sleep(Duration::from_millis(5));
        let cpu = cpu_of_children().saturating_sub(before);
        Took { pause: self.gap().min(begun.elapsed()), cpu, is_done: status.success() }
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let children = format!("/proc/{0}/task/{0}/children", self.process.id());
        for child in std::fs::read_to_string(children).unwrap_or_default().split_whitespace() {
            let _ = Command::new("kill").args(["-9", child]).status();
        }
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Compiles and starts a program; `None` if the compiler or the kernel lacks something.
fn program(dir: &Path, kind: &Kind) -> Option<Program> {
    let (code, path): (PathBuf, PathBuf) = (dir.join("program.c"), dir.join("program"));
    std::fs::write(&code, format!("{COMMON}{}", kind.prepare)).unwrap();
    let mut command = Command::new("cc");
    command.args(["-w", "-O1", "-pthread"]).args(kind.options).arg(&code).arg("-o").arg(&path);
    command.output().ok().filter(|output| output.status.success())?;
    let mut process = Command::new(&path).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().ok()?;
    let (input, output) = (process.stdin.take()?, process.stdout.take()?);
    let mut program = Program { process, input, output: BufReader::new(output) };
    let is_ready = program.line() == "ready\n";
    std::thread::sleep(Duration::from_millis(300));
    is_ready.then_some(program)
}

/// The CPU time of the children that have ended, in steps of 10 ms.
fn cpu_of_children() -> Duration {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap();
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
    let ticks: u64 = fields[13].parse::<u64>().unwrap() + fields[14].parse::<u64>().unwrap();
    Duration::from_millis(10 * ticks)
}
