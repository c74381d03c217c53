//! SQLite under Wasmtime, with a snapshot after each statement: back to any of them, and on from
//! there.
//!
//! ```text
//! cargo run -p stillframe-wasmtime --example sqlite
//! ```
//!
//! It fetches SQLite from npm into `target/`, for which `npm` is needed. The snapshots stay in
//! `target/sqlite.vault`, for the command: `cargo run -- --store target/sqlite.vault list`.

use std::time::Instant;

use anyhow::Result;
use stillframe::CaptureOptions;
use stillframe::diff::DiffOptions;
use stillframe_wasmtime::{Template, engine};
use wasmtime::Config;

#[path = "../guest/sqlite.rs"]
mod sqlite;
use sqlite::Sqlite;

const STATEMENTS: [&str; 5] = [
    "CREATE TABLE account (name TEXT PRIMARY KEY, balance INTEGER)",
    "INSERT INTO account VALUES ('alice', 100), ('bob', 20)",
    "UPDATE account SET balance = balance - 30 WHERE name = 'alice'",
    "UPDATE account SET balance = balance + 30 WHERE name = 'bob'",
    "DELETE FROM account",
];
const ALL: &str = "SELECT name, balance FROM account";

fn main() -> Result<()> {
    let engine = engine(Config::new())?;
    let compiled = sqlite::compile(&engine)?;
    let target = concat!(env!("CARGO_MANIFEST_DIR"), "/../../target");
    let path = format!("{target}/sqlite.vault");
    std::fs::create_dir_all(target)?;
    if std::fs::exists(&path)? {
        std::fs::remove_dir_all(&path)?;
    }
    let vault = stillframe::Store::options().create(path)?;
    let bank = vault.process("bank");
    let mut sqlite = Sqlite::new(&compiled)?;

    println!("{:>8}  {:>7}  {:>6}  statement", "snapshot", "changed", "added");
    let mut moments = Vec::new();
    for statement in STATEMENTS {
        sqlite.run(statement)?;
        let taken = sqlite.guest.capture(&mut sqlite.wasm, &bank, &CaptureOptions::default())?;
        let short = &taken.id.to_string()[..8];
        let (changed, added) = (taken.changed_regions, taken.added_bytes);
        println!("{short}  {changed:>7}  {added:>6}  {statement}");
        moments.push(taken.id);
    }
    println!("\nnow:                {:?}", sqlite.run(ALL)?);

    // The same instance, back to any of them, in any order.
    for (nth, id) in [(1, moments[1]), (3, moments[3]), (2, moments[2])] {
        let started = Instant::now();
        let stats = sqlite.guest.rollback(&mut sqlite.wasm, &vault, id)?;
        let took = started.elapsed();
        println!(
            "after statement {}:  {:?} (wrote {} bytes in {took:.0?})",
            nth + 1,
            sqlite.run(ALL)?,
            stats.written_bytes
        );
    }

    // On from there: a branch, whose parent is the third snapshot.
    sqlite.run("INSERT INTO account VALUES ('carol', 30)")?;
    let branch = sqlite.guest.capture(&mut sqlite.wasm, &bank, &CaptureOptions::default())?;
    println!("\na branch:           {:?}", sqlite.run(ALL)?);
    assert_eq!(branch.parent, Some(moments[2]));
    let diff = vault.diff(moments[3], branch.id, &DiffOptions::default())?;
    println!("its memory differs from the fourth snapshot's in {} bytes", diff.differing_bytes);

    // Others that begin there, each with a memory of its own.
    let template = Template::new(&vault, branch.id)?;
    for name in ["dave", "erin"] {
        let mut copy = Sqlite::unborn(&compiled, sqlite.database())?;
        let started = Instant::now();
        copy.guest.instantiate(&mut copy.wasm, &template)?;
        let took = started.elapsed();
        copy.run(&format!("INSERT INTO account VALUES ('{name}', 0)"))?;
        println!("a copy ({took:.0?}):     {:?}", copy.run(ALL)?);
    }
    println!("the branch itself:  {:?}", sqlite.run(ALL)?);
    Ok(())
}
