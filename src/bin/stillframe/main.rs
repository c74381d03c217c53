//! The `stillframe` command: it parses, runs one verb, and turns what came of it into an exit code.
//!
//! ```text
//! arguments.rs   what can be typed            capture.rs   capture
//! context.rs     what every verb needs        watch.rs     watch
//! output.rs      standard output, tables      look.rs      list show processes cat label
//! json.rs        the JSON objects             restore.rs   restore
//! human.rs       sizes, ages, durations       tidy.rs      forget gc
//! hexdump.rs     `cat --hex`                  care.rs      init verify repair stats migrate
//! progress.rs    bars on a terminal           manual.rs    completions man
//! errors.rs      exit codes, `stillframe: …`  past.rs      diff history
//! rollback.rs    rollback
//! ```

mod arguments;
mod capture;
mod care;
mod context;
mod errors;
mod hexdump;
mod human;
mod json;
mod look;
mod manual;
mod output;
mod past;
mod progress;
mod restore;
mod rollback;
mod tidy;
mod watch;

use std::process::ExitCode;

use arguments::{Arguments, Verb};
use clap::Parser;
use context::Context;
use errors::Exit;

fn main() -> ExitCode {
    errors::keep_quiet_about_the_index();
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
    match verb {
        Verb::Init(arguments) => care::init(&context, &arguments),
        Verb::Capture(arguments) => capture::capture(&context, arguments),
        Verb::Watch(arguments) => watch::watch(&context, arguments),
        Verb::List(arguments) => look::list(&context, &arguments),
        Verb::Show(arguments) => look::show(&context, &arguments),
        Verb::Processes => look::processes(&context),
        Verb::Restore(arguments) => restore::restore(&context, &arguments),
        Verb::Rollback(arguments) => rollback::rollback(&context, &arguments),
        Verb::Cat(arguments) => look::cat(&context, &arguments),
        Verb::Diff(arguments) => past::diff(&context, &arguments),
        Verb::History(arguments) => past::history(&context, &arguments),
        Verb::Label(arguments) => look::label(&context, &arguments),
        Verb::Forget(arguments) => tidy::forget(&context, &arguments),
        Verb::Gc(arguments) => tidy::gc(&context, &arguments),
        Verb::Verify(arguments) => care::verify(&context, &arguments),
        Verb::Repair(arguments) => care::repair(&context, &arguments),
        Verb::Stats => care::stats(&context),
        Verb::Migrate(arguments) => care::migrate(&context, &arguments),
        Verb::Completions { shell } => manual::completions(&context, shell),
        Verb::Man => manual::man(&context),
    }
}
