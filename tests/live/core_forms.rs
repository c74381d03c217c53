//! Cores in special forms: compressed, truncated, of a machine's memory, of a sparse address space.
//! Also what debuggers read from the cores that a restore writes.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use stillframe::source::{Compression, CoreSource, LiveProcessSource, SourceError};
use stillframe::{AddressRange, CaptureOptions, SnapshotId};

use super::cores::{Place, gdb_command, told};
use crate::needs::needs;
use crate::noise::noise;

const MIB: usize = 1 << 20;

fn capture(place: &Place, source: &CoreSource) -> Result<SnapshotId, stillframe::Error> {
    place.store.process("core").capture(source, &CaptureOptions::default()).map(|taken| taken.id)
}

fn image(place: &Place, id: SnapshotId) -> Vec<u8> {
    place.store.restore(id).unwrap().into_mapping().unwrap().to_vec()
}

/// A core, built from segments: virtual address, physical address, length and bytes of each.
fn core(segments: &[(u64, u64, u64, &[u8])]) -> Vec<u8> {
    let mut at = (64 + 56 * segments.len() as u64).next_multiple_of(4096);
    let count = u16::try_from(segments.len()).unwrap();
    let mut bytes = [&b"\x7fELF\x02\x01\x01"[..], &[0; 9]].concat();
    for number in [4u16, 62] {
        bytes.extend(number.to_le_bytes());
    }
    bytes.extend(1u32.to_le_bytes());
    for number in [0u64, 64, 0] {
        bytes.extend(number.to_le_bytes());
    }
    bytes.extend(0u32.to_le_bytes());
    for number in [64u16, 56, count, 0, 0, 0] {
        bytes.extend(number.to_le_bytes());
    }
    for (start, physical, length, content) in segments {
        bytes.extend([1u32, 6].iter().flat_map(|number| number.to_le_bytes()));
        let numbers = [at, *start, *physical, content.len() as u64, *length, 4096];
        bytes.extend(numbers.iter().flat_map(|number| number.to_le_bytes()));
        at += content.len() as u64;
    }
    bytes.resize(bytes.len().next_multiple_of(4096), 0);
    segments.iter().for_each(|segment| bytes.extend(segment.3));
    bytes
}

/// The output of a command that gets these bytes as input.
fn filtered(command: &str, bytes: &[u8]) -> Vec<u8> {
    let mut words = command.split(' ');
    let mut child = Command::new(words.next().unwrap());
    let mut child = child.args(words).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut input = child.stdin.take().unwrap();
    let output = std::thread::scope(|scope| {
        scope.spawn(move || input.write_all(bytes).unwrap());
        child.wait_with_output().unwrap()
    });
    assert!(output.status.success());
    output.stdout
}

fn why(error: &stillframe::Error) -> &str {
    match error {
        stillframe::Error::Source(SourceError::NotACore { why, .. }) => why,
        other => panic!("{other:?}"),
    }
}

// ---- Compressed ---------------------------------------------------------------------------------

#[test]
fn a_compressed_core_is_what_it_decompresses_to() {
    let place = Place::new();
    let content = [noise(3 * MIB, 1), vec![0; 2 * MIB], noise(5000, 2)].concat();
    let plain = core(&[(0x10_0000, 0, content.len() as u64, &content)]);
    for (command, by) in [
        ("zstd -q -c", Compression::Zstd),
        ("lz4 -q -c -B4", Compression::Lz4),
        ("gzip -c", Compression::Gzip),
    ] {
        if !needs(&[command.split(' ').next().unwrap()]) {
            continue;
        }
        let path = place.path(&format!("core.{}", by.name()));
        let compressed = filtered(command, &plain);
        // In two parts, as tools that work in parallel or append write them, and with further bytes
        // after the core.
        let parts = [
            filtered(command, &plain[..MIB]),
            filtered(command, &plain[MIB..]),
            filtered(command, &[7; 9000]),
        ];
        for bytes in [&compressed, &parts.concat()] {
            std::fs::write(&path, bytes).unwrap();
            let open = CoreSource::new(&path).read().unwrap();
            assert_eq!((open.compression(), open.missing_bytes()), (Some(by), 0));
            let id = place.store.process("core").capture(&open, &CaptureOptions::default()).unwrap().id;
            assert!(image(&place, id) == content, "{command}");
        }
        // Truncated: refused by default, and captured as far as it goes if the caller allows
        // partial cores.
        std::fs::write(&path, &compressed[..compressed.len() / 2]).unwrap();
        let error = capture(&place, &CoreSource::new(&path)).unwrap_err();
        assert!(why(&error).contains(by.name()) && why(&error).contains("cut short"), "{error}");
        let source = CoreSource::new(&path).partial(true);
        let missing_bytes = usize::try_from(source.read().unwrap().missing_bytes()).unwrap();
        assert!(missing_bytes > MIB && missing_bytes < content.len(), "{missing_bytes}");
        let id = capture(&place, &source).unwrap();
        let there = content.len() - missing_bytes;
        assert!(image(&place, id)[..there] == content[..there], "{command}");
        // With one wrong bit.
        let mut damaged = compressed.clone();
        let middle = damaged.len() / 2;
        damaged[middle] ^= 0x10;
        std::fs::write(&path, damaged).unwrap();
        for source in [CoreSource::new(&path), CoreSource::new(&path).partial(true)] {
            // zstd and gzip detect it only by the checksum at their end, which may come after the
            // core's.
            match capture(&place, &source) {
                Err(error) => {
                    assert!(why(&error).contains("damaged") || why(&error).contains("cut short"), "{error}")
                }
                Ok(_) => panic!("{command}: a damaged core is taken"),
            }
        }
    }
}

#[test]
fn what_is_compressed_otherwise_or_is_no_core_is_refused_by_name() {
    let place = Place::new();
    let (zstd, gzip) = (
        zstd::encode_all(&[7u8; 100_000][..], 1).unwrap(),
        b"\x1f\x8b\x08\0\0\0\0\0\0\x03\x03\0\0\0\0\0\0\0\0\0",
    );
    for (bytes, words) in [
        (&b"\xfd7zXZ\0\0\x04"[..], ["xz", "xz -dk"]),
        (b"BZh91AY&SY", ["bzip2", "bzip2 -dk"]),
        (&zstd, ["compressed by zstd", "no ELF file"]),
        (gzip, ["compressed by gzip", "no core"]),
    ] {
        std::fs::write(place.path("c"), bytes).unwrap();
        let error = capture(&place, &CoreSource::new(place.path("c"))).unwrap_err();
        assert!(words.iter().all(|word| why(&error).contains(word)), "{error}");
    }
}

#[test]
fn a_small_file_that_becomes_large_is_stopped_before_the_disk_is_full_and_costs_nothing_if_it_is_zeros() {
    let place = Place::new();
    // A GiB of zeros according to its headers, compressed by hand: the header, and many frames of
    // zeros.
    let length = 1u64 << 30;
    let head = core(&[(0x10_0000, 0, 5, &[1; 5])]);
    let mut head = head[..4096].to_vec();
    head[64 + 32..64 + 40].copy_from_slice(&length.to_le_bytes());
    head[64 + 40..64 + 48].copy_from_slice(&length.to_le_bytes());
    let mut bytes = zstd::encode_all(&head[..], 1).unwrap();
    let zeros = zstd::encode_all(&vec![0; 64 * MIB][..], 1).unwrap();
    // More bytes than its headers declare.
    (0..20).for_each(|_| bytes.extend(&zeros));
    std::fs::write(place.path("bomb"), &bytes).unwrap();
    let open = CoreSource::new(place.path("bomb")).read().unwrap();
    let taken = place.store.process("bomb").capture(&open, &CaptureOptions::default()).unwrap();
    assert_eq!((taken.memory_bytes, taken.zero_bytes), (length, length));

    // One without zeros, where there is little free space.
    let small = place.path("small");
    std::fs::create_dir(&small).unwrap();
    let mut mount = Command::new("mount");
    if !mount
        .args(["-t", "tmpfs", "-o", "size=64m", "tmpfs"])
        .arg(&small)
        .output()
        .is_ok_and(|it| it.status.success())
    {
        return eprintln!("passed over: needs to mount (root)");
    }
    let mut bytes = zstd::encode_all(&head[..], 1).unwrap();
    let sevens = zstd::encode_all(&vec![7; 64 * MIB][..], 1).unwrap();
    (0..64).for_each(|_| bytes.extend(&sevens));
    std::fs::write(place.path("bomb"), &bytes).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_stillframe"));
    command.arg("--store").arg(place.path("other")).args(["capture", "--core"]).arg(place.path("bomb"));
    let output = command.env("TMPDIR", &small).output().unwrap();
    let left = std::fs::read_dir(&small).unwrap().count();
    let free = rustix::fs::statvfs(&small).unwrap();
    assert!(Command::new("umount").arg(&small).status().unwrap().success());
    assert_eq!(output.status.code(), Some(6), "{}", told(&output));
    assert!(told(&output).contains("no room") && told(&output).contains("TMPDIR"), "{}", told(&output));
    assert_eq!((left, free.f_bfree), (0, free.f_blocks), "nothing is left of it");
    assert!(!place.path("other").exists());
}

// ---- Truncated cores, and cores of machines
// ------------------------------------------------------

#[test]
fn what_a_core_lacks_that_is_cut_short_is_told_and_nothing_else_is_lost() {
    let place = Place::new();
    let (first, second) = (noise(40_000, 1), noise(50_000, 2));
    let whole = core(&[(0x10_0000, 0, 40_000, &first), (0x20_0000, 0, 60_000, &second)]);
    let path = place.path("core");
    for lacks in [1, 4096, 20_000, 50_000, 60_000, 90_000] {
        std::fs::write(&path, &whole[..whole.len() - lacks]).unwrap();
        let error = capture(&place, &CoreSource::new(&path)).unwrap_err();
        assert!(why(&error).contains("cut short") && why(&error).contains("--partial"), "{error}");
        let source = CoreSource::new(&path).partial(true);
        assert_eq!(source.read().unwrap().missing_bytes(), lacks as u64);
        let id = capture(&place, &source).unwrap();
        let there = 90_000 - lacks;
        let image = image(&place, id);
        assert_eq!(image.len(), 90_000);
        assert!(image[..there] == [&first[..], &second].concat()[..there]);
        let space = place.store.snapshot(id).unwrap().address_space().unwrap();
        let unreadable: u64 = space.unreadable().iter().map(|range| range.length_bytes()).sum();
        assert_eq!(unreadable, lacks as u64);
    }
    // The headers must be complete.
    std::fs::write(&path, &whole[..100]).unwrap();
    let error = capture(&place, &CoreSource::new(&path).partial(true)).unwrap_err();
    assert!(why(&error).contains("within its headers"), "{error}");

    // The command reports how much is missing.
    std::fs::write(&path, &whole[..whole.len() - 20_000]).unwrap();
    let stillframe = |arguments: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_stillframe"));
        command.arg("--store").arg(place.path("other")).args(arguments).arg(&path).output().unwrap()
    };
    let refused = stillframe(&["capture", "--core"]);
    assert_eq!(refused.status.code(), Some(6));
    let output = stillframe(&["--json", "capture", "--partial", "--core"]);
    let json: serde_json::Value =
        serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{}", told(&output)));
    assert_eq!((&json["core"]["missing_bytes"], &json["core"]["compression"]), (&20_000.into(), &().into()));
    assert!(told(&stillframe(&["capture", "--partial", "--core"])).contains("19.5 KiB are missing"));
}

#[test]
fn a_dump_of_a_machine_with_physical_addresses_only_is_read_by_those() {
    let place = Place::new();
    let (low, high) = (noise(8192, 1), noise(16_384, 2));
    for nothing in [0, u64::MAX] {
        let dump = core(&[(nothing, 0, 8192, &low), (nothing, 0x10_0000, 16_384, &high)]);
        std::fs::write(place.path("dump"), dump).unwrap();
        let open = CoreSource::new(place.path("dump")).read().unwrap();
        assert!(open.has_physical_addresses());
        let id = place.store.process("vm").capture(&open, &CaptureOptions::default()).unwrap().id;
        let found: Vec<_> = {
            let space = place.store.snapshot(id).unwrap().address_space().unwrap();
            space.captured().map(|(_, it)| (it.range.start(), it.range.end(), it.name.clone())).collect()
        };
        let name = || "[physical]".to_owned();
        assert_eq!(found, [(0, 8192, name()), (0x10_0000, 0x10_4000, name())]);
        assert!(image(&place, id) == [&low[..], &high].concat());
        // The restored core has both kinds of addresses.
        let back = place.path("back");
        place.store.restore(id).unwrap().overwrite(true).into_core(&back).unwrap();
        let bytes = std::fs::read(&back).unwrap();
        let number = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
        assert_eq!(
            [number(64 + 16), number(64 + 24), number(64 + 56 + 16), number(64 + 56 + 24)],
            [0, 0, 0x10_0000, 0x10_0000]
        );
    }
}

// ---- Written cores ------------------------------------------------------------------------------

/// Compiles this program, starts it, and returns it with the first line that it printed.
fn started(place: &Place, text: &str, flags: &[&str]) -> Option<(Child, String, PathBuf)> {
    if !needs(&["cc"]) {
        return None;
    }
    let (source, path) = (place.path("program.c"), place.path("program"));
    std::fs::write(&source, text).unwrap();
    let built = Command::new("cc").args(flags).arg("-o").arg(&path).arg(&source).output().unwrap();
    assert!(built.status.success(), "{}", told(&built));
    let mut child = Command::new(&path)
        .current_dir(place.directory.path())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
    Some((child, line.trim().to_owned(), path))
}

fn end(mut child: Child) {
    child.kill().unwrap();
    child.wait().unwrap();
}

fn gdb(program: &Path, core: &Path, commands: &[&str]) -> String {
    told(&gdb_command(&[program.to_str().unwrap(), core.to_str().unwrap()], commands).output().unwrap())
}

/// The bytes of the first note of this type.
fn note(core: &[u8], wanted: u32) -> Option<Vec<u8>> {
    let number = |at: usize, bytes: usize| {
        core[at..at + bytes].iter().rev().fold(0u64, |n, byte| n << 8 | u64::from(*byte))
    };
    let at = |number: u64| usize::try_from(number).unwrap();
    for header in 0..number(56, 2) {
        let header = at(number(32, 8) + header * 56);
        if number(header, 4) != 4 {
            continue;
        }
        let (mut note, end) = (at(number(header + 8, 8)), at(number(header + 8, 8) + number(header + 32, 8)));
        while note < end {
            let (name, length, kind) = (number(note, 4), number(note + 4, 4), number(note + 8, 4));
            let bytes = note + 12 + at(name).next_multiple_of(4);
            if kind == u64::from(wanted) {
                return Some(core[bytes..bytes + at(length)].to_vec());
            }
            note = bytes + at(length).next_multiple_of(4);
        }
    }
    None
}

const TERABYTES: &str = r#"
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>
char *large;
int main(void) {
    large = mmap(0, 1ul << 40, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (large == MAP_FAILED) return puts("no"), 1;
    large[0] = 1;
    strcpy(large + (5ul << 37) + 12345, "amid");
    strcpy(large + (1ul << 40) - 8, "the end");
    printf("%p\n", (void *)large);
    fflush(stdout);
    for (;;) pause();
}
"#;

#[test]
fn a_core_of_terabytes_that_are_hardly_used_is_as_long_as_what_is_used() {
    let place = Place::new();
    let Some((child, line, program)) = started(&place, TERABYTES, &["-g"]) else { return };
    if line == "no" {
        end(child);
        return eprintln!("passed over: 1 TiB of addresses are not given here (vm.overcommit_memory)");
    }
    let large = u64::from_str_radix(line.trim_start_matches("0x"), 16).unwrap();
    let taken =
        place.store.process("large").capture(&LiveProcessSource::new(child.id()), &CaptureOptions::default());
    end(child);
    let taken = taken.unwrap();
    assert!(taken.memory_bytes > 1 << 40);
    let path = place.path("core");
    let stats = place.store.restore(taken.id).unwrap().into_core(&path).unwrap();
    assert!(stats.bytes < 256 << 20, "{} bytes", stats.bytes);
    assert_eq!(std::fs::metadata(&path).unwrap().size(), stats.bytes);

    if needs(&["gdb"]) {
        let commands = [
            "print (int)large[0]",
            "print large + (5ul << 37) + 12345",
            "print large + (1ul << 40) - 8",
            "print (int)large[3ul << 37]",
            "backtrace",
        ];
        let said = gdb(&program, &path, &commands);
        for expected in ["$1 = 1\n", "\"amid\"", "\"the end\"", "$4 = 0\n", " main ("] {
            assert!(said.contains(expected), "{expected}: {said}");
        }
    }
    // A capture of the restored core has the same memory.
    let again = capture(&place, &CoreSource::new(&path)).unwrap();
    let [first, second] = [taken.id, again].map(|id| place.store.snapshot(id).unwrap());
    let of_large = |snapshot: &stillframe::Snapshot<'_>| {
        let space = snapshot.address_space().unwrap();
        let it =
            space.captured().find(|(_, it)| it.range.start() <= large && large < it.range.end()).unwrap().1;
        it.range
    };
    assert_eq!(of_large(&second), of_large(&first));
    for at in [large, large + (5 << 37) + 12_000, large + (1 << 40) - 4096] {
        let range = AddressRange::with_length(at, 4096).unwrap();
        let read = |snapshot: &stillframe::Snapshot<'_>| {
            let mut bytes = Vec::new();
            snapshot.read_range(range, &mut bytes).unwrap();
            bytes
        };
        assert!(read(&second) == read(&first));
    }
}

const MAPPED: &str = r#"
#include <fcntl.h>
#include <stdio.h>
#include <sys/mman.h>
#include <unistd.h>
char *file;
int main(void) {
    file = mmap(0, 5 << 20, PROT_READ, MAP_PRIVATE, open("file", O_RDONLY), 0);
    if (file == MAP_FAILED) return puts("no"), 1;
    printf("%p\n", (void *)file);
    fflush(stdout);
    for (;;) pause();
}
"#;

#[test]
fn a_debugger_does_not_see_todays_file_where_something_was_left_out() {
    let place = Place::new();
    // The file: a MiB of `b`, three MiB of zeros, and a MiB of `b`.
    let before = [vec![b'b'; MIB], vec![0; 3 * MIB], vec![b'b'; MIB]].concat();
    std::fs::write(place.path("file"), &before).unwrap();
    let Some((child, line, program)) = started(&place, MAPPED, &["-g"]) else { return };
    let file = u64::from_str_radix(line.trim_start_matches("0x"), 16).unwrap();
    let exclude = vec![AddressRange::with_length(file + 8192, 8192).unwrap()];
    let options = CaptureOptions::new().exclude(exclude);
    let taken = place.store.process("mapped").capture(&LiveProcessSource::new(child.id()), &options);
    end(child);
    let core = place.path("core");
    place.store.restore(taken.unwrap().id).unwrap().into_core(&core).unwrap();
    // Another file of the same name and length.
    std::fs::write(place.path("file"), vec![b'T'; 5 * MIB]).unwrap();
    if !needs(&["gdb"]) {
        return;
    }
    let said = gdb(
        &program,
        &core,
        &[
            "print file[0]",
            "print file[10000]",
            "print file[17000]",
            "print (int)file[2000000]",
            "print file[5000000]",
        ],
    );
    for expected in ["$1 = 98 'b'", "$2 = 98 'b'", "$3 = 0", "$4 = 98 'b'"] {
        assert!(said.contains(expected), "{expected}: {said}");
    }
    assert!(said.contains("Cannot access memory at address"), "{said}");
    assert!(!said.contains("'T'"), "{said}");
}

const CRASHES: &str = r#"
#include <stdio.h>
#include <stdlib.h>
int main(void) { puts("here"); fflush(stdout); getchar(); abort(); }
"#;

#[test]
fn the_layout_of_the_registers_is_what_the_kernel_writes_and_comes_back() {
    const XSAVE_LAYOUT: u32 = 0x205;
    let place = Place::new();
    let Some((child, _, program)) = started(&place, CRASHES, &[]) else { return };
    let taken =
        place.store.process("p").capture(&LiveProcessSource::new(child.id()), &CaptureOptions::default());
    end(child);
    let restored = |id: SnapshotId, name: &str| {
        place.store.restore(id).unwrap().into_core(place.path(name)).unwrap();
        std::fs::read(place.path(name)).unwrap()
    };
    let ours = note(&restored(taken.unwrap().id, "ours"), XSAVE_LAYOUT);
    if cfg!(not(target_arch = "x86_64")) {
        return assert_eq!(ours, None);
    }
    let again = capture(&place, &CoreSource::new(place.path("ours"))).unwrap();
    assert_eq!(note(&restored(again, "again"), XSAVE_LAYOUT), ours);

    let directory = place.path("crash");
    std::fs::create_dir(&directory).unwrap();
    let mut shell = Command::new("sh");
    shell
        .args(["-c", "ulimit -c unlimited 2>/dev/null; echo | \"$0\""])
        .arg(&program)
        .current_dir(&directory);
    shell.output().unwrap();
    let Some(kernels) = std::fs::read_dir(&directory).unwrap().next() else {
        return eprintln!("passed over: needs the kernel to leave cores (ulimit -c, kernel.core_pattern)");
    };
    let kernels = std::fs::read(kernels.unwrap().path()).unwrap();
    match note(&kernels, XSAVE_LAYOUT) {
        Some(kernels) => assert_eq!(ours, Some(kernels)),
        None => eprintln!("passed over: needs Linux 6.12, whose cores have the note"),
    }
}
