//! The journal on its own, entry by entry, without an engine.

// Helpers of a test may panic, as the test itself may.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::time::SystemTime;

use common::Vault;
use stillframe::CaptureOptions;
use stillframe_wasmer::{Error, Resume, StoreJournal, export, import};
use wasmer_wasix::journal::{
    DynReadableJournal, Journal, JournalEntry, ReadableJournal, SnapshotTrigger, WritableJournal,
};
use wasmer_wasix::wasmer_wasix_types::wasix::{ThreadStartType, WasiMemoryLayout};

fn module() -> JournalEntry<'static> {
    JournalEntry::InitModuleV1 { wasm_hash: vec![7; 32].into() }
}

fn thread(id: u32, start: ThreadStartType, stack: u8) -> JournalEntry<'static> {
    JournalEntry::SetThreadV1 {
        id,
        call_stack: vec![stack; 100].into(),
        memory_stack: vec![stack; 50].into(),
        store_data: vec![stack; 10].into(),
        start,
        layout: WasiMemoryLayout {
            stack_upper: 100,
            stack_lower: 0,
            guard_size: 0,
            stack_size: 100,
            tls_base: None,
        },
        is_64bit: false,
    }
}

fn main_thread(stack: u8) -> JournalEntry<'static> {
    thread(1, ThreadStartType::MainThread, stack)
}

fn other_thread(id: u32, stack: u8) -> JournalEntry<'static> {
    thread(id, ThreadStartType::ThreadSpawn { start_ptr: 64 }, stack)
}

fn memory(start: u64, bytes: &[u8]) -> JournalEntry<'static> {
    let compressed_data = lz4_flex::compress_prepend_size(bytes).into();
    JournalEntry::UpdateMemoryRegionV1 { region: start..start + bytes.len() as u64, compressed_data }
}

fn mark() -> JournalEntry<'static> {
    JournalEntry::SnapshotV1 { when: SystemTime::now(), trigger: SnapshotTrigger::Explicit }
}

fn write(journal: &impl WritableJournal, entries: impl IntoIterator<Item = JournalEntry<'static>>) {
    entries.into_iter().for_each(|entry| journal.write(entry).map(|_| ()).unwrap());
}

fn read(journal: &DynReadableJournal) -> Vec<JournalEntry<'static>> {
    // All records are read before the first is used: a record stays valid after the next read.
    let records: Vec<_> = std::iter::from_fn(|| journal.read().unwrap()).collect();
    records.into_iter().map(|record| record.into_inner().into_owned()).collect()
}

/// The memory that a replay produces: its length as Wasmer would grow it, and its bytes.
fn memory_of(entries: &[JournalEntry<'static>]) -> (u64, Vec<u8>) {
    let (mut grown, mut bytes) = (0, Vec::new());
    for entry in entries {
        if let JournalEntry::UpdateMemoryRegionV1 { region, compressed_data } = entry {
            let piece = lz4_flex::decompress_size_prepended(compressed_data).unwrap();
            assert!(piece.len() <= 64 << 10);
            grown = grown.max(region.end + piece.len() as u64);
            let start = usize::try_from(region.start).unwrap();
            assert_eq!(start, bytes.len(), "each byte comes once, in order");
            bytes.extend(piece);
        }
    }
    (grown, bytes)
}

#[test]
fn a_snapshot_is_read_as_module_threads_memory_and_mark_each_once() {
    let vault = Vault::new();
    let journal = vault.journal("web-1", Resume::Latest);
    let mut plain = vec![0; 3 << 16];
    plain[70_000..70_100].fill(9);
    write(
        &*journal,
        [module(), other_thread(2, 1), other_thread(3, 1), main_thread(1), memory(0, &plain), mark()],
    );
    // Partial overwrites that are aligned to no region and no cell. A thread is set, closed and set
    // again.
    plain[69_999..70_050].fill(4);
    plain[131_000..131_500].fill(5);
    let changed = [memory(69_999, &[3; 51]), memory(69_999, &[4; 51]), memory(131_000, &[5; 500])];
    write(&*journal, changed);
    let ends = JournalEntry::CloseThreadV1 { id: 3, exit_code: None };
    write(&*journal, [ends, other_thread(2, 2), main_thread(1), main_thread(2), mark()]);
    write(&*journal, [JournalEntry::CloseThreadV1 { id: 1, exit_code: None }]);
    write(&*journal, [JournalEntry::ProcessExitV1 { exit_code: None }]);
    let taken = vault.snapshots("web-1");
    assert_eq!(taken.len(), 2);

    let journal = StoreJournal::open(&vault.store, "web-1", Resume::Latest).unwrap();
    let entries = read(&journal);
    assert_eq!(memory_of(&entries), (plain.len() as u64, plain.clone()));
    let others: Vec<_> = entries
        .iter()
        .filter(|it| !matches!(it, JournalEntry::UpdateMemoryRegionV1 { .. }))
        .cloned()
        .collect();
    assert_eq!(others[..3], [module(), main_thread(2), other_thread(2, 2)]);
    assert!(matches!(others[3..], [JournalEntry::SnapshotV1 { .. }]));
    assert!(matches!(entries.last(), Some(JournalEntry::SnapshotV1 { .. })));

    // A journal that was read to its end returns nothing more. From the start, or through its
    // reading half, it returns the same entries again.
    assert!(journal.read().unwrap().is_none());
    assert_eq!(read(&*journal.as_restarted().unwrap()), entries);
    let (writer, reader) = StoreJournal::open(&vault.store, "web-1", Resume::At(taken[1])).unwrap().split();
    assert_eq!(read(&*reader), entries);
    writer.write(JournalEntry::ClearEtherealV1).unwrap();
    writer.write(main_thread(3)).unwrap();
    // The memory grew.
    writer.write(memory(plain.len() as u64, &[6; 1 << 16])).unwrap();
    writer.write(mark()).unwrap();
    writer.flush().unwrap();
    plain.extend([6; 1 << 16]);
    let latest = StoreJournal::open(&vault.store, "web-1", Resume::Latest).unwrap();
    let entries = read(&latest);
    assert_eq!(memory_of(&entries), (plain.len() as u64, plain));
    assert!(!entries.contains(&other_thread(2, 2)), "the next life has only what it set itself");
}

#[test]
fn a_mark_without_what_it_takes_to_resume_is_refused_and_harms_nothing() {
    let vault = Vault::new();
    let journal = vault.journal("web-1", Resume::Latest);
    let refused = |missing: &str| {
        assert!(journal.write(mark()).is_err());
        assert!(
            matches!(journal.take_error(), Some(Error::Incomplete { missing: it }) if it.contains(missing))
        );
        assert!(journal.take_error().is_none());
        assert!(vault.snapshots("web-1").is_empty());
    };
    refused("module");
    write(&*journal, [module(), other_thread(2, 1)]);
    refused("main thread");
    write(&*journal, [main_thread(1)]);
    refused("memory");
    let wrong = JournalEntry::UpdateMemoryRegionV1 { region: 0..512, compressed_data: vec![9; 20].into() };
    assert!(journal.write(wrong).is_err());
    assert!(matches!(journal.take_error(), Some(Error::Extent { .. })));
    write(&*journal, [memory(0, &[1; 65536]), mark()]);
    assert_eq!(vault.snapshots("web-1").len(), 1);
}

#[test]
fn a_snapshot_of_something_else_is_not_resumed() {
    let vault = Vault::new();
    let taken = vault.store.process("vm-7").capture(&[7; 1000], &CaptureOptions::default()).unwrap();
    let error = StoreJournal::open(&vault.store, "vm-7", Resume::Latest).unwrap_err();
    assert!(matches!(error, Error::NotOfAJournal { id } if id == taken.id), "{error}");
    let path = vault.dir.path().join("vm-7.journal");
    assert!(matches!(export(&vault.store, taken.id, &path), Err(Error::NotOfAJournal { .. })));
    assert!(!path.exists());
    assert!(matches!(import(&vault.store, "vm-7", &path), Err(Error::File { .. })));
    assert!(matches!(import(&vault.store, "vm-7", vault.dir.path()), Err(Error::File { .. })));
}
