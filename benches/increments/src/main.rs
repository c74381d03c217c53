//! The cost of each further snapshot, in bytes and in time: prints the tables of
//! docs/benchmarks.md.
//!
//! `cargo bench -p increments -- [--snapshots 50] [--workload NAME]… [--without-peers]
//! [--plot FILE] [--states DIR]`
//!
//! Workloads: `arena`, `python`, `wasm`, `instances` (ten of one program), `rescan` (only speed);
//! all of them by default. The first three run once, and are recorded and captured live at the same
//! time. Then every contender plays the record, restores the last moment if it can, and its result
//! is compared with the record.
//!
//! Everything is counted: the growth is that of the whole directory, index included, after a clean
//! close. Every contender's snapshots are durable when they are counted.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::cast_precision_loss)]

mod arena;
mod contender;
mod instances;
#[path = "../../common/journal.rs"]
mod journal;
mod measure;
mod peers;
mod play;
mod plot;
mod python;
mod report;
mod rescan;
mod state;
mod wasm;
mod workload;

use std::io::Write;
use std::path::{Path, PathBuf};

use stillframe::RegionSize;
use stillframe::codec::Codec;

use crate::contender::{Contender, JournalFiles, Moment, PageDedup, Stillframe, size_of};
use crate::measure::{Growth, median};
use crate::play::{Run, play};
use crate::report::{count, milliseconds};
use crate::state::Tape;
use crate::workload::Description;

/// How many moments `--states` writes.
const STATES: usize = 5;

struct Arguments {
    snapshots: usize,
    workloads: Vec<String>,
    with_peers: bool,
    plot: Option<PathBuf>,
    states: Option<PathBuf>,
}

fn main() {
    let arguments = arguments();
    let wanted =
        |name: &str| arguments.workloads.is_empty() || arguments.workloads.iter().any(|one| one == name);
    // Not the temporary directory, which may be in memory.
    let dir = tempfile::tempdir_in(
        std::env::var_os("STILLFRAME_BENCH_DIR").unwrap_or_else(|| env!("CARGO_TARGET_TMPDIR").into()),
    );
    let dir = dir.expect("the bench directory can be written");

    let mut all: Vec<(Description, Vec<Run>)> = Vec::new();
    for workload in workload::ALL.into_iter().filter(|workload| wanted(workload.name)) {
        let dir = dir.path().join(workload.name);
        std::fs::create_dir(&dir).unwrap();
        println!("## {}: {}; {} snapshots\n", workload.title, workload.what, arguments.snapshots);
        let (tape, live) = record(workload.name, &dir, &arguments);
        let runs: Vec<Run> = contenders(&dir, arguments.with_peers)
            .into_iter()
            .map(|contender| play(contender, &tape))
            .collect();
        report::print_increments(&runs);
        report::print_verdict(&runs);
        println!("{live}\n");
        all.push((workload, runs));
    }
    if !all.is_empty() {
        report::print_region_sizes_head();
        all.iter().for_each(|(workload, runs)| report::print_region_sizes(workload.name, runs));
        println!();
    }
    if let Some(path) = &arguments.plot {
        std::fs::write(path, plot::svg(&all)).expect("the plot can be written");
    }
    if wanted("instances") {
        instances::instances(dir.path(), arguments.with_peers);
    }
    if wanted("rescan") {
        rescan::rescan(dir.path());
    }
}

fn arguments() -> Arguments {
    let mut arguments =
        Arguments { snapshots: 50, workloads: Vec::new(), with_peers: true, plot: None, states: None };
    let mut given = std::env::args().skip(1);
    while let Some(option) = given.next() {
        let mut value = || given.next().unwrap_or_else(|| panic!("{option} wants a value"));
        match &*option {
            "--snapshots" => arguments.snapshots = value().parse().expect("--snapshots wants a number"),
            "--workload" => {
                let name = value();
                let known = workload::ALL.iter().map(|one| one.name).chain(["instances", "rescan"]);
                assert!(known.into_iter().any(|one| one == name), "there is no workload {name}");
                arguments.workloads.push(name);
            }
            "--without-peers" => arguments.with_peers = false,
            "--plot" => arguments.plot = Some(from_the_root(&value())),
            "--states" => arguments.states = Some(from_the_root(&value())),
            // An option that cargo passes.
            "--bench" => {}
            _ => panic!("{option} is no option; see the head of benches/increments/src/main.rs"),
        }
    }
    assert!(arguments.snapshots >= 2, "--snapshots wants at least 2: the first one is not counted");
    arguments
}

/// Resolves a path against the repository's root: cargo runs a bench in the directory of its
/// member.
fn from_the_root(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").join(path)
}

/// All contenders.
fn contenders(dir: &Path, with_peers: bool) -> Vec<Box<dyn Contender>> {
    let mut all: Vec<Box<dyn Contender>> = Vec::new();
    // The codecs of this version.
    for codec in ["lz4", "zstd"].iter().filter_map(|name| name.parse::<Codec>().ok()) {
        for kib in [4, 8, 16, 32, 64] {
            all.push(Box::new(Stillframe::new(dir, RegionSize::new(kib << 10).unwrap(), codec)));
        }
    }
    for cell_bytes in [journal::CELL_BYTES, 128] {
        all.push(Box::new(JournalFiles::new(dir, cell_bytes)));
    }
    all.push(Box::new(PageDedup::new(dir)));
    if with_peers {
        all.extend(peers::installed(dir).into_iter().map(|peer| Box::new(peer) as Box<dyn Contender>));
    }
    all
}

/// Runs a workload, records it, and captures it live at each moment. Returns the record and a text
/// about the captures.
fn record(name: &str, dir: &Path, arguments: &Arguments) -> (Tape, String) {
    let mut workload = workload::start(name);
    let live_dir = dir.join("live");
    std::fs::create_dir(&live_dir).unwrap();
    let mut live = Stillframe::as_it_comes(&live_dir);
    let (mut tape, mut first, mut pauses) = (Tape::default(), None, Vec::new());
    for at in 0..arguments.snapshots {
        if at > 0 {
            workload.step();
        }
        let state = workload.state();
        if let Some(states) = arguments.states.as_ref().filter(|_| at < STATES) {
            let states = states.join(name);
            std::fs::create_dir_all(&states).unwrap();
            let mut file = std::fs::File::create(states.join(format!("{at:02}.raw"))).unwrap();
            state.pieces().for_each(|piece| file.write_all(piece).unwrap());
        }
        let taken = live.snapshot(Moment { process: name, state: &state, source: &*workload.source() });
        if at == 0 {
            live.close();
            first = Some(size_of(&live));
        } else {
            pauses.push(taken.paused);
        }
        tape.record(state);
    }
    live.close();
    let growth: Growth = size_of(&live).growth_per(first.unwrap(), arguments.snapshots - 1);
    let mut said =
        format!("Captured live as it ran: {} bytes for each further snapshot.", count(growth.disk_bytes));
    let pause = median(pauses);
    if !pause.is_zero() {
        said += &format!(" It stood still for {}.", milliseconds(pause));
    }
    (tape, said)
}
