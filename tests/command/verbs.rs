//! The command through its binary, on real processes: each verb, each exit code, each JSON key.

// The helpers are test code like the tests themselves.

use crate::needs::needs;
use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::process::Command;

use crate::helper::{Running, Vault, everything_below, has_keys, noise};
use rustix::process::Signal;
use serde_json::{Value, json};
use stillframe::{CaptureOptions, Store};

const CAPTURE_KEYS: &str = "id process parent time memory_bytes zero_bytes changed_regions new_regions \
    delta_regions shared_regions added_bytes elapsed_ms paused_ms staging_full tracking \
    clock_behind_ms left_out unreadable_bytes";
const SNAPSHOT_KEYS: &str = "id process parent time trigger labels memory_bytes regions source";

// Capturing and looking

#[test]
fn memory_of_a_real_process_is_captured_and_found_at_its_address() {
    if !needs(&["python3"]) {
        return;
    }
    let vault = Vault::new();
    let mut python = Running::python(
        "import ctypes, time\n\
         buffer = ctypes.create_string_buffer(b'a moment to come back to ' * 1000)\n\
         print(ctypes.addressof(buffer), flush=True)\n\
         time.sleep(600)",
    );
    let address: u64 = python.line().parse().unwrap();
    let capture =
        vault.json(&["capture", "--pid", &python.pid_text(), "--process", "web-1", "--label", "a=b=c"]);
    has_keys(&capture, CAPTURE_KEYS);
    assert_eq!(capture["process"], "web-1");
    assert_eq!(capture["parent"], Value::Null);
    assert!(capture["paused_ms"].as_f64().unwrap() > 0.0);
    assert!(capture["elapsed_ms"].as_f64() > capture["paused_ms"].as_f64());
    assert!(capture["added_bytes"].as_u64().unwrap() > 100_000);
    let id = capture["id"].as_str().unwrap();
    let pid = python.pid();
    python.kill();

    let range = format!("{address:#x}..{}", address + 25);
    assert_eq!(vault.text(&["cat", id, "--range", &range]), "a moment to come back to ");
    let dump = vault.text(&["cat", id, "--range", &range, "--hex"]);
    assert!(dump.starts_with(&format!("{address:012x}  61 20 6d 6f 6d 65 6e 74  20 74")), "{dump}");
    assert!(dump.ends_with(&format!("\n{:012x}\n", address + 25)), "{dump}");

    let shown = vault.json(&["show", "web-1@latest"]);
    has_keys(&shown, &format!("{SNAPSHOT_KEYS} mappings excluded unreadable left_out unreadable_bytes"));
    has_keys(&shown["source"], "kind pid command path");
    assert_eq!(shown["source"]["kind"], "process");
    assert_eq!(shown["source"]["pid"], pid);
    assert_eq!(shown["source"]["command"][1], "-c");
    assert_eq!(shown["labels"]["a"], "b=c");
    assert_eq!(shown["trigger"], "explicit");
    let mappings = shown["mappings"].as_array().unwrap();
    mappings.iter().for_each(|mapping| has_keys(mapping, "start end protection kind name captured offset"));
    let captured = mappings.iter().filter(|mapping| mapping["captured"] == true);
    let captured_bytes: u64 =
        captured.map(|mapping| mapping["end"].as_u64().unwrap() - mapping["start"].as_u64().unwrap()).sum();
    assert_eq!(shown["memory_bytes"], captured_bytes);
    assert!(mappings.iter().any(|mapping| mapping["kind"] == "stack" && mapping["protection"] == "rw-p"));
}

#[test]
fn a_memory_file_comes_back_byte_for_byte() {
    let vault = Vault::new();
    let mut image = noise(300_001, 1);
    image[50_000..200_000].fill(0);
    let file = vault.file("vm.img", &image);
    let capture = vault.json(&["capture", "--file", &file, "--trigger", "nightly"]);
    has_keys(&capture, CAPTURE_KEYS);
    assert_eq!(capture["process"], "vm.img");
    assert_eq!(capture["memory_bytes"], 300_001);
    assert_eq!(capture["paused_ms"], 0.0);
    assert_eq!((&capture["staging_full"], &capture["tracking"]), (&json!(false), &json!("rescan")));
    let id = capture["id"].as_str().unwrap();

    let back = vault.path("back.img");
    let restored = vault.json(&["restore", "latest", "--to", back.to_str().unwrap()]);
    has_keys(&restored, "id bytes written_bytes elapsed_ms");
    assert_eq!(restored["id"], id);
    assert_eq!(restored["bytes"], 300_001);
    assert!(restored["written_bytes"].as_u64().unwrap() < 200_000);
    assert_eq!(fs::read(&back).unwrap(), image);
    assert_eq!(fs::metadata(&back).unwrap().mode() & 0o777, 0o600);

    assert_eq!(vault.run(&["cat", &id[..8]]).stdout, image);
    assert_eq!(vault.run(&["cat", id, "--range", "199990..200010"]).stdout, image[199_990..200_010]);
    assert_eq!(vault.text(&["cat", id, "--range", "0xc350..0x30d40", "--hex"]).lines().nth(1), Some("*"));
    let shown = vault.json(&["show", id]);
    has_keys(&shown["source"], "kind path");
    assert_eq!(shown["source"]["kind"], "file");
    assert_eq!(shown["source"]["path"], file);
    assert_eq!(shown["trigger"], "nightly");
}

#[test]
fn what_is_excluded_restores_as_zeros() {
    let vault = Vault::new();
    let image = noise(40_000, 2);
    let file = vault.file("image", &image);
    vault.text(&["capture", "--file", &file, "--exclude", "0x1000..0x2000", "--exclude", "30000..30001"]);
    let mut expected = image;
    expected[0x1000..0x2000].fill(0);
    expected[30_000] = 0;
    assert_eq!(vault.run(&["cat", "latest"]).stdout, expected);
    assert!(vault.text(&["show", "latest"]).contains("0x1000..0x2000"));
}

#[test]
fn snapshots_are_listed_by_process_and_by_label() {
    let vault = Vault::new();
    let file = vault.file("image", &noise(10_000, 3));
    let first = vault.capture_file(&file, "web-1");
    let second = vault.capture_file(&file, "web-1");
    let other = vault.capture_file(&file, "web-2");
    has_keys(&vault.json(&["label", "web-1~1", "stage=ready", "who=me"]), SNAPSHOT_KEYS);

    let ids = |arguments: &[&str]| -> Vec<String> {
        let list = vault.json(arguments);
        let snapshots = list.as_array().unwrap();
        snapshots.iter().for_each(|snapshot| has_keys(snapshot, SNAPSHOT_KEYS));
        snapshots.iter().map(|snapshot| snapshot["id"].as_str().unwrap().to_owned()).collect()
    };
    assert_eq!(ids(&["list"]), [&*first, &*second, &*other]);
    assert_eq!(ids(&["list", "--process", "web-1"]), [&*first, &*second]);
    assert_eq!(ids(&["list", "--label", "stage=ready"]), [&*first]);
    assert_eq!(ids(&["list", "--label", "stage=ready", "--label", "who=you"]), Vec::<String>::new());
    assert_eq!(vault.text(&["list", "--quiet"]), format!("{first}\n{second}\n{other}\n"));
    let table = vault.text(&["list"]);
    assert_eq!(table.lines().count(), 4);
    assert!(table.starts_with("SNAPSHOT"), "{table}");
    assert!(!table.contains('\x1b'), "colours are for terminals");

    let processes = vault.json(&["processes"]);
    processes
        .as_array()
        .unwrap()
        .iter()
        .for_each(|one| has_keys(one, "process snapshots latest latest_time"));
    assert_eq!(processes[0]["process"], "web-1");
    assert_eq!(processes[0]["snapshots"], 2);
    assert_eq!(processes[0]["latest"], *second);
    assert!(vault.text(&["processes"]).contains("web-2"));

    let labelled = vault.json(&["label", &first, "stage="]);
    assert_eq!(labelled["labels"], serde_json::json!({"who": "me"}));
    assert_eq!(labelled["id"], *first);
}

#[test]
fn a_reader_that_has_enough_is_not_an_error() {
    let vault = Vault::new();
    let file = vault.file("image", &noise(4 << 20, 4));
    vault.capture_file(&file, "big");
    for arguments in [&["cat", "latest"][..], &["cat", "latest", "--hex"], &["man"]] {
        let mut running = vault.start(arguments);
        if arguments[0] == "cat" && arguments.len() == 3 {
            assert!(running.line().starts_with("000000000000  "));
        }
        running.close_stdout();
        let done = running.wait();
        assert_eq!((done.code, &*done.stderr), (Some(0), ""), "{arguments:?}");
    }
}

// Watching

#[test]
fn a_watch_takes_so_many_snapshots_of_a_running_process() {
    let vault = Vault::new();
    let sleep = Running::sleep();
    let watch = ["watch", "--every", "20ms", "--count", "3", "--pid", &sleep.pid_text()];
    let text = vault.text(&[&["--json"], &watch[..]].concat());
    let captures: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(captures.len(), 3);
    captures.iter().for_each(|capture| has_keys(capture, CAPTURE_KEYS));
    assert_eq!(captures[0]["process"], format!("pid:{}", sleep.pid()));
    assert_eq!(captures[2]["parent"], captures[1]["id"]);
    assert_eq!(vault.json(&["show", "latest"])["trigger"], "periodic");

    let table = vault.text(&watch);
    let lines: Vec<&str> = table.lines().collect();
    assert_eq!(lines.len(), 5, "a title, three snapshots, the totals: {table}");
    assert!(lines[0].starts_with("TIME") && lines[4].starts_with("3 snapshots"), "{table}");
}

#[test]
fn a_watch_ends_with_the_command_it_started_and_says_how_that_ended() {
    if !needs(&["python3"]) {
        return;
    }
    let vault = Vault::new();
    let program = "import time; data = []\n\
        for step in range(8): data.append(bytes(100_000)); print('step', step, flush=True); time.sleep(0.1)\n\
        raise SystemExit(3)";
    let done = vault.run(&["watch", "--every", "100ms", "--", "python3", "-c", program]);
    assert_eq!(done.code, Some(0), "{}", done.stderr);
    assert!(done.stderr.contains("step 7"), "what the command prints is not lost: {}", done.stderr);
    assert!(!done.text().contains("step"), "and does not stand between the snapshots: {}", done.text());
    assert!(done.stderr.contains("python3 ended: exit status: 3"), "{}", done.stderr);
    assert!(done.text().lines().last().unwrap().contains("snapshot"), "{}", done.text());
    assert_eq!(vault.json(&["processes"])[0]["process"], "python3");
}

#[test]
fn a_watch_ends_with_the_process_it_was_pointed_at() {
    let vault = Vault::new();
    let sleep = Running::sleep();
    let mut watch = vault.start(&["--json", "watch", "--every", "50ms", "--pid", &sleep.pid_text()]);
    assert!(watch.line().contains("\"id\""));
    sleep.kill();
    let done = watch.wait();
    assert_eq!(done.code, Some(0), "{}", done.stderr);
    assert_eq!(done.stderr, "");
}

#[test]
fn a_command_runs_on_to_its_end_after_the_last_snapshot_and_others_may_use_the_store() {
    let vault = Vault::new();
    let (go, ended) = (vault.path("go"), vault.path("ended"));
    let script = format!("until [ -e {} ]; do sleep 0.05; done; touch {}", go.display(), ended.display());
    let mut watch = vault.start(&["--quiet", "watch", "--count", "1", "--", "sh", "-c", &script]);
    let id = watch.line();
    assert_eq!(vault.text(&["--wait", "60", "--quiet", "list"]).trim_end(), id);
    assert!(!ended.exists());
    fs::write(&go, "").unwrap();
    assert_eq!(watch.wait().code, Some(0));
    assert!(ended.exists());
}

#[test]
fn a_command_creates_its_files_as_if_it_had_been_started_without_us() {
    let vault = Vault::new();
    let mode = |name: &str| fs::metadata(vault.path(name)).unwrap().mode();
    vault.file("by-us", b"");
    let script = format!("touch {}; sleep 0.3", vault.path("by-command").display());
    vault.text(&["watch", "--", "sh", "-c", &script]);
    assert_eq!(mode("by-command"), mode("by-us"));
}

#[test]
fn an_interrupted_watch_exits_with_130_and_leaves_no_command_behind() {
    if !needs(&["python3"]) {
        return;
    }
    let vault = Vault::new();
    for (signal, command) in [
        (Signal::INT, &["sleep", "600"][..]),
        (Signal::TERM, &["sleep", "600"]),
        // Whoever does not listen to the first signal is asked with another.
        (Signal::INT, &["python3", "-c", "import signal, time; signal.signal(2, 1); time.sleep(600)"]),
    ] {
        let mut watch = vault.start(&[&["--quiet", "watch", "--every", "1h", "--"], command].concat());
        watch.line();
        watch.signal(signal);
        assert_eq!(watch.wait().code, Some(130), "{signal:?} {command:?}");
        let shown = vault.json(&["show", "latest"]);
        let pid = shown["source"]["pid"].as_u64().unwrap();
        assert!(!fs::exists(format!("/proc/{pid}")).unwrap(), "{command:?} still runs");
    }
}

#[test]
fn a_command_that_runs_on_after_the_last_snapshot_can_be_interrupted() {
    let vault = Vault::new();
    let mut watch = vault.start(&["--quiet", "watch", "--count", "1", "--", "sleep", "600"]);
    watch.line();
    // The store is free only when the snapshots are done.
    let shown = vault.json(&["--wait", "60", "show", "latest"]);
    watch.signal(Signal::INT);
    assert_eq!(watch.wait().code, Some(130));
    let pid = shown["source"]["pid"].as_u64().unwrap();
    assert!(!fs::exists(format!("/proc/{pid}")).unwrap());
}

#[test]
fn an_interrupted_watch_lets_a_running_process_run_on() {
    if !needs(&["python3"]) {
        return;
    }
    let vault = Vault::new();
    let mut python = Running::python("print('ready', flush=True)\nwhile True: pass");
    assert_eq!(python.line(), "ready");
    let mut watch = vault.start(&["--quiet", "watch", "--every", "1ms", "--pid", &python.pid_text()]);
    watch.line();
    watch.signal(Signal::INT);
    assert_eq!(watch.wait().code, Some(130));
    let stat = fs::read_to_string(format!("/proc/{}/stat", python.pid())).unwrap();
    let state = stat.rsplit(") ").next().unwrap().chars().next();
    assert_eq!(state, Some('R'), "it runs: {stat}");
}

#[test]
fn an_interrupted_verify_or_repair_exits_with_130_and_harms_nothing() {
    let vault = Vault::new();
    let image = noise(40 << 20, 41);
    let file = vault.file("image", &image);
    vault.text(&["init", "--region-size", "512"]);
    vault.capture_file(&file, "large");
    for verb in ["verify", "repair"] {
        // It may have been done before the signal came; then once more.
        let was_interrupted = (0..100).any(|_| {
            let mut running = vault.start(&[verb]);
            if running.wait_until_it_reads_packs() {
                running.signal(Signal::INT);
            }
            let done = running.wait();
            assert!(matches!(done.code, Some(0 | 130)), "{verb}: {:?} {}", done.code, done.stderr);
            done.code == Some(130)
        });
        assert!(was_interrupted, "{verb}");
        assert_eq!(vault.run(&["cat", "latest"]).stdout, image, "{verb}");
        assert!(vault.text(&["verify"]).contains("all in order"), "{verb}");
        // `repair` sets the old index aside; nothing else is.
        let damaged = fs::read_dir(vault.store().join("damaged")).into_iter().flatten().flatten();
        assert!(damaged.map(|entry| entry.file_name()).all(|name| name == "index"), "{verb}");
    }
}

#[test]
fn a_command_that_cannot_be_started_is_told() {
    Vault::new().fails(6, "cannot start", &["watch", "--", "/no/such/program"]);
}

// Tidying

#[test]
fn a_policy_keeps_what_it_says_and_gc_gives_the_rest_back() {
    let vault = Vault::new();
    let ids: Vec<String> =
        (0..5).map(|seed| vault.capture_file(&vault.file("image", &noise(200_000, seed)), "web-1")).collect();
    let policy = ["forget", "--keep-last", "2", "--process", "web-1"];
    let planned = vault.json(&[&policy[..], &["--dry-run"]].concat());
    has_keys(&planned, "forgotten kept future freeable_bytes");
    assert_eq!(vault.json(&["list"]).as_array().unwrap().len(), 5, "a dry run forgets nothing");
    let done = vault.json(&policy);
    assert_eq!(done, planned);
    assert_eq!(done["forgotten"], serde_json::json!(ids[..3]));
    assert_eq!(done["kept"].as_array().unwrap().len(), 2);
    let freeable_bytes = done["freeable_bytes"].as_u64().unwrap();
    assert!(freeable_bytes > 500_000, "{freeable_bytes}");

    let pack_bytes = || vault.packs().iter().map(|pack| fs::metadata(pack).unwrap().len()).sum::<u64>();
    let before_bytes = pack_bytes();
    let keys = "live_regions dead_regions freed_bytes erased_bytes packs_removed packs_rewritten elapsed_ms";
    let dry = vault.json(&["gc", "--dry-run"]);
    has_keys(&dry, keys);
    assert_eq!(pack_bytes(), before_bytes, "a dry run frees nothing");
    let stats = vault.json(&["gc", "--max-unused", "0"]);
    has_keys(&stats, keys);
    assert!(before_bytes - pack_bytes() > 500_000);
    assert_eq!(vault.run(&["cat", &ids[4]]).stdout, noise(200_000, 4));
    vault.fails(3, &ids[0], &["show", &ids[0]]);
}

#[test]
fn snapshots_are_forgotten_by_name() {
    let vault = Vault::new();
    let file = vault.file("image", &noise(10_000, 6));
    let first = vault.capture_file(&file, "web-1");
    let second = vault.capture_file(&file, "web-2");
    vault.fails(2, "not a snapshot of the process", &["forget", &first, "--process", "web-2"]);
    let done = vault.json(&["forget", &first[..10], "web-1@latest"]);
    assert_eq!(done["forgotten"], serde_json::json!([first]));
    assert_eq!(done["kept"], serde_json::json!([second]));
    vault.fails(3, "no snapshot", &["forget", "web-1@latest"]);
}

#[test]
fn a_policy_that_keeps_nothing_is_refused_unless_that_is_wanted() {
    let vault = Vault::new();
    vault.capture_file(&vault.file("image", &noise(10_000, 7)), "web-1");
    vault.fails(2, "--allow-empty", &["forget", "--keep-last", "0"]);
    vault.fails(2, "--allow-empty", &["forget", "--keep-label", "stage=ready"]);
    vault.fails(2, "--keep", &["forget"]);
    vault.fails(2, "not both", &["forget", "latest", "--keep-last", "1"]);
    assert_eq!(vault.json(&["forget", "--keep-within", "7d"])["forgotten"], serde_json::json!([]));
    assert_eq!(vault.json(&["forget", "--keep-last", "0", "--allow-empty"])["kept"], serde_json::json!([]));
    assert_eq!(vault.json(&["list"]), serde_json::json!([]));
    assert_eq!(vault.text(&["list"]), "");
}

// Caring for the store

#[test]
fn a_store_is_created_as_asked_and_private() {
    let vault = Vault::new();
    let init = vault.json(&["init", "--region-size", "4096", "--codec", "none"]);
    has_keys(&init, "store format region_size codec");
    assert_eq!(init["store"], vault.store().to_str().unwrap());
    assert_eq!(
        (&init["format"], &init["region_size"], &init["codec"]),
        (&1.into(), &4096.into(), &"none".into())
    );
    vault.fails(1, "is a store already", &["init"]);
    vault.capture_file(&vault.file("image", &noise(10_000, 8)), "p");
    for path in everything_below(&vault.store()) {
        let metadata = fs::metadata(&path).unwrap();
        let expected = if metadata.is_dir() { 0o700 } else { 0o600 };
        assert_eq!(metadata.mode() & 0o777, expected, "{}", path.display());
    }
}

#[test]
fn the_store_is_where_the_environment_says() {
    let vault = Vault::new();
    let init = |variables: &[(&str, &str)]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_stillframe"));
        command.env_remove("STILLFRAME_STORE").env_remove("XDG_DATA_HOME").env_remove("HOME");
        command.envs(variables.iter().copied()).args(["init", "--json"]).output().unwrap()
    };
    let (home, data, store) = (vault.path("home"), vault.path("data"), vault.path("own"));
    let [home, data, store] = [&home, &data, &store].map(|path| path.to_str().unwrap());
    let created = |variables: &[(&str, &str)]| {
        let output = init(variables);
        let object: Value = serde_json::from_slice(&output.stdout).unwrap();
        object["store"].as_str().unwrap().to_owned()
    };
    assert_eq!(created(&[("HOME", home)]), format!("{home}/.local/share/stillframe"));
    assert_eq!(created(&[("HOME", home), ("XDG_DATA_HOME", data)]), format!("{data}/stillframe"));
    assert_eq!(created(&[("HOME", home), ("XDG_DATA_HOME", data), ("STILLFRAME_STORE", store)]), store);
    let lost = init(&[]);
    assert_eq!(lost.status.code(), Some(2));
    assert!(String::from_utf8(lost.stderr).unwrap().contains("--store DIR"));
}

#[test]
fn stats_tell_what_is_stored() {
    let vault = Vault::new();
    let file = vault.file("image", &[noise(100_000, 9), vec![0; 100_000]].concat());
    vault.capture_file(&file, "web-1");
    vault.capture_file(&file, "web-2");
    let stats = vault.json(&["stats"]);
    has_keys(
        &stats,
        "snapshots processes logical_bytes unique_bytes stored_bytes index_bytes disk_bytes regions deltas \
         zero_bytes dedup_ratio compression_ratio",
    );
    assert_eq!((&stats["snapshots"], &stats["processes"]), (&2.into(), &2.into()));
    assert_eq!(stats["logical_bytes"], 400_000);
    assert!(stats["dedup_ratio"].as_f64().unwrap() > 1.5, "{stats}");
    assert!(
        vault.text(&["stats"]).contains("2 snapshots") || vault.text(&["stats"]).contains("2 of 2 processes")
    );
}

#[test]
fn a_sound_store_verifies_and_has_nothing_to_repair_or_migrate() {
    let vault = Vault::new();
    let id = vault.capture_file(&vault.file("image", &noise(100_000, 10)), "p");
    for arguments in [&["verify"][..], &["verify", &id], &["verify", "--sample", "50"]] {
        let report = vault.json(arguments);
        has_keys(
            &report,
            "checked_objects checked_bytes total_objects total_bytes checked_packs total_packs problems",
        );
        assert_eq!(report["problems"], serde_json::json!([]));
    }
    assert!(vault.json(&["verify"])["checked_bytes"].as_u64().unwrap() >= 100_000);
    for arguments in [&["repair", "--dry-run"][..], &["repair"]] {
        let report = vault.json(arguments);
        has_keys(&report, "index_rebuilt objects damaged lost_snapshots");
        assert_eq!(report["damaged"], serde_json::json!([]));
        assert_eq!(report["lost_snapshots"], serde_json::json!([]));
    }
    assert_eq!(vault.json(&["migrate", "--dry-run"]), serde_json::json!({"from": 1, "to": 1}));
    assert_eq!(vault.json(&["migrate"]), serde_json::json!({"from": 1, "to": 1}));
    let text = vault.text(&["verify"]);
    assert!(text.contains("in 1 pack: all in order"), "{text}");
    let text = vault.text(&["verify", "--sample", "1"]);
    assert!(text.starts_with("checked ") && text.contains(" of ") && text.contains(" %), "), "{text}");
}

#[test]
fn a_flipped_byte_is_found_named_and_healed() {
    let vault = Vault::new();
    let file = vault.file("image", &noise(1 << 20, 11));
    let hit = vault.capture_file(&file, "hit");
    let spared = vault.capture_file(&vault.file("other", &noise(10_000, 12)), "spared");
    let [pack] = &vault.packs()[..] else { panic!("expected one pack") };
    let mut bytes = fs::read(pack).unwrap();
    bytes[500_000] ^= 0x10;
    fs::write(pack, &bytes).unwrap();

    let done = vault.run(&["--json", "verify"]);
    assert_eq!(done.code, Some(5), "{}", done.stderr);
    let report: Value = serde_json::from_slice(&done.stdout).unwrap();
    let problems = report["problems"].as_array().unwrap();
    assert_eq!(problems.len(), 1, "{report}");
    has_keys(&problems[0], "kind object snapshots detail");
    assert_eq!(problems[0]["kind"], "region");
    assert_eq!(problems[0]["snapshots"], serde_json::json!([hit]));
    let done = vault.run(&["verify"]);
    assert_eq!(done.code, Some(5));
    assert!(done.text().contains(&hit[..12]), "{}", done.text());

    vault.fails(5, "is missing", &["restore", &hit, "--to", vault.path("back").to_str().unwrap()]);
    assert!(!vault.path("back").exists(), "half a restore is none");
    assert_eq!(vault.run(&["cat", &spared]).stdout, noise(10_000, 12), "others do not suffer");

    let done = vault.run(&["--json", "repair"]);
    assert_eq!(done.code, Some(5), "{}", done.stderr);
    let report: Value = serde_json::from_slice(&done.stdout).unwrap();
    has_keys(&report, "index_rebuilt objects damaged lost_snapshots");
    assert_eq!(report["damaged"].as_array().unwrap().len(), 1, "{report}");
    for path in everything_below(&vault.store().join("damaged")) {
        let expected = if path.is_dir() { 0o700 } else { 0o600 };
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, expected, "{}", path.display());
    }
    assert!(vault.store().join("damaged/REPORT.txt").is_file());
    vault.capture_file(&file, "again");
    assert_eq!(vault.json(&["verify"])["problems"], serde_json::json!([]));
    assert_eq!(vault.run(&["cat", &hit]).stdout, noise(1 << 20, 11), "capturing the same memory heals");
}

// What goes wrong

#[test]
fn a_store_that_somebody_else_has_open_can_be_waited_for() {
    let vault = Vault::new();
    let sleep = Running::sleep();
    let mut watch = vault.start(&["--quiet", "watch", "--every", "1h", "--pid", &sleep.pid_text()]);
    let id = watch.line();
    for arguments in [&["list"][..], &["--wait", "0.05", "stats"], &["repair"], &["migrate"]] {
        vault.fails(4, &format!("process {}", watch.pid()), arguments);
    }
    vault.fails(4, "--wait SECONDS", &["list"]);
    let impatient = vault.start(&["--wait", "100", "list"]);
    let waiting = vault.start(&["--wait", "100", "--quiet", "list"]);
    impatient.wait_until_it_handles(Signal::INT);
    impatient.signal(Signal::INT);
    assert_eq!(impatient.wait().code, Some(130), "ctrl-C ends the waiting too");
    watch.signal(Signal::INT);
    assert_eq!(watch.wait().code, Some(130));
    let done = waiting.wait();
    assert_eq!((done.code, done.text().trim_end()), (Some(0), &*id), "{}", done.stderr);
}

#[test]
fn a_place_without_a_usable_store_is_named() {
    let vault = Vault::new();
    for verb in
        [&["list"][..], &["show", "latest"], &["gc"], &["stats"], &["verify"], &["repair"], &["migrate"]]
    {
        vault.fails(1, "stillframe init", verb);
        assert!(!vault.store().exists(), "{verb:?} creates nothing");
    }
    fs::write(vault.store(), "not a directory").unwrap();
    let image = vault.file("image", b"memory");
    for verb in [&["list"][..], &["init"], &["capture", "--file", &image]] {
        vault.fails(1, "it is a file", verb);
    }
    fs::remove_file(vault.store()).unwrap();
    fs::create_dir(vault.store()).unwrap();
    fs::write(vault.store().join("letter.txt"), "dear").unwrap();
    for verb in [&["list"][..], &["init"], &["capture", "--file", &image]] {
        vault.fails(1, "is not a stillframe store", verb);
    }
    assert_eq!(everything_below(&vault.store()).len(), 2, "a stranger's directory stays as it is");
    fs::write(vault.store().join("FORMAT"), "stillframe store\nformat = 99\n").unwrap();
    vault.fails(1, "use a newer stillframe", &["list"]);
}

/// Runs the command as a user without privileges, which needs a copy that this user can reach.
fn run_unprivileged(vault: &Vault, arguments: &[&str]) -> std::process::Output {
    let root = rustix::process::geteuid().is_root();
    if !root {
        let mut command = Command::new(env!("CARGO_BIN_EXE_stillframe"));
        return command.arg("--store").arg(vault.store()).args(arguments).output().unwrap();
    }
    let nobody = 65534;
    let program = vault.path("stillframe");
    // By a program of its own: what this one has open for writing its other children would have
    // too, and a file that anybody has open for writing cannot be run.
    let copied = Command::new("cp").arg(env!("CARGO_BIN_EXE_stillframe")).arg(&program).status().unwrap();
    assert!(copied.success());
    for path in [vault.path(""), program.clone()] {
        fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
    }
    if vault.store().exists() {
        for path in everything_below(&vault.store()) {
            std::os::unix::fs::chown(path, Some(nobody), Some(nobody)).unwrap();
        }
    }
    let mut command = Command::new(program);
    command.uid(nobody).gid(nobody).arg("--store").arg(vault.store()).args(arguments).output().unwrap()
}

#[test]
fn a_store_that_cannot_be_written_is_told() {
    let vault = Vault::new();
    let file = vault.file("image", b"memory");
    vault.capture_file(&file, "p");
    let paths = everything_below(&vault.store());
    let set_mode = |directory, file| {
        for path in &paths {
            let mode = if path.is_dir() { directory } else { file };
            fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
        }
    };
    set_mode(0o500, 0o400);
    let output = run_unprivileged(&vault, &["capture", "--file", &file]);
    set_mode(0o700, 0o600);
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert!(stderr.starts_with("stillframe: the store ") && stderr.contains("is read-only"), "{stderr}");
    assert!(output.stdout.is_empty());
}

#[test]
fn a_process_of_somebody_else_cannot_be_captured_or_rolled_back() {
    let vault = Vault::new();
    let sleep = Running::sleep();
    vault.json(&["capture", "--pid", &sleep.pid_text(), "--process", "p"]);
    // The first process of a machine or a container is root's.
    for arguments in [&["capture", "--pid", "1"][..], &["restore", "p@latest", "--into-pid", "1"]] {
        let output = run_unprivileged(&vault, arguments);
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(6), "{stderr}");
        assert!(
            stderr.contains("CAP_SYS_PTRACE") || stderr.contains("same user"),
            "it says what to do: {stderr}"
        );
    }
}

#[test]
fn a_name_that_names_no_snapshot_is_told_apart_from_one_that_cannot() {
    let vault = Vault::new();
    let id = vault.capture_file(&vault.file("image", b"memory"), "p");
    let unknown: String = id.chars().map(|digit| if digit == '0' { '1' } else { '0' }).collect();
    for verb in [&["show"][..], &["cat"], &["label", "a=b"], &["forget"], &["verify"]] {
        let with = |name: &str| -> Vec<String> {
            let (verb, rest) = verb.split_first().unwrap();
            [*verb, name].iter().chain(rest).map(|text| (*text).to_owned()).collect()
        };
        for (code, expected, name) in [
            (3, &*unknown, &*unknown),
            (3, "of a process \"q\"", "q@latest"),
            (3, "p~7", "p~7"),
            (2, "at least 4", &id[..3]),
            (2, "hex", "nothex"),
            (2, "64", &format!("{id}0")),
        ] {
            let arguments = with(name);
            vault.fails(code, expected, &arguments.iter().map(String::as_str).collect::<Vec<_>>());
        }
    }
}

#[test]
fn an_ambiguous_prefix_is_refused_and_its_candidates_listed() {
    let vault = Vault::new();
    let (one, other) = {
        let store = Store::options().create(vault.store()).unwrap();
        // Ids are random: among some hundreds two begin with the same 16 bits.
        let mut seen: HashMap<String, String> = HashMap::new();
        loop {
            let id =
                store.process("p").capture(&[7; 512], &CaptureOptions::default()).unwrap().id.to_string();
            if let Some(other) = seen.insert(id[..4].to_owned(), id.clone()) {
                break (id, other);
            }
        }
    };
    vault.fails(3, &one[..12], &["show", &one[..4]]);
    vault.fails(3, &other[..12], &["show", &one[..4]]);
}

#[test]
fn a_source_that_cannot_be_used_leaves_no_store_behind() {
    let vault = Vault::new();
    let dead = {
        let sleep = Running::sleep();
        let pid = sleep.pid_text();
        sleep.kill();
        pid
    };
    vault.fails(6, &format!("no process has the pid {dead}"), &["capture", "--pid", &dead]);
    vault.fails(6, &format!("no process has the pid {dead}"), &["watch", "--pid", &dead]);
    let missing = vault.path("missing");
    vault.fails(6, "No such file", &["capture", "--file", missing.to_str().unwrap()]);
    vault.fails(6, "it is empty", &["capture", "--file", &vault.file("empty", b"")]);
    vault.fails(6, "it is a directory", &["capture", "--file", vault.path("").to_str().unwrap()]);
    assert!(!vault.store().exists());
}

#[test]
fn a_target_that_cannot_be_used_is_left_alone() {
    let vault = Vault::new();
    vault.capture_file(&vault.file("image", b"memory"), "p");
    let target = vault.file("target", b"precious");
    vault.fails(6, "--force", &["restore", "latest", "--to", &target]);
    assert_eq!(fs::read(&target).unwrap(), b"precious");
    vault.text(&["restore", "latest", "--to", &target, "--force"]);
    assert_eq!(fs::read(&target).unwrap(), b"memory");
    vault.fails(6, "No such file", &["restore", "latest", "--to", "/no/such/directory/target"]);
    vault.fails(6, "is not captured", &["cat", "latest", "--range", "0..7"]);
    vault.fails(
        6,
        "is not captured",
        &["cat", "latest", "--range", "0xffffffff00000000..0xffffffffffffffff"],
    );
}

#[test]
fn wrong_usage_exits_with_2_and_says_what_is_expected() {
    let vault = Vault::new();
    let file = vault.file("image", b"memory");
    let long = "n".repeat(10_000);
    for (expected, arguments) in [
        ("--help", &[][..]),
        ("subcommand", &["frobnicate"]),
        ("power of two", &["init", "--region-size", "5000"]),
        ("lz4", &["init", "--codec", "zip"]),
        ("--pid", &["capture"]),
        ("cannot be used with", &["capture", "--pid", "1", "--file", &file]),
        ("--pid", &["watch"]),
        ("KEY=VALUE", &["capture", "--file", &file, "--label", "plain"]),
        ("START..END", &["capture", "--file", &file, "--exclude", "0..18446744073709551616"]),
        ("end after it starts", &["cat", "latest", "--range", "9..8"]),
        ("slash", &["capture", "--file", &file, "--process", "a/b"]),
        ("line break", &["capture", "--file", &file, "--process", "a\nb"]),
        ("255", &["capture", "--file", &file, "--process", &long]),
        ("duration", &["watch", "--every", "soon", "--pid", "1"]),
        ("at least", &["watch", "--every", "0s", "--pid", "1"]),
        ("seconds", &["--wait", "-1", "list"]),
        ("100", &["gc", "--max-unused", "101"]),
    ] {
        vault.fails(2, expected, arguments);
    }
}

// Beside the store

#[test]
fn completions_and_the_manual_know_every_verb() {
    let vault = Vault::new();
    let verbs = "init capture watch list show processes restore rollback cat diff history label forget gc verify \
        repair stats migrate completions man";
    for shell in ["bash", "zsh", "fish", "powershell", "elvish"] {
        let script = vault.text(&["completions", shell]);
        verbs.split_whitespace().for_each(|verb| assert!(script.contains(verb), "{verb} for {shell}"));
    }
    let page = vault.text(&["man"]);
    assert!(page.contains(".TH stillframe 1"), "{page}");
    for verb in verbs.split_whitespace() {
        assert!(page.contains(&format!(".SH \"{}\"", verb.to_uppercase())), "{verb}");
    }
    for section in ["SYNOPSIS", "ENVIRONMENT", "FILES", "\"EXIT STATUS\"", "EXAMPLES"] {
        assert!(page.contains(&format!("\n.SH {section}\n")), "{section}");
    }
    assert!(page.contains("\\fB\\-\\-region\\-size\\fR \\fIBYTES\\fR"), "options name their values: {page}");
    let help = vault.text(&["--help"]);
    assert!(help.contains("First steps") && help.contains("Exit codes"), "{help}");
    assert!(!vault.store().exists());
}

#[test]
fn a_disk_that_is_full_in_the_middle_of_a_capture_costs_that_capture_alone() {
    let vault = Vault::new();
    let small = vault.file("small", &[7; 100_000]);
    vault.capture_file(&small, "p");
    let mut state = 1u64;
    let noise = std::iter::repeat_with(|| {
        state = state.wrapping_mul(0x5851_F42D_4C95_7F2D).wrapping_add(1);
        (state ^ (state >> 29)).to_le_bytes()
    });
    let large = vault.file("large", &noise.take(3_000_000).flatten().collect::<Vec<u8>>());
    // No file may grow beyond 8 MB: the same to a program as a disk with no more room.
    let script = "trap '' XFSZ; ulimit -f 16000; exec \"$0\" --store \"$1\" capture --file \"$2\"";
    let output = Command::new("sh")
        .args(["-c", script, env!("CARGO_BIN_EXE_stillframe")])
        .arg(vault.store())
        .arg(&large)
        .output()
        .unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert!(stderr.starts_with("stillframe: cannot write "), "{stderr}");

    assert_eq!(vault.run(&["verify"]).code, Some(0));
    let back = vault.path("back").to_str().unwrap().to_owned();
    assert_eq!(vault.run(&["restore", "p@latest", "--to", &back]).code, Some(0));
    assert_eq!(fs::read(&back).unwrap(), [7; 100_000]);
    vault.capture_file(&large, "q");
    assert_eq!(vault.run(&["verify"]).code, Some(0));
}

// The past

#[test]
fn a_diff_tells_the_ranges_and_a_history_the_bytes() {
    let vault = Vault::new();
    let mut image = noise(200_000, 3);
    image[70_000..70_004].copy_from_slice(b"zero");
    let file = vault.file("vm.img", &image);
    let first = vault.capture_file(&file, "vm");
    image[70_000..70_004].copy_from_slice(b"tiny");
    image[150_000] ^= 1;
    vault.file("vm.img", &image);
    let second = vault.capture_file(&file, "vm");
    vault.file("vm.img", &image[..70_002]);
    let third = vault.capture_file(&file, "vm");

    assert_eq!(
        vault.json(&["diff", &first, &second]),
        json!({
            "ranges": [{"start": 70_000, "end": 70_004}, {"start": 150_000, "end": 150_001}],
            "differing_bytes": 5,
            "differing_regions": 2,
            "more_ranges": false,
        })
    );
    assert_eq!(vault.json(&["diff", "vm~1", "vm~2"])["differing_bytes"], 5);
    let gone = vault.json(&["diff", &second, &third]);
    assert_eq!(gone["ranges"], json!([{"start": 70_002, "end": 200_000}]));
    let text = vault.text(&["diff", &first, &second]);
    assert!(
        text.contains("0x11170..0x11174") && text.contains("both") && text.contains("5 B in 2 ranges"),
        "{text}"
    );
    let text = vault.text(&["diff", &second, &third]);
    assert!(text.lines().nth(1).is_some_and(|line| line.contains(" A ")), "{text}");
    let same = vault.run(&["diff", &first, &first]);
    assert_eq!((same.code, same.text().as_str()), (Some(0), ""));
    assert!(same.stderr.contains("the same"), "{}", same.stderr);

    let history = vault.json(&["history", "--range", "70000..70004"]);
    history.as_array().unwrap().iter().for_each(|moment| has_keys(moment, "id time bytes"));
    let found: Vec<_> = history.as_array().unwrap().iter().map(|it| (&it["id"], &it["bytes"])).collect();
    let (hex_zero, hex_tiny) = (json!("7a65726f"), json!("74696e79"));
    let expected = [(json!(first), hex_zero), (json!(second), hex_tiny), (json!(third), Value::Null)];
    assert_eq!(found, expected.each_ref().map(|(id, bytes)| (id, bytes)));
    let text = vault.text(&["history", "--range", "70000..70004", "--process", "vm"]);
    assert!(text.contains("7a 65 72 6f   |zero|") && text.contains("not captured"), "{text}");

    vault.fails(6, "0x61a80..0x61a81 is not captured", &["history", "--range", "400000..400001"]);
    vault.fails(3, "no snapshots of a process \"vn\"", &["history", "--range", "0..1", "--process", "vn"]);
    vault.fails(2, "at most 1048576", &["history", "--range", "0..1048577"]);
    vault.fails(3, "deadbeef", &["diff", &first, "deadbeef"]);
    vault.capture_file(&file, "other");
    vault.fails(2, "several processes: other, vm", &["history", "--range", "0..1"]);
}

#[test]
fn the_history_of_a_counter_in_a_running_python_is_told() {
    if !needs(&["python3"]) {
        return;
    }
    let vault = Vault::new();
    let mut python = Running::python(
        "import ctypes, signal\n\
         counter = ctypes.c_uint64(41)\n\
         def count(*_):\n    counter.value += 1\n    print(counter.value, flush=True)\n\
         signal.signal(signal.SIGUSR1, count)\n\
         print(ctypes.addressof(counter), flush=True)\n\
         while True: signal.pause()",
    );
    let address: u64 = python.line().parse().unwrap();
    let pid = python.pid_text();
    let mut ids = Vec::new();
    for step in [0, 1, 0, 1] {
        if step == 1 {
            python.signal(Signal::USR1);
            python.line();
        }
        let capture = vault.json(&["capture", "--pid", &pid, "--process", "web-1"]);
        ids.push(capture["id"].as_str().unwrap().to_owned());
    }
    python.kill();
    let range = format!("{address:#x}..{:#x}", address + 8);
    let history = vault.json(&["history", "--range", &range]);
    let moment = |at: usize, count: u64| (json!(ids[at]), json!(hex(&count.to_le_bytes())));
    let found = history.as_array().unwrap().iter().map(|it| (it["id"].clone(), it["bytes"].clone()));
    assert_eq!(found.collect::<Vec<_>>(), [moment(0, 41), moment(1, 42), moment(3, 43)]);
    let diff = vault.json(&["diff", "web-1~1", "latest"]);
    let ranges = diff["ranges"].as_array().unwrap();
    let covers = |it: &Value| it["start"].as_u64() <= Some(address) && it["end"].as_u64() > Some(address);
    assert!(ranges.iter().any(covers), "{ranges:?}");
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[test]
fn damage_that_a_look_into_the_past_meets_is_named() {
    let vault = Vault::new();
    let mut image = noise(100_000, 5);
    let file = vault.file("vm.img", &image);
    vault.json(&["capture", "--file", &file, "--process", "vm", "--no-deltas"]);
    image[50_000] ^= 1;
    vault.file("vm.img", &image);
    vault.json(&["capture", "--file", &file, "--process", "vm", "--no-deltas"]);
    // The region that changed is the only one of which both versions are stored, and begin alike.
    let part = &image[49_152..49_200];
    let mut flipped = 0;
    for pack in vault.packs() {
        let mut bytes = fs::read(&pack).unwrap();
        for at in 0..bytes.len() - part.len() {
            if bytes[at..at + part.len()] == *part {
                bytes[at + 40] ^= 1;
                flipped += 1;
            }
        }
        fs::write(pack, bytes).unwrap();
    }
    assert_eq!(flipped, 2, "noise is stored as it is");
    for arguments in [&["diff", "vm~1", "vm~0"][..], &["history", "--range", "50000..50001"]] {
        let done = vault.run(arguments);
        assert_eq!((done.code, done.text().as_str()), (Some(5), ""), "{}", done.stderr);
        assert!(done.stderr.contains("stillframe: the region "), "{}", done.stderr);
    }
    assert_eq!(vault.json(&["history", "--range", "0..9"]).as_array().unwrap().len(), 1);
}
