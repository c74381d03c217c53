//! The state of a mapping that a rollback needs, parsed from `/proc/PID/smaps` (`maps.rs` reads the
//! lines).

use super::maps::{self, MapsLine};
use crate::sys::mapped::MappedFile;
use crate::units::AddressRange;

/// The state of one mapping that a rollback needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct MappingState {
    pub(crate) range: AddressRange,
    /// The mapped file, in memory or on a disk.
    pub(crate) file: Option<MappedFile>,
    /// How many bytes the kernel may discard unless they are written before (`MADV_FREE`).
    pub(crate) lazily_free_bytes: u64,
    /// How a userfaultfd handles accesses: `um`, `uw` and `ui` of `VmFlags`, in words.
    pub(crate) userfault: Option<&'static str>,
    /// Whether it may have guard pages (`gu` of `VmFlags`; reported by Linux 6.18 and newer).
    pub(crate) may_have_guards: bool,
    /// Its pages cannot be discarded: they are locked, or huge pages of the pool (`lo`, `ht`).
    pub(crate) is_pinned: bool,
}

/// All mappings in `/proc/PID/smaps`, in address order. An error names the place if a needed line
/// has an unknown form.
pub(super) fn parse(smaps: &[u8]) -> Result<Vec<MappingState>, String> {
    let first = smaps.split(|byte| *byte == b'\n').next().unwrap_or_default();
    if first.first().is_some_and(u8::is_ascii_uppercase) {
        return Err(String::from_utf8_lossy(first).into_owned());
    }
    let state = |line: &MapsLine| {
        let state = MappingState::of(line);
        state.ok_or_else(|| format!("LazyFree of the mapping {}", line.mapping.range))
    };
    maps::parse_smaps(smaps)?.iter().map(state).collect()
}

impl MappingState {
    /// Converts the lines of one mapping.
    fn of(line: &MapsLine) -> Option<MappingState> {
        let flags = line.flags;
        let userfault = if flags.is_filled {
            Some("fills its missing pages")
        } else if flags.tells_writes {
            Some("is told of writes to it")
        } else if flags.is_continued {
            Some("is told of first accesses to its pages")
        } else {
            None
        };
        let (major, minor) = line.device;
        let device = (u64::from(major) << 20) + u64::from(minor);
        Some(MappingState {
            range: line.mapping.range,
            file: (line.inode != 0).then_some(MappedFile { device, inode: line.inode }),
            lazily_free_bytes: line.lazily_free_bytes?,
            userfault,
            may_have_guards: flags.may_have_guards,
            is_pinned: flags.is_locked || flags.is_hugetlb,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_below_a_mapping_belongs_to_it() {
        let smaps =
            b"1000-3000 rw-p 00000000 00:00 0 \nSize:  8 kB\nLazyFree:   8 kB\nVmFlags: rd wr um ac\n\
            4000-5000 rw-s 00000000 00:01 77     /memfd:\xff (deleted)\nLazyFree:   0 kB\nVmFlags: rd gu\n";
        let found = parse(smaps).unwrap();
        let file = MappedFile { device: 1, inode: 77 };
        assert_eq!((found[0].lazily_free_bytes, found[0].file), (8192, None));
        assert_eq!((found[0].userfault, found[0].may_have_guards), (Some("fills its missing pages"), false));
        assert_eq!((found[1].file, found[1].userfault), (Some(file), None));
        assert!(found[1].may_have_guards && found[1].lazily_free_bytes == 0);
        assert_eq!(parse(b"LazyFree: 1 kB\n"), Err("LazyFree: 1 kB".to_owned()));
        let unknown = b"1000-3000 rw-p 00000000 00:00 0 \nLazyFree:   8 pages\n";
        assert_eq!(parse(unknown), Err("LazyFree of the mapping 0x1000..0x3000".to_owned()));
        assert_eq!(parse(b"nonsense\n"), Err("nonsense".to_owned()));
        assert!(parse(&std::fs::read("/proc/self/smaps").unwrap()).unwrap().len() > 5);
    }
}
