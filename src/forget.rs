//! Forget: snapshots that are not wanted any more are marked as such; gc gives their space back.

use std::collections::HashSet;

use jiff::{SignedDuration, Timestamp, ToSpan, Zoned, tz::TimeZone};

use crate::error::Error;
use crate::record::SnapshotId;
use crate::snapshot::Snapshot;
use crate::store::Store;
use crate::store::error::StoreError;

/// Which snapshots to keep, of each process on its own. A snapshot is kept if any rule keeps it;
/// without any rule nothing is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct KeepPolicy {
    /// The newest so many.
    pub last: Option<u32>,
    /// The newest of each of the last so many hours (of UTC) that have any.
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
}

/// What a policy comes to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct ForgetPlan {
    /// What it does not keep, oldest first.
    pub forget: Vec<SnapshotId>,
    /// What it keeps, oldest first.
    pub keep: Vec<SnapshotId>,
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
        let snapshots = self.snapshots();
        let mut plan = ForgetPlan::default();
        let mut keep = HashSet::new();
        let processes: HashSet<&str> = snapshots.iter().map(|snapshot| &*snapshot.record().process).collect();
        if let Some(process) = process.filter(|process| !processes.contains(process)) {
            return Err(StoreError::NoSuchSnapshot { text: format!("of process {process}") }.into());
        }
        let chosen = |name: &str| process.is_none_or(|process| process == name);
        for process in processes.into_iter().filter(|name| chosen(name)) {
            let line: Vec<&Snapshot<'_>> =
                snapshots.iter().filter(|snapshot| snapshot.record().process == process).collect();
            keep.extend(kept(policy, now, &line));
        }
        for snapshot in snapshots.iter().filter(|snapshot| chosen(&snapshot.record().process)) {
            let list = if keep.contains(&snapshot.id()) { &mut plan.keep } else { &mut plan.forget };
            list.push(snapshot.id());
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
            shared.record(*id)?;
        }
        if ids.is_empty() {
            return Ok(());
        }
        Ok(shared.commit_tombstones(&ids)?)
    }
}

/// What the policy keeps of the snapshots of one process, which come oldest first.
fn kept(policy: &KeepPolicy, now: Timestamp, line: &[&Snapshot<'_>]) -> Vec<SnapshotId> {
    let mut kept = Vec::new();
    let newest_first = || line.iter().rev();
    kept.extend(newest_first().take(policy.last.unwrap_or(0) as usize).map(|snapshot| snapshot.id()));
    type PeriodOf = fn(&Zoned) -> String;
    let periods: [(Option<u32>, PeriodOf); 4] = [
        (policy.hourly, |time| time.strftime("%Y-%m-%d %H").to_string()),
        (policy.daily, |time| time.strftime("%Y-%m-%d").to_string()),
        (policy.weekly, |time| {
            let since_monday = time.weekday().to_monday_zero_offset();
            time.checked_sub(i64::from(since_monday).days())
                .map_or_else(|_| String::new(), |monday| monday.strftime("%Y-%m-%d").to_string())
        }),
        (policy.monthly, |time| time.strftime("%Y-%m").to_string()),
    ];
    for (count, period) in periods {
        let mut seen: Option<String> = None;
        let mut left = count.unwrap_or(0);
        for snapshot in newest_first() {
            let this = period(&snapshot.record().time.to_zoned(TimeZone::UTC));
            if seen.as_ref() != Some(&this) {
                if left == 0 {
                    break;
                }
                left -= 1;
                kept.push(snapshot.id());
                seen = Some(this);
            }
        }
    }
    for snapshot in line {
        let age = now.duration_since(snapshot.record().time);
        let labelled = |(key, value): &(String, String)| snapshot.labels().get(key) == Some(value);
        if policy.within.is_some_and(|within| age <= within) || policy.labels.iter().any(labelled) {
            kept.push(snapshot.id());
        }
    }
    kept
}
