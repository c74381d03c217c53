//! Damage: place × kind of damage × expected result.
//!
//! `table.rs` has the whole table, over a store with deltas, tombstones, notes, attachments and
//! several packs; `cargo test --test damage table -- --nocapture` prints it. Each of the other
//! files tests one place in more detail. The tests have their own parser of packs, written after
//! `docs/format.md`, and derive which snapshots need an object from the snapshots' contents.

// Helpers of a test may panic, as the test itself may.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::cast_possible_truncation)]

mod archive;
mod facts;
mod format;
mod index;
mod interrupted;
mod lost;
mod objects;
mod packs;
mod sample;
mod table;
mod tails;
mod vault;

#[path = "../common/folder.rs"]
mod folder;
#[path = "../common/noise.rs"]
mod noise;
#[path = "../common/whole_error.rs"]
mod whole_error;
