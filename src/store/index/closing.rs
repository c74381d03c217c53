//! How far each pack is durable, in a small file that is written when a store is closed.
//!
//! The index may not yet have what was committed last. Without this file, damage there would look
//! like the torn tail that a crash leaves, which may be truncated. Nothing depends on the file: it
//! may be missing or old.
//!
//! ```text
//!  0        4           28
//!  +--------+-----------+-----+---------+
//!  | number | watermark | ... | CRC32C  |   for each pack its number and how far it is durable
//!  | u32    | 24 B      |     | u32     |   (watermark.rs); the check covers everything before it
//!  +--------+-----------+-----+---------+
//! ```

use std::collections::BTreeMap;

use crate::store::error::StoreError;
use crate::store::packs::watermark::Watermark;
use crate::sys::dir::{Dir, Name};
use crate::sys::file;

/// How far packs are durable, by their numbers.
pub(crate) type Durable = BTreeMap<u32, Watermark>;

fn name_in(index: &Dir) -> Name {
    index.join("durable")
}

/// The content of the file in the directory of the index. Empty if there is no valid file.
pub(crate) fn read(index: &Dir) -> Durable {
    // 28 bytes a pack, of which there are fewer than a million.
    decode(&file::read_bounded(&name_in(index), 32 << 20).unwrap_or_default())
}

/// Decodes the bytes of the file. Empty if they are not valid.
pub(crate) fn decode(bytes: &[u8]) -> Durable {
    let Some((packs, check)) = bytes.split_last_chunk::<4>() else { return Durable::new() };
    let (packs, []) = packs.as_chunks::<{ 4 + Watermark::BYTES }>() else { return Durable::new() };
    if u32::from_le_bytes(*check) != crc32c::crc32c(packs.as_flattened()) {
        return Durable::new();
    }
    let pack = |[a, b, c, d, watermark @ ..]: &[u8; 4 + Watermark::BYTES]| {
        (u32::from_le_bytes([*a, *b, *c, *d]), Watermark::from_bytes(watermark))
    };
    packs.iter().map(pack).collect()
}

/// The bytes of the file.
pub(crate) fn encode(durable: &Durable) -> Vec<u8> {
    let mut bytes: Vec<u8> = durable
        .iter()
        .flat_map(|(number, watermark)| [&number.to_le_bytes()[..], &watermark.to_bytes()[..]].concat())
        .collect();
    bytes.extend(crc32c::crc32c(&bytes).to_le_bytes());
    bytes
}

/// Writes the file. It is not made durable.
pub(crate) fn write(index: &Dir, durable: &Durable) -> Result<(), StoreError> {
    let bytes = encode(durable);
    let name = name_in(index);
    let write = || {
        // A file that has another name elsewhere must not be written to.
        file::remove_if_there(&name)?;
        file::create_new(&name)?.write_all_at(&bytes, 0)
    };
    write().map_err(StoreError::io("write", &name))
}

/// Removes the file, if there is one.
pub(crate) fn remove(index: &Dir) -> Result<(), StoreError> {
    let name = name_in(index);
    file::remove_if_there(&name).map_err(StoreError::io("remove", &name))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::id::PackId;

    #[test]
    fn what_is_not_in_order_says_nothing() {
        let scratch = tempfile::tempdir().unwrap();
        let dir = &Dir::open(scratch.path()).unwrap();
        assert_eq!(read(dir), Durable::new());
        let at = |end_bytes| Watermark { pack: PackId([9; 16]), end_bytes };
        let durable = Durable::from([(1, at(268_435_456)), (7, at(48))]);
        write(dir, &Durable::from([(1, at(4)), (2, at(5)), (3, at(6))])).unwrap();
        write(dir, &durable).unwrap();
        assert_eq!(read(dir), durable);
        let whole = std::fs::read(name_in(dir).path()).unwrap();
        for at in 0..whole.len() {
            let mut flipped = whole.clone();
            flipped[at] ^= 4;
            for bytes in [&flipped[..], &whole[..at]] {
                std::fs::write(name_in(dir).path(), bytes).unwrap();
                assert_eq!(read(dir), Durable::new());
            }
        }
        remove(dir).unwrap();
        remove(dir).unwrap();
    }
}
