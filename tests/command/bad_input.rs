//! Wrong arguments: the error is one line that says what was expected and what was found, with
//! hints indented below it.

use std::fs;

use crate::helper::{Running, Vault, noise};

#[test]
fn every_usage_error_is_one_line_with_hints_below() {
    let vault = Vault::new();
    let file = vault.file("image", &noise(10_000, 1));
    vault.capture_file(&file, "p");
    let sleep = Running::sleep();
    let pid = sleep.pid_text();
    for (expected, arguments) in [
        ("'frobnicate'", &["frobnicate"][..]),
        ("unexpected argument 'more'", &["init", "more"]),
        ("-1: a value cannot be negative", &["init", "--region-size", "-1"]),
        ("-1: a value cannot be negative", &["capture", "--pid", "-1"]),
        ("expected a pid from 1 to 4294967295", &["capture", "--pid", "0"]),
        ("expected a pid from 1 to 4294967295", &["rollback", "latest", "--pid", "x"]),
        ("expected a pid from 1 to 4294967295", &["restore", "latest", "--into-pid", "99999999999"]),
        ("'--file <IMAGE>' cannot be used with '--partial'", &["capture", "--file", &file, "--partial"]),
        ("'--pid <PID>' cannot be used with '--partial'", &["capture", "--pid", &pid, "--partial"]),
        ("not provided: <--pid <PID>|--file <IMAGE>|--core <CORE>>", &["capture"]),
        ("not provided: <SNAPSHOT>", &["show"]),
        ("not provided: <B>", &["diff", "latest"]),
        ("a value is required for '--to <FILE>'", &["restore", "latest", "--to"]),
        (
            "'--core <FILE>' cannot be used with '--in-place'",
            &["restore", "latest", "--core", "c", "--in-place"],
        ),
        ("need --into-pid", &["restore", "latest", "--to", "x", "--leave-devices"]),
        ("empty", &["watch", "--", ""]),
        ("expected a number of snapshots from 1", &["watch", "--count", "0", "--", "true"]),
        ("a value cannot be negative", &["watch", "--every", "-1s", "--", "true"]),
        ("expected a number of snapshots from 0", &["forget", "--keep-last", "x"]),
        ("a value cannot be negative", &["forget", "--keep-within", "-1d"]),
        ("expected a percentage from 0 to 100", &["gc", "--max-unused", "101"]),
        ("expected a percentage from 1 to 100", &["verify", "--sample", "0.5"]),
        ("possible values: bash", &["completions", "nosh"]),
        ("'--quiet' cannot be used with '--verbose...'", &["-q", "-v", "list"]),
    ] {
        vault.fails(2, expected, arguments);
        let told = vault.run(arguments).stderr;
        let mut lines = told.lines();
        let first = lines.next().unwrap();
        assert!(first.contains(expected) || told.contains("possible values"), "in the first line: {told}");
        assert!(lines.all(|line| line.starts_with("    ")), "hints are indented: {told}");
        assert!(!told.contains("Usage:") && !told.contains("--store <DIR>"), "{told}");
    }
    assert!(!fs::exists(vault.path("x")).unwrap() && !fs::exists(vault.path("c")).unwrap());
}

#[test]
fn a_usage_error_names_the_help_of_its_verb() {
    let vault = Vault::new();
    for (help, arguments) in [
        ("`stillframe capture --help`", &["capture", "--frob"][..]),
        ("`stillframe gc --help`", &["gc", "--max-unused", "-1"]),
        ("`stillframe --help`", &["--frob"]),
        ("`stillframe --help`", &[]),
    ] {
        vault.fails(2, help, arguments);
    }
}
