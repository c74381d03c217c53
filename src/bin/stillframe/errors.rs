//! Exit codes, and how an error is told: one line `stillframe: …`, its causes indented below.

use std::process::ExitCode;

use clap::error::ErrorKind;
use stillframe::{Error, SourceError, StoreError, UnitError};

use crate::output::print_error;

/// What the command ends with. The numbers are a promise to scripts.
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

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> ExitCode {
        ExitCode::from(exit as u8)
    }
}

/// What only the command can get wrong.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CommandError {
    /// The arguments do not make sense together.
    #[error("{0}")]
    WrongUsage(String),
    /// Whoever read standard output has enough. Not an error to tell anybody about.
    #[error("standard output was closed")]
    ClosedPipe,
    /// The command to watch cannot be started.
    #[error("cannot start the command {name}; is it installed, and spelt like this?")]
    Start {
        /// What was typed.
        name: String,
        /// What the operating system said.
        source: std::io::Error,
    },
    /// A watch that took no snapshot.
    #[error("the process ended before the first snapshot; a shorter --every takes one sooner")]
    NoSnapshot,
    /// Standard output cannot be written.
    #[error("cannot write to standard output")]
    Output(#[source] std::io::Error),
}

/// An error about arguments that do not make sense together.
pub(crate) fn wrong_usage(text: impl Into<String>) -> anyhow::Error {
    CommandError::WrongUsage(text.into()).into()
}

/// A database that is damaged may make its threads panic. The library turns that into a warning, which is enough.
pub(crate) fn keep_quiet_about_the_index() {
    let tell = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        let of_index = |name: &str| name == "stillframe-index" || name.starts_with("sled-");
        if !std::thread::current().name().is_some_and(of_index) {
            tell(panic);
        }
    }));
}

/// Tells a usage error, or prints the help or the version that was asked for.
pub(crate) fn report_usage(error: &clap::Error) -> ExitCode {
    if !error.use_stderr() {
        // A closed pipe is all that can go wrong here, and nobody is there to be told.
        let _ = error.print();
        return Exit::Done.into();
    }
    let text = match error.kind() {
        ErrorKind::MissingSubcommand => {
            "what is to be done? `stillframe --help` lists the commands".to_owned()
        }
        _ => error.render().to_string(),
    };
    print_error(&format!("stillframe: {}", text.strip_prefix("error: ").unwrap_or(&text).trim_end()));
    Exit::WrongUsage.into()
}

/// Tells an error and says what to exit with.
pub(crate) fn report(error: &anyhow::Error) -> ExitCode {
    if let Some(CommandError::ClosedPipe) = error.downcast_ref() {
        return Exit::Done.into();
    }
    print_error(&told(error));
    exit(error).into()
}

/// The error as it is told.
pub(crate) fn told(error: &anyhow::Error) -> String {
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

/// What the library cannot know: which part of the command helps.
fn advice(exit: Exit) -> Option<&'static str> {
    match exit {
        Exit::StoreOwned => Some("--wait SECONDS waits until the store is free"),
        Exit::Damage => Some("`stillframe verify` lists what is damaged and which snapshots need it"),
        _ => None,
    }
}

/// What to exit with after `error`: what the first of its causes that has a code of its own says.
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
