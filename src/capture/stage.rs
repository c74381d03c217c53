//! Staging: what is wanted of memory is copied while its source stands still.

use std::ops::Range;
use std::sync::Mutex;
use std::time::Duration;

use crossbeam_channel::{SendTimeoutError, Sender};

use super::{FailOnPanic, Ingest, Worker, copy_in_place, lock, on_all_cores, total_bytes};
use crate::error::Error;
use crate::piece::Piece;
use crate::source::{CopyOut, Frozen, Memory};
use crate::sys::pages::Pages;
use crate::workers::cores;

/// Scattered ranges are copied by so much at a time: each call into the kernel costs a microsecond or two.
const COPY_BYTES: usize = 1 << 20;

/// Below this two threads copy no faster than one.
const PARALLEL_COPY_BYTES: usize = 1 << 20;

/// Memory for what is copied while a source stands still.
pub(crate) struct Staging {
    buffer: Pages,
}

impl Staging {
    /// A buffer of `length_bytes`, of which the first `ready_bytes` are touched now, so that nobody
    /// has to wait for the kernel to clear them later.
    pub(crate) fn new(length_bytes: usize, ready_bytes: usize) -> Result<Staging, Error> {
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
pub(crate) struct Staged {
    pub(super) buffer: Pages,
    pub(super) pieces: Vec<(Piece, Range<usize>)>,
    /// Whether the buffer was too small, so that the rest was worked on while the source stood still.
    pub(crate) was_full: bool,
}

/// Ranges of a mapping that are to be copied into their place, one after the other.
struct Copying<'a> {
    mapping_index: usize,
    ranges: Vec<Range<u64>>,
    buffer: &'a mut [u8],
}

impl Ingest {
    /// The first step, while the source stands still: copies what is wanted, on all cores where the
    /// source allows it. What the buffer has no room for is worked on at once.
    pub(crate) fn stage(&self, frozen: &dyn Frozen, staging: Staging) -> Result<Staged, Error> {
        let mut buffer = staging.buffer;
        let mut placed: Vec<(Piece, Range<usize>)> = Vec::new();
        // The ranges of pieces that stand side by side in the buffer are copied together, up to a length.
        let mut groups: Vec<(usize, Vec<Range<u64>>, Range<usize>)> = Vec::new();
        let mut at = 0;
        let mut pieces = self.pieces().peekable();
        while let Some(piece) = pieces.peek().copied() {
            let ranges: Vec<_> = self.wanted_of(&piece).collect();
            let place = at..at + total_bytes(&ranges);
            // Lines of cache are not shared between pieces.
            at = place.end.next_multiple_of(64);
            if at > buffer.len() {
                break;
            }
            match groups.last_mut() {
                Some((mapping_index, others, whole))
                    if *mapping_index == piece.mapping_index
                        && whole.end == place.start
                        && whole.len() < COPY_BYTES =>
                {
                    others.extend(ranges);
                    whole.end = place.end;
                }
                _ => groups.push((piece.mapping_index, ranges, place.clone())),
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
        let was_full = pieces.peek().is_some();
        match frozen.memory() {
            Memory::InPlace(memory) => {
                self.copy_all(copies, |mapping, ranges, buffer| {
                    copy_in_place(memory, mapping, ranges, buffer)
                });
                self.work_on_all(pieces, &|piece, worker| self.work_in_place(memory, piece, worker));
            }
            Memory::Shared(memory) | Memory::SharedUntilRelease(memory) => {
                self.copy_all(copies, |mapping, ranges, buffer| {
                    self.copy_out(memory, mapping, ranges, buffer)
                });
                self.work_on_all(pieces, &|piece, worker| self.work_copied(memory, piece, worker));
            }
            Memory::UntilRelease(memory) => {
                for Copying { mapping_index, ranges, buffer } in copies {
                    self.note(self.copy_out(memory, mapping_index, &ranges, buffer));
                    if self.failed() {
                        break;
                    }
                }
                if was_full {
                    self.work_while_copying(memory, pieces);
                }
            }
        }
        self.take_failure()?;
        Ok(Staged { buffer, pieces: placed, was_full })
    }

    /// Copies ranges into their places on every core.
    fn copy_all(
        &self,
        copies: Vec<Copying<'_>>,
        copy: impl Fn(usize, &[Range<u64>], &mut [u8]) -> Result<(), Error> + Sync,
    ) {
        let total_bytes: usize = copies.iter().map(|copying| copying.buffer.len()).sum();
        let copies = Mutex::new(copies.into_iter());
        let run = || {
            while !self.failed() {
                let Some(Copying { mapping_index, ranges, buffer }) = lock(&copies).next() else { break };
                self.note(copy(mapping_index, &ranges, buffer));
            }
        };
        if total_bytes < PARALLEL_COPY_BYTES { run() } else { on_all_cores(run) }
    }

    /// Works on memory that one thread can copy, and only now.
    pub(super) fn work_while_copying(&self, memory: &dyn CopyOut, pieces: impl Iterator<Item = Piece>) {
        // A few pieces at a time.
        let (copied_to, copied) = crossbeam_channel::bounded::<(Piece, Vec<u8>)>(cores());
        std::thread::scope(|scope| {
            for _ in 0..cores() {
                let copied = copied.clone();
                scope.spawn(move || {
                    let _whatever_happens = FailOnPanic(self);
                    let mut worker = Worker::new(&self.shared);
                    for (piece, bytes) in copied {
                        if self.failed() {
                            continue;
                        }
                        self.note(self.work_gathered(&piece, &bytes, &mut worker));
                    }
                });
            }
            for piece in pieces {
                let ranges: Vec<_> = self.wanted_of(&piece).collect();
                let mut buffer = vec![0; total_bytes(&ranges)];
                let result = self.copy_out(memory, piece.mapping_index, &ranges, &mut buffer);
                self.note(result.map(|()| self.send(&copied_to, (piece, buffer))));
                if self.failed() {
                    break;
                }
            }
            drop(copied_to);
        });
    }

    /// Sends to the workers; gives up when they have failed, so that the source does not stand still
    /// for ever.
    fn send<T>(&self, to: &Sender<T>, mut task: T) {
        while let Err(SendTimeoutError::Timeout(again)) = to.send_timeout(task, Duration::from_millis(50)) {
            if self.failed() {
                return;
            }
            task = again;
        }
    }
}
