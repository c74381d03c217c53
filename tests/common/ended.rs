//! Runs a command to its end, with a time limit.

use std::process::{Command, Output, Stdio};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};

/// No command in the tests takes this long. One that does hangs, and is killed.
const TIMEOUT: Duration = Duration::from_secs(120);

/// Runs a command without input to its end and returns what it printed.
pub(crate) fn output_of(command: &mut Command) -> Output {
    let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let pid = Pid::from_child(&child);
    let (ended, end) = channel::<()>();
    let watchdog = std::thread::spawn(move || {
        let is_late = end.recv_timeout(TIMEOUT) == Err(RecvTimeoutError::Timeout);
        if is_late {
            let _ = kill_process(pid, Signal::KILL);
        }
        is_late
    });
    let output = child.wait_with_output().unwrap();
    drop(ended);
    assert!(!watchdog.join().unwrap(), "{command:?} did not end within {TIMEOUT:?}: {output:?}");
    output
}
