//! Repair: recovers as much of the snapshots as possible from damaged files.
//!
//! Nothing is deleted. A damaged pack is set aside whole, in the directory `damaged/` of the store,
//! with an entry in the report there, and every whole object in it is copied into a new pack. If
//! repair is interrupted or killed at any moment, a second run completes it. The steps are:
//!
//! 1. Rewrite the FORMAT file from the packs, if it does not match them.
//! 2. Write to the packs what only the index still knows of snapshots.
//! 3. Rebuild the index.
//! 4. Copy whole objects out of packs without a valid header and out of damaged packs.
//! 5. Verify everything, to report what is lost.

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

/// Options for [`Store::repair`].
///
/// ```
/// use stillframe::repair::RepairOptions;
/// use stillframe::Store;
/// # let dir = tempfile::tempdir()?;
/// # let path = dir.path().join("vault");
/// # drop(Store::options().create(&path)?);
/// let report = Store::repair(&path, &RepairOptions::new().dry_run(true))?;
/// assert!(!report.index_rebuilt);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct RepairOptions {
    /// Only computes what would be done. The index is still brought up to date, as by any opening.
    pub dry_run: bool,
    /// How long to wait for another process that has the store open.
    pub wait: Duration,
    /// Lets root repair a store in a directory that belongs to another user
    /// ([`StoreOptions::trust_owner`]).
    ///
    /// [`StoreOptions::trust_owner`]: crate::StoreOptions::trust_owner
    pub trust_owner: bool,
    /// Reports progress, and can cancel the repair. Opening, looking for damage and verifying have
    /// a total each. A cancelled repair has done no harm, and a second run completes it.
    pub progress: Progress,
}

impl RepairOptions {
    /// The default.
    pub fn new() -> Self {
        RepairOptions::default()
    }

    /// With `true`, finds out what would be done and changes nothing.
    pub fn dry_run(mut self, dry_run: bool) -> Self {
        self.dry_run = dry_run;
        self
    }

    /// Sets how long to wait for another process that has the store open.
    pub fn wait(mut self, wait: Duration) -> Self {
        self.wait = wait;
        self
    }

    /// With `true`, root may repair a store of [another user](Self::trust_owner).
    pub fn trust_owner(mut self, trust: bool) -> Self {
        self.trust_owner = trust;
        self
    }

    /// Sets the receiver of progress, which can also cancel the call.
    pub fn progress(mut self, progress: Progress) -> Self {
        self.progress = progress;
        self
    }
}

/// What a repair did.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
#[non_exhaustive]
pub struct RepairReport {
    /// Whether the index was rebuilt.
    pub index_rebuilt: bool,
    /// How many objects the index has now.
    pub objects: u64,
    /// What was damaged, one line for each place.
    pub damaged: Vec<String>,
    /// The snapshots that cannot be restored completely. Their records stay: if the same memory is
    /// captured again, they are complete again.
    #[serde(serialize_with = "crate::report::texts")]
    pub lost_snapshots: Vec<SnapshotId>,
    /// The report in the directory `damaged/`, which says what was set aside and what was lost.
    /// `None` if there was nothing to report.
    #[serde(skip)]
    pub report: Option<PathBuf>,
}

impl Store {
    /// Repairs the store at `path`, which must not be open.
    ///
    /// Cost: it reads the whole store about three times, and rewrites what was damaged.
    ///
    /// # Examples
    ///
    /// The FORMAT file is lost, and repair rewrites it from the packs:
    ///
    /// ```
    /// use stillframe::{CaptureOptions, Store};
    ///
    /// # let dir = tempfile::tempdir()?;
    /// # let path = dir.path().join("vault");
    /// let store = Store::options().create(&path)?;
    /// let taken = store.process("web-1").capture(&[7; 1 << 20], &CaptureOptions::default())?;
    /// drop(store);
    /// std::fs::remove_file(path.join("FORMAT"))?;
    ///
    /// let report = Store::repair(&path, &Default::default())?;
    /// assert!(report.lost_snapshots.is_empty());
    /// let map = Store::open(&path)?.restore(taken.id)?.into_mapping()?;
    /// assert_eq!(map[..], [7; 1 << 20]);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// Those of [`Store::open`], and an error if something cannot be written. The repair can be
    /// repeated then.
    pub fn repair(path: impl AsRef<Path>, options: &RepairOptions) -> Result<RepairReport, Error> {
        repair(path.as_ref(), options)
    }
}

fn repair(path: &Path, options: &RepairOptions) -> Result<RepairReport, Error> {
    let dir = &directory::open(path, options.trust_owner)?;
    // This comes first: no LOCK may be created in a directory that is not a store.
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
            // The loss is now recorded.
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

/// Copies every whole object out of the damaged packs, then sets these packs aside.
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

/// What to report about snapshots that are not whole.
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

/// Rewrites what the index knows of snapshots and the packs do not contain any more: records,
/// labels, and that a snapshot is forgotten.
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

/// The places in a pack that are not whole objects, one line each.
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
