//! A content-addressed snapshot store for process memory.
#![deny(missing_docs)]

mod address_space;
mod codec;
mod hash;
mod record;
mod region;
mod source;
mod sys;
mod table;
mod units;

pub use address_space::{AddressSpace, AddressSpaceError, Mapping, MappingKind, Protection};
pub use codec::{Codec, CodecError};
pub use hash::Hash;
pub use record::{AttachmentRef, Origin, Record, RecordError, SnapshotId, Trigger};
pub use source::{
    Attachment, CopyOut, FileSource, Frozen, InPlace, Memory, ProcessSource, RegisterSet, Source,
    SourceError, Thread, Threads,
};
pub use table::REGIONS_PER_TABLE;
pub use units::{AddressRange, RegionSize, UnitError};
