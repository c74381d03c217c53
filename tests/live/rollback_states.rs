//! Rollback is more than bytes: arenas, pages that the kernel may reclaim, guard pages, page faults
//! that another process serves, shared memory, and processes that are mistaken for one another.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use stillframe::error::RollbackError;
use stillframe::{Error, SnapshotId, Store};

use super::rollback::{Program, Vault, capture, misfit, new_store, rollback};
use crate::needs::{needs, passed_over};

/// Compiles a C program of this directory once.
pub(super) fn compiled(name: &str) -> PathBuf {
    let binary = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("{name}-{}", std::process::id()));
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/live/{name}.c"));
    let mut cc = Command::new("cc");
    let status = cc.args(["-O1", "-pthread", "-o"]).arg(&binary).arg(source).status().unwrap();
    assert!(status.success(), "cc cannot compile it");
    binary
}

/// `states.c`.
pub(super) fn states(arguments: &[&Path], one_thread: bool) -> Program {
    static COMPILED: OnceLock<PathBuf> = OnceLock::new();
    let mut command = Command::new(COMPILED.get_or_init(|| compiled("states")));
    command.args(arguments);
    // A thread's first allocation takes new memory, which the rollback would have to leave.
    if one_thread {
        command.env("ONE_THREAD", "1");
    }
    Program::start(command)
}

/// Whether this machine shows which processes share memory.
pub(super) fn sees_all_processes() -> bool {
    // Or the kernel counts the users of each page.
    let is_first = fs::read_link("/proc/self/ns/pid").unwrap().as_os_str() == "pid:[4026531836]";
    let sees = rustix::process::geteuid().is_root() && is_first && fs::File::open("/proc/kpagecount").is_ok();
    if !sees {
        passed_over("it needs root in the first pid namespace, to see all processes");
    }
    sees
}

/// Why the rollback was refused.
#[track_caller]
fn refusal(store: &Store, id: SnapshotId, program: &Program) -> String {
    match store.rollback(id).unwrap().live_process(program.pid()).unwrap_err() {
        Error::Rollback(RollbackError::NoRollBack { why, .. }) => why,
        error => panic!("{error:?}"),
    }
}

// ---- States of pages ----------------------------------------------------------------------------

#[test]
fn an_arena_that_has_grown_is_new_memory_and_is_emptied() {
    if !needs(&["cc"]) {
        return;
    }
    let (_dir, store) = new_store();
    let mut program = states(&[], false);
    program.ask("grow");
    let id = capture(&store, &program);
    for _ in 0..3 {
        program.ask("grow");
        program.ask("grow");
        let found = misfit(&store, id, program.pid()).join("; ");
        assert!(found.contains("set aside then, are memory now"), "{found}");
        store.rollback(id).unwrap().leave_new_memory(true).live_process(program.pid()).unwrap();
        // `calloc` relies on zeros in new parts of an arena, and the program checks them.
        assert_eq!(program.ask("grow"), "done");
        store.rollback(id).unwrap().leave_new_memory(true).live_process(program.pid()).unwrap();
    }
}

#[test]
fn pages_that_the_kernel_may_take_are_written_even_if_they_are_equal() {
    if !needs(&["cc"]) {
        return;
    }
    let (_dir, store) = new_store();
    let mut program = states(&[], true);
    let id = capture(&store, &program);
    assert_eq!(program.ask("free"), "done");
    rollback(&store, id, &program);
    program.ask("pressure");
    assert_eq!(program.ask("count"), "1048576");
    // Without the rollback the pages are gone.
    program.ask("free");
    program.ask("pressure");
    if program.ask("count") != "0" {
        passed_over("this kernel does not take pages back when it is asked to");
    }
}

#[test]
fn guard_pages_are_installed_or_removed_as_they_were() {
    if !needs(&["cc"]) {
        return;
    }
    let (_dir, store) = new_store();
    let mut program = states(&[], true);
    let without = capture(&store, &program);
    if program.ask("guard") != "done" {
        return passed_over("it needs guard pages (Linux 6.13)");
    }
    let with = capture(&store, &program);
    if !cfg!(target_arch = "x86_64") {
        let found = misfit(&store, without, program.pid()).join("; ");
        assert!(found.contains("is guard pages") && found.contains("x86-64"), "{found}");
        return;
    }
    for _ in 0..2 {
        rollback(&store, without, &program);
        assert_eq!((program.ask("count"), program.ask("guarded")), ("1048576".to_owned(), "no".to_owned()));
        rollback(&store, with, &program);
        assert_eq!(program.ask("guarded"), "yes");
        // The present pages are discarded.
        program.ask("unguard");
        assert_eq!(program.ask("guarded"), "no");
        rollback(&store, with, &program);
        assert_eq!(program.ask("guarded"), "yes");
    }
    rollback(&store, without, &program);
    assert_eq!(program.ask("count"), "1048576");
}

#[test]
fn memory_without_permissions_is_rolled_back_whether_it_was_there_or_not() {
    if !needs(&["cc"]) {
        return;
    }
    let (_dir, store) = new_store();
    let mut program = states(&[], true);
    assert_eq!(program.ask("secret"), "0");
    let empty = capture(&store, &program);
    program.ask("keep");
    program.ask("keep");
    let two = capture(&store, &program);
    program.ask("keep");
    assert_eq!(program.ask("secret"), "3");
    rollback(&store, two, &program);
    assert_eq!(program.ask("secret"), "2");
    rollback(&store, empty, &program);
    assert_eq!(program.ask("secret"), "0");
    rollback(&store, two, &program);
    assert_eq!(program.ask("secret"), "2");
}

#[test]
fn memory_that_a_userfaultfd_serves_is_refused_by_name_before_anything_is_written() {
    if !needs(&["cc"]) {
        return;
    }
    let (_dir, store) = new_store();
    let mut program = states(&[], true);
    program.ask("write");
    let id = capture(&store, &program);
    if program.ask("serve") != "done" {
        return passed_over("it needs userfaultfd for write protection");
    }
    // Equal memory may stay as it is.
    rollback(&store, id, &program);
    program.ask("unserve");
    let mut program = states(&[], true);
    let id = capture(&store, &program);
    program.ask("write");
    program.ask("serve");
    let why = refusal(&store, id, &program);
    assert!(why.contains("userfaultfd is told of writes"), "{why}");
    assert_eq!(program.ask("count"), "0");
    program.ask("unserve");
    rollback(&store, id, &program);
    assert_eq!(program.ask("count"), "1048576");
}

#[test]
fn memory_that_has_another_protection_now_gets_it_again() {
    if !needs(&["cc"]) {
        return;
    }
    if !cfg!(target_arch = "x86_64") {
        return passed_over("processes are made to make calls on x86-64 only");
    }
    let (_dir, store) = new_store();
    let mut program = states(&[], true);
    let writable = capture(&store, &program);
    program.ask("protect");
    let read_only = capture(&store, &program);
    for _ in 0..2 {
        rollback(&store, writable, &program);
        assert_eq!(program.ask("permissions"), "writable");
        program.ask("write");
        rollback(&store, read_only, &program);
        assert_eq!(
            (program.ask("permissions"), program.ask("count")),
            ("read-only".to_owned(), "1048576".to_owned())
        );
    }
    program.ask("unprotect");
    assert_eq!(program.ask("permissions"), "writable");
}

// ---- Shared memory ------------------------------------------------------------------------------

#[test]
fn shared_memory_that_nobody_else_has_is_rolled_back_once_however_often_it_is_mapped() {
    if !needs(&["cc"]) {
        return;
    }
    if !sees_all_processes() {
        return;
    }
    let (_dir, store) = new_store();
    let mut program = states(&[], true);
    assert_eq!(program.ask("look"), "1 1 1 1 0");
    let id = capture(&store, &program);
    program.ask("set");
    assert_eq!(program.ask("look"), "2 2 2 2 0");
    let stats = rollback(&store, id, &program);
    assert_eq!((program.ask("look"), stats.left_shared.len()), ("1 1 1 1 0".to_owned(), 0));
    // One page of the memfd, not three, one of the anonymous memory, and what the program itself
    // wrote.
    assert!(stats.written_regions < 20, "{stats:?}");
}

#[test]
fn shared_memory_that_others_have_is_refused_unless_it_may_be_left() {
    if !needs(&["cc"]) {
        return;
    }
    let (_dir, store) = new_store();
    let mut program = states(&[], true);
    program.ask("fork");
    let id = capture(&store, &program);
    rollback(&store, id, &program);
    program.ask("set");
    let found = store.rollback(id).unwrap().live_process(program.pid()).unwrap_err().to_string();
    assert!(found.contains("differs, and ") && found.contains("--leave-shared-memory"), "{found}");
    if sees_all_processes() {
        assert!(found.contains("(states") && found.contains("has it too"), "{found}");
    }
    assert_eq!(program.ask("look"), "2 2 2 2 0");
    let stats = store.rollback(id).unwrap().leave_shared_memory(true).live_process(program.pid()).unwrap();
    assert!(stats.left_shared.len() >= 2, "{:?}", stats.left_shared);
    assert_eq!(program.ask("look"), "2 2 2 2 0");
    program.ask("reap");
    if sees_all_processes() {
        rollback(&store, id, &program);
        assert_eq!(program.ask("look"), "1 1 1 1 0");
    }
}

#[test]
fn a_mapped_file_is_left_and_that_is_told_to_scripts_too() {
    if !needs(&["cc"]) {
        return;
    }
    if !sees_all_processes() {
        return;
    }
    let vault = Vault::new();
    let file = vault.directory.path().join("mapped");
    let mut program = states(&[&file], true);
    let pid = program.pid().to_string();
    vault.json(&["capture", "--pid", &pid, "--process", "p"]);
    program.ask("set");
    let output = vault.run(&["--quiet", "rollback", "p@latest", "--pid", &pid]);
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!((output.status.code(), output.stdout.len()), (Some(0), 0), "{stderr}");
    assert!(stderr.contains("left unchanged") && stderr.contains("/mapped"), "{stderr}");
    assert_eq!(program.ask("look"), "1 1 1 1 2");
    let done = vault.json(&["rollback", "p@latest", "--pid", &pid]);
    let left = done["left_shared"].as_array().unwrap();
    assert!(left.len() == 1 && left[0].as_str().unwrap().ends_with("/mapped"), "{done}");
    // Another process maps it too.
    let mut other = states(&[&file], true);
    program.ask("set");
    let output = vault.run(&["rollback", "p@latest", "--pid", &pid]);
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(
        output.status.code() == Some(6) && stderr.contains(&format!("process {}", other.pid())),
        "{stderr}"
    );
    let output = vault.run(&["rollback", "p@latest", "--pid", &pid, "--leave-shared-memory"]);
    assert_eq!(output.status.code(), Some(0));
    assert_eq!(other.ask("which"), "0 0");
}

// ---- The same process ---------------------------------------------------------------------------

#[test]
fn a_process_that_shares_its_memory_with_another_one_is_refused() {
    if !needs(&["cc"]) {
        return;
    }
    let (_dir, store) = new_store();
    let mut program = states(&[], true);
    let id = capture(&store, &program);
    if program.ask("clone") != "done" {
        return passed_over("it needs clone with CLONE_VM");
    }
    let why = refusal(&store, id, &program);
    assert!(why.contains("shares its memory without being one of its threads"), "{why}");
    program.ask("reap");
    rollback(&store, id, &program);
    assert_eq!(program.ask("count"), "1048576");
}

#[test]
fn a_sibling_that_has_got_the_pid_is_not_taken_for_the_process() {
    if !needs(&["cc"]) {
        return;
    }
    if fs::OpenOptions::new().write(true).open("/proc/sys/kernel/ns_last_pid").is_err() {
        return passed_over("it needs root, to have a process get a certain pid");
    }
    let (_dir, store) = new_store();
    let mut command = Command::new(compiled("siblings"));
    command.env("LC_ALL", "C");
    let mut master = Program::start(command);
    let first: u32 = master.line().parse().unwrap();
    let source = stillframe::source::LiveProcessSource::new(first);
    let id = store.process("p").capture(&source, &stillframe::CaptureOptions::default()).unwrap().id;
    store.rollback(id).unwrap().live_process(first).unwrap();
    if master.ask("next") != first.to_string() {
        return passed_over("the pid did not come back");
    }
    let found = misfit(&store, id, first).join("; ");
    assert!(found.contains("has got that one's pid"), "{found}");
}
