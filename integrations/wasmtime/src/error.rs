//! The errors of this crate.

use stillframe::{Hash, SnapshotId};

/// A guest that cannot be captured, restored or rolled back.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The engine is not configured for this.
    #[error("the engine {what}; make it by `stillframe_wasmtime::engine`, or call `configure` last")]
    Engine {
        /// What is wrong with it.
        what: &'static str,
    },
    /// The module was compiled without `prepare`.
    #[error(
        "the instance is of a module that was not prepared, so that its globals would be lost; \
         compile what `stillframe_wasmtime::prepare` makes of it"
    )]
    NotPrepared,
    /// The snapshot belongs to another module.
    #[error(
        "the snapshot is of the module {found}, the instance is of {expected}; use an instance of the former"
    )]
    OtherModule {
        /// The BLAKE3 hash of the instance's module before it was prepared.
        expected: Hash,
        /// The hash of the snapshot's module.
        found: Hash,
    },
    /// The snapshot was not taken by this crate.
    #[error("snapshot {id} is not of a WebAssembly instance: it has no attachment `wasmtime`")]
    NotAGuest {
        /// The snapshot.
        id: SnapshotId,
    },
    /// The snapshot's attachment cannot be used.
    #[error("the snapshot's attachment `wasmtime` cannot be used: {why}")]
    State {
        /// Why not.
        why: &'static str,
    },
    /// A table has another size than in the snapshot, and its elements are not captured.
    #[error(
        "expected table {index} to have {expected} elements, as in the snapshot, found {found}; what was added to \
         a table at run time is not captured: make the same additions first, or use another instance"
    )]
    Table {
        /// Its index in the module.
        index: u32,
        /// How many elements it had.
        expected: u64,
        /// How many elements it has.
        found: u64,
    },
    /// The memory of the snapshot is larger, and the engine does not let the instance's memory
    /// grow.
    #[error("the memory cannot grow to the {wanted_bytes} bytes that it has in the snapshot: {why}")]
    CannotGrow {
        /// The length of the memory in the snapshot.
        wanted_bytes: u64,
        /// The engine's reason: its limits, or the store's limiter.
        why: String,
    },
    /// An earlier restore failed.
    #[error(
        "the last restore into this instance failed, so its memory is nothing; restore something else into it"
    )]
    Broken,
    /// An error of the engine.
    #[error("the engine refuses it: {0}")]
    Wasmtime(String),
    /// An error of the snapshot store.
    #[error(transparent)]
    Stillframe(#[from] stillframe::Error),
}

impl From<wasmtime::Error> for Error {
    fn from(error: wasmtime::Error) -> Self {
        Error::Wasmtime(format!("{error:#}"))
    }
}
