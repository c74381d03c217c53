//! The working set: what was touched of a lazily restored snapshot, and in which order.
//!
//! Kept as the attachment `hot-set` of a later snapshot: one version byte and then bincode
//! (`config::standard()`): how many ranges, and of each where it starts and where it ends.

use serde::{Deserialize, Serialize};

use crate::record::{self, RecordError, SnapshotId};
use crate::source::Attachment;
use crate::store::Shared;
use crate::store::error::StoreError;
use crate::store::packs::object::ObjectKind;
use crate::store::read::{Check, Reader};
use crate::units::AddressRange;

/// What was touched of a lazily restored snapshot, in the order of the first touches: address ranges of
/// the captured mappings, by regions.
///
/// A snapshot cannot be given one when it is taken already. So [`LazyMapping::touched`] is handed to the next
/// capture, among [`CaptureOptions::attachments`]; a lazy restore looks for it in the snapshot, and then in
/// the newest one of the same process that has one.
///
/// [`LazyMapping::touched`]: crate::lazy::LazyMapping::touched
/// [`CaptureOptions::attachments`]: crate::CaptureOptions::attachments
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkingSet {
    ranges: Vec<AddressRange>,
}

impl WorkingSet {
    /// The name of the attachment.
    pub const ATTACHMENT: &'static str = "hot-set";

    /// A working set of one's own making.
    pub fn new(ranges: Vec<AddressRange>) -> WorkingSet {
        WorkingSet { ranges }
    }

    /// What it consists of. Where nothing is captured there is nothing to fill.
    pub fn ranges(&self) -> &[AddressRange] {
        &self.ranges
    }

    /// Reads the attachment of that name.
    ///
    /// # Errors
    ///
    /// When these are not its bytes, or those of a newer program.
    pub fn from_attachment(bytes: &[u8]) -> Result<WorkingSet, RecordError> {
        record::decode(bytes)
    }

    /// As an attachment of the next snapshot. Some 8 bytes for each range.
    ///
    /// # Errors
    ///
    /// When it cannot be encoded.
    pub fn to_attachment(&self) -> Result<Attachment, RecordError> {
        Ok(Attachment { name: Self::ATTACHMENT.to_owned(), bytes: record::encode(self)? })
    }

    /// Adds a range, to the last one if it follows that.
    pub(super) fn push(&mut self, range: AddressRange) {
        match self.ranges.last_mut() {
            Some(last) if last.end() == range.start() => {
                *last = AddressRange::new(last.start(), range.end()).unwrap_or(range);
            }
            _ => self.ranges.push(range),
        }
    }

    /// That of a snapshot, else that of the newest one of its process that has one.
    pub(super) fn of(
        shared: &Shared,
        id: SnapshotId,
        process: &str,
    ) -> Result<Option<WorkingSet>, StoreError> {
        let newest = {
            let catalog = shared.catalog();
            let has_one = |id: &SnapshotId| {
                let record = catalog.live(id).map(|entry| entry.record());
                record.is_some_and(|record| {
                    record.attachments.iter().any(|attachment| attachment.name == WorkingSet::ATTACHMENT)
                })
            };
            std::iter::once(id).chain(catalog.of_process(process).rev()).find(has_one)
        };
        let Some(id) = newest else { return Ok(None) };
        // It may be forgotten by now.
        let Ok(pinned) = shared.pin(id) else { return Ok(None) };
        let found = Reader::new(shared, Check::Full).attachment(pinned.record(), WorkingSet::ATTACHMENT)?;
        let Some(bytes) = found else { return Ok(None) };
        let working_set = WorkingSet::from_attachment(&bytes)
            .map_err(|source| StoreError::Record { kind: ObjectKind::Attachment, source })?;
        Ok(Some(working_set))
    }
}
