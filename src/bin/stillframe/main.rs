//! The `stillframe` command. It parses the arguments, runs one verb and turns the result into an
//! exit code.
//!
//! ```text
//! commands/     one file a verb: its arguments, its help, its text and its JSON
//! context.rs    the context of a verb: the store, the output, interrupts
//! output.rs     standard output: JSON, lines, tables   human.rs     sizes, ages, durations as text
//! errors.rs     exit codes and `stillframe: …`         hexdump.rs   `cat --hex`
//! values.rs     parsers of option values               progress.rs  bars on a terminal
//! ```

mod commands;
mod context;
mod errors;
mod hexdump;
mod human;
mod output;
mod progress;
mod values;

use std::process::ExitCode;

use clap::Parser;
use commands::Verb;
use context::{Context, Global};
use errors::Exit;

const FIRST_STEPS: &str = "\
First steps:
  stillframe watch -- python3 app.py     run a command, one snapshot a second
  stillframe capture --pid 4711          take a snapshot of a running process
  stillframe list                        list all snapshots
  stillframe show latest                 show a snapshot and its mappings
  stillframe restore latest --to image   write the memory to a file
  stillframe rollback web-1~3 --pid 4711
                                         roll a running process back in place
  stillframe forget --keep-last 10       remove all but the newest ten, then
  stillframe gc                          free the space

A SNAPSHOT is a full id, the first 4 or more hex digits of an id,
PROCESS@latest, PROCESS~N (the Nth before the latest), or latest.";

/// Take snapshots of process memory, restore them by id and roll processes back
///
/// stillframe is a content-addressed, deduplicating store for snapshots of process memory. Each
/// distinct region of memory is stored once and compressed; a further snapshot costs only what
/// changed.
#[derive(Debug, Parser)]
#[command(name = "stillframe", version, after_long_help = notes(), max_term_width = 100)]
#[command(subcommand_required = true, arg_required_else_help = false)]
struct Arguments {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    verb: Verb,
}

fn main() -> ExitCode {
    errors::silence_panics_of_the_index();
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(error) => return errors::report_usage(&error),
    };
    match run(arguments) {
        Ok(exit) => exit.into(),
        Err(error) => errors::report(&error),
    }
}

fn run(Arguments { global, verb }: Arguments) -> anyhow::Result<Exit> {
    let context = Context::new(&global)?;
    verb.run(&context)
}

/// The end of `--help`.
fn notes() -> String {
    let line =
        |(exit, text): &(Exit, &str)| format!("\n  {:<4} {}", *exit as u8, text.replace('\n', "\n       "));
    let codes: String = Exit::MEANINGS.iter().map(line).collect();
    format!("{FIRST_STEPS}\n\nExit codes:{codes}")
}
