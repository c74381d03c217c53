//! A content-addressed snapshot store for process memory.
#![deny(missing_docs)]

mod address_space;
mod capture;
mod codec;
mod error;
mod forget;
mod gc;
mod hash;
mod ingest;
mod migrate;
#[path = "../migrations/mod.rs"]
mod migrations;
mod piece;
mod progress;
mod record;
mod region;
mod repair;
mod restore;
mod sink;
mod snapshot;
mod source;
mod stats;
mod store;
mod sys;
mod table;
mod units;
mod verify;

pub use address_space::{AddressSpace, AddressSpaceError, Mapping, MappingKind, Protection};
pub use capture::{Capture, CaptureOptions, Process};
pub use codec::{Codec, CodecError};
pub use error::Error;
pub use forget::{ForgetPlan, KeepPolicy};
pub use gc::{GcOptions, GcStats};
pub use hash::Hash;
pub use migrate::Migration;
pub use progress::Progress;
pub use record::{AttachmentRef, Origin, Record, RecordError, SnapshotId, Trigger};
pub use repair::{RepairOptions, RepairReport};
pub use restore::{Restore, RestoreStats};
pub use sink::SinkError;
pub use snapshot::{ProcessSummary, Snapshot};
pub use source::{
    Attachment, CopyOut, FileSource, Frozen, InPlace, Memory, ProcessSource, RegisterSet, Source,
    SourceError, Thread, Threads,
};
pub use stats::Stats;
pub use store::catalog::Labels;
pub use store::error::StoreError;
pub use store::format::StoreId;
pub use store::object::Kind;
pub use store::read::Check;
pub use store::{Store, StoreInfo, StoreOptions};
pub use table::REGIONS_PER_TABLE;
pub use units::{AddressRange, RegionSize, UnitError};
pub use verify::{Problem, VerifyOptions, VerifyReport};
