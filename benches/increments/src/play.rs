//! Plays a tape to one contender and measures it.

use std::time::Duration;

use crate::contender::{Contender, Moment, size_of};
use crate::measure::{Growth, Size, Spent, Stopwatch, median, own_cpu_time};
use crate::state::Tape;

/// After this many snapshots, a contender with an index finishes its pending work and is measured
/// whole.
const SNAPSHOTS_PER_REST: usize = 10;

/// The number of restores of the last moment; the median time counts.
const RESTORES: usize = 5;

/// The results of one contender with one tape.
pub struct Run {
    pub name: String,
    /// The cost of the first snapshot, everything counted.
    pub first: Size,
    pub first_spent: Spent,
    /// For each further snapshot, everything counted.
    pub growth: Growth,
    /// How much of the growth is index, on the disk.
    pub index_bytes: f64,
    /// The median wall time of the further snapshots.
    pub wall: Duration,
    /// For each further snapshot, including background work and closing.
    pub cpu: Duration,
    /// For each further snapshot: how much counted as changed, and how much of that was stored as
    /// differences.
    pub changed: f64,
    pub deltas: f64,
    pub restore: Option<Duration>,
    /// The bytes of each further snapshot; the index's bytes are spread evenly over the snapshots
    /// between two measurements.
    pub series_bytes: Vec<f64>,
}

pub fn play(mut contender: Box<dyn Contender>, tape: &Tape) -> Run {
    let contender = &mut *contender;
    let mut state = tape.first().clone();
    let first_spent = {
        let moment = Moment { process: "p", state: &state, source: &state };
        contender.prepare(moment);
        let stopwatch = Stopwatch::start();
        contender.snapshot(moment);
        let wall = stopwatch.spent().wall;
        contender.close();
        Spent { wall, ..stopwatch.spent() }
    };
    let first = size_of(contender);
    let further = tape.changes().len();

    let stopwatch = Stopwatch::start();
    let mut not_its_own = Duration::ZERO;
    let (mut walls, mut changed, mut deltas) = (Vec::new(), 0, 0);
    let first_index = index_size(contender);
    let mut log_bytes = first.apparent_bytes - first_index.apparent_bytes;
    let (mut rested_at, mut rested_index_bytes) = (0, first_index.disk_bytes);
    let mut series_bytes = Vec::new();
    for (at, change) in tape.changes().iter().enumerate() {
        not_its_own += own_cpu_time(|| {
            state.apply(change);
            contender.prepare(Moment { process: "p", state: &state, source: &state });
        });
        let one = Stopwatch::start();
        let taken = contender.snapshot(Moment { process: "p", state: &state, source: &state });
        walls.push(one.spent().wall);
        changed += taken.changed;
        deltas += taken.deltas;
        let rests = (at + 2).is_multiple_of(SNAPSHOTS_PER_REST) || at + 1 == further;
        if rests {
            contender.close();
        }
        not_its_own += own_cpu_time(|| {
            let now_bytes = size_of(contender).apparent_bytes - index_size(contender).apparent_bytes;
            series_bytes.push(now_bytes as f64 - log_bytes as f64);
            log_bytes = now_bytes;
            if rests {
                let now_bytes = index_size(contender).disk_bytes;
                let since_rest = &mut series_bytes[rested_at..];
                let each = (now_bytes as f64 - rested_index_bytes as f64) / since_rest.len() as f64;
                since_rest.iter_mut().for_each(|bytes| *bytes += each);
                (rested_at, rested_index_bytes) = (at + 1, now_bytes);
            }
        });
    }
    let cpu = stopwatch.spent().cpu.saturating_sub(not_its_own);
    assert!(state == *tape.last(), "the tape does not hold what was recorded");
    let last = size_of(contender);
    let restores: Vec<Duration> = (0..RESTORES)
        .filter_map(|_| {
            let (took, found) = contender.restore()?;
            assert!(found == state, "{} gave back other memory than it was given", contender.name());
            Some(took)
        })
        .collect();
    let restore = (!restores.is_empty()).then(|| median(restores));
    let per = |total: u64| total as f64 / further as f64;
    Run {
        name: contender.name(),
        first,
        first_spent,
        growth: last.growth_per(first, further),
        index_bytes: (rested_index_bytes as f64 - first_index.disk_bytes as f64) / further as f64,
        wall: median(walls),
        cpu: cpu / u32::try_from(further).unwrap(),
        changed: per(changed),
        deltas: per(deltas),
        restore,
        series_bytes,
    }
}

fn index_size(contender: &dyn Contender) -> Size {
    contender.index().map(|path| Size::of(&path)).unwrap_or_default()
}
