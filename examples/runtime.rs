//! A starting point for the author of a runtime: a small machine whose memory is captured after
//! every step, and restored to any of these snapshots.
//!
//! `cargo run --release --example runtime`

use stillframe::record::Trigger;
use stillframe::{CaptureOptions, GcOptions, Store};

/// The machine to capture: here a counter in 64 MiB of memory; in a runtime, an instance.
struct Machine {
    memory: Vec<u8>,
}

impl Machine {
    fn step(&mut self, number: u64) {
        self.memory[..8].copy_from_slice(&number.to_le_bytes());
        let at = 4096 + usize::try_from(number).unwrap_or(0) * 100_000;
        self.memory[at..at + 1000].fill(0x55);
    }

    fn counter(&self) -> u64 {
        self.memory.first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes))
    }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let dir = tempfile::tempdir()?;
    let store = Store::options().create(dir.path().join("vault"))?;
    let mut machine = Machine { memory: vec![0; 64 << 20] };

    // A snapshot after every step. The cost of each depends on what the step changed.
    let process = store.process("machine-1");
    let mut line = Vec::new();
    for number in 1..=10 {
        machine.step(number);
        let options = CaptureOptions::new().trigger(Trigger::Periodic);
        let done = process.capture(&machine.memory, &options)?;
        println!("step {number:2}: {} added {} bytes in {:.1?}", done.id, done.added_bytes, done.elapsed);
        line.push(done.id);
    }

    // Back to the third snapshot, in the existing memory …
    store.restore(line[2])?.into_slice(&mut machine.memory)?;
    assert_eq!(machine.counter(), 3);

    // … or as a second machine, in a fresh mapping.
    let other = store.restore(line[6])?.into_mapping()?;
    println!("the seventh had counted to {}", other[0]);

    // Read a few bytes of the past without restoring anything.
    let mut bytes = Vec::new();
    store.snapshot(line[4])?.read_range("0..8".parse()?, &mut bytes)?;
    println!("the fifth began with {bytes:?}");

    // Keep the last three.
    store.forget(&line[..7])?;
    let freed = store.gc(&GcOptions::default())?.freed_bytes;
    println!("{} snapshots left, {freed} bytes freed", process.snapshots().len());
    Ok(())
}
