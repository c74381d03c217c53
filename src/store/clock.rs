//! The clock of a store: each snapshot stands after the newest one, whatever the clock of the machine says.

use jiff::{SignedDuration, Timestamp};

use crate::sync::Mutex;

/// Where the newest snapshot stands that was taken or begun.
pub(crate) struct Clock(Mutex<Timestamp>);

impl Clock {
    /// A clock of which all moments come after `newest`.
    pub(crate) fn after(newest: Timestamp) -> Clock {
        Clock(Mutex::new(newest))
    }

    /// The time that the machine says, and a moment later than any before.
    pub(crate) fn now(&self) -> (Timestamp, Timestamp) {
        let mut newest = self.0.lock();
        let (time, moment) = time_and_moment(Timestamp::now(), *newest);
        *newest = moment;
        (time, moment)
    }
}

/// A clock may say the same twice, or step back so little: then the time is moved on.
const CLOCK_STEP: SignedDuration = SignedDuration::from_micros(1);

/// The time of a snapshot that is taken when the clock says `now`, and its moment, which is later than the `newest`.
fn time_and_moment(now: Timestamp, newest: Timestamp) -> (Timestamp, Timestamp) {
    let moment = later(now, newest);
    if moment.duration_since(now) < CLOCK_STEP { (moment, moment) } else { (now, moment) }
}

/// Now, or just after `before` where the clock says that it is earlier.
pub(crate) fn later_than(before: Option<Timestamp>) -> Timestamp {
    before.map_or_else(Timestamp::now, |before| later(Timestamp::now(), before))
}

fn later(now: Timestamp, before: Timestamp) -> Timestamp {
    match now <= before {
        // A record may claim the last moment there is: then nothing is later.
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
