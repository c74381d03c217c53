//! Migrations: numbered steps from one on-disk format to the next.
#[path = "0001_create.rs"]
pub(crate) mod create;
