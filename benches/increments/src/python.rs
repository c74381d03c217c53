//! A real CPython process: `program.py`, which changes one record in a hundred for every line it
//! reads.
//!
//! Between two steps it sleeps in `read`, so every reader sees the same memory.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::FileExt;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use stillframe::source::{LiveProcessSource, Source};

use crate::state::State;
use crate::workload::Workload;

/// Whether the kernel randomises the addresses of the program's memory.
#[derive(Clone, Copy, PartialEq)]
pub enum Randomisation {
    Off,
    On,
}

pub struct Python {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Python {
    pub fn start(records: usize, randomisation: Randomisation) -> Self {
        let mut command = match randomisation {
            Randomisation::On => Command::new("python3"),
            Randomisation::Off => Command::new("setarch"),
        };
        if randomisation == Randomisation::Off {
            command.args(["-R", "python3"]);
        }
        let mut child = command
            .args(["-c", include_str!("program.py"), &records.to_string()])
            // A string stores its own hash.
            .env("PYTHONHASHSEED", "0")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("python3 and setarch (of util-linux) are installed");
        let input = child.stdin.take().unwrap();
        let output = BufReader::new(child.stdout.take().unwrap());
        let mut python = Python { child, input, output };
        python.wait_for("ready");
        python
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    fn wait_for(&mut self, word: &str) {
        let mut line = String::new();
        self.output.read_line(&mut line).unwrap();
        assert_eq!(line.trim(), word, "the CPython program ended");
        // It has written its answer; now it goes back to sleep in its next read.
        while !self.is_asleep() {
            std::thread::yield_now();
        }
    }

    fn is_asleep(&self) -> bool {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.pid())).unwrap();
        stat.rsplit_once(") ").unwrap().1.starts_with('S')
    }
}

impl Workload for Python {
    fn step(&mut self) {
        writeln!(self.input).unwrap();
        self.wait_for("done");
    }

    fn state(&self) -> State {
        let maps = std::fs::read_to_string(format!("/proc/{}/maps", self.pid())).unwrap();
        let memory = File::open(format!("/proc/{}/mem", self.pid())).unwrap();
        let writable = maps.lines().filter(|line| line.split(' ').nth(1).unwrap().starts_with("rw"));
        let mappings = writable.map(|line| {
            let (start, end) = line.split(' ').next().unwrap().split_once('-').unwrap();
            let [start, end] = [start, end].map(|text| u64::from_str_radix(text, 16).unwrap());
            let mut bytes = vec![0; usize::try_from(end - start).unwrap()];
            memory.read_exact_at(&mut bytes, start).unwrap();
            (start, bytes)
        });
        State { mappings: mappings.collect() }
    }

    fn source(&self) -> Box<dyn Source + '_> {
        Box::new(LiveProcessSource::new(self.pid()))
    }
}

impl Drop for Python {
    fn drop(&mut self) {
        // It may have ended already; then there is nothing to do.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
