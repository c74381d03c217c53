//! What a process has unmapped, replaced or protected since is mapped again as it was. What cannot
//! be mapped again is refused by name, and the process stays as it was.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use rustix::process::Signal;
use stillframe::Error;
use stillframe::error::RollbackError;

use super::rollback::{Program, Vault, capture, misfit, new_store, rollback};
use super::rollback_limits::killed_at;
use super::rollback_states::{compiled, sees_all_processes};
use crate::needs::{needs, passed_over};

/// Areas of `mappings.c`.
const PLAIN: u32 = 0;
const MIDDLE: u32 = 1;
const CLOSED: u32 = 2;
const RESERVED: u32 = 3;
const GUARDED: u32 = 4;
const NAMED: u32 = 5;
const VIEW: u32 = 6;
const SECOND: u32 = 7;
const OTHER: u32 = 8;

fn mappings(arguments: &[&str]) -> Program {
    static COMPILED: OnceLock<PathBuf> = OnceLock::new();
    let mut command = Command::new(COMPILED.get_or_init(|| compiled("mappings")));
    command.args(arguments);
    Program::start(command)
}

/// Whether a process can be made to call the kernel on this machine.
fn can_call() -> bool {
    let can = cfg!(target_arch = "x86_64") && needs(&["cc"]);
    if !cfg!(target_arch = "x86_64") {
        passed_over("it needs x86-64, on which a process is made to call the kernel");
    }
    can
}

fn maps(program: &Program) -> String {
    fs::read_to_string(format!("/proc/{}/maps", program.pid())).unwrap()
}

fn do_all(program: &mut Program, lines: &[String]) {
    for line in lines {
        assert_eq!(program.ask(line), "done", "{line}");
    }
}

fn on(word: &str, area: u32) -> String {
    format!("{word} {area}")
}

#[test]
fn memory_that_was_unmapped_or_replaced_or_protected_since_is_there_again() {
    if !can_call() {
        return;
    }
    let (_dir, store) = new_store();
    let mut program = mappings(&[]);
    program.ask("count 0");
    let id = capture(&store, &program);
    let before = maps(&program);
    let changes: [&[String]; 11] = [
        &[on("unmap", PLAIN)],
        &[on("hole", MIDDLE)],
        &[on("hole", MIDDLE), on("unmap", PLAIN), on("unmap", RESERVED)],
        &[on("close", CLOSED)],
        &[on("reserve", CLOSED)],
        &[on("private", CLOSED), on("private", PLAIN)],
        &[on("open", RESERVED)],
        &[on("other", PLAIN), on("other", RESERVED)],
        &[on("hole", RESERVED)],
        &["shrink".to_owned()],
        &["shrink".to_owned(), on("other", MIDDLE), on("close", PLAIN), on("unmap", CLOSED)],
    ];
    for change in changes {
        do_all(&mut program, change);
        // Reserved addresses that have become memory are new memory, and stay so.
        let leave = change[0].starts_with("open");
        store.rollback(id).unwrap().leave_new_memory(leave).live_process(program.pid()).unwrap();
        for area in [PLAIN, MIDDLE, CLOSED] {
            assert_eq!(program.ask(&on("count", area)), "16", "area {area} after {change:?}");
        }
        assert_eq!(program.ask("heap"), "64", "after {change:?}");
        if !leave {
            assert_eq!(maps(&program), before, "after {change:?}");
        } else {
            program.ask(&on("reserve", RESERVED));
        }
    }
}

#[test]
fn guard_pages_come_back_with_the_memory_around_them() {
    if !can_call() {
        return;
    }
    let (_dir, store) = new_store();
    let mut program = mappings(&[]);
    let expected = program.ask("guarded");
    if expected == "none here" {
        return passed_over("it needs guard pages (Linux 6.13)");
    }
    assert_eq!(expected, "15 guarded");
    let id = capture(&store, &program);
    for change in ["unmap", "hole", "private", "reserve"] {
        program.ask(&on(change, GUARDED));
        rollback(&store, id, &program);
        assert_eq!(program.ask("guarded"), expected, "after {change}");
    }
}

#[test]
fn views_of_a_memory_file_are_mapped_again_by_the_descriptor_of_that_file() {
    if !can_call() || !sees_all_processes() {
        return;
    }
    let (_dir, store) = new_store();
    let mut program = mappings(&[]);
    program.ask("count 0");
    let id = capture(&store, &program);
    let before = maps(&program);
    let changes: [&[String]; 7] = [
        &[on("unmap", VIEW)],
        &[on("unmap", VIEW), on("unmap", SECOND)],
        &[on("write", VIEW), on("unmap", VIEW)],
        &[on("write", VIEW), on("reserve", VIEW), on("reserve", SECOND)],
        &[on("move", VIEW), on("move", SECOND)],
        // Another file of the same name.
        &[on("other", VIEW)],
        &[on("private", VIEW), on("unmap", SECOND), on("hole", OTHER)],
    ];
    for change in changes {
        do_all(&mut program, change);
        rollback(&store, id, &program);
        for area in [VIEW, SECOND, OTHER] {
            assert_eq!(program.ask(&on("count", area)), "16", "area {area} after {change:?}");
        }
        assert_eq!(maps(&program), before, "after {change:?}");
        // Both mappings are views of the same memory.
        program.ask(&on("write", VIEW));
        assert_eq!(program.ask(&on("count", SECOND)), "0", "after {change:?}");
        rollback(&store, id, &program);
    }
    do_all(&mut program, &["forget".to_owned(), on("unmap", VIEW), on("unmap", SECOND)]);
    let now = maps(&program);
    let found = store.rollback(id).unwrap().leave_descriptors(true).live_process(program.pid()).unwrap_err();
    let Error::Rollback(RollbackError::DoesNotFit { differences, .. }) = found else { panic!("{found:?}") };
    let found = differences.join("; ");
    assert!(found.contains("views") && found.contains("no descriptor of that file any more"), "{found}");
    assert_eq!(maps(&program), now);
}

#[test]
fn what_cannot_be_mapped_again_is_refused_by_name() {
    if !can_call() {
        return;
    }
    let (_dir, store) = new_store();
    let mut program = mappings(&["named"]);
    program.ask("count 0");
    let id = capture(&store, &program);
    if maps(&program).contains("[anon:records]") {
        program.ask(&on("unmap", NAMED));
        let found = misfit(&store, id, program.pid()).join("; ");
        assert!(found.contains("[anon:records]) is gone, and its name"), "{found}");
    } else {
        passed_over("it needs names of memory (CONFIG_ANON_VMA_NAME)");
    }
    // What was left out of the snapshot cannot be restored.
    let mut program = mappings(&[]);
    let plain = stillframe::AddressRange::with_length(0x2000_0000_0000, 4096).unwrap();
    let options = stillframe::CaptureOptions::new().exclude([plain]);
    let source = stillframe::source::LiveProcessSource::new(program.pid());
    let id = store.process("p").capture(&source, &options).unwrap().id;
    program.ask(&on("unmap", PLAIN));
    let found = misfit(&store, id, program.pid()).join("; ");
    assert!(found.contains("left out of the snapshot"), "{found}");
}

#[test]
fn a_call_that_fails_leaves_the_process_as_it_was() {
    if !can_call() {
        return;
    }
    let (_dir, store) = new_store();
    let mut program = mappings(&[]);
    program.ask("limit 1000");
    let id = capture(&store, &program);
    do_all(
        &mut program,
        &[
            on("close", CLOSED),
            on("unmap", PLAIN),
            on("reserve", RESERVED),
            on("hole", MIDDLE),
            on("unmap", GUARDED),
            "shrink".to_owned(),
            // Room for a part of it.
            "limit 24".to_owned(),
        ],
    );
    let now = maps(&program);
    for _ in 0..3 {
        match store.rollback(id).unwrap().live_process(program.pid()).unwrap_err() {
            Error::Rollback(RollbackError::NoRollBack { why, .. }) => {
                assert!(why.contains("memory"), "{why}");
            }
            error => panic!("{error:?}"),
        }
        assert_eq!(maps(&program), now);
        // The process continues in the call in which it waited.
        assert_eq!(program.ask("count 5"), "16");
    }
    program.ask("limit 1000");
    rollback(&store, id, &program);
    assert_eq!((program.ask(&on("count", PLAIN)), program.ask("heap")), ("16".to_owned(), "64".to_owned()));
}

/// At which system calls the command is killed: for each call the last one, and the step between
/// them. `STILLFRAME_EACH_STEP` sets the step to one.
const KILLED_AT: [(&str, usize, usize); 3] =
    [("ptrace", 180, 11), ("pwrite64", 16, 3), ("pidfd_send_signal", 2, 1)];

#[test]
fn a_command_that_is_killed_while_memory_is_mapped_again_leaves_what_can_be_completed() {
    if !can_call() || !needs(&["strace"]) {
        return;
    }
    let vault = Vault::new();
    let mut program = mappings(&[]);
    program.ask("count 0");
    let pid = program.pid().to_string();
    vault.json(&["capture", "--pid", &pid, "--process", "p"]);
    let before = maps(&program);
    let (mut untouched, mut complete, mut stopped) = (0, 0, 0);
    let each = std::env::var_os("STILLFRAME_EACH_STEP").is_some();
    for (call, count, step) in KILLED_AT {
        for at in (1..=count).step_by(if each { 1 } else { step }) {
            do_all(
                &mut program,
                &[
                    on("unmap", PLAIN),
                    on("hole", MIDDLE),
                    on("private", CLOSED),
                    on("unmap", RESERVED),
                    "shrink".to_owned(),
                ],
            );
            program.wait_for_state(&['S']);
            let changed = maps(&program);
            killed_at(&vault.command(&["rollback", "p@latest", "--pid", &pid]), call, at);
            if program.wait_for_state(&['S', 'T']) == 'T' {
                stopped += 1;
                let again = vault.json(&["rollback", "p@latest", "--pid", &pid]);
                assert_eq!(again["stopped"], true, "{call} {at}");
                program.signal(Signal::CONT);
            } else if maps(&program) == changed {
                untouched += 1;
                vault.json(&["rollback", "p@latest", "--pid", &pid]);
            } else {
                complete += 1;
            }
            for area in [PLAIN, MIDDLE, CLOSED] {
                assert_eq!(program.ask(&on("count", area)), "16", "area {area} after {call} {at}");
            }
            assert_eq!(
                (program.ask("heap"), maps(&program)),
                ("64".to_owned(), before.clone()),
                "{call} {at}"
            );
        }
    }
    println!("{untouched} untouched, {complete} complete, {stopped} stopped and rolled back again");
    assert!(stopped > 5 && untouched > 0, "{untouched} {complete} {stopped}");
    assert!(Path::new(&format!("/proc/{pid}")).exists());
}
