//! `completions`: scripts that let a shell complete the command.

use clap::{Args, CommandFactory};
use clap_complete::Shell;

use crate::Arguments;
use crate::context::Context;
use crate::errors::Exit;

const EXAMPLES: &str = "\
Examples:
  stillframe completions bash \\
    > ~/.local/share/bash-completion/completions/stillframe
  stillframe completions fish > ~/.config/fish/completions/stillframe.fish";

/// Print the completions for a shell
#[derive(Debug, Args)]
#[command(after_long_help = EXAMPLES)]
pub(crate) struct Completions {
    /// Shell: bash, elvish, fish, powershell or zsh
    #[arg(value_name = "SHELL", hide_possible_values = true)]
    shell: Shell,
}

/// Prints the completions for a shell.
pub(super) fn completions(context: &Context, arguments: &Completions) -> anyhow::Result<Exit> {
    let mut script = Vec::new();
    clap_complete::generate(arguments.shell, &mut Arguments::command(), "stillframe", &mut script);
    context.output.text(&String::from_utf8(script)?)?;
    Ok(Exit::Done)
}
