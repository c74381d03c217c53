//! The names of what lies in a store's directory.

/// The directory of the packs, in the store's.
pub(crate) const PACKS_DIR: &str = "packs";
/// The directory of the index.
pub(crate) const INDEX_DIR: &str = "index";
/// Where what cannot be used is set aside.
pub(crate) const DAMAGED_DIR: &str = "damaged";
/// Where a migration writes the new store.
pub(crate) const MIGRATION_DIR: &str = "migration";
/// How files are named that are not complete yet.
pub(crate) const UNFINISHED: &str = "unfinished";
