//! The catalog: all snapshots of a store, in memory, as the `snapshots` tree of the index keeps them.
//!
//! A forgotten snapshot stays in it until gc has removed its record from the packs; so does its
//! tombstone, which would otherwise be missed when the index is rebuilt.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::location::Location;
use crate::record::{self, Note, Record, SnapshotId};

/// Labels: what a user wrote on a snapshot.
pub type Labels = BTreeMap<String, String>;

/// One snapshot as the catalog knows it.
#[derive(Clone, Debug)]
pub(crate) struct Entry {
    pub(crate) record: Arc<Record>,
    pub(crate) location: Location,
    pub(crate) labels: Labels,
    /// When the labels were given, and where the note is.
    pub(crate) note: Option<(Timestamp, Location)>,
    /// Where the tombstone is, if the snapshot is forgotten.
    pub(crate) tombstone: Option<Location>,
}

/// An [`Entry`] as the index stores it.
#[derive(Serialize, Deserialize)]
struct StoredEntry {
    record: Record,
    location: [u8; Location::BYTES],
    labels: Labels,
    note: Option<(i128, [u8; Location::BYTES])>,
    tombstone: Option<[u8; Location::BYTES]>,
}

impl Entry {
    pub(crate) fn new(record: Record, location: Location) -> Entry {
        Entry { record: Arc::new(record), location, labels: Labels::new(), note: None, tombstone: None }
    }

    /// Its bytes in the index.
    pub(crate) fn to_bytes(&self) -> Option<Vec<u8>> {
        let stored = StoredEntry {
            record: (*self.record).clone(),
            location: self.location.to_bytes(),
            labels: self.labels.clone(),
            note: self.note.map(|(time, location)| (time.as_nanosecond(), location.to_bytes())),
            tombstone: self.tombstone.map(Location::to_bytes),
        };
        record::encode(&stored).ok()
    }

    /// The entry in bytes from the index, if they are one.
    pub(crate) fn from_bytes(bytes: &[u8]) -> Option<Entry> {
        let stored: StoredEntry = record::decode(bytes).ok()?;
        let note = match stored.note {
            Some((time, location)) => {
                Some((Timestamp::from_nanosecond(time).ok()?, Location::from_bytes(&location)?))
            }
            None => None,
        };
        let tombstone = match stored.tombstone {
            Some(location) => Some(Location::from_bytes(&location)?),
            None => None,
        };
        Some(Entry {
            record: Arc::new(stored.record),
            location: Location::from_bytes(&stored.location)?,
            labels: stored.labels,
            note,
            tombstone,
        })
    }
}

/// All snapshots of a store.
#[derive(Default)]
pub(crate) struct Catalog {
    entries: BTreeMap<SnapshotId, Entry>,
    /// The live snapshots of each process by time.
    processes: BTreeMap<String, BTreeMap<(Timestamp, SnapshotId), ()>>,
    /// Tombstones whose record is in no pack any more: the next gc drops them.
    orphans: HashMap<SnapshotId, Location>,
}

/// A durable fact for the catalog, in the order of the packs or any other.
#[derive(Clone, Debug)]
pub(crate) enum Fact {
    Snapshot(SnapshotId, Box<Entry>),
    Note(Note, Location),
    Tombstone(SnapshotId, Location),
}

impl Fact {
    /// The snapshot it concerns.
    pub(crate) fn snapshot(&self) -> SnapshotId {
        match self {
            Fact::Snapshot(id, _) | Fact::Tombstone(id, _) => *id,
            Fact::Note(note, _) => note.snapshot,
        }
    }
}

impl Catalog {
    /// Takes a fact in. A note or tombstone must come after its
    /// record; a tombstone without one is kept as an orphan, such a note is dropped.
    pub(crate) fn apply(&mut self, fact: Fact) {
        match fact {
            Fact::Snapshot(id, mut entry) => {
                // Scanned again: what was learnt since about the snapshot stays.
                if let Some(known) = self.entries.get_mut(&id) {
                    known.location = entry.location;
                    return;
                }
                entry.tombstone = entry.tombstone.or_else(|| self.orphans.remove(&id));
                if entry.tombstone.is_none() {
                    let times = self.processes.entry(entry.record.process.clone()).or_default();
                    times.insert((entry.record.time, id), ());
                }
                self.entries.insert(id, *entry);
            }
            Fact::Note(note, location) => {
                if let Some(entry) = self.entries.get_mut(&note.snapshot)
                    && entry.note.is_none_or(|(time, _)| time <= note.time)
                {
                    entry.note = Some((note.time, location));
                    entry.labels = note.labels;
                }
            }
            Fact::Tombstone(id, location) => match self.entries.get_mut(&id) {
                Some(entry) => {
                    entry.tombstone = Some(location);
                    let record = entry.record.clone();
                    self.unlist(&record.process, (record.time, id));
                }
                None => {
                    self.orphans.insert(id, location);
                }
            },
        }
    }

    fn unlist(&mut self, process: &str, key: (Timestamp, SnapshotId)) {
        if let Some(times) = self.processes.get_mut(process) {
            times.remove(&key);
            if times.is_empty() {
                self.processes.remove(process);
            }
        }
    }

    /// What the index stores for `id`: key and value pairs, a value of `None` for nothing.
    pub(crate) fn stored(&self, id: SnapshotId) -> [(Vec<u8>, Option<Vec<u8>>); 2] {
        let key = |letter: u8| [&[letter], &id.0.0[..]].concat();
        [
            (key(b's'), self.entries.get(&id).and_then(Entry::to_bytes)),
            (key(b't'), self.orphans.get(&id).map(|location| location.to_bytes().to_vec())),
        ]
    }

    /// Takes in a key and value that the index stored. Says whether they made sense.
    pub(crate) fn load(&mut self, key: &[u8], value: &[u8]) -> bool {
        let Some((letter, id)) = key.split_first() else { return false };
        let Ok(id) = id.try_into().map(|id| SnapshotId(crate::hash::Hash(id))) else { return false };
        let fact = match letter {
            b's' => Entry::from_bytes(value).map(|entry| Fact::Snapshot(id, Box::new(entry))),
            b't' => Location::from_bytes(value).map(|location| Fact::Tombstone(id, location)),
            _ => None,
        };
        fact.map(|fact| self.apply(fact)).is_some()
    }

    /// A live snapshot.
    pub(crate) fn live(&self, id: &SnapshotId) -> Option<&Entry> {
        self.entries.get(id).filter(|entry| entry.tombstone.is_none())
    }

    /// Any snapshot whose record is still in a pack.
    pub(crate) fn any(&self, id: &SnapshotId) -> Option<&Entry> {
        self.entries.get(id)
    }

    /// All snapshots whose records are still in a pack, forgotten or not.
    pub(crate) fn all(&self) -> impl Iterator<Item = (&SnapshotId, &Entry)> {
        self.entries.iter()
    }

    /// The live snapshots, by id.
    pub(crate) fn all_live(&self) -> impl Iterator<Item = (&SnapshotId, &Entry)> {
        self.entries.iter().filter(|(_, entry)| entry.tombstone.is_none())
    }

    /// The live snapshots whose ids lie between these two.
    pub(crate) fn live_between(
        &self,
        first: SnapshotId,
        last: SnapshotId,
    ) -> impl Iterator<Item = &SnapshotId> {
        self.entries.range(first..=last).filter(|(_, entry)| entry.tombstone.is_none()).map(|(id, _)| id)
    }

    /// The live snapshots of a process, oldest first.
    pub(crate) fn of_process(&self, process: &str) -> impl DoubleEndedIterator<Item = SnapshotId> {
        self.processes.get(process).into_iter().flat_map(|times| times.keys().map(|(_, id)| *id))
    }

    /// The names of the processes that have live snapshots.
    pub(crate) fn processes(&self) -> impl Iterator<Item = &str> {
        self.processes.keys().map(String::as_str)
    }

    /// Tombstones whose records are gone.
    pub(crate) fn orphans(&self) -> &HashMap<SnapshotId, Location> {
        &self.orphans
    }

    /// Takes a changed place of an object in, after gc copied it.
    pub(crate) fn moved(&mut self, id: SnapshotId, old: Location, new: Location) {
        if let Some(entry) = self.entries.get_mut(&id) {
            if entry.location == old {
                entry.location = new;
            }
            if let Some((_, location)) = entry.note.as_mut().filter(|(_, location)| *location == old) {
                *location = new;
            }
            if let Some(location) = entry.tombstone.as_mut().filter(|location| **location == old) {
                *location = new;
            }
        }
        if let Some(location) = self.orphans.get_mut(&id).filter(|location| **location == old) {
            *location = new;
        }
    }

    /// The record of a snapshot, mostly a forgotten one, is in no pack any more.
    pub(crate) fn record_gone(&mut self, id: SnapshotId) {
        let Some(entry) = self.entries.remove(&id) else { return };
        self.unlist(&entry.record.process, (entry.record.time, id));
        if let Some(tombstone) = entry.tombstone {
            self.orphans.insert(id, tombstone);
        }
    }

    /// A tombstone whose record is gone is in no pack any more either.
    pub(crate) fn orphan_gone(&mut self, id: SnapshotId) {
        self.orphans.remove(&id);
    }
}
