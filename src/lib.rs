//! A content-addressed snapshot store for process memory.
#![deny(missing_docs)]

mod address_space;
mod capture;
mod codec;
mod error;
mod hash;
mod ingest;
#[path = "../migrations/mod.rs"]
mod migrations;
mod piece;
mod progress;
mod record;
mod region;
mod restore;
mod sink;
mod source;
mod store;
mod sys;
mod table;
mod units;

pub use address_space::{AddressSpace, AddressSpaceError, Mapping, MappingKind, Protection};
pub use capture::{Capture, CaptureOptions, Process};
pub use codec::{Codec, CodecError};
pub use error::Error;
pub use hash::Hash;
pub use progress::Progress;
pub use record::{AttachmentRef, Origin, Record, RecordError, SnapshotId, Trigger};
pub use restore::{Restore, RestoreStats};
pub use sink::SinkError;
pub use source::{
    Attachment, CopyOut, FileSource, Frozen, InPlace, Memory, ProcessSource, Source, SourceError,
};
pub use store::catalog::Labels;
pub use store::error::StoreError;
pub use store::format::StoreId;
pub use store::object::Kind;
pub use store::read::Check;
pub use store::{Store, StoreInfo, StoreOptions};
pub use table::REGIONS_PER_TABLE;
pub use units::{AddressRange, RegionSize, UnitError};
