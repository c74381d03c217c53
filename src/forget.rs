//! Forget: marks snapshots that are no longer wanted; gc then reclaims their space.
//!
//! A policy uses the times that the machine's clock gave. A clock that was wrong once must not
//! decide what is kept: a snapshot with a time in the future would count as the newest of its day
//! until that day is over. So a policy ignores such snapshots.

use std::cmp::Reverse;
use std::collections::{BTreeMap, HashSet};

use jiff::civil::Date;
use jiff::{SignedDuration, Timestamp, ToSpan, Zoned, tz::TimeZone};

use crate::error::Error;
use crate::record::SnapshotId;
use crate::snapshot::Snapshot;
use crate::store::Store;
use crate::store::error::StoreError;

/// Which snapshots to keep, for each process separately. A snapshot is kept if any rule keeps it;
/// without any rule, none is kept. Snapshots with a time in the future are ignored: they are kept,
/// and no rule counts them.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct KeepPolicy {
    /// The newest snapshots, this many.
    pub last: Option<u32>,
    /// The newest snapshot of each hour, for this many of the latest hours that have any.
    pub hourly: Option<u32>,
    /// The newest snapshot of each day, for this many of the latest days that have any.
    pub daily: Option<u32>,
    /// The newest snapshot of each week (from Monday), for this many of the latest weeks that have
    /// any.
    pub weekly: Option<u32>,
    /// The newest snapshot of each month, for this many of the latest months that have any.
    pub monthly: Option<u32>,
    /// Snapshots younger than this.
    pub within: Option<SignedDuration>,
    /// Snapshots with any of these labels.
    pub labels: Vec<(String, String)>,
    /// The time zone that defines hours, days, weeks and months: UTC by default,
    /// [`TimeZone::system`] for that of the machine. With daylight saving time, one day a year has
    /// 23 hours and one has 25, and the repeated hour counts as two hours.
    pub time_zone: TimeZone,
}

impl KeepPolicy {
    /// The default.
    pub fn new() -> Self {
        KeepPolicy::default()
    }

    /// Sets how many of the newest snapshots are kept.
    pub fn last(mut self, count: impl Into<Option<u32>>) -> Self {
        self.last = count.into();
        self
    }

    /// Sets for how many hours the newest snapshot is kept.
    pub fn hourly(mut self, count: impl Into<Option<u32>>) -> Self {
        self.hourly = count.into();
        self
    }

    /// Sets for how many days the newest snapshot is kept.
    pub fn daily(mut self, count: impl Into<Option<u32>>) -> Self {
        self.daily = count.into();
        self
    }

    /// Sets for how many weeks the newest snapshot is kept.
    pub fn weekly(mut self, count: impl Into<Option<u32>>) -> Self {
        self.weekly = count.into();
        self
    }

    /// Sets for how many months the newest snapshot is kept.
    pub fn monthly(mut self, count: impl Into<Option<u32>>) -> Self {
        self.monthly = count.into();
        self
    }

    /// Sets the age up to which all snapshots are kept.
    pub fn within(mut self, age: impl Into<Option<SignedDuration>>) -> Self {
        self.within = age.into();
        self
    }

    /// Adds a label with which snapshots are kept.
    pub fn label(mut self, key: impl Into<String>, value: impl Into<String>) -> Self {
        self.labels.push((key.into(), value.into()));
        self
    }

    /// Adds labels with which snapshots are kept.
    pub fn labels(mut self, labels: impl IntoIterator<Item = (String, String)>) -> Self {
        self.labels.extend(labels);
        self
    }

    /// Sets the time zone in which days begin; UTC unless set.
    pub fn time_zone(mut self, zone: TimeZone) -> Self {
        self.time_zone = zone;
        self
    }
}

/// The result of a policy.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct ForgetPlan {
    /// The snapshots that it does not keep, oldest first.
    pub forget: Vec<SnapshotId>,
    /// The snapshots that it keeps, oldest first.
    pub keep: Vec<SnapshotId>,
    /// Those of `keep` that have a time in the future and are kept only for that reason. To forget
    /// them, name them.
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
    /// What to forget under a policy, for one process or for all. This forgets nothing yet.
    ///
    /// # Errors
    ///
    /// [`StoreError::NoSuchProcess`] if the process has no snapshots.
    pub fn plan_forget(&self, policy: &KeepPolicy, process: Option<&str>) -> Result<ForgetPlan, Error> {
        self.shared().check_process()?;
        let now = Timestamp::now();
        let snapshots = match process {
            Some(process) => self.snapshots_of(process),
            None => self.snapshots(),
        };
        if let (Some(process), true) = (process, snapshots.is_empty()) {
            return Err(StoreError::no_such_process(process).into());
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

    /// Forgets snapshots. They disappear at once and permanently; the next [`gc`](Store::gc)
    /// reclaims their space.
    ///
    /// # Errors
    ///
    /// [`StoreError::NoSuchSnapshot`] for the first id that does not exist; nothing is forgotten
    /// then. An error if the store cannot be written.
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

/// An hour, a day, a week or a month, identified by its first day. When an hour repeats, its second
/// occurrence has the smaller offset from UTC (in seconds).
type Period = (Date, i8, Reverse<i32>);

/// The period that contains a time.
type PeriodOf = fn(&Zoned) -> Period;

/// The snapshots of one process, given oldest first, that the policy keeps.
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
        // If the clock was set back, the last snapshot of a period need not have its latest time.
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
