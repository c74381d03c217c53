//! Power failures during a migration: afterwards there is either the old store or the new one,
//! whole.

#[allow(dead_code, unreachable_pub, clippy::unwrap_used, clippy::panic)]
#[path = "../tests/common/disk.rs"]
mod disk;
mod seam {
    pub(super) use super::super::tests::{Call, Witness};
}

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use disk::{Disk, Event, Failure, IndexFiles, Model};

use super::tests::{INDEX_DIR, MADE_UP, OF_FORMAT, PACKS_DIR, Store, dir, store, watch};
use super::*;
use crate::store::packs::names;

/// A recorded migration over two steps, call by call.
struct Migrated {
    before: Model,
    index: IndexFiles,
    /// The packs, by name.
    packs: Vec<(String, Vec<u8>)>,
    history: Vec<Event>,
}

const STORE: &str = "store";
/// The first and the last of its formats.
const FROM: u32 = 1;
const TO: u32 = 3;

fn packs(store: &Path) -> Result<Vec<(String, Vec<u8>)>> {
    let packs = names::list(&Dir::open(&store.join(PACKS_DIR))?)?;
    let named = packs
        .into_iter()
        .map(|(_, name)| Ok((name.name().to_string_lossy().into_owned(), std::fs::read(name.path())?)));
    named.collect()
}

/// Migrates a store. After `stop_after` changes, the process counts as dead, and another one
/// continues.
fn migrated(stop_after: Option<usize>) -> Migrated {
    let scratch = disk::scratch();
    let (path, _) = store(scratch.path());
    let (before, index) = (Model::load(scratch.path()), disk::read_index(&path.join(INDEX_DIR)));
    let packs = packs(&path).unwrap();
    let disk = Disk::new(scratch.path());
    let watching = watch(scratch.path(), disk.clone());
    disk.at_work("migrate");
    if let Some(changes) = stop_after {
        disk.stop_after(changes);
        assert_eq!(run(&dir(&path), MADE_UP, TO).is_err(), disk.go_on());
        disk.at_work("go on");
    }
    run(&dir(&path), MADE_UP, TO).unwrap();
    disk.mark(0);
    drop(watching);
    Migrated { before, index, packs, history: disk.history() }
}

impl Migrated {
    /// Replays the migration without some of the syncs, and simulates several kinds of power
    /// failure after each call that is `due`. Returns how many there were.
    fn fail_all_along(
        &self,
        is_left_out: impl Fn(&Event) -> bool,
        due: impl Fn(usize) -> Range<u64>,
    ) -> Result<usize> {
        let mut model = self.before.clone();
        let (mut failures, mut is_done) = (0, false);
        for (at, event) in self.history.iter().enumerate() {
            is_done |= matches!(event, Event::Mark(_));
            if !is_left_out(event) {
                model.apply(event);
            }
            for number in due(at) {
                let failure = Failure::numbered(number, at as u64);
                let looked = self.fail(&model, failure, is_done, number % 2 == 0);
                looked.with_context(|| format!("{failure:?} after {at} events, the last {event:?}"))?;
                failures += 1;
            }
        }
        Ok(failures)
    }

    fn fail(&self, model: &Model, failure: Failure, is_done: bool, with_index: bool) -> Result<()> {
        let scratch = disk::scratch();
        let store = scratch.path().join(STORE);
        model.crash(failure, scratch.path());
        if with_index && !is_done {
            disk::write_index(&store.join(INDEX_DIR), &self.index);
        }
        let _watching = watch(scratch.path(), Arc::new(disk::NothingDurable));
        finish_interrupted(&dir(&store))?;
        let version = self.check(&store)?;
        ensure!(version == TO || !is_done, "it was migrated, and has format {version} again");
        if version == FROM && failure.seed.is_multiple_of(4) {
            let store = Store::open(&store).context("the old store does not open")?;
            let id = store.snapshots().first().context("the old store has lost its snapshot")?.id();
            ensure!(store.restore(id)?.into_mapping()?[..] == [7; 100_000]);
        }
        run(&dir(&store), MADE_UP, TO)?;
        ensure!(self.check(&store)? == TO);
        Ok(())
    }

    /// Checks that there is a whole store of one format. Returns which format.
    fn check(&self, store: &Path) -> Result<u32> {
        let version = format::version(&dir(store))?;
        ensure!(packs(store)? == self.packs, "the packs under format {version} are not whole");
        let of_format = std::fs::read_to_string(store.join(PACKS_DIR).join(OF_FORMAT)).ok();
        let expected = (version > FROM).then(|| version.to_string());
        ensure!(of_format == expected, "the packs under format {version} are those of {of_format:?}");
        ensure!(!store.join(MIGRATION_DIR).exists(), "something is left of the migration");
        Ok(version)
    }
}

#[test]
fn a_migration_survives_power_failures_at_any_call() {
    let migrated = migrated(None);
    let failures = migrated.fail_all_along(|_| false, |_| 0..14).unwrap();
    println!("{failures} power failures at {} moments", migrated.history.len());
    assert!(failures > 500);
}

#[test]
fn a_migration_that_was_killed_survives_power_failures_when_it_goes_on() {
    let calls = migrated(None).history.len();
    let mut failures = 0;
    for stop_after in (1..calls).step_by(4) {
        // Only what the other test has not covered.
        let due = |at: usize| match at as u64 {
            at if at < stop_after as u64 => 0..0,
            at => at % 7..at % 7 + 3,
        };
        failures += migrated(Some(stop_after)).fail_all_along(|_| false, due).unwrap();
    }
    println!("{failures} power failures");
    assert!(failures > 500);
}

/// The places where something is made durable. If two in a row make the same thing durable, because
/// a process that continues after a kill cannot know that it already is, they are left out
/// together.
///
/// The last sync, after the rest of the migration was removed, is not among them: if a power
/// failure brings the rest back, it has no FORMAT any more, and is discarded.
const SYNCS: [&str; 8] = [
    "file of kind pack",
    "directory packs with [create]",
    "directory migration with [create directory]",
    "file of kind new",
    "directory migration with [create, rename]|directory migration with []",
    "directory store with [create directory]|directory store with []",
    "directory store with [rename]",
    "directory migration with [rename]",
];

#[test]
fn a_sync_that_a_migration_leaves_out_is_found() {
    let migrated = migrated(None);
    let mut unfound = Vec::new();
    for sites in SYNCS {
        let is_left_out = |event: &Event| {
            let site = event.site().and_then(|site| site.strip_prefix("migrate: "));
            site.is_some_and(|site| sites.split('|').any(|left_out| site.starts_with(left_out)))
        };
        let first = migrated.history.iter().position(is_left_out).unwrap();
        let due = |at| if (first..first + 20).contains(&at) { 0..40 } else { 0..0 };
        match migrated.fail_all_along(is_left_out, due) {
            Err(how) => println!("{sites}: {how:#}"),
            Ok(_) => unfound.push(sites),
        }
    }
    assert!(unfound.is_empty(), "nothing shows that these are left out: {unfound:#?}");
}
