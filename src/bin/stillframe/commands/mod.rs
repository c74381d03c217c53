//! The verbs, in the order of the help.

mod capture;
mod cat;
mod completions;
mod diff;
mod forget;
mod gc;
mod history;
mod init;
mod label;
mod list;
mod man;
mod migrate;
mod processes;
mod repair;
mod restore;
mod rollback;
mod show;
mod snapshot_json;
mod stats;
mod stopping;
mod store_as;
mod verify;
mod watch;

use clap::Subcommand;

use crate::context::Context;
use crate::errors::Exit;

/// The verb that was typed, with its arguments.
#[derive(Debug, Subcommand)]
pub(crate) enum Verb {
    Init(init::Init),
    Capture(capture::Capture),
    Watch(watch::Watch),
    List(list::List),
    Show(show::Show),
    Processes(processes::Processes),
    Restore(restore::Restore),
    Rollback(rollback::Rollback),
    Cat(cat::Cat),
    Diff(diff::Diff),
    History(history::History),
    Label(label::Label),
    Forget(forget::Forget),
    Gc(gc::Gc),
    Verify(verify::Verify),
    Repair(repair::Repair),
    Stats(stats::Stats),
    Migrate(migrate::Migrate),
    Completions(completions::Completions),
    Man(man::Man),
}

impl Verb {
    /// Runs the verb.
    pub(crate) fn run(self, context: &Context) -> anyhow::Result<Exit> {
        match self {
            Verb::Init(arguments) => init::init(context, &arguments),
            Verb::Capture(arguments) => capture::capture(context, arguments),
            Verb::Watch(arguments) => watch::watch(context, arguments),
            Verb::List(arguments) => list::list(context, &arguments),
            Verb::Show(arguments) => show::show(context, &arguments),
            Verb::Processes(_) => processes::processes(context),
            Verb::Restore(arguments) => restore::restore(context, &arguments),
            Verb::Rollback(arguments) => rollback::rollback(context, &arguments),
            Verb::Cat(arguments) => cat::cat(context, &arguments),
            Verb::Diff(arguments) => diff::diff(context, &arguments),
            Verb::History(arguments) => history::history(context, &arguments),
            Verb::Label(arguments) => label::label(context, &arguments),
            Verb::Forget(arguments) => forget::forget(context, &arguments),
            Verb::Gc(arguments) => gc::gc(context, &arguments),
            Verb::Verify(arguments) => verify::verify(context, &arguments),
            Verb::Repair(arguments) => repair::repair(context, &arguments),
            Verb::Stats(_) => stats::stats(context),
            Verb::Migrate(arguments) => migrate::migrate(context, &arguments),
            Verb::Completions(arguments) => completions::completions(context, &arguments),
            Verb::Man(_) => man::man(context),
        }
    }
}

#[cfg(test)]
mod tests;
