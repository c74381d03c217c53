//! Lazy restore: every access, in any order and from any thread, sees the bytes of the snapshot, or
//! gets a signal if they are lost. No access waits without end.
//!
//! Tests that end in a signal, and tests under a sandbox, run in a child process. The child runs
//! this test binary with one test, [`child`], which does what the environment says.

use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, Output};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use stillframe::address_space::{AddressSpace, Mapping, MappingKind, Protection};
use stillframe::lazy::{Fill, Filled, LazyMapping, WorkingSet};
use stillframe::source::{Access, Attachment, Frozen, InPlace, Source, SourceError};
use stillframe::store::StoreError;
use stillframe::{AddressRange, CaptureOptions, Error, GcOptions, LiveMemory, Progress, SnapshotId, Store};

use crate::needs::passed_over;
use crate::noise::noise;
use crate::vault::{mixed_memory as memory, new_store, say};

const MIB: usize = 1 << 20;
const FILLS: [Fill; 3] = [Fill::WorkingSetFirst, Fill::ByAddress, Fill::OnFault];

fn capture(store: &Store, source: &(impl Source + ?Sized)) -> SnapshotId {
    store.process("p").capture(source, &CaptureOptions::default()).unwrap().id
}

fn lazy(store: &Store, id: SnapshotId, fill: Fill) -> LazyMapping {
    store.restore(id).unwrap().into_lazy(fill).unwrap()
}

/// Whether this machine has userfaultfd. Where it has not, these tests test full restores, except
/// the tests that pass over.
fn is_lazy(mapping: &LazyMapping) -> bool {
    match mapping.filled() {
        Filled::Lazily => true,
        filled => {
            passed_over(&format!("{filled:?}"));
            false
        }
    }
}

/// Memory with several mappings.
struct Several {
    space: AddressSpace,
    bytes: Vec<Vec<u8>>,
}

impl Several {
    fn new(bytes: Vec<Vec<u8>>) -> Several {
        let mut start = 0x1000;
        let mapping = |bytes: &Vec<u8>| {
            let range = AddressRange::with_length(start, bytes.len() as u64).unwrap();
            start = range.end() + 0x5000;
            Mapping {
                range,
                protection: Protection::READ_WRITE,
                kind: MappingKind::Anonymous,
                name: String::new(),
                file_offset_bytes: 0,
                captured: true,
            }
        };
        Several { space: AddressSpace::new(bytes.iter().map(mapping).collect()).unwrap(), bytes }
    }
}

impl InPlace for Several {
    fn bytes(&self, mapping_index: usize) -> &[u8] {
        &self.bytes[mapping_index]
    }
}

impl Source for Several {
    fn open(&self) -> Result<Box<dyn Frozen + '_>, SourceError> {
        Ok(Box::new(FrozenSeveral(self)))
    }
}

struct FrozenSeveral<'a>(&'a Several);

impl Frozen for FrozenSeveral<'_> {
    fn address_space(&self) -> &AddressSpace {
        &self.0.space
    }

    fn access(&self) -> Access<'_> {
        Access::InPlace(self.0)
    }
}

// ---- The bytes ----------------------------------------------------------------------------------

#[test]
fn whatever_is_touched_first_the_bytes_are_those_of_a_full_restore() {
    // Lengths at which off-by-one errors are likely, and pages that belong to two or more mappings.
    let length = prop_oneof![
        1..600usize,
        Just(4096usize),
        (1..40usize).prop_map(|pages| pages * 4096),
        (1..40usize).prop_map(|pages| pages * 4096 + 1),
        1..300_000usize,
    ];
    let strategy = (
        prop_oneof![Just(512u32), Just(2048), Just(4096), Just(16_384), Just(65_536)],
        prop::collection::vec((length, any::<u64>()), 1..6),
        prop::sample::select(FILLS.as_slice()),
        prop::collection::vec((any::<prop::sample::Index>(), any::<bool>()), 0..30),
    );
    let config = Config { cases: 48, failure_persistence: None, ..Config::default() };
    let run =
        |(region_bytes, lengths, fill, touches): (u32, Vec<_>, Fill, Vec<(prop::sample::Index, bool)>)| {
            let (_dir, store) = new_store(region_bytes);
            let bytes = lengths.into_iter().map(|(length, seed): (usize, u64)| {
                let mut bytes = noise(length, seed);
                let zeros = usize::try_from(seed % 100).unwrap() * length / 100;
                bytes[zeros..length.min(zeros * 2)].fill(0);
                bytes
            });
            let id = capture(&store, &Several::new(bytes.collect()));
            let mut model = store.restore(id).unwrap().into_mapping().unwrap();
            let mut mapping = lazy(&store, id, fill);
            prop_assert_eq!(mapping.len(), model.len());
            for (index, is_write) in touches {
                let at = index.index(model.len());
                prop_assert_eq!(mapping[at], model[at], "byte {}", at);
                if is_write {
                    mapping[at] = !mapping[at];
                    model[at] = !model[at];
                }
            }
            prop_assert!(mapping[..] == model[..]);
            prop_assert!(mapping.wait_until_filled().is_ok());
            prop_assert!(mapping.is_filled() && mapping.error().is_none());
            prop_assert!(mapping[..] == model[..]);
            Ok(())
        };
    TestRunner::new(config).run(&strategy, run).unwrap();
}

#[test]
fn many_threads_touch_at_once_and_all_see_the_bytes() {
    let (_dir, store) = new_store(16 * 1024);
    let memory = memory(12 * MIB + 321);
    let id = capture(&store, &memory);
    for fill in FILLS {
        let mapping = lazy(&store, id, fill);
        std::thread::scope(|scope| {
            for thread in 0..8usize {
                let (mapping, memory) = (&mapping, &memory);
                // Two threads go each way: upwards, downwards, and two ways that jump.
                scope.spawn(move || {
                    for step in 0..memory.len() / 997 {
                        let at = match thread / 2 {
                            0 => step * 997,
                            1 => memory.len() - 1 - step * 997,
                            which => step * 997 * (9973 + which) % memory.len(),
                        };
                        assert_eq!(mapping[at], memory[at], "byte {at}");
                    }
                });
            }
        });
        assert!(mapping[..] == memory[..]);
        mapping.wait_until_filled().unwrap();
        assert!(mapping[..] == memory[..]);
    }
}

#[test]
fn what_is_written_stays_while_the_rest_is_filled() {
    let (_dir, store) = new_store(4096);
    let mut memory = memory(8 * MIB);
    let id = capture(&store, &memory);
    for fill in FILLS {
        let mut mapping = lazy(&store, id, fill);
        let parts = mapping.chunks_mut(2 * MIB).zip(memory.chunks_mut(2 * MIB));
        std::thread::scope(|scope| {
            for (part, model) in parts {
                scope.spawn(move || {
                    for at in (0..part.len()).rev().step_by(1013) {
                        part[at] ^= 0x5A;
                        model[at] ^= 0x5A;
                    }
                });
            }
        });
        mapping.wait_until_filled().unwrap();
        assert!(mapping[..] == memory[..]);
        memory.chunks_mut(2 * MIB).for_each(|part| {
            (0..part.len()).rev().step_by(1013).for_each(|at| part[at] ^= 0x5A);
        });
    }
}

#[test]
fn system_calls_wait_for_the_bytes_where_that_is_allowed() {
    let (dir, store) = new_store(16 * 1024);
    let memory = memory(2 * MIB);
    let id = capture(&store, &memory);
    let mapping = lazy(&store, id, Fill::OnFault);
    let path = dir.path().join("written");
    let written = std::fs::write(&path, &mapping[..]);
    if mapping.serves_system_calls() {
        written.unwrap();
        assert!(std::fs::read(&path).unwrap() == memory);
        // So it can be captured without a reference to the bytes.
        let mapping = lazy(&store, id, Fill::OnFault);
        let live = LiveMemory::new(mapping.as_ptr(), mapping.len());
        let root = |id| store.snapshot(id).unwrap().record().root;
        assert_eq!(root(capture(&store, &live)), root(id));
    } else {
        assert_eq!(written.unwrap_err().raw_os_error(), Some(libc::EFAULT));
    }
}

#[test]
fn filled_memory_is_memory_like_any_other() {
    let (_dir, store) = new_store(16 * 1024);
    let memory = memory(2 * MIB);
    let id = capture(&store, &memory);
    let mapping = lazy(&store, id, Fill::default());
    mapping.wait_until_filled().unwrap();
    // SAFETY: no reference to these bytes exists; they become zeros.
    let answer = unsafe { libc::madvise(mapping.as_ptr().cast_mut().cast(), MIB, libc::MADV_DONTNEED) };
    assert_eq!(answer, 0);
    assert_eq!((mapping[0], mapping[MIB - 1], mapping[MIB]), (0, 0, memory[MIB]));
    // Another userfaultfd may be registered for it.
    match LiveMemory::new(mapping.as_ptr(), mapping.len()).track_writes() {
        Ok(_) | Err(stillframe::track::TrackError::Unavailable { .. }) => {}
        Err(error) => panic!("{error}"),
    }
}

#[test]
fn a_child_does_not_get_the_mapping() {
    let (_dir, store) = new_store(16 * 1024);
    let id = capture(&store, &memory(MIB));
    let mapping = lazy(&store, id, Fill::OnFault);
    if !is_lazy(&mapping) {
        return;
    }
    // SAFETY: the child makes two system calls and exits.
    let child = unsafe { libc::fork() };
    if child == 0 {
        let address = mapping.as_ptr().cast_mut().cast();
        // SAFETY: with MS_ASYNC the call only looks at the mappings.
        let is_mapped = unsafe { libc::msync(address, MIB, libc::MS_ASYNC) } == 0;
        // SAFETY: the call ends the child.
        unsafe { libc::_exit(if is_mapped { 1 } else { 7 }) };
    }
    let mut status = 0;
    // SAFETY: the kernel writes the status to a local variable.
    assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
    assert_eq!(libc::WEXITSTATUS(status), 7);
}

// ---- The store ----------------------------------------------------------------------------------

#[test]
fn forgetting_and_gc_leave_a_mapping_alone_and_the_store_outlives_its_handle() {
    let (dir, store) = new_store(4096);
    let memory = memory(6 * MIB);
    let id = capture(&store, &memory);
    let mapping = lazy(&store, id, Fill::OnFault);
    store.forget(&[id]).unwrap();
    assert!(matches!(store.restore(id).err(), Some(Error::Store(StoreError::NoSuchSnapshot { .. }))));
    let is_done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for seed in 0.. {
                // So that gc rewrites packs during the reads.
                let other = noise(300_000, seed);
                let taken = store.process("other").capture(&other, &CaptureOptions::default()).unwrap();
                store.forget(&[taken.id]).unwrap();
                store.gc(&GcOptions::default()).unwrap();
                if is_done.load(Ordering::Relaxed) && seed > 3 {
                    break;
                }
            }
        });
        for at in (0..memory.len() / 2).step_by(4096) {
            assert_eq!(mapping[at], memory[at]);
        }
        is_done.store(true, Ordering::Relaxed);
    });
    drop(store);
    let path = dir.path().join("store");
    if is_lazy(&mapping) {
        assert!(matches!(Store::open(&path), Err(StoreError::Owned { .. })), "it is open still");
    }
    assert!(mapping[..] == memory[..]);
    drop(mapping);
    let store = Store::options().wait(Duration::from_secs(60)).open(&path).unwrap();
    // No mapping holds the snapshot any longer.
    store.gc(&GcOptions::default()).unwrap();
    assert!(store.snapshots().is_empty());
}

#[test]
fn a_mapping_may_be_dropped_at_any_time() {
    let (_dir, store) = new_store(4096);
    let memory = memory(4 * MIB);
    let id = capture(&store, &memory);
    for round in 0..60u64 {
        let mapping = lazy(&store, id, FILLS[usize::try_from(round % 3).unwrap()]);
        let touched = usize::try_from(round * 65_537).unwrap() % memory.len();
        if round % 2 == 0 {
            assert_eq!(mapping[touched], memory[touched]);
        }
        std::thread::sleep(Duration::from_micros(round * 40));
        drop(mapping);
    }
    // A filled mapping does not need the store.
    let mapping = lazy(&store, id, Fill::default());
    mapping.wait_until_filled().unwrap();
    let path = store.info().path;
    drop(store);
    // The fill threads may end a moment later.
    let reopened = Store::options().wait(Duration::from_secs(60)).open(path);
    assert!(reopened.is_ok(), "{reopened:?}");
    assert!(mapping[..] == memory[..]);
}

#[test]
fn a_fill_that_is_cancelled_leaves_the_rest_to_touches() {
    let (_dir, store) = new_store(4096);
    let memory = noise(4 * MIB, 1);
    let id = capture(&store, &memory);
    let cancel = Arc::new(AtomicBool::new(false));
    let (flag, most) = (cancel.clone(), Arc::new(AtomicUsize::new(0)));
    let seen = most.clone();
    let progress = Progress::new().cancel_when(cancel).on_advance(move |done_bytes, _| {
        seen.fetch_max(usize::try_from(done_bytes).unwrap(), Ordering::Relaxed);
        flag.store(done_bytes >= 40_960, Ordering::Relaxed);
    });
    let restored = store.restore(id).unwrap().progress(progress).into_lazy(Fill::ByAddress);
    if let Err(Error::Interrupted) = restored {
        // Where lazy restore is unavailable, everything was filled at once.
        return;
    }
    let mapping = restored.unwrap();
    let error = mapping.wait_until_filled().unwrap_err();
    assert!(matches!(*error, Error::Interrupted), "{error}");
    assert!(!mapping.is_filled());
    assert!(most.load(Ordering::Relaxed) < memory.len());
    assert!(mapping[..] == memory[..]);
}

// ---- The working set ----------------------------------------------------------------------------

#[test]
fn what_was_touched_is_filled_first_the_next_time() {
    let (_dir, store) = new_store(16 * 1024);
    let memory = noise(4 * MIB, 1);
    let first = capture(&store, &memory);
    let mapping = lazy(&store, first, Fill::OnFault);
    if !is_lazy(&mapping) {
        return;
    }
    for region in [200u64, 7, 100] {
        let at = usize::try_from(region * 16_384 + 77).unwrap();
        assert_eq!(mapping[at], memory[at]);
    }
    let working_set = mapping.touched();
    let region = |number: u64| AddressRange::with_length(number * 16_384, 16_384).unwrap();
    // Regions that were filled early only because they follow one of these are not in the set.
    assert_eq!(working_set.ranges(), [region(200), region(7), region(100)]);

    let attachment = working_set.to_attachment().unwrap();
    assert_eq!(attachment.name, WorkingSet::ATTACHMENT);
    assert_eq!(WorkingSet::from_attachment(&attachment.bytes).unwrap(), working_set);
    assert!(WorkingSet::from_attachment(&attachment.bytes[1..]).is_err());
    let options = CaptureOptions::new().attachments([attachment]);
    let second = store.process("p").capture(&mapping[..], &options).unwrap().id;
    let third = capture(&store, &memory);
    store.gc(&GcOptions::default()).unwrap();
    // A snapshot uses its own set, or the newest one of its process, whether that was taken before
    // or after.
    for id in [first, second, third] {
        let mapping = lazy(&store, id, Fill::WorkingSetFirst);
        mapping.wait_until_filled().unwrap();
        assert!(mapping.touched().ranges().starts_with(working_set.ranges()), "{:?}", mapping.touched());
        assert!(mapping[..] == memory[..]);
    }
}

#[test]
fn the_order_of_filling_is_that_of_the_working_set() {
    let (_dir, store) = new_store(4096);
    let memory = noise(MIB, 1);
    let (ranges, strange) = ([(240u64, 2u64), (100, 1)], AddressRange::new(1 << 40, 1 << 41).unwrap());
    let mut ranges: Vec<_> = ranges
        .iter()
        .map(|(page, pages)| AddressRange::with_length(page * 4096, pages * 4096).unwrap())
        .collect();
    // Outside of every mapping.
    ranges.insert(1, strange);
    let attachment = WorkingSet::new(ranges).to_attachment().unwrap();
    let options = CaptureOptions::new().attachments([attachment]);
    let id = store.process("p").capture(&memory, &options).unwrap().id;
    // It is cancelled after the three regions, so no others are present.
    let cancel = Arc::new(AtomicBool::new(false));
    let flag = cancel.clone();
    let progress = Progress::new()
        .cancel_when(cancel)
        .on_advance(move |done_bytes, _| flag.store(done_bytes >= 3 * 4096, Ordering::Relaxed));
    let restored = store.restore(id).unwrap().progress(progress).into_lazy(Fill::WorkingSetFirst);
    if let Err(Error::Interrupted) = restored {
        return;
    }
    let mapping = restored.unwrap();
    let error = mapping.wait_until_filled().unwrap_err();
    assert!(matches!(*error, Error::Interrupted), "{error}");
    let mut there = vec![0u8; 256];
    // SAFETY: the kernel writes one byte for each page of 4 KiB, and the buffer has that many.
    let answer = unsafe { libc::mincore(mapping.as_ptr().cast_mut().cast(), MIB, there.as_mut_ptr()) };
    if rustix::param::page_size() == 4096 {
        assert_eq!(answer, 0);
        let there: Vec<_> = (0..256usize).filter(|page| there[*page] & 1 == 1).collect();
        assert_eq!(there, [100, 240, 241]);
    }
}

#[test]
fn a_working_set_that_cannot_be_read_is_done_without() {
    let (_dir, store) = new_store(4096);
    let memory = memory(MIB);
    let attachment = Attachment { name: WorkingSet::ATTACHMENT.to_owned(), bytes: vec![9; 20] };
    let options = CaptureOptions::new().attachments([attachment]);
    let id = store.process("p").capture(&memory, &options).unwrap().id;
    let mapping = lazy(&store, id, Fill::WorkingSetFirst);
    mapping.wait_until_filled().unwrap();
    assert!(mapping[..] == memory[..]);
}

#[test]
fn an_image_may_be_empty_or_larger_than_the_memory_of_the_machine() {
    let (dir, store) = new_store(65_536);
    let empty = capture(&store, &Vec::<u8>::new());
    let path = dir.path().join("sparse");
    std::fs::File::create(&path).unwrap().set_len(1 << 40).unwrap();
    let large = capture(&store, &stillframe::source::FileSource::new(&path));
    // A terabyte of zeros restores too.
    let mapping = lazy(&store, large, Fill::OnFault);
    assert_eq!(mapping[1 << 39], 0);
    drop(mapping);
    for fill in FILLS {
        let mapping = lazy(&store, empty, fill);
        assert!(mapping.is_empty() && mapping.is_filled() && mapping.touched().ranges().is_empty());
    }
    let instance = store.template(empty).unwrap().instance().unwrap();
    assert!(instance.is_empty());
    capture(&store, &instance);
}

// ---- In a child ---------------------------------------------------------------------------------

const CHILD_DOES: &str = "STILLFRAME_LAZY_CHILD";
const CHILD_STORE: &str = "STILLFRAME_LAZY_STORE";

/// The userfaultfd flag that restricts it to page faults in user mode.
const USER_MODE_ONLY: u32 = 1;
const UFFDIO_POISON: u32 = 0xc020_aa08;

/// When a system call is forbidden.
enum If {
    Always,
    /// If the first argument lacks this bit.
    WithoutBit(u32),
    /// If the second argument has this value.
    Second(u32),
}

/// From here on the kernel refuses this call to this process.
fn forbid(call: libc::c_long, when: If, errno: i32) {
    let statement =
        |code: u32, k: u32| libc::sock_filter { code: u16::try_from(code).unwrap(), jt: 0, jf: 0, k };
    let jump = |code: u32, k: u32, jt: u8, jf: u8| libc::sock_filter {
        code: u16::try_from(code | libc::BPF_JMP | libc::BPF_K).unwrap(),
        jt,
        jf,
        k,
    };
    let load = |offset: u32| statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, offset);
    // The layout of `seccomp_data`: the number of the call, 12 bytes of other fields, six arguments
    // of 8 bytes.
    let (argument, is_forbidden) = match when {
        If::Always => (load(0), jump(libc::BPF_JA, 0, 0, 0)),
        If::WithoutBit(bit) => (load(16), jump(libc::BPF_JSET, bit, 1, 0)),
        If::Second(value) => (load(24), jump(libc::BPF_JEQ, value, 0, 1)),
    };
    let mut filter = [
        load(0),
        jump(libc::BPF_JEQ, u32::try_from(call).unwrap(), 0, 3),
        argument,
        is_forbidden,
        statement(libc::BPF_RET, libc::SECCOMP_RET_ERRNO | u32::try_from(errno).unwrap()),
        statement(libc::BPF_RET, libc::SECCOMP_RET_ALLOW),
    ];
    let program = libc::sock_fprog { len: u16::try_from(filter.len()).unwrap(), filter: filter.as_mut_ptr() };
    // SAFETY: the calls take numbers, and a program that outlives them.
    unsafe {
        assert_eq!(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), 0);
        assert_eq!(libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program), 0);
    }
}

/// Does what the environment says. Without that it is an empty test.
#[test]
fn child() {
    let Ok(does) = std::env::var(CHILD_DOES) else { return };
    match does.split('.').nth(1).unwrap_or_default() {
        "forbidden" => forbid(libc::SYS_userfaultfd, If::Always, libc::EPERM),
        "lacking" => forbid(libc::SYS_userfaultfd, If::Always, libc::ENOSYS),
        "unprivileged" => forbid(libc::SYS_userfaultfd, If::WithoutBit(USER_MODE_ONLY), libc::EPERM),
        "old" => forbid(libc::SYS_ioctl, If::Second(UFFDIO_POISON), libc::EINVAL),
        _ => {}
    }
    let options = Store::options().wait(Duration::from_secs(60));
    let store = options.open(std::env::var(CHILD_STORE).unwrap()).unwrap();
    if does.ends_with("damage") {
        damage(&store.info().path);
    }
    let id = store.find("latest").unwrap();
    let snapshot = store.snapshot(id).unwrap();
    let is_readable = |range: AddressRange| snapshot.read_range(range, &mut std::io::sink()).is_ok();
    let fill = if does.starts_with("touch") { Fill::OnFault } else { Fill::ByAddress };
    let mapping = match store.restore(id).unwrap().into_lazy(fill) {
        Ok(mapping) => mapping,
        // A restore that fills at once reports the damage here.
        Err(error) => return say(&format!("error: {error}")),
    };
    say(&format!("{:?}", mapping.filled()));
    let mut damaged = None;
    if does.starts_with("fill") {
        say(&format!("filled: {:?}", mapping.wait_until_filled().map_err(|error| error.to_string())));
    }
    for region in snapshot.regions().unwrap() {
        let (range, _) = region.unwrap();
        let at = usize::try_from(range.start()).unwrap()..usize::try_from(range.end()).unwrap();
        if !is_readable(range) {
            damaged = Some(at);
            continue;
        }
        let mut expected = Vec::new();
        snapshot.read_range(range, &mut expected).unwrap();
        assert!(mapping[at] == expected[..]);
    }
    say("all others are right");
    if let Some(at) = damaged {
        let path = std::path::PathBuf::from(std::env::var(CHILD_STORE).unwrap()).join("written");
        let file = std::fs::File::create(path).unwrap();
        // SAFETY: the kernel reads from the mapping, or returns an error.
        let written = unsafe { libc::write(file.as_raw_fd(), mapping[at.start..].as_ptr().cast(), 10) };
        let errno = std::io::Error::last_os_error();
        say(&format!("a system call: {written} {errno}"));
        // The damage was found by the fill or by this call, or not yet.
        if written < 0 && mapping.serves_system_calls() {
            say(&format!("error: {}", mapping.error().unwrap()));
        }
        say(&format!("touched, and found {}", mapping[at.start]));
    } else if fill == Fill::OnFault {
        let written = std::fs::write("/dev/null", &mapping[..]).is_ok();
        say(&format!("a system call: {written}"));
    }
}

/// The output of a child that does `does` in a store.
fn child_output(does: &str, store: &Path) -> (Output, String) {
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "lazy::child", "--nocapture"])
        .env(CHILD_DOES, does)
        .env(CHILD_STORE, store)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let all = format!("{does}: {:?}\n{said}\n{}", output.status, String::from_utf8_lossy(&output.stderr));
    (output, all)
}

/// Flips one bit of a region.
fn damage(store: &Path) {
    let pack = store.join("packs/00000001.pack");
    let pack = std::fs::OpenOptions::new().read(true).write(true).open(pack).unwrap();
    let mut byte = [0];
    pack.read_exact_at(&mut byte, MIB as u64).unwrap();
    pack.write_all_at(&[byte[0] ^ 1], MIB as u64).unwrap();
}

/// A store with one snapshot.
fn store_of(memory: &[u8]) -> (tempfile::TempDir, std::path::PathBuf, bool) {
    let (dir, store) = new_store(16 * 1024);
    let id = capture(&store, memory);
    let is_lazy = is_lazy(&lazy(&store, id, Fill::OnFault));
    let path = store.info().path;
    (dir, path, is_lazy)
}

#[test]
fn who_touches_a_damaged_region_gets_a_signal_and_all_else_works() {
    let how = ["touch", "fill", "touch.unprivileged", "fill.unprivileged", "touch.old", "fill.old"];
    for does in how {
        let (_dir, store, is_lazy) = store_of(&noise(2 * MIB, 1));
        if !is_lazy {
            return;
        }
        let (output, said) = child_output(&format!("{does}.damage"), &store);
        let signal = if does.ends_with("old") { libc::SIGSEGV } else { libc::SIGBUS };
        // Before Linux 6.6 there is no other signal.
        assert!(
            output.status.signal() == Some(signal) || output.status.signal() == Some(libc::SIGSEGV),
            "{said}"
        );
        assert!(said.contains("Lazily") && said.contains("all others are right"), "{said}");
        assert!(said.contains("a system call: -1"), "{said}");
        assert!(!said.contains("touched"), "{said}");
        if does.starts_with("fill") {
            assert!(said.contains("filled: Err(") && said.contains("damaged"), "{said}");
        }
    }
}

#[test]
fn without_userfaultfd_all_is_restored_at_once_and_it_says_why() {
    let (_dir, store, _) = store_of(&memory(2 * MIB));
    for (does, why) in [("touch.forbidden", "forbidden here"), ("touch.lacking", "built without userfaultfd")]
    {
        let (output, said) = child_output(does, &store);
        assert!(output.status.success(), "{said}");
        assert!(said.contains("AtOnce") && said.contains(why), "{said}");
        assert!(said.contains("all others are right") && said.contains("a system call: true"), "{said}");
    }
    // Damage is then an error.
    let (output, said) = child_output("touch.forbidden.damage", &store);
    assert!(output.status.success() && said.contains("error: ") && said.contains("damaged"), "{said}");
}

#[test]
fn an_unprivileged_user_touches_what_a_system_call_is_to_read() {
    let (_dir, store, _) = store_of(&memory(2 * MIB));
    let (output, said) = child_output("touch.unprivileged", &store);
    assert!(output.status.success(), "{said}");
    // In this mode every page was accessed before.
    assert!(said.contains("all others are right") && said.contains("a system call: true"), "{said}");
}
