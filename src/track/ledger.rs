//! The ledger: the changes that a tracker has found and that no durable snapshot has yet.

use super::RescanReason;
use crate::ranges::Ranges;
use crate::record::SnapshotId;

/// If more takes than this are unacknowledged, older ones are merged.
const MAX_OPEN_TAKES: usize = 4;

/// What one take of a tracker found.
#[derive(Clone, Debug)]
pub(super) enum Finding {
    /// These bytes may have changed, and no others.
    Bytes(Ranges),
    /// Anything may have changed.
    Anything(RescanReason),
}

/// Which snapshot the knowledge refers to, and what was found since.
#[derive(Debug, Default)]
pub(super) struct Ledger {
    basis: Option<SnapshotId>,
    next_number: u64,
    /// The number of the last take that was acknowledged, plus one.
    acknowledged: u64,
    open: Vec<(u64, Finding)>,
}

impl Ledger {
    /// A ledger whose knowledge refers to a snapshot from the beginning.
    pub(super) fn since(id: SnapshotId) -> Ledger {
        Ledger { basis: Some(id), ..Ledger::default() }
    }

    /// Enters what was found since the last take. Answers its number and, if it is known, all that
    /// may have changed since the snapshot `since`.
    pub(super) fn take(
        &mut self,
        found: Finding,
        since: Option<SnapshotId>,
    ) -> (u64, Result<Ranges, RescanReason>) {
        let number = self.next_number;
        self.next_number += 1;
        self.open.push((number, found));
        if self.open.len() > MAX_OPEN_TAKES {
            let (_, oldest) = self.open.remove(0);
            let next = &mut self.open[0].1;
            *next = join([&oldest, &*next]);
        }
        let changes = match (since, self.basis) {
            (None, _) => Err(RescanReason::NoParent),
            (Some(_), None) => Err(RescanReason::JustBegun),
            (Some(since), Some(basis)) if since != basis => Err(RescanReason::OtherParent),
            _ => match join(self.open.iter().map(|(_, found)| found)) {
                Finding::Bytes(ranges) => Ok(ranges),
                Finding::Anything(why) => Err(why),
            },
        };
        (number, changes)
    }

    /// The snapshot that the knowledge refers to.
    pub(super) fn basis(&self) -> Option<SnapshotId> {
        self.basis
    }

    /// Learns that a take is in a durable snapshot. One that is older than another acknowledged
    /// take comes too late: what was found between the two is forgotten already.
    pub(super) fn committed(&mut self, number: u64, id: SnapshotId) {
        if number >= self.acknowledged && number < self.next_number {
            self.acknowledged = number + 1;
            self.basis = Some(id);
            self.open.retain(|(open, _)| *open > number);
        }
    }
}

fn join<'a>(all: impl IntoIterator<Item = &'a Finding>) -> Finding {
    let mut joined = Vec::new();
    for found in all {
        match found {
            Finding::Bytes(ranges) => joined.extend_from_slice(ranges),
            Finding::Anything(why) => return Finding::Anything(why.clone()),
        }
    }
    Finding::Bytes(joined.into())
}

#[cfg(test)]
mod tests {
    use std::ops::Range;

    use super::*;
    use crate::hash::Hash;

    fn id(byte: u8) -> SnapshotId {
        SnapshotId(Hash([byte; 32]))
    }

    fn one(range: Range<u64>) -> Finding {
        Finding::Bytes(range.into())
    }

    #[test]
    fn what_is_not_acknowledged_is_found_again() {
        let mut ledger = Ledger::default();
        assert_eq!(ledger.take(one(0..9), None), (0, Err(RescanReason::NoParent)));
        ledger.committed(0, id(1));
        for at in 1..20 {
            let (_, changes) = ledger.take(one(at * 2..at * 2 + 1), Some(id(1)));
            assert_eq!(changes.unwrap().len() as u64, at);
            assert!(ledger.open.len() <= MAX_OPEN_TAKES);
        }
        ledger.committed(19, id(2));
        assert_eq!(ledger.take(one(5..6), Some(id(2))).1.unwrap(), [5..6, 0..0][..1]);
        assert_eq!(ledger.take(one(5..6), Some(id(1))).1, Err(RescanReason::OtherParent));
    }

    #[test]
    fn acknowledgements_in_the_wrong_order_never_lose_a_change() {
        let mut ledger = Ledger::since(id(1));
        let (first, _) = ledger.take(one(0..1), Some(id(1)));
        let (second, _) = ledger.take(one(2..3), Some(id(1)));
        ledger.committed(second, id(3));
        ledger.committed(first, id(2));
        // The second take is not in snapshot 2, and is no longer open.
        assert_eq!(ledger.take(one(4..5), Some(id(2))).1, Err(RescanReason::OtherParent));

        let mut ledger = Ledger::since(id(1));
        let (first, _) = ledger.take(one(0..1), Some(id(1)));
        let _ = ledger.take(one(2..3), Some(id(1)));
        ledger.committed(first, id(2));
        assert_eq!(ledger.take(one(4..5), Some(id(2))).1.unwrap(), [2..3, 4..5]);
    }
}
