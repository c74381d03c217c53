//! Wasmer's journal files: import and export, whole and damaged.

// Helpers of a test may panic, as the test itself may.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::error::Error as _;
use std::sync::Arc;

use common::{Guest, Life, Spy, Vault, write_log};
use stillframe::verify::VerifyOptions;
use stillframe_wasmer::{Error, Resume, export, import};
use wasmer_wasix::journal::{JournalEntry, LogFileJournal};

#[test]
fn a_log_file_becomes_a_line_of_snapshots_and_a_snapshot_a_log_file() {
    let (vault, guest) = (Vault::new(), Guest::build("counter").unwrap());
    let path = vault.dir.path().join("web-1.journal");
    // Two runs with Wasmer's own journal.
    let mut life = Life::start(&guest, Arc::new(LogFileJournal::new(&path).unwrap()), &[]).unwrap();
    let mut said: Vec<String> = (0..3).map(|_| life.snapshot("s").unwrap()).collect();
    // The guest must not exit here: Wasmer's journal would start from the beginning after an exit.
    drop(life.process().snapshot_and_disable_journaling(wasmer_wasix::journal::SnapshotTrigger::Sigint));
    said.push(life.ask("s").unwrap());
    life.end().unwrap();
    let mut life = Life::start(&guest, Arc::new(LogFileJournal::new(&path).unwrap()), &[]).unwrap();
    while life.line().unwrap() != said[3] {
        // The replay prints the guest's output again.
    }
    said.push(life.snapshot("s").unwrap());
    life.end().unwrap();

    let found = import(&vault.store, "web-1", &path).unwrap();
    assert_eq!(found.snapshots.len(), 5);
    assert!(found.unmarked > 0, "the exit came after the last mark");
    assert_eq!(vault.snapshots("web-1"), found.snapshots);
    for (at, id) in found.snapshots.iter().enumerate() {
        let mut life = Life::start(&guest, vault.journal("branch", Resume::At(*id)), &[]).unwrap();
        assert_eq!(life.line().unwrap(), said[at]);
        if at < 4 {
            assert_eq!(life.ask("s").unwrap(), said[at + 1]);
        }
        life.end().unwrap();
    }

    for (at, id) in found.snapshots.iter().enumerate() {
        let path = vault.dir.path().join(format!("{at}.journal"));
        export(&vault.store, *id, &path).unwrap();
        let again = import(&vault.store, &format!("again-{at}"), &path).unwrap();
        assert_eq!(again.snapshots.len(), 1);
        let regions =
            |id| vault.store.snapshot(id).unwrap().regions().unwrap().map(Result::unwrap).collect::<Vec<_>>();
        assert_eq!(regions(again.snapshots[0]), regions(*id));
        // The file exists already, and `export` leaves it as it is.
        assert!(matches!(export(&vault.store, *id, &path), Err(Error::File { .. })));
        let mut life = Life::start(&guest, Arc::new(LogFileJournal::new(&path).unwrap()), &[]).unwrap();
        assert_eq!(life.line().unwrap(), said[at]);
        life.end().unwrap();
    }
    let left = std::fs::read_dir(vault.dir.path()).unwrap().map(|it| it.unwrap().file_name());
    assert!(left.into_iter().all(|name| !name.to_string_lossy().contains("partial")));
}

/// A short run: one page of memory and three marks.
fn small(guest: &Guest) -> Vec<JournalEntry<'static>> {
    let vault = Vault::new();
    let spy = Spy::on(vault.journal("small", Resume::Latest));
    let mut life = Life::start(guest, spy.clone(), &[]).unwrap();
    for round in 0..3 {
        life.ask(&format!("open /{round} wc")).unwrap();
        life.snapshot("s").unwrap();
    }
    life.end().unwrap();
    spy.written()
}

#[test]
fn a_damaged_log_file_gives_what_could_be_read_and_says_where_and_why() {
    let guest = Guest::build("files").unwrap();
    let entries = small(&guest);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("small.journal");
    write_log(&path, &entries);
    let whole = std::fs::read(&path).unwrap();

    // The offset of each record.
    let mut starts = vec![8];
    while let Some(start) = starts.last().copied().filter(|start| *start < whole.len()) {
        let length =
            whole[start + 2..start + 8].iter().fold(0, |length, byte| length << 8 | usize::from(*byte));
        starts.push(start + 8 + length);
    }
    assert_eq!(starts.len(), entries.len() + 1);
    let marks: Vec<usize> = entries
        .iter()
        .enumerate()
        .filter_map(|(at, it)| matches!(it, JournalEntry::SnapshotV1 { .. }).then_some(at))
        .collect();

    let check = |what: &str, bytes: &[u8], at: usize, why: &str| {
        let vault = Vault::new();
        std::fs::write(&path, bytes).unwrap();
        let error = import(&vault.store, "small", &path).unwrap_err();
        let source = error.source().map(ToString::to_string).unwrap_or_default();
        assert!(source.contains(why), "{what}: {error}: {source}");
        let Error::Damaged { at_bytes, snapshots, .. } = error else { panic!("{what}: {error}") };
        assert_eq!(at_bytes, starts[at] as u64, "{what}");
        assert_eq!(snapshots.len(), marks.iter().filter(|mark| **mark < at).count(), "{what}");
        assert_eq!(vault.snapshots("small"), snapshots, "{what}");
        assert!(vault.store.verify(&VerifyOptions::default()).unwrap().problems.is_empty());
    };
    let extent =
        entries.iter().position(|it| matches!(it, JournalEntry::UpdateMemoryRegionV1 { .. })).unwrap();
    let last_extent =
        entries.iter().rposition(|it| matches!(it, JournalEntry::UpdateMemoryRegionV1 { .. })).unwrap();
    for (at, name) in
        [(1, "early"), (extent, "in the first extent"), (marks[0], "in a mark"), (last_extent, "late")]
    {
        check(&format!("cut {name}"), &whole[..starts[at + 1] - 1], at, "it was cut");
        check(&format!("cut {name}, in the header"), &whole[..starts[at] + 5], at, "it was cut");
        let changed = |place: usize, bytes: &[u8]| {
            let mut damaged = whole.clone();
            damaged[place..place + bytes.len()].copy_from_slice(bytes);
            damaged
        };
        let start = starts[at];
        check(&format!("unfinished {name}"), &changed(start, &[0; 8]), at, "never finished");
        check(&format!("of no kind {name}"), &changed(start, &[0xff, 0xff]), at, "of kind 65535");
        check(&format!("too long {name}"), &changed(start + 2, &[0xff; 6]), at, "it was cut");
    }
    let block = starts[extent] + 8;
    let mut damaged = whole.clone();
    damaged[block..block + 64].fill(0xff);
    check("an extent that is no LZ4", &damaged, extent, "memory extent");
    let mut nothing = whole.clone();
    nothing[0] = 0;
    std::fs::write(&path, &nothing).unwrap();
    let vault = Vault::new();
    assert!(matches!(import(&vault.store, "small", &path), Err(Error::Damaged { at_bytes: 0, .. })));

    // A mark that comes before any state that could be resumed.
    write_log(&dir.path().join("early"), entries.iter().skip(marks[1]));
    assert!(matches!(
        import(&vault.store, "small", dir.path().join("early")),
        Err(Error::Damaged { at_bytes: 8, .. })
    ));
    // An empty file has no snapshots.
    std::fs::write(&path, []).unwrap();
    assert!(import(&vault.store, "small", &path).unwrap().snapshots.is_empty());
}
