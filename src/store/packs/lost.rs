//! Lost packs: packs that are missing although gc did not remove them, or that are shorter than
//! they were.
//!
//! Only the index knows which packs there were, and it is rebuilt when it does not match the packs.
//! So what it knew is written to a text file, LOST. Every opening warns and every verify reports
//! what is in that file, until a repair has recorded the loss or the packs are put back.
//!
//! ```text
//! # …
//! pack 3 6b0f… 605264 -      number, id, bytes that were durable, bytes that exist ("-": no file)
//! snapshot 90ac…             a snapshot whose record was in the lost part of the pack above it
//! ```

use std::collections::{BTreeMap, HashSet};
use std::fmt::Write;
use std::sync::Arc;

use super::collected::{Collected, Named};
use super::names;
use super::pack::Pack;
use super::watermark::Watermark;
use crate::hash::Hash;
use crate::record::SnapshotId;
use crate::store::catalog::Catalog;
use crate::store::error::StoreError;
use crate::store::id::PackId;
use crate::sys::dir::Dir;
use crate::sys::file;

const LOST_FILE: &str = "LOST";
const INTRODUCTION: &str = "\
# Packs that were in this store and are gone or too short, and the snapshots that are known to have been in them.
# `stillframe repair` puts this on record in damaged/REPORT.txt and removes this file; to put the packs back does as well.
";

/// A pack that is lost, entirely or in part.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Lost {
    pub(crate) pack: Named,
    /// Its least length before. Unknown if only its name is known.
    pub(crate) durable_bytes: u64,
    /// Its present length. `None` if there is no such pack.
    pub(crate) found_bytes: Option<u64>,
    /// Live snapshots whose records were in the lost part, as far as they are known.
    pub(crate) snapshots: Vec<SnapshotId>,
}

impl Lost {
    /// The name of its file.
    pub(crate) fn file_name(&self) -> String {
        names::file_name(self.pack.0)
    }

    /// What is wrong with it.
    pub(crate) fn why(&self) -> String {
        let of = match self.durable_bytes {
            0 => String::new(),
            bytes => format!(", of which {bytes} bytes were stored durably"),
        };
        match self.found_bytes {
            None => format!("the pack is gone{of}; put it back from a copy, or run `stillframe repair`"),
            Some(found) => format!(
                "the pack was cut to {found} bytes{of}; put it back from a copy, or run `stillframe repair`"
            ),
        }
    }

    /// Whether a byte of the pack is lost.
    fn has(&self, pack: u32, offset_bytes: u64) -> bool {
        self.pack.0 == pack && self.found_bytes.is_none_or(|found| offset_bytes >= found)
    }
}

/// The packs that exist, and those whose content is known to be elsewhere.
pub(crate) struct Present<'a> {
    pub(crate) packs: &'a [Arc<Pack>],
    /// The numbers of unusable packs and of packs that were set aside.
    pub(crate) other_numbers: Vec<u32>,
    pub(crate) collected: &'a [Collected],
}

impl Present<'_> {
    /// Those of the known packs that are lost.
    pub(crate) fn lost(&self, known: impl Iterator<Item = (u32, Watermark)>) -> Vec<Lost> {
        let gone: HashSet<[u8; 16]> = self.collected.iter().map(|it| it.pack.1.0).collect();
        let replaced: HashSet<u32> =
            self.packs.iter().flat_map(|pack| pack.replaces.iter().copied()).collect();
        let kept_in = self.collected.iter().filter_map(|it| it.kept_in);
        let kept_in = kept_in.map(|(number, pack)| (number, Watermark { pack, end_bytes: 0 }));
        let mut found: BTreeMap<(u32, [u8; 16]), Lost> = BTreeMap::new();
        for (number, watermark) in known.chain(kept_in) {
            let there = self.packs.iter().find(|it| it.number == number && it.id == watermark.pack);
            let found_bytes = there.map(|pack| pack.length_bytes());
            let is_whole = match found_bytes {
                Some(found_bytes) => found_bytes >= watermark.end_bytes,
                None => {
                    gone.contains(&watermark.pack.0)
                        || replaced.contains(&number)
                        || self.other_numbers.contains(&number)
                }
            };
            if is_whole {
                continue;
            }
            let lost = found.entry((number, watermark.pack.0)).or_insert_with(|| Lost {
                pack: (number, watermark.pack),
                durable_bytes: 0,
                found_bytes,
                snapshots: Vec::new(),
            });
            lost.durable_bytes = lost.durable_bytes.max(watermark.end_bytes);
        }
        found.into_values().collect()
    }

    /// Those of an earlier opening that are still lost.
    pub(crate) fn still_lost(&self, before: Vec<Lost>) -> Vec<Lost> {
        let is_back = |lost: &Lost| {
            let there = self.packs.iter().find(|it| (it.number, it.id) == lost.pack);
            there.is_some_and(|pack| pack.length_bytes() >= lost.durable_bytes)
        };
        before.into_iter().filter(|lost| !is_back(lost)).collect()
    }
}

/// Adds the live snapshots of a catalog from before the loss.
pub(crate) fn name_snapshots(lost: &mut [Lost], catalog: &Catalog) {
    for (id, entry) in catalog.all_live() {
        let at = entry.location;
        for it in lost.iter_mut().filter(|it| it.has(at.pack, at.offset_bytes)) {
            it.snapshots.push(*id);
        }
    }
    lost.iter_mut().for_each(|it| it.snapshots.sort_unstable());
}

/// Merges what was known with what was found now.
pub(crate) fn join(mut before: Vec<Lost>, now: Vec<Lost>) -> Vec<Lost> {
    for lost in now {
        match before.iter_mut().find(|it| it.pack == lost.pack) {
            None => before.push(lost),
            Some(it) => {
                it.durable_bytes = it.durable_bytes.max(lost.durable_bytes);
                it.snapshots.extend(lost.snapshots);
                it.snapshots.sort_unstable();
                it.snapshots.dedup();
            }
        }
    }
    before
}

/// The content of the file. Empty if there is none.
pub(crate) fn read(store: &Dir) -> Vec<Lost> {
    let bytes = file::read_bounded(&store.join(LOST_FILE), 64 << 20).unwrap_or_default();
    let mut all: Vec<Lost> = Vec::new();
    for line in String::from_utf8_lossy(&bytes).lines() {
        match line.split(' ').collect::<Vec<_>>()[..] {
            ["pack", number, id, durable, found] => {
                let parsed = (number.parse(), id_of(id), durable.parse());
                let (Ok(number), Some(id), Ok(durable_bytes)) = parsed else { continue };
                let (pack, found_bytes) = ((number, PackId(id)), found.parse().ok());
                all.push(Lost { pack, durable_bytes, found_bytes, snapshots: Vec::new() });
            }
            ["snapshot", id] => {
                let id = id_of(id).map(|id| SnapshotId(Hash(id)));
                if let Some(last) = all.last_mut() {
                    last.snapshots.extend(id);
                }
            }
            _ => {}
        }
    }
    all
}

/// Bytes from their hex digits.
fn id_of<const N: usize>(digits: &str) -> Option<[u8; N]> {
    let (pairs, []) = digits.as_bytes().as_chunks::<2>() else { return None };
    let byte = |pair: &[u8; 2]| u8::from_str_radix(str::from_utf8(pair).ok()?, 16).ok();
    pairs.iter().map(byte).collect::<Option<Vec<u8>>>()?.try_into().ok()
}

/// Writes the file atomically and makes it durable. Removes it if nothing is lost.
pub(crate) fn write(store: &Dir, lost: &[Lost]) -> Result<(), StoreError> {
    let name = store.join(LOST_FILE);
    if lost.is_empty() {
        return file::remove_if_there(&name).map_err(StoreError::io("remove", &name));
    }
    let mut text = INTRODUCTION.to_owned();
    let hex = |id: &PackId| id.0.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    for it in lost {
        let found = it.found_bytes.map_or("-".to_owned(), |bytes| bytes.to_string());
        // Writing to a string does not fail.
        let _ = writeln!(text, "pack {} {} {} {found}", it.pack.0, hex(&it.pack.1), it.durable_bytes);
        for id in &it.snapshots {
            let _ = writeln!(text, "snapshot {id}");
        }
    }
    file::write_whole(&name, text.as_bytes()).map_err(StoreError::io("write", &name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_and_other_lines_are_left_out() {
        let scratch = tempfile::tempdir().unwrap();
        let dir = &Dir::open(scratch.path()).unwrap();
        let id = |byte| SnapshotId(Hash([byte; 32]));
        let lost = |number, found_bytes, snapshots| Lost {
            pack: (number, PackId([7; 16])),
            durable_bytes: 605_264,
            found_bytes,
            snapshots,
        };
        let all = [lost(3, None, vec![id(1), id(2)]), lost(5, Some(64), Vec::new())];
        write(dir, &all).unwrap();
        let path = scratch.path().join(LOST_FILE);
        let text = std::fs::read_to_string(&path).unwrap();
        std::fs::write(&path, format!("snapshot 00\n{text}\npack x\npack 1 zz 1 -\nsnapshot 0g\n")).unwrap();
        assert_eq!(read(dir), all);
        write(dir, &[]).unwrap();
        assert_eq!(read(dir), []);
    }
}
