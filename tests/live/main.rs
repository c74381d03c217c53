//! Live processes: stopped, read, captured while they work, rolled back, and seen by a debugger.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::cast_possible_truncation)]

mod cores;
mod processes;
mod rollback;
mod sources;

#[allow(dead_code)]
#[path = "../common/needs.rs"]
mod needs;
