//! Disks that return errors, are full, or lose the bytes of a pack that is open.
//!
//! `errors` counts the panics of all threads, so tests that panic on purpose do not belong here.

// Helpers of a test may panic, as the test itself may.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::cast_possible_truncation)]

mod erase;
mod errors;
mod full;
mod lesser;
mod places;
mod unreadable_packs;

#[path = "../common/ended.rs"]
mod ended;
#[path = "../common/folder.rs"]
mod folder;
#[path = "../common/mount.rs"]
mod mount;
#[allow(dead_code)]
#[path = "../common/needs.rs"]
mod needs;
#[path = "../common/noise.rs"]
mod noise;
#[path = "../common/whole_error.rs"]
mod whole_error;
