//! The dirty ranges of one capture, from the tracker of the source.

use std::sync::Arc;

use super::reference::Reference;
use crate::address_space::AddressSpace;
use crate::error::Error;
use crate::ranges::Ranges;
use crate::record::SnapshotId;
use crate::source::{Frozen, SourceError};
use crate::store::OpenStore;
use crate::track::{DirtySet, RescanReason, Tracker, Tracking};

/// What a tracker found for one capture, and how it learns that the snapshot is durable.
pub(super) struct Changes {
    /// For each mapping what may differ from the parent, if that is known.
    pub(super) ranges: Option<Vec<Ranges>>,
    pub(super) tracking: Tracking,
    acknowledge: Option<(Arc<dyn Tracker>, u64)>,
}

impl Changes {
    /// Asks the tracker, whether or not what it knows can be used: it begins again in any case.
    /// Enters what cannot be read into `space`.
    pub(super) fn take(
        tracker: Result<Arc<dyn Tracker>, RescanReason>,
        frozen: &dyn Frozen,
        space: &mut AddressSpace,
        parent: Option<&Reference>,
        shared: &OpenStore,
    ) -> Result<Changes, Error> {
        // The tracker may be the first to find memory that cannot be read.
        let taken = tracker.as_ref().map(|tracker| tracker.take(space, parent.map(|parent| parent.id)));
        space.set_unreadable(frozen.left_out().into_iter().map(|left_out| left_out.range));
        let DirtySet { number, changes } = match taken {
            Ok(taken) => taken.map_err(SourceError::Track)?,
            Err(_) => DirtySet { number: 0, changes: Err(RescanReason::NoTracker) },
        };
        let tracker = match tracker {
            Ok(tracker) => tracker,
            Err(why) => {
                return Ok(Changes { ranges: None, tracking: Tracking::Rescan(why), acknowledge: None });
            }
        };
        let means = tracker.method();
        let acknowledge = Some((tracker, number));
        let usable = changes.and_then(|changes| match parent {
            None => Err(RescanReason::NoParent),
            Some(parent) => parent.check_it_fits(space, shared).map(|()| changes),
        });
        Ok(match usable {
            Ok(ranges) => Changes { ranges: Some(ranges), tracking: Tracking::By(means), acknowledge },
            Err(why) => Changes { ranges: None, tracking: Tracking::Rescan(why), acknowledge },
        })
    }

    /// Informs the tracker that the snapshot is durable.
    pub(super) fn committed(&self, id: SnapshotId) {
        if let Some((tracker, number)) = &self.acknowledge {
            tracker.committed(*number, id);
        }
    }
}
