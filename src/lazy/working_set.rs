//! The working set: the parts of a lazily restored snapshot that were accessed, in order.
//!
//! It is stored as the attachment `hot-set` of a later snapshot: one version byte, then bincode
//! (`config::standard()`): the number of ranges, and the start and end of each.

use serde::{Deserialize, Serialize};

use crate::record::{self, RecordError, SnapshotId};
use crate::source::Attachment;
use crate::store::OpenStore;
use crate::store::error::StoreError;
use crate::store::packs::object::ObjectKind;
use crate::store::read::{Check, Reader};
use crate::units::AddressRange;

/// The parts of a lazily restored snapshot that were accessed, in the order of the first accesses:
/// address ranges of the captured mappings, in whole regions. This is the recorded working set of
/// REAP (Ustiugov et al., [*Benchmarking, Analysis, and Optimization of Serverless Function
/// Snapshots*](https://doi.org/10.1145/3445814.3446714), ASPLOS 2021).
///
/// A snapshot cannot get a working set after it is taken. So pass [`LazyMapping::touched`] to the
/// next capture, in [`CaptureOptions::attachments`]. A lazy restore uses the working set of its
/// snapshot or, if that has none, of the newest snapshot of the same process that has one.
///
/// [`LazyMapping::touched`]: crate::lazy::LazyMapping::touched
/// [`CaptureOptions::attachments`]: crate::CaptureOptions::attachments
///
/// ```
/// use stillframe::lazy::WorkingSet;
/// let set = WorkingSet::new(vec!["4096..8192".parse()?, "0..4096".parse()?]);
/// let kept = set.to_attachment()?;
/// assert_eq!(WorkingSet::from_attachment(&kept.bytes)?, set);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkingSet {
    ranges: Vec<AddressRange>,
}

impl WorkingSet {
    /// The name of the attachment.
    pub const ATTACHMENT: &'static str = "hot-set";

    /// A working set of given ranges.
    ///
    /// ```
    /// use stillframe::AddressRange;
    /// use stillframe::lazy::WorkingSet;
    /// let set = WorkingSet::new(vec![AddressRange::new(0, 16_384)?]);
    /// let attachment = set.to_attachment()?;
    /// assert_eq!(WorkingSet::from_attachment(&attachment.bytes)?, set);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn new(ranges: Vec<AddressRange>) -> WorkingSet {
        WorkingSet { ranges }
    }

    /// The ranges. Parts of them that are not captured memory are ignored.
    pub fn ranges(&self) -> &[AddressRange] {
        &self.ranges
    }

    /// Decodes the attachment of that name.
    ///
    /// # Errors
    ///
    /// If these are not the bytes of a working set, or a newer program wrote them.
    pub fn from_attachment(bytes: &[u8]) -> Result<WorkingSet, RecordError> {
        record::decode(bytes)
    }

    /// Encodes it as an attachment for the next snapshot. About 8 bytes for each range.
    ///
    /// # Errors
    ///
    /// If it cannot be encoded.
    pub fn to_attachment(&self) -> Result<Attachment, RecordError> {
        Ok(Attachment { name: Self::ATTACHMENT.to_owned(), bytes: record::encode(self)? })
    }

    /// Adds a range; joins it to the last one if it follows directly.
    pub(super) fn push(&mut self, range: AddressRange) {
        match self.ranges.last_mut() {
            Some(last) if last.end() == range.start() => {
                *last = AddressRange::new(last.start(), range.end()).unwrap_or(range);
            }
            _ => self.ranges.push(range),
        }
    }

    /// The working set of a snapshot or, if that has none, of the newest snapshot of its process
    /// that has one.
    pub(super) fn of(
        shared: &OpenStore,
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
        // The snapshot may have been forgotten by now.
        let Ok(pinned) = shared.pin(id) else { return Ok(None) };
        let found = Reader::new(shared, Check::Full).attachment(pinned.record(), WorkingSet::ATTACHMENT)?;
        let Some(bytes) = found else { return Ok(None) };
        let working_set = WorkingSet::from_attachment(&bytes)
            .map_err(|source| StoreError::Record { kind: ObjectKind::Attachment, source })?;
        Ok(Some(working_set))
    }
}
