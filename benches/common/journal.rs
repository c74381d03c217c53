//! A memory journal as a baseline: a plain implementation of the algorithm of Wasmer's WASIX
//! journal.
//!
//! It scans memory in cells of a fixed size (512 bytes in the original). For each cell's address, a
//! hash map holds the first 64 bits of the cell's BLAKE3 hash. A cell whose hash is new or changed
//! is dirty. Adjacent dirty cells form one extent. Each extent is compressed by LZ4 with its size
//! prepended, and is appended to a file. Zeros are no special case. Replay applies every extent
//! from the start.
//!
//! ```text
//! extent   start u64 | end u64 | stored length u32 | LZ4 with prepended size
//! mark     u64::MAX  | how many extents came before it, u64 | 0 u32     the end of a snapshot
//! ```
//!
//! The original's entries have 32 bytes before the data and these have 20. The original leaves
//! syncing to the kernel; this one syncs, because a store's snapshot is durable when it returns.
#![allow(dead_code)] // Each bench that includes this file uses a part of it.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, BufReader, BufWriter, Read, Write};
use std::ops::Range;
use std::path::Path;

/// The cell size of the original.
pub(crate) const CELL_BYTES: usize = 512;
const MARK: u64 = u64::MAX;

/// The hashes of the cells of one process.
pub(crate) struct Scan {
    cell_bytes: usize,
    hashes: HashMap<u64, u64>,
}

impl Scan {
    pub(crate) fn new(cell_bytes: usize) -> Self {
        Scan { cell_bytes, hashes: HashMap::new() }
    }

    /// The ranges of `memory`, which lies at `address`, that changed since the last scan.
    pub(crate) fn dirty(&mut self, address: u64, memory: &[u8]) -> Vec<Range<usize>> {
        let mut extents: Vec<Range<usize>> = Vec::new();
        for (at, cell) in memory.chunks(self.cell_bytes).enumerate() {
            let start = at * self.cell_bytes;
            let hash = blake3::hash(cell);
            let hash = u64::from_be_bytes(std::array::from_fn(|byte| hash.as_bytes()[byte]));
            if self.hashes.insert(address + start as u64, hash) == Some(hash) {
                continue;
            }
            match extents.last_mut() {
                Some(last) if last.end == start => last.end = start + cell.len(),
                _ => extents.push(start..start + cell.len()),
            }
        }
        extents
    }
}

/// A journal of one process.
pub(crate) struct Journal {
    scan: Scan,
    file: BufWriter<File>,
    extents: u64,
}

impl Journal {
    pub(crate) fn create(path: &Path, cell_bytes: usize) -> io::Result<Self> {
        Ok(Journal { scan: Scan::new(cell_bytes), file: BufWriter::new(File::create(path)?), extents: 0 })
    }

    /// Appends what changed in the mappings; each is an address and its bytes. Returns how many
    /// extents there were.
    pub(crate) fn snapshot<'a>(
        &mut self,
        mappings: impl IntoIterator<Item = (u64, &'a [u8])>,
    ) -> io::Result<u64> {
        let before = self.extents;
        for (address, memory) in mappings {
            for extent in self.scan.dirty(address, memory) {
                let range = address + extent.start as u64..address + extent.end as u64;
                self.append(range, &lz4_flex::compress_prepend_size(&memory[extent]))?;
                self.extents += 1;
            }
        }
        self.append(MARK..self.extents, &[])?;
        self.file.flush()?;
        self.file.get_ref().sync_data()?;
        Ok(self.extents - before)
    }

    fn append(&mut self, range: Range<u64>, stored: &[u8]) -> io::Result<()> {
        self.file.write_all(&range.start.to_le_bytes())?;
        self.file.write_all(&range.end.to_le_bytes())?;
        self.file.write_all(&u32::try_from(stored.len()).map_err(io::Error::other)?.to_le_bytes())?;
        self.file.write_all(stored)
    }
}

/// Replays a journal up to and including its `snapshots`th mark. `write` gets every extent, oldest
/// first.
pub(crate) fn replay(path: &Path, snapshots: usize, mut write: impl FnMut(u64, &[u8])) -> io::Result<()> {
    let mut file = BufReader::new(File::open(path)?);
    let mut marks = 0;
    let mut stored = Vec::new();
    while marks < snapshots {
        let (mut start, mut end, mut length) = ([0; 8], [0; 8], [0; 4]);
        file.read_exact(&mut start)?;
        file.read_exact(&mut end)?;
        file.read_exact(&mut length)?;
        stored.resize(u32::from_le_bytes(length) as usize, 0);
        file.read_exact(&mut stored)?;
        if u64::from_le_bytes(start) == MARK {
            marks += 1;
            continue;
        }
        let plain = lz4_flex::decompress_size_prepended(&stored).map_err(io::Error::other)?;
        if plain.len() as u64 != u64::from_le_bytes(end) - u64::from_le_bytes(start) {
            return Err(io::Error::other("an extent does not have the length of its range"));
        }
        write(u64::from_le_bytes(start), &plain);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn replayed(path: &Path, snapshots: usize, length: usize) -> Vec<u8> {
        let mut memory = vec![0xAA; length];
        replay(path, snapshots, |address, bytes| {
            let start = usize::try_from(address).unwrap() - 4096;
            memory[start..start + bytes.len()].copy_from_slice(bytes);
        })
        .unwrap();
        memory
    }

    #[test]
    fn a_replay_up_to_each_mark_gives_the_memory_of_that_snapshot() {
        let dir = tempfile::tempdir().unwrap();
        for cell_bytes in [128, 512] {
            let path = dir.path().join(format!("journal-{cell_bytes}"));
            let mut journal = Journal::create(&path, cell_bytes).unwrap();
            // The last cell is a partial one, and everything is zeros at first.
            let mut memory = vec![0u8; 100_000];
            let mut moments = Vec::new();
            for step in 0..6u8 {
                memory[usize::from(step) * 9_000 + 500] = step;
                memory[40_000..40_000 + 300 * usize::from(step)].fill(step);
                memory[99_999] = 100 - step;
                journal.snapshot([(4096, &memory[..])]).unwrap();
                moments.push(memory.clone());
            }
            for (at, moment) in moments.iter().enumerate() {
                assert!(replayed(&path, at + 1, moment.len()) == *moment, "snapshot {at}");
            }
        }
    }

    #[test]
    fn dirty_neighbours_become_one_extent_and_clean_cells_none() {
        let mut scan = Scan::new(512);
        let mut memory = vec![0u8; 8192];
        let extents = scan.dirty(0, &memory);
        assert!(
            extents.len() == 1 && extents[0] == (0..8192),
            "at first all is dirty, zeros too: {extents:?}"
        );
        assert!(scan.dirty(0, &memory).is_empty());
        for at in [600, 1030, 8191] {
            memory[at] = 1;
        }
        assert_eq!(scan.dirty(0, &memory), [512..1536, 7680..8192]);
        assert!(scan.dirty(0, &memory).is_empty());
    }

    #[test]
    fn an_unchanged_snapshot_is_a_mark_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("journal");
        let mut journal = Journal::create(&path, 512).unwrap();
        journal.snapshot([(4096, &[7u8; 5000][..])]).unwrap();
        let before = path.metadata().unwrap().len();
        assert_eq!(journal.snapshot([(4096, &[7u8; 5000][..])]).unwrap(), 0);
        assert_eq!(path.metadata().unwrap().len(), before + 20);
    }
}
