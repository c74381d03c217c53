//! Processes that are forked from one that has a store open, such as a server that forks its
//! workers, or the host of a runtime.
//!
//! The child has a copy of the memory, but no threads and no lock. Every call in it returns an
//! error, and what it drops leaves the files and the parent's lock as they are.

use std::io::Read;
use std::os::fd::FromRawFd;
use std::path::Path;
use std::process::Command;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::noise::noise;
use stillframe::forget::KeepPolicy;
use stillframe::lazy::Fill;
use stillframe::store::StoreError;
use stillframe::{CaptureOptions, Error, GcOptions, SnapshotId, Store};

/// One fork at a time: a child has the locks of all stores of the process until it has closed them.
static FORKING: Mutex<()> = Mutex::new(());

/// Runs `work` in a child, made by `fork` or by the bare system call, and returns what the child
/// sends. A child that does not end is killed, and returns nothing.
fn in_child(bare: bool, work: impl FnOnce() -> Vec<String>) -> Vec<String> {
    let mut pipe = [0; 2];
    // SAFETY: the array has room for two descriptors.
    assert_eq!(unsafe { libc::pipe(pipe.as_mut_ptr()) }, 0);
    // SAFETY: the child runs the code under test, sends the result, and exits without exit
    // handlers.
    let child = unsafe {
        match bare {
            true => libc::syscall(libc::SYS_clone, libc::SIGCHLD, 0, 0, 0, 0),
            false => libc::fork().into(),
        }
    };
    if child == 0 {
        let said = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work));
        let said = said.map_or_else(|_| "it panicked".to_owned(), |said| said.join("\n"));
        // SAFETY: the bytes are initialized, and the descriptor is the pipe's.
        unsafe {
            libc::write(pipe[1], said.as_ptr().cast(), said.len());
            libc::_exit(0);
        }
    }
    let child = i32::try_from(child).unwrap();
    assert!(child > 0);
    // SAFETY: nothing else owns these descriptors here.
    let mut answer = unsafe {
        libc::close(pipe[1]);
        std::fs::File::from_raw_fd(pipe[0])
    };
    let (done, ended) = std::sync::mpsc::channel();
    let watch = std::thread::spawn(move || {
        if ended.recv_timeout(Duration::from_secs(30)).is_err() {
            // SAFETY: it is our child, and it was not waited for yet.
            unsafe { libc::kill(child, libc::SIGKILL) };
        }
    });
    let mut said = String::new();
    answer.read_to_string(&mut said).unwrap();
    let mut status = 0;
    // SAFETY: the child is ours.
    unsafe { libc::waitpid(child, &raw mut status, 0) };
    let _ = done.send(());
    watch.join().unwrap();
    assert_eq!(status, 0, "the child said {said:?}");
    said.lines().map(str::to_owned).collect()
}

fn capture(store: &Store, process: &str, seed: u64) -> Result<SnapshotId, Error> {
    let memory = noise(100_000, seed);
    store.process(process).capture(&memory[..], &CaptureOptions::default()).map(|taken| taken.id)
}

fn is_there(store: &Store, id: SnapshotId, seed: u64) -> bool {
    store
        .restore(id)
        .and_then(|restore| restore.into_mapping())
        .is_ok_and(|map| map[..] == noise(100_000, seed)[..])
}

/// The result of a call in the child, as text.
fn said<T>(what: &str, result: Result<T, Error>) -> String {
    match result {
        Err(Error::Store(StoreError::OtherPid { .. })) => "refused".to_owned(),
        Err(other) => format!("{what}: {other}"),
        Ok(_) => format!("{what}: done"),
    }
}

fn content(dir: &Path) -> Vec<(std::path::PathBuf, Vec<u8>)> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        match path.is_dir() {
            true => found.extend(content(&path)),
            false => found.push((path.clone(), std::fs::read(&path).unwrap())),
        }
    }
    found.sort();
    found
}

#[test]
fn a_child_gets_an_error_from_every_call_and_changes_nothing() {
    let _one = FORKING.lock().unwrap_or_else(PoisonError::into_inner);
    for bare in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vault");
        let store = Store::options().create(&path).unwrap();
        let mut taken = vec![(capture(&store, "p", 1).unwrap(), 1), (capture(&store, "p", 2).unwrap(), 2)];
        let (id, other) = (taken[0].0, taken[1].0);
        let snapshot = store.snapshot(id).unwrap();
        let regions = snapshot.regions().unwrap();
        let [mapping, slice, lazy] = [(); 3].map(|()| store.restore(id).unwrap());
        let back = store.rollback(id).unwrap();
        let memory = noise(100_000, 3);
        let pending = store.process("q").start_capture(&memory[..], &CaptureOptions::default()).unwrap();
        let before = content(&path.join("packs"));
        let said = in_child(bare, || {
            let mut memory = noise(100_000, 4);
            let mut out = Vec::new();
            let policy = KeepPolicy::new().last(1);
            let start = store.process("c").start_capture(&memory[..], &CaptureOptions::default());
            let said = vec![
                said("capture", capture(&store, "c", 4)),
                said("start", start),
                said("pending", pending.wait()),
                said("snapshot", store.snapshot(id)),
                said("find", store.find("latest")),
                said("restore", store.restore(id)),
                said("mapping", mapping.into_mapping()),
                said("slice", slice.into_slice(&mut memory)),
                said("lazy", lazy.into_lazy(Fill::OnFault)),
                said("roll back", back.slice(&mut memory)),
                said("layout", snapshot.address_space()),
                said("regions", regions.collect::<Result<Vec<_>, _>>()),
                said("image", snapshot.read_image(&mut out)),
                said("template", store.template(id)),
                said("label", store.change_labels(id, &[])),
                said("plan", store.plan_forget(&policy, None)),
                said("forget", store.forget(&[id])),
                said("freeable", store.freeable_bytes(&[id])),
                said("gc", store.gc(&GcOptions::default())),
                said("dry", store.gc(&GcOptions::new().dry_run(true))),
                said("verify", store.verify(&Default::default())),
                said("stats", store.stats()),
                said("diff", store.diff(id, other, &Default::default())),
                said("history", store.history("p", "0..4".parse().unwrap())),
                said("writable", store.check_writable().map_err(Error::from)),
            ];
            assert!(store.snapshots().is_empty() && store.processes().is_empty());
            assert!(store.process("p").snapshots().is_empty() && store.process("p").latest().is_none());
            // SAFETY: this process exits without dropping them again.
            unsafe {
                drop(std::ptr::read(&raw const snapshot));
                drop(std::ptr::read(&raw const store));
            }
            said
        });
        assert_eq!(said.len(), 25, "{said:?}");
        assert!(said.iter().all(|said| said == "refused"), "{said:#?}");
        drop(snapshot);
        drop(store);
        let store = reopened(&path, before.len(), &mut taken);
        assert!(store.verify(&Default::default()).unwrap().problems.is_empty());
    }

    /// The store as the parent finds it.
    fn reopened(path: &Path, packs: usize, taken: &mut Vec<(SnapshotId, u64)>) -> Store {
        assert_eq!(content(&path.join("packs")).len(), packs);
        let store = Store::open(path).unwrap();
        assert!(taken.iter().all(|(id, seed)| is_there(&store, *id, *seed)));
        taken.push((capture(&store, "p", 5).unwrap(), 5));
        store
    }
}

#[test]
fn what_is_acknowledged_to_the_parent_is_there_whatever_its_children_try() {
    let _one = FORKING.lock().unwrap_or_else(PoisonError::into_inner);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("vault");
    let store = Store::options().create(&path).unwrap();
    let mut taken = Vec::new();
    for round in 0..5 {
        taken.push((capture(&store, "parent", round).unwrap(), round));
        let said = in_child(round % 2 == 0, || {
            (0..5).map(|seed| said("capture", capture(&store, "child", seed))).collect()
        });
        assert!(said.iter().all(|said| said == "refused"), "{said:?}");
    }
    drop(store);
    let store = Store::open(&path).unwrap();
    assert!(taken.iter().all(|(id, seed)| is_there(&store, *id, *seed)));
    assert_eq!(store.snapshots().len(), taken.len());
}

#[test]
fn templates_instances_and_filled_lazy_mappings_are_memory_in_a_child_too() {
    let _one = FORKING.lock().unwrap_or_else(PoisonError::into_inner);
    let dir = tempfile::tempdir().unwrap();
    let store = Store::options().create(dir.path().join("vault")).unwrap();
    let id = capture(&store, "p", 1).unwrap();
    let template = store.template(id).unwrap();
    let lazy = store.restore(id).unwrap().into_lazy(Fill::WorkingSetFirst);
    let lazy = lazy.unwrap();
    lazy.wait_until_filled().unwrap();
    let expected = noise(100_000, 1);
    let said = in_child(false, || {
        let instance = template.instance().unwrap();
        let right = instance[..] == expected[..];
        drop((instance, template, lazy));
        vec![right.to_string()]
    });
    assert_eq!(said, ["true"]);
}

#[test]
fn a_child_that_lives_on_does_not_hold_the_lock() {
    let _one = FORKING.lock().unwrap_or_else(PoisonError::into_inner);
    for bare in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vault");
        let store = Store::options().create(&path).unwrap();
        let id = capture(&store, "p", 1).unwrap();
        // SAFETY: the child only waits until it is killed.
        let child = unsafe {
            match bare {
                true => libc::syscall(libc::SYS_clone, libc::SIGCHLD, 0, 0, 0, 0),
                false => libc::fork().into(),
            }
        };
        if child == 0 {
            loop {
                // SAFETY: the call has no preconditions.
                unsafe { libc::pause() };
            }
        }
        drop(store);
        let began = Instant::now();
        let store = Store::open(&path);
        let took = began.elapsed();
        // SAFETY: it is our child.
        unsafe {
            libc::kill(i32::try_from(child).unwrap(), libc::SIGKILL);
            libc::waitpid(i32::try_from(child).unwrap(), std::ptr::null_mut(), 0);
        }
        assert!(is_there(&store.unwrap(), id, 1));
        println!("opened after {took:?}");
    }
}

const HOLDS: &str = "STILLFRAME_TEST_HOLDS";

#[test]
#[ignore = "it is the process that the next test starts and kills"]
fn a_process_that_forks_and_is_killed() {
    let Some(path) = std::env::var_os(HOLDS) else { return };
    let store = Store::open(path).unwrap();
    // SAFETY: the child only sleeps and exits.
    if unsafe { libc::fork() } == 0 {
        std::thread::sleep(Duration::from_secs(20));
        // SAFETY: the call has no preconditions.
        unsafe { libc::_exit(0) };
    }
    println!("forked");
    std::thread::sleep(Duration::from_secs(60));
    drop(store);
}

#[test]
fn the_lock_of_a_killed_process_is_free_although_its_child_lives() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("vault");
    drop(Store::options().create(&path).unwrap());
    let mut process = Command::new(std::env::current_exe().unwrap());
    process
        .args(["--exact", "forked::a_process_that_forks_and_is_killed", "--ignored", "--nocapture"])
        .env(HOLDS, &path);
    let mut process = process.stdout(std::process::Stdio::piped()).spawn().unwrap();
    let lines = std::io::BufRead::lines(std::io::BufReader::new(process.stdout.take().unwrap()));
    assert!(lines.map(Result::unwrap).any(|line| line.ends_with("forked")));
    assert!(matches!(Store::open(&path), Err(StoreError::Owned { .. })));
    process.kill().unwrap();
    process.wait().unwrap();
    // The child gives up the lock at its first call, which may not have happened yet.
    let store = Store::options().wait(Duration::from_secs(10)).open(&path).unwrap();
    capture(&store, "p", 1).unwrap();
}

#[test]
fn a_child_of_a_process_that_has_had_a_store_is_told_that_it_can_open_none() {
    let _one = FORKING.lock().unwrap_or_else(PoisonError::into_inner);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("vault");
    drop(Store::options().create(&path).unwrap());
    for bare in [false, true] {
        let said = in_child(bare, || match Store::open(&path) {
            Err(StoreError::Forked { .. }) => vec!["refused".to_owned()],
            other => vec![format!("{other:?}")],
        });
        assert_eq!(said, ["refused"]);
    }
}
