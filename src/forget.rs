//! Forget: snapshots that are not wanted any more are marked as such; gc gives their space back.
//!
//! A policy goes by the times that the clock said. One that was wrong once must not decide what is kept: a snapshot that lies in
//! the future would count as the newest of its day until that day has come. So a policy leaves it out.

use std::cmp::Reverse;
use std::collections::{BTreeMap, HashSet};

use jiff::civil::Date;
use jiff::{SignedDuration, Timestamp, ToSpan, Zoned, tz::TimeZone};

use crate::error::Error;
use crate::record::SnapshotId;
use crate::snapshot::Snapshot;
use crate::store::Store;
use crate::store::error::StoreError;

/// Which snapshots to keep, of each process on its own. A snapshot is kept if any rule keeps it;
/// without any rule nothing is. Those that lie in the future are left out: they are kept, and do not count.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeepPolicy {
    /// The newest so many.
    pub last: Option<u32>,
    /// The newest of each of the last so many hours that have any.
    pub hourly: Option<u32>,
    /// The newest of each of the last so many days that have any.
    pub daily: Option<u32>,
    /// The newest of each of the last so many weeks (from Monday) that have any.
    pub weekly: Option<u32>,
    /// The newest of each of the last so many months that have any.
    pub monthly: Option<u32>,
    /// Those younger than this.
    pub within: Option<SignedDuration>,
    /// Those with any of these labels.
    pub labels: Vec<(String, String)>,
    /// The time zone whose hours, days, weeks and months are meant: UTC unless set, [`TimeZone::system`] for that of
    /// the machine. Where it has daylight saving a day has 23 or 25 hours twice a year, and an hour that comes twice is two hours.
    pub time_zone: TimeZone,
}

/// What a policy comes to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct ForgetPlan {
    /// What it does not keep, oldest first.
    pub forget: Vec<SnapshotId>,
    /// What it keeps, oldest first.
    pub keep: Vec<SnapshotId>,
    /// Those of `keep` that lie in the future by the clock of now, and are kept for that alone: name them to forget them.
    pub future: Vec<SnapshotId>,
}

impl Default for KeepPolicy {
    fn default() -> Self {
        KeepPolicy {
            last: None,
            hourly: None,
            daily: None,
            weekly: None,
            monthly: None,
            within: None,
            labels: Vec::new(),
            time_zone: TimeZone::UTC,
        }
    }
}

impl KeepPolicy {
    /// Whether it has no rule.
    pub fn is_empty(&self) -> bool {
        *self == KeepPolicy { time_zone: self.time_zone.clone(), ..KeepPolicy::default() }
    }
}

impl Store {
    /// What to forget under a policy, of one process or of all. Forgets nothing yet.
    ///
    /// # Errors
    ///
    /// [`StoreError::NoSuchSnapshot`] if the process has no snapshots.
    pub fn plan_forget(&self, policy: &KeepPolicy, process: Option<&str>) -> Result<ForgetPlan, Error> {
        self.shared().check_process()?;
        let now = Timestamp::now();
        let snapshots = match process {
            Some(process) => self.snapshots_of(process),
            None => self.snapshots(),
        };
        if let (Some(process), true) = (process, snapshots.is_empty()) {
            return Err(StoreError::NoSuchSnapshot { text: format!("of process {process}") }.into());
        }
        let mut lines: BTreeMap<&str, Vec<&Snapshot<'_>>> = BTreeMap::new();
        let (future, past): (Vec<_>, Vec<_>) = snapshots.iter().partition(|snapshot| snapshot.time() > now);
        for snapshot in past {
            lines.entry(snapshot.process()).or_default().push(snapshot);
        }
        let future: HashSet<SnapshotId> = future.into_iter().map(Snapshot::id).collect();
        let kept: HashSet<SnapshotId> = lines.values().flat_map(|line| kept(policy, now, line)).collect();
        let mut plan = ForgetPlan::default();
        for id in snapshots.iter().map(Snapshot::id) {
            if future.contains(&id) {
                plan.future.push(id);
            }
            let is_kept = future.contains(&id) || kept.contains(&id);
            if is_kept { plan.keep.push(id) } else { plan.forget.push(id) }
        }
        Ok(plan)
    }

    /// Forgets snapshots. They are gone at once and for good; their space comes back with the next
    /// [`gc`](Store::gc).
    ///
    /// # Errors
    ///
    /// [`StoreError::NoSuchSnapshot`] for the first that is none; nothing is forgotten then. That
    /// the store cannot be written.
    pub fn forget(&self, snapshots: &[SnapshotId]) -> Result<(), Error> {
        let shared = self.shared();
        shared.check_writable()?;
        let mut seen = HashSet::new();
        let ids: Vec<SnapshotId> = snapshots.iter().copied().filter(|id| seen.insert(*id)).collect();
        for id in &ids {
            if shared.catalog().live(id).is_none() {
                return Err(StoreError::NoSuchSnapshot { text: id.to_string() }.into());
            }
        }
        if ids.is_empty() {
            return Ok(());
        }
        Ok(shared.commit_tombstones(&ids)?)
    }
}

/// An hour, a day, a week or a month, by its first day. Of an hour that comes twice the offset from UTC, in seconds, is less the
/// second time.
type Period = (Date, i8, Reverse<i32>);

/// The period that a time is in.
type PeriodOf = fn(&Zoned) -> Period;

/// What the policy keeps of the snapshots of one process, which come oldest first.
fn kept(policy: &KeepPolicy, now: Timestamp, line: &[&Snapshot<'_>]) -> Vec<SnapshotId> {
    let mut kept = Vec::new();
    kept.extend(line.iter().rev().take(policy.last.unwrap_or(0) as usize).map(|snapshot| snapshot.id()));
    fn day(date: Date) -> Period {
        (date, 0, Reverse(0))
    }
    let periods: [(Option<u32>, PeriodOf); 4] = [
        (policy.hourly, |time| (time.date(), time.hour(), Reverse(time.offset().seconds()))),
        (policy.daily, |time| day(time.date())),
        (policy.weekly, |time| {
            let since_monday = i64::from(time.weekday().to_monday_zero_offset());
            day(time.date().saturating_sub(since_monday.days()))
        }),
        (policy.monthly, |time| day(time.date().first_of_month())),
    ];
    for (count, period) in periods {
        let Some(count) = count else { continue };
        // Where the clock went back, what was taken last in a period need not have the latest time of it.
        let newest: BTreeMap<Period, SnapshotId> = line
            .iter()
            .map(|snapshot| (period(&snapshot.time().to_zoned(policy.time_zone.clone())), snapshot.id()))
            .collect();
        kept.extend(newest.into_values().rev().take(count as usize));
    }
    for snapshot in line {
        let labelled = |(key, value): &(String, String)| snapshot.labels().get(key) == Some(value);
        let is_young = policy.within.is_some_and(|within| now.duration_since(snapshot.time()) <= within);
        if is_young || policy.labels.iter().any(labelled) {
            kept.push(snapshot.id());
        }
    }
    kept
}
