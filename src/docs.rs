//! The documents of the repository, for reading beside the reference.

/// How the store works, and why so.
#[doc = include_str!("../docs/design.md")]
pub mod design {}

/// What every byte of a store means.
#[doc = include_str!("../docs/format.md")]
pub mod format {}

/// What is guaranteed, and the test behind each guarantee.
#[doc = include_str!("../docs/reliability.md")]
pub mod reliability {}

/// Every figure that the documentation quotes, with its command.
#[doc = include_str!("../docs/benchmarks.md")]
pub mod benchmarks {}
