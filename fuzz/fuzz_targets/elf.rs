#![no_main]

use std::sync::LazyLock;

/// One for the whole run: the file in it is written anew each time.
static DIR: LazyLock<tempfile::TempDir> = LazyLock::new(|| tempfile::tempdir().expect("a temporary directory"));

libfuzzer_sys::fuzz_target!(|data: &[u8]| stillframe::fuzzing::elf(data, DIR.path()));
