//! Damage: place × kind of damage × what must happen.
//!
//! `table.rs` is the whole table, over a store with deltas, tombstones, notes, attachments and several packs;
//! `cargo test --test damage table -- --nocapture` prints it. The other files look closer at one place each. The
//! tests find the objects in the packs by themselves, after `docs/format.md`, and know who needs an
//! object from what the snapshots are.

// A helper of a test may fail as the test itself may.
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
