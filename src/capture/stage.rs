//! Staging: what is wanted of memory is copied while its source is paused.

use std::ops::Range;

use super::piece::Piece;
use super::work::{Work, copy_in_place};
use crate::error::Error;
use crate::source::{Access, Frozen};
use crate::sys::pages::Pages;
use crate::workers;

/// How many bytes of scattered ranges one call copies. Each call into the kernel costs a
/// microsecond or two.
const COPY_BYTES: usize = 1 << 20;

/// Below this size two threads copy no faster than one.
const PARALLEL_COPY_BYTES: usize = 1 << 20;

/// The staging buffer: memory for the bytes that are copied during the pause.
pub(super) struct Staging {
    buffer: Pages,
}

impl Staging {
    /// A buffer of `length_bytes`. The kernel allocates and clears the first `ready_bytes` of it
    /// now, so that this does not prolong the pause.
    pub(super) fn new(length_bytes: usize, ready_bytes: usize) -> Result<Staging, Error> {
        let bytes = length_bytes as u64;
        let mut buffer =
            Pages::zeros(length_bytes.max(1)).map_err(|source| Error::Staging { bytes, source })?;
        buffer.prefer_huge_pages();
        for byte in buffer[..ready_bytes.min(length_bytes)].iter_mut().step_by(4096) {
            *byte = 0;
        }
        Ok(Staging { buffer })
    }
}

/// What was copied and waits to be worked on: the wanted ranges of each piece, one after the other.
pub(super) struct Staged {
    buffer: Pages,
    pieces: Vec<(Piece, Range<usize>)>,
    /// Whether the buffer was too small, so that the rest was worked on while the source was
    /// paused.
    pub(super) was_full: bool,
}

impl Staged {
    /// Works on it.
    pub(super) fn work(self, work: &Work) -> Result<(), Error> {
        work.on_copied(&self.buffer, self.pieces)
    }
}

/// Ranges of a mapping that are to be copied into their place, one after the other.
struct Copying<'a> {
    mapping_index: usize,
    ranges: Vec<Range<u64>>,
    buffer: &'a mut [u8],
}

/// The first step, while the source is paused: copies what is wanted, on all cores where the
/// source allows it. What the buffer has no room for is worked on at once.
pub(super) fn stage(work: &Work, frozen: &dyn Frozen, staging: Staging) -> Result<Staged, Error> {
    let mut buffer = staging.buffer;
    let mut placed: Vec<(Piece, Range<usize>)> = Vec::new();
    // Ranges of adjacent pieces in the buffer are copied together, up to `COPY_BYTES`.
    let mut groups: Vec<(usize, Vec<Range<u64>>, Range<usize>)> = Vec::new();
    let mut at = 0;
    let mut pieces = work.plan().pieces().peekable();
    while let Some(piece) = pieces.peek().copied() {
        let place = at..at + work.plan().wanted_bytes_of(&piece);
        // Lines of cache are not shared between pieces.
        at = place.end.next_multiple_of(64);
        if at > buffer.len() {
            break;
        }
        let ranges = work.plan().wanted_of(&piece);
        match groups.last_mut() {
            Some((mapping_index, others, whole))
                if *mapping_index == piece.mapping_index
                    && whole.end == place.start
                    && whole.len() < COPY_BYTES =>
            {
                others.extend(ranges);
                whole.end = place.end;
            }
            _ => groups.push((piece.mapping_index, ranges.collect(), place.clone())),
        }
        placed.push((piece, place));
        pieces.next();
    }
    let (mut free, mut free_at) = (&mut buffer[..], 0);
    let copies = groups.into_iter().map(|(mapping_index, ranges, place)| {
        let (_, rest) = std::mem::take(&mut free).split_at_mut(place.start - free_at);
        let (buffer, rest) = rest.split_at_mut(place.len());
        (free, free_at) = (rest, place.end);
        Copying { mapping_index, ranges, buffer }
    });
    let copies: Vec<Copying<'_>> = copies.collect();
    match frozen.access() {
        Access::InPlace(memory) => copy_all(copies, |it| {
            copy_in_place(memory, it.mapping_index, &it.ranges, it.buffer);
            Ok(())
        })?,
        Access::Shared(memory) | Access::SharedUntilRelease(memory) => {
            copy_all(copies, |it| work.copy_out(memory, it.mapping_index, &it.ranges, it.buffer))?;
        }
        Access::UntilRelease(memory) => {
            for it in copies {
                work.copy_out(memory, it.mapping_index, &it.ranges, it.buffer)?;
            }
        }
    }
    let was_full = pieces.peek().is_some();
    if was_full {
        work.on_memory(frozen, pieces)?;
    }
    Ok(Staged { buffer, pieces: placed, was_full })
}

/// Copies ranges into their places, on every core if they are many bytes.
fn copy_all(
    copies: Vec<Copying<'_>>,
    copy: impl Fn(Copying<'_>) -> Result<(), Error> + Sync,
) -> Result<(), Error> {
    let total_bytes: usize = copies.iter().map(|copying| copying.buffer.len()).sum();
    if total_bytes < PARALLEL_COPY_BYTES {
        copies.into_iter().try_for_each(copy)
    } else {
        workers::for_each(copies, || (), |(), it| copy(it))
    }
}
