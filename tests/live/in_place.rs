//! Memory files that a process has mapped, restored in place.

use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use memmap2::MmapMut;

use super::rollback::Vault;
use crate::needs::passed_over;

const BYTES: usize = 4 << 20;

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn mapped(file: &File) -> MmapMut {
    // SAFETY: only this test could truncate the file, and it does not.
    unsafe { MmapMut::map_mut(file).unwrap() }
}

/// Writes bytes that compress badly, from a page on.
fn scribble(memory: &mut [u8], page: usize, seed: u8) {
    for (at, byte) in memory[page * 4096..][..3 * 4096].iter_mut().enumerate() {
        *byte = (at as u8).wrapping_mul(31) ^ seed;
    }
}

/// Captures the file, changes it, restores it in place under another name, and checks it through a
/// mapping.
fn goes_back(vault: &Vault, file: &File, name: &Path, by_name: &Path) {
    let mut memory = mapped(file);
    scribble(&mut memory, 3, 1);
    scribble(&mut memory, 700, 2);
    let then = memory.to_vec();
    vault.json(&["capture", "--file", text(name), "--process", "vm"]);
    let inode = fs::metadata(name).unwrap().ino();
    scribble(&mut memory, 3, 9);
    scribble(&mut memory, 50, 3);
    memory[700 * 4096..701 * 4096].fill(0);
    let done = vault.json(&["restore", "vm@latest", "--to", text(by_name), "--in-place"]);
    assert_eq!(done["bytes"], BYTES);
    assert!(memory[..] == then[..], "the mapping does not see it");
    assert_eq!(fs::metadata(name).unwrap().ino(), inode);
    let written = done["written_bytes"].as_u64().unwrap();
    assert_eq!(written, 7 * 4096, "only what differs");
    let again = vault.json(&["restore", "vm@latest", "--to", text(by_name), "--in-place"]);
    assert_eq!(again["written_bytes"], 0);
}

fn new_file(path: &Path) -> File {
    let file = File::options().read(true).write(true).create_new(true).open(path).unwrap();
    file.set_len(BYTES as u64).unwrap();
    file
}

#[test]
fn who_has_a_file_mapped_is_back_at_the_snapshot() {
    let vault = Vault::new();
    let on_disk = vault.directory.path().join("ram");
    goes_back(&vault, &new_file(&on_disk), &on_disk, &on_disk);
    if Path::new("/dev/shm").exists() {
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let in_memory = dir.path().join("ram");
        goes_back(&vault, &new_file(&in_memory), &in_memory, &in_memory);
        // Holes are neither read through the mapping nor filled.
        let sparse = dir.path().join("sparse");
        let file = new_file(&sparse);
        file.write_all_at(&[7; 5000], 1 << 20).unwrap();
        vault.json(&["capture", "--file", text(&sparse), "--process", "sparse"]);
        file.write_all_at(&[8; 5000], 3 << 20).unwrap();
        vault.json(&["restore", "sparse@latest", "--to", text(&sparse), "--in-place"]);
        assert!(file.metadata().unwrap().blocks() * 512 <= 32 << 10);
        let mut there = vec![1; 5000];
        file.read_exact_at(&mut there, 3 << 20).unwrap();
        assert!(there == [0; 5000]);
    }
}

#[test]
fn what_was_zeros_is_zeros_again_however_much_it_was() {
    let vault = Vault::new();
    let ram = vault.directory.path().join("ram");
    let file = File::options().read(true).write(true).create_new(true).open(&ram).unwrap();
    file.set_len(100 << 20).unwrap();
    vault.json(&["capture", "--file", text(&ram), "--process", "vm"]);
    let places = [0, (33 << 20) + 4096, (100 << 20) - 5000];
    places.iter().for_each(|at| file.write_all_at(&[7; 5000], *at).unwrap());
    vault.json(&["restore", "vm@latest", "--to", text(&ram), "--in-place"]);
    for at in places {
        let mut there = vec![1; 5000];
        file.read_exact_at(&mut there, at).unwrap();
        assert!(there == [0; 5000], "at {at}");
    }
}

#[test]
fn a_memfd_of_another_process_is_restored_by_its_descriptor() {
    let vault = Vault::new();
    let memfd = rustix::fs::memfd_create("ram", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    let file = File::from(memfd);
    file.set_len(BYTES as u64).unwrap();
    let name = PathBuf::from(format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd()));
    goes_back(&vault, &file, &name, &name);
}

#[test]
fn what_does_not_fit_is_refused_and_left() {
    let vault = Vault::new();
    let ram = vault.directory.path().join("ram");
    let file = new_file(&ram);
    let mut memory = mapped(&file);
    scribble(&mut memory, 3, 1);
    vault.json(&["capture", "--file", text(&ram), "--process", "vm"]);
    let refused = |to: &Path, options: &[&str], expected: &str| {
        let output = vault.run(&[&["restore", "vm@latest", "--to", text(to)], options].concat());
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.code() == Some(6) && stderr.contains(expected), "{stderr}");
    };
    let short = vault.directory.path().join("short");
    fs::write(&short, [7; 5000]).unwrap();
    refused(&short, &["--in-place"], "expected a target of 4194304 bytes");
    assert_eq!(fs::read(&short).unwrap(), [7; 5000]);
    refused(vault.directory.path(), &["--in-place"], "is not a regular file");
    refused(Path::new("/dev/null"), &["--in-place"], "is not a regular file");
    refused(&vault.directory.path().join("nothing"), &["--in-place"], "cannot look at");
    // The restore would create another file, and this process would keep the old one.
    scribble(&mut memory, 3, 9);
    refused(&ram, &["--force"], "--in-place writes into the existing file");
    assert_eq!(
        vault.run(&["restore", "vm@latest", "--to", text(&ram), "--in-place", "--force"]).status.code(),
        Some(2)
    );
    drop(memory);
    assert_eq!(vault.run(&["restore", "vm@latest", "--to", text(&ram), "--force"]).status.code(), Some(0));
}

#[test]
fn the_same_command_completes_what_was_killed() {
    let vault = Vault::new();
    let ram = vault.directory.path().join("ram");
    let file = File::options().read(true).write(true).create_new(true).open(&ram).unwrap();
    file.set_len(64 << 20).unwrap();
    let mut memory = mapped(&file);
    let fill =
        |memory: &mut [u8], seed: u8| (0..16_000).step_by(4).for_each(|page| scribble(memory, page, seed));
    fill(&mut memory, 1);
    let then = memory.to_vec();
    vault.json(&["capture", "--file", text(&ram), "--process", "vm"]);
    fill(&mut memory, 9);
    let command = ["restore", "vm@latest", "--to", text(&ram), "--in-place"];
    let begun = Instant::now();
    vault.json(&command);
    let took = begun.elapsed();
    for part in 1..6u32 {
        fill(&mut memory, 9);
        let mut tool = vault.command(&command).spawn().unwrap();
        std::thread::sleep(Duration::from_secs_f64(took.as_secs_f64() * f64::from(part) / 6.0));
        let _ = tool.kill();
        tool.wait().unwrap();
        vault.json(&command);
        assert!(memory[..] == then[..], "part {part}");
    }
}

#[test]
fn files_of_huge_pages_are_restored_in_place_and_new() {
    let mount_at = tempfile::tempdir().unwrap();
    let pages = Path::new("/proc/sys/vm/nr_hugepages");
    let before = fs::read_to_string(pages).unwrap_or_default();
    let mounted = Command::new("mount").args(["-t", "hugetlbfs", "none"]).arg(mount_at.path()).output();
    if !mounted.is_ok_and(|mounted| mounted.status.success()) {
        return passed_over("it needs root, mount (Debian package mount) and huge pages, for hugetlbfs");
    }
    let wanted = before.trim().parse::<u64>().unwrap_or(0) + 12;
    fs::write(pages, wanted.to_string()).unwrap();
    let result = std::panic::catch_unwind(|| {
        let got: u64 = fs::read_to_string(pages).unwrap().trim().parse().unwrap();
        if got < wanted {
            return passed_over("it needs 12 huge pages that are free");
        }
        let vault = Vault::new();
        let ram = mount_at.path().join("ram");
        goes_back(&vault, &new_file(&ram), &ram, &ram);
        let back = mount_at.path().join("back");
        vault.json(&["restore", "vm@latest", "--to", text(&back)]);
        let read = |path: &Path| {
            let mut bytes = vec![0; BYTES];
            File::open(path).unwrap().read_exact_at(&mut bytes, 0).unwrap();
            bytes
        };
        assert!(read(&ram) == read(&back));
    });
    Command::new("umount").arg(mount_at.path()).status().unwrap();
    fs::write(pages, before).unwrap();
    result.unwrap();
}
