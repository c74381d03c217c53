//! Repair: whatever happened to the files, what can be had of the snapshots is had again.
//!
//! Nothing is deleted. A pack in which there are damaged bytes is set aside whole, in the folder
//! `damaged/` of the store, where a report tells of it, and everything whole in it is copied into a new pack.
//! Whenever it is interrupted, or killed, a second run completes it:
//!
//! 1. The FORMAT file is written anew from the packs, if it is not what they say.
//! 2. What only the index knows of snapshots any more is written to the packs.
//! 3. The index is built anew.
//! 4. Whole objects are copied out of packs without a header in order, and out of packs with damage in them.
//! 5. Everything is verified, to say what is lost.

mod salvage;
mod set_aside;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use crate::error::Error;
use crate::gc::compact::{KeepAll, compact};
use crate::hash::Hash;
use crate::progress::Progress;
use crate::record::SnapshotId;
use crate::store::commit::encode;
use crate::store::directory;
use crate::store::error::StoreError;
use crate::store::fact;
use crate::store::format::{FORMAT_FILE, Format};
use crate::store::identity;
use crate::store::lock::{Access, Lock};
use crate::store::packs::collected::{self, Collected};
use crate::store::packs::location::Location;
use crate::store::packs::lost;
use crate::store::packs::object::ObjectKind;
use crate::store::packs::pack::Pack;
use crate::store::packs::scan::Scanned;
use crate::store::read::{Check, Reader};
use crate::store::replace;
use crate::store::tree::Tree;
use crate::store::{OpenStore, Store};
use crate::sys::dir::Dir;
use crate::sys::file;
use crate::sys::heap;
use crate::text::printable;
use crate::verify::{Problem, VerifyOptions};
use salvage::salvage;
use set_aside::SetAside;

/// How to repair.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct RepairOptions {
    /// Only find out what would be done. The index is brought up to date all the same, as by any
    /// opening.
    pub dry_run: bool,
    /// How long to wait for another process that has the store open.
    pub wait: Duration,
    /// Repair a store in a directory that belongs to another user also as root ([`StoreOptions::trust_owner`]).
    ///
    /// [`StoreOptions::trust_owner`]: crate::StoreOptions::trust_owner
    pub trust_owner: bool,
    /// Watches it: opening, looking for damage and verifying count towards a total each. Interrupted, it has done
    /// no harm, and a second run completes it.
    pub progress: Progress,
}

impl RepairOptions {
    /// The default.
    pub fn new() -> Self {
        RepairOptions::default()
    }

    /// Only finds out what would be done, or not.
    pub fn dry_run(mut self, dry_run: bool) -> Self {
        self.dry_run = dry_run;
        self
    }

    /// Sets how long to wait for another process that has the store open.
    pub fn wait(mut self, wait: Duration) -> Self {
        self.wait = wait;
        self
    }

    /// Also repairs a store of [another user](Self::trust_owner) as root, or not.
    pub fn trust_owner(mut self, trust: bool) -> Self {
        self.trust_owner = trust;
        self
    }

    /// Sets what watches it.
    pub fn progress(mut self, progress: Progress) -> Self {
        self.progress = progress;
        self
    }
}

/// What was done.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
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
    #[serde(serialize_with = "crate::report::texts")]
    pub lost_snapshots: Vec<SnapshotId>,
    /// The file in the folder for damaged things that tells what was set aside and what was lost; none if there
    /// was nothing to tell.
    #[serde(skip)]
    pub report: Option<PathBuf>,
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
        repair(path.as_ref(), options)
    }
}

fn repair(path: &Path, options: &RepairOptions) -> Result<RepairReport, Error> {
    let dir = &directory::open(path, options.trust_owner)?;
    // Before a LOCK is made in what may be no store.
    identity::of(dir)?;
    let lock = Arc::new(Lock::take(dir, options.wait)?);
    if !options.dry_run {
        lock.check_writable()?;
    }
    if lock.access() == Access::Owner {
        replace::finish_interrupted(dir)?;
    }
    let mut report = RepairReport::default();
    let mut aside = SetAside::begin(dir);
    let (format, wrong) = identity::of(dir)?;
    if let Some(wrong) = wrong {
        report.damaged.push(format!("{}: {wrong}", path.join(FORMAT_FILE).display()));
        if !options.dry_run {
            mend_format(dir, &format, wrong, &mut aside)?;
        }
    }
    let open = |rebuild| Store::open_as(dir, &lock, format.clone(), rebuild, &options.progress);
    let mut store = open(false)?;
    report.index_rebuilt = store.shared().index_rebuilt;
    if !options.dry_run && !report.index_rebuilt {
        recall(store.shared())?;
        drop(store);
        heap::give_back();
        store = open(true)?;
        report.index_rebuilt = true;
    }
    let shared = &**store.shared();
    let mut others = shared.other_deltas.clone();
    for (name, why) in &shared.unusable {
        options.progress.check()?;
        report.damaged.push(format!("{}: {why}", name.display()));
        if !options.dry_run && name.is_dir() {
            aside.move_dir(name, std::slice::from_ref(why))?;
        } else if !options.dry_run {
            aside.put(name, std::slice::from_ref(why))?;
            others.extend(salvage(shared, name)?);
            file::remove(name).map_err(StoreError::io("remove", name))?;
            file::sync_dir(shared.log.dir()).map_err(StoreError::io("make durable", shared.log.dir()))?;
        }
    }
    report.damaged.extend(shared.lost.iter().map(|lost| format!("{}: {}", lost.file_name(), lost.why())));
    if !options.dry_run {
        shared.resolve_with(&others)?;
    }
    mend_packs(shared, options, &mut report, &mut aside)?;
    let verify = VerifyOptions::new().progress(options.progress.clone());
    let problems = store.verify(&verify)?.problems;
    let mut lost: Vec<SnapshotId> = problems.iter().flat_map(|problem| &problem.snapshots).copied().collect();
    lost.sort_unstable();
    lost.dedup();
    if !options.dry_run && (aside.has_told() || !lost.is_empty() || !shared.lost.is_empty()) {
        aside.tell(&losses(shared, &lost, &problems))?;
        report.report = Some(aside.report());
        if !shared.lost.is_empty() {
            // It is on record now.
            let gone = shared.lost.iter().filter(|lost| lost.found_bytes.is_none());
            let gone: Vec<_> = gone.map(|lost| Collected { pack: lost.pack, kept_in: None }).collect();
            collected::add(&shared.dir, &gone)?;
            lost::write(&shared.dir, &[])?;
        }
    }
    report.lost_snapshots = lost;
    let index = shared.index();
    report.objects = (index.entries(Tree::Regions).count() + index.entries(Tree::Objects).count()) as u64;
    Ok(report)
}

fn mend_format(dir: &Dir, format: &Format, wrong: String, aside: &mut SetAside) -> Result<(), Error> {
    let (file, anew) = (dir.join(FORMAT_FILE), "it is rewritten from the packs".to_owned());
    if file.exists() {
        aside.put(&file, &[wrong, anew])?
    } else {
        aside.tell(&[format!("{}: {wrong}; {anew}", file.display())])?
    }
    format.write(dir)?;
    Ok(())
}

/// Sets packs with damage in them aside, after everything whole in them was copied.
fn mend_packs(
    shared: &OpenStore,
    options: &RepairOptions,
    report: &mut RepairReport,
    aside: &mut SetAside,
) -> Result<(), Error> {
    let packs = shared.log.packs();
    let meter = options.progress.begin(packs.iter().map(|pack| pack.length_bytes()).sum());
    for pack in packs {
        let found = damage(&pack)?;
        meter.advance(pack.length_bytes())?;
        if found.is_empty() {
            continue;
        }
        if !options.dry_run {
            aside.put(&pack.name, &found)?;
            shared.log.seal(pack.number);
            compact(shared, &[pack], &KeepAll, true)?;
            heap::give_back();
        }
        report.damaged.extend(found);
    }
    Ok(())
}

/// What is to be told of the snapshots that are not whole.
fn losses(shared: &OpenStore, lost: &[SnapshotId], problems: &[Problem]) -> Vec<String> {
    let mut lines = Vec::new();
    for id in lost {
        let catalog = shared.catalog();
        let of = catalog
            .live(id)
            .map(|entry| format!(" of {}, {}", printable(entry.held().process()), entry.held().time()));
        lines.push(format!("not whole: snapshot {id}{}", of.unwrap_or_default()));
        let needed = problems.iter().filter(|problem| problem.snapshots.contains(id));
        lines.extend(needed.map(|it| format!("    {} {}: {}", it.kind, it.object, it.detail)));
    }
    lines.push(match lost.len() {
        0 => "no snapshot has lost anything".to_owned(),
        _ => "capturing the same memory again brings back what these lack".to_owned(),
    });
    lines
}

/// Writes anew what the index knows of snapshots and the packs do not tell any more: records, labels, and
/// that a snapshot is forgotten.
fn recall(shared: &OpenStore) -> Result<(), Error> {
    let known: Vec<_> = shared.catalog().all().map(|(id, entry)| (*id, entry.clone())).collect();
    let mut reader = Reader::new(shared, Check::Full);
    let mut is_whole = |location: Location| reader.is_whole_at(location);
    for (id, entry) in known {
        let labels = || entry.labels().clone();
        match (is_whole(entry.location)?, entry.tombstone()) {
            (true, Some(tombstone)) if !is_whole(tombstone)? => shared.commit_tombstones(&[id])?,
            (false, None) if Hash::of(&encode(ObjectKind::Record, &*entry.record())?) == id.0 => {
                let record = Arc::unwrap_or_clone(entry.record());
                shared.commit_snapshot(record, labels(), shared.log.failures())?;
            }
            (true, None) => {
                if let Some((_, note)) = entry.note()
                    && !is_whole(note)?
                {
                    shared.commit_labels(id, labels())?;
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
        Ok(Scanned::Object { offset_bytes, header, payload }) => {
            let location = Location::new(pack.number, offset_bytes, &header);
            let why = fact::read(&header, payload, location).err()?;
            let (path, end_bytes) = (pack.name.display(), location.end_bytes());
            Some(Ok(format!(
                "{path} bytes {offset_bytes}..{end_bytes} ({} {}): {why}",
                header.kind, header.hash
            )))
        }
        Ok(Scanned::Damaged { offset_bytes, end_bytes, header, why }) => {
            let what =
                header.map_or_else(String::new, |header| format!(" ({} {})", header.kind, header.hash));
            Some(Ok(format!("{} bytes {offset_bytes}..{end_bytes}{what}: {why}", pack.name.display())))
        }
    });
    lines.collect()
}
