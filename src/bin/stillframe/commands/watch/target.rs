//! The watched process: a running one, or a command that the watch has started.

use std::ffi::OsString;
use std::io;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use super::{End, LOOK_EVERY};
use crate::context::Context;
use crate::errors::CommandError;
use crate::human;

/// At a terminal ctrl-C reaches the command too. If the command still runs after this time, the
/// watch signals it.
const INTERRUPT_AFTER: Duration = Duration::from_millis(500);

/// A command that ignores SIGINT gets SIGTERM after this time.
const TERMINATE_AFTER: Duration = Duration::from_secs(5);

/// The watched process.
pub(super) struct Target {
    pub(super) pid: u32,
    /// Distinguishes the process from a later one with the same pid.
    started_ticks: Option<u64>,
    /// The command, if the watch has started it.
    command: Option<Started>,
}

struct Started {
    child: Child,
    name: String,
    /// Set when it has ended, with its exit status if known.
    ended: Option<Option<ExitStatus>>,
}

impl Target {
    /// A process that is already running.
    pub(super) fn running(pid: u32) -> Target {
        Target { pid, started_ticks: running_since_ticks(pid), command: None }
    }

    /// Starts a command.
    pub(super) fn start(
        context: &Context,
        program: &OsString,
        arguments: &[OsString],
    ) -> anyhow::Result<Target> {
        // The command must get the umask that this program was started with. Files that other
        // threads create meanwhile are in the store, which only its owner may enter.
        let private_umask = rustix::process::umask(context.inherited_umask);
        let child = Command::new(program).args(arguments).stdout(Stdio::from(io::stderr())).spawn();
        rustix::process::umask(private_umask);
        let name = human::plain(&program.to_string_lossy());
        let child = child.map_err(|source| CommandError::Start { name: name.clone(), source })?;
        let pid = child.id();
        Ok(Target { pid, started_ticks: None, command: Some(Started { child, name, ended: None }) })
    }

    /// Whether the process ran before the watch.
    pub(super) fn is_running_process(&self) -> bool {
        self.command.is_none()
    }

    /// Whether the process has ended. A started command that has ended is reaped.
    pub(super) fn has_ended(&mut self) -> bool {
        match &mut self.command {
            Some(command) => command.has_ended(),
            None => self.started_ticks.is_none() || running_since_ticks(self.pid) != self.started_ticks,
        }
    }

    /// Waits for the end of a started command, and ends it on ctrl-C. Returns why the watch is
    /// over.
    pub(super) fn finish(&mut self, context: &Context, end: End) -> End {
        if end == End::CountReached
            && let Some(command) = self.command.as_ref().filter(|command| command.ended.is_none())
        {
            context.output.hint(&format!("{} runs on; ctrl-C ends it", command.name));
        }
        while end == End::CountReached && !context.is_interrupted() && self.is_command_running() {
            std::thread::sleep(LOOK_EVERY);
        }
        if self.is_command_running() {
            self.stop(context);
            return End::Interrupted;
        }
        end
    }

    /// How the command ended, if there was one.
    pub(super) fn ending(&self) -> Option<String> {
        let command = self.command.as_ref()?;
        let status = command.ended.flatten();
        let status = status.map_or_else(|| "ended".to_owned(), |status| format!("ended: {status}"));
        Some(format!("{} {status}", command.name))
    }

    /// Ends the command: with SIGINT, later with SIGTERM, and with SIGKILL if ctrl-C is pressed
    /// again.
    fn stop(&mut self, context: &Context) {
        context.clear_interrupt();
        let started = Instant::now();
        let mut requests =
            [(INTERRUPT_AFTER, Signal::INT), (TERMINATE_AFTER, Signal::TERM)].into_iter().peekable();
        while self.is_command_running() {
            if context.is_interrupted() {
                context.clear_interrupt();
                self.signal(Signal::KILL);
            }
            if let Some((_, signal)) = requests.next_if(|(after, _)| started.elapsed() > *after) {
                context.output.hint("waiting for the command to end; ctrl-C kills it");
                self.signal(signal);
            }
            std::thread::sleep(LOOK_EVERY);
        }
    }

    fn is_command_running(&mut self) -> bool {
        self.command.as_mut().is_some_and(|command| !command.has_ended())
    }

    fn signal(&self, signal: Signal) {
        let pid = i32::try_from(self.pid).ok().and_then(Pid::from_raw);
        // The child is not reaped, so no other process has its pid. If it has ended, the signal has
        // no effect.
        let _ = pid.map(|pid| kill_process(pid, signal));
    }
}

impl Started {
    fn has_ended(&mut self) -> bool {
        if self.ended.is_none() {
            self.ended = match self.child.try_wait() {
                Ok(status) => status.map(Some),
                // A capture that was stopping the command may have reaped it. Its exit status is
                // then unknown.
                Err(_) => Some(None),
            };
        }
        self.ended.is_some()
    }
}

/// When a running process was started, in clock ticks since the machine booted; `None` if there is
/// no such process or if it is a zombie.
fn running_since_ticks(pid: u32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The second field, the name in parentheses, may contain blanks and parentheses.
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_ascii_whitespace().collect();
    let (state, threads, started_ticks) = (fields.first()?, fields.get(17)?, fields.get(19)?);
    // The first thread may have ended while others run.
    let has_ended =
        ["Z", "X", "x"].contains(state) && threads.parse::<u64>().is_ok_and(|threads| threads <= 1);
    if has_ended { None } else { started_ticks.parse().ok() }
}
