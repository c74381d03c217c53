//! Templates: any number of instances of one snapshot can be mapped. Each equals the snapshot until
//! it is written, and a capture of an instance stores its bytes exactly.

use std::io::Write;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use stillframe::error::MemoryError;
use stillframe::source::{FileSource, LiveProcessSource};
use stillframe::store::StoreError;
use stillframe::template::Instance;
use stillframe::track::{RescanReason, TrackMethod, Tracking};
use stillframe::verify::VerifyOptions;
use stillframe::{AddressRange, CaptureOptions, Error, GcOptions, SnapshotId, Store};

use crate::needs::passed_over;
use crate::noise::noise;
use crate::vault::{mixed_memory as memory, new_store};

const MIB: usize = 1 << 20;
const CHILD_STORE: &str = "STILLFRAME_TEMPLATE_STORE";
const CHILD_SNAPSHOT: &str = "STILLFRAME_TEMPLATE_SNAPSHOT";

fn child_of(instance: &Instance) -> CaptureOptions {
    CaptureOptions::new().parent(instance.parent())
}

fn restored(store: &Store, id: SnapshotId) -> memmap2::MmapMut {
    store.restore(id).unwrap().into_mapping().unwrap()
}

#[test]
fn instances_are_the_snapshot_and_do_not_see_one_another() {
    let (_dir, store) = new_store(16 * 1024);
    let memory = memory(3 * MIB + 777);
    let id = store.process("p").capture(&memory, &CaptureOptions::default()).unwrap().id;
    let template = store.template(id).unwrap();
    assert_eq!((template.snapshot(), template.image_bytes()), (id, memory.len() as u64));
    let mut instances: Vec<_> = (0..20).map(|_| template.instance().unwrap()).collect();
    // The instances need only the template, and it may be dropped too.
    store.forget(&[id]).unwrap();
    store.gc(&GcOptions::default()).unwrap();
    drop((store, template));
    for (number, instance) in instances.iter_mut().enumerate() {
        assert!(instance[..] == memory[..], "instance {number}");
        instance[number * 100_000] ^= 0xFF;
    }
    for (number, instance) in instances.iter().enumerate() {
        let mut expected = memory.clone();
        expected[number * 100_000] ^= 0xFF;
        assert!(instance[..] == expected[..], "instance {number}");
    }
}

#[test]
fn a_capture_of_an_instance_follows_the_template_and_reads_what_was_written() {
    let (_dir, store) = new_store(4096);
    let memory = memory(4 * MIB);
    let booted = store.process("vm").capture(&memory, &CaptureOptions::default()).unwrap();
    let template = store.template(booted.id).unwrap();
    let mut instance = template.instance().unwrap();
    let process = store.process("vm-1");

    instance[5000] ^= 1;
    instance[3 * MIB..3 * MIB + 5000].fill(7);
    let first = process.capture(&instance, &child_of(&instance)).unwrap();
    assert_eq!(first.parent, Some(booted.id));
    assert_eq!(first.tracking, Tracking::By(TrackMethod::CopyOnWrite));
    assert_eq!(first.changed_regions, 3);
    assert!(restored(&store, first.id)[..] == instance[..]);

    // The next capture is compared with this one without further options, because this is the
    // newest of its process.
    assert_eq!(instance.parent(), first.id);
    instance[9000] ^= 1;
    let second = process.capture(&instance, &CaptureOptions::default()).unwrap();
    assert_eq!((second.parent, second.changed_regions), (Some(first.id), 1));
    assert_eq!(second.tracking, Tracking::By(TrackMethod::CopyOnWrite));
    assert!(restored(&store, second.id)[..] == instance[..]);

    // Discarded pages return to the template's bytes, not to those of the last capture.
    let page_bytes = rustix::param::page_size();
    let start = 3 * MIB / page_bytes * page_bytes;
    throw_away(&mut instance, start, page_bytes);
    assert!(instance[start..start + page_bytes] == memory[start..start + page_bytes]);
    let third = process.capture(&instance, &CaptureOptions::default()).unwrap();
    assert_eq!((third.tracking, third.changed_regions), (Tracking::By(TrackMethod::CopyOnWrite), 1));
    assert!(restored(&store, third.id)[..] == instance[..]);

    // With another parent, or none, the capture reads everything and stores the same bytes.
    let alone = store.process("alone").capture(&instance, &CaptureOptions::default()).unwrap();
    assert_eq!(alone.tracking, Tracking::Rescan(RescanReason::NoParent));
    let other = store.process("other").capture(&memory, &CaptureOptions::default()).unwrap();
    let options = CaptureOptions::new().parent(other.id);
    let strange = store.process("strange").capture(&instance, &options).unwrap();
    assert_eq!(strange.tracking, Tracking::Rescan(RescanReason::OtherParent));
    for taken in [alone, strange] {
        let root = |id| store.snapshot(id).unwrap().record().root;
        assert_eq!(root(taken.id), root(third.id));
    }

    // A parent that is gone is reported.
    store.forget(&[booted.id]).unwrap();
    let options = CaptureOptions::new().parent(booted.id);
    let refused = store.process("late").capture(&instance, &options).unwrap_err();
    assert!(matches!(refused, Error::Store(StoreError::NoSuchSnapshot { .. })), "{refused}");
}

/// Discards whole pages.
fn throw_away(instance: &mut Instance, offset: usize, length: usize) {
    // SAFETY: no reference to these bytes exists; they become those of the template.
    let answer =
        unsafe { libc::madvise(instance[offset..].as_mut_ptr().cast(), length, libc::MADV_DONTNEED) };
    assert_eq!(answer, 0);
}

#[test]
fn what_was_excluded_and_the_mappings_are_the_templates() {
    let (_dir, store) = new_store(16 * 1024);
    let taken = {
        let mut cat = Command::new("cat").stdin(std::process::Stdio::piped()).spawn().unwrap();
        // Before it executes the program, its memory is that of its parent.
        let comm = format!("/proc/{}/comm", cat.id());
        while std::fs::read_to_string(&comm).unwrap() != "cat\n" {
            std::thread::yield_now();
        }
        let source = LiveProcessSource::new(cat.id());
        let taken = store.process("cat").capture(&source, &CaptureOptions::default());
        cat.kill().unwrap();
        cat.wait().unwrap();
        taken.unwrap()
    };
    let template = store.template(taken.id).unwrap();
    let mut instance = template.instance().unwrap();
    assert!(instance[..] == restored(&store, taken.id)[..]);
    let last = instance.len() - 1;
    instance[last] ^= 1;
    let child = store.process("cat-1").capture(&instance, &child_of(&instance)).unwrap();
    let space = |id| store.snapshot(id).unwrap().address_space().unwrap();
    assert_eq!(space(child.id).mappings(), space(taken.id).mappings());
    assert!(restored(&store, child.id)[..] == instance[..]);
    if space(taken.id).unreadable().is_empty() {
        assert_eq!((child.tracking, child.changed_regions), (Tracking::By(TrackMethod::CopyOnWrite), 1));
    }

    let memory = vec![7u8; MIB];
    let exclude = vec![AddressRange::new(4096, 9000).unwrap()];
    let options = CaptureOptions::new().exclude(exclude.clone());
    let booted = store.process("vm").capture(&memory, &options).unwrap();
    let mut instance = store.template(booted.id).unwrap().instance().unwrap();
    assert_eq!((instance[4095], instance[4096], instance[8999], instance[9000]), (7, 0, 0, 7));
    instance[5000] = 9;
    instance[90_000] = 9;
    let child = store.process("vm-1").capture(&instance, &child_of(&instance)).unwrap();
    assert_eq!(child.tracking, Tracking::By(TrackMethod::CopyOnWrite));
    assert_eq!(space(child.id).excluded(), exclude);
    let back = restored(&store, child.id);
    assert_eq!((back[5000], back[90_000]), (0, 9));
}

#[derive(Clone, Debug)]
enum Step {
    Write {
        at: usize,
        length: usize,
        byte: u8,
    },
    ThrowAway {
        page: usize,
        pages: usize,
    },
    Capture,
    /// A new instance of the newest snapshot.
    Again,
}

#[test]
fn random_histories_of_instances_are_what_full_captures_say() {
    const LENGTH: usize = 96 * 4096 + 1000;
    let page_bytes = rustix::param::page_size();
    let step = prop_oneof![
        5 => (0..LENGTH, 1..20_000usize, any::<u8>())
            .prop_map(|(at, length, byte)| Step::Write { at, length, byte }),
        2 => (0..LENGTH / page_bytes, 1..20usize).prop_map(|(page, pages)| Step::ThrowAway { page, pages }),
        3 => Just(Step::Capture),
        1 => Just(Step::Again),
    ];
    let strategy = (prop_oneof![Just(512u32), Just(4096), Just(65_536)], prop::collection::vec(step, 1..25));
    let config = Config { cases: 24, failure_persistence: None, ..Config::default() };
    let run = |(region_bytes, steps): (u32, Vec<Step>)| {
        let (_dir, store) = new_store(region_bytes);
        let (_other_dir, other) = new_store(region_bytes);
        let mut template_bytes = memory(LENGTH);
        let id = store.process("p").capture(&template_bytes, &CaptureOptions::default()).unwrap().id;
        let mut instance = store.template(id).unwrap().instance().unwrap();
        let mut model = template_bytes.clone();
        for step in steps {
            match step {
                Step::Write { at, length, byte } => {
                    let end = LENGTH.min(at + length);
                    instance[at..end].fill(byte);
                    model[at..end].fill(byte);
                }
                Step::ThrowAway { page, pages } => {
                    let start = page * page_bytes;
                    let end = LENGTH.next_multiple_of(page_bytes).min(start + pages * page_bytes);
                    throw_away(&mut instance, start, end - start);
                    model[start..end.min(LENGTH)].copy_from_slice(&template_bytes[start..end.min(LENGTH)]);
                }
                Step::Capture | Step::Again => {
                    let taken = store.process("i").capture(&instance, &child_of(&instance)).unwrap();
                    prop_assert_eq!(&taken.tracking, &Tracking::By(TrackMethod::CopyOnWrite));
                    let full = other.process("i").capture(&model, &CaptureOptions::default()).unwrap();
                    let root = |store: &Store, id| store.snapshot(id).unwrap().record().root;
                    prop_assert_eq!(root(&store, taken.id), root(&other, full.id));
                    if matches!(step, Step::Again) {
                        template_bytes.copy_from_slice(&model);
                        instance = store.template(taken.id).unwrap().instance().unwrap();
                    }
                }
            }
            prop_assert!(instance[..] == model[..]);
        }
        Ok(())
    };
    TestRunner::new(config).run(&strategy, run).unwrap();
}

#[test]
fn a_thousand_instances_take_what_they_have_written() {
    let (_dir, store) = new_store(16 * 1024);
    let memory = memory(8 * MIB);
    let id = store.process("p").capture(&memory, &CaptureOptions::default()).unwrap().id;
    let template = store.template(id).unwrap();
    let own_bytes = || {
        let rollup = std::fs::read_to_string("/proc/self/smaps_rollup").unwrap();
        let line = rollup.lines().find(|line| line.starts_with("Anonymous:")).unwrap().to_owned();
        line.split_ascii_whitespace().nth(1).unwrap().parse::<usize>().unwrap() * 1024
    };
    let before = own_bytes();
    let mut instances: Vec<_> = (0..1000).map(|_| template.instance().unwrap()).collect();
    for (number, instance) in instances.iter_mut().enumerate() {
        instance[number * 8000] ^= 1;
    }
    // 1000 pages are 4 MB, and the page tables of that many mappings are not counted here. Copies
    // would take 8 GB.
    let grown = own_bytes().saturating_sub(before);
    assert!(grown < 256 * MIB, "{grown} bytes");
    for (number, instance) in instances.iter().enumerate() {
        assert_eq!(instance[number * 8000], memory[number * 8000] ^ 1);
        assert_eq!(instance[(number + 1) % 1000 * 8000], memory[(number + 1) % 1000 * 8000]);
    }
}

#[test]
fn pressure_takes_nothing_away_that_was_written() {
    let (_dir, store) = new_store(16 * 1024);
    let memory = memory(4 * MIB);
    let id = store.process("p").capture(&memory, &CaptureOptions::default()).unwrap().id;
    let template = store.template(id).unwrap();
    let mut instance = template.instance().unwrap();
    let mut expected = memory.clone();
    for at in (0..expected.len()).step_by(9000) {
        instance[at] ^= 1;
        expected[at] ^= 1;
    }
    // The kernel reclaims all pages that it can. SAFETY: the call changes no byte.
    let answer = unsafe { libc::madvise(instance.as_mut_ptr().cast(), instance.len(), libc::MADV_PAGEOUT) };
    assert_eq!(answer, 0);
    let taken = store.process("i").capture(&instance, &child_of(&instance)).unwrap();
    assert_eq!(taken.tracking, Tracking::By(TrackMethod::CopyOnWrite));
    assert!(instance[..] == expected[..]);
    assert!(restored(&store, taken.id)[..] == expected[..]);
}

#[test]
fn a_damaged_snapshot_makes_no_template() {
    let (dir, store) = new_store(16 * 1024);
    let id = store.process("p").capture(&noise(MIB, 1), &CaptureOptions::default()).unwrap().id;
    let pack = dir.path().join("store/packs/00000001.pack");
    let mut bytes = std::fs::read(&pack).unwrap();
    bytes[500_000] ^= 1;
    let mut file = std::fs::OpenOptions::new().write(true).open(&pack).unwrap();
    file.write_all(&bytes).unwrap();
    let refused = store.template(id).unwrap_err();
    assert!(matches!(&refused, Error::Store(error) if error.is_damage()), "{refused}");
}

// ---- Limits -------------------------------------------------------------------------------------

/// Runs for the tests below in a separate process with limits.
#[test]
fn child() {
    let Ok(path) = std::env::var(CHILD_STORE) else { return };
    let store = Store::options().wait(Duration::from_secs(60)).open(path).unwrap();
    let id = store.find(&std::env::var(CHILD_SNAPSHOT).unwrap()).unwrap();
    let mapping_error = |error: Error| matches!(error, Error::Memory(MemoryError::Mapping { .. }));
    match store.template(id) {
        Err(error) => {
            println!("no template: {error}: {}", std::error::Error::source(&error).unwrap());
            assert!(mapping_error(error));
        }
        Ok(template) => {
            let error = template.instance().unwrap_err();
            println!("no instance: {error}: {}", std::error::Error::source(&error).unwrap());
            assert!(mapping_error(error));
        }
    }
}

/// The output of the child. A shell runs `limits` first.
fn child_says(limits: &str, store: &std::path::Path, id: SnapshotId) -> String {
    let output = Command::new("sh")
        .args(["-c", &format!("{limits}; exec \"$0\" --exact templates::child --nocapture")])
        .arg(std::env::current_exe().unwrap())
        .env(CHILD_STORE, store)
        .env(CHILD_SNAPSHOT, id.to_string())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{said}\n{}", String::from_utf8_lossy(&output.stderr));
    said
}

#[test]
fn too_little_room_for_a_template_or_an_instance_is_an_error() {
    let (dir, store) = new_store(16 * 1024);
    // A terabyte file with almost no content.
    let path = dir.path().join("sparse");
    std::fs::File::create(&path).unwrap().set_len(1 << 40).unwrap();
    std::os::unix::fs::FileExt::write_all_at(
        &std::fs::OpenOptions::new().write(true).open(&path).unwrap(),
        &[1; 100],
        1 << 39,
    )
    .unwrap();
    let source = FileSource::new(&path);
    let sparse = store.process("sparse").capture(&source, &CaptureOptions::default()).unwrap().id;
    let dense = store.process("dense").capture(&noise(4 * MIB, 1), &CaptureOptions::default()).unwrap().id;
    drop(store);
    let store = dir.path().join("store");
    // Half a terabyte of addresses, in KiB.
    let said = child_says("ulimit -v 536870912", &store, sparse);
    assert!(said.contains("no instance") && said.contains("1099511627776 bytes"), "{said}");
    // Files of at most 2 MiB, in blocks of 512 bytes; the signal for a larger file is ignored.
    let said = child_says("trap '' XFSZ; ulimit -f 4096", &store, dense);
    assert!(said.contains("no template") && said.contains("4194304 bytes"), "{said}");
}

// ---- Under memory pressure ----------------------------------------------------------------------

const CHILD_GROUP: &str = "STILLFRAME_TEMPLATE_GROUP";
const CHILD_PAGES: &str = "STILLFRAME_TEMPLATE_PAGES";
const IMAGE_BYTES: usize = 24 * MIB;
const GROUP_BYTES: usize = 128 * MIB;
const INSTANCES: usize = 500;
const PAGE_BYTES: usize = 4096;

/// A control group that limits the memory of its processes together. `None` where this process may
/// not create one.
fn control_group() -> Option<PathBuf> {
    let own = std::fs::read_to_string("/proc/self/cgroup").unwrap();
    // `number:controllers:path`; the unified hierarchy, version 2, has no controllers.
    let candidates = own.lines().filter_map(|line| {
        let mut fields = line.splitn(3, ':').skip(1);
        let (controllers, path) = (fields.next()?, fields.next()?);
        let (root, limit) = match controllers {
            "memory" => ("/sys/fs/cgroup/memory", "memory.limit_in_bytes"),
            "" => ("/sys/fs/cgroup", "memory.max"),
            _ => return None,
        };
        Some([format!("{root}{path}"), root.to_owned()].map(|parent| (PathBuf::from(parent), limit)))
    });
    candidates.flatten().find_map(|(parent, limit)| {
        let group = parent.join(format!("stillframe-templates-{}", std::process::id()));
        std::fs::create_dir(&group).ok()?;
        match std::fs::write(group.join(limit), GROUP_BYTES.to_string()) {
            Ok(()) => {
                // Where there is swap, the group may not use it: not every kernel counts it.
                for (file, bytes) in [("memory.memsw.limit_in_bytes", GROUP_BYTES), ("memory.swap.max", 0)] {
                    let _ = std::fs::write(group.join(file), bytes.to_string());
                }
                Some(group)
            }
            Err(_) => std::fs::remove_dir(&group).ok().and(None),
        }
    })
}

/// Makes instances and writes to each, within the group. Without the environment it is an empty
/// test.
#[test]
fn child_in_a_group() {
    let Ok(group) = std::env::var(CHILD_GROUP) else { return };
    std::fs::write(Path::new(&group).join("cgroup.procs"), std::process::id().to_string()).unwrap();
    let pages: usize = std::env::var(CHILD_PAGES).unwrap().parse().unwrap();
    let store =
        Store::options().wait(Duration::from_secs(60)).open(std::env::var(CHILD_STORE).unwrap()).unwrap();
    let id = store.find("latest").unwrap();
    let template = store.template(id).unwrap();
    let mut instances: Vec<Instance> = (0..INSTANCES).map(|_| template.instance().unwrap()).collect();
    // Meanwhile the child reads more than fits into memory, which forces pages out.
    let other = store.process("other").latest().unwrap();
    let place = |instance: usize, page: usize| (instance * 7 + page * 13) * PAGE_BYTES % IMAGE_BYTES;
    for (number, instance) in instances.iter_mut().enumerate() {
        for page in 0..pages {
            instance[place(number, page)] = u8::try_from(number % 251).unwrap();
        }
        if number % 100 == 0 {
            store.snapshot(other).unwrap().read_image(&mut std::io::sink()).unwrap();
        }
    }
    let memory = memory(IMAGE_BYTES);
    for (number, instance) in instances.iter().enumerate().step_by(97) {
        let mut expected = memory.clone();
        (0..pages).for_each(|page| expected[place(number, page)] = u8::try_from(number % 251).unwrap());
        assert!(instance[..] == expected[..], "instance {number}");
        store.process("p").capture(instance, &child_of(instance)).unwrap();
    }
    println!("all instances are right");
}

#[test]
fn instances_work_under_memory_pressure_and_where_there_is_too_little_only_their_process_is_lost() {
    let Some(group) = control_group() else {
        return passed_over("no control group can be made here");
    };
    let (_dir, store) = new_store(16 * 1024);
    // More than the group's memory, so that reading it evicts what can be evicted.
    store.process("other").capture(&noise(GROUP_BYTES + 32 * MIB, 1), &CaptureOptions::default()).unwrap();
    store.process("p").capture(&memory(IMAGE_BYTES), &CaptureOptions::default()).unwrap();
    let path = store.info().path;
    drop(store);
    let run = |pages: usize| {
        let output = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "templates::child_in_a_group", "--nocapture"])
            .env(CHILD_GROUP, &group)
            .env(CHILD_PAGES, pages.to_string())
            .env(CHILD_STORE, &path)
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        (output.status, format!("{said}\n{}", String::from_utf8_lossy(&output.stderr)))
    };
    let (within, said) = run(4);
    // 800 MB of private pages.
    let (beyond, also_said) = run(400);
    std::fs::remove_dir(&group).unwrap();
    assert!(within.success() && said.contains("all instances are right"), "{within}: {said}");
    assert_eq!(beyond.signal(), Some(libc::SIGKILL), "{beyond}: {also_said}");
    let store = Store::options().wait(Duration::from_secs(60)).open(&path).unwrap();
    assert_eq!(store.process("p").snapshots().len(), 1 + INSTANCES.div_ceil(97));
    let report = store.verify(&VerifyOptions::default()).unwrap();
    assert!(report.problems.is_empty(), "{report:?}");
}
