//! How changed regions are stored: the options of `capture` and `watch`.

use clap::Args;
use stillframe::codec::Codec;

#[derive(Debug, Args)]
pub(super) struct StoreAs {
    /// Process that the first deltas refer to
    ///
    /// Only for the first snapshot of a process: changed regions are stored as deltas from the latest snapshot of the
    /// named process, which may have another owner. The bytes of that snapshot stay in the store as long as a delta needs them,
    /// also if all of its snapshots are forgotten; `gc --erase` removes the dependency. Default: the latest process
    /// with the same owner and the same executable, or with a file of the same name.
    #[arg(long, value_name = "NAME")]
    pub(super) like: Option<String>,
    /// Compression: lz4, zstd or none
    ///
    /// Default: the codec of the store (see init).
    #[arg(long, value_name = "CODEC")]
    pub(super) codec: Option<Codec>,
    /// Store changed regions whole, not as deltas
    #[arg(long)]
    pub(super) no_deltas: bool,
}
