//! `completions` and `man`.

use std::io;

use clap::{Command, CommandFactory};
use clap_complete::Shell;
use clap_mangen::Man;

use crate::arguments::Arguments;
use crate::context::Context;
use crate::errors::Exit;

/// Prints the completions for a shell.
pub(crate) fn completions(context: &Context, shell: Shell) -> anyhow::Result<Exit> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Arguments::command(), "stillframe", &mut script);
    context.output.text(&String::from_utf8(script)?)?;
    Ok(Exit::Done)
}

/// Prints the manual page: one page, with a section for each verb.
pub(crate) fn man(context: &Context) -> anyhow::Result<Exit> {
    let mut command = Arguments::command().disable_help_subcommand(true);
    command.build();
    let main = Man::new(command.clone());
    let mut page = Vec::new();
    main.render_title(&mut page)?;
    main.render_name_section(&mut page)?;
    main.render_synopsis_section(&mut page)?;
    main.render_description_section(&mut page)?;
    main.render_options_section(&mut page)?;
    let mut page = String::from_utf8(page)?;
    for verb in command.get_subcommands() {
        page.push_str(&verb_section(verb)?);
    }
    let mut rest = Vec::new();
    render_notes(&main, &command, &mut rest)?;
    main.render_version_section(&mut rest)?;
    // Its examples and exit codes are tables, whose lines stay as they are up to the next section.
    page.push_str(&String::from_utf8(rest)?.replacen(".SH NOTES\n", ".SH NOTES\n.nf\n", 1));
    context.output.text(&page)?;
    Ok(Exit::Done)
}

/// The section of one verb. The sections of its own page become parts of it.
fn verb_section(verb: &Command) -> io::Result<String> {
    // The first page has told what every verb understands.
    let verb = verb.clone().mut_args(|argument| {
        let told = argument.is_global_set() || argument.get_id() == "help";
        argument.hide(told)
    });
    let man = Man::new(verb.clone());
    let mut page = Vec::new();
    man.render_synopsis_section(&mut page)?;
    man.render_description_section(&mut page)?;
    if verb.get_arguments().any(|argument| !argument.is_hide_set()) {
        man.render_options_section(&mut page)?;
    }
    render_notes(&man, &verb, &mut page)?;
    let page = String::from_utf8_lossy(&page).replace("\n.SH ", "\n.SS ");
    let page = page.strip_prefix(".SH ").map(|rest| format!(".SS {rest}")).unwrap_or(page);
    Ok(format!(".SH \"{}\"\n{page}", verb.get_name().to_uppercase()))
}

/// What the help says at its end, if it says anything.
fn render_notes(man: &Man, command: &Command, page: &mut Vec<u8>) -> io::Result<()> {
    if command.get_after_help().is_none() {
        return Ok(());
    }
    let mut notes = Vec::new();
    man.render_extra_section(&mut notes)?;
    let notes = String::from_utf8_lossy(&notes).replace(".SH EXTRA", ".SH NOTES");
    page.extend_from_slice(notes.as_bytes());
    Ok(())
}
