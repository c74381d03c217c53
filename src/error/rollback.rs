//! What can go wrong in a rollback, besides the store, the source and the place that is written to.

/// Why memory cannot be rolled back.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RollbackError {
    /// The bytes to roll back are not those of the [`LiveMemory`](crate::LiveMemory) they are said to be.
    #[error(
        "expected the {expected_bytes} bytes at {expected_address:#x}, which the live memory is made for, \
         found {found_bytes} at {found_address:#x}"
    )]
    OtherMemory {
        /// Where the live memory begins.
        expected_address: u64,
        /// Its length.
        expected_bytes: u64,
        /// Where the bytes given begin.
        found_address: u64,
        /// Their length.
        found_bytes: u64,
    },
    /// Nothing can be rolled back in this process, or not to this snapshot. It is as it was.
    #[error("process {pid} cannot be rolled back: {why}")]
    NoRollBack {
        /// Its pid.
        pid: u32,
        /// Why not.
        why: String,
    },
    /// The process is not what it was in the snapshot, and was left as it is.
    #[error("process {pid} does not fit the snapshot and was not \
         changed: {}{}", shown(differences), advised(*only_new, *advice))]
    DoesNotFit {
        /// Its pid.
        pid: u32,
        /// What differs.
        differences: Vec<String>,
        /// Whether all of this is memory that it got since.
        only_new: bool,
        /// How it can be rolled back all the same, where it can.
        advice: Option<&'static str>,
    },
    /// Writing was begun and failed. The process stands still, as it must not go on like this.
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

/// Stands behind the differences, however many there are.
fn advised(only_new: bool, advice: Option<&'static str>) -> String {
    let for_new = "it can be rolled back around what is new, which then stays (--leave-new-memory)";
    advice.or(only_new.then_some(for_new)).map(|advice| format!("; {advice}")).unwrap_or_default()
}
