//! A pinned snapshot: one that is open for reading, which gc leaves alone though it may be forgotten meanwhile.

use std::sync::{Arc, OnceLock};

use super::gate::{Gate, SnapshotGuard};
use super::held::Held;
use crate::record::{Record, SnapshotId};

/// A snapshot that somebody reads. gc leaves it alone until this is dropped.
pub(crate) struct Pinned {
    id: SnapshotId,
    held: Held,
    /// Decoded when it is first asked for.
    record: OnceLock<Arc<Record>>,
    _guard: SnapshotGuard,
}

impl Pinned {
    /// Pins a snapshot. The caller has locked the catalog, in which the snapshot is live: otherwise it may be gone.
    pub(crate) fn new(gate: &Arc<Gate>, id: SnapshotId, held: &Held) -> Pinned {
        let guard = gate.pin_snapshot(id, held.clone());
        Pinned { id, held: held.clone(), record: OnceLock::new(), _guard: guard }
    }

    pub(crate) fn id(&self) -> SnapshotId {
        self.id
    }

    /// The record as the catalog holds it.
    pub(crate) fn held(&self) -> &Held {
        &self.held
    }

    /// The record, decoded the first time: a microsecond.
    pub(crate) fn record(&self) -> &Arc<Record> {
        self.record.get_or_init(|| self.held.record())
    }
}
