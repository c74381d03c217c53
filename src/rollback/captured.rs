//! What a snapshot records about its process besides the memory.

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

/// What a snapshot records about its process.
pub(super) struct CapturedProcess {
    pub(super) threads: Threads,
    pub(super) auxv: Vec<u8>,
    /// The threads whose areas for restartable sequences the kernel knew. Older snapshots do not
    /// record this.
    pub(super) rseq: Option<Vec<u8>>,
    /// The run of the process. Older snapshots do not record it.
    pub(super) run: Option<Run>,
    /// The memory that the snapshot does not have, and why. Older snapshots do not record this.
    pub(super) left_out: Option<Vec<LeftOut>>,
    /// The pending signals. Older snapshots do not record them.
    pub(super) signals: Option<Signals>,
    /// The open files. Missing in older snapshots, and where the capturing user was not allowed to
    /// see them.
    pub(super) descriptors: Option<Descriptors>,
    /// The files of its shared mappings. Missing in older snapshots, and where the process had no
    /// such mapping.
    pub(super) mapped_files: Option<MappedFiles>,
}

impl CapturedProcess {
    /// Reads the records. An error if process `pid` cannot be rolled back to this snapshot.
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
