//! Processes that are killed and power that fails, at any moment and in the middle of any history.

// A helper of a test may fail as the test itself may.
#![allow(
    clippy::result_large_err,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::cast_possible_truncation
)]

mod history;
mod killed;
mod power_loss;

#[allow(dead_code)]
#[path = "../common/disk.rs"]
mod disk;
/// What `disk` stands on, which the unit tests of migrations take from elsewhere.
mod seam {
    pub(crate) use stillframe::fault_injection::{Call, Witness};
}
#[path = "../common/folder.rs"]
mod folder;
