//! SQLite under Wasmtime, in the build that its project publishes. The database is captured after
//! each statement, and each way to go back to a snapshot gives the database of that moment.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use stillframe::lazy::Fill;
use stillframe::{CaptureOptions, SnapshotId, Store};
use stillframe_wasmtime::{Template, engine};
use wasmtime::{Config, InstancePre};

#[path = "../guest/sqlite.rs"]
mod sqlite;
use sqlite::{Host, Sqlite};

const CONTENT: &str =
    "SELECT count(*), total(length(body)), total(id * id) FROM page; PRAGMA integrity_check";

struct World {
    _dir: tempfile::TempDir,
    vault: Store,
    compiled: InstancePre<Host>,
}

fn world() -> World {
    let dir = tempfile::tempdir().unwrap();
    let vault = Store::options().create(dir.path().join("vault")).unwrap();
    let compiled = sqlite::compile(&engine(Config::new()).unwrap()).unwrap();
    World { _dir: dir, vault, compiled }
}

/// Statement number `nth`: early ones insert, later ones also update and delete.
fn statement(nth: u32) -> String {
    match nth {
        0 => "CREATE TABLE page (id INTEGER PRIMARY KEY, title TEXT, body TEXT); CREATE INDEX t ON page (title)".into(),
        // More than the initial memory, so it grows.
        5 => "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 4000) \
              INSERT INTO page (title, body) SELECT 'bulk ' || i, hex(zeroblob(1500)) || i FROM n"
            .into(),
        9 => "DELETE FROM page WHERE id % 3 = 0; VACUUM".into(),
        nth if nth % 2 == 0 => format!("UPDATE page SET body = body || '{nth}' WHERE id % 7 = {}", nth % 7),
        nth => format!(
            "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 50) \
             INSERT INTO page (title, body) SELECT {nth} || ' ' || i, 'text of ' || i * {nth} FROM n"
        ),
    }
}

#[test]
fn a_database_goes_back_to_any_statement_by_every_way_and_on_from_there() {
    let world = world();
    let process = world.vault.process("wiki");
    let mut wiki = Sqlite::new(&world.compiled).unwrap();
    let mut moments: Vec<(SnapshotId, Vec<String>, usize)> = Vec::new();
    for nth in 0..12 {
        wiki.run(&statement(nth)).unwrap();
        let content = wiki.run(CONTENT).unwrap();
        assert_eq!(content.last().map(String::as_str), Some("ok"));
        let taken = wiki.guest.capture(&mut wiki.wasm, &process, &CaptureOptions::default()).unwrap();
        moments.push((taken.id, content, wiki.memory_bytes()));
    }
    let (first, last) = (moments[0].2, moments[11].2);
    assert!(first < last, "the memory has grown from {first} bytes to {last}");

    let mut copy = Sqlite::unborn(&world.compiled, wiki.database()).unwrap();
    for nth in [11, 3, 7, 0, 9, 1, 10] {
        let (id, content, bytes) = &moments[nth];
        wiki.guest.rollback(&mut wiki.wasm, &world.vault, *id).unwrap();
        assert_eq!(
            (&wiki.run(CONTENT).unwrap(), wiki.memory_bytes()),
            (content, *bytes),
            "rolled back to {nth}"
        );
        copy.guest.restore(&mut copy.wasm, &world.vault, *id).unwrap();
        assert_eq!(&copy.run(CONTENT).unwrap(), content, "restored {nth}");
        copy.guest.restore_lazily(&mut copy.wasm, &world.vault, *id, Fill::OnFault).unwrap();
        assert_eq!(&copy.run(CONTENT).unwrap(), content, "restored lazily {nth}");
        copy.guest.instantiate(&mut copy.wasm, &Template::new(&world.vault, *id).unwrap()).unwrap();
        assert_eq!(&copy.run(CONTENT).unwrap(), content, "a template's {nth}");
        if nth == 11 {
            continue;
        }
        // The same statement gives the same result from each restored copy.
        for (which, sqlite) in [("rolled back", &mut wiki), ("a template's", &mut copy)] {
            sqlite.run(&statement(u32::try_from(nth).unwrap() + 1)).unwrap();
            assert_eq!(sqlite.run(CONTENT).unwrap(), moments[nth + 1].1, "{which} {nth}, and on");
        }
    }
}

#[test]
fn two_branches_of_a_database_know_nothing_of_one_another_and_share_what_they_began_with() {
    let world = world();
    let process = world.vault.process("wiki");
    let options = CaptureOptions::default();
    let mut wiki = Sqlite::new(&world.compiled).unwrap();
    (0..6).for_each(|nth| drop(wiki.run(&statement(nth)).unwrap()));
    let fork = wiki.guest.capture(&mut wiki.wasm, &process, &options).unwrap();
    let mut branches = Vec::new();
    for name in ["left", "right"] {
        wiki.guest.rollback(&mut wiki.wasm, &world.vault, fork.id).unwrap();
        wiki.run(&format!("INSERT INTO page (title) VALUES ('{name}')")).unwrap();
        let branch = wiki.guest.capture(&mut wiki.wasm, &process, &options).unwrap();
        assert_eq!(branch.parent, Some(fork.id));
        assert!(branch.added_bytes < fork.added_bytes / 4, "{} of {}", branch.added_bytes, fork.added_bytes);
        branches.push((name, branch.id));
    }
    for (name, id) in branches {
        wiki.guest.rollback(&mut wiki.wasm, &world.vault, id).unwrap();
        assert_eq!(wiki.run("SELECT title FROM page ORDER BY id DESC LIMIT 1").unwrap(), [name]);
    }
}
