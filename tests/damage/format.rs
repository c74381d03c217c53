//! FORMAT and LOCK: the format of the store, and its owner.

use std::path::Path;

use stillframe::Store;
use stillframe::codec::Codec;
use stillframe::repair::RepairOptions;
use stillframe::store::StoreError;

use crate::archive::Archive;
use crate::noise::noise;
use crate::vault::change;

/// Asserts that opening, creating and the other calls refuse, and that the error names the remedy.
fn assert_refuses(path: &Path) {
    for error in [Store::open(path).unwrap_err(), Store::options().open_or_create(path).unwrap_err()] {
        assert!(error.is_damage(), "{error}");
        assert!(
            error.to_string().contains("FORMAT") && error.to_string().contains("stillframe repair"),
            "{error}"
        );
    }
    let error = Store::options().create(path).unwrap_err();
    assert!(matches!(error, StoreError::AlreadyAStore { .. }), "{error}");
}

fn assert_repair_brings_it_back(archive: &Archive, before: &[u8]) {
    let path = archive.path.join("FORMAT");
    let damaged = std::fs::read(&path).ok();
    let dry_run = RepairOptions::new().dry_run(true);
    let would = Store::repair(&archive.path, &dry_run).unwrap();
    assert_eq!((would.damaged.len(), would.lost_snapshots.len()), (1, 0), "{would:?}");
    assert_eq!(std::fs::read(&path).ok(), damaged, "a dry run writes nothing");
    let report = Store::repair(&archive.path, &RepairOptions::default()).unwrap();
    assert_eq!((report.damaged.len(), report.lost_snapshots.len()), (1, 0), "{report:?}");
    assert!(std::fs::read(&path).unwrap() == before);
    assert_eq!(std::fs::read(archive.path.join("damaged/FORMAT")).ok(), damaged);
    let told = std::fs::read_to_string(report.report.unwrap()).unwrap();
    assert!(told.contains("FORMAT") && told.contains("rewritten from the packs"), "{told}");
    archive.assert_sound(&Store::open(&archive.path).unwrap());
}

#[test]
fn a_damaged_format_file_is_refused_and_written_anew_by_repair() {
    let before = std::fs::read(Archive::copy().path.join("FORMAT")).unwrap();
    type Damage = Box<dyn Fn(&mut Vec<u8>)>;
    let mut damages: Vec<(String, Damage)> = Vec::new();
    for at in 0..before.len() {
        let flip = move |bytes: &mut Vec<u8>| bytes[at] ^= 1 << (at % 7);
        damages.push((format!("a bit of byte {at} flipped"), Box::new(flip)));
    }
    for length in [0, 1, 30, before.len() / 2, before.len() - 1] {
        damages.push((format!("cut to {length} bytes"), Box::new(move |bytes| bytes.truncate(length))));
    }
    damages.push(("zeroed".to_owned(), Box::new(|bytes| bytes.fill(0))));
    damages.push(("noise".to_owned(), Box::new(|bytes| *bytes = noise(bytes.len(), 31))));
    damages.push(("longer than any".to_owned(), Box::new(|bytes| bytes.resize(1 << 20, b'x'))));
    let archive = Archive::copy();
    let file = archive.path.join("FORMAT");
    for (number, (what, damage)) in damages.iter().enumerate() {
        println!("{what}");
        std::fs::write(&file, &before).unwrap();
        change(&file, |bytes| damage(bytes));
        assert_refuses(&archive.path);
        // A tenth of the damaged files is repaired too, and all that follow the single bits.
        if number % 10 == 0 || number >= before.len() {
            let archive = Archive::copy();
            change(&archive.path.join("FORMAT"), |bytes| damage(bytes));
            assert_repair_brings_it_back(&archive, &before);
        }
    }
}

#[test]
fn a_missing_format_file_is_no_invitation_to_make_another_store() {
    let archive = Archive::copy();
    let file = archive.path.join("FORMAT");
    let before = std::fs::read(&file).unwrap();
    std::fs::remove_file(&file).unwrap();
    assert_refuses(&archive.path);
    assert_repair_brings_it_back(&archive, &before);
}

#[test]
fn the_format_file_of_another_store_does_not_make_all_packs_foreign() {
    let other = tempfile::tempdir().unwrap();
    drop(Store::options().create(other.path().join("store")).unwrap());
    let archive = Archive::copy();
    let before = std::fs::read(archive.path.join("FORMAT")).unwrap();
    std::fs::copy(other.path().join("store/FORMAT"), archive.path.join("FORMAT")).unwrap();
    assert_refuses(&archive.path);
    assert_repair_brings_it_back(&archive, &before);
}

#[test]
fn what_is_left_of_the_format_file_still_tells_the_codec() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("store");
    let store = Store::options().codec(Codec::None).create(&path).unwrap();
    store.process("p").capture(&noise(9000, 32), &Default::default()).unwrap();
    drop(store);
    change(&path.join("FORMAT"), |bytes| *bytes.last_mut().unwrap() = b'x');
    Store::repair(&path, &RepairOptions::default()).unwrap();
    assert_eq!(Store::open(&path).unwrap().info().codec, Codec::None);
}

#[test]
fn without_format_and_packs_there_is_no_store_and_nothing_to_repair() {
    let archive = Archive::copy();
    std::fs::remove_file(archive.path.join("FORMAT")).unwrap();
    std::fs::remove_dir_all(archive.path.join("packs")).unwrap();
    let error = Store::repair(&archive.path, &RepairOptions::default()).unwrap_err().to_string();
    assert!(error.contains("is not a stillframe store"), "{error}");
    let empty = tempfile::tempdir().unwrap();
    assert!(Store::repair(empty.path(), &RepairOptions::default()).is_err());
    assert_eq!(std::fs::read_dir(empty.path()).unwrap().count(), 0, "nothing is left in what is no store");
}

#[test]
fn a_format_file_that_no_pack_can_bring_back_is_said_to_be_lost() {
    let archive = Archive::copy();
    change(&archive.path.join("FORMAT"), |bytes| bytes.truncate(30));
    for pack in [0, 1] {
        change(&archive.pack(pack), |bytes| bytes[20] ^= 1);
    }
    let error = Store::repair(&archive.path, &RepairOptions::default()).unwrap_err().to_string();
    assert!(
        error.contains("no pack has a header in order") && error.contains("replace it by a copy"),
        "{error}"
    );
}

#[test]
fn whatever_is_in_the_lock_file_is_harmless() {
    let contents: [Option<Vec<u8>>; 6] = [
        None,
        Some(vec![]),
        Some(vec![0; 5]),
        Some(b"4294967295\n".to_vec()),
        Some(b"1\n".to_vec()),
        Some(noise(9999, 33)),
    ];
    for content in contents {
        let archive = Archive::copy();
        let lock = archive.path.join("LOCK");
        match content {
            None => std::fs::remove_file(&lock).unwrap(),
            Some(bytes) => std::fs::write(&lock, bytes).unwrap(),
        }
        archive.assert_sound(&Store::open(&archive.path).unwrap());
        assert_eq!(std::fs::read_to_string(&lock).unwrap().trim(), std::process::id().to_string());
    }
}
