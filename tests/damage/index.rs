//! The index: any damage to it costs at most a rebuild.

use std::path::Path;

use stillframe::repair::RepairOptions;
use stillframe::{CaptureOptions, Error, GcOptions, RegionSize, Store};

use crate::archive::Archive;
use crate::noise::noise;
use crate::objects::KINDS;
use crate::vault::*;

type FileDamage = fn(&Path);

/// The ways to damage a file of the index.
const INDEX_KINDS: [(&str, FileDamage); 7] = [
    ("removed", |file| std::fs::remove_file(file).unwrap()),
    ("emptied", |file| std::fs::write(file, []).unwrap()),
    ("cut in half", |file| change(file, |bytes| bytes.truncate(bytes.len() / 2))),
    ("cut by a byte", |file| change(file, |bytes| bytes.truncate(bytes.len().saturating_sub(1)))),
    ("zeroed", |file| change(file, |bytes| bytes.fill(0))),
    ("zeroed from the middle on", |file| {
        change(file, |bytes| {
            let half = bytes.len() / 2;
            bytes[half..].fill(0)
        })
    }),
    ("noise", |file| change(file, |bytes| *bytes = noise(bytes.len(), 11))),
];

/// Asserts that the store is complete and works.
fn assert_costs_a_rebuild_at_most(vault: &Vault) {
    for _ in 0..2 {
        let store = vault.open();
        assert_eq!(store.snapshots().len(), NAMES.len());
        vault.assert_whole(&store);
        assert!(is_unknown(&store, vault.forgotten));
        assert_eq!(*store.snapshot(vault.ids["c1"]).unwrap().labels(), options("c1").labels);
        assert_eq!(verify(&store).problems, []);
    }
    let store = vault.open();
    let id = store.process("e").capture(&noise(30_000, 12), &CaptureOptions::default()).unwrap().id;
    store.gc(&GcOptions::new().max_unused_percent(0)).unwrap();
    vault.assert_whole(&store);
    assert!(read(&store, id).unwrap().0 == noise(30_000, 12));
    assert_eq!(verify(&store).problems, []);
}

#[test]
fn a_damaged_file_of_the_index_costs_a_rebuild_at_most() {
    let count = files_in(&Vault::copy().path.join("index")).len();
    for at in 0..count {
        for (how, damage) in INDEX_KINDS {
            let vault = Vault::copy();
            let file = files_in(&vault.path.join("index"))[at].clone();
            println!("{} {how}", file.strip_prefix(&vault.path).unwrap().display());
            damage(&file);
            assert_costs_a_rebuild_at_most(&vault);
        }
    }
}

#[test]
fn a_flipped_bit_anywhere_in_the_index_costs_a_rebuild_at_most() {
    let used = |file: &Path| std::fs::read(file).unwrap().iter().rposition(|byte| *byte != 0).unwrap_or(0);
    let files: Vec<usize> =
        files_in(&Vault::copy().path.join("index")).iter().map(|file| used(file)).collect();
    for (number, used_bytes) in files.into_iter().enumerate() {
        for step in 0..20usize {
            let vault = Vault::copy();
            let file = files_in(&vault.path.join("index"))[number].clone();
            let at = (used_bytes * step / 20 + step % 7).min(used_bytes);
            println!("{} byte {at} of {used_bytes}", file.strip_prefix(&vault.path).unwrap().display());
            change(&file, |bytes| bytes[at] ^= 1 << (step % 8));
            assert_costs_a_rebuild_at_most(&vault);
        }
    }
}

#[test]
fn an_index_that_is_missing_or_something_else_costs_a_rebuild() {
    let things: [(&str, FileDamage); 4] = [
        ("nothing", |_| {}),
        ("an empty directory", |index| std::fs::create_dir(index).unwrap()),
        ("a file", |index| std::fs::write(index, "not an index").unwrap()),
        ("a directory of other files", |index| {
            std::fs::create_dir(index).unwrap();
            std::fs::write(index.join("db"), "not an index").unwrap();
        }),
    ];
    for (what, make) in things {
        println!("{what}");
        let vault = Vault::copy();
        vault.lose_the_index();
        make(&vault.path.join("index"));
        assert_costs_a_rebuild_at_most(&vault);
    }
}

#[test]
fn an_index_of_an_older_moment_costs_a_rebuild_at_most() {
    let gc = GcOptions::new().max_unused_percent(0);
    type Since = fn(&Store, &GcOptions);
    let since: [(&str, Since); 4] = [
        ("a snapshot", |store, _| heal(store, &["b1"])),
        ("labels", |store, _| {
            let id = store.find("a@latest").unwrap();
            store.set_label(id, "k", "v").unwrap();
        }),
        ("a forgotten snapshot", |store, _| {
            let id = store.process("e").capture(&noise(9_000, 13), &CaptureOptions::default()).unwrap().id;
            store.forget(&[id]).unwrap();
        }),
        ("a gc that moved everything", |store, gc| {
            store.gc(gc).unwrap();
            capture(store, "c1");
        }),
    ];
    for (what, happened) in since {
        println!("{what}");
        let vault = Vault::copy();
        let older = vault.path.with_extension("older");
        copy(&vault.path.join("index"), &older);
        let store = vault.open();
        happened(&store, &gc);
        let listed: Vec<_> =
            store.snapshots().iter().map(|snapshot| (snapshot.id(), snapshot.labels().clone())).collect();
        drop(store);
        vault.lose_the_index();
        copy(&older, &vault.path.join("index"));
        let store = vault.open();
        let found: Vec<_> =
            store.snapshots().iter().map(|snapshot| (snapshot.id(), snapshot.labels().clone())).collect();
        assert_eq!(found, listed);
        vault.assert_whole(&store);
        assert_eq!(verify(&store).problems, []);
    }
}

/// Such an index may hold positions in packs that gc has removed, and nothing in it shows that.
#[test]
fn an_index_that_does_not_know_a_pack_which_gc_wrote_is_rebuilt() {
    let dir = tempfile::tempdir().unwrap();
    let (path, older) = (dir.path().join("store"), dir.path().join("older"));
    drop(Store::options().create(&path).unwrap());
    copy(&path.join("index"), &older);
    let store = Store::open(&path).unwrap();
    let plain = CaptureOptions::default();
    let kept = store.process("p").capture(&noise(50_000, 1), &plain).unwrap().id;
    let forgotten = store.process("q").capture(&noise(50_000, 2), &plain).unwrap().id;
    store.forget(&[forgotten]).unwrap();
    store.gc(&GcOptions::new().max_unused_percent(0)).unwrap();
    drop(store);
    std::fs::remove_dir_all(path.join("index")).unwrap();
    copy(&older, &path.join("index"));
    let dry_run = RepairOptions::new().dry_run(true);
    assert!(Store::repair(&path, &dry_run).unwrap().index_rebuilt);
    assert!(!Store::repair(&path, &dry_run).unwrap().index_rebuilt);
    assert!(read(&Store::open(&path).unwrap(), kept).unwrap().0 == noise(50_000, 1));
}

#[test]
fn what_was_committed_last_is_there_whether_the_store_was_closed_or_killed() {
    let vault = Vault::copy();
    for closed in [true, false] {
        let before = vault.path.with_extension("before");
        copy(&vault.path.join("index"), &before);
        let store = vault.open();
        let id = store.process("e").capture(&noise(30_000, 14), &CaptureOptions::default()).unwrap().id;
        store.set_label(id, "k", "v").unwrap();
        drop(store);
        if !closed {
            vault.lose_the_index();
            copy(&before, &vault.path.join("index"));
        }
        std::fs::remove_dir_all(&before).unwrap();
        let store = vault.open();
        assert!(read(&store, id).unwrap().0 == noise(30_000, 14));
        assert_eq!(store.snapshot(id).unwrap().labels().len(), 1);
        vault.assert_whole(&store);
        let again = store.process("f").capture(&noise(30_000, 14), &CaptureOptions::default()).unwrap();
        assert_eq!(again.new_regions, 0, "all of it is found again");
        store.forget(&[id, again.id]).unwrap();
        drop(store);
        assert!(is_unknown(&vault.open(), id));
        let gc = GcOptions::new().max_unused_percent(0);
        assert!(vault.open().gc(&gc).unwrap().dead_regions > 0);
        vault.assert_whole(&vault.open());
    }
}

#[test]
fn damage_to_what_was_committed_last_is_no_torn_tail_after_a_clean_close() {
    for (how, damage) in KINDS {
        println!("{how}");
        let vault = Vault::copy();
        let store = vault.open();
        let id = store.process("e").capture(&noise(9_000, 15), &CaptureOptions::default()).unwrap().id;
        drop(store);
        let length = std::fs::metadata(vault.pack()).unwrap().len();
        let record = objects(&std::fs::read(vault.pack()).unwrap()).into_iter().find(|it| it.hash == id.0);
        vault.change_pack(|bytes| damage(bytes, &record.unwrap()));
        for _ in 0..2 {
            let store = vault.open();
            assert_eq!(std::fs::metadata(vault.pack()).unwrap().len(), length, "nothing is cut");
            assert!(is_unknown(&store, id));
            vault.assert_whole(&store);
            assert_eq!(verify(&store).problems.len(), 1);
        }
    }
}

#[test]
fn what_verify_took_out_of_the_index_is_healed_by_another_process() {
    let vault = Vault::copy();
    let store = vault.open();
    let memory = noise(30_000, 16);
    let id = store.process("e").capture(&memory, &CaptureOptions::default()).unwrap().id;
    let damaged = store.snapshot(id).unwrap().regions().unwrap().next().unwrap().unwrap().1;
    let object =
        objects(&std::fs::read(vault.pack()).unwrap()).into_iter().find(|it| it.hash == damaged).unwrap();
    // The damage happens while the store is open and the region is cached.
    let pack = std::fs::File::options().read(true).write(true).open(vault.pack()).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&pack, &[0xAA; 3], object.payload as u64 + 5).unwrap();
    assert_eq!(verify(&store).problems.len(), 1);
    drop(store);
    let store = vault.open();
    let healing = store.process("e").capture(&memory, &CaptureOptions::default()).unwrap();
    assert_eq!(healing.new_regions, 1);
    assert!(read(&store, id).unwrap().0 == memory);
}

#[test]
fn damage_in_a_pack_before_the_last_is_no_torn_tail_and_nothing_is_cut_there() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("store");
    drop(Store::options().region_size(RegionSize::new(65536).unwrap()).create(&path).unwrap());
    let older = dir.path().join("older");
    copy(&path.join("index"), &older);
    // More than fits into one pack: the record is in the second.
    let memory = noise(270 << 20, 21);
    let store = Store::open(&path).unwrap();
    let id = store.process("p").capture(&memory, &CaptureOptions::default()).unwrap().id;
    drop(store);
    // As if the program had been killed before it indexed anything.
    std::fs::remove_dir_all(path.join("index")).unwrap();
    copy(&older, &path.join("index"));
    let first = path.join("packs/00000001.pack");
    let length = std::fs::metadata(&first).unwrap().len();
    let file = std::fs::File::options().write(true).open(&first).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &[0xAA; 3], 10_000_000).unwrap();
    let store = Store::open(&path).unwrap();
    assert_eq!(std::fs::metadata(&first).unwrap().len(), length);
    assert!(
        matches!(store.restore(id).unwrap().into_mapping(), Err(Error::Store(error)) if error.is_damage())
    );
    store.process("p").capture(&memory, &CaptureOptions::default()).unwrap();
    assert!(store.restore(id).unwrap().into_mapping().unwrap()[..] == memory[..], "healed");
}

// ---- Older versions of the files of the table's store ------------------------------------------

#[test]
fn an_older_version_of_any_file_of_the_index_costs_a_rebuild_at_most() {
    let count = files_in(&Archive::copy().index()).len();
    for at in 0..=count {
        let archive = Archive::copy();
        let files = files_in(&archive.index());
        match files.get(at) {
            Some(file) => {
                let earlier = archive.earlier_index.join(file.strip_prefix(archive.index()).unwrap());
                println!("{}", file.display());
                match earlier.exists() {
                    true => drop(std::fs::copy(earlier, file).unwrap()),
                    false => std::fs::remove_file(file).unwrap(),
                }
            }
            None => {
                archive.lose_the_index();
                copy(&archive.earlier_index, &archive.index());
            }
        }
        archive.assert_sound(&Store::open(&archive.path).unwrap());
        archive.assert_sound(&Store::open(&archive.path).unwrap());
    }
}

/// A store with one pack, which gc removes because nothing in it is needed: the next pack has the
/// same number.
#[test]
fn an_index_from_before_a_pack_number_came_back_is_not_believed() {
    let dir = tempfile::tempdir().unwrap();
    let (path, older) = (dir.path().join("store"), dir.path().join("older"));
    let store = Store::options().create(&path).unwrap();
    let plain = CaptureOptions::default();
    let forgotten = store.process("p").capture(&noise(50_000, 41), &plain).unwrap().id;
    drop(store);
    std::fs::remove_dir_all(path.join("index")).unwrap();
    // A rebuild saves the index.
    let store = Store::open(&path).unwrap();
    copy(&path.join("index"), &older);
    store.forget(&[forgotten]).unwrap();
    while !files_in(&path.join("packs")).is_empty() {
        // The second gc removes the tombstone.
        store.gc(&GcOptions::new().max_unused_percent(0)).unwrap();
    }
    drop(store);
    let store = Store::open(&path).unwrap();
    let kept = store.process("q").capture(&noise(90_000, 42), &plain).unwrap().id;
    drop(store);
    let packs: Vec<_> = files_in(&path.join("packs"));
    assert!(packs[0].ends_with("00000001.pack"), "the number came back");
    std::fs::remove_dir_all(path.join("index")).unwrap();
    copy(&older, &path.join("index"));
    let store = Store::open(&path).unwrap();
    assert!(read(&store, kept).unwrap().0 == noise(90_000, 42));
    assert!(is_unknown(&store, forgotten));
    assert_eq!(verify(&store).problems, []);
}

/// An index whose rebuild was interrupted does not know what was acknowledged.
#[test]
fn an_interrupted_rebuild_does_not_take_a_damaged_last_record_for_a_torn_tail() {
    let vault = Vault::copy();
    let object = *objects(&std::fs::read(vault.pack()).unwrap()).last().unwrap();
    vault.change_pack(|bytes| bytes[object.payload] ^= 1);
    vault.lose_the_index();
    let length = std::fs::metadata(vault.pack()).unwrap().len();
    let cancel = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(true));
    let progress = stillframe::Progress::new().cancel_when(cancel);
    let options = RepairOptions::new().progress(progress);
    assert!(matches!(Store::repair(&vault.path, &options), Err(Error::Interrupted)));
    let store = vault.open();
    assert_eq!(std::fs::metadata(vault.pack()).unwrap().len(), length, "nothing is cut");
    assert_eq!(verify(&store).problems.len(), 1);
}
