//! The packs that gc has removed, and for each the pack that holds what was kept of it. gc records
//! them before it removes them.
//!
//! After a power failure or in a copy of a store, the index may be older than the packs and refer
//! to packs that do not exist. This file distinguishes a pack that gc removed from one that was
//! lost. Entries are appended and never change. A power failure may tear the last ones, which their
//! checks detect.
//!
//! ```text
//!  0        4         20       24        40       44
//!  +--------+---------+--------+---------+--------+
//!  | number | pack id | number | pack id | CRC32C |   a removed pack, and the one that replaces it;
//!  | u32    | 16 B    | u32    | 16 B    | u32    |   zeros if nothing of it was kept
//!  +--------+---------+--------+---------+--------+
//! ```

use crate::store::error::StoreError;
use crate::store::id::PackId;
use crate::sys::dir::Dir;
use crate::sys::file;

const COLLECTED_FILE: &str = "COLLECTED";
const NAMED_BYTES: usize = 20;
const ENTRY_BYTES: usize = 2 * NAMED_BYTES + 4;

/// A pack, by number and id: a number may be used again, an id is not.
pub(crate) type Named = (u32, PackId);

/// A pack that gc has removed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Collected {
    pub(crate) pack: Named,
    /// The pack that holds what was kept of it.
    pub(crate) kept_in: Option<Named>,
}

/// The entries of the file. Empty if there is none.
pub(crate) fn read(store: &Dir) -> Vec<Collected> {
    // A gc that removes every pack of a terabyte appends 160 KiB.
    let bytes = file::read_bounded(&store.join(COLLECTED_FILE), 256 << 20).unwrap_or_default();
    let named = |bytes: &[u8]| {
        let (number, id) = bytes.split_at(4);
        let number = u32::from_le_bytes(number.try_into().unwrap_or_default());
        (number, PackId(id.try_into().unwrap_or_default()))
    };
    let collected = |entry: &[u8; ENTRY_BYTES]| {
        let (packs, check) = entry.split_at(2 * NAMED_BYTES);
        let (pack, kept_in) = packs.split_at(NAMED_BYTES);
        let kept_in = named(kept_in);
        let is_whole = check == crc32c::crc32c(packs).to_le_bytes();
        is_whole.then_some(Collected { pack: named(pack), kept_in: (kept_in.0 != 0).then_some(kept_in) })
    };
    bytes.as_chunks::<ENTRY_BYTES>().0.iter().filter_map(collected).collect()
}

/// Appends to the file. The entries are durable when this returns.
pub(crate) fn add(store: &Dir, collected: &[Collected]) -> Result<(), StoreError> {
    let name = store.join(COLLECTED_FILE);
    let named = |(number, id): Named| [&number.to_le_bytes()[..], &id.0].concat();
    let entry = |it: &Collected| {
        let packs = [named(it.pack), named(it.kept_in.unwrap_or((0, PackId([0; 16]))))].concat();
        let check = crc32c::crc32c(&packs).to_le_bytes();
        [packs, check.to_vec()].concat()
    };
    let bytes: Vec<u8> = collected.iter().flat_map(entry).collect();
    let append = || {
        let is_new = !name.exists();
        let file = file::open_or_create(&name)?;
        let end_bytes = file.length_bytes()?;
        let end_bytes = end_bytes - end_bytes % ENTRY_BYTES as u64;
        file.write_all_at(&bytes, end_bytes)?;
        file.sync()?;
        if is_new { file::sync_dir(store) } else { Ok(()) }
    };
    append().map_err(StoreError::io("write", &name))
}

/// Appends to the file. If there is no space for that, removes the file: it may say that parts of
/// other packs are kept in the packs that gc removes now, and that would be wrong. The change is
/// durable when this returns.
pub(crate) fn add_or_forget(store: &Dir, collected: &[Collected]) -> Result<(), StoreError> {
    match add(store, collected) {
        Err(StoreError::DiskFull { .. }) => {
            let name = store.join(COLLECTED_FILE);
            if !name.exists() {
                return Ok(());
            }
            file::remove(&name).map_err(StoreError::io("remove", &name))?;
            file::sync_dir(store).map_err(StoreError::io("make durable", store))
        }
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_added_is_there_and_half_an_entry_says_nothing() {
        let scratch = tempfile::tempdir().unwrap();
        let dir = &Dir::open(scratch.path()).unwrap();
        assert_eq!(read(dir), []);
        let named = |number| (number, PackId([u8::try_from(number).unwrap(); 16]));
        let one = Collected { pack: named(1), kept_in: Some(named(3)) };
        let two = Collected { pack: named(2), kept_in: None };
        add(dir, &[one, two]).unwrap();
        let path = scratch.path().join(COLLECTED_FILE);
        let whole = std::fs::read(&path).unwrap();
        std::fs::write(&path, &whole[..70]).unwrap();
        assert_eq!(read(dir), [one]);
        add(dir, &[two]).unwrap();
        assert_eq!(read(dir), [one, two]);
        // This is what a power failure may leave of an entry that was not durable.
        let mut torn = std::fs::read(&path).unwrap();
        torn.extend([0; ENTRY_BYTES]);
        torn.extend(&whole[..30]);
        torn.extend([0; ENTRY_BYTES - 30]);
        std::fs::write(&path, &torn).unwrap();
        assert_eq!(read(dir), [one, two]);
    }
}
