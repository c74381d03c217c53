//! History: the content of a range of addresses, snapshot by snapshot, without restoring any.
//!
//! Each snapshot is compared with the one before it and read only where they differ: the layout
//! locates the range, the root locates its tables, and a table its regions. A region is decoded
//! only if its hash changed.

use std::collections::HashMap;
use std::sync::Arc;

use jiff::Timestamp;

use crate::error::{Error, ReadError};
use crate::hash::Hash;
use crate::record::{Record, SnapshotId};
use crate::snapshot::Snapshot;
use crate::store::Store;
use crate::store::error::StoreError;
use crate::store::packs::object::ObjectKind;
use crate::store::read::{Check, Reader};
use crate::store::tables::Layout;
use crate::units::{AddressRange, UnitError, usize_of};

/// The longest range whose history can be requested, in bytes: each change is held in memory.
const MAX_RANGE_BYTES: u64 = 1 << 20;

/// A snapshot at which the bytes changed.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
#[non_exhaustive]
pub struct Moment {
    /// The snapshot.
    #[serde(serialize_with = "crate::report::text")]
    pub id: SnapshotId,
    /// When it was taken.
    #[serde(serialize_with = "crate::report::text")]
    pub time: Timestamp,
    /// The bytes from then on; `None` if the range is not entirely captured memory from then on.
    #[serde(serialize_with = "crate::report::optional_hex")]
    pub bytes: Option<Vec<u8>>,
}

/// The snapshots at which the bytes changed, oldest first. It reads while it is iterated; gc does
/// not remove its snapshots meanwhile.
pub struct History<'a> {
    steps: std::vec::IntoIter<Step<'a>>,
    roots: Reader<'a>,
    tables: Reader<'a>,
    regions: Reader<'a>,
    seen: Seen,
}

/// One snapshot.
struct Step<'a> {
    snapshot: Snapshot<'a>,
    place: Arc<RangePlace>,
}

/// The position of the range in a layout.
struct RangePlace {
    /// How many tables the root lists.
    tables: usize,
    /// The parts of the range, one for each region; an error if the range is not captured entirely.
    parts: Result<Vec<Part>, AddressRange>,
}

/// A part of the range that lies in one region.
#[derive(Clone, Copy)]
struct Part {
    /// The index in the root of the table that has the region, and how many regions that table has.
    table: usize,
    table_regions: usize,
    /// The index of the region in the table, and the region's size.
    region: usize,
    region_bytes: usize,
    /// The position of the part in the region.
    start: usize,
    end: usize,
}

/// What the last readable snapshot held.
#[derive(Default)]
struct Seen {
    root: Option<(Hash, Arc<RangePlace>)>,
    tables: HashMap<Hash, Vec<Hash>>,
    /// For each part: the region's hash, and the position of the part in the region.
    regions: Vec<(Hash, usize, usize)>,
    bytes: Option<Vec<u8>>,
}

impl Store {
    /// Each snapshot of a process at which the bytes at these addresses changed, and the bytes
    /// after the change. The first item is the first snapshot that has the range. The next items
    /// are the snapshots in which the bytes differ from before, or in which the range is no longer
    /// captured entirely. Excluded or unreadable memory counts as zeros, as in a restore.
    ///
    /// Cost (AMD EPYC, 2 cores): half a microsecond for each snapshot whose memory equals that of
    /// the one before. For any other snapshot it reads the root, a few microseconds, and the tables
    /// and regions of the range that changed. Each layout is read once.
    ///
    /// ```
    /// use stillframe::{CaptureOptions, Store};
    /// # let dir = tempfile::tempdir()?;
    /// # let store = Store::options().create(dir.path().join("vault"))?;
    /// let mut memory = vec![0u8; 1 << 20];
    /// for count in [1, 1, 2] {
    ///     memory[5000] = count;
    ///     store.process("web-1").capture(&memory, &CaptureOptions::default())?;
    /// }
    /// let range = "5000..5002".parse()?;
    /// let moments: Vec<_> = store.history("web-1", range)?.collect::<Result<_, _>>()?;
    /// assert_eq!(moments.len(), 2);
    /// assert_eq!(moments[1].bytes.as_deref(), Some(&[2, 0][..]));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`UnitError::RangeTooLong`] for more than 1 MiB; [`StoreError::NoSuchProcess`];
    /// [`ReadError::NotCaptured`] if no snapshot has the whole range; damage of a layout. Other
    /// damage is returned as an item, and the history continues after it.
    pub fn history(&self, process: &str, range: AddressRange) -> Result<History<'_>, Error> {
        if range.length_bytes() > MAX_RANGE_BYTES {
            let found_bytes = range.length_bytes();
            return Err(UnitError::RangeTooLong { found_bytes, most_bytes: MAX_RANGE_BYTES }.into());
        }
        let shared = &**self.shared();
        shared.check_process()?;
        let reader = || Reader::new(shared, Check::Full);
        let mut layouts = reader();
        let mut places: HashMap<Hash, Arc<RangePlace>> = HashMap::new();
        let mut steps = Vec::new();
        for snapshot in self.snapshots_of(process) {
            let layout = snapshot.record().layout;
            let place = match places.get(&layout) {
                Some(place) => place.clone(),
                None => {
                    let read = Layout::read(&mut layouts, snapshot.record())?;
                    let place = Arc::new(RangePlace::new(&read, snapshot.record(), range)?);
                    places.insert(layout, place.clone());
                    place
                }
            };
            steps.push(Step { snapshot, place });
        }
        let Some(newest) = steps.last() else {
            return Err(StoreError::no_such_process(process).into());
        };
        if let Err(missing) = newest.place.parts
            && steps.iter().all(|step| step.place.parts.is_err())
        {
            return Err(ReadError::NotCaptured { missing }.into());
        }
        let steps = steps.into_iter();
        let (roots, tables, regions) = (reader(), reader(), reader());
        Ok(History { steps, roots, tables, regions, seen: Seen::default() })
    }
}

impl RangePlace {
    fn new(layout: &Layout, record: &Record, range: AddressRange) -> Result<RangePlace, Error> {
        let region_bytes = record.region_size.bytes();
        let mut next = range.start();
        let mut parts = Vec::new();
        let Layout { space, places } = layout;
        for table in places.overlapping(range) {
            let Some(place) = places.get(table) else { break };
            let addresses = place.addresses(space)?;
            let Some(shared) = addresses.intersection(range) else { continue };
            if shared.start() != next {
                break;
            }
            next = shared.end();
            let offset = |address: u64| usize_of(address - addresses.start());
            let (from, to) = (offset(shared.start()), offset(shared.end()));
            parts.extend((from / region_bytes..to.div_ceil(region_bytes)).map(|region| {
                let first = region * region_bytes;
                Part {
                    table,
                    table_regions: place.regions,
                    region,
                    region_bytes: region_bytes.min(place.length_bytes - first),
                    start: from.max(first) - first,
                    end: to.min(first + region_bytes) - first,
                }
            }));
        }
        let parts = if next == range.end() { Ok(parts) } else { Err(AddressRange::new(next, range.end())?) };
        Ok(RangePlace { tables: places.count(), parts })
    }
}

impl History<'_> {
    /// Reads the next snapshot, and returns whether the bytes differ from the last ones.
    fn look(&mut self, record: &Record, place: &Arc<RangePlace>) -> Result<bool, Error> {
        let Ok(parts) = &place.parts else {
            let is_gone = self.seen.bytes.is_some();
            self.seen = Seen::default();
            return Ok(is_gone);
        };
        if let Some((root, before)) = &self.seen.root
            && *root == record.root
            && Arc::ptr_eq(before, place)
        {
            return Ok(false);
        }
        let root = self.roots.root(&record.root, place.tables)?;
        let mut tables = HashMap::new();
        let mut regions = Vec::with_capacity(parts.len());
        for part in parts {
            let table = root.get(part.table);
            let hashes = match tables.entry(table) {
                std::collections::hash_map::Entry::Occupied(entry) => entry.into_mut(),
                std::collections::hash_map::Entry::Vacant(entry) => {
                    entry.insert(match self.seen.tables.get(&table) {
                        Some(hashes) if hashes.len() == part.table_regions => hashes.clone(),
                        _ => self.tables.hashes(ObjectKind::Table, &table, part.table_regions)?,
                    })
                }
            };
            let hash: Option<&Hash> = hashes.get(part.region);
            regions.push((hash.copied().unwrap_or(Hash::ZERO), part.start, part.end));
        }
        let bytes = if regions == self.seen.regions { None } else { Some(self.bytes(parts, &regions)?) };
        let is_new = bytes.is_some() && bytes != self.seen.bytes;
        let bytes = bytes.or_else(|| self.seen.bytes.take());
        self.seen = Seen { root: Some((record.root, place.clone())), tables, regions, bytes };
        Ok(is_new)
    }

    /// The bytes of the range. Bytes of regions that did not change are copied from the last
    /// snapshot.
    fn bytes(&mut self, parts: &[Part], regions: &[(Hash, usize, usize)]) -> Result<Vec<u8>, Error> {
        let mut bytes = Vec::new();
        let mut plain = Vec::new();
        // The position of the part with the same number in the last snapshot. It differs if the
        // mapping has moved.
        let mut before_at = 0;
        for (at, (part, region)) in parts.iter().zip(regions).enumerate() {
            let before = self.seen.regions.get(at).copied();
            let before_bytes = before.map_or(0, |(_, start, end)| end - start);
            let range = before_at..before_at + before_bytes;
            before_at = range.end;
            let seen = self.seen.bytes.as_ref().filter(|_| before == Some(*region));
            if let Some(same) = seen.and_then(|seen| seen.get(range)) {
                bytes.extend_from_slice(same);
                continue;
            }
            plain.clear();
            plain.resize(part.region_bytes, 0);
            if !region.0.is_zero() {
                self.regions.region(&region.0, &mut plain)?;
            }
            bytes.extend_from_slice(&plain[part.start..part.end]);
        }
        Ok(bytes)
    }
}

impl Iterator for History<'_> {
    type Item = Result<Moment, Error>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            let step = self.steps.next()?;
            let record = step.snapshot.record();
            match self.look(record, &step.place) {
                Ok(false) => {}
                Ok(true) => {
                    let (id, time) = (step.snapshot.id(), record.time);
                    return Some(Ok(Moment { id, time, bytes: self.seen.bytes.clone() }));
                }
                Err(error) => return Some(Err(error)),
            }
        }
    }
}

impl std::fmt::Debug for History<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("History").field("snapshots_left", &self.steps.len()).finish_non_exhaustive()
    }
}
