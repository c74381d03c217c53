//! An arena in this process: records at fixed places, with Zipf-distributed updates, and counters.

use stillframe::source::Source;

use crate::state::State;
use crate::workload::Workload;

const ARENA_BYTES: usize = 64 << 20;
/// Key u64, version u64, hits u64, then a value of text.
const RECORD_BYTES: usize = 160;
const HEADER_BYTES: usize = 24;
const RECORDS: usize = 400_000;
/// The arena begins with counters.
const COUNTERS: usize = 64;
const UPDATES_PER_STEP: usize = 2_000;
/// The Zipf exponent of YCSB.
const SKEW: f64 = 0.99;

pub struct Arena {
    bytes: Vec<u8>,
    /// The share of all updates that go to the records of each rank and those before it.
    cumulative: Vec<f64>,
    random: u64,
    steps: u64,
}

impl Arena {
    pub fn new() -> Self {
        let mut sum = 0.0;
        let weights = (1..=RECORDS).map(|rank| {
            sum += (rank as f64).powf(-SKEW);
            sum
        });
        let cumulative = weights.collect();
        let mut arena = Arena { bytes: vec![0; ARENA_BYTES], cumulative, random: 0x5851_F42D, steps: 0 };
        for record in 0..RECORDS {
            let at = place(record);
            arena.bytes[at..at + 8].copy_from_slice(&(record as u64).to_le_bytes());
            let length = 40 + arena.pick(RECORD_BYTES - HEADER_BYTES - 40);
            arena.write_text(at + HEADER_BYTES, length);
        }
        arena
    }

    /// A random number below `below`, by splitmix64.
    fn pick(&mut self, below: usize) -> usize {
        self.random = self.random.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut bits = self.random;
        bits = (bits ^ bits >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        bits = (bits ^ bits >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
        usize::try_from((bits ^ bits >> 31) % below as u64).unwrap()
    }

    /// A random record; a record's rank is independent of its place.
    fn pick_record(&mut self) -> usize {
        let total = self.cumulative[RECORDS - 1];
        let point = self.pick(1 << 52) as f64 / (1u64 << 52) as f64 * total;
        let rank = self.cumulative.partition_point(|sum| *sum < point).min(RECORDS - 1);
        rank * 7919 % RECORDS
    }

    fn write_text(&mut self, at: usize, length: usize) {
        const SYLLABLES: &[u8; 64] = b"ka ro mi te su no la ver den in gor pal est un tri fo be shi qua";
        for offset in (0..length).step_by(4) {
            let syllable = self.pick(SYLLABLES.len() - 4);
            let end = (offset + 4).min(length);
            self.bytes[at + offset..at + end].copy_from_slice(&SYLLABLES[syllable..syllable + end - offset]);
        }
    }

    fn add(&mut self, at: usize, amount: u64) {
        let counter = self.bytes[at..at + 8].first_chunk_mut().unwrap();
        *counter = (u64::from_le_bytes(*counter) + amount).to_le_bytes();
    }
}

fn place(record: usize) -> usize {
    4096 + record * RECORD_BYTES
}

impl Workload for Arena {
    fn step(&mut self) {
        self.steps += 1;
        for _ in 0..UPDATES_PER_STEP {
            let at = place(self.pick_record());
            let counter = self.pick(COUNTERS) * 8;
            self.add(counter, 1);
            self.bytes[at + 8..at + 16].copy_from_slice(&self.steps.to_le_bytes());
            self.add(at + 16, 1);
            let length = 8 + self.pick(57);
            let offset = self.pick(RECORD_BYTES - HEADER_BYTES - length);
            self.write_text(at + HEADER_BYTES + offset, length);
        }
    }

    fn state(&self) -> State {
        State::of_bytes(&self.bytes)
    }

    fn source(&self) -> Box<dyn Source + '_> {
        Box::new(&self.bytes[..])
    }
}
