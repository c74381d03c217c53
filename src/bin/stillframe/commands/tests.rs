//! The requirements on the help of every verb.

use clap::{Command, CommandFactory};

use crate::Arguments;

/// The command and all verbs, ready for a terminal of 80 columns.
fn commands() -> Vec<Command> {
    let mut command = Arguments::command().term_width(80);
    command.build();
    let verbs: Vec<Command> =
        command.get_subcommands().filter(|verb| verb.get_name() != "help").cloned().collect();
    assert!(verbs.len() >= 20);
    [vec![command], verbs].concat()
}

#[test]
fn the_definition_of_the_arguments_is_consistent() {
    Arguments::command().debug_assert();
}

#[test]
fn the_short_help_has_one_line_an_option() {
    for mut command in commands() {
        let help = command.render_help().to_string();
        let usage_end =
            help.find("\n\n").map(|at| at + help[at + 2..].find("\n\n").unwrap_or(0)).unwrap_or(0);
        for line in help[usage_end..].lines().filter(|line| line.starts_with("  ")) {
            let indent = line.len() - line.trim_start().len();
            assert!(indent <= 6, "a folded line of {}: {line:?}\n{help}", command.get_name());
            assert!(line.chars().count() <= 80, "{line:?}");
        }
    }
}

#[test]
fn the_long_help_fits_80_columns_and_ends_with_examples() {
    for mut command in commands() {
        let help = command.render_long_help().to_string();
        for line in help.lines() {
            assert!(line.chars().count() <= 80, "{}: {line:?}", command.get_name());
        }
        let examples = if command.get_name() == "stillframe" { "First steps:\n" } else { "Examples:\n" };
        assert!(help.contains(examples), "{help}");
    }
}

#[test]
fn each_verb_begins_with_a_short_imperative_sentence() {
    for command in commands() {
        let about = command.get_about().unwrap_or_else(|| panic!("{}", command.get_name())).to_string();
        assert!(about.len() <= 80 && !about.contains(['\n', ';', '.']), "{about}");
        assert!(about.starts_with(char::is_uppercase), "{about}");
    }
}

#[test]
fn every_option_that_takes_a_value_names_it() {
    for command in commands() {
        for argument in command.get_arguments().filter(|argument| argument.get_action().takes_values()) {
            let names = argument.get_value_names().unwrap_or_default();
            let is_named = names.iter().all(|name| name.chars().all(|letter| !letter.is_lowercase()));
            assert!(!names.is_empty() && is_named, "{} {}", command.get_name(), argument.get_id());
            assert!(argument.get_help().is_some(), "{} {}", command.get_name(), argument.get_id());
        }
    }
}

#[test]
fn the_help_is_plain_technical_english() {
    const ODD: [&str; 13] = [
        "stood still",
        "stands still",
        "stand still",
        "anew",
        "for ever",
        "whoever",
        "by itself",
        "whatever",
        "touch ",
        "roll back although",
        "is told",
        "somebody",
        "as far as",
    ];
    for mut command in commands() {
        let help = command.render_long_help().to_string().to_lowercase();
        let help = help.split_whitespace().collect::<Vec<_>>().join(" ");
        for odd in ODD {
            assert!(!help.contains(odd), "{}: {odd:?} in {help}", command.get_name());
        }
    }
}
