//! Files that a guest created or has open: after a resume they are as they would be if Wasmer's own
//! journal replayed the whole log, in the order of the entries.

// Helpers of a test may panic, as the test itself may.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::path::Path;
use std::sync::Arc;

use common::{Guest, Life, Spy, Vault, up_to_mark, write_log};
use stillframe_wasmer::Resume;
use wasmer_wasix::WasiEnvBuilder;
use wasmer_wasix::journal::{DynJournal, JournalEntry, LogFileJournal};

/// Lists all files with checksums of their contents, and the position of each descriptor.
const LOOK: &str = "list /tmp";

struct Random(u64);

impl Random {
    fn pick(&mut self, below: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        usize::try_from(self.0 >> 33).unwrap() % below
    }
}

/// One operation on files. There are few names and descriptors, so that operations collide.
fn command(random: &mut Random) -> String {
    let name = |random: &mut Random| {
        let folder = ["", "", "sub/"][random.pick(3)];
        format!("/tmp/{folder}{}", ["a", "b", "c"][random.pick(3)])
    };
    let descriptor = |random: &mut Random| 5 + random.pick(8);
    match random.pick(16) {
        0..3 => format!("open {} {}", name(random), ["r", "w", "wc", "wct", "wca"][random.pick(5)]),
        3..5 => format!("close {}", descriptor(random)),
        5..9 => {
            let text = ["x", "some-text", "a-somewhat-longer-text-than-the-others"][random.pick(3)];
            format!("write {} {text}{}", descriptor(random), random.pick(1000))
        }
        9..11 => format!("seek {} {}", descriptor(random), random.pick(60)),
        11 => format!("cut {} {}", descriptor(random), random.pick(40)),
        12 => format!("unlink {}", name(random)),
        13 => format!("rename {} {}", name(random), name(random)),
        14 => ["mkdir /tmp/sub", "rmdir /tmp/sub"][random.pick(2)].to_owned(),
        _ => format!("renumber {} {}", descriptor(random), descriptor(random)),
    }
}

/// The guest sees the whole file system that the host builds for it.
fn with_files(builder: &mut WasiEnvBuilder) -> anyhow::Result<()> {
    builder.add_preopen_dir("/tmp")?;
    Ok(())
}

fn resume(guest: &Guest, journal: Arc<DynJournal>) -> anyhow::Result<Vec<String>> {
    let mut life = Life::start_with(guest, journal, &[], |builder| {
        with_files(builder)?;
        // Otherwise the replay of the log prints the output again.
        builder.with_skip_stdio_during_bootstrap(true);
        Ok(())
    })?;
    let mut said = vec![life.line()?];
    for line in [LOOK, "write 6 more", "open /tmp/new wc", LOOK] {
        said.push(life.ask(line)?);
    }
    life.end()?;
    Ok(said)
}

/// The log with a mark after each entry. Without the marks the runtime defers some entries and
/// applies others immediately.
fn in_order(entries: &[JournalEntry<'static>]) -> Vec<JournalEntry<'static>> {
    let is_state = |entry: &JournalEntry<'_>| {
        use JournalEntry as E;
        matches!(entry, E::SetThreadV1 { .. } | E::UpdateMemoryRegionV1 { .. } | E::SnapshotV1 { .. })
    };
    let mark = entries.last().unwrap();
    entries
        .iter()
        .flat_map(|entry| [entry].into_iter().chain((!is_state(entry)).then_some(mark)))
        .cloned()
        .collect()
}

fn whole_log(guest: &Guest, path: &Path, entries: &[JournalEntry<'static>]) -> anyhow::Result<Vec<String>> {
    write_log(path, entries);
    resume(guest, Arc::new(LogFileJournal::new(path)?))
}

#[test]
fn files_are_as_after_a_replay_of_the_whole_log() {
    let guest = Guest::build("files").unwrap();
    // Run more seeds with STILLFRAME_SEEDS=100.
    let seeds = std::env::var("STILLFRAME_SEEDS").ok().and_then(|text| text.parse().ok()).unwrap_or(4);
    for seed in 0..seeds {
        let vault = Vault::new();
        let spy = Spy::on(vault.journal("files", Resume::Latest));
        let mut life = Life::start_with(&guest, spy.clone(), &[], with_files).unwrap();
        let mut random = Random(seed);

        let mut saw = Vec::new();
        for _ in 0..8 {
            for _ in 0..12 {
                life.ask(&command(&mut random)).unwrap();
            }
            life.snapshot("s").unwrap();
            saw.push(life.ask(LOOK).unwrap());
        }
        life.end().unwrap();
        let (entries, taken) = (spy.written(), vault.snapshots("files"));
        for at in [0, 2, 5, 7] {
            let ours = resume(&guest, vault.journal("branch", Resume::At(taken[at])));
            let log = vault.dir.path().join(format!("{at}.journal"));
            let expected = whole_log(&guest, &log, &in_order(&up_to_mark(&entries, at + 1)));
            let log = vault.dir.path().join(format!("{at}-as-it-is.journal"));
            let as_it_is = whole_log(&guest, &log, &up_to_mark(&entries, at + 1));
            match (ours, expected) {
                (Ok(found), Ok(expected)) => {
                    assert_eq!(found, expected, "seed {seed}, snapshot {at}; the guest saw {}", saw[at]);
                    println!(
                        "as the log in order; as the guest saw it: {}; the log as it is {}",
                        found[1] == saw[at],
                        as_it_is.map_or("cannot be replayed", |it| if it == expected {
                            "too"
                        } else {
                            "otherwise"
                        }),
                    );
                }
                // Wasmer's replay failed on an entry whose effect a later entry supersedes.
                (Ok(found), Err(_)) => {
                    assert_eq!(found[1], saw[at], "seed {seed}, snapshot {at}");
                    println!("as the guest saw it; the log cannot be replayed in any order");
                }
                (Err(ours), Err(_)) => println!("cannot be replayed: {ours}"),
                (Err(ours), Ok(expected)) => {
                    panic!("seed {seed}, snapshot {at}: {ours}; expected {expected:?}")
                }
            }
        }
    }
}

#[test]
fn how_far_a_file_was_read_is_not_kept_but_where_it_was_sought_to_is() {
    let (vault, guest) = (Vault::new(), Guest::build("files").unwrap());
    let start = |resume| Life::start_with(&guest, vault.journal("files", resume), &[], with_files).unwrap();
    let mut life = start(Resume::Latest);
    assert_eq!(life.ask("open /tmp/a wc").unwrap(), "5 0");
    assert_eq!(life.ask("write 5 0123456789").unwrap(), "10 0");
    assert_eq!(life.ask("seek 5 2").unwrap(), "2 0");
    assert_eq!(life.ask("read 5 3").unwrap(), "234 3 0");
    assert_eq!(life.snapshot("s").unwrap(), "taken 0 0");
    assert_eq!(life.ask("read 5 3").unwrap(), "567 3 0");
    life.end().unwrap();
    let mut life = start(Resume::Latest);
    assert_eq!(life.line().unwrap(), "taken 0 0");
    assert_eq!(life.ask("read 5 3").unwrap(), "234 3 0");
    life.end().unwrap();
}
