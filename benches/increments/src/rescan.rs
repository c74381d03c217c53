//! How fast unchanged memory is recognized as unchanged: a capture, compared with the journal's
//! scan of the same memory.

use stillframe::{CaptureOptions, Store};

use crate::journal::{CELL_BYTES, Scan};
use crate::measure::{Stopwatch, median};

const MEMORY_BYTES: usize = 1 << 30;
const ROUNDS: usize = 5;

pub fn rescan(dir: &std::path::Path) {
    let words = (0..MEMORY_BYTES as u64 / 8).map(|at| at.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 24);
    let memory: Vec<u8> = words.flat_map(u64::to_le_bytes).collect();
    let store = Store::options().create(dir.join("rescan")).unwrap();
    let process = store.process("p");
    process.capture(&memory, &CaptureOptions::default()).unwrap();
    let mut scan = Scan::new(CELL_BYTES);
    scan.dirty(0, &memory);

    let (mut ours, mut theirs) = ((Vec::new(), Vec::new()), (Vec::new(), Vec::new()));
    for _ in 0..ROUNDS {
        let stopwatch = Stopwatch::start();
        let capture = process.capture(&memory, &CaptureOptions::default()).unwrap();
        let spent = stopwatch.spent();
        assert_eq!(capture.changed_regions, 0);
        ours.0.push(spent.wall);
        ours.1.push(spent.cpu);
        let stopwatch = Stopwatch::start();
        assert!(scan.dirty(0, &memory).is_empty());
        let spent = stopwatch.spent();
        theirs.0.push(spent.wall);
        theirs.1.push(spent.cpu);
    }
    let (ours, theirs) = ([median(ours.0), median(ours.1)], [median(theirs.0), median(theirs.1)]);
    println!("## Finding 1 GiB unchanged\n");
    println!("| | wall | CPU |\n|---|---:|---:|");
    for (name, [wall, cpu]) in [("stillframe, a capture", ours), ("journal 512 B, a scan", theirs)] {
        println!("| {name} | {:.0} ms | {:.0} ms |", wall.as_secs_f64() * 1e3, cpu.as_secs_f64() * 1e3);
    }
    let ratio = |at: usize| theirs[at].as_secs_f64() / ours[at].as_secs_f64();
    println!("| times faster (wanted: 2.5) | {:.2} | {:.2} |\n", ratio(0), ratio(1));
}
