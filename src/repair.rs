//! Repair: whatever happened to the files, what can be had of the snapshots is had again.
//!
//! Nothing is deleted. A pack in which there are damaged bytes is set aside whole, in the folder
//! `damaged/` of the store, after everything whole in it was copied into a new pack.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use crate::error::Error;
use crate::hash::Hash;
use crate::progress::Progress;
use crate::record::SnapshotId;
use crate::store::compact::{KeepAll, compact, salvage};
use crate::store::error::StoreError;
use crate::store::format::Format;
use crate::store::lock::Lock;
use crate::store::names::DAMAGED_DIR;
use crate::store::object::Kind;
use crate::store::pack::{Pack, Scanned};
use crate::store::tree::{IndexEntry, Tree};
use crate::store::{Shared, Store, encode};
use crate::sys::file;
use crate::verify::VerifyOptions;

/// How to repair.
#[derive(Clone, Debug, Default)]
pub struct RepairOptions {
    /// Only find out what would be done. The index is brought up to date all the same, as by any
    /// opening.
    pub dry_run: bool,
    /// How long to wait for another process that has the store open.
    pub wait: Duration,
    /// Watches it.
    pub progress: Progress,
}

/// What was done.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct RepairReport {
    /// Whether the index was built anew.
    pub index_rebuilt: bool,
    /// How many objects the index has now.
    pub objects: u64,
    /// What was damaged, one line for each place.
    pub damaged: Vec<String>,
    /// The snapshots that cannot be restored whole. They stay on record: capturing the same memory
    /// again brings back what they lack.
    pub lost_snapshots: Vec<SnapshotId>,
}

impl Store {
    /// Repairs the store at `path`, which must not be open.
    ///
    /// Cost: reads all of it about three times, and writes anew what was damaged.
    ///
    /// # Errors
    ///
    /// As [`Store::open`]; when something cannot be written. It can be repeated then.
    pub fn repair(path: impl AsRef<Path>, options: &RepairOptions) -> Result<RepairReport, Error> {
        let path = path.as_ref();
        Format::read(path)?;
        let lock = Lock::take(path, options.wait)?;
        let store = Store::open_locked(path, lock, !options.dry_run)?;
        let shared = &**store.shared();
        let mut report = RepairReport { index_rebuilt: shared.index_rebuilt, ..RepairReport::default() };
        let aside = shared.path.join(DAMAGED_DIR);
        let mut others = shared.other_deltas.clone();
        for (path, why) in &shared.unusable {
            report.damaged.push(format!("{}: {why}", path.display()));
            if !options.dry_run {
                others.extend(salvage_unusable(shared, path, &aside)?);
            }
        }
        if !options.dry_run {
            shared.ground(&others)?;
        }
        for pack in shared.log.packs() {
            options.progress.check()?;
            let found = damage(&pack)?;
            if found.is_empty() {
                continue;
            }
            report.damaged.extend(found);
            if !options.dry_run {
                file::create_dir(&aside).map_err(StoreError::io("create", &aside))?;
                shared.log.seal(pack.number);
                compact(shared, &[pack], &KeepAll, Some(&aside))?;
            }
        }
        if !options.dry_run {
            recall(shared)?;
        }
        let verified =
            store.verify(&VerifyOptions { progress: options.progress.clone(), ..Default::default() })?;
        let mut lost: Vec<SnapshotId> =
            verified.problems.into_iter().flat_map(|problem| problem.snapshots).collect();
        lost.sort_unstable();
        lost.dedup();
        report.lost_snapshots = lost;
        let index = shared.index();
        report.objects = (index.entries(Tree::Regions).count() + index.entries(Tree::Objects).count()) as u64;
        Ok(report)
    }
}

/// Writes anew what the old index knew of snapshots and no pack tells any more: records, labels, and
/// that a snapshot is forgotten.
fn recall(shared: &Shared) -> Result<(), Error> {
    let Some(known) = &shared.known_before else { return Ok(()) };
    for (id, before) in known.all() {
        let now = {
            let catalog = shared.catalog();
            if catalog.orphans().contains_key(id) {
                continue;
            }
            catalog.any(id).cloned()
        };
        let labels = || before.labels.clone();
        match (before.tombstone, now) {
            (None, None) if Hash::of(&encode(Kind::Record, &*before.record)?) == id.0 => {
                shared.commit_snapshot((*before.record).clone(), labels(), shared.log.failures())?;
            }
            (Some(_), Some(now)) if now.tombstone.is_none() => shared.commit_tombstones(&[*id])?,
            (None, Some(now)) if now.tombstone.is_none() => {
                let time = |note: Option<(jiff::Timestamp, _)>| note.map(|(time, _)| time);
                if time(before.note) > time(now.note) {
                    shared.commit_labels(*id, labels())?;
                }
            }
            _ => {}
        }
    }
    Ok(())
}

/// The places in a pack that are no whole objects, a line each.
fn damage(pack: &Arc<Pack>) -> Result<Vec<String>, Error> {
    let bytes = pack.bytes(pack.length_bytes())?;
    let lines = pack.scan(&bytes, pack.header_bytes()).filter_map(|scanned| match scanned {
        Err(error) => Some(Err(error.into())),
        Ok(Scanned::Object { .. }) => None,
        Ok(Scanned::Damaged { offset_bytes, end_bytes, header, why }) => {
            let what =
                header.map_or_else(String::new, |header| format!(" ({} {})", header.kind, header.hash));
            Some(Ok(format!("{} bytes {offset_bytes}..{end_bytes}{what}: {why}", pack.path.display())))
        }
    });
    lines.collect()
}

/// Copies the whole objects out of a pack whose header is damaged, and sets it aside.
fn salvage_unusable(shared: &Shared, path: &PathBuf, aside: &Path) -> Result<Vec<IndexEntry>, Error> {
    file::create_dir(aside).map_err(StoreError::io("create", aside))?;
    let others = salvage(shared, path)?;
    file::link_into(path, aside).map_err(StoreError::io("set aside", path))?;
    file::remove(path).map_err(StoreError::io("remove", path))?;
    Ok(others)
}
