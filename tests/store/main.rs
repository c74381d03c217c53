//! A store and its content: round trips, deltas, gc, formats, and the rules for its source.

// Helpers of a test may panic, as the test itself may.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::cast_possible_truncation)]

mod deltas;
mod forked;
mod fuzz_corpus;
mod gc;
mod gc_model;
mod independent_reader;
mod layers;
mod old_formats;
mod round_trip;
mod words;

#[path = "../common/folder.rs"]
mod folder;
/// The journal that the benches compare with. Its tests are in its file.
#[path = "../../benches/common/journal.rs"]
mod journal;
#[allow(dead_code)]
#[path = "../common/needs.rs"]
mod needs;
#[path = "../common/noise.rs"]
mod noise;
