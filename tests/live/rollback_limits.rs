//! Rollback where memory is short: the process first discards what it does not need, through calls
//! that it is made to make. Whichever process is killed in between, the rollback can be completed.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};

use rustix::process::Signal;

use super::rollback::{Program, Vault};
use super::rollback_states::states;
use crate::needs::{needs, passed_over};

/// A control group, version 1 or 2, that limits memory. It is removed when the program in it has
/// ended.
struct Group {
    directory: PathBuf,
    limit: &'static str,
}

impl Group {
    fn new() -> Option<Group> {
        let name = format!("stillframe-test-{}-{:?}", std::process::id(), std::thread::current().id());
        let one = (Path::new("/sys/fs/cgroup/memory"), "memory.limit_in_bytes");
        for (parent, limit) in [one, (Path::new("/sys/fs/cgroup"), "memory.max")] {
            let directory = parent.join(name.replace(['(', ')'], ""));
            if fs::create_dir(&directory).is_err() {
                continue;
            }
            if directory.join(limit).exists() {
                return Some(Group { directory, limit });
            }
            let _ = fs::remove_dir(directory);
        }
        passed_over("it needs control groups that limit memory, and root");
        None
    }

    fn add(&self, program: &Program) {
        fs::write(self.directory.join("cgroup.procs"), program.pid().to_string()).unwrap();
    }

    fn limit(&self, bytes: u64) {
        fs::write(self.directory.join(self.limit), bytes.to_string()).unwrap();
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        for _ in 0..200 {
            if fs::remove_dir(&self.directory).is_ok() {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
    }
}

const MIB: u64 = 1 << 20;

/// Runs a command under strace, which kills it at its `at`th system call of this name.
pub(crate) fn killed_at(command: &Command, call: &str, at: usize) -> ExitStatus {
    let mut strace = Command::new("strace");
    strace.args(["-f", "-qq", "-o", "/dev/null"]);
    strace.arg("-e").arg(format!("trace={call}"));
    strace.arg("-e").arg(format!("inject={call}:signal=SIGKILL:when={at}"));
    strace.arg(command.get_program()).args(command.get_args());
    strace.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    strace.status().unwrap()
}

#[test]
fn what_is_not_needed_is_thrown_away_where_both_moments_would_not_fit() {
    if !needs(&["cc"]) {
        return;
    }
    let Some(group) = Group::new() else { return };
    for one_thread in [true, false] {
        let vault = Vault::new();
        let mut program = states(&[], one_thread);
        group.add(&program);
        program.ask("one");
        let pid = program.pid().to_string();
        vault.json(&["capture", "--pid", &pid, "--process", "p"]);
        program.ask("two");
        group.limit(100 * MIB);
        for round in 0..3 {
            let done = vault.json(&["rollback", "p@latest", "--pid", &pid]);
            assert!(done["written_bytes"].as_u64().unwrap() > 59 * MIB, "{done}");
            assert_eq!(program.ask("which"), "60 0", "round {round}");
            assert_eq!(program.ask("look"), "1 1 1 1 0");
            program.ask("two");
            assert_eq!(program.ask("which"), "0 60");
        }
        // The process has nothing that it could free.
        program.ask("none");
        group.limit(40 * MIB);
        let output = vault.run(&["rollback", "p@latest", "--pid", &pid]);
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.code() == Some(6) && stderr.contains("more bytes"), "{stderr}");
        assert_eq!(program.ask("which"), "0 0");
        group.limit(1000 * MIB);
        drop(program);
    }
}

/// At which system calls the command is killed. For each call that it uses to make the process call
/// the kernel and to write it: the last one, and the step between them. `STILLFRAME_EACH_STEP` sets
/// the step to one.
const KILLED_AT: [(&str, usize, usize); 4] =
    [("ptrace", 120, 7), ("tgkill", 6, 1), ("pwrite64", 12, 3), ("pidfd_send_signal", 2, 1)];

#[test]
fn a_command_that_is_killed_at_any_step_leaves_the_process_as_it_was_or_to_be_rolled_back_again() {
    if !needs(&["cc", "strace"]) {
        return;
    }
    let Some(group) = Group::new() else { return };
    for one_thread in [true, false] {
        let vault = Vault::new();
        let mut program = states(&[], one_thread);
        group.add(&program);
        program.ask("one");
        let pid = program.pid().to_string();
        vault.json(&["capture", "--pid", &pid, "--process", "p"]);
        group.limit(100 * MIB);
        let (mut untouched, mut complete, mut stopped) = (0, 0, 0);
        let each = std::env::var_os("STILLFRAME_EACH_STEP").is_some();
        for (call, count, step) in KILLED_AT {
            for at in (1..=count).step_by(if each { 1 } else { step }) {
                program.ask("two");
                program.wait_for_state(&['S']);
                let command = vault.command(&["rollback", "p@latest", "--pid", &pid]);
                let was_killed = !killed_at(&command, call, at).success();
                if program.wait_for_state(&['S', 'T']) == 'T' {
                    stopped += 1;
                    let again = vault.json(&["rollback", "p@latest", "--pid", &pid]);
                    assert_eq!(again["stopped"], true, "{call} {at}");
                    program.signal(Signal::CONT);
                    assert_eq!(program.ask("which"), "60 0", "{call} {at}, rolled back again");
                    assert_eq!(program.ask("count"), "1048576", "{call} {at}");
                    continue;
                }
                match &*program.ask("which") {
                    "60 0" => complete += 1,
                    "0 60" => untouched += 1,
                    torn => panic!("{call} {at} (killed: {was_killed}): {torn}"),
                }
            }
        }
        println!("{untouched} untouched, {complete} complete, {stopped} stopped and rolled back again");
        assert!(stopped > 5 && untouched > 0, "{untouched} {complete} {stopped}");
        drop(program);
    }
}
