//! Snapshots: finding, reading and labelling them.

use std::io::Write;

use jiff::Timestamp;

use crate::address_space::AddressSpace;
use crate::error::{Error, ReadError};
use crate::hash::Hash;
use crate::record::{Record, SnapshotId};
use crate::store::catalog::{Entry, Labels};
use crate::store::error::StoreError;
use crate::store::packs::object::ObjectKind;
use crate::store::pinned::Pinned;
use crate::store::read::{Check, Reader};
use crate::store::tables::{Layout, Tables};
use crate::store::{OpenStore, Store};
use crate::table::Place;
use crate::units::{AddressRange, usize_of};

/// The shortest prefix that identifies a snapshot, in hex digits.
const MIN_PREFIX_DIGITS: usize = 4;

/// A snapshot in a store. While this value exists, gc does not remove the snapshot, even if it is
/// forgotten.
///
/// ```
/// use stillframe::{CaptureOptions, Store};
/// # let dir = tempfile::tempdir()?;
/// # let store = Store::options().create(dir.path().join("vault"))?;
/// let taken = store.process("web-1").capture(&vec![7; 1 << 20], &CaptureOptions::new())?;
/// let snapshot = store.snapshot(taken.id)?;
/// let mut bytes = Vec::new();
/// snapshot.read_range("100..104".parse()?, &mut bytes)?;
/// assert_eq!((snapshot.process(), &bytes[..]), ("web-1", &[7; 4][..]));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct Snapshot<'a> {
    shared: &'a OpenStore,
    pinned: Pinned,
    labels: Labels,
}

/// A summary of a process and its snapshots.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
#[non_exhaustive]
pub struct ProcessSummary {
    /// Its name.
    pub process: String,
    /// How many snapshots it has.
    pub snapshots: usize,
    /// Its newest snapshot.
    #[serde(serialize_with = "crate::report::text")]
    pub latest: SnapshotId,
    /// When its newest snapshot was taken.
    #[serde(serialize_with = "crate::report::text")]
    pub latest_time: Timestamp,
}

impl Store {
    /// All snapshots, oldest first. Cost (AMD EPYC, 2 cores): about a microsecond each, and another
    /// one when its record is read. In a process that was forked from the one that opened the
    /// store, the list is empty, and the log says so.
    pub fn snapshots(&self) -> Vec<Snapshot<'_>> {
        let shared = &**self.shared();
        if shared.is_elsewhere() {
            return Vec::new();
        }
        let catalog = shared.catalog();
        let snapshot = |id| Some(Snapshot::new(shared, id, catalog.live(&id)?));
        catalog.in_order().into_iter().filter_map(snapshot).collect()
    }

    /// The snapshots of one process, oldest first.
    pub(crate) fn snapshots_of(&self, process: &str) -> Vec<Snapshot<'_>> {
        let shared = &**self.shared();
        if shared.is_elsewhere() {
            return Vec::new();
        }
        let catalog = shared.catalog();
        let snapshot = |id| Some(Snapshot::new(shared, id, catalog.live(&id)?));
        catalog.of_process(process).filter_map(snapshot).collect()
    }

    /// One snapshot.
    ///
    /// # Errors
    ///
    /// [`StoreError::NoSuchSnapshot`].
    pub fn snapshot(&self, id: SnapshotId) -> Result<Snapshot<'_>, Error> {
        let shared = &**self.shared();
        shared.check_process()?;
        let catalog = shared.catalog();
        let entry = catalog.live(&id).ok_or_else(|| StoreError::NoSuchSnapshot { text: id.to_string() })?;
        Ok(Snapshot::new(shared, id, entry))
    }

    /// All processes that have snapshots, by name.
    pub fn processes(&self) -> Vec<ProcessSummary> {
        if self.shared().is_elsewhere() {
            return Vec::new();
        }
        let catalog = self.shared().catalog();
        let summary = |process: &str| {
            let latest = catalog.of_process(process).next_back()?;
            Some(ProcessSummary {
                process: process.to_owned(),
                snapshots: catalog.of_process(process).count(),
                latest,
                latest_time: catalog.live(&latest)?.held().time(),
            })
        };
        catalog.processes().filter_map(summary).collect()
    }

    /// The snapshot that `text` names: a full id, a unique prefix of at least 4 hex digits,
    /// `PROCESS@latest`, `PROCESS~N` (N before the latest), or `latest` of all.
    ///
    /// # Errors
    ///
    /// [`StoreError::NoSuchSnapshot`], [`StoreError::NoSuchProcess`] if no snapshot is of
    /// `PROCESS`, [`StoreError::AmbiguousPrefix`], and [`StoreError::BadSnapshotName`] for a text
    /// of none of these forms.
    pub fn find(&self, text: &str) -> Result<SnapshotId, Error> {
        self.shared().check_process()?;
        let catalog = self.shared().catalog();
        let none = || StoreError::NoSuchSnapshot { text: text.to_owned() };
        if text == "latest" {
            return Ok(catalog.newest().map(|(_, id)| id).ok_or_else(none)?);
        }
        if let Some(process) = text.strip_suffix("@latest") {
            let latest = catalog.of_process(process).next_back();
            return Ok(latest.ok_or_else(|| StoreError::no_such_process(process))?);
        }
        if let Some((process, back)) = text.rsplit_once('~')
            && let Ok(back) = back.parse()
        {
            let mut newest_first = catalog.of_process(process).rev().peekable();
            if newest_first.peek().is_none() {
                return Err(StoreError::no_such_process(process).into());
            }
            return Ok(newest_first.nth(back).ok_or_else(none)?);
        }
        let bad =
            |why| Error::from(StoreError::BadSnapshotName { text: text.chars().take(80).collect(), why });
        if text.is_empty() || !text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return Err(bad("expected an id in hex, PROCESS@latest, PROCESS~N or latest"));
        }
        if text.len() < MIN_PREFIX_DIGITS {
            return Err(bad("a prefix of an id has at least 4 hex digits"));
        }
        if text.len() > 2 * Hash::BYTES {
            return Err(bad("an id has 64 hex digits, this has more"));
        }
        let bound = |filler: &str| {
            format!("{text}{}", filler.repeat(2 * Hash::BYTES - text.len())).parse::<SnapshotId>()
        };
        let candidates: Vec<SnapshotId> = catalog.live_between(bound("0")?, bound("f")?).copied().collect();
        match candidates[..] {
            [] => Err(none().into()),
            [id] => Ok(id),
            _ => Err(StoreError::AmbiguousPrefix { prefix: text.to_owned(), candidates }.into()),
        }
    }
}

impl<'a> Snapshot<'a> {
    /// The caller must hold the catalog's lock, so that the snapshot is live when it is pinned.
    fn new(shared: &'a OpenStore, id: SnapshotId, entry: &Entry) -> Snapshot<'a> {
        let pinned = Pinned::new(&shared.gate, id, entry.held());
        Snapshot { shared, pinned, labels: entry.labels().clone() }
    }

    /// Its id.
    pub fn id(&self) -> SnapshotId {
        self.pinned.id()
    }

    /// Its process.
    pub fn process(&self) -> &str {
        self.pinned.held().process()
    }

    /// When it was taken. With [`process`](Self::process), this is the cheapest property to read.
    pub fn time(&self) -> Timestamp {
        self.pinned.held().time()
    }

    /// Its record. It is decoded at the first request, and kept: 1 KB.
    pub fn record(&self) -> &Record {
        self.pinned.record()
    }

    /// Its labels at the time when this value was made.
    pub fn labels(&self) -> &Labels {
        &self.labels
    }

    /// Its mappings. Reads the layout.
    ///
    /// # Errors
    ///
    /// Damage.
    pub fn address_space(&self) -> Result<AddressSpace, Error> {
        Ok(Layout::read(&mut self.reader(), self.record())?.space)
    }

    /// Every region of the snapshot in address order: its address range and its hash, which is
    /// [`Hash::ZERO`] for a region of zeros. Reads all tables, one at a time, as the iterator
    /// reaches them.
    ///
    /// # Errors
    ///
    /// Damage: of the layout or the root at once, of a table as an item.
    pub fn regions(&self) -> Result<impl Iterator<Item = Result<(AddressRange, Hash), Error>> + '_, Error> {
        let region_bytes = self.record().region_size.bytes() as u64;
        let mut reader = self.reader();
        let Tables { layout: Layout { space, places }, root } = self.tables()?;
        let tables = (0..places.count()).filter_map(move |at| Some((root.get(at), places.get(at)?)));
        Ok(tables.flat_map(move |(table, place)| {
            let mapping = space.mappings()[place.mapping_index].range;
            let first = mapping.start() + place.offset_bytes;
            let regions: Vec<_> = match reader.hashes(ObjectKind::Table, &table, place.regions) {
                Err(error) => vec![Err(error.into())],
                Ok(hashes) => hashes
                    .into_iter()
                    .zip(0u64..)
                    .map(|(hash, at)| {
                        let start = first + at * region_bytes;
                        let length_bytes = region_bytes.min(mapping.end() - start);
                        Ok((AddressRange::with_length(start, length_bytes)?, hash))
                    })
                    .collect(),
            };
            regions
        }))
    }

    /// Its tables.
    pub(crate) fn tables(&self) -> Result<Tables, Error> {
        Ok(Tables::read(&mut self.reader(), self.record())?)
    }

    fn reader(&self) -> Reader<'_> {
        Reader::new(self.shared, Check::Full)
    }

    /// The attachment with this name.
    ///
    /// # Errors
    ///
    /// Damage.
    pub fn attachment(&self, name: &str) -> Result<Option<Vec<u8>>, Error> {
        Ok(self.reader().attachment(self.record(), name)?)
    }

    /// Writes the bytes at these addresses to `out`. Reads only the regions that contain them.
    ///
    /// # Errors
    ///
    /// [`ReadError::NotCaptured`] if the range is not entirely captured memory (nothing is written
    /// then), [`ReadError::Write`], damage.
    pub fn read_range(&self, range: AddressRange, out: &mut dyn Write) -> Result<u64, Error> {
        let layout = Layout::read(&mut self.reader(), self.record())?;
        let space = &layout.space;
        let mut next = range.start();
        for (_, mapping) in space.captured() {
            if mapping.range.start() <= next && next < mapping.range.end() {
                next = mapping.range.end();
            }
        }
        if next < range.end() {
            return Err(ReadError::NotCaptured { missing: AddressRange::new(next, range.end())? }.into());
        }
        let root = layout.root(&mut self.reader(), self.record())?;
        let tables = layout.places.overlapping(range).filter_map(|at| {
            let place = layout.places.get(at)?;
            let whole = place.addresses(space).ok()?;
            let part = whole.intersection(range)?;
            Some((root.get(at), place, part.start() - whole.start()..part.end() - whole.start()))
        });
        self.write_tables(tables, out)
    }

    /// Writes the image to `out`: the bytes of all captured mappings, one after another.
    ///
    /// # Errors
    ///
    /// [`ReadError::Write`], damage; `out` has received the bytes before the fault then.
    pub fn read_image(&self, out: &mut dyn Write) -> Result<u64, Error> {
        let tables = self.tables()?;
        let whole = |(at, place): (usize, Place)| (tables.root.get(at), place, 0..place.length_bytes as u64);
        self.write_tables(tables.layout.places.iter().enumerate().map(whole), out)
    }

    fn write_tables(
        &self,
        tables: impl Iterator<Item = (Hash, Place, std::ops::Range<u64>)>,
        out: &mut dyn Write,
    ) -> Result<u64, Error> {
        let mut reader = self.reader();
        let region_bytes = self.record().region_size.bytes();
        let mut buffer = vec![0; region_bytes];
        let mut written_bytes = 0;
        for (table, place, part) in tables {
            let hashes = reader.hashes(ObjectKind::Table, &table, place.regions)?;
            for (at, hash) in hashes.iter().enumerate() {
                let start = at * region_bytes;
                let end = place.length_bytes.min(start + region_bytes);
                let from = usize_of(part.start).max(start);
                let to = usize_of(part.end).min(end);
                if from >= to {
                    continue;
                }
                let plain = &mut buffer[..end - start];
                if hash.is_zero() {
                    plain.fill(0)
                } else {
                    reader.region(hash, plain)?
                }
                out.write_all(&plain[from - start..to - start]).map_err(ReadError::Write)?;
                written_bytes += (to - from) as u64;
            }
        }
        Ok(written_bytes)
    }
}

impl std::fmt::Debug for Snapshot<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Snapshot")
            .field("id", &self.id())
            .field("record", self.record())
            .finish_non_exhaustive()
    }
}
