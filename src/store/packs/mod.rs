//! The packs: the truth of a store. The index and the catalog are derived from them.
//!
//! ```text
//! packs/N.pack    pack.rs      one file: a header, then objects
//!                 object.rs    one object; location.rs says where one is; watermark.rs up to where something is known
//!                 log.rs       all packs together: appends to the last one and makes it durable
//!                 read.rs      gives objects back, checked
//! COLLECTED       collected.rs packs that gc removed
//! LOST            lost.rs      packs that are gone otherwise, or cut short
//! ```

pub(crate) mod collected;
pub(crate) mod location;
pub(crate) mod log;
pub(crate) mod lost;
pub(crate) mod object;
pub(crate) mod pack;
pub(crate) mod read;
pub(crate) mod watermark;
