//! Migrations: numbered steps from one on-disk format to the next, each alone in its file.
//!
//! A step reads the store of its format and writes one of the next into an empty directory. The
//! runner puts that in the place of the old one. It can be interrupted at any moment:
//!
//! ```text
//! STORE/migration/            being written: not yet a store, thrown away when found
//! STORE/migration/FORMAT      written last: complete, takes the old one's place when found (store/replace.rs)
//! ```
//!
//! Adding a format: write `NNNN_what.rs` with a function like [`Step::apply`], list it in
//! [`STEPS`], and put a fixture store of the format under `tests/fixtures`.

#[cfg(test)]
#[path = "0001_create.rs"]
pub(crate) mod create;

use crate::store::error::StoreError;
use crate::store::format;
use crate::store::names::MIGRATION_DIR;
use crate::store::replace::finish_interrupted;
use crate::sys::dir::Dir;
use crate::sys::file;

/// A way from one format to the next.
pub(crate) struct Step {
    /// The format it reads; it writes the one after it.
    pub(crate) from: u32,
    /// Reads the store in the first directory and writes packs and FORMAT into the second, which
    /// is empty: the packs first, everything durable, FORMAT last.
    pub(crate) apply: fn(&Dir, &Dir) -> Result<(), StoreError>,
}

/// All steps there are. Format 1 is the first, so there is none yet.
pub(crate) const STEPS: &[Step] = &[];

/// Brings `store`, whose lock the caller holds, to the format `to`.
pub(crate) fn run(store: &Dir, steps: &[Step], to: u32) -> Result<(), StoreError> {
    finish_interrupted(store)?;
    loop {
        let from = format::version(store)?;
        if from >= to {
            return Ok(());
        }
        let step = steps.iter().find(|step| step.from == from);
        let step = step.ok_or_else(|| StoreError::NotAStore {
            path: store.into(),
            why: format!("its format {from} was never released, and no migration knows it"),
        })?;
        tracing::info!("migrating {} from format {from} to {}", store.path().display(), from + 1);
        let new = store.join(MIGRATION_DIR);
        let new = file::create_dir(&new).map_err(StoreError::io("create", &new))?;
        (step.apply)(store, &new)?;
        finish_interrupted(store)?;
    }
}

#[cfg(test)]
#[path = "power_loss.rs"]
mod power_loss;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::CaptureOptions;
    use crate::RegionSize;
    pub(super) use crate::Store;
    use crate::codec::Codec;
    pub(super) use crate::fault_injection::{Call, Witness, watch};
    pub(super) use crate::store::format::FORMAT_FILE;
    pub(super) use crate::store::names::{INDEX_DIR, PACKS_DIR};
    use crate::store::packs::names;
    use crate::store::replace::{OLD_PACKS_DIR, remove};
    use crate::sys::dir::Name;
    use std::io::{self, BufRead, BufReader};
    use std::path::{Path, PathBuf};
    use std::process::{Command, Stdio};
    use std::sync::Arc;
    use std::sync::atomic::{AtomicI64, Ordering};
    use std::time::{Duration, Instant};

    /// A made-up step: copies the packs, with a file beside them by which they are known from those of other formats,
    /// and writes a FORMAT of the next version.
    fn copy_and_raise(old: &Dir, new: &Dir) -> Result<(), StoreError> {
        let (old_packs, packs) = (old.join(PACKS_DIR), new.join(PACKS_DIR));
        let mut format = format::Format::read_any(old)?;
        format.version += 1;
        let write = |name: Name, bytes: &[u8]| -> io::Result<()> {
            let file = file::create_new(&name)?;
            file.write_all_at(bytes, 0)?;
            file.sync()
        };
        let copy = || -> io::Result<()> {
            let packs = file::create_dir(&packs)?;
            for (_, name) in names::list(&old_packs.open_dir()?).unwrap() {
                write(packs.join(name.name()), &std::fs::read(name.path())?)?;
            }
            write(packs.join(OF_FORMAT), format.version.to_string().as_bytes())?;
            file::sync_dir(&packs)
        };
        copy().map_err(StoreError::io("copy", &old_packs))?;
        format.write(new)
    }

    fn fails(_: &Dir, new: &Dir) -> Result<(), StoreError> {
        file::create_dir(&new.join(PACKS_DIR)).unwrap();
        std::fs::write(new.path().join(PACKS_DIR).join("00000001.pack"), "half a pack").unwrap();
        Err(StoreError::WriteFailedMeanwhile)
    }

    /// The file that says to which format packs belong.
    pub(super) const OF_FORMAT: &str = "of-format";

    pub(super) const MADE_UP: &[Step] =
        &[Step { from: 1, apply: copy_and_raise }, Step { from: 2, apply: copy_and_raise }];

    /// A store with a snapshot in it, and the bytes of its FORMAT and its packs.
    pub(super) fn store(dir: &Path) -> (PathBuf, Vec<(PathBuf, Vec<u8>)>) {
        let path = dir.join("store");
        let store = Store::options().create(&path).unwrap();
        store.process("p").capture(&[7u8; 100_000], &CaptureOptions::default()).unwrap();
        drop(store);
        let content = content(&path);
        (path, content)
    }

    pub(super) fn dir(path: &Path) -> Dir {
        Dir::open(path).unwrap()
    }

    fn content(store: &Path) -> Vec<(PathBuf, Vec<u8>)> {
        let mut files = vec![store.join(FORMAT_FILE)];
        let packs = names::list(&dir(&store.join(PACKS_DIR))).unwrap();
        files.extend(packs.into_iter().map(|(_, name)| name.path().to_owned()));
        files.into_iter().map(|path| (path.clone(), std::fs::read(&path).unwrap())).collect()
    }

    #[test]
    fn a_store_that_was_created_as_format_1_opens_when_it_is_migrated() {
        let scratch = tempfile::tempdir().unwrap();
        let path = scratch.path().join("store");
        std::fs::create_dir(&path).unwrap();
        create::write(&dir(&path), RegionSize::default(), Codec::Lz4).unwrap();
        run(&dir(&path), STEPS, format::FORMAT_VERSION).unwrap();
        let store = Store::open(&path).unwrap();
        assert_eq!((store.info().format, store.info().codec), (format::FORMAT_VERSION, Codec::Lz4));
        store.process("p").capture(&[7u8; 100_000], &CaptureOptions::default()).unwrap();
    }

    #[test]
    fn the_runner_walks_from_any_older_format_to_this_one() {
        let scratch = tempfile::tempdir().unwrap();
        let (store, before) = store(scratch.path());
        run(&dir(&store), MADE_UP, 3).unwrap();
        assert_eq!(format::version(&dir(&store)).unwrap(), 3);
        let after = content(&store);
        assert_eq!(after.len(), before.len());
        assert_eq!(after[1..], before[1..], "the packs are those that the steps wrote");
        assert!(!store.join(MIGRATION_DIR).exists());
        run(&dir(&store), MADE_UP, 3).unwrap();
        assert_eq!(content(&store), after, "doing it again does nothing");
    }

    #[test]
    fn a_step_that_fails_leaves_the_old_store_whole() {
        let scratch = tempfile::tempdir().unwrap();
        let (path, before) = store(scratch.path());
        run(&dir(&path), &[Step { from: 1, apply: fails }], 2).unwrap_err();
        assert_eq!(content(&path), before);
        assert_eq!(Store::open(&path).unwrap().snapshots().len(), 1);
        assert!(!path.join(MIGRATION_DIR).exists(), "opening throws what is incomplete away");
        run(&dir(&path), MADE_UP, 2).unwrap();
        assert_eq!(format::version(&dir(&path)).unwrap(), 2);
    }

    #[test]
    fn taking_the_place_goes_on_wherever_it_was_interrupted() {
        for done in 0..4 {
            let scratch = tempfile::tempdir().unwrap();
            let (store, before) = store(scratch.path());
            let new = store.join(MIGRATION_DIR);
            std::fs::create_dir(&new).unwrap();
            copy_and_raise(&dir(&store), &dir(&new)).unwrap();
            if done > 0 {
                remove(&dir(&store).join(INDEX_DIR)).unwrap();
            }
            if done > 1 {
                std::fs::rename(store.join(PACKS_DIR), new.join(OLD_PACKS_DIR)).unwrap();
            }
            if done > 2 {
                std::fs::rename(new.join(PACKS_DIR), store.join(PACKS_DIR)).unwrap();
            }
            finish_interrupted(&dir(&store)).unwrap();
            assert_eq!(format::version(&dir(&store)).unwrap(), 2, "after {done} steps");
            assert_eq!(content(&store)[1..], before[1..], "after {done} steps");
            assert!(!new.exists());
        }
    }

    const KILLED_STORE: &str = "STILLFRAME_KILLED_STORE";
    const KILLED_AFTER_CALLS: &str = "STILLFRAME_KILLED_AFTER_CALLS";

    /// Kills this process before one of the calls that it is told of, or ends a count of them.
    struct Countdown(AtomicI64);

    impl Witness for Countdown {
        fn call(&self, _: &Call<'_>, act: &mut dyn FnMut() -> io::Result<()>) -> io::Result<()> {
            if self.0.fetch_sub(1, Ordering::Relaxed) == 0 {
                let this = rustix::process::getpid();
                rustix::process::kill_process(this, rustix::process::Signal::KILL).unwrap();
            }
            act()
        }
    }

    #[test]
    #[ignore = "it is the child that the next test starts and kills"]
    fn a_child_migrates_until_it_is_killed() {
        let Some(store) = std::env::var_os(KILLED_STORE).map(PathBuf::from) else { return };
        let calls = std::env::var(KILLED_AFTER_CALLS).map_or(i64::MAX, |text| text.parse().unwrap());
        let _watching = watch(&store, Arc::new(Countdown(AtomicI64::new(calls))));
        println!("begun");
        run(&dir(&store), MADE_UP, 3).unwrap();
    }

    /// When the child dies.
    enum Death {
        AfterCalls(i64),
        After(Duration),
        Never,
    }

    /// Has a child migrate a store until it dies, and then somebody call again. Says how long the child
    /// took, and whether it was in the middle of it.
    fn kill(death: &Death) -> (Duration, bool) {
        let scratch = tempfile::tempdir().unwrap();
        let (store, before) = store(scratch.path());
        let mut child = Command::new(std::env::current_exe().unwrap());
        child
            .args(["--exact", "migrations::tests::a_child_migrates_until_it_is_killed"])
            .args(["--ignored", "--nocapture"])
            .env(KILLED_STORE, &store)
            .stdout(Stdio::piped());
        if let Death::AfterCalls(calls) = death {
            child.env(KILLED_AFTER_CALLS, calls.to_string());
        }
        let mut child = child.spawn().unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        lines.find(|line| line.as_ref().unwrap().ends_with("begun")).unwrap().unwrap();
        let began = Instant::now();
        if let Death::After(time) = death {
            std::thread::sleep(*time);
            child.kill().unwrap();
        }
        child.wait().unwrap();
        let took = began.elapsed();
        let is_under_way = store.join(MIGRATION_DIR).exists() || format::version(&dir(&store)).unwrap() == 2;
        run(&dir(&store), MADE_UP, 3).unwrap();
        assert_eq!(format::version(&dir(&store)).unwrap(), 3);
        assert_eq!(content(&store)[1..], before[1..]);
        assert!(!store.join(MIGRATION_DIR).exists());
        (took, is_under_way)
    }

    #[test]
    fn a_migration_that_is_killed_before_any_of_its_calls_goes_on_when_it_is_called_again() {
        let scratch = tempfile::tempdir().unwrap();
        let (store, _) = store(scratch.path());
        let count = Arc::new(Countdown(AtomicI64::new(i64::MAX)));
        let watching = watch(&store, count.clone());
        run(&dir(&store), MADE_UP, 3).unwrap();
        drop(watching);
        let calls = i64::MAX - count.0.load(Ordering::Relaxed);
        let under_way = (0..calls).filter(|call| kill(&Death::AfterCalls(*call)).1).count();
        println!("{calls} kills, {under_way} of them in the middle");
        assert!(under_way > 10);
    }

    /// `STILLFRAME_KILLS=1000 cargo test --lib migration_that_is_killed` kills that often.
    #[test]
    fn a_migration_that_is_killed_at_any_time_goes_on_when_it_is_called_again() {
        let kills = std::env::var("STILLFRAME_KILLS").map_or(10, |text| text.parse().unwrap());
        // Spread evenly over the time that it takes undisturbed.
        let (took, _) = kill(&Death::Never);
        let under_way = (0..kills).filter(|at| kill(&Death::After(took * *at / kills)).1).count();
        println!("{kills} kills, {under_way} of them in the middle");
    }

    #[test]
    fn a_format_that_no_step_knows_is_an_honest_error() {
        let scratch = tempfile::tempdir().unwrap();
        let (store, before) = store(scratch.path());
        run(&dir(&store), &MADE_UP[1..], 3).unwrap_err();
        assert_eq!(content(&store), before);
    }
}
