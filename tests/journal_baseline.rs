//! The journal that the benches compare with works: its tests are in its own file.

#[path = "../benches/common/journal.rs"]
mod journal;
