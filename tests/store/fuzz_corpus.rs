//! Replays the inputs of the fuzz targets, their corpora and every input that ever caused a
//! failure, through the same functions. So every test run tries them, and not only fuzzing.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use stillframe::fuzzing;

type Target = fn(&[u8]);

const TARGETS: [(&str, Target); 9] = [
    ("codec", fuzzing::codec),
    ("delta", fuzzing::delta),
    ("elf", |data| fuzzing::elf(data, tempfile::tempdir().unwrap().path())),
    ("index", fuzzing::index),
    ("maps", fuzzing::maps),
    ("pack", fuzzing::pack),
    ("record", fuzzing::record),
    ("store", |data| fuzzing::store(data, tempfile::tempdir().unwrap().path())),
    ("table", fuzzing::table),
];

/// A corpus must stay small: developers read what is replayed here.
const MAX_FILE_BYTES: u64 = 4 << 10;

fn fuzz_dir() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz")
}

fn files(dir: &Path) -> Vec<PathBuf> {
    let mut files: Vec<PathBuf> = dir.read_dir().unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    files
}

#[test]
fn every_target_takes_all_of_its_corpus() {
    for (name, target) in TARGETS {
        let files = files(&fuzz_dir().join("corpus").join(name));
        assert!(files.len() >= 10, "{name} has {} files", files.len());
        for file in files {
            let data = std::fs::read(&file).unwrap();
            assert!(data.len() as u64 <= MAX_FILE_BYTES, "{} is too long", file.display());
            // A panic message names no file.
            println!("{}", file.display());
            target(&data);
        }
    }
}

#[test]
fn every_target_is_replayed() {
    let stems = files(&fuzz_dir().join("fuzz_targets")).into_iter().map(|path| {
        let stem = path.file_stem().unwrap().to_owned();
        stem.into_string().unwrap()
    });
    let replayed: BTreeSet<String> = TARGETS.iter().map(|(name, _)| (*name).to_owned()).collect();
    assert_eq!(stems.collect::<BTreeSet<_>>(), replayed);
}
