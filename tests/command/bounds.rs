//! The memory and time that a store needs stay bounded, whatever it contains: forged records,
//! command lines, layouts and differences.
//!
//! The stores are forged according to the description of the format: a record or a layout with any
//! content, in which all checks are right.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Output, Stdio};

use crate::forger::Forger;
use serde_json::Value;
use stillframe::diff::{Diff, DiffOptions};
use stillframe::record::Origin;
use stillframe::source::LiveProcessSource;
use stillframe::{CaptureOptions, Store};

/// The offset of the origin in a record of bytes: after version, process, no parent, time and
/// trigger.
const ORIGIN_AT: usize = 1 + 2 + 1 + 9 + 1;

/// A record of bytes whose origin is replaced.
fn with_origin(record: &[u8], origin: &[u8]) -> Vec<u8> {
    assert_eq!(record[ORIGIN_AT], 0);
    [&record[..ORIGIN_AT], origin, &record[ORIGIN_AT + 1..]].concat()
}

/// The origin of a process without a path, with `words` words of `word_bytes` bytes each.
fn command_origin(pid: u8, words: u32, word_bytes: u8) -> Vec<u8> {
    let mut origin = vec![2, pid, 0, 252];
    origin.extend(words.to_le_bytes());
    let word = [vec![word_bytes], vec![b'x'; word_bytes.into()]].concat();
    origin.extend(word.iter().copied().cycle().take(word.len() * words as usize));
    origin
}

/// Runs the command with at most this much address space.
fn run_within(mebibytes: u32, store: &Path, arguments: &[&str]) -> Output {
    let script = format!("ulimit -v {}; exec \"$@\"", mebibytes * 1024);
    Command::new("sh")
        .args(["-c", &script, "sh", env!("CARGO_BIN_EXE_stillframe"), "--store"])
        .arg(store)
        .args(arguments)
        .output()
        .unwrap()
}

fn told(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// More than any verb needs for a small store. Most of it is address space that the C library
/// reserves for each thread. Before there were bounds, the forged records took 5 GiB of memory.
const ENOUGH_MIB: u32 = 2_000;

#[test]
fn records_with_millions_of_words_cost_every_verb_little() {
    let dir = tempfile::tempdir().unwrap();
    let mut forger = Forger::new(dir.path());
    let record = forger.plain(5);
    for pid in 0..12 {
        forger.add(5, &with_origin(&record, &command_origin(pid, 16_000_000, 0)));
    }
    forger.write();
    let store = dir.path().join("store");
    assert!(std::fs::metadata(&forger.path).unwrap().len() < 100_000);
    for arguments in [
        &["list", "--json"][..],
        &["list"],
        &["verify"],
        &["stats"],
        &["gc"],
        &["history", "--range", "0..8"],
        &["repair"],
        &["list", "--json"],
    ] {
        let output = run_within(ENOUGH_MIB, &store, arguments);
        assert!(output.status.success(), "{arguments:?}: {}", told(&output));
    }
    let output = run_within(ENOUGH_MIB, &store, &["list", "--json"]);
    let list: Vec<Value> = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(list.len(), 13);
    let words = list[12]["source"]["command"].as_array().unwrap();
    assert_eq!((words.len(), words.last().unwrap().as_str().unwrap()), (4097, "… (cut)"));
}

#[test]
fn a_thousand_long_records_are_held_or_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let mut forger = Forger::new(dir.path());
    let record = forger.plain(5);
    // A trigger of 4 MiB, and 60 KiB of attachment names.
    let mut long_trigger = record[..ORIGIN_AT - 1].to_vec();
    long_trigger.extend([8, 252]);
    long_trigger.extend((4u32 << 20).to_le_bytes());
    long_trigger.extend(vec![b'x'; 4 << 20]);
    long_trigger.extend(&record[ORIGIN_AT..]);
    let refused = forger.add(5, &long_trigger);
    for number in 0..3_000u32 {
        let mut many = with_origin(&record, &command_origin(1, 0, 0));
        // The number of attachments, zero so far, lies before the layout and the root.
        let at = many.len() - 65;
        assert_eq!(many[at], 0);
        let mut name = vec![b'x'; 60_000];
        name[..4].copy_from_slice(format!("{number:04}").as_bytes());
        let attachment = [&[1, 251][..], &60_000u16.to_le_bytes(), &name, &[0; 32], &[0]].concat();
        many.splice(at..=at, attachment);
        forger.add(5, &many);
    }
    forger.write();
    let store = dir.path().join("store");
    let output = run_within(ENOUGH_MIB, &store, &["list", "-q"]);
    assert!(output.status.success(), "{}", told(&output));
    let output = run_within(ENOUGH_MIB, &store, &["list"]);
    assert!(!String::from_utf8_lossy(&output.stdout).contains(&refused.to_string()[..12]));
}

#[test]
fn a_process_that_fills_its_command_line_is_recorded_with_the_first_4_kib() {
    let dir = tempfile::tempdir().unwrap();
    let word = "w".repeat(100);
    let command = format!("echo ready; read line # {}", "y".repeat(5_000));
    let mut child = Command::new("sh")
        .args(["-c", &command, "sh"])
        .args(std::iter::repeat_n(&word, 2_000))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
    let store = Store::options().create(dir.path().join("store")).unwrap();
    let taken = store.process("p").capture(&LiveProcessSource::new(child.id()), &CaptureOptions::default());
    child.kill().unwrap();
    child.wait().unwrap();
    let taken = taken.unwrap();
    let check = |store: &Store| {
        let snapshot = store.snapshot(taken.id).unwrap();
        let Origin::LiveProcess { command, .. } = &snapshot.record().origin else { panic!() };
        let bytes: usize = command.iter().map(|word| word.len() + 1).sum();
        assert!((4_000..4_200).contains(&bytes), "{bytes}");
        assert_eq!((&*command[0], &*command[1]), ("sh", "-c"));
        assert_eq!(command.last().unwrap(), "… (cut)");
    };
    check(&store);
    drop(store);
    check(&Store::open(dir.path().join("store")).unwrap());
    let output = run_within(ENOUGH_MIB, &dir.path().join("store"), &["show", "latest"]);
    assert!(String::from_utf8_lossy(&output.stdout).contains("… (cut)"), "{}", told(&output));
}

/// One mapping of 2^62 bytes, all of them zeros.
#[test]
fn the_history_of_a_layout_of_any_length_ends_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let mut forger = Forger::new(dir.path());
    let (record, layout) = (forger.plain(5), forger.plain(4));
    // Version, one mapping, start 0, and an end: a 251 and two bytes.
    assert_eq!(&layout[..4], &[1, 1, 0, 251]);
    let long = [&layout[..3], &[253], &(1u64 << 62).to_le_bytes(), &layout[6..]].concat();
    let layout = forger.add(4, &long);
    let mut record = record;
    let at = record.len() - 64;
    record[at..at + 32].copy_from_slice(&layout.0);
    record[at + 32..].fill(0);
    // A record of another process.
    record[2] = b'q';
    forger.add(5, &record);
    forger.write();
    let store = dir.path().join("store");
    for arguments in [
        &["history", "--process", "q", "--range", "0..8"][..],
        &["history", "--process", "q", "--range", "0x3fffffffffffff00..0x3fffffffffffffff"],
    ] {
        let output = run_within(ENOUGH_MIB, &store, arguments);
        assert_eq!(output.status.code(), Some(5), "{arguments:?}: {}", told(&output));
        assert!(told(&output).contains("there are never more than"), "{}", told(&output));
    }
}

#[test]
fn of_more_differences_than_a_million_the_first_are_listed_and_all_are_counted() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::options().create(dir.path().join("store")).unwrap();
    let mut memory = vec![0u8; 20 << 20];
    let process = store.process("p");
    let before = process.capture(&memory, &CaptureOptions::default()).unwrap();
    memory.iter_mut().step_by(2).for_each(|byte| *byte = 1);
    let after = process.capture(&memory, &CaptureOptions::default()).unwrap();
    let diff = store.diff(before.id, after.id, &DiffOptions::default()).unwrap();
    assert_eq!((diff.ranges.len(), diff.more_ranges), (Diff::MAX_RANGES, true));
    assert!(
        diff.ranges
            .iter()
            .zip(0u64..)
            .all(|(range, at)| (range.start(), range.length_bytes()) == (2 * at, 1))
    );
    assert_eq!((diff.differing_bytes, diff.differing_regions), (10 << 20, 1280));
    memory[4..].fill(0);
    let few = process.capture(&memory, &CaptureOptions::default()).unwrap();
    let diff = store.diff(before.id, few.id, &DiffOptions::default()).unwrap();
    assert_eq!((diff.ranges.len(), diff.more_ranges, diff.differing_bytes), (2, false, 2));
}
