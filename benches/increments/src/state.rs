//! The memory of a workload at one moment, and a tape of many moments.
//!
//! Contenders run one after another, so that the CPU time of each can be measured, and all must see
//! the same bytes. So the moments are recorded first. A tape holds the first moment whole, and then
//! the changes.

use std::ops::Range;

use stillframe::AddressRange;
use stillframe::address_space::{AddressSpace, Mapping, MappingKind, Protection};
use stillframe::source::{Access, Frozen, InPlace, Source, SourceError};

/// Mappings begin and end at multiples of this.
const PAGE_BYTES: usize = 4096;
/// The granularity of a tape.
const CELL_BYTES: usize = 64;

/// Mappings in address order: each has its start and its bytes.
#[derive(Clone, Default, PartialEq)]
pub struct State {
    pub mappings: Vec<(u64, Vec<u8>)>,
}

impl State {
    /// One mapping from address 0, for a linear memory or an arena.
    pub fn of_bytes(bytes: &[u8]) -> Self {
        State { mappings: vec![(0, bytes.to_vec())] }
    }

    /// All mappings, one after another, in pieces.
    pub fn pieces(&self) -> impl Iterator<Item = &[u8]> {
        self.mappings.iter().map(|(_, bytes)| &bytes[..])
    }

    fn ranges(&self) -> Vec<Range<u64>> {
        self.mappings.iter().map(|(start, bytes)| *start..start + bytes.len() as u64).collect()
    }

    /// The mapping that contains an address, and the offset in it.
    fn place(&self, address: u64) -> Option<(usize, usize)> {
        let at = self.mappings.partition_point(|(start, _)| *start <= address).checked_sub(1)?;
        let offset = usize::try_from(address - self.mappings[at].0).ok()?;
        (offset < self.mappings[at].1.len()).then_some((at, offset))
    }

    /// The page at an address; an absent page is zeros.
    fn page(&self, address: u64) -> &[u8] {
        match self.place(address) {
            Some((at, offset)) => &self.mappings[at].1[offset..offset + PAGE_BYTES],
            None => &[0; PAGE_BYTES],
        }
    }

    /// The change that turns this into `next`.
    fn change_to(&self, next: &State) -> Change {
        let mut runs: Vec<(u64, Vec<u8>)> = Vec::new();
        for (start, bytes) in &next.mappings {
            for (at, page) in bytes.chunks_exact(PAGE_BYTES).enumerate() {
                let address = start + (at * PAGE_BYTES) as u64;
                let before = self.page(address);
                if before == page {
                    continue;
                }
                for (at, cell) in page.chunks(CELL_BYTES).enumerate() {
                    if before[at * CELL_BYTES..][..CELL_BYTES] == *cell {
                        continue;
                    }
                    let address = address + (at * CELL_BYTES) as u64;
                    match runs.last_mut() {
                        Some((start, run)) if *start + run.len() as u64 == address => run.extend(cell),
                        _ => runs.push((address, cell.to_vec())),
                    }
                }
            }
        }
        Change { ranges: next.ranges(), runs }
    }

    pub fn apply(&mut self, change: &Change) {
        if self.ranges() != change.ranges {
            let mappings = change.ranges.iter().map(|range| {
                let pages = range.clone().step_by(PAGE_BYTES);
                (range.start, pages.flat_map(|address| self.page(address)).copied().collect())
            });
            *self = State { mappings: mappings.collect() };
        }
        for (address, run) in &change.runs {
            self.write(*address, run);
        }
    }

    /// Writes bytes that may span adjacent mappings.
    pub fn write(&mut self, mut address: u64, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let (at, offset) = self.place(address).unwrap();
            let target = &mut self.mappings[at].1[offset..];
            let (now, later) = bytes.split_at(bytes.len().min(target.len()));
            target[..now.len()].copy_from_slice(now);
            (address, bytes) = (address + now.len() as u64, later);
        }
    }
}

/// The changes between one moment and the next.
pub struct Change {
    ranges: Vec<Range<u64>>,
    runs: Vec<(u64, Vec<u8>)>,
}

/// Successive moments of one workload.
#[derive(Default)]
pub struct Tape {
    first: State,
    last: State,
    changes: Vec<Change>,
}

impl Tape {
    pub fn record(&mut self, state: State) {
        if self.last.mappings.is_empty() {
            self.first = state.clone();
        } else {
            self.changes.push(self.last.change_to(&state));
        }
        self.last = state;
    }

    pub fn first(&self) -> &State {
        &self.first
    }

    pub fn last(&self) -> &State {
        &self.last
    }

    /// The changes after the first moment.
    pub fn changes(&self) -> &[Change] {
        &self.changes
    }
}

impl Source for State {
    fn open(&self) -> Result<Box<dyn Frozen + '_>, SourceError> {
        let mapping = |range: Range<u64>| Mapping {
            range: AddressRange::new(range.start, range.end).unwrap(),
            protection: Protection::READ_WRITE,
            kind: MappingKind::Anonymous,
            name: String::new(),
            file_offset_bytes: 0,
            captured: true,
        };
        let space = AddressSpace::new(self.ranges().into_iter().map(mapping).collect())?;
        Ok(Box::new(FrozenState { state: self, space }))
    }
}

struct FrozenState<'a> {
    state: &'a State,
    space: AddressSpace,
}

impl Frozen for FrozenState<'_> {
    fn address_space(&self) -> &AddressSpace {
        &self.space
    }

    fn access(&self) -> Access<'_> {
        Access::InPlace(self)
    }
}

impl InPlace for FrozenState<'_> {
    fn bytes(&self, mapping_index: usize) -> &[u8] {
        &self.state.mappings[mapping_index].1
    }
}
