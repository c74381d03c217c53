//! A snapshot and the process that is to be rolled back to it, beside each other: what every check looks at.

use super::Rollback;
use super::captured::CapturedProcess;
use crate::error::Error;
use crate::error::RollbackError;
use crate::source::FrozenProcess;

/// A rollback that has not written anything yet.
#[derive(Clone, Copy)]
pub(super) struct Attempt<'a> {
    pub(super) pid: u32,
    pub(super) rollback: &'a Rollback<'a>,
    /// The process then.
    pub(super) captured: &'a CapturedProcess,
    /// The process now, all of whose threads are held.
    pub(super) held: &'a FrozenProcess,
}

impl Attempt<'_> {
    /// The refusal of a process that can never be rolled back, or not now.
    pub(super) fn refusal(&self, why: impl Into<String>) -> RollbackError {
        RollbackError::NoRollBack { pid: self.pid, why: why.into() }
    }

    /// The refusal of a process that differs from the snapshot in these points.
    pub(super) fn misfit(&self, differences: Vec<String>) -> RollbackError {
        RollbackError::DoesNotFit { pid: self.pid, differences, only_new: false, advice: None }
    }

    /// The same where an option leaves these points as they are, which the advice names.
    pub(super) fn misfit_but_for(&self, differences: Vec<String>, advice: &'static str) -> RollbackError {
        RollbackError::DoesNotFit { pid: self.pid, differences, only_new: false, advice: Some(advice) }
    }

    /// An error if the user has asked to stop.
    pub(super) fn check_interrupt(&self) -> Result<(), Error> {
        Ok(self.rollback.progress.check()?)
    }
}
