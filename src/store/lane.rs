//! A lane: work that is done one piece after the other. Unlike a mutex, a lane can be left by
//! another thread than the one that entered it.

use crate::sync::{Condvar, Mutex};
use std::sync::Arc;

#[derive(Default)]
pub(crate) struct Lane {
    is_taken: Mutex<bool>,
    left: Condvar,
}

/// The lane is taken until this is dropped.
pub(crate) struct LaneGuard {
    lane: Arc<Lane>,
}

impl Lane {
    /// Waits until the lane is free, then enters it.
    pub(crate) fn enter(self: Arc<Self>) -> LaneGuard {
        let is_taken = self.is_taken.lock();
        let mut is_taken = self.left.wait_while(is_taken, |is_taken| *is_taken);
        *is_taken = true;
        drop(is_taken);
        LaneGuard { lane: self }
    }
}

impl Drop for LaneGuard {
    fn drop(&mut self) {
        *self.lane.is_taken.lock() = false;
        self.lane.left.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    #[test]
    fn one_is_in_the_lane_at_a_time_and_any_thread_may_leave_it() {
        let (lane, inside) = (Arc::<Lane>::default(), AtomicUsize::new(0));
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..100 {
                        let guard = lane.clone().enter();
                        assert_eq!(inside.fetch_add(1, Ordering::SeqCst), 0);
                        let leave = || {
                            inside.fetch_sub(1, Ordering::SeqCst);
                            drop(guard);
                        };
                        std::thread::scope(|other| drop(other.spawn(leave)));
                    }
                });
            }
        });
    }
}
