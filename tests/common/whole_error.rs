//! The text of an error with all its causes.

/// An error and all its causes, joined by colons.
pub(crate) fn whole_error(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(error.source(), |cause| cause.source());
    causes.fold(error.to_string(), |text, cause| format!("{text}: {cause}"))
}
