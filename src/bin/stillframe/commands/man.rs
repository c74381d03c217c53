//! `man`: the manual page, one page with a section for each verb.

use clap::{Arg, Args, Command, CommandFactory};

use crate::Arguments;
use crate::context::Context;
use crate::errors::Exit;

const EXAMPLES: &str = "\
Examples:
  stillframe man | man -l -
  stillframe man > ~/.local/share/man/man1/stillframe.1";

const ENVIRONMENT: [(&str, &str); 6] = [
    ("STILLFRAME_STORE", "The directory of the store, if --store is not given."),
    (
        "XDG_DATA_HOME",
        "The store is its subdirectory stillframe, if neither --store nor STILLFRAME_STORE is given.",
    ),
    ("HOME", "The store is $HOME/.local/share/stillframe, if XDG_DATA_HOME is not set either."),
    ("NO_COLOR", "If set and not empty, no colours are printed. The same holds for TERM=dumb."),
    ("TMPDIR", "Where `capture --core` decompresses a core. Default: /var/tmp."),
    ("TZ", "The time zone of printed times, and of the hours, days, weeks and months of `forget`."),
];

const FILES: [(&str, &str); 6] = [
    ("~/.local/share/stillframe", "The default store. The files below are in the directory of a store."),
    ("FORMAT", "The version of the format, the region size and the codec."),
    ("LOCK", "Locked by the process that owns the store. The file has the pid of that process."),
    (
        "packs/",
        "The snapshots and their memory. These files are never changed, only appended to, or replaced by gc.",
    ),
    ("index/", "A cache of the packs. It is rebuilt if it is missing or damaged."),
    ("damaged/", "What repair moved out of the way. REPORT.txt says why, and which snapshots lost data."),
];

/// Print the manual page
#[derive(Debug, Args)]
#[command(after_long_help = EXAMPLES)]
pub(crate) struct Man {}

/// Prints the manual page.
pub(super) fn man(context: &Context) -> anyhow::Result<Exit> {
    let mut command = Arguments::command().disable_help_subcommand(true);
    command.build();
    context.output.text(&page(&command))?;
    Ok(Exit::Done)
}

fn page(command: &Command) -> String {
    let version = command.get_version().unwrap_or_default();
    let about = command.get_about().map(ToString::to_string).unwrap_or_default();
    let mut page = format!(
        ".TH stillframe 1 \"\" \"stillframe {version}\"\n.SH NAME\nstillframe \\- {}\n.SH SYNOPSIS\n",
        escaped(&about)
    );
    page += &format!(
        ".B stillframe\n[\\fIGLOBAL OPTIONS\\fR] \\fICOMMAND\\fR [\\fIOPTIONS\\fR]\n.SH DESCRIPTION\n{}",
        paragraphs(&long_about(command))
    );
    let (global, own): (Vec<&Arg>, Vec<&Arg>) =
        command.get_arguments().partition(|argument| argument.is_global_set());
    page += &format!(".SH OPTIONS\n{}.SH \"GLOBAL OPTIONS\"\n{}", items(&own), items(&global));
    page += ".SH COMMANDS\n";
    for verb in command.get_subcommands() {
        let about = verb.get_about().map(ToString::to_string).unwrap_or_default();
        page += &item(&bold(verb.get_name()), &paragraphs(&about));
    }
    command.get_subcommands().for_each(|verb| page += &verb_sections(verb));
    let section = |entries: &[(&str, &str)]| -> String {
        entries.iter().map(|(name, text)| item(&bold(name), &paragraphs(text))).collect()
    };
    let codes =
        Exit::MEANINGS.iter().map(|(exit, text)| item(&bold(&(*exit as u8).to_string()), &paragraphs(text)));
    page += &format!(".SH ENVIRONMENT\n{}.SH FILES\n{}", section(&ENVIRONMENT), section(&FILES));
    page += &format!(".SH \"EXIT STATUS\"\n{}", codes.collect::<String>());
    let notes = command.get_after_long_help().map(ToString::to_string).unwrap_or_default();
    let examples = notes.split("\n\nExit codes:").next().unwrap_or_default();
    page += &format!(".SH EXAMPLES\n{}", verbatim(examples.trim_start_matches("First steps:\n")));
    page
}

/// The section of one verb.
fn verb_sections(verb: &Command) -> String {
    let arguments: Vec<&Arg> = verb
        .get_arguments()
        .filter(|argument| {
            !argument.is_global_set() && !["help", "version"].contains(&argument.get_id().as_str())
        })
        .collect();
    let mut text = format!(
        ".SH \"{}\"\n.SS SYNOPSIS\n{}.SS DESCRIPTION\n{}",
        verb.get_name().to_uppercase(),
        synopsis(verb.get_name(), &arguments),
        paragraphs(&long_about(verb))
    );
    if !arguments.is_empty() {
        text += &format!(".SS OPTIONS\n{}", items(&arguments));
    }
    // The help ends with examples; the text before them is notes.
    let after = verb.get_after_long_help().map(ToString::to_string).unwrap_or_default();
    let (notes, examples) = after.split_once("Examples:\n").unwrap_or((&after, ""));
    if !notes.is_empty() {
        text += &format!(".SS NOTES\n{}", verbatim(notes.trim_end()));
    }
    if !examples.is_empty() {
        text += &format!(".SS EXAMPLES\n{}", verbatim(examples));
    }
    text
}

/// The verb with all its options and arguments; optional ones are in brackets.
fn synopsis(verb: &str, arguments: &[&Arg]) -> String {
    let mut text = format!(".B stillframe {}\n", escaped(verb));
    for argument in arguments {
        let spelling = spelling(argument);
        let more =
            if argument.get_num_args().is_some_and(|count| count.max_values() > 1) { "..." } else { "" };
        let before = if argument.is_last_set() { "-- " } else { "" };
        let spelling = format!("{}{spelling}{more}", escaped(before));
        text += &if argument.is_required_set() { format!("{spelling}\n") } else { format!("[{spelling}]\n") };
    }
    text
}

fn items(arguments: &[&Arg]) -> String {
    let text = |argument: &&Arg| {
        let help =
            argument.get_long_help().or(argument.get_help()).map(ToString::to_string).unwrap_or_default();
        item(&spelling(argument), &paragraphs(&help))
    };
    arguments.iter().map(text).collect()
}

/// How an option or an argument is typed, with the name of its value.
fn spelling(argument: &Arg) -> String {
    let flags = [
        argument.get_short().map(|short| format!("-{short}")),
        argument.get_long().map(|long| format!("--{long}")),
    ];
    let mut spelling = flags.iter().flatten().map(|flag| bold(flag)).collect::<Vec<_>>().join(", ");
    if argument.get_action().takes_values() {
        let names = argument.get_value_names().unwrap_or_default();
        let names =
            names.iter().map(|name| format!("\\fI{}\\fR", escaped(name))).collect::<Vec<_>>().join(" ");
        spelling = if spelling.is_empty() { names } else { format!("{spelling} {names}") };
    }
    spelling
}

fn long_about(command: &Command) -> String {
    command.get_long_about().or(command.get_about()).map(ToString::to_string).unwrap_or_default()
}

fn item(title: &str, body: &str) -> String {
    format!(".TP\n{title}\n{}", body.replace("\n.PP\n", "\n.IP\n"))
}

/// Text as filled paragraphs.
fn paragraphs(text: &str) -> String {
    let lines = |paragraph: &str| paragraph.lines().map(escaped).collect::<Vec<_>>().join("\n");
    let paragraphs: Vec<String> = text.split("\n\n").map(lines).collect();
    format!("{}\n", paragraphs.join("\n.PP\n"))
}

/// Lines that are not filled.
fn verbatim(text: &str) -> String {
    let lines: String = text.lines().map(|line| format!("{}\n", escaped(line))).collect();
    format!(".nf\n{lines}.fi\n")
}

fn bold(text: &str) -> String {
    format!("\\fB{}\\fR", escaped(text))
}

/// Text without roff commands: they are escaped.
fn escaped(text: &str) -> String {
    let text = text.replace('\\', "\\e").replace('-', "\\-");
    if text.starts_with(['.', '\'']) { format!("\\&{text}") } else { text }
}
