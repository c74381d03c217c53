//! The contenders: each stores the successive moments of processes in its own way.

use std::collections::HashSet;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use stillframe::codec::Codec;
use stillframe::source::Source;
use stillframe::{CaptureOptions, RegionSize, SnapshotId, Store, StoreOptions};

use crate::journal::{self, Journal};
use crate::measure::Size;
use crate::state::State;

/// A moment to store.
#[derive(Clone, Copy)]
pub struct Moment<'a> {
    /// The name of its process.
    pub process: &'a str,
    /// Its memory, for contenders that work on bytes.
    pub state: &'a State,
    /// Its memory, for contenders that capture.
    pub source: &'a dyn Source,
}

/// The result of one snapshot.
#[derive(Clone, Copy, Default)]
pub struct Taken {
    /// How many regions, extents or pages changed; the unit depends on the contender.
    pub changed: u64,
    /// How many of them were stored as a difference.
    pub deltas: u64,
    /// How long a live process was paused.
    pub paused: Duration,
}

pub trait Contender {
    fn name(&self) -> String;

    /// Prepares what would already exist in real use: this is not measured.
    fn prepare(&mut self, _moment: Moment<'_>) {}

    /// Stores a moment durably.
    fn snapshot(&mut self, moment: Moment<'_>) -> Taken;

    /// Finishes all pending work, so that the size can be measured.
    fn close(&mut self) {}

    /// The directory with everything that it stores.
    fn path(&self) -> &Path;

    /// The part of it that holds positions and not bytes of memory.
    fn index(&self) -> Option<PathBuf> {
        None
    }

    /// Restores the last snapshot, and returns how long it took and the restored memory.
    fn restore(&mut self) -> Option<(Duration, State)> {
        None
    }
}

/// stillframe with one region size and codec.
pub struct Stillframe {
    region_size: RegionSize,
    codec: Codec,
    path: PathBuf,
    options: StoreOptions,
    store: Option<Store>,
    last: Option<SnapshotId>,
}

impl Stillframe {
    pub fn new(dir: &Path, region_size: RegionSize, codec: Codec) -> Self {
        let path = dir.join(format!("stillframe-{}-{codec}", region_size.bytes()));
        let options = Store::options().region_size(region_size).codec(codec);
        Stillframe { region_size, codec, path, options, store: None, last: None }
    }

    /// With the default region size and codec of a store.
    pub fn as_it_comes(dir: &Path) -> Self {
        Stillframe::new(dir, RegionSize::default(), Codec::default())
    }

    fn store(&mut self) -> &Store {
        self.store.get_or_insert_with(|| self.options.open_or_create(&self.path).unwrap())
    }
}

impl Contender for Stillframe {
    fn name(&self) -> String {
        stillframe_name(self.region_size, self.codec)
    }

    fn prepare(&mut self, _moment: Moment<'_>) {
        self.store();
    }

    fn snapshot(&mut self, moment: Moment<'_>) -> Taken {
        let process = self.store().process(moment.process);
        let capture = process.capture(moment.source, &CaptureOptions::default()).unwrap();
        self.last = Some(capture.id);
        Taken { changed: capture.changed_regions, deltas: capture.delta_regions, paused: capture.paused }
    }

    fn close(&mut self) {
        self.store = None;
    }

    fn path(&self) -> &Path {
        &self.path
    }

    fn index(&self) -> Option<PathBuf> {
        Some(self.path.join("index"))
    }

    fn restore(&mut self) -> Option<(Duration, State)> {
        let last = self.last?;
        let store = self.store();
        let started = Instant::now();
        let restore = store.restore(last).unwrap();
        let space = restore.address_space().clone();
        let image = restore.into_mapping().unwrap();
        let took = started.elapsed();
        let mapping = |(at, mapping): (u64, &stillframe::address_space::Mapping)| {
            let at = usize::try_from(at).unwrap();
            let length = usize::try_from(mapping.range.length_bytes()).unwrap();
            (mapping.range.start(), image[at..at + length].to_vec())
        };
        Some((took, State { mappings: space.captured().map(mapping).collect() }))
    }
}

fn stillframe_name(region_size: RegionSize, codec: Codec) -> String {
    format!("stillframe {} KiB {codec}", region_size.bytes() >> 10)
}

/// The name of stillframe with its defaults.
pub fn default_name() -> String {
    stillframe_name(RegionSize::default(), Codec::default())
}

/// The journal of `benches/common/journal.rs`, one file for each process.
pub struct JournalFiles {
    cell_bytes: usize,
    path: PathBuf,
    current: Option<(String, Journal)>,
    ranges: Vec<(u64, usize)>,
    snapshots: usize,
}

impl JournalFiles {
    pub fn new(dir: &Path, cell_bytes: usize) -> Self {
        let path = dir.join(format!("journal-{cell_bytes}"));
        std::fs::create_dir(&path).unwrap();
        JournalFiles { cell_bytes, path, current: None, ranges: Vec::new(), snapshots: 0 }
    }
}

impl Contender for JournalFiles {
    fn name(&self) -> String {
        format!("journal {} B", self.cell_bytes)
    }

    fn snapshot(&mut self, moment: Moment<'_>) -> Taken {
        if self.current.as_ref().is_none_or(|(process, _)| process != moment.process) {
            let journal = Journal::create(&self.path.join(moment.process), self.cell_bytes).unwrap();
            self.current = Some((moment.process.to_owned(), journal));
            self.snapshots = 0;
        }
        let (_, journal) = self.current.as_mut().unwrap();
        self.snapshots += 1;
        self.ranges = moment.state.mappings.iter().map(|(start, bytes)| (*start, bytes.len())).collect();
        let mappings = moment.state.mappings.iter().map(|(start, bytes)| (*start, &bytes[..]));
        Taken { changed: journal.snapshot(mappings).unwrap(), ..Taken::default() }
    }

    fn path(&self) -> &Path {
        &self.path
    }

    /// The journal does not record where the mappings lie: a linear memory has only one.
    fn restore(&mut self) -> Option<(Duration, State)> {
        let (process, _) = self.current.as_ref()?;
        let zeros = self.ranges.iter().map(|(start, length)| (*start, vec![0; *length]));
        let mut state = State { mappings: zeros.collect() };
        let started = Instant::now();
        journal::replay(&self.path.join(process), self.snapshots, |address, bytes| {
            state.write(address, bytes)
        })
        .unwrap();
        Some((started.elapsed(), state))
    }
}

/// The lower bound for deduplication by pages: every distinct page of 4 KiB that is not zeros is
/// compressed and stored once, with 40 bytes (a hash and a position) for each page that changed.
pub struct PageDedup {
    path: PathBuf,
    file: File,
    kept: HashSet<blake3::Hash>,
}

const PAGE_BYTES: usize = 4096;
const BOOKKEEPING_BYTES: usize = 40;

impl PageDedup {
    pub fn new(dir: &Path) -> Self {
        let path = dir.join("pages");
        PageDedup { file: File::create(&path).unwrap(), path, kept: HashSet::new() }
    }
}

impl Contender for PageDedup {
    fn name(&self) -> String {
        "4 KiB dedup".to_owned()
    }

    fn snapshot(&mut self, moment: Moment<'_>) -> Taken {
        let mut appended = Vec::new();
        let mut changed = 0;
        for page in moment.state.pieces().flat_map(|piece| piece.chunks(PAGE_BYTES)) {
            if page.iter().all(|byte| *byte == 0) || !self.kept.insert(blake3::hash(page)) {
                continue;
            }
            changed += 1;
            appended.extend([0; BOOKKEEPING_BYTES]);
            let stored = lz4_flex::block::compress(page);
            appended.extend(if stored.len() < page.len() { &stored[..] } else { page });
        }
        self.file.write_all(&appended).unwrap();
        self.file.sync_data().unwrap();
        Taken { changed, ..Taken::default() }
    }

    fn path(&self) -> &Path {
        &self.path
    }
}

/// The current size of a contender's files.
pub fn size_of(contender: &dyn Contender) -> Size {
    Size::of(contender.path())
}
