//! Up to where the packs are durable, in a small file that is written when a store is closed.
//!
//! The index may not know yet of what was committed last. Without this file, damage there could not
//! be told from the torn tail that a crash leaves, which may be cut. It is a help and no more: it may be missing
//! or old.
//!
//! ```text
//!  0        4         12
//!  +--------+---------+-----+---------+
//!  | number | durable | ... | CRC32C  |   of each pack its number (u32) and so many bytes (u64);
//!  | u32    | u64     |     | u32     |   the check is of everything before it
//!  +--------+---------+-----+---------+
//! ```

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use super::error::StoreError;
use crate::sys::file;

/// So many bytes of a pack, by its number.
pub(crate) type Durable = BTreeMap<u32, u64>;

fn path_in(index: &Path) -> PathBuf {
    index.join("durable")
}

/// What the file in the directory of the index says; nothing if there is none in order.
pub(crate) fn read(index: &Path) -> Durable {
    // Twelve bytes a pack, of which there are fewer than a million.
    let bytes = file::read_bounded(&path_in(index), 16 << 20).unwrap_or_default();
    let Some((packs, check)) = bytes.split_last_chunk::<4>() else { return Durable::new() };
    let (packs, []) = packs.as_chunks::<12>() else { return Durable::new() };
    if u32::from_le_bytes(*check) != crc32c::crc32c(packs.as_flattened()) {
        return Durable::new();
    }
    let pack = |[a, b, c, d, bytes @ ..]: &[u8; 12]| {
        (u32::from_le_bytes([*a, *b, *c, *d]), u64::from_le_bytes(*bytes))
    };
    packs.iter().map(pack).collect()
}

/// Writes the file. It is not made durable itself.
pub(crate) fn write(index: &Path, durable: &Durable) -> Result<(), StoreError> {
    let mut bytes: Vec<u8> = durable
        .iter()
        .flat_map(|(number, bytes)| [&number.to_le_bytes()[..], &bytes.to_le_bytes()[..]].concat())
        .collect();
    bytes.extend(crc32c::crc32c(&bytes).to_le_bytes());
    let path = path_in(index);
    let write = || {
        let file = file::open_or_create(&path)?;
        file.set_length(0)?;
        file.write_all_at(&bytes, 0)
    };
    write().map_err(StoreError::io("write", &path))
}

/// Removes the file, if there is one.
pub(crate) fn remove(index: &Path) -> Result<(), StoreError> {
    let path = path_in(index);
    file::remove_if_there(&path).map_err(StoreError::io("remove", path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_in_order_says_nothing() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(read(dir.path()), Durable::new());
        let durable = Durable::from([(1, 268_435_456), (7, 48)]);
        write(dir.path(), &Durable::from([(1, 4), (2, 5), (3, 6)])).unwrap();
        write(dir.path(), &durable).unwrap();
        assert_eq!(read(dir.path()), durable);
        let whole = std::fs::read(path_in(dir.path())).unwrap();
        for at in 0..whole.len() {
            let mut flipped = whole.clone();
            flipped[at] ^= 4;
            for bytes in [&flipped[..], &whole[..at]] {
                std::fs::write(path_in(dir.path()), bytes).unwrap();
                assert_eq!(read(dir.path()), Durable::new());
            }
        }
        remove(dir.path()).unwrap();
        remove(dir.path()).unwrap();
    }
}
