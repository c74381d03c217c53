//! The clock of a store: the moment of each snapshot is later than that of all earlier ones, even
//! if the machine's clock is set back.

use jiff::{SignedDuration, Timestamp};

use crate::sync::Mutex;

/// The moment of the newest snapshot that was taken or begun.
pub(crate) struct Clock(Mutex<Timestamp>);

impl Clock {
    /// A clock whose moments all come after `newest`.
    pub(crate) fn after(newest: Timestamp) -> Clock {
        Clock(Mutex::new(newest))
    }

    /// The machine's time, and a moment that is later than all before.
    pub(crate) fn now(&self) -> (Timestamp, Timestamp) {
        let mut newest = self.0.lock();
        let (time, moment) = time_and_moment(Timestamp::now(), *newest);
        *newest = moment;
        (time, moment)
    }
}

/// If the moment is ahead of the machine's clock by less than this, it is the time of the snapshot
/// too: the clock returned the same time twice, or stepped back a little.
const CLOCK_STEP: SignedDuration = SignedDuration::from_micros(1);

/// The time of a snapshot that is taken when the machine's clock says `now`, and its moment, which
/// is later than `newest`.
fn time_and_moment(now: Timestamp, newest: Timestamp) -> (Timestamp, Timestamp) {
    let moment = later(now, newest);
    if moment.duration_since(now) < CLOCK_STEP { (moment, moment) } else { (now, moment) }
}

/// Now, or just after `before` if the clock is not later than that.
pub(crate) fn later_than(before: Option<Timestamp>) -> Timestamp {
    before.map_or_else(Timestamp::now, |before| later(Timestamp::now(), before))
}

fn later(now: Timestamp, before: Timestamp) -> Timestamp {
    match now <= before {
        // A record may claim the latest time that can be represented. No time is later than that.
        true => before.checked_add(SignedDuration::from_nanos(1)).unwrap_or(before),
        false => now,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_goes_on_after_whatever_moment_a_record_claims() {
        let now = Timestamp::now();
        assert!(later_than(None) >= now);
        let later = Timestamp::MAX - SignedDuration::from_secs(1);
        assert_eq!(later_than(Some(later)), later + SignedDuration::from_nanos(1));
        assert_eq!(later_than(Some(Timestamp::MAX)), Timestamp::MAX);
    }

    #[test]
    fn a_snapshot_has_the_time_of_the_clock_and_stands_after_the_newest() {
        let now = Timestamp::from_second(1_790_000_000).unwrap();
        let nanos = SignedDuration::from_nanos;
        assert_eq!(time_and_moment(now, Timestamp::MIN), (now, now));
        assert_eq!(time_and_moment(now, now), (now + nanos(1), now + nanos(1)), "a coarse clock");
        let ahead = now + SignedDuration::from_hours(24 * 365 * 17);
        assert_eq!(time_and_moment(now, ahead), (now, ahead + nanos(1)));
        assert_eq!(time_and_moment(now, Timestamp::MAX), (now, Timestamp::MAX));
    }
}
