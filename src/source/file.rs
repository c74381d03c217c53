//! A raw memory file as a source.
/// A raw memory file.
pub struct FileSource;
