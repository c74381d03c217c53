//! The second step of a capture: regions are made of the copied bytes and stored, and the record is
//! written.

use std::sync::Arc;
use std::time::{Duration, Instant};

use jiff::Timestamp;

use super::CaptureStats;
use super::changes::Changes;
use super::put::{Put, StoreAs};
use super::reference::Reference;
use super::stage::Staged;
use super::work::{Done, Work};
use crate::address_space::AddressSpace;
use crate::error::Error;
use crate::hash::Hash;
use crate::left_out::{LeftOut, WhyLeftOut};
use crate::ranges::Ranges;
use crate::record::{AttachmentRef, MOMENT_PREFIX, Origin, Record, SnapshotId, Trigger};
use crate::source::Attachment;
use crate::store::OpenStore;
use crate::store::catalog::Labels;
use crate::store::commit::{check_length, encode};
use crate::store::error::StoreError;
use crate::store::lane::LaneGuard;
use crate::store::packs::object::ObjectKind;
use crate::store::read::{Check, Reader};
use crate::text::shorten;

/// A capture after its first step. It does not need the source any more.
pub(crate) struct Begun {
    pub(super) shared: Arc<OpenStore>,
    pub(super) lane: LaneGuard,
    pub(super) started: Instant,
    pub(super) process: String,
    pub(super) trigger: Trigger,
    pub(super) labels: Labels,
    pub(super) failures_before: u64,
    pub(super) time: Timestamp,
    /// The position of the snapshot in the order of all snapshots.
    pub(super) moment: Timestamp,
    pub(super) clock_behind: Option<Duration>,
    pub(super) space: AddressSpace,
    pub(super) origin: Origin,
    pub(super) attachments: Vec<Attachment>,
    pub(super) left_out: Vec<LeftOut>,
    pub(super) paused: Duration,
    pub(super) work: Work,
    pub(super) staged: Option<Staged>,
    pub(super) changes: Changes,
    pub(super) store_as: StoreAs,
    pub(super) parent: Option<SnapshotId>,
    pub(super) reference: Option<Reference>,
}

impl Begun {
    /// Runs the second step.
    pub(crate) fn finish(self) -> Result<CaptureStats, Error> {
        let Begun { shared, mut space, parent, reference, mut attachments, mut left_out, .. } = self;
        let reference = reference.as_ref();
        let staging_full = self.staged.as_ref().is_some_and(|staged| staged.was_full);
        if let Some(staged) = self.staged {
            staged.work(&self.work)?;
        }
        let Done { root, mut counts, unreadable, guard } = self.work.finish()?;
        left_out.extend(refused(&space, &unreadable.into_iter().collect()));
        left_out.sort_unstable_by_key(|left_out| left_out.range);
        space.set_unreadable(left_out.iter().map(|left_out| left_out.range));
        if matches!(self.origin, Origin::LiveProcess { .. }) {
            let bytes = encode(ObjectKind::Attachment, &left_out)?;
            attachments.push(Attachment { name: LeftOut::ATTACHMENT.to_owned(), bytes });
        }
        let put = Put { shared: &shared, guard: &guard, store_as: self.store_as };
        let mut reader = Reader::new(&shared, Check::Full);
        let (root, root_bytes) = put.root(&mut reader, &root, reference)?;
        counts.added_bytes += root_bytes;
        let mut put = |kind, bytes: &[u8], like| -> Result<Hash, Error> {
            let hash = Hash::of(bytes);
            counts.added_bytes += put.object(&mut reader, kind, hash, bytes, like)?;
            Ok(hash)
        };
        let like = reference.and_then(Reference::layout);
        let layout = put(ObjectKind::Layout, &encode(ObjectKind::Layout, &space)?, like)?;
        check_attachment_names(&attachments)?;
        let mut attachments = attachments
            .into_iter()
            .map(|Attachment { name, bytes }| {
                check_length(ObjectKind::Attachment, bytes.len())?;
                let like = reference.and_then(|reference| reference.attachment(&name));
                let hash =
                    if bytes.is_empty() { Hash::ZERO } else { put(ObjectKind::Attachment, &bytes, like)? };
                Ok(AttachmentRef { name, hash, length_bytes: bytes.len() as u64 })
            })
            .collect::<Result<Vec<_>, Error>>()?;
        if self.moment != self.time {
            attachments.push(AttachmentRef::of_moment(self.moment));
        }
        let record = Record {
            process: self.process.clone(),
            parent,
            time: self.time,
            trigger: self.trigger,
            origin: self.origin.cut(),
            region_size: shared.format.region_size,
            memory_bytes: space.image_bytes(),
            zero_bytes: counts.zero_bytes,
            regions: space.regions(shared.format.region_size),
            attachments,
            layout,
            root,
        };
        let memory_bytes = record.memory_bytes;
        let (id, bytes) = shared.commit_snapshot(record, self.labels, self.failures_before)?;
        self.changes.committed(id);
        drop(self.lane);
        Ok(CaptureStats {
            id,
            process: self.process,
            parent,
            time: self.time,
            clock_behind: self.clock_behind,
            memory_bytes,
            zero_bytes: counts.zero_bytes,
            changed_regions: counts.changed_regions,
            new_regions: counts.new_regions,
            delta_regions: counts.delta_regions,
            shared_regions: counts.shared_regions,
            added_bytes: counts.added_bytes + bytes,
            elapsed: self.started.elapsed(),
            paused: self.paused,
            staging_full,
            tracking: self.changes.tracking,
            left_out,
        })
    }
}

/// The memory that could not be copied and is not already listed as left out.
fn refused(space: &AddressSpace, unreadable: &Ranges) -> Vec<LeftOut> {
    let known: Ranges = space.unreadable().iter().copied().collect();
    let refused = unreadable.difference(&known);
    refused.addresses().map(|range| LeftOut { range, why: WhyLeftOut::Refused }).collect()
}

/// Fails if two attachments have the same name, or if one has a name that is reserved for the time
/// of a snapshot.
pub(crate) fn check_attachment_names(attachments: &[Attachment]) -> Result<(), StoreError> {
    for (at, attachment) in attachments.iter().enumerate() {
        if attachment.name.starts_with(MOMENT_PREFIX) {
            return Err(StoreError::AttachmentReserved { name: shorten(&attachment.name) });
        }
        if attachments[..at].iter().any(|other| other.name == attachment.name) {
            return Err(StoreError::AttachmentTwice { name: shorten(&attachment.name) });
        }
    }
    Ok(())
}
