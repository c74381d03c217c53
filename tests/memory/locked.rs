//! Processes that lock all memory they map (`mlockall`): memory that is restored, filled on first
//! access, mapped copy-on-write or captured there is right, and uses no more space than elsewhere.
//!
//! A lock applies to the whole process. So each case runs in a child, which runs this test binary
//! with one test, [`child`], which does what the environment says.

use std::os::fd::AsRawFd;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Output};

use stillframe::lazy::{Fill, Filled};
use stillframe::source::Source;
use stillframe::{CaptureOptions, RegionSize, Reservation, SnapshotId, Store};

use crate::noise::noise;
use crate::vault::say;
use crate::whole_error::whole_error;

const MIB: usize = 1 << 20;
const FILLS: [Fill; 3] = [Fill::WorkingSetFirst, Fill::ByAddress, Fill::OnFault];
const CHILD_DOES: &str = "STILLFRAME_LOCKED_CHILD";

// ---- In a child ---------------------------------------------------------------------------------

fn lock_all(how: libc::c_int) {
    // SAFETY: the call changes no byte.
    let answer = unsafe { libc::mlockall(how) };
    assert_eq!(answer, 0, "mlockall: {}", std::io::Error::last_os_error());
}

/// The private anonymous memory of this process, in KiB.
fn own_kib() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

/// The peak memory of this process, in KiB.
fn most_kib() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

/// How many pages of a mapping are present.
fn pages_there(memory: &[u8]) -> usize {
    let mut there = vec![0u8; memory.len().div_ceil(4096)];
    // SAFETY: the call writes one byte for each page of the memory.
    let answer =
        unsafe { libc::mincore(memory.as_ptr().cast_mut().cast(), memory.len(), there.as_mut_ptr()) };
    assert_eq!(answer, 0);
    there.iter().filter(|page| **page & 1 == 1).count()
}

struct Setting {
    _dir: tempfile::TempDir,
    store: Store,
    id: SnapshotId,
    image: Vec<u8>,
}

/// A store with a snapshot of 8 MiB, part of which is zeros.
fn setting() -> Setting {
    let dir = tempfile::tempdir().unwrap();
    let size = RegionSize::new(16 * 1024).unwrap();
    let store = Store::options().region_size(size).create(dir.path().join("store")).unwrap();
    let mut image = noise(8 * MIB, 3);
    image[2 * MIB..4 * MIB].fill(0);
    let id = store.process("p").capture(&image, &CaptureOptions::default()).unwrap().id;
    Setting { _dir: dir, store, id, image }
}

/// Does what the environment says. Without that it is an empty test.
#[test]
fn child() {
    let Ok(does) = std::env::var(CHILD_DOES) else { return };
    let (what, how) = does.split_once('.').unwrap();
    let setting = setting();
    match how {
        "future" => lock_all(libc::MCL_FUTURE),
        "all" => lock_all(libc::MCL_CURRENT | libc::MCL_FUTURE),
        "onfault" => lock_all(libc::MCL_FUTURE | libc::MCL_ONFAULT),
        "current" => lock_all(libc::MCL_CURRENT),
        "limited" => limit(),
        _ => panic!("{how}"),
    }
    match what {
        "lazy" => lazy(&setting),
        "place" => in_place(&setting),
        "shared" => shared(&setting),
        "staging" => staging(&setting),
        "errors" => errors(&setting),
        "foreign" => foreign(&setting),
        _ => panic!("{what}"),
    }
    say("all is right");
}

fn lazy(Setting { store, id, image, .. }: &Setting) {
    for fill in FILLS {
        let mapping = store.restore(*id).unwrap().into_lazy(fill).unwrap();
        say(&format!("{:?}", mapping.filled()));
        if fill == Fill::OnFault && *mapping.filled() == Filled::Lazily {
            assert_eq!(pages_there(&mapping), 0, "nobody has touched it");
        }
        if fill == Fill::OnFault && mapping.serves_system_calls() {
            // A part is locked as a whole; then its protection is removed and set again, which
            // populates locked memory.
            let part = &mapping[MIB..3 * MIB];
            // SAFETY: none of these calls changes a byte, and no access to the memory happens in
            // between.
            unsafe {
                let address = part.as_ptr().cast_mut().cast();
                assert_eq!(libc::mlock(address, part.len()), 0);
                let after = mapping[5 * MIB..6 * MIB].as_ptr().cast_mut().cast();
                assert_eq!(libc::mprotect(after, MIB, libc::PROT_NONE), 0);
                assert_eq!(libc::mprotect(after, MIB, libc::PROT_READ | libc::PROT_WRITE), 0);
            }
        }
        assert!(mapping[..] == image[..], "{fill:?}");
        mapping.wait_until_filled().unwrap();
        assert!(mapping[..] == image[..], "{fill:?}, when it is filled");
        assert!(mapping.error().is_none());
    }
}

fn in_place(Setting { store, id, image, .. }: &Setting) {
    let mut memory = Reservation::new(32 * MIB, 1 << 16).unwrap();
    let template = store.template(*id).unwrap();
    memory.track_writes_if_possible().unwrap();
    for fill in FILLS {
        // Before, it has other bytes, and is longer or shorter.
        memory.set_length_bytes(9 * MIB + 100).unwrap();
        memory.bytes_mut()[MIB..].fill(9);
        let filled = memory.restore_lazily(store.restore(*id).unwrap(), fill).unwrap();
        say(&format!("{filled:?}"));
        if fill == Fill::OnFault && filled == Filled::Lazily {
            assert_eq!(pages_there(memory.bytes_mut()), 0, "nobody has touched it");
        }
        assert!(*memory.bytes_mut() == image[..], "{fill:?}");
        memory.set_length_bytes(9 * MIB).unwrap();
        assert!(memory.bytes_mut()[..8 * MIB] == image[..], "{fill:?}, when it has grown");
        assert!(memory.bytes_mut()[8 * MIB..].iter().all(|byte| *byte == 0), "{fill:?}");
        memory.set_length_bytes(MIB).unwrap();

        memory.instantiate(&template).unwrap();
        assert!(*memory.bytes_mut() == image[..]);
        memory.bytes_mut()[5000] ^= 1;
        let options = CaptureOptions::new().parent(memory.basis());
        let taken = store.process("p").capture(&memory, &options).unwrap();
        assert_eq!(taken.changed_regions, 1);
        memory.rollback(store.rollback(*id).unwrap()).unwrap();
        assert!(*memory.bytes_mut() == image[..], "rolled back");
        memory.restore(store.restore(taken.id).unwrap()).unwrap();
        memory.bytes_mut()[5000] ^= 1;
        assert!(*memory.bytes_mut() == image[..], "restored");
        if memory.tracker().is_ok() {
            let options = CaptureOptions::new().parent(memory.basis());
            let taken = store.process("p").capture(&memory, &options).unwrap();
            assert_eq!((taken.changed_regions, taken.tracking.name()), (1, "write-protection"));
        }
    }
}

/// Instances of a template share the pages that they have not written.
fn shared(Setting { store, id, image, .. }: &Setting) {
    let template = store.template(*id).unwrap();
    let before = own_kib();
    let mut instances: Vec<_> = (0..16).map(|_| template.instance().unwrap()).collect();
    instances.iter_mut().for_each(|instance| instance[5000] = 7);
    let grown_kib = own_kib().saturating_sub(before);
    assert!(grown_kib < 16 * 1024, "16 instances of 8 MiB took {grown_kib} KiB");
    assert!(instances.iter().all(|instance| instance[6000..] == image[6000..] && instance[5000] == 7));
}

/// A capture uses no more memory than it needs.
fn staging(Setting { store, image, .. }: &Setting) {
    let before = most_kib();
    let taken = store.process("q").capture(&image[..MIB], &CaptureOptions::default()).unwrap();
    let grown_kib = most_kib() - before;
    assert!(grown_kib < 100 * 1024, "a capture of a MiB took {grown_kib} KiB; its buffer may become 160 MiB");
    assert!(store.restore(taken.id).unwrap().into_mapping().unwrap()[..] == image[..MIB]);
}

/// From here on this process may lock at most 64 MiB, or its present limit if that is less.
fn limit() {
    let limit_bytes = may_lock_bytes().min(64 << 20);
    let limit = libc::rlimit { rlim_cur: limit_bytes, rlim_max: limit_bytes };
    // The kernel's `struct __user_cap_header_struct` and two `__user_cap_data_struct`: all
    // capabilities except the one to lock memory (14).
    let header = [0x2008_0522u32, 0];
    let mut data = [0u32; 6];
    // SAFETY: the calls read and write exactly as many bytes as the kernel's structures have.
    unsafe {
        assert_eq!(libc::setrlimit(libc::RLIMIT_MEMLOCK, &raw const limit), 0);
        assert_eq!(libc::syscall(libc::SYS_capget, header.as_ptr(), data.as_mut_ptr()), 0);
        for set in [0, 1, 2] {
            data[set] &= !(1 << 14);
        }
        assert_eq!(libc::syscall(libc::SYS_capset, header.as_ptr(), data.as_ptr()), 0);
    }
    lock_all(libc::MCL_FUTURE);
}

/// Where less may be locked than needed, the errors say so.
fn errors(Setting { store, id, image, .. }: &Setting) {
    let says_why = |why: String| {
        let limit = format!("{} bytes in all (RLIMIT_MEMLOCK)", may_lock_bytes());
        assert!(why.contains(&limit) && why.contains("mlockall"), "{why}");
    };
    // The staging buffer of 160 MiB.
    says_why(whole_error(
        &store.process("q").capture(&image[..MIB], &CaptureOptions::default()).unwrap_err(),
    ));
    says_why(whole_error(&Reservation::new(512 * MIB, 0).unwrap_err()));
    let large = store.restore(*id).unwrap();
    let mut held = Vec::new();
    let why = loop {
        match store.restore(*id).unwrap().into_mapping() {
            Ok(mapping) => held.push(mapping),
            Err(error) => break error,
        }
    };
    says_why(whole_error(&why));
    says_why(whole_error(&large.into_lazy(Fill::OnFault).unwrap_err()));
    drop(held);
    if may_lock_bytes() < 64 << 20 {
        return say("too little for a capture with its threads");
    }
    // A smaller buffer works.
    let options = CaptureOptions::new().staging_bytes(MIB);
    let taken = store.process("q").capture(&image[..MIB], &options).unwrap();
    assert!(store.restore(taken.id).unwrap().into_mapping().unwrap()[..] == image[..MIB]);
}

/// Another userfaultfd client puts zeros into pages that were not filled yet, as the kernel did
/// with locked memory.
fn foreign(Setting { store, id, image, .. }: &Setting) {
    const UFFDIO_ZEROPAGE: u32 = 0xc020_aa04;
    let mapping = store.restore(*id).unwrap().into_lazy(Fill::OnFault).unwrap();
    if *mapping.filled() != Filled::Lazily {
        return say("not lazy");
    }
    let descriptors = std::fs::read_dir("/proc/self/fd").unwrap().map(|entry| entry.unwrap().path());
    let is_userfault = |path: &std::path::PathBuf| {
        std::fs::read_link(path).is_ok_and(|target| target.to_string_lossy().contains("userfaultfd"))
    };
    let descriptor = descriptors.into_iter().find(is_userfault).unwrap();
    let descriptor: i32 = descriptor.file_name().unwrap().to_str().unwrap().parse().unwrap();
    let mut argument = [mapping[MIB..].as_ptr().addr() as u64, 4096, 0, 0];
    // SAFETY: the ioctl reads and writes one `uffdio_zeropage`, four numbers of 64 bits; the page
    // is of this mapping.
    let answer = unsafe { libc::ioctl(descriptor, UFFDIO_ZEROPAGE as _, argument.as_mut_ptr()) };
    assert_eq!(answer, 0, "{}", std::io::Error::last_os_error());
    let null = std::fs::File::create("/dev/null").unwrap();
    assert!(null.as_raw_fd() >= 0);
    mapping.wait_until_filled().unwrap_err();
    say(&format!("error: {:?}", mapping.error().unwrap()));
    assert!(mapping[..MIB] == image[..MIB] && mapping[MIB + 16 * 1024..] == image[MIB + 16 * 1024..]);
    say("all others are right");
    say(&format!("touched, and found {}", mapping[MIB]));
}

// ---- The tests ----------------------------------------------------------------------------------

/// The output of a child.
fn child_output(does: &str) -> (Output, String) {
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "locked::child", "--nocapture"])
        .env(CHILD_DOES, does)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let all = format!("{does}: {:?}\n{said}\n{}", output.status, String::from_utf8_lossy(&output.stderr));
    (output, all)
}

/// How much memory RLIMIT_MEMLOCK lets this process lock.
fn may_lock_bytes() -> u64 {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the call writes one `rlimit`.
    assert_eq!(unsafe { libc::getrlimit(libc::RLIMIT_MEMLOCK, &raw mut limit) }, 0);
    limit.rlim_max
}

/// Whether this process may lock as much as the tests do.
fn may_lock() -> bool {
    // SAFETY: the call takes no argument.
    let is_root = unsafe { libc::geteuid() } == 0;
    let may = is_root || may_lock_bytes() >= 4 << 30;
    if !may {
        eprintln!("passed over: needs root, or RLIMIT_MEMLOCK of 4 GiB (ulimit -l)");
    }
    may
}

#[track_caller]
fn all_is_right(does: &str) -> String {
    let (output, said) = child_output(does);
    assert!(output.status.success() && said.contains("all is right"), "{said}");
    said
}

#[test]
fn a_lazy_restore_of_locked_memory_is_the_snapshot() {
    if !may_lock() {
        return;
    }
    for how in ["future", "all", "onfault", "current"] {
        let said = all_is_right(&format!("lazy.{how}"));
        assert!(said.contains("Lazily") || said.contains("AtOnce"), "{said}");
    }
}

#[test]
fn whatever_locked_memory_becomes_in_place_it_is_what_it_should_be() {
    if may_lock() {
        for how in ["future", "onfault", "all"] {
            all_is_right(&format!("place.{how}"));
        }
    }
}

#[test]
fn instances_share_and_captures_take_no_more_than_they_need_where_all_is_locked() {
    if may_lock() {
        for does in ["shared.future", "shared.all", "staging.future"] {
            all_is_right(does);
        }
    }
}

#[test]
fn where_not_so_much_may_be_locked_the_errors_say_so() {
    if may_lock() {
        all_is_right("errors.limited");
    }
}

#[test]
fn a_page_that_somebody_else_has_filled_is_an_error_and_not_wrong_bytes() {
    if !may_lock() {
        return;
    }
    let (output, said) = child_output("foreign.current");
    if said.contains("not lazy") {
        return eprintln!("passed over: needs userfaultfd");
    }
    assert_eq!(output.status.signal(), Some(libc::SIGSEGV), "{said}");
    assert!(
        said.contains("were there before they were filled") && said.contains("all others are right"),
        "{said}"
    );
    assert!(!said.contains("touched"), "{said}");
}
