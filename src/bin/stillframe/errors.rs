//! Exit codes, and how an error is printed: one line `stillframe: …`, its causes indented below.

use std::process::ExitCode;

use clap::CommandFactory;
use clap::error::{ContextKind, ContextValue, ErrorKind};
use stillframe::Error;
use stillframe::source::SourceError;
use stillframe::store::StoreError;
use stillframe::units::UnitError;

use crate::Arguments;
use crate::output::print_error;

/// What the command exits with. Scripts depend on the numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Exit {
    Done = 0,
    Failed = 1,
    WrongUsage = 2,
    NoSuchSnapshot = 3,
    StoreOwned = 4,
    Damage = 5,
    SourceOrSink = 6,
    Interrupted = 130,
}

impl Exit {
    /// What each code means, for the help and the manual page.
    pub(crate) const MEANINGS: [(Exit, &'static str); 8] = [
        (Exit::Done, "done"),
        (Exit::Failed, "failed"),
        (Exit::WrongUsage, "wrong usage"),
        (Exit::NoSuchSnapshot, "no such snapshot, or several snapshots with that prefix"),
        (Exit::StoreOwned, "another process owns the store (see --wait)"),
        (Exit::Damage, "damage was found"),
        (
            Exit::SourceOrSink,
            "the source or the target cannot be used: no such process,\n\
             no permission, the file exists, the process does not fit",
        ),
        (Exit::Interrupted, "interrupted by ctrl-C or SIGTERM"),
    ];
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> ExitCode {
        ExitCode::from(exit as u8)
    }
}

/// What can go wrong in the command but not in the library.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CommandError {
    /// The arguments do not make sense together.
    #[error("{0}")]
    WrongUsage(String),
    /// The reader of standard output closed it. This is not reported.
    #[error("standard output was closed")]
    ClosedPipe,
    /// The command to watch cannot be started.
    #[error("cannot start the command {name}; check its spelling, and that it is installed and executable")]
    Start {
        /// What was typed.
        name: String,
        /// What the operating system said.
        source: std::io::Error,
    },
    /// A watch that took no snapshot.
    #[error("the process ended before the first snapshot; a shorter --every takes the first one sooner")]
    NoSnapshot,
    /// Standard output cannot be written.
    #[error("cannot write to standard output")]
    Output(#[source] std::io::Error),
}

/// An error about arguments that do not make sense together.
pub(crate) fn wrong_usage(text: impl Into<String>) -> anyhow::Error {
    CommandError::WrongUsage(text.into()).into()
}

/// Silences panics of the threads of the index: a damaged database can cause them, and the library reports them as a
/// warning.
pub(crate) fn silence_panics_of_the_index() {
    let print = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        let of_index = |name: &str| name == "stillframe-index" || name.starts_with("sled-");
        if !std::thread::current().name().is_some_and(of_index) {
            print(panic);
        }
    }));
}

/// Reports a usage error, or prints the help or the version.
pub(crate) fn report_usage(error: &clap::Error) -> ExitCode {
    if !error.use_stderr() {
        // Only a closed pipe can go wrong here, and then nobody reads the report.
        let _ = error.print();
        return Exit::Done.into();
    }
    print_error(&format!("stillframe: {}", usage_text(error)));
    Exit::WrongUsage.into()
}

/// A usage error as it is printed: one line, and hints indented below.
fn usage_text(error: &clap::Error) -> String {
    if error.kind() == ErrorKind::MissingSubcommand {
        return "expected a command; `stillframe --help` lists the commands".to_owned();
    }
    let found = match error.get(ContextKind::InvalidArg) {
        Some(ContextValue::String(text)) if error.kind() == ErrorKind::UnknownArgument => text.as_str(),
        _ => "",
    };
    // The parser takes "-1" for options: it shows the first of them, and a hint that does not help.
    if found.starts_with('-') && found[1..].starts_with(|letter: char| letter.is_ascii_digit()) {
        return format!(
            "unexpected argument {found}: a value cannot be negative\n    see {}",
            help_of_what_was_typed()
        );
    }
    let text = error.render().to_string();
    let mut lines: Vec<String> = Vec::new();
    for paragraph in text.strip_prefix("error: ").unwrap_or(&text).split("\n\n") {
        // The parser lists options from the environment as if they had been typed.
        let is_left_out = ["Usage:", "For more information"].iter().any(|start| paragraph.starts_with(start));
        let joined = paragraph.split_whitespace().collect::<Vec<_>>().join(" ");
        if !is_left_out && !joined.is_empty() {
            lines.push(joined);
        }
    }
    lines.push(format!("see {}", help_of_what_was_typed()));
    lines.join("\n    ")
}

/// The command that prints the help of the verb that was typed.
fn help_of_what_was_typed() -> String {
    let command = Arguments::command();
    let verb = std::env::args_os().skip(1).find(|word| command.find_subcommand(word).is_some());
    let verb = verb.map(|verb| format!("{} ", verb.display())).unwrap_or_default();
    format!("`stillframe {verb}--help`")
}

/// Prints an error and gives the exit code.
pub(crate) fn report(error: &anyhow::Error) -> ExitCode {
    if let Some(CommandError::ClosedPipe) = error.downcast_ref() {
        return Exit::Done.into();
    }
    print_error(&report_text(error));
    exit(error).into()
}

/// The error as it is printed.
pub(crate) fn report_text(error: &anyhow::Error) -> String {
    let mut lines = vec![error.to_string()];
    for cause in error.chain().skip(1) {
        // An error that only wraps another says the same again.
        let text = cause.to_string();
        if lines.last() != Some(&text) {
            lines.push(text);
        }
    }
    // Most errors name it themselves.
    if !lines.iter().any(|line| line.contains("`stillframe ")) {
        lines.extend(advice(exit(error)).map(str::to_owned));
    }
    format!("stillframe: {}", lines.join("\n    "))
}

/// What to do, where the library cannot name the part of the command that helps.
fn advice(exit: Exit) -> Option<&'static str> {
    match exit {
        Exit::StoreOwned => Some("--wait SECONDS waits until the store is free"),
        Exit::Damage => Some("`stillframe verify` lists what is damaged and which snapshots need it"),
        _ => None,
    }
}

/// The exit code of an error: the one of its first cause that has one.
pub(crate) fn exit(error: &anyhow::Error) -> Exit {
    error.chain().find_map(exit_of).unwrap_or(Exit::Failed)
}

fn exit_of(error: &(dyn std::error::Error + 'static)) -> Option<Exit> {
    if let Some(error) = error.downcast_ref::<Error>() {
        return match error {
            Error::Store(error) => Some(exit_of_store(error)),
            Error::Source(SourceError::Interrupted) => Some(Exit::Interrupted),
            Error::Source(_) | Error::Sink(_) | Error::Memory(_) | Error::Rollback(_) | Error::Read(_) => {
                Some(Exit::SourceOrSink)
            }
            Error::Unit(_) => Some(Exit::WrongUsage),
            Error::Interrupted => Some(Exit::Interrupted),
            _ => None,
        };
    }
    if let Some(error) = error.downcast_ref::<StoreError>() {
        return Some(exit_of_store(error));
    }
    match error.downcast_ref::<CommandError>() {
        Some(CommandError::WrongUsage(_)) => return Some(Exit::WrongUsage),
        Some(CommandError::Start { .. } | CommandError::NoSnapshot) => return Some(Exit::SourceOrSink),
        _ => {}
    }
    match (error.is::<UnitError>(), error.downcast_ref::<SourceError>()) {
        (true, _) => Some(Exit::WrongUsage),
        (_, Some(SourceError::Interrupted)) => Some(Exit::Interrupted),
        (_, Some(_)) => Some(Exit::SourceOrSink),
        _ => None,
    }
}

fn exit_of_store(error: &StoreError) -> Exit {
    match error {
        StoreError::NoSuchSnapshot { .. }
        | StoreError::NoSuchProcess { .. }
        | StoreError::AmbiguousPrefix { .. } => Exit::NoSuchSnapshot,
        StoreError::BadSnapshotName { .. }
        | StoreError::BadProcessName { .. }
        | StoreError::BadLabel { .. } => Exit::WrongUsage,
        StoreError::Owned { .. } => Exit::StoreOwned,
        StoreError::Interrupted => Exit::Interrupted,
        error if error.is_damage() => Exit::Damage,
        _ => Exit::Failed,
    }
}
