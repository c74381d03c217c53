//! The order of snapshots, and which of them a policy keeps, when the clock was wrong.
//!
//! A shim that replaces `clock_gettime` gives the command another clock, which is `AHEAD` seconds
//! ahead of the real one.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use crate::forger::Forger;
use crate::needs::needs;
use jiff::{Timestamp, ToSpan, Zoned, tz::TimeZone};
use serde_json::Value;
use stillframe::forget::KeepPolicy;
use stillframe::source::Attachment;
use stillframe::store::StoreError;
use stillframe::{CaptureOptions, Error, RegionSize, SnapshotId, Store};

const SHIM: &str = r#"
#define _GNU_SOURCE
#include <stdlib.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
int clock_gettime(clockid_t id, struct timespec *at) {
    long result = syscall(SYS_clock_gettime, id, at);
    const char *ahead = getenv("AHEAD");
    if (id == CLOCK_REALTIME && ahead) at->tv_sec += atol(ahead);
    return result;
}
"#;

const DAY_S: i64 = 86_400;

/// A store on which the command works, under any clock.
struct Bench {
    dir: tempfile::TempDir,
    zone: &'static str,
    captures: u32,
}

impl Bench {
    /// `None`, and a printed line, where there is no C compiler.
    fn new(zone: &'static str) -> Option<Bench> {
        if !needs(&["cc"]) {
            return None;
        }
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("shim.c"), SHIM).unwrap();
        let mut cc = Command::new("cc");
        let cc = cc.args(["-shared", "-fPIC", "-o", "shim.so", "shim.c"]).current_dir(dir.path()).status();
        assert!(cc.unwrap().success());
        Some(Bench { dir, zone, captures: 0 })
    }

    fn store(&self) -> PathBuf {
        self.dir.path().join("store")
    }

    /// Runs the command with a clock that is `ahead_s` seconds ahead.
    fn run(&self, ahead_s: i64, arguments: &[&str]) -> Output {
        Command::new(env!("CARGO_BIN_EXE_stillframe"))
            .args(["--store", "store"])
            .args(arguments)
            .env("LD_PRELOAD", self.dir.path().join("shim.so"))
            .env("AHEAD", ahead_s.to_string())
            .env("TZ", self.zone)
            .current_dir(self.dir.path())
            .output()
            .unwrap()
    }

    fn json(&self, ahead_s: i64, arguments: &[&str]) -> Value {
        let output = self.run(ahead_s, &[arguments, &["--json"]].concat());
        assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        serde_json::from_slice(&output.stdout).unwrap()
    }

    /// Captures a memory that differs a little from the one before. Returns the id, and what the
    /// command printed on standard error.
    fn capture(&mut self, ahead_s: i64, process: &str) -> (String, String) {
        self.captures += 1;
        let memory = vec![u8::try_from(self.captures).unwrap(); 20_000];
        std::fs::write(self.dir.path().join("m"), memory).unwrap();
        let output = self.run(ahead_s, &["capture", "--file", "m", "--process", process, "-q"]);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let id = String::from_utf8(output.stdout).unwrap().trim().to_owned();
        (id, String::from_utf8(output.stderr).unwrap())
    }

    fn list(&self) -> Vec<Value> {
        self.json(0, &["list"]).as_array().unwrap().clone()
    }

    fn ids(&self) -> Vec<String> {
        self.list().iter().map(|it| it["id"].as_str().unwrap().to_owned()).collect()
    }

    fn kept(&self, ahead_s: i64, arguments: &[&str]) -> Vec<String> {
        let plan = self.json(ahead_s, &[&["forget", "--dry-run"], arguments].concat());
        plan["kept"].as_array().unwrap().iter().map(|id| id.as_str().unwrap().to_owned()).collect()
    }
}

fn time(snapshot: &Value) -> Timestamp {
    snapshot["time"].as_str().unwrap().parse().unwrap()
}

#[test]
fn a_clock_that_was_wrong_once_spoils_neither_times_nor_order() {
    let Some(mut bench) = Bench::new("UTC") else { return };
    let days: Vec<i64> = [-9, 6_000, -7, -6, -5, -4, -3, -2, -1].to_vec();
    let taken: Vec<String> = days.iter().map(|day| bench.capture(day * DAY_S, "vm").0).collect();
    let list = bench.list();
    assert_eq!(bench.ids(), taken, "in the order in which they were taken");
    for (snapshot, day) in list.iter().zip(&days) {
        let off_s = time(snapshot).duration_since(Timestamp::now()).as_secs() - day * DAY_S;
        assert!(off_s.abs() < 600, "the clock's time: {snapshot}");
    }
    for (snapshot, parent) in list[1..].iter().zip(&taken) {
        assert_eq!(snapshot["parent"], **parent);
    }
    let named = |name: &str| bench.json(0, &["show", name])["id"].as_str().unwrap().to_owned();
    assert_eq!([named("latest"), named("vm@latest"), named("vm~7")], [&*taken[8], &taken[8], &taken[1]]);
    let processes = bench.json(0, &["processes"]);
    assert_eq!(processes[0]["latest"], *taken[8]);
    let history = bench.json(0, &["history", "--range", "0..1"]);
    let seen: Vec<_> = history.as_array().unwrap().iter().map(|it| it["id"].as_str().unwrap()).collect();
    assert_eq!(seen, taken);

    // The order is the same without the index, and after the neighbours of the snapshot with the
    // wrong time are gone.
    std::fs::remove_dir_all(bench.store().join("index")).unwrap();
    assert_eq!(bench.ids(), taken);
    for gone in [0, 2, 3, 7] {
        assert!(bench.run(0, &["forget", &taken[gone]]).status.success());
    }
    assert!(bench.run(0, &["gc", "--max-unused", "0"]).status.success());
    std::fs::remove_dir_all(bench.store().join("index")).unwrap();
    let left: Vec<_> = [1, 4, 5, 6, 8].map(|at| taken[at].clone()).to_vec();
    assert_eq!(bench.ids(), left);
    let next = bench.json(0, &["capture", "--file", "m", "--process", "vm"]);
    assert_eq!(next["parent"], *taken[8]);
    assert_eq!(bench.ids().last().unwrap(), next["id"].as_str().unwrap());
    assert_eq!(bench.json(0, &["verify"])["problems"], serde_json::json!([]));
}

#[test]
fn other_processes_keep_their_place_beside_one_whose_clock_was_wrong() {
    let Some(mut bench) = Bench::new("UTC") else { return };
    let taken = [
        bench.capture(-2 * DAY_S, "web").0,
        bench.capture(5_000 * DAY_S, "vm").0,
        bench.capture(-DAY_S, "web").0,
        bench.capture(-DAY_S + 60, "vm").0,
        bench.capture(0, "other").0,
    ];
    assert_eq!(bench.ids(), taken);
    assert_eq!(bench.json(0, &["show", "latest"])["id"], *taken[4]);
    // After the snapshot with the wrong time is gone, it has no effect on later ones.
    assert!(bench.run(0, &["forget", &taken[1]]).status.success());
    assert!(bench.run(0, &["gc", "--max-unused", "0"]).status.success());
    assert_eq!(bench.ids().len(), 4);
}

#[test]
fn a_clock_that_goes_back_is_told_once_and_one_that_goes_on_is_not() {
    let Some(mut bench) = Bench::new("UTC") else { return };
    let told = [-3, 5_000, -2, -1, -2].map(|day| bench.capture(day * DAY_S, "vm").1);
    for quiet in [&told[0], &told[1], &told[3]] {
        assert_eq!(quiet, "");
    }
    // `-q` suppresses warnings.
    assert_eq!([&*told[2], &told[4]], ["", ""]);
    let output = bench.run(-4 * DAY_S, &["capture", "--file", "m", "--process", "vm", "--json"]);
    let told = String::from_utf8(output.stderr).unwrap();
    assert!(told.contains("the clock says") && told.contains("\"vm\""), "{told}");
    let capture: Value = serde_json::from_slice(&output.stdout).unwrap();
    let behind_days = capture["clock_behind_ms"].as_f64().unwrap() / 1e3 / DAY_S as f64;
    assert!((1.9..2.1).contains(&behind_days), "{capture}");
    let output = bench.run(-3 * DAY_S, &["capture", "--file", "m", "--process", "vm", "--json"]);
    assert!(output.stderr.is_empty());
    let capture: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert!(capture["clock_behind_ms"].is_null(), "{capture}");
}

#[test]
fn a_policy_leaves_out_what_lies_in_the_future_and_says_so() {
    let Some(mut bench) = Bench::new("UTC") else { return };
    let taken = [-5, 5_000, -4, -3, -2, -1].map(|day| bench.capture(day * DAY_S, "vm").0);
    let of = |places: &[usize]| places.iter().map(|at| taken[*at].clone()).collect::<Vec<_>>();
    assert_eq!(bench.kept(0, &["--keep-last", "2"]), of(&[1, 4, 5]));
    assert_eq!(bench.kept(0, &["--keep-daily", "3"]), of(&[1, 3, 4, 5]));
    assert_eq!(bench.kept(0, &["--keep-within", "3d"]), of(&[1, 4, 5]));
    assert_eq!(bench.kept(6_000 * DAY_S, &["--keep-within", "1100d"]), of(&[1]), "until its day has come");
    let plan = bench.json(0, &["forget", "--keep-last", "2", "--dry-run"]);
    assert_eq!(plan["future"], serde_json::json!([taken[1]]));
    let text = bench.run(0, &["forget", "--keep-last", "2", "--dry-run"]);
    let text = String::from_utf8(text.stdout).unwrap();
    assert!(text.contains("left out 1 snapshot in the future") && text.contains(&taken[1][..12]), "{text}");
    // A policy does not keep a snapshot in the future, so this one keeps none and is refused.
    let none = bench.run(0, &["forget", "--keep-label", "a=b"]);
    assert_eq!(none.status.code(), Some(2), "{}", String::from_utf8_lossy(&none.stderr));
    assert!(bench.run(0, &["forget", &taken[1]]).status.success(), "by name it goes");
    assert_eq!(bench.ids(), of(&[0, 2, 3, 4, 5]));
}

/// A time zone with daylight saving: clocks go from 2:00 to 3:00 on 8 March 2026, and from 2:00 to
/// 1:00 on 1 November.
const NEW_YORK: &str = "America/New_York";

/// How far ahead a clock is that shows this local time.
fn ahead(local: &str) -> i64 {
    let at: Zoned = local.parse().unwrap();
    at.timestamp().duration_since(Timestamp::now()).as_secs()
}

#[test]
fn days_are_those_that_list_shows() {
    let Some(mut bench) = Bench::new("America/Los_Angeles") else { return };
    let mut taken = Vec::new();
    for day in 16..21 {
        for hour in ["09", "17"] {
            taken.push(
                bench.capture(ahead(&format!("2026-11-{day}T{hour}:00-08[America/Los_Angeles]")), "vm").0,
            );
        }
    }
    let evenings: Vec<_> = taken.iter().skip(1).step_by(2).cloned().collect();
    let later = ahead("2026-11-21T00:00-08[America/Los_Angeles]");
    assert_eq!(bench.kept(later, &["--keep-daily", "5"]), evenings);
    // 17:00 in New York is the next day in UTC.
    let in_utc: Vec<_> = [2, 4, 6, 8, 9].map(|at: usize| taken[at].clone()).to_vec();
    assert_eq!(bench.kept(later, &["--keep-daily", "5", "--utc"]), in_utc);
}

#[test]
fn a_day_of_25_hours_is_one_day_and_an_hour_that_comes_twice_is_two() {
    let Some(mut bench) = Bench::new(NEW_YORK) else { return };
    let times = [
        "2026-10-31T23:50-04",
        "2026-11-01T00:10-04",
        "2026-11-01T01:30-04",
        "2026-11-01T01:20-05",
        "2026-11-01T01:40-05",
        "2026-11-01T23:50-05",
        "2026-11-02T00:10-05",
    ];
    let taken = times.map(|time| bench.capture(ahead(&format!("{time}[{NEW_YORK}]")), "vm").0);
    let of = |places: &[usize]| places.iter().map(|at| taken[*at].clone()).collect::<Vec<_>>();
    let later = ahead("2026-11-02T12:00-05[America/New_York]");
    assert_eq!(bench.kept(later, &["--keep-daily", "2"]), of(&[5, 6]));
    assert_eq!(bench.kept(later, &["--keep-daily", "3"]), of(&[0, 5, 6]));
    assert_eq!(bench.kept(later, &["--keep-hourly", "4"]), of(&[2, 4, 5, 6]));
    assert_eq!(bench.kept(later, &["--keep-hourly", "5"]), of(&[1, 2, 4, 5, 6]));
}

#[test]
fn a_day_of_23_hours_is_one_day() {
    let Some(mut bench) = Bench::new(NEW_YORK) else { return };
    let times = [
        "2026-03-07T23:30-05",
        "2026-03-08T00:30-05",
        "2026-03-08T01:30-05",
        "2026-03-08T03:10-04",
        "2026-03-08T23:30-04",
    ];
    let taken = times.map(|time| bench.capture(ahead(&format!("{time}[{NEW_YORK}]")), "vm").0);
    let of = |places: &[usize]| places.iter().map(|at| taken[*at].clone()).collect::<Vec<_>>();
    let later = ahead("2026-03-09T12:00-04[America/New_York]");
    assert_eq!(bench.kept(later, &["--keep-daily", "2"]), of(&[0, 4]));
    assert_eq!(bench.kept(later, &["--keep-hourly", "3"]), of(&[2, 3, 4]));
    assert_eq!(bench.kept(later, &["--keep-weekly", "1"]), of(&[4]), "Sunday ends a week");
    assert_eq!(bench.kept(later, &["--keep-monthly", "2"]), of(&[4]));
}

#[test]
fn the_library_counts_in_the_zone_that_a_policy_names() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::options().create(dir.path().join("store")).unwrap();
    let ids: Vec<SnapshotId> = (0..4u8)
        .map(|at| store.process("p").capture(&[at; 5_000], &CaptureOptions::default()).unwrap().id)
        .collect();
    // Fixed zones in which the day began a moment ago, or ends in a moment. In each of them all
    // snapshots are of one day, except at midnight.
    let now = Timestamp::now();
    let plan = |zone: TimeZone| {
        let policy = KeepPolicy::new().daily(1).time_zone(zone);
        store.plan_forget(&policy, None).unwrap()
    };
    let zones = [TimeZone::UTC, TimeZone::get(NEW_YORK).unwrap_or(TimeZone::UTC)];
    for zone in zones {
        let plan = plan(zone);
        assert_eq!((plan.keep, plan.future), (vec![ids[3]], Vec::new()));
    }
    assert!(KeepPolicy::default().is_empty());
    assert!(KeepPolicy::new().time_zone(TimeZone::system()).is_empty());
    assert!(!KeepPolicy::new().within((now + 1.second()).duration_since(now)).is_empty());
}

/// An earlier version made each time later than that of the snapshot before. So a store may have a
/// line that continues from the year 2043.
#[test]
fn a_line_whose_times_were_made_later_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let mut forger = Forger::new(dir.path());
    let first = forger.plain(5);
    let mut made = Vec::new();
    let mut parent = stillframe::Hash::of(&first);
    for nanoseconds in 0..3u64 {
        // Version and process, then no parent, and a time: 253, then twice the nanoseconds.
        assert_eq!((first[3], first[4]), (0, 253));
        let time = 2 * (2_307_000_000_000_000_000 + nanoseconds);
        let record = [&first[..3], &[1], &parent.0, &[253], &time.to_le_bytes(), &first[13..]].concat();
        parent = forger.add(5, &record);
        made.push(parent);
    }
    forger.write();
    for _ in 0..2 {
        let store = Store::open(dir.path().join("store")).unwrap();
        let taken = store.process("p").capture(&[1u8; 5_000], &CaptureOptions::default()).unwrap();
        assert_eq!(taken.parent, Some(SnapshotId(*made.last().unwrap())));
        assert!(taken.time <= Timestamp::now(), "it has the time of the clock");
        made.push(taken.id.0);
        let order: Vec<_> = store.process("p").snapshots().iter().map(|it| it.id().0).collect();
        assert_eq!(order[1..], made[..]);
        assert_eq!(store.find("latest").unwrap(), taken.id);
    }
}

#[test]
fn an_attachment_cannot_pretend_to_say_when_a_snapshot_was_taken() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::options().create(dir.path().join("store")).unwrap();
    let attachments = vec![Attachment { name: "moment:5".to_owned(), bytes: Vec::new() }];
    let options = CaptureOptions::new().attachments(attachments);
    let error = store.process("p").capture(&[1; 100], &options).unwrap_err();
    assert!(matches!(error, Error::Store(StoreError::AttachmentReserved { .. })), "{error:?}");
}

#[test]
fn names_that_set_the_direction_of_writing_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::options().create(dir.path().join("store")).unwrap();
    for letter in ["\u{202e}", "\u{2066}", "\u{200f}", "\u{61c}"] {
        let name = format!("a{letter}b");
        let error = store.process(&name).capture(&[1; 100], &CaptureOptions::default()).unwrap_err();
        assert!(matches!(error, Error::Store(StoreError::BadProcessName { .. })), "{error:?}");
        let options = CaptureOptions::new().labels([(name, "v".to_owned())]);
        let error = store.process("p").capture(&[1; 100], &options).unwrap_err();
        assert!(matches!(error, Error::Store(StoreError::BadLabel { .. })), "{error:?}");
    }
}

/// Makes a store of a hundred thousand snapshots for measurements:
/// `STILLFRAME_MANY=DIR cargo test --test command many_snapshots -- --ignored`
#[test]
#[ignore = "takes minutes, and is for measuring"]
fn a_store_of_many_snapshots() {
    let Some(path) = std::env::var_os("STILLFRAME_MANY") else { return };
    let store = Store::options().region_size(RegionSize::default()).open_or_create(Path::new(&path)).unwrap();
    let attachments = ["auxv", "threads", "rseq"];
    let attachments =
        attachments.map(|name| Attachment { name: name.to_owned(), bytes: vec![7; 300] }).to_vec();
    let options = CaptureOptions::new().attachments(attachments);
    let mut memory = vec![0u8; 16 << 10];
    for at in 0..100_000u64 {
        memory[..8].copy_from_slice(&at.to_le_bytes());
        store.process("vm").capture(&memory, &options).unwrap();
    }
}
