//! The memory of a process that stands still: what is compared with the snapshot.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use super::attempt::Attempt;
use super::page_state::PageStates;
use super::plan::{Patch, Target};
use super::remade::Remade;
use crate::capture::piece::PIECE_BYTES;
use crate::error::{Error, RollbackError};
use crate::left_out::WhyLeftOut;
use crate::ranges::{complement, merge, overlapping};
use crate::sink::SinkError;
use crate::source::{Frozen as _, ProcessMemory};
use crate::units::AddressRange;

/// What the kernel alone writes of a thread's area for restartable sequences, beside a pointer (bytes 8
/// to 16): on which processor the thread runs.
const RSEQ_POINTER: Range<u64> = 8..16;

/// The memory of a process that stands still.
pub(super) struct HeldMemory<'a> {
    states: &'a PageStates,
    pid: u32,
    memory: ProcessMemory,
    /// What is mapped again of files, in order: each with the file, and where in it the range begins.
    files: Vec<(Range<u64>, File, u64)>,
    /// Where there may be anything but zeros.
    populated: Vec<Range<u64>>,
    /// What cannot be read, nor written: guards, pages that a userfaultfd fills, what lies behind a file's end.
    out_of_reach: Vec<Range<u64>>,
    /// What the snapshot does not have: zeros in its tables. And what cannot be compared: pages that are the file's,
    /// which cannot be read beside the process.
    left_out: Vec<Range<u64>>,
    /// This, and what the kernel writes by itself.
    left_alone: Vec<Range<u64>>,
}

impl<'a> HeldMemory<'a> {
    pub(super) fn new(attempt: &Attempt<'_>, states: &'a PageStates) -> Result<HeldMemory<'a>, Error> {
        let Attempt { pid, rollback, held, .. } = *attempt;
        let mut populated = Vec::new();
        for (index, mapping) in held.address_space().mappings().iter().enumerate() {
            if mapping.captured {
                attempt.check_interrupt()?;
                let start = mapping.range.start();
                let found = held.populated(index)?;
                populated.extend(found.into_iter().map(|it| start + it.start..start + it.end));
            }
        }
        merge(&mut populated);
        // What is mapped again has nothing in it, or what is in its file.
        let mut remade: Vec<_> = states.remade().iter().map(Remade::range).collect();
        merge(&mut remade);
        let without_remade = |ranges: &[Range<u64>]| -> Vec<Range<u64>> {
            ranges.iter().flat_map(|range| complement(&remade, range.clone())).collect()
        };
        populated = without_remade(&populated);
        // Where guards are installed nothing is left, and where they are removed nothing is yet.
        let mut guards: Vec<_> = states.guards().iter().map(|it| it.range.clone()).collect();
        merge(&mut guards);
        populated = populated.iter().flat_map(|range| complement(&guards, range.clone())).collect();
        let (mut files, mut behind_files) = (Vec::new(), Vec::new());
        for it in states.remade() {
            let Some((_, number)) = it.file else { continue };
            let range = it.range();
            let open = || -> io::Result<(File, u64)> {
                let file = held.open_descriptor(number)?;
                let length_bytes = file.metadata()?.len();
                Ok((file, length_bytes))
            };
            let (file, length_bytes) = open().map_err(|error| {
                let why = format!("{}, and its file cannot be read ({error})", it.text);
                attempt.misfit(vec![why])
            })?;
            let offset = it.mapping.file_offset_bytes;
            let page_bytes = rustix::param::page_size() as u64;
            let there_bytes = length_bytes.saturating_sub(offset).next_multiple_of(page_bytes);
            let end = range.start.saturating_add(there_bytes).min(range.end);
            populated.push(range.start..end);
            behind_files.push(end..range.end);
            files.push((range, file, offset));
        }
        merge(&mut populated);
        let space = &rollback.space;
        let left_out = space.excluded().iter().chain(space.unreadable());
        let mut left_out: Vec<_> = left_out.map(|range| range.start()..range.end()).collect();
        let mut out_of_reach = Vec::new();
        for now in held.left_out() {
            let range = now.range.start()..now.range.end();
            match now.why {
                WhyLeftOut::FileClosed | WhyLeftOut::FileServer => left_out.push(range),
                _ => out_of_reach.push(range),
            }
        }
        merge(&mut left_out);
        merge(&mut out_of_reach);
        out_of_reach = without_remade(&out_of_reach);
        out_of_reach = out_of_reach.iter().flat_map(|range| complement(&guards, range.clone())).collect();
        out_of_reach.extend(behind_files);
        merge(&mut out_of_reach);
        let mut left_alone = left_out.clone();
        for (_, area) in held.rseq_areas() {
            let pointer = area.start + RSEQ_POINTER.start..area.start + RSEQ_POINTER.end;
            left_alone.extend([area.start..pointer.start, pointer.end..area.end]);
        }
        merge(&mut left_alone);
        Ok(HeldMemory {
            states,
            pid,
            memory: held.process_memory(),
            files,
            populated,
            out_of_reach,
            left_out,
            left_alone,
        })
    }

    /// Where there may be anything but zeros: sorted and apart.
    pub(super) fn populated(&self) -> &[Range<u64>] {
        &self.populated
    }

    /// Fills `buffer` from an address on; what cannot be read is zeros.
    pub(super) fn copy(&self, address: u64, buffer: &mut [u8]) -> Result<(), Error> {
        Ok(self.memory.copy(address, buffer, &mut Vec::new())?)
    }

    /// Whether any byte of a range can be read.
    pub(super) fn is_readable(&self, range: &Range<u64>) -> Result<bool, Error> {
        let mut buffer = vec![0; PIECE_BYTES];
        for at in range.clone().step_by(PIECE_BYTES) {
            let length = usize::try_from(range.end - at).map_or(PIECE_BYTES, |left| left.min(PIECE_BYTES));
            let mut unreadable = Vec::new();
            self.read(at, &mut buffer[..length], &mut unreadable)?;
            if unreadable.iter().map(|it| it.length_bytes()).sum::<u64>() < length as u64 {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Patches that empty what is there of these ranges.
    pub(super) fn zeros_for(&self, ranges: &[Range<u64>]) -> Vec<Patch> {
        let there = ranges.iter().flat_map(|range| overlapping(&self.populated, range.clone()));
        there
            .flat_map(|range| {
                let starts = range.clone().step_by(PIECE_BYTES);
                starts.map(move |at| (at, (range.end - at).min(PIECE_BYTES as u64)))
            })
            .map(|(at, length)| Patch::of_zeros(at, usize::try_from(length).unwrap_or(PIECE_BYTES)))
            .collect()
    }

    /// Fills `buffer` from an address on, with what is there once the mappings are mended.
    fn read(&self, at: u64, buffer: &mut [u8], unreadable: &mut Vec<AddressRange>) -> Result<(), Error> {
        let end = at + buffer.len() as u64;
        let mut done = at;
        let first = self.files.partition_point(|(range, ..)| range.end <= at);
        for (range, file, offset) in self.files[first..].iter().take_while(|(range, ..)| range.start < end) {
            let here = range.start.max(at)..range.end.min(end);
            self.memory.copy(done, self.part(at, buffer, &(done..here.start)), unreadable)?;
            self.read_file(file, offset + (here.start - range.start), self.part(at, buffer, &here))?;
            done = here.end;
        }
        Ok(self.memory.copy(done, self.part(at, buffer, &(done..end)), unreadable)?)
    }

    /// Fills `buffer` from an offset in a file on, with zeros behind its end.
    fn read_file(&self, file: &File, mut offset: u64, mut buffer: &mut [u8]) -> Result<(), SinkError> {
        while !buffer.is_empty() {
            match file.read_at(buffer, offset) {
                Ok(0) => {
                    buffer.fill(0);
                    break;
                }
                Ok(bytes) => {
                    buffer = &mut buffer[bytes..];
                    offset += bytes as u64;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(source) => {
                    return Err(SinkError::LiveProcess { pid: self.pid, action: "read a file of", source });
                }
            }
        }
        Ok(())
    }

    fn part<'b>(&self, at: u64, buffer: &'b mut [u8], range: &Range<u64>) -> &'b mut [u8] {
        let offset = |address: u64| usize::try_from(address - at).unwrap_or(usize::MAX);
        &mut buffer[offset(range.start)..offset(range.end)]
    }
}

impl Target for HeldMemory<'_> {
    fn bytes<'b>(&'b self, at: u64, length: usize, buffer: &'b mut Vec<u8>) -> Result<&'b [u8], Error> {
        let window = at..at + length as u64;
        buffer.resize(length, 0);
        let there: Vec<_> = overlapping(&self.populated, window.clone()).collect();
        for range in complement(&there, window.clone()) {
            self.part(at, buffer, &range).fill(0);
        }
        let mut unreadable = Vec::new();
        for range in there {
            self.read(range.start, self.part(at, buffer, &range), &mut unreadable)?;
        }
        for range in overlapping(&self.left_out, window.clone()) {
            self.part(at, buffer, &range).fill(0);
        }
        let out_of_reach = overlapping(&self.out_of_reach, window);
        unreadable.extend(out_of_reach.filter_map(|range| AddressRange::new(range.start, range.end).ok()));
        let is_left_out = |range: &AddressRange| {
            let overlap = overlapping(&self.left_out, range.start()..range.end());
            overlap.map(|it| it.end - it.start).sum::<u64>() == range.length_bytes()
        };
        match unreadable.into_iter().find(|range| !is_left_out(range)) {
            None => Ok(buffer),
            Some(range) => Err(RollbackError::DoesNotFit {
                pid: self.pid,
                differences: vec![format!("{range} cannot be read any more")],
                only_new: false,
                advice: None,
            }
            .into()),
        }
    }

    fn is_absent(&self, range: Range<u64>) -> bool {
        overlapping(&self.populated, range).next().is_none()
    }

    fn written_anyhow(&self) -> &[Range<u64>] {
        self.states.lazily_free()
    }

    fn left_alone(&self) -> &[Range<u64>] {
        &self.left_alone
    }
}
