//! What a [`Source`] and a [`Tracker`](crate::track::Tracker) must keep, as tests that any
//! implementation can run.
//!
//! The functions panic at the first rule that is broken. They belong into tests: switch the feature
//! `conformance` on among the `dev-dependencies`.
//!
//! ```
//! use stillframe::{Store, conformance};
//! # let dir = tempfile::tempdir()?;
//! let store = Store::options().create(dir.path().join("vault"))?;
//! conformance::source(&vec![7; 100_000], &store)?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use crate::address_space::AddressSpace;
use crate::capture::CaptureOptions;
use crate::error::Error;
use crate::progress::Progress;
use crate::ranges::Ranges;
use crate::record::SnapshotId;
use crate::source::{Access, Attachment, Frozen, Source, SourceError};
use crate::store::Store;
use crate::track::{RescanReason, Tracking};
use crate::units::usize_of;

/// Memory that changes under a tracker.
pub trait TrackedMemory {
    /// The source that captures the memory and has the tracker. It is asked for before each
    /// capture.
    fn source(&self) -> Box<dyn Source + '_>;

    /// Its length, which stays the same: at least 64 KiB.
    fn length_bytes(&self) -> usize;

    /// Writes into it, as whoever owns it would.
    fn write(&mut self, offset_bytes: usize, bytes: &[u8]);
}

/// Checks a source whose memory does not change meanwhile, of at most a few hundred MiB.
///
/// - Each captured mapping has its length, and its populated ranges are inside it.
/// - Bytes are the same however they are asked for: all at once, in pieces, in several ranges.
/// - Bytes outside the populated ranges are zeros.
/// - Releasing twice gives the same pause.
/// - It is not opened when its progress is cancelled.
/// - A capture restores to what was read, and a second capture finds nothing changed.
///
/// # Panics
///
/// When a rule is broken.
///
/// # Errors
///
/// Those of the source and the store.
pub fn source<S: Source + ?Sized>(source: &S, store: &Store) -> Result<(), Error> {
    let cancelled = Progress::new().cancel_when(Arc::new(AtomicBool::new(true)));
    let refused = source.open_unless_cancelled(&cancelled);
    assert!(
        matches!(refused, Err(SourceError::Interrupted)),
        "expected SourceError::Interrupted of a source that is opened after its progress was cancelled"
    );
    let frozen = source.open()?;
    let space = frozen.address_space().clone();
    let image = image(&*frozen, &space)?;
    let paused = frozen.release();
    assert_eq!(frozen.release(), paused, "expected that a second release gives the pause of the first");
    drop(frozen);
    let process = store.process("conformance of a source");
    for nth in 0..2 {
        let taken = process.capture(source, &CaptureOptions::new())?;
        assert!(
            nth == 0 || taken.changed_regions == 0,
            "expected no changed region in memory that did not change, found {}",
            taken.changed_regions
        );
        assert_restores_to(store, taken.id, &image, "the source");
    }
    Ok(())
}

/// Checks a tracker.
///
/// - The first capture reads everything; those after it read what the tracker knows.
/// - Each capture restores to the memory as it is, after single bytes and long runs were written,
///   at both ends too.
/// - Where nothing was written, nothing has changed.
/// - What a capture found that failed is found by the next one.
/// - What is written while a capture goes on in the background is not in it, and is in the next
///   one.
/// - A capture whose parent is another snapshot is right too.
///
/// # Panics
///
/// When a rule is broken.
///
/// # Errors
///
/// Those of the source and the store.
pub fn tracker(memory: &mut dyn TrackedMemory, store: &Store) -> Result<(), Error> {
    let length = memory.length_bytes();
    assert!(length >= 64 << 10, "expected at least 64 KiB of memory, found {length} bytes");
    let process = store.process("conformance of a tracker");
    let options = CaptureOptions::new();
    let mut draw = Draw(1);
    let mut model = vec![0; length];
    write(memory, &mut model, 0..length, &mut draw);

    let first = process.capture(&*memory.source(), &options)?;
    assert_eq!(first.tracking, Tracking::Rescan(RescanReason::NoParent), "of the first capture");
    assert_restores_to(store, first.id, &model, "the first capture");

    for round in 0..ROUNDS {
        for _ in 0..draw.below(6) {
            let start = draw.below(length);
            let most = if draw.below(4) == 0 { length } else { 5000 };
            let end = start + 1 + draw.below(most.min(length - start));
            write(memory, &mut model, start..end, &mut draw);
        }
        if round % 7 == 0 {
            write(memory, &mut model, 0..1, &mut draw);
            write(memory, &mut model, length - 1..length, &mut draw);
        }
        if round % 3 == 0 {
            fail(store, &*memory.source())?;
            let start = draw.below(length);
            write(memory, &mut model, start..start + 1, &mut draw);
        }
        let taken = process.capture(&*memory.source(), &options)?;
        assert!(matches!(taken.tracking, Tracking::By(_)), "expected a tracker, found {:?}", taken.tracking);
        assert_restores_to(store, taken.id, &model, "a tracked capture");
    }

    let same = process.capture(&*memory.source(), &options)?;
    assert_eq!(same.changed_regions, 0, "changed regions, although nothing was written");

    let before = model.clone();
    let pending = process.start_capture(&*memory.source(), &options)?;
    write(memory, &mut model, 0..length / 2, &mut draw);
    assert_restores_to(store, pending.wait()?.id, &before, "a capture in the background");
    let after = process.capture(&*memory.source(), &options)?;
    assert_restores_to(store, after.id, &model, "the capture after one in the background");

    let branch = process.capture(&*memory.source(), &CaptureOptions::new().parent(first.id))?;
    assert_restores_to(store, branch.id, &model, "a capture whose parent is an older snapshot");
    Ok(())
}

/// How often a tracker is asked.
const ROUNDS: usize = 24;

/// The pieces in which bytes are asked for: not a multiple of any page or region.
const PIECE_BYTES: usize = 12_289;

/// A capture that fails after its tracker was asked.
fn fail(store: &Store, source: &dyn Source) -> Result<(), Error> {
    let attachment = Attachment { name: "twice".to_owned(), bytes: vec![1] };
    let options = CaptureOptions::new().attachments([attachment.clone(), attachment]);
    let failed = store.process("conformance of a tracker").capture(source, &options);
    assert!(failed.is_err(), "a capture with the same attachment twice did not fail");
    Ok(())
}

fn write(memory: &mut dyn TrackedMemory, model: &mut [u8], range: Range<usize>, draw: &mut Draw) {
    let written = &mut model[range.clone()];
    let is_zeros = draw.below(4) == 0;
    written.fill_with(|| if is_zeros { 0 } else { draw.next().to_le_bytes()[7] });
    memory.write(range.start, written);
}

/// The image of an open source, read in every way.
fn image(frozen: &dyn Frozen, space: &AddressSpace) -> Result<Vec<u8>, SourceError> {
    let mut image = Vec::new();
    for (index, mapping) in space.mappings().iter().enumerate().filter(|(_, mapping)| mapping.captured) {
        let length_bytes = mapping.range.length_bytes();
        let populated = frozen.populated(index)?;
        let end = populated.last().map_or(0, |range| range.end);
        assert!(end <= length_bytes, "mapping {index} has {length_bytes} bytes, and is populated to {end}");
        let mut whole = vec![0xAA; usize_of(length_bytes)];
        read(frozen, index, 0, &mut whole)?;
        let mut pieces = vec![0x55; whole.len()];
        for (piece, at) in pieces.chunks_mut(PIECE_BYTES).zip((0..).step_by(PIECE_BYTES)) {
            read(frozen, index, at, piece)?;
        }
        assert!(whole == pieces, "mapping {index} has other bytes in pieces than at once");
        let parts = Ranges::from(0..length_bytes.min(10)).union(&(length_bytes / 2..length_bytes).into());
        let wanted: Vec<u8> =
            parts.iter().flat_map(|part| &whole[usize_of(part.start)..usize_of(part.end)]).copied().collect();
        assert!(read_ranges(frozen, index, &parts)? == wanted, "mapping {index} has other bytes in ranges");
        for hole in populated.complement(0..length_bytes).iter() {
            let is_zeros = whole[usize_of(hole.start)..usize_of(hole.end)].iter().all(|byte| *byte == 0);
            assert!(is_zeros, "mapping {index} is not populated at {hole:?}, and has bytes there");
        }
        image.append(&mut whole);
    }
    Ok(image)
}

fn read(frozen: &dyn Frozen, index: usize, at: u64, buffer: &mut [u8]) -> Result<(), SourceError> {
    match frozen.access() {
        Access::InPlace(memory) => {
            buffer.copy_from_slice(&memory.bytes(index)[usize_of(at)..][..buffer.len()]);
            Ok(())
        }
        Access::Shared(memory) | Access::SharedUntilRelease(memory) => {
            memory.copy_out(index, at, buffer, &mut Vec::new())
        }
        Access::UntilRelease(memory) => memory.copy_out(index, at, buffer, &mut Vec::new()),
    }
}

fn read_ranges(frozen: &dyn Frozen, index: usize, ranges: &Ranges) -> Result<Vec<u8>, SourceError> {
    let mut bytes = vec![0xAA; usize_of(ranges.length_bytes())];
    match frozen.access() {
        Access::InPlace(memory) => {
            assert_eq!(
                memory.bytes(index).len() as u64,
                frozen.address_space().mappings()[index].range.length_bytes(),
                "the length of mapping {index}"
            );
            let all = memory.bytes(index);
            bytes =
                ranges.iter().flat_map(|it| &all[usize_of(it.start)..usize_of(it.end)]).copied().collect();
        }
        Access::Shared(memory) | Access::SharedUntilRelease(memory) => {
            memory.copy_ranges(index, ranges, &mut bytes, &mut Vec::new())?;
        }
        Access::UntilRelease(memory) => memory.copy_ranges(index, ranges, &mut bytes, &mut Vec::new())?,
    }
    Ok(bytes)
}

fn assert_restores_to(store: &Store, id: SnapshotId, expected: &[u8], what: &str) {
    let found = store.restore(id).and_then(|restore| restore.into_mapping());
    let found = found.unwrap_or_else(|error| panic!("{what} cannot be restored: {error}"));
    assert_eq!(found.len(), expected.len(), "the length of {what}");
    let at = found.iter().zip(expected).position(|(found, expected)| found != expected);
    assert_eq!(at, None, "the first byte in which {what} differs from the memory");
}

/// Numbers that are the same in every run.
struct Draw(u64);

impl Draw {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }

    /// One below a limit, which is not zero.
    fn below(&mut self, limit: usize) -> usize {
        usize_of(self.next() >> 16) % limit
    }
}
