#![no_main]

use std::sync::LazyLock;

/// One directory for the whole run: each input overwrites the file in it.
static DIR: LazyLock<tempfile::TempDir> = LazyLock::new(|| tempfile::tempdir().expect("a temporary directory"));

libfuzzer_sys::fuzz_target!(|data: &[u8]| stillframe::fuzzing::elf(data, DIR.path()));
