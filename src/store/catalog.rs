//! The catalog: all snapshots of a store, in memory. The `snapshots` tree of the index stores the
//! same.
//!
//! A forgotten snapshot stays in the catalog until gc has removed its record from the packs. So
//! does its tombstone: without it, rebuilding the index would bring the snapshot back.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::held::{Held, Texts};
use super::packs::location::Location;
use crate::record::{self, Note, Record, RecordError, SnapshotId};

/// Labels: text that a user gave to a snapshot.
pub type Labels = BTreeMap<String, String>;

/// The limit for processes, triggers and origins in memory, each distinct one counted once. Beyond
/// it, command lines are not held.
const MAX_TEXT_BYTES: usize = 64 << 20;

/// A snapshot is usual if its record without the command line, and its labels, take at most this
/// many bytes: some 50 attachments.
const USUAL_BYTES: usize = 4 << 10;

/// The limit for all unusual snapshots together. For usual ones the only bound is the store's
/// length: each takes about as much memory as disk.
///
/// What is found in packs is in memory four times while the index is saved.
const MAX_UNUSUAL_BYTES: usize = 64 << 20;

/// The memory that a label takes besides its text.
const LABEL_BYTES: usize = 64;

/// One snapshot in the catalog.
#[derive(Clone, Debug)]
pub(crate) struct Entry {
    held: Held,
    pub(crate) location: Location,
    /// Most snapshots have none.
    further: Option<Box<Further>>,
}

/// What is recorded about a snapshot after it was taken.
#[derive(Clone, Debug, Default)]
struct Further {
    labels: Labels,
    /// When the labels were set, and where the note is.
    note: Option<(Timestamp, Location)>,
    /// Where the tombstone is, if the snapshot is forgotten.
    tombstone: Option<Location>,
}

/// What the index stores of an [`Entry`] after its record.
#[derive(Serialize, Deserialize)]
struct StoredRest {
    location: [u8; Location::BYTES],
    labels: Labels,
    note: Option<(i128, [u8; Location::BYTES])>,
    tombstone: Option<[u8; Location::BYTES]>,
}

static NO_LABELS: Labels = Labels::new();

impl Entry {
    pub(crate) fn new(held: Held, location: Location) -> Entry {
        Entry { held, location, further: None }
    }

    /// The record in encoded form.
    pub(crate) fn held(&self) -> &Held {
        &self.held
    }

    /// The record. Decoding takes about 1 µs (AMD EPYC, 2 cores).
    pub(crate) fn record(&self) -> Arc<Record> {
        self.held.record()
    }

    pub(crate) fn labels(&self) -> &Labels {
        self.further.as_ref().map_or(&NO_LABELS, |further| &further.labels)
    }

    /// When the labels were set, and where the note is.
    pub(crate) fn note(&self) -> Option<(Timestamp, Location)> {
        self.further.as_ref()?.note
    }

    /// Where the tombstone is, if the snapshot is forgotten.
    pub(crate) fn tombstone(&self) -> Option<Location> {
        self.further.as_ref()?.tombstone
    }

    fn further(&mut self) -> &mut Further {
        self.further.get_or_insert_default()
    }

    /// Its bytes in the index.
    pub(crate) fn to_bytes(&self) -> Option<Vec<u8>> {
        let rest = StoredRest {
            location: self.location.to_bytes(),
            labels: self.labels().clone(),
            note: self.note().map(|(time, location)| (time.as_nanosecond(), location.to_bytes())),
            tombstone: self.tombstone().map(Location::to_bytes),
        };
        let mut bytes = vec![record::ENCODING_VERSION];
        self.held.write(&mut bytes);
        record::encode_onto(&rest, &mut bytes).ok()?;
        Some(bytes)
    }

    /// The entry that these bytes of the index encode, if they encode one.
    pub(crate) fn from_bytes(bytes: &[u8], known: &Texts) -> Option<Entry> {
        let bytes = record::without_version(bytes).ok()?;
        let (held, record_bytes) = Held::read_first(bytes, known).ok()?;
        let rest = &bytes[record_bytes..];
        let (stored, rest_bytes) = record::decode_first::<StoredRest>(rest).ok()?;
        if rest_bytes != rest.len() {
            return None;
        }
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
        let mut entry = Entry::new(held, Location::from_bytes(&stored.location)?);
        if note.is_some() || tombstone.is_some() || !stored.labels.is_empty() {
            entry.further = Some(Box::new(Further { labels: stored.labels, note, tombstone }));
        }
        Some(entry)
    }
}

/// All snapshots of a store.
#[derive(Default)]
pub(crate) struct Catalog {
    entries: BTreeMap<SnapshotId, Entry>,
    /// The live snapshots of each process, in order.
    processes: BTreeMap<String, BTreeSet<(Timestamp, SnapshotId)>>,
    /// Tombstones whose record is in no pack any more. The next gc drops them.
    orphans: HashMap<SnapshotId, Location>,
    texts: Texts,
    /// The bytes of all unusual snapshots.
    unusual_bytes: usize,
}

/// A durable fact for the catalog. Facts may come in any order, not only in that of the packs.
#[derive(Clone, Debug)]
pub(crate) enum Fact {
    Snapshot(SnapshotId, Box<Entry>),
    Note(Note, Location),
    Tombstone(SnapshotId, Location),
}

/// The room that is left for the unusual facts found in packs.
pub(crate) struct FactRoom(usize);

impl Default for FactRoom {
    fn default() -> Self {
        FactRoom(MAX_UNUSUAL_BYTES)
    }
}

impl Fact {
    /// Takes the fact's bytes, if they are unusual, from `room`. An error if `room` has too few.
    /// The limit is needed here because many facts are found before any is applied.
    pub(crate) fn take_room(&self, room: &mut FactRoom) -> Result<(), RecordError> {
        let bytes = match self {
            Fact::Snapshot(_, entry) => unusual_of(&entry.held),
            Fact::Note(note, _) => labels_bytes(&note.labels),
            Fact::Tombstone(..) => 0,
        };
        room.0 = room.0.checked_sub(bytes).ok_or_else(too_much)?;
        Ok(())
    }

    /// The snapshot it concerns.
    pub(crate) fn snapshot(&self) -> SnapshotId {
        match self {
            Fact::Snapshot(id, _) | Fact::Tombstone(id, _) => *id,
            Fact::Note(note, _) => note.snapshot,
        }
    }
}

impl Catalog {
    /// Applies a fact. A note or tombstone must come after its record. A tombstone without a record
    /// is kept as an orphan; a note without one is dropped. A fact that would take too much memory
    /// is left out with a warning.
    pub(crate) fn apply(&mut self, fact: Fact) {
        match fact {
            Fact::Snapshot(id, mut entry) => {
                // The record was scanned again: what was recorded about the snapshot since stays.
                if let Some(known) = self.entries.get_mut(&id) {
                    known.location = entry.location;
                    return;
                }
                if let Err(error) = self.check_room(&entry.held) {
                    tracing::warn!("the snapshot {id} is left out: {error}");
                    return;
                }
                if entry.tombstone().is_none()
                    && let Some(tombstone) = self.orphans.remove(&id)
                {
                    entry.further().tombstone = Some(tombstone);
                }
                self.insert(id, *entry);
            }
            Fact::Note(note, location) => {
                let Some(entry) = self.entries.get_mut(&note.snapshot) else { return };
                if entry.note().is_some_and(|(time, _)| time > note.time) {
                    return;
                }
                let (old_bytes, new_bytes) = (labels_bytes(entry.labels()), labels_bytes(&note.labels));
                if self.unusual_bytes - old_bytes + new_bytes > MAX_UNUSUAL_BYTES {
                    tracing::warn!(
                        "the labels of the snapshot {} are left out: {}",
                        note.snapshot,
                        too_much()
                    );
                    return;
                }
                self.unusual_bytes = self.unusual_bytes - old_bytes + new_bytes;
                let further = entry.further();
                (further.note, further.labels) = (Some((note.time, location)), note.labels);
            }
            Fact::Tombstone(id, location) => match self.entries.get_mut(&id) {
                Some(entry) => {
                    entry.further().tombstone = Some(location);
                    let held = entry.held.clone();
                    self.unlist(held.process(), (held.moment(), id));
                }
                None => {
                    self.orphans.insert(id, location);
                }
            },
        }
    }

    /// Returns an error if there is not enough room for this record.
    pub(crate) fn check_room(&self, held: &Held) -> Result<(), RecordError> {
        if self.unusual_bytes + unusual_of(held) > MAX_UNUSUAL_BYTES { Err(too_much()) } else { Ok(()) }
    }

    fn insert(&mut self, id: SnapshotId, mut entry: Entry) {
        self.texts.share(&mut entry.held, MAX_TEXT_BYTES);
        self.unusual_bytes += unusual_of(&entry.held) + labels_bytes(entry.labels());
        if entry.tombstone().is_none() {
            let key = (entry.held.moment(), id);
            match self.processes.get_mut(entry.held.process()) {
                Some(line) => drop(line.insert(key)),
                None => drop(self.processes.insert(entry.held.process().to_owned(), [key].into())),
            }
        }
        self.entries.insert(id, entry);
    }

    /// Removes an entry.
    fn remove(&mut self, id: SnapshotId) -> Option<Entry> {
        let entry = self.entries.remove(&id)?;
        if entry.tombstone().is_none() {
            self.unlist(entry.held.process(), (entry.held.moment(), id));
        }
        let bytes = unusual_of(&entry.held) + labels_bytes(entry.labels());
        self.unusual_bytes = self.unusual_bytes.saturating_sub(bytes);
        self.texts.let_go(&entry.held);
        Some(entry)
    }

    fn unlist(&mut self, process: &str, key: (Timestamp, SnapshotId)) {
        if let Some(times) = self.processes.get_mut(process) {
            times.remove(&key);
            if times.is_empty() {
                self.processes.remove(process);
            }
        }
    }

    /// What the index stores for `id`, as key and value pairs. A value of `None` means no entry.
    pub(crate) fn stored(&self, id: SnapshotId) -> [(Vec<u8>, Option<Vec<u8>>); 2] {
        let key = |letter: u8| [&[letter], &id.0.0[..]].concat();
        [
            (key(b's'), self.entries.get(&id).and_then(Entry::to_bytes)),
            (key(b't'), self.orphans.get(&id).map(|location| location.to_bytes().to_vec())),
        ]
    }

    /// Adds a key and value that the index stored, in place of an earlier value. Returns whether
    /// they were valid. [`loaded`](Self::loaded) joins the parts that belong together.
    pub(crate) fn load(&mut self, key: &[u8], value: &[u8]) -> bool {
        let Some((letter, id)) = key.split_first() else { return false };
        let Ok(id) = id.try_into().map(|id| SnapshotId(crate::hash::Hash(id))) else { return false };
        match (letter, value.is_empty()) {
            (b's', true) => drop(self.remove(id)),
            (b't', true) => drop(self.orphans.remove(&id)),
            (b's', false) => {
                let Some(entry) = Entry::from_bytes(value, &self.texts) else { return false };
                // Keys arrive in order, so most come after all earlier ones.
                if self.entries.last_key_value().is_some_and(|(last, _)| id <= *last) {
                    self.remove(id);
                }
                if self.check_room(&entry.held).is_err() {
                    return false;
                }
                self.insert(id, entry);
            }
            (b't', false) => match Location::from_bytes(value) {
                Some(location) => drop(self.orphans.insert(id, location)),
                None => return false,
            },
            _ => return false,
        }
        true
    }

    /// Call this when everything in the index was loaded.
    pub(crate) fn loaded(&mut self) {
        let known: Vec<SnapshotId> =
            self.orphans.keys().filter(|id| self.entries.contains_key(id)).copied().collect();
        for id in known {
            if let Some(location) = self.orphans.remove(&id) {
                self.apply(Fact::Tombstone(id, location));
            }
        }
    }

    /// A live snapshot.
    pub(crate) fn live(&self, id: &SnapshotId) -> Option<&Entry> {
        self.entries.get(id).filter(|entry| entry.tombstone().is_none())
    }

    /// A snapshot, live or forgotten, whose record is still in a pack.
    pub(crate) fn any(&self, id: &SnapshotId) -> Option<&Entry> {
        self.entries.get(id)
    }

    /// All snapshots whose records are still in a pack, live or forgotten.
    pub(crate) fn all(&self) -> impl Iterator<Item = (&SnapshotId, &Entry)> {
        self.entries.iter()
    }

    /// The live snapshots, by id.
    pub(crate) fn all_live(&self) -> impl Iterator<Item = (&SnapshotId, &Entry)> {
        self.entries.iter().filter(|(_, entry)| entry.tombstone().is_none())
    }

    /// The live snapshots whose ids are between these two.
    pub(crate) fn live_between(
        &self,
        first: SnapshotId,
        last: SnapshotId,
    ) -> impl Iterator<Item = &SnapshotId> {
        self.entries.range(first..=last).filter(|(_, entry)| entry.tombstone().is_none()).map(|(id, _)| id)
    }

    /// The live snapshots of a process, oldest first.
    pub(crate) fn of_process(&self, process: &str) -> impl DoubleEndedIterator<Item = SnapshotId> {
        self.processes.get(process).into_iter().flat_map(|line| line.iter().map(|(_, id)| *id))
    }

    /// The newest of all live snapshots, and its moment.
    pub(crate) fn newest(&self) -> Option<(Timestamp, SnapshotId)> {
        self.processes.values().filter_map(|line| line.last()).max().copied()
    }

    /// The live snapshots, oldest first.
    pub(crate) fn in_order(&self) -> Vec<SnapshotId> {
        let mut order: Vec<_> = self.processes.values().flatten().copied().collect();
        order.sort_unstable();
        order.into_iter().map(|(_, id)| id).collect()
    }

    /// The names of the processes that have live snapshots.
    pub(crate) fn processes(&self) -> impl Iterator<Item = &str> {
        self.processes.keys().map(String::as_str)
    }

    /// Tombstones whose records are gone.
    pub(crate) fn orphans(&self) -> &HashMap<SnapshotId, Location> {
        &self.orphans
    }

    /// Changes the place of an object that gc copied.
    pub(crate) fn moved(&mut self, id: SnapshotId, old: Location, new: Location) {
        if let Some(entry) = self.entries.get_mut(&id) {
            if entry.location == old {
                entry.location = new;
            }
            if let Some(further) = &mut entry.further {
                if let Some((_, location)) = further.note.as_mut().filter(|(_, location)| *location == old) {
                    *location = new;
                }
                if let Some(location) = further.tombstone.as_mut().filter(|location| **location == old) {
                    *location = new;
                }
            }
        }
        if let Some(location) = self.orphans.get_mut(&id).filter(|location| **location == old) {
            *location = new;
        }
    }

    /// Records that no pack has the record of a snapshot any more. Usually the snapshot is a
    /// forgotten one.
    pub(crate) fn record_gone(&mut self, id: SnapshotId) {
        if let Some(tombstone) = self.remove(id).and_then(|entry| entry.tombstone()) {
            self.orphans.insert(id, tombstone);
        }
    }

    /// Records that no pack has an orphaned tombstone any more.
    pub(crate) fn orphan_gone(&mut self, id: SnapshotId) {
        self.orphans.remove(&id);
    }
}

/// How many of a snapshot's bytes count against the limit for all unusual ones.
fn unusual(bytes: usize) -> usize {
    if bytes > USUAL_BYTES { bytes } else { 0 }
}

fn unusual_of(held: &Held) -> usize {
    unusual(held.own_bytes()) + unusual(held.text_bytes_without_command())
}

fn labels_bytes(labels: &Labels) -> usize {
    unusual(labels.iter().map(|(key, value)| key.len() + value.len() + LABEL_BYTES).sum())
}

fn too_much() -> RecordError {
    let most = MAX_UNUSUAL_BYTES >> 20;
    RecordError::Decode {
        detail: format!("the catalog holds {most} MiB of attachments' names and labels at most"),
    }
}
