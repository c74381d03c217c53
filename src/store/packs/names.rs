//! The names of pack files.

use crate::store::error::StoreError;
use crate::sys::dir::{Dir, Name};
use crate::sys::file;

/// The file name of pack `number`.
pub(crate) fn file_name(number: u32) -> String {
    format!("{number:08}.pack")
}

/// The number of the pack with this file name.
pub(crate) fn number_of(name: &str) -> Option<u32> {
    name.strip_suffix(".pack")?.parse().ok().filter(|number| file_name(*number) == name)
}

/// The packs in `dir`: number and name, in order. Other files are ignored.
pub(crate) fn list(dir: &Dir) -> Result<Vec<(u32, Name)>, StoreError> {
    let mut packs = Vec::new();
    for name in file::list(dir).map_err(StoreError::io("list", dir))? {
        if let Some(number) = name.name().to_str().and_then(number_of) {
            packs.push((number, name));
        }
    }
    packs.sort_unstable_by_key(|(number, _)| *number);
    Ok(packs)
}
