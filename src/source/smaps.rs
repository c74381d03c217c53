//! `/proc/PID/smaps`: what the kernel knows of each mapping beyond `/proc/PID/maps`, as a rollback needs it.
//!
//! ```text
//! 7f0000000000-7f0000004000 rw-s 00000000 00:01 1234   /memfd:x (deleted)
//! LazyFree:              4 kB
//! VmFlags: rd wr sh mr mw me ms um
//! ```

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

/// All mappings, in the order of their addresses; an error, which is the line, if one has an unknown form.
pub(crate) fn parse(smaps: &[u8]) -> Result<Vec<MappingState>, String> {
    let mut found: Vec<MappingState> = Vec::new();
    for line in smaps.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()) {
        let unknown = || String::from_utf8_lossy(line).into_owned();
        if !line[0].is_ascii_uppercase() {
            found.push(head(line).ok_or_else(unknown)?);
            continue;
        }
        let Some(last) = found.last_mut() else { return Err(unknown()) };
        if let Some(amount) = line.strip_prefix(b"LazyFree:") {
            last.lazily_free_bytes = kibibytes(amount).ok_or_else(unknown)?;
        } else if let Some(flags) = line.strip_prefix(b"VmFlags:") {
            let has = |flag: &[u8]| flags.split(|byte| *byte == b' ').any(|it| it == flag);
            last.may_have_guards = has(b"gu");
            last.is_pinned = has(b"lo") || has(b"ht");
            last.userfault = match (has(b"um"), has(b"uw"), has(b"ui")) {
                (true, ..) => Some("fills its missing pages"),
                (_, true, _) => Some("is told of writes to it"),
                (.., true) => Some("is told of first accesses to its pages"),
                _ => None,
            };
        }
    }
    Ok(found)
}

/// The line of `/proc/PID/maps`.
fn head(line: &[u8]) -> Option<MappingState> {
    let line = str::from_utf8(line.get(..line.len().min(100))?)
        .or_else(|error| str::from_utf8(&line[..error.valid_up_to()]));
    let mut fields = line.ok()?.split_ascii_whitespace();
    let (start, end) = fields.next()?.split_once('-')?;
    let number = |digits: &str| u64::from_str_radix(digits, 16).ok();
    let range = AddressRange::new(number(start)?, number(end)?).ok()?;
    let file = MappedFile::parse(fields.nth(2)?, fields.next()?)?;
    Some(MappingState {
        range,
        file,
        lazily_free_bytes: 0,
        userfault: None,
        may_have_guards: false,
        is_pinned: false,
    })
}

fn kibibytes(amount: &[u8]) -> Option<u64> {
    let amount = str::from_utf8(amount).ok()?.trim().strip_suffix(" kB")?;
    amount.parse::<u64>().ok()?.checked_mul(1024)
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
        assert_eq!(parse(b"nonsense\n"), Err("nonsense".to_owned()));
        assert!(parse(&std::fs::read("/proc/self/smaps").unwrap()).unwrap().len() > 5);
    }
}
