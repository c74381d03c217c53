//! Text of others (a process name, a path, a command line, a label) on its way to a person.

use std::borrow::Cow;

/// Whether a letter changes what is shown around it: a control character can move a terminal's cursor, and one that sets the
/// direction of writing can make a name look like another one ([Unicode UAX #9](https://www.unicode.org/reports/tr9/)).
pub fn is_control(letter: char) -> bool {
    letter.is_control() || is_direction(letter)
}

/// The characters that set the direction of writing: they have no picture of their own.
pub(crate) fn is_direction(letter: char) -> bool {
    matches!(letter,
        '\u{061C}' | '\u{200E}' | '\u{200F}' | '\u{202A}'..='\u{202E}' | '\u{2066}'..='\u{2069}')
}

/// The text with a replacement character in the place of each [control character](is_control).
///
/// ```
/// assert_eq!(stillframe::text::printable("a\x1b[2J\u{202e}b"), "a\u{fffd}[2J\u{fffd}b");
/// ```
pub fn printable(text: &str) -> Cow<'_, str> {
    match text.contains(is_control) {
        true => text.replace(is_control, "\u{fffd}").into(),
        false => text.into(),
    }
}

/// The first 40 characters of a text, for a message about it.
pub(crate) fn shorten(text: &str) -> String {
    match text.char_indices().nth(40) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_that_set_the_direction_of_writing_are_known_and_no_letters() {
        // Bidi_Control of Unicode's PropList.txt.
        let known =
            "\u{61c}\u{200e}\u{200f}\u{202a}\u{202b}\u{202c}\u{202d}\u{202e}\u{2066}\u{2067}\u{2068}\u{2069}";
        assert!(known.chars().all(is_direction));
        let letters = "aé\u{5d0}\u{627}\u{200c}\u{200d}\u{2065}\u{206a}\u{202f}";
        assert!(!letters.chars().any(is_control));
        assert_eq!(printable(known), "\u{fffd}".repeat(12));
        assert!(matches!(printable(letters), Cow::Borrowed(_)));
    }
}
