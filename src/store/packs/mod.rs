//! The packs: the truth of a store. The index and the catalog are derived from them.
//!
//! ```text
//! packs/N.pack    pack.rs      one file (names.rs): a header (header.rs), then objects; sealed at a size (sealing.rs)
//!                 object.rs    one object; location.rs says where one is; watermark.rs up to where something is known
//!                 log.rs       all packs together: appends batches (batch.rs) to the last one and makes it durable
//!                 read.rs      gives objects back, checked; scan.rs walks a whole pack (ready.rs: errors of the disk)
//! COLLECTED       collected.rs packs that gc removed
//! LOST            lost.rs      packs that are gone otherwise, or cut short
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
pub(crate) mod read;
pub(crate) mod ready;
pub(crate) mod scan;
pub(crate) mod sealing;
pub(crate) mod watermark;
