//! A restore returns the captured memory.

use stillframe::ranges::Ranges;
use stillframe::source::{Frozen, OneMemory, Source, SourceError};
use stillframe::store::{ObjectKind, StoreError};
use stillframe::{AddressRange, CaptureOptions, CaptureStats, Error, RegionSize, Store};

/// Bytes that look like memory: runs of zeros, text, small integers, noise.
fn memory(length: usize, seed: u64) -> Vec<u8> {
    let mut state = seed | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    let mut bytes = Vec::with_capacity(length + 8192);
    while bytes.len() < length {
        let run = (next() % 8192) as usize;
        match next() % 4 {
            0 => bytes.resize(bytes.len() + 4 * run, 0),
            1 => bytes.extend(std::iter::repeat_n(*b"stillframe ", run / 11 + 1).flatten()),
            2 => (0..run / 8).for_each(|at| bytes.extend((at as u64 + next() % 100).to_le_bytes())),
            _ => (0..run / 8).for_each(|_| bytes.extend(next().to_le_bytes())),
        }
    }
    bytes.truncate(length);
    bytes
}

fn capture(store: &Store, process: &str, memory: &[u8]) -> CaptureStats {
    store.process(process).capture(memory, &CaptureOptions::default()).unwrap()
}

#[test]
fn memory_of_any_length_comes_back_from_every_sink() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::options().create(dir.path().join("store")).unwrap();
    for length in [1, 511, 16384, 16385, 1 << 20, (9 << 20) + 12345] {
        let memory = memory(length, length as u64);
        let id = capture(&store, &format!("p{length}"), &memory).id;
        assert!(store.restore(id).unwrap().into_mapping().unwrap()[..] == memory[..], "{length}");
        let mut slice = vec![0xEE; length];
        store.restore(id).unwrap().into_slice(&mut slice).unwrap();
        assert!(slice == memory, "{length}");
        let path = dir.path().join(format!("image-{length}"));
        store.restore(id).unwrap().into_file(&path).unwrap();
        assert!(std::fs::read(&path).unwrap() == memory, "{length}");
    }
}

#[test]
fn every_region_size_and_history_comes_back_after_a_reopening() {
    for region_bytes in [512, 4096, 16384, 65536] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("store");
        let size = RegionSize::new(region_bytes).unwrap();
        let store = Store::options().region_size(size).create(&path).unwrap();
        let mut memory = memory(3_000_000, 7);
        let mut history = Vec::new();
        for step in 0..10 {
            for at in (step * 1000..memory.len()).step_by(600_000) {
                memory[at] ^= 0x55;
            }
            history.push((capture(&store, "p", &memory).id, memory.clone()));
        }
        drop(store);
        let store = Store::open(&path).unwrap();
        for (id, memory) in history {
            assert!(store.restore(id).unwrap().into_mapping().unwrap()[..] == memory[..]);
        }
    }
}

#[test]
fn what_did_not_change_costs_a_record_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::options().create(dir.path().join("store")).unwrap();
    let memory = memory(20 << 20, 3);
    let first = capture(&store, "p", &memory);
    assert!(first.new_regions > 0 && first.parent.is_none());
    let second = capture(&store, "p", &memory);
    assert_eq!(second.parent, Some(first.id));
    assert_eq!((second.changed_regions, second.new_regions), (0, 0));
    assert!(second.added_bytes < 500, "{}", second.added_bytes);
    assert_eq!(second.memory_bytes, 20 << 20);
    assert_eq!(second.zero_bytes, first.zero_bytes);
}

#[test]
fn equal_regions_are_stored_once_across_addresses_and_processes() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::options().create(dir.path().join("store")).unwrap();
    let memory = memory(4 << 20, 11);
    let first = capture(&store, "a", &memory);
    let other = capture(&store, "b", &memory);
    assert_eq!((other.new_regions, other.parent), (0, None));
    assert_eq!(other.changed_regions, other.shared_regions);
    // The same bytes, eight regions further up, and twice.
    let twice = [&vec![0; 8 * 16384][..], &memory, &memory].concat();
    let twice = capture(&store, "c", &twice);
    assert_eq!(twice.new_regions, 0);
    assert_eq!(twice.changed_regions, 2 * first.changed_regions);
}

#[test]
fn excluded_ranges_come_back_as_zeros_and_are_on_record() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::options().create(dir.path().join("store")).unwrap();
    let mut memory = memory(3 << 20, 5);
    let exclude = vec![AddressRange::new(10, 100_000).unwrap(), AddressRange::new(2 << 20, 5 << 20).unwrap()];
    let options = CaptureOptions::new().exclude(exclude.clone());
    let id = store.process("p").capture(&memory, &options).unwrap().id;
    memory[10..100_000].fill(0);
    memory[2 << 20..].fill(0);
    let restore = store.restore(id).unwrap();
    assert_eq!(restore.address_space().excluded(), exclude);
    assert!(restore.into_mapping().unwrap()[..] == memory[..]);
}

#[test]
fn many_threads_capture_at_once_and_one_process_never_forks() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::options().create(dir.path().join("store")).unwrap();
    std::thread::scope(|scope| {
        for thread in 0..8u64 {
            let store = &store;
            scope.spawn(move || {
                let own = memory(1 << 20, thread);
                for step in 0..5u8 {
                    capture(store, &format!("own-{thread}"), &own);
                    capture(store, "shared", &vec![step; 100_000 + thread as usize]);
                }
            });
        }
    });
    let line = store.process("shared").snapshots();
    assert_eq!(line.len(), 40);
    for thread in 0..8u64 {
        let id = store.process(format!("own-{thread}")).latest().unwrap();
        assert!(store.restore(id).unwrap().into_mapping().unwrap()[..] == memory(1 << 20, thread)[..]);
    }
}

/// This many bytes of zeros, as a sparse file may have them.
struct Sparse(u64);

impl Source for Sparse {
    fn open(&self) -> Result<Box<dyn Frozen + '_>, SourceError> {
        Ok(self.frozen())
    }
}

impl OneMemory for Sparse {
    fn length_bytes(&self) -> u64 {
        self.0
    }

    fn copy_out(&self, _offset_bytes: u64, buffer: &mut [u8]) -> Result<(), SourceError> {
        buffer.fill(0);
        Ok(())
    }

    fn populated(&self) -> Result<Ranges, SourceError> {
        Ok(Ranges::new())
    }
}

#[test]
fn memory_of_more_tables_than_a_root_can_have_is_refused_before_anything_is_allocated_for_them() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::options().create(dir.path().join("store")).unwrap();
    let capture =
        |length_bytes| store.process("sparse").capture(&Sparse(length_bytes), &CaptureOptions::default());
    assert_eq!(capture(1 << 40).unwrap().zero_bytes, 1 << 40);
    for length_bytes in [1 << 62, u64::MAX] {
        match capture(length_bytes) {
            Err(Error::Store(StoreError::TooLarge { kind: ObjectKind::Root, .. })) => {}
            other => panic!("{other:?}"),
        }
    }
}
