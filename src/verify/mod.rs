//! Verify: reads and checks everything, and reports what is damaged with the snapshots that need
//! it.

mod sample;

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet, hash_map};

use std::fmt;

use rayon::prelude::*;

use crate::codec::{self, Encoding};
use crate::error::Error;
use crate::hash::Hash;
use crate::progress::{Meter, Progress};
use crate::record::{Record, SnapshotId};
use crate::store::cursor::TRIES;
use crate::store::error::StoreError;
use crate::store::fact;
use crate::store::index::Index;
use crate::store::marks::Marks;
use crate::store::packs::location::{Location, Position};
use crate::store::packs::object::ObjectKind;
use crate::store::packs::pack::Pack;
use crate::store::packs::scan::Scanned;
use crate::store::read::{Check, Reader};
use crate::store::tables::{Layout, Tables};
use crate::store::tree::{self, Tree};
use crate::store::{OpenStore, Store};
use crate::sync::Mutex;

/// What to verify. The default is everything.
///
/// ```
/// use stillframe::verify::VerifyOptions;
/// use stillframe::{CaptureOptions, Store};
/// # let dir = tempfile::tempdir()?;
/// # let store = Store::options().create(dir.path().join("vault"))?;
/// let taken = store.process("web-1").capture(&vec![7; 1 << 20], &CaptureOptions::new())?;
/// let report = store.verify(&VerifyOptions::new().snapshots([taken.id]))?;
/// assert!(report.problems.is_empty() && report.checked_objects > 0);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct VerifyOptions {
    /// Verifies only what these snapshots need. Empty means everything.
    pub snapshots: Vec<SnapshotId>,
    /// Verifies only about this percentage of the objects, spread evenly over the store: an
    /// object's hash and a random number of this run decide whether it is in the sample. The sample
    /// has at least one region, one other object and one record, note or tombstone of each pack
    /// that has any.
    pub sample_percent: Option<u8>,
    /// Reports progress, and can cancel the verification, which does no harm. The unit is the byte
    /// of packs; each region of each snapshot adds 32 bytes for checking whether it exists.
    pub progress: Progress,
}

impl VerifyOptions {
    /// The default.
    pub fn new() -> Self {
        VerifyOptions::default()
    }

    /// Adds snapshots to which it is confined.
    pub fn snapshots(mut self, snapshots: impl IntoIterator<Item = SnapshotId>) -> Self {
        self.snapshots.extend(snapshots);
        self
    }

    /// Sets the size of a [sample](Self::sample_percent), or `None` for everything.
    pub fn sample_percent(mut self, percent: impl Into<Option<u8>>) -> Self {
        self.sample_percent = percent.into();
        self
    }

    /// Sets the receiver of progress, which can also cancel the call.
    pub fn progress(mut self, progress: Progress) -> Self {
        self.progress = progress;
        self
    }
}

/// The result of a verification.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
#[non_exhaustive]
pub struct VerifyReport {
    /// How many objects were read, decoded and compared with their hashes.
    pub checked_objects: u64,
    /// Their stored bytes, with their headers.
    pub checked_bytes: u64,
    /// How many objects there are in total, unneeded ones included.
    pub total_objects: u64,
    /// Their stored bytes, with their headers.
    pub total_bytes: u64,
    /// How many packs have a checked object.
    pub checked_packs: u64,
    /// How many packs there are.
    pub total_packs: u64,
    /// What is wrong.
    pub problems: Vec<Problem>,
}

/// Something that is wrong in a store.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
#[non_exhaustive]
pub struct Problem {
    /// What it concerns.
    #[serde(serialize_with = "crate::report::text")]
    pub kind: ProblemKind,
    /// The object's hash, or the file and offset.
    pub object: String,
    /// The snapshots that cannot be restored because of it. Empty if nothing needs it.
    #[serde(serialize_with = "crate::report::texts")]
    pub snapshots: Vec<SnapshotId>,
    /// What is wrong.
    pub detail: String,
}

/// What a [`Problem`] concerns. As text it is the [name](ObjectKind::name) of the object's kind, or
/// `pack`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ProblemKind {
    /// An object.
    Object(ObjectKind),
    /// A pack file, or bytes in it that are no object.
    Pack,
}

impl fmt::Display for ProblemKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            ProblemKind::Object(kind) => kind.name(),
            ProblemKind::Pack => "pack",
        })
    }
}

/// How many bytes of hashes a snapshot refers to.
fn referring_bytes(record: &Record) -> u64 {
    record.regions.saturating_mul(Hash::BYTES as u64)
}

/// How many objects are checked in parallel at a time.
const BATCH_OBJECTS: usize = 1024;

impl Store {
    /// Reads and checks the store, or a part of it.
    ///
    /// It removes damaged objects from the index, so that the next capture of the same memory
    /// stores them again.
    ///
    /// Cost: about 1 GB/s of stored bytes a core (AMD EPYC), and 8 bytes of memory for each region.
    ///
    /// # Examples
    ///
    /// ```
    /// use stillframe::{CaptureOptions, Store};
    ///
    /// # let dir = tempfile::tempdir()?;
    /// # let store = Store::options().create(dir.path().join("vault"))?;
    /// store.process("web-1").capture(&[7; 1 << 20], &CaptureOptions::default())?;
    /// let report = store.verify(&Default::default())?;
    /// assert!(report.problems.is_empty());
    /// assert_eq!(report.checked_objects, report.total_objects);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// If the store cannot be read at all. Damage is not an error: it is in the report.
    pub fn verify(&self, options: &VerifyOptions) -> Result<VerifyReport, Error> {
        let shared = &**self.shared();
        shared.check_process()?;
        shared.sync()?;
        shared.settle_all();
        let findings_before = shared.damage_findings();
        let verification = Verification {
            shared,
            checked: Mutex::default(),
            total: Mutex::default(),
            problems: Mutex::default(),
            damaged: Mutex::default(),
        };
        // A sample of 100 % also covers what the index does not know.
        let sample_percent = options.sample_percent.filter(|percent| *percent < 100);
        let everything = options.snapshots.is_empty() && sample_percent.is_none();
        if let Some(percent) = sample_percent {
            verification.lost();
            verification.sample(percent, &options.progress)?;
        } else if everything {
            verification.everything(&options.progress)?;
        } else {
            verification.snapshots(&options.snapshots, &options.progress)?;
        }
        let report = verification.report();
        if everything && report.problems.is_empty() && shared.damage_known() {
            // The damaged objects were removed, but not the deltas that refer to them.
            shared.index().set_may_have_dangling(true)?;
            shared.drop_dangling()?;
            shared.no_damage_since(findings_before);
        }
        Ok(report)
    }
}

/// What a problem concerns.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Subject {
    Object(ObjectKind, Hash),
    Bytes { pack: String, offset_bytes: u64 },
}

/// What was read, decoded and compared with its hash.
#[derive(Default)]
struct Checked {
    objects: u64,
    bytes: u64,
    packs: BTreeSet<u32>,
}

/// A verification in progress.
struct Verification<'a> {
    shared: &'a OpenStore,
    checked: Mutex<Checked>,
    /// How many objects there are, and how many bytes they take.
    total: Mutex<(u64, u64)>,
    problems: Mutex<BTreeMap<Subject, (String, BTreeSet<SnapshotId>)>>,
    /// Bytes in packs that are not intact objects.
    damaged: Mutex<Vec<(Position, u64)>>,
}

/// The objects that are known to be intact: those that are marked and are not in `others`.
struct Intact {
    regions: Marks,
    objects: Marks,
    /// Objects of which a second copy may be intact, but to whose damaged copy the index refers.
    others: HashSet<(Tree, Hash)>,
}

impl Intact {
    fn contains(&self, tree: Tree, hash: &Hash) -> bool {
        let marks = if tree == Tree::Regions { &self.regions } else { &self.objects };
        marks.is_marked(hash) && !self.others.contains(&(tree, *hash))
    }
}

impl<'a> Verification<'a> {
    fn report(self) -> VerifyReport {
        let checked = std::mem::take(&mut *self.checked.lock());
        let (total_objects, total_bytes) = *self.total.lock();
        let problems = std::mem::take(&mut *self.problems.lock());
        let problems = problems
            .into_iter()
            .map(|(subject, (detail, snapshots))| {
                let (kind, object) = match subject {
                    Subject::Object(kind, hash) => (ProblemKind::Object(kind), hash.to_string()),
                    Subject::Bytes { pack, offset_bytes } => {
                        (ProblemKind::Pack, format!("{pack} at byte {offset_bytes}"))
                    }
                };
                Problem { kind, object, snapshots: snapshots.into_iter().collect(), detail }
            })
            .collect();
        VerifyReport {
            checked_objects: checked.objects,
            checked_bytes: checked.bytes,
            total_objects,
            total_bytes,
            checked_packs: checked.packs.len() as u64,
            total_packs: self.shared.log.packs().len().max(checked.packs.len()) as u64,
            problems,
        }
    }

    fn count(&self, location: Location) {
        let mut checked = self.checked.lock();
        checked.objects += 1;
        checked.bytes += location.object_bytes();
        checked.packs.insert(location.pack);
    }

    fn problem(&self, subject: Subject, detail: String, snapshot: Option<SnapshotId>) {
        let mut problems = self.problems.lock();
        let problem = problems.entry(subject).or_insert_with(|| (detail, BTreeSet::new()));
        problem.1.extend(snapshot);
    }

    /// Checks every object in every pack, then every reference of every snapshot.
    fn everything(&self, progress: &Progress) -> Result<(), Error> {
        let index = self.shared.index();
        let (regions, objects) = (Marks::of(index, Tree::Regions)?, Marks::of(index, Tree::Objects)?);
        let mut intact = Intact { regions, objects, others: HashSet::new() };
        let packs = self.shared.log.packs();
        let packs_bytes: u64 = packs.iter().map(|pack| pack.length_bytes() - pack.header_bytes()).sum();
        let records: Vec<u64> =
            self.shared.catalog().all_live().map(|(_, entry)| referring_bytes(&entry.record())).collect();
        let meter = progress.begin(packs_bytes + records.iter().sum::<u64>());
        // A repair may have set them aside.
        for (name, why) in self.shared.unusable.iter().filter(|(name, _)| name.exists()) {
            let pack = name.name().to_string_lossy().into_owned();
            self.problem(Subject::Bytes { pack, offset_bytes: 0 }, why.clone(), None);
        }
        self.lost();
        for pack in packs {
            self.pack(&pack, &mut intact, &meter)?;
        }
        self.drop_damaged(index, &mut intact)?;
        let snapshots: Vec<SnapshotId> = self.shared.catalog().all_live().map(|(id, _)| *id).collect();
        self.references(&snapshots, &intact, &meter)
    }

    /// Reports the packs that are known to be lost.
    fn lost(&self) {
        for lost in &self.shared.lost {
            let subject = || {
                let (pack, offset_bytes) = (lost.file_name(), lost.found_bytes.unwrap_or(0));
                Subject::Bytes { pack, offset_bytes }
            };
            self.problem(subject(), lost.why(), None);
            lost.snapshots.iter().for_each(|id| self.problem(subject(), String::new(), Some(*id)));
        }
    }

    fn pack(&self, pack: &Pack, intact: &mut Intact, meter: &Meter) -> Result<(), Error> {
        let bytes = pack.bytes(pack.length_bytes())?;
        let mut scan = pack.scan(&bytes, pack.header_bytes());
        let mut at_bytes = pack.header_bytes();
        loop {
            let batch: Vec<Scanned<'_>> = scan.by_ref().take(BATCH_OBJECTS).collect::<Result<_, _>>()?;
            if batch.is_empty() {
                return Ok(());
            }
            let reader = || Reader::new(self.shared, Check::Full);
            let good: Vec<Option<(Tree, Hash)>> = batch
                .par_iter()
                .map_init(reader, |reader, scanned| self.scanned(pack, scanned, reader))
                .collect::<Result<_, _>>()?;
            for (tree, hash) in good.into_iter().flatten() {
                match tree {
                    Tree::Regions => intact.regions.mark(&hash),
                    Tree::Objects => intact.objects.mark(&hash),
                };
            }
            let end_bytes = batch.last().map_or(at_bytes, Scanned::end_bytes);
            let mut total = self.total.lock();
            total.0 += batch.len() as u64;
            total.1 += end_bytes - at_bytes;
            drop(total);
            meter.advance(end_bytes - at_bytes)?;
            at_bytes = end_bytes;
        }
    }

    /// Checks one object. Returns its tree and hash if it is intact.
    fn scanned(
        &self,
        pack: &Pack,
        scanned: &Scanned<'_>,
        reader: &mut Reader<'_>,
    ) -> Result<Option<(Tree, Hash)>, StoreError> {
        let (offset_bytes, end_bytes, header, why) = match scanned {
            Scanned::Damaged { offset_bytes, end_bytes, header, why } => {
                (*offset_bytes, *end_bytes, *header, (*why).to_owned())
            }
            Scanned::Object { offset_bytes, header, payload } => {
                let location = Location::new(pack.number, *offset_bytes, header);
                self.count(location);
                let why = match header.encoding {
                    _ if tree::indexed(header).is_none() => match fact::read(header, payload, location) {
                        Ok(_) => return Ok(None),
                        Err(why) => why,
                    },
                    Encoding::Delta => match reader.check_at(header.kind, &header.hash, location) {
                        Ok(_) => return Ok(tree::indexed(header)),
                        Err(error) if !error.is_damage() => return Err(error),
                        // This object itself is not damaged. Whether anything needs it is checked
                        // later.
                        Err(StoreError::Base { .. }) => return Ok(None),
                        Err(StoreError::Damaged { detail, .. }) => detail,
                        Err(error) => error.to_string(),
                    },
                    encoding => {
                        let mut plain = vec![0; header.plain_bytes as usize];
                        match codec::decode(encoding, payload, &mut plain) {
                            Ok(()) if Hash::of(&plain) == header.hash => return Ok(tree::indexed(header)),
                            Ok(()) => "its bytes do not match its hash".to_owned(),
                            Err(error) => error.to_string(),
                        }
                    }
                };
                (*offset_bytes, location.end_bytes(), Some(*header), why)
            }
        };
        let subject = match header {
            Some(header) => Subject::Object(header.kind, header.hash),
            None => {
                let pack = pack.name.name().to_string_lossy().into_owned();
                Subject::Bytes { pack, offset_bytes }
            }
        };
        let record =
            header.filter(|header| header.kind == ObjectKind::Record).map(|header| SnapshotId(header.hash));
        self.problem(subject, format!("in pack {} at byte {offset_bytes}: {why}", pack.number), record);
        self.damaged.lock().push((Position { pack: pack.number, offset_bytes }, end_bytes));
        Ok(None)
    }

    /// Removes from the index the objects that lie in damaged bytes.
    fn drop_damaged(&self, index: &Index, intact: &mut Intact) -> Result<(), Error> {
        let mut damaged = std::mem::take(&mut *self.damaged.lock());
        if damaged.is_empty() {
            return Ok(());
        }
        damaged.sort_unstable();
        for tree in Tree::ALL {
            for entry in index.entries(tree) {
                let (hash, location) = entry?;
                let at = Position::from(location);
                let before = damaged[..damaged.partition_point(|(start, _)| *start <= at)].last();
                let hit = before.is_some_and(|(start, end)| start.pack == at.pack && at.offset_bytes < *end);
                if hit {
                    intact.others.insert((tree, hash));
                    self.shared.forget_damaged(tree, &hash, location);
                }
            }
        }
        Ok(())
    }

    /// Checks whether everything to which the snapshots refer is intact.
    fn references(&self, snapshots: &[SnapshotId], intact: &Intact, meter: &Meter) -> Result<(), Error> {
        let mut reader = Reader::new(self.shared, Check::Full);
        let mut second_reader = Reader::new(self.shared, Check::Full);
        // An object that the scan did not find whole may have been stored or moved since, so the
        // index is asked. And a delta that was whole may have lost its base since: the damage in
        // the base was hidden by a run of the delta, and the base was then removed.
        let may_lack_its_base = |tree, hash: &Hash| -> Result<bool, StoreError> {
            Ok(!intact.others.is_empty()
                && self.shared.locate(tree, hash)?.is_some_and(|location| location.is_delta()))
        };
        let mut is_lost = |kind, hash: &Hash| -> Result<bool, StoreError> {
            let tree = Tree::of(kind);
            Ok(!hash.is_zero()
                && (!intact.contains(tree, hash) || may_lack_its_base(tree, hash)?)
                && self.object(kind, hash, &mut second_reader)?.is_some())
        };
        // The damage in the tables seen so far; most have none. A table with the right number of
        // regions for one place is wrong for a place with another number.
        let mut tables: HashMap<(Hash, usize), Vec<Hash>> = HashMap::new();
        let mut fine: HashSet<(Hash, usize)> = HashSet::new();
        for id in snapshots {
            let Ok(pinned) = self.shared.pin(*id) else { continue };
            let record = pinned.record();
            self.record(*id, &mut reader)?;
            let missing = |kind, hash| self.missing(kind, hash, *id);
            for attachment in &record.attachments {
                if is_lost(ObjectKind::Attachment, &attachment.hash)? {
                    missing(ObjectKind::Attachment, attachment.hash);
                }
            }
            let both = self.tables((*id, record), &mut reader, &mut |kind, hash| {
                if is_lost(kind, &hash)? {
                    missing(kind, hash);
                }
                Ok(())
            })?;
            let Some(tables_of_it) = both else {
                meter.advance(referring_bytes(record))?;
                continue;
            };
            let mut left_bytes = referring_bytes(record);
            for (table, place) in tables_of_it.iter() {
                let table_bytes = (place.regions as u64 * Hash::BYTES as u64).min(left_bytes);
                left_bytes -= table_bytes;
                meter.advance(table_bytes)?;
                let as_placed = (table, place.regions);
                if fine.contains(&as_placed) {
                    continue;
                }
                if is_lost(ObjectKind::Table, &table)? {
                    missing(ObjectKind::Table, table);
                    continue;
                }
                if let hash_map::Entry::Vacant(unseen) = tables.entry(as_placed) {
                    let hashes = reader.hashes(ObjectKind::Table, &table, place.regions);
                    let Some(hashes) = self.unless_malformed(*id, (ObjectKind::Table, table), hashes)? else {
                        continue;
                    };
                    let mut lost = Vec::new();
                    for hash in hashes {
                        if is_lost(ObjectKind::Region, &hash)? {
                            lost.push(hash);
                        }
                    }
                    if lost.is_empty() {
                        fine.insert(as_placed);
                        continue;
                    }
                    unseen.insert(lost);
                }
                for hash in tables.get(&as_placed).into_iter().flatten() {
                    missing(ObjectKind::Region, *hash);
                }
            }
            // Tables of zeros need nothing.
            meter.advance(left_bytes)?;
        }
        Ok(())
    }

    /// Checks the record in its pack. The index has it too, but if the index were lost, so would be
    /// the record.
    fn record(&self, id: SnapshotId, reader: &mut Reader<'_>) -> Result<(), StoreError> {
        for _ in 0..TRIES {
            let location = self.shared.catalog().live(&id).map(|entry| entry.location);
            let Some(location) = location else { return Ok(()) };
            match reader.check_at(ObjectKind::Record, &id.0, location) {
                Ok(false) => continue,
                Ok(true) => {}
                Err(error) if !error.is_damage() => return Err(error),
                Err(error) => {
                    self.problem(Subject::Object(ObjectKind::Record, id.0), error.to_string(), Some(id));
                }
            }
            break;
        }
        Ok(())
    }

    /// The tables of a record, if they can be read.
    fn tables(
        &self,
        (id, record): (SnapshotId, &Record),
        reader: &mut Reader<'_>,
        look_at: &mut dyn FnMut(ObjectKind, Hash) -> Result<(), StoreError>,
    ) -> Result<Option<Tables>, Error> {
        look_at(ObjectKind::Layout, record.layout)?;
        if !record.root.is_zero() {
            look_at(ObjectKind::Root, record.root)?;
        }
        let layout = Layout::read(reader, record);
        let layout = self.unless_malformed(id, (ObjectKind::Layout, record.layout), layout)?;
        let Some(layout) = layout else { return Ok(None) };
        let root = layout.root(reader, record);
        let root = self.unless_malformed(id, (ObjectKind::Root, record.root), root)?;
        Ok(root.map(|root| Tables { layout, root }))
    }

    /// The result of reading an object that a snapshot needs. `None` if the object is damaged,
    /// which is reported elsewhere, or if it is whole but malformed, which is reported here.
    fn unless_malformed<T>(
        &self,
        id: SnapshotId,
        (kind, hash): (ObjectKind, Hash),
        read: Result<T, StoreError>,
    ) -> Result<Option<T>, Error> {
        match read {
            Ok(value) => Ok(Some(value)),
            Err(error @ (StoreError::Malformed { .. } | StoreError::Record { .. })) => {
                self.problem(Subject::Object(kind, hash), error.whole_story(), Some(id));
                Ok(None)
            }
            Err(error) if error.is_damage() => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    fn missing(&self, kind: ObjectKind, hash: Hash, snapshot: SnapshotId) {
        self.problem(Subject::Object(kind, hash), "it is missing".to_owned(), Some(snapshot));
        self.shared.note_damage();
    }

    /// Checks everything that the named snapshots need, each object once.
    fn snapshots(&self, snapshots: &[SnapshotId], progress: &Progress) -> Result<(), Error> {
        let mut total_bytes = 0u64;
        for id in snapshots {
            total_bytes = total_bytes.saturating_add(self.shared.record(*id)?.memory_bytes);
        }
        let meter = progress.begin(total_bytes);
        self.take_stock(&mut |_, _| Ok(()))?;
        // Every table that was checked, with what is wrong with it.
        let mut seen: HashMap<(Hash, usize), Vec<(ObjectKind, Hash)>> = HashMap::new();
        for id in snapshots {
            let pinned = self.shared.pin(*id)?;
            let record = pinned.record();
            let mut reader = Reader::new(self.shared, Check::Full);
            self.record(*id, &mut reader)?;
            let mut wrong: Vec<(ObjectKind, Hash)> = Vec::new();
            for attachment in record.attachments.iter().filter(|attachment| !attachment.hash.is_zero()) {
                wrong.extend(self.object(ObjectKind::Attachment, &attachment.hash, &mut reader)?);
            }
            let mut first_reader = Reader::new(self.shared, Check::Full);
            let both = self.tables((*id, record), &mut reader, &mut |kind, hash| {
                wrong.extend(self.object(kind, &hash, &mut first_reader)?);
                Ok(())
            })?;
            let placed: Vec<((Hash, usize), u64)> = both
                .unwrap_or_default()
                .iter()
                .map(|(table, place)| ((table, place.regions), place.length_bytes as u64))
                .collect();
            let new: HashMap<(Hash, usize), u64> =
                placed.iter().copied().filter(|(table, _)| !seen.contains_key(table)).collect();
            let checked = new
                .into_par_iter()
                .map_init(
                    || Reader::new(self.shared, Check::Full),
                    |reader, ((table, regions), length_bytes)| {
                        let mut wrong: Vec<(ObjectKind, Hash)> =
                            self.object(ObjectKind::Table, &table, reader)?.into_iter().collect();
                        if wrong.is_empty() {
                            let hashes = reader.hashes(ObjectKind::Table, &table, regions);
                            match self.unless_malformed(*id, (ObjectKind::Table, table), hashes)? {
                                None => wrong.push((ObjectKind::Table, table)),
                                Some(hashes) => {
                                    for hash in hashes {
                                        wrong.extend(self.object(ObjectKind::Region, &hash, reader)?);
                                    }
                                }
                            }
                        }
                        meter.advance(length_bytes)?;
                        Ok(((table, regions), wrong))
                    },
                )
                .collect::<Result<Vec<_>, Error>>()?;
            seen.extend(checked);
            wrong.extend(placed.iter().filter_map(|(table, _)| seen.get(table)).flatten());
            for (kind, hash) in wrong {
                self.missing(kind, hash, *id);
            }
        }
        Ok(())
    }

    /// Checks one object, wherever it is, and reports what is wrong with it. Returns its kind and
    /// hash if it is not intact. If it cannot be read, that is an error, which says nothing about
    /// the stored bytes.
    fn object(
        &self,
        kind: ObjectKind,
        hash: &Hash,
        reader: &mut Reader<'_>,
    ) -> Result<Option<(ObjectKind, Hash)>, StoreError> {
        if hash.is_zero() {
            return Ok(None);
        }
        let tree = Tree::of(kind);
        for _ in 0..TRIES {
            let Some(location) = self.shared.locate(tree, hash)? else { break };
            match reader.check_at(kind, hash, location) {
                Ok(false) => continue,
                Ok(true) => {
                    self.count(location);
                    return Ok(None);
                }
                Err(error) if !error.is_damage() => return Err(error),
                Err(error) => {
                    self.count(location);
                    self.shared.forget_culprit(&error);
                    self.problem(Subject::Object(kind, *hash), error.whole_story(), None);
                    if let Some((kind, culprit, _)) =
                        error.culprit().filter(|(_, culprit, _)| culprit != hash)
                    {
                        self.problem(Subject::Object(kind, culprit), error.whole_story(), None);
                    }
                    break;
                }
            }
        }
        Ok(Some((kind, *hash)))
    }
}
