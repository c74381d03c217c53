//! Replay: turns a snapshot into the entries that restore it, each necessary one once and in order.
//!
//! ```text
//! module ─> entries, with marks between them ─> threads ─> memory, in pieces ─> the mark
//! ```
//!
//! **Marks keep the order.** The runtime executes an entry at once if it concerns files that it
//! opened, and defers the others until a mark. Without marks, a descriptor would be closed too
//! late, and the next file would not get its number. So there is a mark after each entry. This
//! module generates these marks; they are not stored.
//!
//! **Pieces never reach beyond the memory.** For each piece, Wasmer's reader grows the memory to
//! the end of the piece *plus its length*: replaying an unchanged log doubles the memory each time.
//! It also records the hash of each cell within the piece's range, so that the next snapshot writes
//! only what changed since. So each piece is the largest power of two, up to 64 KiB, after which at
//! least as many bytes remain. Only the last cell has a start but no range.

use std::borrow::Cow;
use std::sync::LazyLock;
use std::vec;

use stillframe::{SnapshotId, Store};
use wasmer_journal::JournalEntry;

use crate::error::Error;
use crate::line;

/// The longest piece.
const PIECE_BYTES: usize = 64 << 10;

/// The size of the cells in which Wasmer looks for changes.
const CELL_BYTES: usize = 512;

static ZEROS: [u8; PIECE_BYTES] = [0; PIECE_BYTES];
static COMPRESSED_ZEROS: LazyLock<Vec<u8>> = LazyLock::new(|| lz4_flex::compress_prepend_size(&ZEROS));

/// The rest of a replay.
pub(crate) struct Replay {
    entries: vec::IntoIter<JournalEntry<'static>>,
    memory: Box<dyn AsRef<[u8]> + Send>,
    /// How much of the memory has been returned.
    at: usize,
    mark: Option<JournalEntry<'static>>,
}

impl Replay {
    /// Restores a snapshot.
    pub(crate) fn of(store: &Store, id: SnapshotId) -> Result<Replay, Error> {
        let mut entries = line::beside(store, id)?;
        let mark = entries.pop();
        if let Some(mark) = &mark {
            entries = in_order(entries.into_iter(), mark).collect();
        }
        let memory = Box::new(store.restore(id)?.into_mapping()?);
        Ok(Replay { entries: entries.into_iter(), memory, at: 0, mark })
    }
}

impl Iterator for Replay {
    type Item = JournalEntry<'static>;

    fn next(&mut self) -> Option<JournalEntry<'static>> {
        if let Some(entry) = self.entries.next() {
            return Some(entry);
        }
        let memory = (*self.memory).as_ref();
        let left = &memory[self.at..];
        if left.is_empty() {
            // The memory is not needed again.
            self.memory = Box::new([]);
            self.at = 0;
            return self.mark.take();
        }
        let start = self.at as u64;
        let piece_bytes = piece_bytes(left.len());
        let piece = &left[..piece_bytes.unwrap_or(left.len())];
        let end = if piece_bytes.is_some() { start + piece.len() as u64 } else { start };
        self.at += piece.len();
        let compressed_data = match *piece == ZEROS {
            true => Cow::Borrowed(&COMPRESSED_ZEROS[..]),
            false => Cow::Owned(lz4_flex::compress_prepend_size(piece)),
        };
        Some(JournalEntry::UpdateMemoryRegionV1 { region: start..end, compressed_data })
    }
}

/// Adds a mark after each entry, except those of module and threads.
fn in_order(
    entries: impl Iterator<Item = JournalEntry<'static>>,
    mark: &JournalEntry<'static>,
) -> impl Iterator<Item = JournalEntry<'static>> {
    entries.flat_map(|entry| {
        let is_state = matches!(entry, JournalEntry::InitModuleV1 { .. } | JournalEntry::SetThreadV1 { .. });
        [Some(entry), (!is_state).then(|| mark.clone())].into_iter().flatten()
    })
}

/// The length of the next piece if this many bytes are left; `None` if they are the last piece.
fn piece_bytes(left_bytes: usize) -> Option<usize> {
    let half = (left_bytes / 2).min(PIECE_BYTES);
    (half >= CELL_BYTES).then(|| 1 << half.ilog2())
}

#[cfg(test)]
mod tests {
    use wasmer_wasix_types::wasi::Oflags;
    use wasmer_wasix_types::wasix::ThreadStartType;

    use super::*;
    use crate::samples::{close, mark, open, thread};

    #[test]
    fn there_is_a_mark_behind_each_entry_but_those_of_module_and_threads() {
        let module = JournalEntry::InitModuleV1 { wasm_hash: vec![7; 32].into() };
        let (open, thread) = (open(4, "a", Oflags::CREATE), thread(1, ThreadStartType::MainThread));
        let entries = [module.clone(), open.clone(), close(4), thread.clone()];
        let found: Vec<_> = in_order(entries.into_iter(), &mark()).collect();
        assert_eq!(found, [module, open, mark(), close(4), mark(), thread]);
    }

    #[test]
    fn pieces_cover_memory_in_whole_cells_and_never_reach_beyond_it() {
        for pages in [1, 2, 3, 17, 100] {
            let length_bytes = pages << 16;
            let (mut at, mut pieces) = (0, 0);
            while let Some(piece) = piece_bytes(length_bytes - at) {
                assert!(piece.is_multiple_of(CELL_BYTES) && piece <= PIECE_BYTES);
                at += piece;
                assert!(at + piece <= length_bytes, "its end and its length together");
                pieces += 1;
            }
            assert_eq!(length_bytes - at, CELL_BYTES, "only the last cell has no range");
            assert!(pieces <= pages + 7, "{pieces} pieces for {pages} pages");
        }
    }
}
