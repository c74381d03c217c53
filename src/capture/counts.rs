//! The counters of a capture.

use std::ops::AddAssign;

/// The counts of one capture, or of a part of it. [`CaptureStats`](super::CaptureStats) defines
/// each.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct CaptureCounts {
    pub(super) zero_bytes: u64,
    pub(super) changed_regions: u64,
    pub(super) new_regions: u64,
    pub(super) delta_regions: u64,
    pub(super) shared_regions: u64,
    pub(super) added_bytes: u64,
}

impl AddAssign for CaptureCounts {
    fn add_assign(&mut self, other: CaptureCounts) {
        self.zero_bytes += other.zero_bytes;
        self.changed_regions += other.changed_regions;
        self.new_regions += other.new_regions;
        self.delta_regions += other.delta_regions;
        self.shared_regions += other.shared_regions;
        self.added_bytes += other.added_bytes;
    }
}
