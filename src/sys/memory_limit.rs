//! How much more memory a process can get before the kernel kills a process: what its control
//! groups and the machine have left.
//!
//! Cached file memory counts as free, because the kernel reclaims it. Control groups of version 1
//! and version 2 are read; each group up to the root may have a limit.

use std::fs;
use std::path::{Path, PathBuf};

/// The memory that is left.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Headroom {
    pub(crate) bytes: u64,
    /// The owner of the limit: a control group, or the machine.
    pub(crate) of: String,
}

/// The smallest amount that any limit leaves to a process. `None` if nothing is known.
pub(crate) fn headroom(pid: u32) -> Option<Headroom> {
    let swap_bytes = meminfo("SwapFree:").unwrap_or(0);
    let machine = meminfo("MemAvailable:")
        .map(|bytes| Headroom { bytes: bytes.saturating_add(swap_bytes), of: "the machine".to_owned() });
    let cgroups = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let groups = groups(&cgroups, &mounts).into_iter().filter_map(|group| group.headroom(swap_bytes));
    groups.chain(machine).min_by_key(|headroom| headroom.bytes)
}

/// A control group that limits memory.
#[derive(Debug, PartialEq, Eq)]
struct Group {
    directory: PathBuf,
    is_version_2: bool,
}

impl Group {
    fn headroom(&self, swap_bytes: u64) -> Option<Headroom> {
        let read = |name: &str| fs::read_to_string(self.directory.join(name)).ok();
        // "max" is no number.
        let number = |name: &str| read(name)?.trim().parse::<u64>().ok();
        let statistics = read("memory.stat").unwrap_or_default();
        let sum = |keys: &[&str]| {
            let values = statistics.lines().filter_map(|line| line.split_once(' '));
            let wanted = values.filter(|(key, _)| keys.contains(key));
            wanted.filter_map(|(_, value)| value.trim().parse::<u64>().ok()).sum::<u64>()
        };
        let (limit, usage, cached, swap) = if self.is_version_2 {
            let limit = [number("memory.max"), number("memory.high")].into_iter().flatten().min()?;
            let swap = match (number("memory.swap.max"), number("memory.swap.current")) {
                (Some(max), Some(current)) => max.saturating_sub(current).min(swap_bytes),
                _ => swap_bytes,
            };
            (
                limit,
                number("memory.current")?,
                sum(&["inactive_file", "active_file", "slab_reclaimable"]),
                swap,
            )
        } else {
            let cached = sum(&["total_inactive_file", "total_active_file"]);
            let swap =
                if self.directory.join("memory.memsw.limit_in_bytes").exists() { 0 } else { swap_bytes };
            (number("memory.limit_in_bytes")?, number("memory.usage_in_bytes")?, cached, swap)
        };
        let bytes = limit.saturating_sub(usage.saturating_sub(cached)).saturating_add(swap);
        Some(Headroom { bytes, of: format!("the control group {}", self.directory.display()) })
    }
}

/// The groups in `/proc/PID/cgroup`, each followed by all groups above it, as far as they are
/// mounted here.
fn groups(cgroups: &str, mounts: &str) -> Vec<Group> {
    let mut found = Vec::new();
    for line in cgroups.lines() {
        let mut fields = line.splitn(3, ':');
        let (Some(_), Some(controllers), Some(path)) = (fields.next(), fields.next(), fields.next()) else {
            continue;
        };
        let is_version_2 = controllers.is_empty();
        if !is_version_2 && !controllers.split(',').any(|controller| controller == "memory") {
            continue;
        }
        let Some((root, mount)) = mounts.lines().find_map(|line| mount(line, is_version_2)) else { continue };
        let inside = if root == "/" { Some(path) } else { path.strip_prefix(root) };
        // "/.." stands for a group outside of the visible tree.
        let Some(inside) = inside.filter(|inside| !inside.starts_with("/..")) else { continue };
        let mut directory = PathBuf::from(mount);
        found.push(Group { directory: directory.clone(), is_version_2 });
        for name in Path::new(inside.trim_start_matches('/')) {
            directory.push(name);
            found.push(Group { directory: directory.clone(), is_version_2 });
        }
    }
    found
}

/// Root and mount point of a mount, if it is a control group hierarchy of this version that limits
/// memory.
fn mount(line: &str, is_version_2: bool) -> Option<(&str, &str)> {
    let (before, after) = line.split_once(" - ")?;
    let mut before = before.split(' ').skip(3);
    let (root, place) = (before.next()?, before.next()?);
    let mut after = after.split(' ');
    let (kind, options) = (after.next()?, after.nth(1)?);
    let is_it = match is_version_2 {
        true => kind == "cgroup2",
        false => kind == "cgroup" && options.split(',').any(|option| option == "memory"),
    };
    is_it.then_some((root, place))
}

fn meminfo(key: &str) -> Option<u64> {
    let info = fs::read_to_string("/proc/meminfo").ok()?;
    let value = info.lines().find_map(|line| line.strip_prefix(key))?;
    value.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_of_both_versions_are_found_with_those_above_them() {
        let mounts = "30 23 0:26 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n\
            31 23 0:27 /outer /sys/fs/cgroup/unified rw shared:9 - cgroup2 cgroup2 rw\n";
        let found = groups("7:cpu,memory:/a/b\n0::/outer/c\n3:cpu:/x\n", mounts);
        let found: Vec<_> =
            found.iter().map(|it| (it.directory.to_str().unwrap(), it.is_version_2)).collect();
        let (one, two) = ("/sys/fs/cgroup/memory", "/sys/fs/cgroup/unified");
        let expected =
            [one.to_owned(), format!("{one}/a"), format!("{one}/a/b"), two.to_owned(), format!("{two}/c")];
        assert_eq!(found.iter().map(|it| it.0).collect::<Vec<_>>(), expected);
        assert_eq!(found.iter().map(|it| it.1).collect::<Vec<_>>(), [false, false, false, true, true]);
        assert_eq!(groups("0::/../sibling\n", &mounts.replace("/outer", "/")), []);
    }

    #[test]
    fn what_is_left_is_the_limit_less_what_is_used_and_not_cached() {
        let dir = tempfile::tempdir().unwrap();
        let group = |files: &[(&str, &str)], is_version_2| {
            for (name, text) in files {
                fs::write(dir.path().join(name), text).unwrap();
            }
            let group = Group { directory: dir.path().to_owned(), is_version_2 };
            group.headroom(7).map(|headroom| headroom.bytes)
        };
        let files = [("memory.max", "max\n"), ("memory.high", "1000\n"), ("memory.current", "900\n")];
        assert_eq!(group(&files, true), Some(107));
        assert_eq!(
            group(&[("memory.stat", "anon 1\ninactive_file 300\nactive_file 100\n")], true),
            Some(507)
        );
        assert_eq!(group(&[("memory.swap.max", "5\n"), ("memory.swap.current", "3\n")], true), Some(502));
        assert_eq!(group(&[("memory.high", "max\n")], true), None);
        assert_eq!(
            group(&[("memory.limit_in_bytes", "50"), ("memory.usage_in_bytes", "60")], false),
            Some(7)
        );
    }

    #[test]
    fn this_machine_has_some_left() {
        assert!(headroom(std::process::id()).is_some_and(|headroom| headroom.bytes > 1 << 20));
    }
}
