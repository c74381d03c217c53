//! A real guest in the real engine: it counts, keeps a large table, and resumes from any of its
//! snapshots.

// Helpers of a test may panic, as the test itself may.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::{Guest, Life, Spy, Vault};
use stillframe::GcOptions;
use stillframe::record::Trigger;
use stillframe::verify::VerifyOptions;
use stillframe_wasmer::{Resume, StoreJournal};
use wasmer_wasix::journal::{JournalEntry, SnapshotTrigger, WritableJournal};

/// Every line that a guest prints from its start: `steps` lines, each after a snapshot, and five
/// without.
fn live(vault: &Vault, guest: &Guest, process: &str, steps: usize) -> Vec<String> {
    let mut life = Life::start(guest, vault.journal(process, Resume::Nothing), &[]).unwrap();
    let mut said: Vec<String> = (0..steps).map(|_| life.snapshot("s").unwrap()).collect();
    said.extend((0..5).map(|_| life.ask("x").unwrap()));
    assert_eq!(life.end().unwrap(), 0);
    said
}

#[test]
fn a_guest_goes_on_from_the_latest_and_from_the_third_of_ten_snapshots() {
    let (vault, guest) = (Vault::new(), Guest::build("counter").unwrap());
    let said = live(&vault, &guest, "web-1", 10);
    let taken = vault.snapshots("web-1");
    assert_eq!(taken.len(), 10);
    for (at, id) in taken.iter().enumerate() {
        assert_eq!(vault.parent(*id), at.checked_sub(1).map(|before| taken[before]));
        assert_eq!(vault.store.snapshot(*id).unwrap().record().trigger, Trigger::Explicit);
    }

    // Resume from the latest snapshot: the call that took it returns a second time, and all state
    // is restored.
    let mut life = Life::start(&guest, vault.journal("web-1", Resume::Latest), &[]).unwrap();
    assert_eq!(life.line().unwrap(), said[9]);
    for line in &said[10..] {
        assert_eq!(life.ask("x").unwrap(), *line);
    }
    assert_eq!(life.end().unwrap(), 0);
    assert_eq!(vault.snapshots("web-1"), taken, "nobody asked for another one");

    // Resume from the third snapshot: its later output and snapshots form a branch.
    let journal = vault.journal("web-1", Resume::At(taken[2]));
    let mut life = Life::start(&guest, journal.clone(), &[]).unwrap();
    assert_eq!(life.line().unwrap(), said[2]);
    assert_eq!(life.snapshot("s").unwrap(), said[3]);
    let branch = journal.tip().unwrap();
    assert_eq!(vault.parent(branch), Some(taken[2]));
    let elsewhere = life.snapshot("s, but something else").unwrap();
    assert_ne!(elsewhere, said[4]);
    assert_eq!(vault.parent(journal.tip().unwrap()), Some(branch));
    life.end().unwrap();

    // The branch is now the latest. The snapshots of the old line still resume as before.
    let mut life = Life::start(&guest, vault.journal("web-1", Resume::Latest), &[]).unwrap();
    assert_eq!(life.line().unwrap(), elsewhere);
    life.end().unwrap();
    let mut life = Life::start(&guest, vault.journal("web-1", Resume::At(taken[9])), &[]).unwrap();
    assert_eq!(life.line().unwrap(), said[9]);
    assert_eq!(life.ask("x").unwrap(), said[10]);
    life.end().unwrap();
    assert!(vault.store.verify(&VerifyOptions::default()).unwrap().problems.is_empty());
}

#[test]
fn memory_neither_grows_by_resuming_nor_is_it_all_written_again() {
    let (vault, guest) = (Vault::new(), Guest::build("counter").unwrap());
    let said = live(&vault, &guest, "web-1", 1);
    let memory_bytes = vault.memory_bytes(vault.snapshots("web-1")[0]);
    let mut last = said[0].clone();
    for _ in 0..5 {
        let spy = Spy::on(vault.journal("web-1", Resume::Latest));
        let mut life = Life::start(&guest, spy.clone(), &[]).unwrap();
        assert_eq!(life.line().unwrap(), last);
        last = life.snapshot("s").unwrap();
        life.end().unwrap();
        println!("a snapshot after a resume: {} of {memory_bytes} bytes were written", spy.memory_bytes());
        assert!(spy.memory_bytes() < memory_bytes / 8);
    }
    let taken = vault.snapshots("web-1");
    assert_eq!(taken.len(), 6);
    assert!(taken.iter().all(|id| vault.memory_bytes(*id) == memory_bytes));
}

#[test]
fn a_snapshot_stands_alone_when_all_others_are_forgotten() {
    let (vault, guest) = (Vault::new(), Guest::build("counter").unwrap());
    let said = live(&vault, &guest, "web-1", 6);
    let taken = vault.snapshots("web-1");
    let others: Vec<_> = taken.iter().copied().filter(|id| ![taken[2], taken[5]].contains(id)).collect();
    vault.store.forget(&others).unwrap();
    vault.store.gc(&GcOptions::default()).unwrap();
    for (at, id) in [(2, taken[2]), (5, taken[5])] {
        let mut life = Life::start(&guest, vault.journal("web-1", Resume::At(id)), &[]).unwrap();
        assert_eq!(life.line().unwrap(), said[at]);
        life.snapshot("s").unwrap();
        life.end().unwrap();
    }
    assert!(StoreJournal::open(&vault.store, "web-1", Resume::At(taken[0])).is_err(), "it is forgotten");
}

#[test]
fn ten_instances_of_a_guest_share_their_memory_in_the_store() {
    let (vault, guest) = (Vault::new(), Guest::build("counter").unwrap());
    let (mut memory_bytes, mut first_bytes) = (0, 0);
    for instance in 1..=10 {
        let (process, seed) = (format!("web-{instance}"), instance.to_string());
        let mut life = Life::start(&guest, vault.journal(&process, Resume::Latest), &[&seed]).unwrap();
        for _ in 0..3 {
            life.snapshot("s").unwrap();
        }
        life.end().unwrap();
        memory_bytes += vault.snapshots(&process).iter().map(|id| vault.memory_bytes(*id)).sum::<u64>();
        if instance == 1 {
            first_bytes = vault.stored_bytes();
        }
    }
    let stored_bytes = vault.stored_bytes();
    println!(
        "ten instances, three snapshots each: {memory_bytes} bytes of memory in {stored_bytes} of the store;"
    );
    println!("the first takes {first_bytes}, each further one {}", (stored_bytes - first_bytes) / 9);
    assert!(stored_bytes < 3 * first_bytes, "{stored_bytes} for ten, {first_bytes} for one");

    // A new process can resume from any snapshot of another process.
    let first = vault.snapshots("web-1")[1];
    let journal = vault.journal("clone", Resume::At(first));
    let mut life = Life::start(&guest, journal.clone(), &[]).unwrap();
    assert!(life.line().unwrap().starts_with("2 "));
    life.snapshot("s").unwrap();
    life.end().unwrap();
    assert_eq!(vault.parent(journal.tip().unwrap()), Some(first));
    assert_eq!(vault.snapshots("clone").len(), 1);
}

#[test]
fn a_runtime_that_would_begin_anew_is_told_why_instead() {
    let vault = Vault::new();
    let (counter, files) = (Guest::build("counter").unwrap(), Guest::build("files").unwrap());
    live(&vault, &counter, "web-1", 1);
    let taken = vault.snapshots("web-1");
    let journal = vault.journal("web-1", Resume::Latest);
    let mut life = Life::start(&files, journal.clone(), &[]).unwrap();
    assert!(life.line().unwrap_err().to_string().contains("journal failed"));
    let error = journal.take_error().unwrap();
    assert!(
        matches!(error, stillframe_wasmer::Error::BeganAnew { resumed, .. } if resumed == taken[0]),
        "{error}"
    );
    assert!(error.to_string().contains("set_module_hash"), "{error}");
    assert_eq!(vault.snapshots("web-1"), taken);

    // The caller can allow it explicitly.
    let mut life = Life::start(&files, vault.journal("web-1", Resume::Nothing), &[]).unwrap();
    assert_eq!(life.snapshot("s").unwrap(), "taken 0 0");
    life.end().unwrap();
    assert_eq!(vault.snapshots("web-1").len(), 2);
}

#[test]
fn a_journal_that_is_cut_anywhere_resumes_from_the_last_mark_before() {
    let (vault, guest) = (Vault::new(), Guest::build("counter").unwrap());
    let spy = Spy::on(vault.journal("web-1", Resume::Latest));
    let mut life = Life::start(&guest, spy.clone(), &[]).unwrap();
    let said: Vec<String> = (0..3).map(|_| life.snapshot("s").unwrap()).collect();
    life.end().unwrap();
    let entries = spy.written();
    let marks: Vec<usize> = entries
        .iter()
        .enumerate()
        .filter_map(|(at, it)| matches!(it, JournalEntry::SnapshotV1 { .. }).then_some(at))
        .collect();
    assert_eq!(marks.len(), 3);

    // The run is cut off after every entry of the second and third snapshot: no partial snapshot
    // ever becomes visible.
    let before = vault.snapshots("web-1")[0];
    let journal = StoreJournal::open(&vault.store, "cut", Resume::At(before)).unwrap();
    journal.write(JournalEntry::ClearEtherealV1).unwrap();
    let mut seen = 0;
    for (at, entry) in entries.iter().enumerate().take(marks[2] + 1).skip(marks[0] + 1) {
        journal.write(entry.clone()).unwrap();
        seen += usize::from(marks.contains(&at));
        assert_eq!(vault.snapshots("cut").len(), seen, "after entry {at}");
    }

    // What remains after a cut is whole. The cuts are between thread and memory, within the memory,
    // and before the mark.
    for (name, end) in [("thread", marks[0] + 2), ("memory", marks[1] + 9), ("mark", marks[2])] {
        let journal = StoreJournal::open(&vault.store, name, Resume::Nothing).unwrap();
        for entry in &entries[..end] {
            journal.write(entry.clone()).unwrap();
        }
        drop(journal);
        let expected = &said[marks.iter().filter(|mark| **mark < end).count() - 1];
        let mut life = Life::start(&guest, vault.journal(name, Resume::Latest), &[]).unwrap();
        assert_eq!(life.line().unwrap(), *expected, "cut at the {name}");
        life.end().unwrap();
    }
}

#[test]
fn triggers_are_those_of_the_runtime() {
    let (vault, guest) = (Vault::new(), Guest::build("counter").unwrap());
    let mut life = Life::start_with(&guest, vault.journal("web-1", Resume::Latest), &[], |builder| {
        builder.add_snapshot_trigger(SnapshotTrigger::FirstStdin);
        Ok(())
    })
    .unwrap();
    let first = life.ask("x").unwrap();
    let second = life.snapshot("s").unwrap();
    // A snapshot that the host requests: the runtime takes it at the next point where the guest
    // allows one, and the process ends there.
    drop(life.process().snapshot_and_stop(SnapshotTrigger::Sigint));
    life.say("s").unwrap();
    let deadline = Instant::now() + Duration::from_secs(60);
    while vault.snapshots("web-1").len() < 3 {
        assert!(Instant::now() < deadline, "it was never taken");
        std::thread::sleep(Duration::from_millis(1));
    }
    drop(life);
    let taken = vault.snapshots("web-1");
    let triggers: Vec<_> =
        taken.iter().map(|id| vault.store.snapshot(*id).unwrap().record().trigger.clone()).collect();
    assert_eq!(triggers, [Trigger::FirstStdin, Trigger::Explicit, Trigger::Signal("SIGINT".to_owned())]);

    // Each snapshot resumes where it was taken: before the first line was read, and in the middle
    // of a step.
    let mut life = Life::start(&guest, vault.journal("web-1", Resume::At(taken[0])), &[]).unwrap();
    assert_eq!(life.ask("x").unwrap(), first);
    assert_eq!(life.ask("s").unwrap(), second);
    let third = life.ask("s").unwrap();
    life.end().unwrap();
    let mut life = Life::start(&guest, vault.journal("web-1", Resume::At(taken[2])), &[]).unwrap();
    assert_eq!(life.line().unwrap(), third);
    life.end().unwrap();
}

#[test]
fn lives_that_share_nothing_but_the_store_run_at_the_same_time() {
    let (vault, guest) = (Vault::new(), Guest::build("counter").unwrap());
    let vault = Arc::new(vault);
    let lives: Vec<_> = (0..4)
        .map(|at| {
            let (vault, guest) = (vault.clone(), guest.clone());
            std::thread::spawn(move || live(&vault, &guest, &format!("web-{at}"), 3))
        })
        .collect();
    let said: Vec<_> = lives.into_iter().map(|life| life.join().unwrap()).collect();
    assert!(said.iter().all(|it| *it == said[0]));
    assert!((0..4).all(|at| vault.snapshots(&format!("web-{at}")).len() == 3));
}

#[test]
#[ignore = "the test below starts it, and kills it"]
fn a_life_until_it_is_killed() {
    let Some(path) = std::env::var_os("STILLFRAME_KILLED_VAULT") else { return };
    let store = Arc::new(stillframe::Store::options().create(path).unwrap());
    let journal = Arc::new(StoreJournal::open(&store, "web-1", Resume::Latest).unwrap());
    let mut life = Life::start(&Guest::build("counter").unwrap(), journal, &[]).unwrap();
    for _ in 0..100 {
        println!("said {}", life.snapshot("s").unwrap());
    }
}

#[test]
fn a_host_that_is_killed_resumes_from_what_it_was_told_or_later() {
    let (vault, guest) = (Vault::new(), Guest::build("counter").unwrap());
    let said = live(&vault, &guest, "web-1", 12);
    for after in [1, 2, 3, 5] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vault");
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--ignored", "--exact", "--nocapture", "a_life_until_it_is_killed"])
            .env("STILLFRAME_KILLED_VAULT", &path)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines().map(Result::unwrap);
        let told = lines.by_ref().filter(|line| line.contains("said ")).take(after).count();
        // At some point during the next step.
        std::thread::sleep(Duration::from_millis(7 * after as u64));
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(told, after);

        let store = Arc::new(stillframe::Store::open(&path).unwrap());
        let taken = store.process("web-1").snapshots().len();
        assert!(taken >= told, "{taken} of {told}");
        let journal = Arc::new(StoreJournal::open(&store, "web-1", Resume::Latest).unwrap());
        let mut life = Life::start(&guest, journal, &[]).unwrap();
        assert_eq!(life.line().unwrap(), said[taken - 1], "killed after {told}");
        assert_eq!(life.ask("s").unwrap(), said[taken]);
        life.end().unwrap();
    }
}
