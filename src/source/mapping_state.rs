//! What a rollback needs to know of one mapping, out of the lines of `/proc/PID/smaps` (`maps.rs` reads them).

use super::maps::MapsLine;
use crate::sys::mapped::MappedFile;
use crate::units::AddressRange;

/// What a rollback needs to know of one mapping.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct MappingState {
    pub(crate) range: AddressRange,
    /// The file behind it, in memory or on a disk.
    pub(crate) file: Option<MappedFile>,
    /// How much of it the kernel may take back unless it is written before (`MADV_FREE`).
    pub(crate) lazily_free_bytes: u64,
    /// How a userfaultfd is told of accesses: `um`, `uw` and `ui` of `VmFlags`, in words.
    pub(crate) userfault: Option<&'static str>,
    /// There may be guard pages in it (`gu` of `VmFlags`; Linux 6.18 and newer tell).
    pub(crate) may_have_guards: bool,
    /// Its pages cannot be thrown away: locked, or huge ones of the pool (`lo`, `ht`).
    pub(crate) is_pinned: bool,
}

impl MappingState {
    /// Of the lines of one mapping.
    pub(super) fn of(line: &MapsLine) -> MappingState {
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
        MappingState {
            range: line.mapping.range,
            file: (line.inode != 0).then_some(MappedFile { device, inode: line.inode }),
            lazily_free_bytes: line.lazily_free_bytes,
            userfault,
            may_have_guards: flags.may_have_guards,
            is_pinned: flags.is_locked || flags.is_hugetlb,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source::maps;

    fn parse(smaps: &[u8]) -> Result<Vec<MappingState>, String> {
        Ok(maps::parse_smaps(smaps)?.iter().map(MappingState::of).collect())
    }

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
        assert_eq!(parse(b"nonsense\n"), Err("nonsense".to_owned()));
        assert!(parse(&std::fs::read("/proc/self/smaps").unwrap()).unwrap().len() > 5);
    }
}
