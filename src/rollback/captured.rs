//! What a snapshot says about its process beside its memory.

use super::Rollback;
use crate::descriptors::Descriptors;
use crate::error::{Error, RollbackError};
use crate::left_out::LeftOut;
use crate::mapped_files::MappedFiles;
use crate::record::Origin;
use crate::run::Run;
use crate::signals::Signals;
use crate::source::RSEQ_ATTACHMENT;
use crate::store::read::{Check, Reader};
use crate::threads::{AUXV, MACHINE, Threads};

/// What a snapshot says about its process.
pub(super) struct CapturedProcess {
    pub(super) threads: Threads,
    pub(super) auxv: Vec<u8>,
    /// Of which threads the kernel knew the areas for restartable sequences; older snapshots do not say.
    pub(super) rseq: Option<Vec<u8>>,
    /// Which run of which process it was; older snapshots do not say.
    pub(super) run: Option<Run>,
    /// What it does not have, and why; older snapshots do not say.
    pub(super) left_out: Option<Vec<LeftOut>>,
    /// What was on its way to it; older snapshots do not say.
    pub(super) signals: Option<Signals>,
    /// Its open files; older snapshots do not say, nor those of somebody who might not know.
    pub(super) descriptors: Option<Descriptors>,
    /// The files of its shared mappings; older snapshots do not say, nor those of a process without any.
    pub(super) mapped_files: Option<MappedFiles>,
}

impl CapturedProcess {
    /// Reads it; an error if process `pid` cannot be rolled back to such a snapshot.
    pub(super) fn read(rollback: &Rollback<'_>, pid: u32) -> Result<CapturedProcess, Error> {
        let none = |why: &str| RollbackError::NoRollBack { pid, why: why.to_owned() };
        let mut reader = Reader::new(rollback.shared, Check::Full);
        let mut read = |name: &str| reader.attachment(&rollback.record, name);
        let is_process = matches!(rollback.record.origin, Origin::LiveProcess { .. });
        let threads = read(Threads::ATTACHMENT)?.filter(|_| is_process);
        let threads = threads.ok_or_else(|| {
            none("the snapshot is not one of a live process; it has no registers to go back to")
        })?;
        let threads = Threads::from_attachment(&threads)
            .map_err(|error| none(&format!("the registers in the snapshot cannot be read: {error}")))?;
        if threads.machine != MACHINE {
            return Err(none("the snapshot was taken on a machine of another kind").into());
        }
        let auxv = read(AUXV)?.unwrap_or_default();
        let left_out = read(LeftOut::ATTACHMENT)?.map(|bytes| LeftOut::from_attachment(&bytes)).transpose();
        let left_out =
            left_out.map_err(|error| none(&format!("what is left out of it cannot be read: {error}")))?;
        let run = read(Run::ATTACHMENT)?.map(|bytes| Run::from_attachment(&bytes)).transpose();
        let run =
            run.map_err(|error| none(&format!("its start times in the snapshot cannot be read: {error}")))?;
        let signals = read(Signals::ATTACHMENT)?.map(|bytes| Signals::from_attachment(&bytes)).transpose();
        let signals =
            signals.map_err(|error| none(&format!("its signals in the snapshot cannot be read: {error}")))?;
        let descriptors = read(Descriptors::ATTACHMENT)?.map(|bytes| Descriptors::from_attachment(&bytes));
        let descriptors = descriptors
            .transpose()
            .map_err(|error| none(&format!("its open files in the snapshot cannot be read: {error}")))?;
        let mapped_files = read(MappedFiles::ATTACHMENT)?.map(|bytes| MappedFiles::from_attachment(&bytes));
        let mapped_files = mapped_files
            .transpose()
            .map_err(|error| none(&format!("its mapped files in the snapshot cannot be read: {error}")))?;
        Ok(CapturedProcess {
            threads,
            auxv,
            rseq: read(RSEQ_ATTACHMENT)?,
            run,
            left_out,
            signals,
            descriptors,
            mapped_files,
        })
    }
}
