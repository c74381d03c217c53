//! The JSON keys of each verb. Scripts depend on them: a key may be added, none may be renamed or
//! removed.

use std::collections::BTreeSet;

use serde_json::Value;

use crate::helper::{Running, Vault, noise};

const CAPTURE: &str = "added_bytes changed_regions clock_behind_ms delta_regions elapsed_ms id left_out memory_bytes \
    new_regions parent paused_ms process shared_regions staging_full time tracking unreadable_bytes zero_bytes";
const SNAPSHOT: &str = "id labels memory_bytes parent process regions source source.kind time trigger";
const ROLLBACK: &str = "bytes elapsed_ms id left_descriptors left_not_captured_bytes left_shared paused_ms stopped written_bytes";

/// The paths of all keys: `ranges[].start`. Keys of labels and of left-out memory depend on the
/// snapshot.
fn keys_of(value: &Value) -> BTreeSet<String> {
    fn collect(value: &Value, at: &str, keys: &mut BTreeSet<String>) {
        match value {
            Value::Object(object) => {
                for (key, value) in object {
                    let path = if at.is_empty() { key.clone() } else { format!("{at}.{key}") };
                    if key != "labels" && key != "left_out" {
                        collect(value, &path, keys);
                    }
                    keys.insert(path);
                }
            }
            Value::Array(list) => list.iter().for_each(|value| collect(value, &format!("{at}[]"), keys)),
            _ => {}
        }
    }
    let mut keys = BTreeSet::new();
    collect(value, "", &mut keys);
    keys.into_iter().map(|key| key.trim_start_matches("[].").to_owned()).collect()
}

#[track_caller]
fn check(vault: &Vault, arguments: &[&str], expected: &str) -> Value {
    let value = vault.json(arguments);
    let expected: BTreeSet<String> = expected.split_whitespace().map(str::to_owned).collect();
    assert_eq!(keys_of(&value), expected, "{arguments:?}: {value}");
    value
}

#[test]
fn every_verb_prints_the_keys_of_its_contract() {
    let vault = Vault::new();
    let mut image = noise(100_000, 1);
    let file = vault.file("vm.img", &image);
    let path = |name: &str| vault.path(name).to_str().unwrap().to_owned();
    let sleep = Running::sleep();
    let pid = sleep.pid_text();

    check(&vault, &["init"], "codec format region_size store");
    check(&vault, &["capture", "--file", &file, "--process", "vm", "--exclude", "0..4096"], CAPTURE);
    image[70_000] ^= 1;
    vault.file("vm.img", &image);
    check(&vault, &["capture", "--file", &file, "--process", "vm"], CAPTURE);
    check(&vault, &["capture", "--pid", &pid, "--process", "live"], CAPTURE);
    check(&vault, &["watch", "--count", "1", "--every", "10ms", "--pid", &pid, "--process", "live"], CAPTURE);

    check(&vault, &["list", "--process", "vm"], &format!("{SNAPSHOT} source.path"));
    let mappings = "mappings mappings[].captured mappings[].end mappings[].kind mappings[].name mappings[].offset \
        mappings[].protection mappings[].start left_out unreadable unreadable_bytes excluded";
    let excluded = "excluded[].start excluded[].end";
    check(&vault, &["show", "vm~1"], &format!("{SNAPSHOT} source.path {mappings} {excluded}"));
    let shown = vault.json(&["show", "live@latest"]);
    for key in ["source.kind", "source.pid", "source.command", "source.path", "mappings[].start"] {
        assert!(keys_of(&shown).contains(key), "{key}: {shown}");
    }
    check(&vault, &["processes"], "latest latest_time process snapshots");
    check(&vault, &["label", "vm@latest", "stage=ready"], &format!("{SNAPSHOT} source.path"));

    check(&vault, &["restore", "vm@latest", "--to", &path("back")], "bytes elapsed_ms id written_bytes");
    let in_place = ["restore", "vm~1", "--to", &path("back"), "--in-place"];
    check(&vault, &in_place, "bytes elapsed_ms id written_bytes");
    let to_core = ["restore", "live@latest", "--core", &path("live.core")];
    check(&vault, &to_core, "bytes elapsed_ms id threads written_bytes");
    let core = "core core.compression core.missing_bytes core.physical_addresses";
    let from_core = ["capture", "--core", &path("live.core"), "--process", "from-core"];
    check(&vault, &from_core, &format!("{CAPTURE} {core}"));
    check(&vault, &["rollback", "live@latest", "--pid", &pid], ROLLBACK);
    check(&vault, &["restore", "live@latest", "--into-pid", &pid], ROLLBACK);

    let diff = "differing_bytes differing_regions more_ranges ranges ranges[].end ranges[].start";
    check(&vault, &["diff", "vm~1", "vm~0"], diff);
    check(&vault, &["history", "--process", "vm", "--range", "70000..70001"], "bytes id time");

    check(&vault, &["forget", "--keep-last", "1", "--process", "vm"], "forgotten freeable_bytes future kept");
    let gc = "dead_regions elapsed_ms erased_bytes freed_bytes live_regions packs_removed packs_rewritten";
    check(&vault, &["gc"], gc);
    let verify = "checked_bytes checked_objects checked_packs problems total_bytes total_objects total_packs";
    check(&vault, &["verify"], verify);
    check(&vault, &["repair"], "damaged index_rebuilt lost_snapshots objects");
    let stats = "compression_ratio dedup_ratio deltas disk_bytes index_bytes logical_bytes processes regions \
        snapshots stored_bytes unique_bytes zero_bytes";
    check(&vault, &["stats"], stats);
    check(&vault, &["migrate"], "from to");
}
