//! A live Linux process as a source.
/// A live Linux process.
pub struct ProcessSource;
