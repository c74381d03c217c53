//! Workloads: programs whose memory changes from step to step, in the same way in every run.

use std::process::Command;

use stillframe::source::Source;

use crate::arena::Arena;
use crate::python::{Python, Randomisation};
use crate::state::State;
use crate::wasm::Wasm;

/// How many records the CPython program keeps.
const PYTHON_RECORDS: usize = 75_000;

pub trait Workload {
    /// Advances to the next moment.
    fn step(&mut self);

    /// Its memory now: everything that it can write to.
    fn state(&self) -> State;

    /// The live process or memory, for a capture.
    fn source(&self) -> Box<dyn Source + '_>;
}

/// A workload that runs from moment to moment.
#[derive(Clone, Copy)]
pub struct Description {
    pub name: &'static str,
    pub title: &'static str,
    pub what: &'static str,
}

pub const ALL: [Description; 3] = [
    Description {
        name: "arena",
        title: "An arena, Zipf-distributed updates",
        what: "64 MiB in this process, 400,000 records, 2,000 updates a step with a Zipf distribution",
    },
    Description {
        name: "python",
        title: "CPython",
        what: "75,000 records in 66 MB that it can write to, 1 % of them changed a step",
    },
    Description {
        name: "wasm",
        title: "WebAssembly under Wasmtime",
        what: "a key-value store in 18 MB of linear memory, 250 operations a step",
    },
];

pub fn start(name: &str) -> Box<dyn Workload> {
    match name {
        "arena" => Box::new(Arena::new()),
        "python" => Box::new(python(Randomisation::Off)),
        "wasm" => Box::new(Wasm::new()),
        _ => panic!("there is no workload {name}; there are arena, python and wasm"),
    }
}

/// A CPython process of the workload of that name; there may be many.
pub fn python(randomisation: Randomisation) -> Python {
    Python::start(PYTHON_RECORDS, randomisation)
}

/// Whether a program is installed: it prints its version on request.
pub fn is_installed(program: &str, version_argument: &str) -> bool {
    Command::new(program).arg(version_argument).output().is_ok_and(|output| output.status.success())
}
