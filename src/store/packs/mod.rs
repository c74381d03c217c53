//! The packs: the data of a store. The index and the catalog are derived from them.
//!
//! ```text
//! packs/N.pack  pack.rs       one file: a header (header.rs), then objects
//!               names.rs      the name of the file; sealing.rs: the size at which it is sealed
//!               object.rs     one object; location.rs: its place
//!               watermark.rs  the byte up to which a pack is indexed, or durable
//!               log.rs        all packs: appends batches (batch.rs) to the last one and syncs it
//!               scan.rs       walks a whole pack; ready.rs: reads pages before they are accessed
//! COLLECTED     collected.rs  packs that gc removed
//! LOST          lost.rs       packs that are missing for other reasons, or cut short
//! ```

pub(crate) mod batch;
pub(crate) mod collected;
pub(crate) mod header;
pub(crate) mod location;
pub(crate) mod log;
pub(crate) mod lost;
pub(crate) mod names;
pub(crate) mod object;
pub(crate) mod pack;
pub(crate) mod ready;
pub(crate) mod scan;
pub(crate) mod sealing;
pub(crate) mod watermark;
