//! Processes are killed and power fails, at any moment and in the middle of any history.

// Helpers of a test may panic, as the test itself may.
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
/// The types that `disk` uses. The unit tests of migrations import them from another place.
mod seam {
    pub(crate) use stillframe::fault_injection::{Call, Witness};
}
#[path = "../common/folder.rs"]
mod folder;
