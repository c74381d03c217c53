//! Signals that are pending for a process when it is captured or rolled back.

use std::process::Command;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use stillframe::Error;
use stillframe::error::RollbackError;

use super::rollback::{Program, capture, misfit, new_store, rollback};
use super::rollback_states::compiled;
use crate::needs::needs;

/// `signals.c`.
fn signals() -> Program {
    static COMPILED: OnceLock<std::path::PathBuf> = OnceLock::new();
    Program::start(Command::new(COMPILED.get_or_init(|| compiled("signals"))))
}

#[test]
fn a_fault_that_was_on_its_way_is_not_delivered_into_the_past() {
    if !needs(&["cc"]) {
        return;
    }
    let (_dir, store) = new_store();
    let mut program = signals();
    // The process waits for a line, and expects no page fault.
    program.wait_for_state(&['S']);
    let id = capture(&store, &program);
    // Half of the time it is where the kernel delivers a fault, so a few rounds are enough to
    // capture that.
    for _ in 0..8 {
        assert_eq!(program.ask("fault"), "begins");
        std::thread::sleep(Duration::from_millis(20));
        rollback(&store, id, &program);
    }
    assert_eq!(program.ask("list"), "");
}

#[test]
fn a_process_that_is_captured_in_a_fault_or_trap_takes_it_after_each_rollback() {
    if !needs(&["cc"]) {
        return;
    }
    let (_dir, store) = new_store();
    for command in ["fault", "trap"] {
        let mut program = signals();
        assert_eq!(program.ask(command), "begins");
        let ids: Vec<_> = (0..6).map(|_| capture(&store, &program)).collect();
        for id in ids {
            rollback(&store, id, &program);
        }
        assert_eq!(program.line(), "done");
        assert_eq!(program.ask("list"), "");
    }
}

#[test]
fn who_stops_another_thread_by_a_signal_gets_its_answer_after_a_rollback() {
    if !needs(&["cc"]) {
        return;
    }
    let (_dir, store) = new_store();
    let mut program = signals();
    program.ask("stop-other");
    for _ in 0..12 {
        let id = capture(&store, &program);
        std::thread::sleep(Duration::from_millis(20));
        rollback(&store, id, &program);
        assert_eq!(program.ask("rounds"), "goes on");
    }
}

/// Signals are listed as `number:code:value:whether the process sent them itself`. The C library
/// shows SI_TKILL as SI_USER.
#[test]
fn queued_signals_come_back_with_what_they_carry_and_in_order() {
    if !needs(&["cc"]) {
        return;
    }
    let (_dir, store) = new_store();
    let mut program = signals();
    let first = libc::SIGRTMIN();
    for value in [7, 8, 9] {
        program.ask(&format!("queue {first} {value}"));
    }
    program.ask(&format!("raise {}", libc::SIGUSR1));
    let id = capture(&store, &program);
    let expected = format!("10:0:0:1 {first}:-1:7:1 {first}:-1:8:1 {first}:-1:9:1");
    for _ in 0..2 {
        assert_eq!(program.ask("list"), expected);
        // The captured signals are gone, and others are pending.
        program.ask(&format!("queue {first} 1"));
        program.ask(&format!("queue {} 2", first + 1));
        rollback(&store, id, &program);
    }
    assert_eq!(program.ask("list"), expected);
}

#[test]
fn what_a_process_has_sent_to_itself_since_is_taken_back_and_what_others_have_sent_stays() {
    if !needs(&["cc"]) {
        return;
    }
    let (_dir, store) = new_store();
    let mut program = signals();
    let id = capture(&store, &program);
    program.ask(&format!("raise {}", libc::SIGUSR1));
    program.ask(&format!("kill {}", libc::SIGTERM));
    rollback(&store, id, &program);
    assert_eq!(program.ask("list"), "");
    program.signal(rustix::process::Signal::TERM);
    rollback(&store, id, &program);
    assert_eq!(program.ask("list"), "15:0:0:0");
    // The SIGSTOP that protects the process comes before real-time signals, so none of those can be
    // dequeued.
    program.ask(&format!("kill {}", libc::SIGRTMIN()));
    match store.rollback(id).unwrap().live_process(program.pid()).unwrap_err() {
        Error::Rollback(RollbackError::NoRollBack { why, .. }) => assert!(why.contains("try again"), "{why}"),
        error => panic!("{error:?}"),
    }
    assert!(program.ask("list").starts_with(&format!("{}:0:", libc::SIGRTMIN())));
    rollback(&store, id, &program);
}

#[test]
fn a_process_that_was_stopped_gets_its_signals_too() {
    if !needs(&["cc"]) {
        return;
    }
    let (_dir, store) = new_store();
    let mut program = signals();
    program.ask(&format!("queue {} 5", libc::SIGRTMIN()));
    program.wait_for_state(&['S']);
    program.signal(rustix::process::Signal::STOP);
    program.wait_for_state(&['T']);
    let id = capture(&store, &program);
    program.signal(rustix::process::Signal::CONT);
    let expected = format!("{}:-1:5:1", libc::SIGRTMIN());
    assert_eq!(program.ask("list"), expected);
    program.ask(&format!("raise {}", libc::SIGUSR1));
    program.wait_for_state(&['S']);
    program.signal(rustix::process::Signal::STOP);
    program.wait_for_state(&['T']);
    assert!(rollback(&store, id, &program).is_stopped);
    program.signal(rustix::process::Signal::CONT);
    assert_eq!(program.ask("list"), expected);
}

#[test]
fn a_process_that_does_something_else_on_a_signal_now_is_refused() {
    if !needs(&["cc"]) {
        return;
    }
    let (_dir, store) = new_store();
    let mut program = signals();
    let id = capture(&store, &program);
    program.ask(&format!("ignore {}", libc::SIGUSR2));
    let found = misfit(&store, id, program.pid()).join("; ");
    assert!(found.contains("signal 12 was handled and is ignored now"), "{found}");
}

#[test]
fn real_collectors_that_stop_threads_by_signals_go_on() {
    if !needs(&["sbcl"]) {
        return;
    }
    const LISP: &str = r#"
        (defvar *ticks* 0)
        (defun work () (loop (dotimes (i 100) (make-array 1000)) (incf *ticks*)))
        (dotimes (i 2) (sb-thread:make-thread #'work))
        (format t "ready~%") (finish-output)
        (loop (read-line)
          (let ((before *ticks*)) (sleep 0.3)
            (format t (if (> *ticks* before) "goes on~%" "stuck~%")) (finish-output)))
    "#;
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("p.lisp");
    std::fs::write(&file, LISP).unwrap();
    let (_dir, store) = new_store();
    let mut command = Command::new("sbcl");
    command.args(["--dynamic-space-size", "128", "--script"]).arg(&file);
    let mut program = Program::start(command);
    assert_eq!(program.ask("look"), "goes on");
    let (mut done, begun) = (0, Instant::now());
    while done < 3 && begun.elapsed() < Duration::from_secs(20) {
        let id = capture(&store, &program);
        std::thread::sleep(Duration::from_millis(50));
        // The rollback may be refused because of what the process has mapped or protected since.
        match store.rollback(id).unwrap().leave_new_memory(true).live_process(program.pid()) {
            Ok(_) => done += 1,
            Err(Error::Rollback(RollbackError::DoesNotFit { .. } | RollbackError::NoRollBack { .. })) => {}
            Err(error) => panic!("{error:?}"),
        }
        assert_eq!(program.ask("look"), "goes on");
    }
}
