//! The names of the files and directories in a store's directory.

/// The directory of the packs.
pub(crate) const PACKS_DIR: &str = "packs";
/// The directory of the index.
pub(crate) const INDEX_DIR: &str = "index";
/// The directory for files that cannot be used and were set aside.
pub(crate) const DAMAGED_DIR: &str = "damaged";
/// The directory in which a migration writes the new store.
pub(crate) const MIGRATION_DIR: &str = "migration";
/// The names of incomplete files contain this.
pub(crate) const UNFINISHED: &str = "unfinished";
