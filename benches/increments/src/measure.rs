//! Clocks and sizes.

use std::path::Path;
use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};

/// The unit in which the kernel counts CPU time of ended children, on every architecture.
const TICKS_PER_SECOND: u64 = 100;

/// Wall and CPU time.
#[derive(Clone, Copy, Default)]
pub struct Spent {
    pub wall: Duration,
    pub cpu: Duration,
}

/// Measures all threads of this process, and children that end meanwhile.
pub struct Stopwatch {
    wall: Instant,
    cpu: Duration,
}

impl Stopwatch {
    pub fn start() -> Self {
        Stopwatch { wall: Instant::now(), cpu: cpu_time() }
    }

    pub fn spent(&self) -> Spent {
        Spent { wall: self.wall.elapsed(), cpu: cpu_time().saturating_sub(self.cpu) }
    }
}

/// The CPU time that this thread alone spends on something.
pub fn own_cpu_time(work: impl FnOnce()) -> Duration {
    let before = clock(ClockId::ThreadCPUTime);
    work();
    clock(ClockId::ThreadCPUTime) - before
}

fn cpu_time() -> Duration {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap();
    // After the name in brackets: cutime and cstime are fields 14 and 15.
    let fields = stat.rsplit_once(") ").unwrap().1.split(' ').skip(13).take(2);
    let ticks: u64 = fields.map(|field| field.parse::<u64>().unwrap()).sum();
    clock(ClockId::ProcessCPUTime) + Duration::from_millis(ticks * 1000 / TICKS_PER_SECOND)
}

fn clock(id: ClockId) -> Duration {
    Duration::try_from(clock_gettime(id)).expect("these clocks are not negative")
}

/// The size of a file or a whole directory.
#[derive(Clone, Copy, Default)]
pub struct Size {
    /// In blocks of the file system.
    pub disk_bytes: u64,
    /// The lengths of the files.
    pub apparent_bytes: u64,
}

impl Size {
    pub fn of(path: &Path) -> Size {
        use std::os::unix::fs::MetadataExt;
        let metadata = path.symlink_metadata().unwrap();
        if !metadata.is_dir() {
            return Size { disk_bytes: metadata.blocks() * 512, apparent_bytes: metadata.len() };
        }
        // The blocks of a directory itself depend on the file system and are not counted.
        let parts = path.read_dir().unwrap().map(|entry| Size::of(&entry.unwrap().path()));
        parts.fold(Size::default(), |sum, part| Size {
            disk_bytes: sum.disk_bytes + part.disk_bytes,
            apparent_bytes: sum.apparent_bytes + part.apparent_bytes,
        })
    }

    /// The growth from `before` to this, for each of `snapshots`.
    pub fn growth_per(self, before: Size, snapshots: usize) -> Growth {
        let per = |now: u64, then: u64| (now as f64 - then as f64) / snapshots as f64;
        Growth {
            disk_bytes: per(self.disk_bytes, before.disk_bytes),
            apparent_bytes: per(self.apparent_bytes, before.apparent_bytes),
        }
    }
}

/// Bytes for each further snapshot; an index that was compacted may have shrunk.
#[derive(Clone, Copy)]
pub struct Growth {
    pub disk_bytes: f64,
    pub apparent_bytes: f64,
}

/// The median.
pub fn median(mut values: Vec<Duration>) -> Duration {
    values.sort();
    values.get(values.len() / 2).copied().unwrap_or_default()
}
