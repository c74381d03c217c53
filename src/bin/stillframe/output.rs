//! Standard output, which has the result of a verb and nothing else: JSON, lines and tables.

use std::fmt::Write as _;
use std::io::{self, IsTerminal, Write};
use std::time::Duration;

use serde::Serialize;

use crate::errors::CommandError;
use crate::human::plain_lines;

/// How to print.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Output {
    /// JSON instead of text.
    pub(crate) json: bool,
    /// Only what is necessary.
    pub(crate) quiet: bool,
    terminal: bool,
    colour: bool,
}

/// The kind of a text, which decides its colour.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Style {
    /// The title of a column or a line.
    Title,
    /// A snapshot id.
    Id,
    /// Something is wrong.
    Bad,
}

impl Output {
    pub(crate) fn new(json: bool, quiet: bool) -> Output {
        let terminal = io::stdout().is_terminal();
        Output { json, quiet, terminal, colour: terminal && may_colour() }
    }

    /// Prints one JSON document: on one line, or indented at a terminal.
    pub(crate) fn json<T: Serialize>(&self, value: &T) -> anyhow::Result<()> {
        let text =
            if self.terminal { serde_json::to_string_pretty(value) } else { serde_json::to_string(value) };
        Ok(print(&format!("{}\n", escaped(text?)))?)
    }

    /// Prints one JSON document on one line, also at a terminal.
    pub(crate) fn json_line<T: Serialize>(&self, value: &T) -> anyhow::Result<()> {
        Ok(print(&format!("{}\n", escaped(serde_json::to_string(value)?)))?)
    }

    /// Prints text that ends its own lines.
    pub(crate) fn text(&self, text: &str) -> anyhow::Result<()> {
        Ok(print(text)?)
    }

    /// Prints a hint about the next step, at a terminal only.
    pub(crate) fn hint(&self, text: &str) {
        if !self.quiet && !self.json && self.terminal && io::stderr().is_terminal() {
            let text = if may_colour() { format!("\x1b[2m{text}\x1b[0m") } else { text.to_owned() };
            print_error(&text);
        }
    }

    /// Prints a note on standard error, unless --quiet.
    pub(crate) fn note(&self, text: &str) {
        if !self.quiet {
            print_error(&format!("stillframe: {text}"));
        }
    }

    /// Prints an error that does not end the verb, also with --quiet.
    pub(crate) fn error(&self, text: &str) {
        print_error(text);
    }

    /// Prints a warning, also with --quiet.
    pub(crate) fn warning(&self, text: &str) {
        print_error(&format!("stillframe: {text}"));
    }

    /// The text in the colour of its style, if there are colours.
    pub(crate) fn styled(&self, style: Style, text: &str) -> String {
        let code = match style {
            Style::Title => "2",
            Style::Id => "33",
            Style::Bad => "31",
        };
        if self.colour { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
    }

    /// Lines of a title and a text, with the texts aligned.
    pub(crate) fn lines<T: AsRef<str>>(&self, lines: &[(&str, T)]) -> String {
        let width = lines.iter().map(|(title, _)| title.len()).max().unwrap_or(0);
        let mut text = String::new();
        for (title, value) in lines {
            let title = self.styled(Style::Title, &format!("{title:width$}"));
            // Writing to a string cannot fail.
            let _ = writeln!(text, "{title}  {}", value.as_ref());
        }
        text
    }
}

/// JSON with all control characters escaped. serde_json leaves those unescaped that set the direction of writing; they
/// are in strings only, where the escape means the same.
fn escaped(json: String) -> String {
    if !json.contains(|letter| letter != '\n' && stillframe::text::is_control(letter)) {
        return json;
    }
    let mut text = String::with_capacity(json.len() + 64);
    for letter in json.chars() {
        if letter != '\n' && stillframe::text::is_control(letter) {
            // All of them have four digits. Writing to a string cannot fail.
            let _ = write!(text, "\\u{:04x}", u32::from(letter));
        } else {
            text.push(letter);
        }
    }
    text
}

/// Whether the environment allows colours (<https://no-color.org>).
fn may_colour() -> bool {
    std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
        && std::env::var_os("TERM").is_none_or(|term| term != "dumb")
}

/// Writes all of the text to standard output and flushes it.
pub(crate) fn print(text: &str) -> Result<(), CommandError> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes()).and_then(|()| out.flush()).map_err(output_error)
}

/// Writes a line to standard error, with control characters replaced. A failure cannot be reported and is ignored.
pub(crate) fn print_error(line: &str) {
    let _ = io::stderr().write_all(format!("{}\n", plain_lines(line)).as_bytes());
}

/// The error of a failed write to standard output.
pub(crate) fn output_error(error: io::Error) -> CommandError {
    match error.kind() {
        io::ErrorKind::BrokenPipe => CommandError::ClosedPipe,
        _ => CommandError::Output(error),
    }
}

/// A duration in milliseconds, to the microsecond.
pub(crate) fn milliseconds(duration: Duration) -> f64 {
    duration.as_micros() as f64 / 1e3
}

/// One column of a table.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Column {
    title: &'static str,
    right: bool,
    /// The least width, for tables whose rows are printed one by one.
    width: usize,
    style: Option<Style>,
}

impl Column {
    /// A column of text.
    pub(crate) const fn left(title: &'static str) -> Column {
        Column { title, right: false, width: 0, style: None }
    }

    /// A column of numbers.
    pub(crate) const fn right(title: &'static str) -> Column {
        Column { title, right: true, width: 0, style: None }
    }

    /// A column of snapshot ids.
    pub(crate) const fn id(title: &'static str) -> Column {
        Column { title, right: false, width: 0, style: Some(Style::Id) }
    }

    /// The column with a least width.
    pub(crate) const fn width(self, width: usize) -> Column {
        Column { width, ..self }
    }
}

/// A table with aligned columns and a title line.
pub(crate) fn table(output: &Output, columns: &[Column], rows: &[Vec<String>]) -> String {
    let widest = |at: usize| rows.iter().map(|row| row[at].chars().count()).max().unwrap_or(0);
    let columns: Vec<Column> =
        columns.iter().enumerate().map(|(at, column)| column.width(column.width.max(widest(at)))).collect();
    let mut text = title_row(output, &columns);
    rows.iter().for_each(|row| text.push_str(&table_row(output, &columns, row)));
    text
}

/// The title line of a table.
pub(crate) fn title_row(output: &Output, columns: &[Column]) -> String {
    let titles: Vec<String> = columns.iter().map(|column| column.title.to_owned()).collect();
    let plain: Vec<Column> = columns
        .iter()
        .map(|column| Column {
            width: column.width.max(column.title.chars().count()),
            style: None,
            ..*column
        })
        .collect();
    let line = table_row(output, &plain, &titles);
    format!("{}\n", output.styled(Style::Title, line.trim_end()))
}

/// One line of a table.
pub(crate) fn table_row(output: &Output, columns: &[Column], cells: &[String]) -> String {
    let mut line = String::new();
    for (at, (column, cell)) in columns.iter().zip(cells).enumerate() {
        let width = column.width.max(column.title.chars().count());
        let padding = " ".repeat(width.saturating_sub(cell.chars().count()));
        let cell = column.style.map_or_else(|| cell.clone(), |style| output.styled(style, cell));
        let gap = if at == 0 { "" } else { "  " };
        // Writing to a string cannot fail.
        let _ = if column.right {
            write!(line, "{gap}{padding}{cell}")
        } else {
            write!(line, "{gap}{cell}{padding}")
        };
    }
    format!("{}\n", line.trim_end())
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAIN: Output = Output { json: false, quiet: false, terminal: false, colour: false };

    #[test]
    fn columns_are_as_wide_as_their_widest_cell_and_lines_end_in_no_blanks() {
        let columns = [Column::left("NAME"), Column::right("SIZE"), Column::left("LABELS")];
        let rows =
            [["é", "10 B", ""], ["longer", "1.5 KiB", "a=b"]].map(|row| row.map(str::to_owned).to_vec());
        assert_eq!(
            table(&PLAIN, &columns, &rows),
            "NAME       SIZE  LABELS\né          10 B\nlonger  1.5 KiB  a=b\n"
        );
    }

    #[test]
    fn json_has_no_character_that_could_disturb_a_terminal() {
        let value = "a\u{1b}\u{9b}\u{202e}\u{5d0}\n";
        let text = escaped(serde_json::to_string_pretty(&[value]).unwrap());
        assert_eq!(text, "[\n  \"a\\u001b\\u009b\\u202e\u{5d0}\\n\"\n]");
        assert_eq!(serde_json::from_str::<Vec<String>>(&text).unwrap(), [value]);
    }

    #[test]
    fn colours_do_not_disturb_the_columns() {
        let colourful = Output { colour: true, ..PLAIN };
        let line = table_row(
            &colourful,
            &[Column::id("ID").width(6), Column::left("B")],
            &["abc".into(), "d".into()],
        );
        assert_eq!(line, "\x1b[33mabc\x1b[0m     d\n");
    }
}
