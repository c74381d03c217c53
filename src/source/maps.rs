//! The lines of `/proc/PID/maps`, as bytes, because a file name may have any byte but NUL.
//! `/proc/PID/smaps` has the same lines, each followed by further fields of its mapping.
//!
//! ```text
//! 55d0c8a5b000-55d0c8a5d000 r--p 00002000 fe:00 1234        /usr/bin/a name (deleted)
//! start        end          perm offset   dev   inode       name, may be empty
//! VmFlags: rd mr mw me sd                                   only in smaps, among other fields
//! ```

use crate::address_space::{Mapping, MappingKind, Protection};
use crate::units::AddressRange;

/// One line of `/proc/PID/maps`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct MapsLine {
    pub(crate) mapping: Mapping,
    /// Major and minor number of the file system, which the mount table has too.
    pub(crate) device: (u32, u32),
    /// The file's number in it; 0 for none.
    pub(crate) inode: u64,
    /// Only from smaps.
    pub(crate) flags: Flags,
    /// How many bytes the kernel may discard unless they are written before (`MADV_FREE`); only
    /// from smaps. `None` if the field has an unknown form.
    pub(crate) lazily_free_bytes: Option<u64>,
    /// Whether an absent page is a page of zeros: the mapping has no other backing.
    pub(crate) absent_is_zero: bool,
}

/// The flags of a mapping in `VmFlags`; all `false` if they were not read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Flags {
    /// A userfaultfd fills missing pages (`um`).
    pub(crate) is_filled: bool,
    /// A userfaultfd is notified before pages of the file are mapped, and may write to them first
    /// (`ui`).
    pub(crate) is_continued: bool,
    /// It is device memory (`io`, `pf`).
    pub(crate) is_device_memory: bool,
    /// It has huge pages of the pool (`ht`).
    pub(crate) is_hugetlb: bool,
    /// A userfaultfd is notified of writes to it (`uw`).
    pub(crate) tells_writes: bool,
    /// It is locked in memory (`lo`).
    pub(crate) is_locked: bool,
    /// It may have guard pages (`gu`; reported by Linux 6.18 and newer).
    pub(crate) may_have_guards: bool,
}

impl Flags {
    /// Parses the words behind `VmFlags:`.
    fn parse(words: &[u8]) -> Flags {
        let mut flags = Flags::default();
        for word in words.split(|byte| *byte == b' ') {
            match word {
                b"um" => flags.is_filled = true,
                b"ui" => flags.is_continued = true,
                b"io" | b"pf" => flags.is_device_memory = true,
                b"ht" => flags.is_hugetlb = true,
                b"uw" => flags.tells_writes = true,
                b"lo" => flags.is_locked = true,
                b"gu" => flags.may_have_guards = true,
                _ => {}
            }
        }
        flags
    }
}

/// All mappings in `/proc/PID/smaps`, with their flags. The error is the first line with an unknown
/// form.
pub(crate) fn parse_smaps(smaps: &[u8]) -> Result<Vec<MapsLine>, String> {
    let mut lines: Vec<MapsLine> = Vec::new();
    for line in smaps.split(|byte| *byte == b'\n') {
        match line.first() {
            None => {}
            // "Rss:", "VmFlags:" … The line of a mapping begins with a digit of its address.
            Some(first) if first.is_ascii_uppercase() => {
                // A capture does not need the fields below, so an unknown form of them is no error
                // here.
                let Some(last) = lines.last_mut() else { continue };
                if let Some(words) = line.strip_prefix(b"VmFlags:") {
                    last.flags = Flags::parse(words);
                } else if let Some(amount) = line.strip_prefix(b"LazyFree:") {
                    last.lazily_free_bytes = kibibytes(amount);
                }
            }
            Some(_) => {
                lines.push(parse_line(line).ok_or_else(|| String::from_utf8_lossy(line).into_owned())?);
            }
        }
    }
    Ok(lines)
}

/// All lines. The error is the first line with an unknown form.
pub(crate) fn parse(maps: &[u8]) -> Result<Vec<MapsLine>, String> {
    maps.split(|byte| *byte == b'\n')
        .filter(|line| !line.is_empty())
        .map(|line| parse_line(line).ok_or_else(|| String::from_utf8_lossy(line).into_owned()))
        .collect()
}

fn parse_line(line: &[u8]) -> Option<MapsLine> {
    let (range, rest) = split_field(line)?;
    let (permissions, rest) = split_field(rest)?;
    let (offset, rest) = split_field(rest)?;
    let (device, rest) = split_field(rest)?;
    let (inode, rest) = split_field(rest).unwrap_or((rest, b""));

    let (start, end) = str::from_utf8(range).ok()?.split_once('-')?;
    let range = AddressRange::new(hexadecimal(start)?, hexadecimal(end)?).ok()?;
    let &[read, write, execute, shared] = permissions else { return None };
    let protection = Protection {
        read: read == b'r',
        write: write == b'w',
        execute: execute == b'x',
        shared: shared == b's',
    };
    let file_offset_bytes = hexadecimal(str::from_utf8(offset).ok()?)?;
    let inode: u64 = str::from_utf8(inode).ok()?.parse().ok()?;
    let (major, minor) = str::from_utf8(device).ok()?.split_once(':')?;
    let number = |digits| u32::try_from(hexadecimal(digits)?).ok();
    let device = (number(major)?, number(minor)?);
    let name = rest.trim_ascii_start();
    let kind = kind_of(name);

    let captured = protection.read
        && match kind {
            MappingKind::Device => false,
            // The vDSO is code and can be read. The pages beside it are the kernel's clocks, which
            // no other process can read; the vsyscall page is not memory at all.
            MappingKind::Kernel => name == b"[vdso]",
            _ => true,
        };
    let absent_is_zero = inode == 0
        && !protection.shared
        && matches!(kind, MappingKind::Anonymous | MappingKind::Heap | MappingKind::Stack);
    let name = unescape(name);
    let name = String::from_utf8_lossy(&name).into_owned();
    let mapping = Mapping { range, protection, kind, name, file_offset_bytes, captured };
    Some(MapsLine {
        mapping,
        device,
        inode,
        flags: Flags::default(),
        lazily_free_bytes: Some(0),
        absent_is_zero,
    })
}

/// The bytes before the first space, and those after it.
fn split_field(line: &[u8]) -> Option<(&[u8], &[u8])> {
    let at = line.iter().position(|byte| *byte == b' ')?;
    Some((&line[..at], &line[at + 1..]))
}

/// ` 4 kB`, in bytes.
fn kibibytes(amount: &[u8]) -> Option<u64> {
    let amount = str::from_utf8(amount).ok()?.trim().strip_suffix(" kB")?;
    amount.parse::<u64>().ok()?.checked_mul(1024)
}

/// Only digits: `from_str_radix` would accept a sign too.
fn hexadecimal(digits: &str) -> Option<u64> {
    digits.bytes().all(|byte| byte.is_ascii_hexdigit()).then(|| u64::from_str_radix(digits, 16).ok())?
}

pub(super) fn kind_of(name: &[u8]) -> MappingKind {
    // The kernel marks a file that has no name any more.
    let path = name.strip_suffix(b" (deleted)").unwrap_or(name);
    match path {
        b"" => MappingKind::Anonymous,
        b"[heap]" => MappingKind::Heap,
        _ if path.starts_with(b"[stack") => MappingKind::Stack,
        // Memory that was named by prctl.
        _ if path.starts_with(b"[anon:") || path.starts_with(b"[anon_shmem:") => MappingKind::Anonymous,
        _ if path.starts_with(b"[") => MappingKind::Kernel,
        // Shared memory without a file appears as this device, but is not one.
        b"/dev/zero" => MappingKind::Anonymous,
        _ if path.starts_with(b"/dev/shm/") || path.starts_with(b"/dev/hugepages/") => MappingKind::File,
        // Rings and buffers that a driver shares: io_uring, perf, kvm.
        _ if path.starts_with(b"/dev/") || path.starts_with(b"anon_inode:") => MappingKind::Device,
        _ => MappingKind::File,
    }
}

/// The kernel writes a newline in a name as `\012` and every other byte as it is.
fn unescape(name: &[u8]) -> Vec<u8> {
    let mut plain = Vec::with_capacity(name.len());
    let mut rest = name;
    while let Some((first, after)) = rest.split_first() {
        match rest.strip_prefix(b"\\012") {
            Some(after) => {
                plain.push(b'\n');
                rest = after;
            }
            None => {
                plain.push(*first);
                rest = after;
            }
        }
    }
    plain
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn lines_become_mappings() {
        use MappingKind::*;
        let start = "7f0000000000-7f0000004000 ";
        // The line after its range; kind, name, whether captured, whether absent pages are zeros.
        let table: &[(&[u8], MappingKind, &str, bool, bool)] = &[
            (b"rw-p 00000000 00:00 0 ", Anonymous, "", true, true),
            (b"rw-p 00000000 00:00 0", Anonymous, "", true, true),
            (b"---p 00000000 00:00 0 ", Anonymous, "", false, true),
            (b"-w-p 00000000 00:00 0 ", Anonymous, "", false, true),
            (b"rw-p 00000000 00:00 0      [heap]", Heap, "[heap]", true, true),
            (b"rw-p 00000000 00:00 0      [stack]", Stack, "[stack]", true, true),
            (
                b"rw-p 00000000 00:00 0      [anon:glibc: malloc]",
                Anonymous,
                "[anon:glibc: malloc]",
                true,
                true,
            ),
            (b"rw-s 00000000 00:01 9      [anon_shmem:x]", Anonymous, "[anon_shmem:x]", true, false),
            (b"r-xp 00000000 00:00 0      [vdso]", Kernel, "[vdso]", true, false),
            (b"r--p 00000000 00:00 0      [vvar]", Kernel, "[vvar]", false, false),
            (b"r--p 00000000 00:00 0      [vvar_vclock]", Kernel, "[vvar_vclock]", false, false),
            (b"--xp 00000000 00:00 0      [vsyscall]", Kernel, "[vsyscall]", false, false),
            (b"r--p 00002000 fe:00 12     /usr/lib/libc.so.6", File, "/usr/lib/libc.so.6", true, false),
            (b"rw-p 00002000 fe:00 12     /a b  c", File, "/a b  c", true, false),
            (b"r--p 00002000 fe:00 12     /a\\012b\\040", File, "/a\nb\\040", true, false),
            (b"r--p 00002000 fe:00 12     /x (deleted)", File, "/x (deleted)", true, false),
            (b"r--p 00002000 fe:00 12     /\xff\xfe", File, "/\u{fffd}\u{fffd}", true, false),
            (
                b"rw-s 00000000 00:01 7      /dev/zero (deleted)",
                Anonymous,
                "/dev/zero (deleted)",
                true,
                false,
            ),
            (b"rw-s 00000000 00:01 7      /dev/shm/x", File, "/dev/shm/x", true, false),
            (b"rw-s 00000000 00:01 7      /memfd:x (deleted)", File, "/memfd:x (deleted)", true, false),
            (b"rw-s 00000000 00:05 7      /dev/dri/card0", Device, "/dev/dri/card0", false, false),
            (
                b"rw-s 00000000 00:0f 7      anon_inode:[io_uring]",
                Device,
                "anon_inode:[io_uring]",
                false,
                false,
            ),
        ];
        for (rest, kind, name, captured, absent_is_zero) in table {
            let line = [start.as_bytes(), rest].concat();
            let parsed = parse_line(&line).unwrap_or_else(|| panic!("{}", String::from_utf8_lossy(&line)));
            let found = (parsed.mapping.kind, &*parsed.mapping.name, parsed.mapping.captured);
            assert_eq!((found, parsed.absent_is_zero), ((*kind, *name, *captured), *absent_is_zero));
            assert_eq!(parsed.mapping.range.to_string(), "0x7f0000000000..0x7f0000004000");
            assert_eq!(parsed.mapping.protection.to_string().as_bytes(), &rest[..4]);
        }
        let highest = b"ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0  [vsyscall]";
        assert_eq!(parse_line(highest).unwrap().mapping.range.end(), 0xffff_ffff_ff60_1000);
    }

    #[test]
    fn a_line_of_another_form_is_an_error_that_shows_it() {
        for line in [
            "",
            "1000-2000",
            "1000-2000 rw-p",
            "2000-1000 rw-p 0 00:00 0",
            "1000-+2000 rw-p 0 00:00 0",
            "1000-2000 rw- 0 00:00 0",
            "1000-2000 rw-p x 00:00 0",
            "1000-2000 rw-p 0 00:00 x",
            "1000-10000000000000000 rw-p 0 00:00 0",
            "1000-2000 rw-p 0 0000 0",
            "1000-2000 rw-p 0 00:fffffffff 0",
        ] {
            assert_eq!(parse_line(line.as_bytes()), None, "{line}");
        }
        let maps = b"1000-2000 rw-p 0 00:00 0\nnonsense\n";
        assert_eq!(parse(maps), Err("nonsense".to_owned()));
    }

    #[test]
    fn flags_belong_to_the_mapping_above_them() {
        let smaps = b"1000-2000 rw-p 0 fe:01 77 /a\nSize:  4 kB\nVmFlags: rd wr um ui \n\
            2000-3000 rw-p 0 00:00 0\nVmFlags: rd io\n3000-4000 rw-p 0 00:00 0\n";
        let lines = parse_smaps(smaps).unwrap();
        assert_eq!((lines[0].device, lines[0].inode), ((0xfe, 1), 77));
        let flags: Vec<_> = lines.iter().map(|line| line.flags).collect();
        let both = Flags { is_filled: true, is_continued: true, ..Flags::default() };
        let device = Flags { is_device_memory: true, ..Flags::default() };
        assert_eq!(flags, [both, device, Flags::default()]);
        assert_eq!(parse_smaps(b"Size: 4 kB\nnonsense\n"), Err("nonsense".to_owned()));
        let both = ["maps", "smaps"].map(|name| std::fs::read(format!("/proc/self/{name}")).unwrap());
        assert!(parse_smaps(&both[1]).unwrap().len().abs_diff(parse(&both[0]).unwrap().len()) < 4);
    }

    #[test]
    fn this_process_has_a_heap_a_stack_and_itself() {
        let lines = parse(&std::fs::read("/proc/self/maps").unwrap()).unwrap();
        let on_stack = 0u8;
        let here = (&raw const on_stack).addr() as u64;
        assert!(lines.iter().any(|line| line.mapping.kind == MappingKind::Stack));
        assert!(lines.iter().any(|line| {
            (line.mapping.range.start()..line.mapping.range.end()).contains(&here) && line.absent_is_zero
        }));
        let me = std::env::current_exe().unwrap();
        assert!(lines.iter().any(|line| line.mapping.name == me.to_string_lossy()));
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(bytes: Vec<u8>) {
            let _ = parse(&bytes);
            let _ = parse_smaps(&bytes);
        }

        #[test]
        fn no_almost_right_line_makes_it_panic(line in "[0-9a-f]{0,17}-[0-9a-f]{0,17} [r-]w?-?p? {0,2}[0-9a-g]{0,9} 0:0 [0-9x]{0,21} {0,3}[\\[/]?.{0,9}") {
            let _ = parse(line.as_bytes());
        }
    }
}
