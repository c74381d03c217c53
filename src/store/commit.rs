//! Commits: snapshots, labels and tombstones are appended as facts and made durable.

use jiff::Timestamp;

use super::catalog::{Entry, Fact, Labels};
use super::clock::later_than;
use super::error::StoreError;
use super::held::Held;
use super::open_store::OpenStore;
use super::packs::log::FactAt;
use super::packs::object::ObjectKind;
use crate::hash::Hash;
use crate::record::{self, Note, Record, SnapshotId, Tombstone};

impl OpenStore {
    /// Appends facts and makes them, and all that was appended before, durable.
    ///
    /// What the facts refer to is made durable before they are written: should the power fail in
    /// between, whatever of a record is found on the disk, all that it needs is there as well.
    fn commit(
        &self,
        facts: Vec<(ObjectKind, Vec<u8>, FactAt)>,
        failures_before: u64,
    ) -> Result<u64, StoreError> {
        self.check_writable()?;
        self.sync()?;
        let added_bytes = self.log.append_facts(facts, failures_before)?;
        self.sync()?;
        // Another thread's sync may have failed with our facts among what it took back.
        if self.log.failures() == failures_before {
            Ok(added_bytes)
        } else {
            Err(StoreError::WriteFailedMeanwhile)
        }
    }

    /// The time that the clock says, and the moment at which a snapshot that is taken now stands: later than that of any other.
    pub(crate) fn now(&self) -> (Timestamp, Timestamp) {
        self.clock.now()
    }

    /// Commits a snapshot with its labels: durable when this returns. Returns its id and how many
    /// bytes were added.
    pub(crate) fn commit_snapshot(
        &self,
        record: Record,
        labels: Labels,
        failures_before: u64,
    ) -> Result<(SnapshotId, u64), StoreError> {
        let bytes = encode(ObjectKind::Record, &record)?;
        let refused = |source| StoreError::Unrecordable { source };
        let held = Held::read(&bytes).map_err(refused)?;
        self.catalog().check_room(&held).map_err(refused)?;
        let id = SnapshotId(Hash::of(&bytes));
        let time = record.time;
        let mut facts: Vec<(ObjectKind, Vec<u8>, FactAt)> = vec![(
            ObjectKind::Record,
            bytes,
            Box::new(move |location| Fact::Snapshot(id, Box::new(Entry::new(held, location)))),
        )];
        if !labels.is_empty() {
            facts.push(note(Note { snapshot: id, time, labels })?);
        }
        Ok((id, self.commit(facts, failures_before)?))
    }

    /// Commits new labels of a snapshot.
    pub(crate) fn commit_labels(&self, id: SnapshotId, labels: Labels) -> Result<(), StoreError> {
        let before = self.catalog().live(&id).and_then(|entry| entry.note().map(|(time, _)| time));
        let time = later_than(before);
        self.commit(vec![note(Note { snapshot: id, time, labels })?], self.log.failures()).map(drop)
    }

    /// Commits that snapshots are forgotten.
    pub(crate) fn commit_tombstones(&self, ids: &[SnapshotId]) -> Result<(), StoreError> {
        let tombstone = |id: &SnapshotId| {
            let id = *id;
            let bytes = encode_tombstone(id)?;
            let fact: FactAt = Box::new(move |location| Fact::Tombstone(id, location));
            Ok((ObjectKind::Tombstone, bytes, fact))
        };
        let commit = || {
            let facts = ids.iter().map(tombstone).collect::<Result<Vec<_>, StoreError>>()?;
            self.commit(facts, self.log.failures()).map(drop)
        };
        match commit() {
            // A full disk must not keep anybody from forgetting: the index gives its room for it.
            Err(StoreError::DiskFull { .. }) if self.index.make_room()? => commit(),
            other => other,
        }
    }
}

/// The stored bytes of a tombstone of now.
pub(crate) fn encode_tombstone(snapshot: SnapshotId) -> Result<Vec<u8>, StoreError> {
    encode(ObjectKind::Tombstone, &Tombstone { snapshot, time: Timestamp::now() })
}

fn note(note: Note) -> Result<(ObjectKind, Vec<u8>, FactAt), StoreError> {
    let bytes = encode(ObjectKind::Note, &note)?;
    Ok((ObjectKind::Note, bytes, Box::new(move |location| Fact::Note(note, location))))
}

/// The stored bytes of a value, if they are not too many.
pub(crate) fn encode<T: serde::Serialize>(kind: ObjectKind, value: &T) -> Result<Vec<u8>, StoreError> {
    let bytes = record::encode(value).map_err(|source| StoreError::Record { kind, source })?;
    check_length(kind, bytes.len())?;
    Ok(bytes)
}

/// An error if an object of so many plain bytes cannot be stored.
pub(crate) fn check_length(kind: ObjectKind, plain_bytes: usize) -> Result<(), StoreError> {
    if plain_bytes > ObjectKind::MAX_PLAIN_BYTES {
        Err(StoreError::TooLarge { kind, found_bytes: plain_bytes as u64 })
    } else {
        Ok(())
    }
}
