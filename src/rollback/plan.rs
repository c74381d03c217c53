//! The plan of a rollback: the differences from the snapshot, found and checked before anything is
//! written.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use crate::capture::piece::PIECE_BYTES;
use crate::error::Error;
use crate::hash::{self, Hash};
use crate::progress::Progress;
use crate::ranges::{complement, overlapping};
use crate::region;
use crate::store::OpenStore;
use crate::store::packs::object::ObjectKind;
use crate::store::read::{Check, Reader};
use crate::table::Place;
use crate::workers;

/// How many bytes of differences are kept decoded. Further ones are decoded a second time.
const KEPT_BYTES: usize = 128 << 20;

/// Writes are counted in units of this size, from the start of a region. Trackers record writes in
/// this unit, and the kernel copies shared memory of forks in it.
const PAGE_BYTES: usize = 4096;

/// The memory to roll back.
pub(super) trait Target: Sync {
    /// The present bytes at `at`, in place or in `buffer`. Memory that is not to be compared
    /// appears as it is in the snapshot: as zeros.
    fn bytes<'b>(&'b self, at: u64, length: usize, buffer: &'b mut Vec<u8>) -> Result<&'b [u8], Error>;

    /// Whether the range is known to have nothing but zeros, without reading it.
    fn is_absent(&self, _range: Range<u64>) -> bool {
        false
    }

    /// Where pages are written although they are equal: sorted and disjoint.
    fn written_anyhow(&self) -> &[Range<u64>] {
        &[]
    }

    /// The ranges that are left as they are: sorted and disjoint.
    fn left_alone(&self) -> &[Range<u64>] {
        &[]
    }
}

/// The memory of one table.
pub(super) struct Part {
    pub(super) table: Hash,
    pub(super) place: Place,
    /// The offset in the target at which it begins.
    pub(super) at: u64,
    pub(super) look: Look,
}

/// Which bytes of a part are compared.
pub(super) enum Look {
    /// All bytes.
    Everything,
    /// The ranges, counted from the part's start, and the regions in which this table differs from
    /// the part's own: outside the ranges the memory is known to be as in this table.
    Since(Hash, Vec<Range<u64>>),
}

/// A region in which something is to be written.
#[derive(Debug)]
pub(super) struct Patch {
    /// The offset in the target at which the region begins.
    pub(super) at: u64,
    pub(super) length: usize,
    pub(super) hash: Hash,
    /// The parts of the region to write.
    pub(super) pieces: Vec<Range<usize>>,
    /// The bytes of the pieces, one after the other; `None` where they must be decoded again.
    kept: Option<Vec<u8>>,
}

/// All writes of a rollback.
pub(super) struct Plan<'a> {
    shared: &'a OpenStore,
    check: Check,
    compared_regions: u64,
    /// In address order.
    pub(super) patches: Vec<Patch>,
}

/// The result of writing a plan.
#[derive(Clone, Copy, Debug)]
pub(super) struct Done {
    pub(super) compared_regions: u64,
    pub(super) written_regions: u64,
    pub(super) written_bytes: u64,
}

/// Finds the differences in `parts` and decodes them. Writes nothing.
pub(super) fn plan<'a>(
    shared: &'a OpenStore,
    region_bytes: usize,
    check: Check,
    progress: &Progress,
    parts: Vec<Part>,
    target: &dyn Target,
) -> Result<Plan<'a>, Error> {
    let finder = Finder {
        target,
        region_bytes,
        compared_regions: AtomicU64::new(0),
        room_bytes: AtomicUsize::new(KEPT_BYTES),
        patches: Mutex::default(),
    };
    let meter = progress.begin(parts.iter().map(|part| part.place.length_bytes as u64).sum());
    progress.check()?;
    let start =
        || State { reader: Reader::new(shared, check), now: Vec::new(), plain: vec![0; region_bytes] };
    workers::for_each(parts, start, |state, part| {
        let found = finder.part(state, &part)?;
        finder.patches.lock().unwrap_or_else(PoisonError::into_inner).extend(found);
        Ok::<_, Error>(meter.advance(part.place.length_bytes as u64)?)
    })?;
    let mut patches = finder.patches.into_inner().unwrap_or_else(PoisonError::into_inner);
    patches.sort_unstable_by_key(|patch| patch.at);
    Ok(Plan { shared, check, compared_regions: finder.compared_regions.into_inner(), patches })
}

struct Finder<'a> {
    target: &'a dyn Target,
    region_bytes: usize,
    compared_regions: AtomicU64,
    room_bytes: AtomicUsize,
    patches: Mutex<Vec<Patch>>,
}

/// The state of one worker.
struct State<'a> {
    reader: Reader<'a>,
    now: Vec<u8>,
    plain: Vec<u8>,
}

impl Finder<'_> {
    fn part(&self, state: &mut State<'_>, part: &Part) -> Result<Vec<Patch>, Error> {
        let length_bytes = part.place.length_bytes;
        let mut patches = Vec::new();
        match &part.look {
            Look::Since(known, changed) if *known == part.table && changed.is_empty() => {}
            Look::Since(known, changed) => {
                let wanted = state.reader.hashes(ObjectKind::Table, &part.table, part.place.regions)?;
                // If the table is damaged, nothing is known.
                let known = match *known == part.table {
                    true => Some(wanted.clone()),
                    false => state.reader.hashes(ObjectKind::Table, known, part.place.regions).ok(),
                };
                for (region, wanted) in wanted.iter().enumerate() {
                    let start = region * self.region_bytes;
                    let end = length_bytes.min(start + self.region_bytes);
                    let is_known = known.as_ref().is_some_and(|known| known[region] == *wanted);
                    if !is_known || overlapping(changed, start as u64..end as u64).next().is_some() {
                        let mut now = std::mem::take(&mut state.now);
                        let at = part.at + start as u64;
                        let bytes = self.target.bytes(at, end - start, &mut now)?;
                        patches.extend(self.compare(state, at, bytes, wanted)?);
                        state.now = now;
                        self.compared_regions.fetch_add(1, Ordering::Relaxed);
                    }
                }
            }
            Look::Everything => {
                if part.table.is_zero() && self.is_absent(part.at, length_bytes) {
                    return Ok(patches);
                }
                let wanted = state.reader.hashes(ObjectKind::Table, &part.table, part.place.regions)?;
                let piece_regions = (PIECE_BYTES / self.region_bytes).max(1);
                for (piece, wanted) in wanted.chunks(piece_regions).enumerate() {
                    let start = piece * piece_regions * self.region_bytes;
                    let length = (wanted.len() * self.region_bytes).min(length_bytes - start);
                    let at = part.at + start as u64;
                    if wanted.iter().all(Hash::is_zero) && self.is_absent(at, length) {
                        continue;
                    }
                    let mut now = std::mem::take(&mut state.now);
                    let bytes = self.target.bytes(at, length, &mut now)?;
                    self.piece(state, at, bytes, wanted, &mut patches)?;
                    state.now = now;
                }
            }
        }
        Ok(patches)
    }

    fn is_absent(&self, at: u64, length: usize) -> bool {
        self.target.is_absent(at..at + length as u64)
    }

    /// Whether any page of a range is written although it may be equal.
    fn is_written_anyhow(&self, range: Range<u64>) -> bool {
        let anyhow = self.target.written_anyhow();
        !anyhow.is_empty()
            && overlapping(anyhow, range.clone()).next().is_some()
            && !self.target.is_absent(range)
    }

    /// Compares regions by their hashes.
    fn piece(
        &self,
        state: &mut State<'_>,
        at: u64,
        now: &[u8],
        wanted: &[Hash],
        patches: &mut Vec<Patch>,
    ) -> Result<(), Error> {
        self.compared_regions.fetch_add(wanted.len() as u64, Ordering::Relaxed);
        let regions: Vec<&[u8]> = now.chunks(self.region_bytes).collect();
        // Where the snapshot has zeros, reading the memory is enough and no hash is needed.
        let hashed: Vec<usize> = (0..wanted.len()).filter(|region| !wanted[*region].is_zero()).collect();
        let hashes = hash::many(&hashed.iter().map(|region| regions[*region]).collect::<Vec<_>>());
        let mut differs: Vec<bool> = regions.iter().map(|_| false).collect();
        for (region, hash) in hashed.iter().zip(hashes) {
            differs[*region] = hash != wanted[*region];
        }
        for (region, differs) in differs.iter_mut().enumerate() {
            let start = at + (region * self.region_bytes) as u64;
            *differs |= self.is_written_anyhow(start..start + regions[region].len() as u64);
        }
        for (region, wanted) in wanted.iter().enumerate() {
            if differs[region] || wanted.is_zero() && !region::is_zero(regions[region]) {
                let at = at + (region * self.region_bytes) as u64;
                patches.extend(self.compare(state, at, regions[region], wanted)?);
            }
        }
        Ok(())
    }

    /// Compares one region, byte by byte.
    fn compare(
        &self,
        state: &mut State<'_>,
        at: u64,
        now: &[u8],
        hash: &Hash,
    ) -> Result<Option<Patch>, Error> {
        let length = now.len();
        let plain = &mut state.plain[..length];
        decode(&mut state.reader, hash, plain)?;
        let anyhow =
            |range: &Range<usize>| self.is_written_anyhow(at + range.start as u64..at + range.end as u64);
        let differs = |range: &Range<usize>| now[range.clone()] != plain[range.clone()] || anyhow(range);
        let pages = (0..length).step_by(PAGE_BYTES).map(|start| start..length.min(start + PAGE_BYTES));
        let mut pieces: Vec<Range<usize>> = Vec::new();
        for page in pages.filter(differs) {
            match pieces.last_mut() {
                Some(last) if last.end == page.start => last.end = page.end,
                _ => pieces.push(page),
            }
        }
        let left: Vec<_> = overlapping(self.target.left_alone(), at..at + length as u64).collect();
        if !left.is_empty() {
            let around = |piece: Range<usize>| {
                let whole = at + piece.start as u64..at + piece.end as u64;
                complement(&left, whole).into_iter().map(|rest| {
                    let offset = |there: u64| usize::try_from(there - at).unwrap_or(length);
                    offset(rest.start)..offset(rest.end)
                })
            };
            pieces = pieces.into_iter().flat_map(around).filter(differs).collect();
        }
        if pieces.is_empty() {
            return Ok(None);
        }
        let bytes: usize = pieces.iter().map(Range::len).sum();
        let take = |room: usize| room.checked_sub(bytes);
        let has_room = !hash.is_zero()
            && self.room_bytes.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take).is_ok();
        let kept = has_room.then(|| pieces.iter().flat_map(|piece| &plain[piece.clone()]).copied().collect());
        Ok(Some(Patch { at, length, hash: *hash, pieces, kept }))
    }
}

fn decode(reader: &mut Reader<'_>, hash: &Hash, plain: &mut [u8]) -> Result<(), Error> {
    match hash.is_zero() {
        true => plain.fill(0),
        false => reader.region(hash, plain)?,
    }
    Ok(())
}

impl Patch {
    /// A patch that fills a whole range with zeros.
    pub(super) fn of_zeros(at: u64, length: usize) -> Patch {
        Patch { at, length, hash: Hash::ZERO, pieces: std::iter::once(0..length).collect(), kept: None }
    }
}

impl Plan<'_> {
    /// Removes these ranges from the patches that write zeros. The ranges are sorted and disjoint.
    pub(super) fn leave_zeros_out(&mut self, ranges: &[Range<u64>]) {
        for patch in self.patches.iter_mut().filter(|patch| patch.hash.is_zero()) {
            let offset = |address: u64| usize::try_from(address - patch.at).unwrap_or(patch.length);
            let rest = |piece: &Range<usize>| {
                let whole = patch.at + piece.start as u64..patch.at + piece.end as u64;
                complement(ranges, whole)
            };
            let rest: Vec<Range<u64>> = patch.pieces.iter().flat_map(rest).collect();
            patch.pieces = rest.into_iter().map(|it| offset(it.start)..offset(it.end)).collect();
        }
    }

    /// Writes everything, in parallel. `part` returns, for each patch, the context that `write`
    /// needs. The bytes go to an offset in the patch's region.
    pub(super) fn write<'p, T: Send>(
        &'p self,
        mut part: impl FnMut(&'p Patch) -> T,
        write: impl Fn(&mut T, usize, &[u8]) -> Result<(), Error> + Sync,
    ) -> Result<Done, Error> {
        let work: Vec<(&Patch, T)> = self.patches.iter().map(|patch| (patch, part(patch))).collect();
        let start = || (Reader::new(self.shared, self.check), Vec::new());
        workers::for_each(
            work,
            start,
            |(reader, plain): &mut (Reader<'_>, Vec<u8>), (patch, mut target)| {
                if let Some(kept) = &patch.kept {
                    let mut rest = &kept[..];
                    for piece in &patch.pieces {
                        let (bytes, after) = rest.split_at(piece.len());
                        rest = after;
                        write(&mut target, piece.start, bytes)?;
                    }
                    return Ok(());
                }
                plain.resize(patch.length, 0);
                decode(reader, &patch.hash, plain)?;
                patch
                    .pieces
                    .iter()
                    .try_for_each(|piece| write(&mut target, piece.start, &plain[piece.clone()]))
            },
        )?;
        let written: usize = self.patches.iter().flat_map(|patch| &patch.pieces).map(Range::len).sum();
        Ok(Done {
            compared_regions: self.compared_regions,
            written_regions: self.patches.len() as u64,
            written_bytes: written as u64,
        })
    }
}
