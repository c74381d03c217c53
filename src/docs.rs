//! The documents of the repository, for reading with the API reference.

/// How the store works, and why.
#[doc = include_str!("../docs/design.md")]
pub mod design {}

/// The meaning of every byte of a store.
#[doc = include_str!("../docs/format.md")]
pub mod format {}

/// The guarantees, and the test of each.
#[doc = include_str!("../docs/reliability.md")]
pub mod reliability {}

/// Every figure in the documentation, with its command.
#[doc = include_str!("../docs/benchmarks.md")]
pub mod benchmarks {}
