//! Extents: the parts of a memory that were written since its last snapshot.
//!
//! ```text
//! parent   ├───────────────────────────────────────┤
//! extents       ├──┤        ├┤  ├──────┤           ├────────┤
//! image    ├───────────────────────────────────────┴────────┤
//! ```
//!
//! Only bytes that the runtime wrote are held; the library completes partly covered regions from
//! the parent. So a snapshot needs memory for what changed, and not for the whole image.

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::sync::Arc;

use stillframe::address_space::AddressSpace;
use stillframe::ranges::Ranges;
use stillframe::source::{Frozen, OneMemory, Source, SourceError};
use stillframe::track::{DirtySet, RescanReason, TrackError, TrackMethod, Tracker};
use stillframe::{AddressRange, SnapshotId, Store};

use crate::error::Error;

/// The greatest size of a Wasm memory: 16 GiB, the limit of 64-bit memories in browsers. A damaged
/// extent that claims more is rejected before anything is allocated for it.
const MAX_MEMORY_BYTES: u64 = 16 << 30;

/// The greatest number of bytes that one byte of LZ4 can stand for.
const LZ4_MAX_RATIO: usize = 255;

/// A memory: that of a snapshot, if there is one, and the bytes written over it.
#[derive(Debug, Default)]
pub(crate) struct Extents {
    base: Option<Base>,
    length_bytes: u64,
    /// By their start; they never overlap.
    written: BTreeMap<u64, Vec<u8>>,
}

#[derive(Clone, Debug)]
struct Base {
    store: Arc<Store>,
    id: SnapshotId,
    length_bytes: u64,
}

impl Extents {
    /// The memory of a snapshot, which has this many bytes.
    pub(crate) fn over(store: &Arc<Store>, id: SnapshotId, length_bytes: u64) -> Extents {
        let base = Base { store: store.clone(), id, length_bytes };
        Extents { base: Some(base), length_bytes, written: BTreeMap::new() }
    }

    /// The length of the memory.
    pub(crate) fn length_bytes(&self) -> u64 {
        self.length_bytes
    }

    /// Discards the bytes that were written over the base.
    pub(crate) fn undo(&mut self) {
        self.written.clear();
        self.length_bytes = self.base.as_ref().map_or(0, |base| base.length_bytes);
    }

    /// Writes an extent in Wasmer's compressed form: its length in 4 bytes and an LZ4 block. An
    /// empty `region` only says where the extent begins.
    pub(crate) fn write_compressed(&mut self, region: &Range<u64>, compressed: &[u8]) -> Result<(), Error> {
        let wrong = |why: String| Error::Extent { start: region.start, end: region.end, why };
        let (length, block) =
            lz4_flex::block::uncompressed_size(compressed).map_err(|error| wrong(error.to_string()))?;
        if length > block.len().saturating_mul(LZ4_MAX_RATIO) {
            return Err(wrong(format!(
                "it claims to be {length} bytes, which {} cannot become",
                block.len()
            )));
        }
        let expected_bytes = region.end.checked_sub(region.start).filter(|length| *length > 0);
        if region.end < region.start || expected_bytes.is_some_and(|expected| expected != length as u64) {
            return Err(wrong(format!("it holds {length} bytes")));
        }
        let end = region.start.checked_add(length as u64).filter(|end| *end <= MAX_MEMORY_BYTES);
        if end.is_none() {
            return Err(wrong(format!("no memory has more than {MAX_MEMORY_BYTES} bytes")));
        }
        let bytes = lz4_flex::block::decompress(block, length).map_err(|error| wrong(error.to_string()))?;
        if bytes.len() != length {
            return Err(wrong(format!("it claims to hold {length} bytes and holds {}", bytes.len())));
        }
        self.write(region.start, bytes);
        Ok(())
    }

    /// Writes bytes and replaces those that were there.
    fn write(&mut self, start: u64, mut bytes: Vec<u8>) {
        if bytes.is_empty() {
            return;
        }
        let end = start + bytes.len() as u64;
        self.length_bytes = self.length_bytes.max(end);
        // The extent that begins before this one and overlaps it is cut, and so is the last one,
        // which overlaps its end.
        let before = self.written.range(..start).next_back().map(|(at, bytes)| (*at, bytes.len() as u64));
        if let Some((at, length)) = before
            && at + length > start
            && let Some(earlier) = self.written.get_mut(&at)
        {
            let rest = earlier.split_off(offset(start - at));
            self.written.insert(start, rest);
        }
        let inside: Vec<u64> = self.written.range(start..end).map(|(at, _)| *at).collect();
        for at in inside {
            if let Some(covered) = self.written.remove(&at)
                && at + covered.len() as u64 > end
            {
                self.written.insert(end, covered[offset(end - at)..].to_vec());
            }
        }
        bytes.shrink_to_fit();
        self.written.insert(start, bytes);
    }

    /// The written bytes, as ranges.
    fn ranges(&self) -> Ranges {
        self.written.iter().map(|(start, bytes)| *start..start + bytes.len() as u64).collect()
    }

    /// Fills `buffer` with the bytes from `start` on.
    fn read(&self, start: u64, buffer: &mut [u8]) -> io::Result<()> {
        let end = start + buffer.len() as u64;
        let overlaps = || {
            let before = self.written.range(..=start).next_back();
            let after = self.written.range(start..end).filter(move |(at, _)| **at > start);
            before.into_iter().chain(after).filter_map(move |(at, bytes)| {
                let from = start.max(*at);
                let to = end.min(at + bytes.len() as u64);
                (from < to).then(|| (from, &bytes[offset(from - at)..offset(to - at)]))
            })
        };
        let written_bytes: usize = overlaps().map(|(_, bytes)| bytes.len()).sum();
        if written_bytes < buffer.len() {
            buffer.fill(0);
            if let Some(base) = &self.base {
                base.read(start, buffer)?;
            }
        }
        for (from, bytes) in overlaps() {
            buffer[offset(from - start)..][..bytes.len()].copy_from_slice(bytes);
        }
        Ok(())
    }
}

impl Base {
    /// This is needed only if the library cannot compare with the parent: otherwise it completes
    /// regions itself.
    fn read(&self, start: u64, buffer: &mut [u8]) -> io::Result<()> {
        let end = self.length_bytes.min(start + buffer.len() as u64);
        if let Ok(range) = AddressRange::new(start, end) {
            let mut part = &mut buffer[..offset(end - start)];
            let read = self.store.snapshot(self.id).and_then(|it| it.read_range(range, &mut part));
            read.map_err(io::Error::other)?;
        }
        Ok(())
    }
}

/// An offset within bytes that are in memory.
fn offset(bytes: u64) -> usize {
    usize::try_from(bytes).unwrap_or(usize::MAX)
}

impl Source for Extents {
    fn open(&self) -> Result<Box<dyn Frozen + '_>, SourceError> {
        Ok(self.frozen())
    }

    fn tracker(&self) -> Result<Arc<dyn Tracker>, RescanReason> {
        let changes = self.base.as_ref().map(|base| (base.id, self.ranges()));
        changes
            .map(|(since, changes)| Arc::new(Written { since, changes }) as _)
            .ok_or(RescanReason::NoTracker)
    }
}

impl OneMemory for Extents {
    fn length_bytes(&self) -> u64 {
        self.length_bytes
    }

    fn copy_out(&self, offset_bytes: u64, buffer: &mut [u8]) -> Result<(), SourceError> {
        self.read(offset_bytes, buffer)
            .map_err(|source| SourceError::Memory { address: offset_bytes, source })
    }

    fn populated(&self) -> Result<Ranges, SourceError> {
        // Without a base, memory that was never written is zeros.
        Ok(if self.base.is_some() { Ranges::from(0..self.length_bytes) } else { self.ranges() })
    }
}

/// The tracker of one capture: the runtime reported what it wrote.
struct Written {
    since: SnapshotId,
    changes: Ranges,
}

impl Tracker for Written {
    fn method(&self) -> TrackMethod {
        TrackMethod::DirtyRanges
    }

    fn take(&self, _space: &AddressSpace, since: Option<SnapshotId>) -> Result<DirtySet, TrackError> {
        let changes = if since == Some(self.since) {
            Ok(vec![self.changes.clone()])
        } else {
            Err(RescanReason::OtherParent)
        };
        Ok(DirtySet { number: 0, changes })
    }

    fn committed(&self, _number: u64, _id: SnapshotId) {}

    fn estimate_bytes(&self) -> u64 {
        0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn contents(extents: &Extents) -> Vec<u8> {
        let mut bytes = vec![0xee; offset(extents.length_bytes)];
        extents.read(0, &mut bytes).unwrap();
        bytes
    }

    #[test]
    fn extents_over_one_another_are_as_writes_to_one_buffer() {
        let mut random = 7u64;
        let mut pick = |below: u64| {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (random >> 33) % below
        };
        for _ in 0..200 {
            let mut extents = Extents::default();
            let mut plain = vec![0; 300];
            for round in 1..20u8 {
                let start = pick(250);
                let bytes = vec![round; offset(1 + pick(50))];
                plain[offset(start)..][..bytes.len()].copy_from_slice(&bytes);
                extents.write(start, bytes);
                plain.truncate(300);
                assert_eq!(contents(&extents), plain[..offset(extents.length_bytes)]);
                let (from, to) = (pick(extents.length_bytes), pick(extents.length_bytes));
                let mut part = vec![0; offset(to.saturating_sub(from))];
                extents.read(from, &mut part).unwrap();
                assert_eq!(part, plain[offset(from)..][..part.len()]);
            }
            let ranges = extents.ranges();
            assert!(ranges.windows(2).all(|pair| pair[0].end < pair[1].start));
        }
    }

    #[test]
    fn an_extent_that_makes_no_sense_is_refused_before_there_is_room_made_for_it() {
        let good = lz4_flex::compress_prepend_size(&[7; 512]);
        let claims = |length: u32| [&length.to_le_bytes(), &good[4..]].concat();
        for (what, region, compressed) in [
            ("nothing", 0..512, Vec::new()),
            ("no block", 0..512, vec![0, 2, 0, 0]),
            ("a block that is cut", 0..512, good[..good.len() - 3].to_vec()),
            ("no LZ4", 0..512, vec![0, 2, 0, 0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff]),
            ("4 GiB of nothing", 0..u64::from(u32::MAX), claims(u32::MAX)),
            ("too short a claim", 0..100, claims(100)),
            ("too long a claim", 0..600, claims(600)),
            ("another length", 0..1024, good.clone()),
            ("backwards", std::ops::Range { start: 512, end: 0 }, good.clone()),
            ("past the last address", u64::MAX - 5..u64::MAX - 5, good.clone()),
            ("beyond any memory", 1 << 50..(1 << 50) + 512, good.clone()),
        ] {
            let mut extents = Extents::default();
            assert!(
                matches!(extents.write_compressed(&region, &compressed), Err(Error::Extent { .. })),
                "{what} was taken"
            );
            assert_eq!(extents.length_bytes, 0, "{what}");
        }
        let mut extents = Extents::default();
        extents.write_compressed(&(512..1024), &good).unwrap();
        extents.write_compressed(&(0..0), &good).unwrap();
        assert_eq!(contents(&extents), [7; 1024]);
    }
}
