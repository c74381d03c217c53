//! The errors of a rollback, except those of the store, the source and the sink.

/// Why memory cannot be rolled back.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RollbackError {
    /// The address range given is not that of the [`LiveMemory`](crate::LiveMemory).
    #[error(
        "expected the {expected_bytes} bytes at {expected_address:#x}, which the live memory is made for, \
         found {found_bytes} at {found_address:#x}"
    )]
    OtherMemory {
        /// The start of the live memory.
        expected_address: u64,
        /// Its length.
        expected_bytes: u64,
        /// The start of the range given.
        found_address: u64,
        /// Their length.
        found_bytes: u64,
    },
    /// This process cannot be rolled back, or not to this snapshot. It is unchanged.
    #[error("process {pid} cannot be rolled back: {why}")]
    NoRollBack {
        /// Its pid.
        pid: u32,
        /// The reason.
        why: String,
    },
    /// The process differs from the snapshot in what a rollback cannot change. It is unchanged.
    #[error("process {pid} does not fit the snapshot and was not \
         changed: {}{}", shown(differences), advised(*only_new, *advice))]
    DoesNotFit {
        /// Its pid.
        pid: u32,
        /// What differs.
        differences: Vec<String>,
        /// Whether all differences are memory that the process has mapped since.
        only_new: bool,
        /// How it can still be rolled back, if it can.
        advice: Option<&'static str>,
    },
    /// Writing failed after it was begun. The process stays stopped, because its memory is
    /// inconsistent.
    #[error(
        "process {pid} is rolled back in part and is stopped (state T); roll it back again, then continue it \
         with `kill -CONT {pid}`"
    )]
    InPart {
        /// Its pid.
        pid: u32,
        /// What failed: an [`Error`](crate::Error).
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

/// How many differences an error shows.
const SHOWN: usize = 6;

fn shown(differences: &[String]) -> String {
    let more = differences.len().saturating_sub(SHOWN);
    let shown = differences[..differences.len() - more].join("; ");
    if more == 0 { shown } else { format!("{shown}; and {more} more") }
}

/// Follows the differences, however many there are.
fn advised(only_new: bool, advice: Option<&'static str>) -> String {
    let for_new = "it can be rolled back around what is new, which then stays (--leave-new-memory)";
    advice.or(only_new.then_some(for_new)).map(|advice| format!("; {advice}")).unwrap_or_default()
}
