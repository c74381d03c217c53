//! A snapshot and the process that is to be rolled back to it: the input of every check.

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
    /// The process as it was captured.
    pub(super) captured: &'a CapturedProcess,
    /// The process as it is now, with all threads paused.
    pub(super) held: &'a FrozenProcess,
}

impl Attempt<'_> {
    /// A refusal because the process cannot be rolled back at all, or not at this moment.
    pub(super) fn refusal(&self, why: impl Into<String>) -> RollbackError {
        RollbackError::NoRollBack { pid: self.pid, why: why.into() }
    }

    /// A refusal because the process differs from the snapshot in these points.
    pub(super) fn misfit(&self, differences: Vec<String>) -> RollbackError {
        RollbackError::DoesNotFit { pid: self.pid, differences, only_new: false, advice: None }
    }

    /// Like `misfit`, where an option allows these differences to stay; `advice` names that option.
    pub(super) fn misfit_but_for(&self, differences: Vec<String>, advice: &'static str) -> RollbackError {
        RollbackError::DoesNotFit { pid: self.pid, differences, only_new: false, advice: Some(advice) }
    }

    /// An error if the user has asked to stop.
    pub(super) fn check_interrupt(&self) -> Result<(), Error> {
        Ok(self.rollback.progress.check()?)
    }
}
