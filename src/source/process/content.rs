//! Decides which bytes of each mapping are read, from where, and which are left out.
//!
//! A capture must not make the process larger. So an absent page is never read through its mapping:
//! the kernel would allocate it. In the table, `p` is what the page tables hold, in memory or in
//! swap.
//!
//! | behind the mapping | read through the mapping | read from the file | zeros | left out |
//! |---|---|---|---|---|
//! | nothing; huge pages of its own | `p` | | the rest | |
//! | … filled by a userfaultfd | `p` | | zeros it was given | the rest |
//! | a file, private | of `p` what was written | the rest, up to its end | its holes | behind its end |
//! | a file, shared | | all, up to its end | its holes | behind its end |
//! | … whose pages a userfaultfd fills | | all but the holes | | the holes |
//! | … or lets be mapped | `p` | | | the rest |
//! | a file that cannot be opened, or is asked of a server | `p` | | | the rest |
//! | secret memory | | | | all |
//! | the vDSO | `p` | the rest, from that of this program | | |
//!
//! Guards are left out everywhere. A mapping that the process may not read (`PROT_NONE`) is parted:
//! what of it is in memory is captured, through `/proc/PID/mem`, which asks for no permission; the
//! rest, which may be terabytes, is recorded and not captured. That is so for memory without a
//! file, for what was written of private files, and for shared files that are in memory only.

use std::fs::File;
use std::ops::Range;
use std::sync::Arc;

use super::file::{Backing, Backings, OpenFile};
use crate::address_space::{Mapping, MappingKind};
use crate::left_out::{LeftOut, WhyLeftOut};
use crate::ranges::Ranges;
use crate::source::maps::MapsLine;
use crate::sys::pagemap::{self, Pages};
use crate::units::AddressRange;

/// Where a mapping is parted that may not be read: a longer stretch without pages is not captured.
const LONGEST_GAP_BYTES: u64 = 2 << 20;

/// How the bytes of a mapping may be had.
#[derive(Debug)]
pub(super) struct Content {
    /// The addresses of the mapping.
    pub(super) range: Range<u64>,
    /// What may be anything but zeros and is to be read.
    pub(super) populated: Ranges,
    /// What is read through the mapping although there is a file; without one that is all.
    pub(super) through_mapping: Ranges,
    /// The file that the rest is read from, and where in it the mapping begins.
    pub(super) file: Option<(Arc<OpenFile>, u64)>,
    /// Whether it takes `/proc/PID/mem`, as the process itself may not read it.
    pub(super) is_forbidden: bool,
    pub(super) left_out: Vec<LeftOut>,
}

/// The mappings in these lines, each with how its bytes may be had.
pub(super) fn contents(
    lines: Vec<MapsLine>,
    backings: &mut Backings<'_>,
    pagemap: Option<&File>,
) -> Vec<(Mapping, Content)> {
    let mut found = Vec::with_capacity(lines.len());
    for line in lines {
        let kind = line.mapping.kind;
        if kind == MappingKind::Kernel {
            let content = match line.mapping.captured {
                true => kernel_code(&line, &pages(&line, pagemap), backings),
                false => Content::nothing(&line.mapping),
            };
            found.push((line.mapping, content));
        } else if kind == MappingKind::Device || line.flags.is_device_memory {
            let content = Content::nothing(&line.mapping);
            found.push((Mapping { captured: false, ..line.mapping }, content));
        } else {
            let backing = backings.of(&line);
            let pages = pages(&line, pagemap);
            match line.mapping.captured {
                true => {
                    let content = content(&line, &pages, &backing, line.mapping.range);
                    found.push((line.mapping, content));
                }
                false => found.extend(parted(&line, &pages, &backing)),
            }
        }
    }
    found
}

/// The pages of a mapping; the whole mapping if the kernel does not report them.
fn pages(line: &MapsLine, pagemap: Option<&File>) -> Pages {
    let range = range_of(line.mapping.range);
    let told = pagemap.and_then(|pagemap| pagemap::pages(pagemap, range.clone()).ok());
    told.unwrap_or_else(|| Pages { held: range.clone().into(), own: range.into(), ..Pages::default() })
}

/// For the vDSO, which is the same in all processes: absent pages are read from this program's
/// vDSO.
fn kernel_code(line: &MapsLine, pages: &Pages, backings: &Backings<'_>) -> Content {
    let whole = range_of(line.mapping.range);
    let mut content = Content::nothing(&line.mapping);
    match backings.own_vdso(line, pages) {
        Some((file, first)) => {
            content.populated = whole.into();
            content.through_mapping = pages.held.clone();
            content.file = Some((file, first));
        }
        None => {
            content.populated = pages.held.clone();
            content.leave_out(&pages.held.complement(whole), WhyLeftOut::Refused);
        }
    }
    content
}

/// For a mapping that may be read.
fn content(line: &MapsLine, pages: &Pages, backing: &Backing, within: AddressRange) -> Content {
    let whole = range_of(within);
    let mut content = Content::nothing(&Mapping { range: within, ..line.mapping.clone() });
    let known = pages.held.union(&pages.zeros).union(&pages.guards);
    let unknown = || known.complement(whole.clone());
    content.leave_out(&pages.guards, WhyLeftOut::Guard);
    match backing {
        Backing::Unknown(WhyLeftOut::Secret) => {
            content.left_out.clear();
            content.leave_out(&Ranges::from(whole.clone()), WhyLeftOut::Secret);
        }
        _ if line.flags.is_continued => {
            content.populated = pages.held.clone();
            content.leave_out(&unknown(), WhyLeftOut::Userfault);
        }
        Backing::Nothing => {
            content.populated = pages.held.clone();
            if line.flags.is_filled {
                content.leave_out(&unknown(), WhyLeftOut::Userfault);
            }
        }
        Backing::Unknown(why) => {
            content.populated = pages.held.clone();
            content.leave_out(&unknown(), *why);
        }
        Backing::File(file) => content.read_file(line, pages, file),
    }
    content.left_out.sort_unstable_by_key(|left_out| left_out.range);
    content
}

/// Splits a mapping that may not be read into the parts that are in memory and the rest.
fn parted(line: &MapsLine, pages: &Pages, backing: &Backing) -> Vec<(Mapping, Content)> {
    let whole = range_of(line.mapping.range);
    let in_memory = match backing {
        Backing::Nothing => &pages.held,
        Backing::File(file) if line.mapping.protection.shared && !file.is_memory() => &Ranges::new(),
        Backing::Unknown(WhyLeftOut::Secret) => &Ranges::new(),
        Backing::Unknown(_) | Backing::File(_) if line.mapping.protection.shared => &pages.held,
        Backing::Unknown(_) | Backing::File(_) => &pages.own,
    };
    let mut there: Vec<Range<u64>> = Vec::new();
    for range in in_memory {
        match there.last_mut() {
            Some(last) if range.start - last.end <= LONGEST_GAP_BYTES => last.end = range.end,
            _ => there.push(range.clone()),
        }
    }
    let there = Ranges::from(there);
    let part = |(range, captured): (Range<u64>, bool)| {
        let addresses = AddressRange::new(range.start, range.end).ok()?;
        let into_file = match line.inode {
            0 => 0,
            _ => range.start - line.mapping.range.start(),
        };
        let file_offset_bytes = line.mapping.file_offset_bytes.saturating_add(into_file);
        let mapping = Mapping { range: addresses, file_offset_bytes, captured, ..line.mapping.clone() };
        let mut content = Content::nothing(&mapping);
        if captured {
            content.populated = in_memory.within(range.clone()).collect();
            content.is_forbidden = true;
            content.leave_out(&pages.guards, WhyLeftOut::Guard);
        }
        if line.flags.is_filled || line.flags.is_continued {
            let known = pages.held.union(&pages.zeros).union(&pages.guards);
            content.leave_out(&known.complement(range), WhyLeftOut::Userfault);
        }
        content.left_out.sort_unstable_by_key(|left_out| left_out.range);
        Some((mapping, content))
    };
    there.alternating(whole).into_iter().filter_map(part).collect()
}

impl Content {
    fn nothing(mapping: &Mapping) -> Content {
        Content {
            range: range_of(mapping.range),
            populated: Ranges::new(),
            through_mapping: Ranges::new(),
            file: None,
            is_forbidden: false,
            left_out: Vec::new(),
        }
    }

    /// Marks the part of these addresses that is inside the mapping as left out.
    fn leave_out(&mut self, ranges: &Ranges, why: WhyLeftOut) {
        let inside: Ranges = ranges.within(self.range.clone()).collect();
        self.left_out.extend(inside.addresses().map(|range| LeftOut { range, why }));
    }

    fn read_file(&mut self, line: &MapsLine, pages: &Pages, file: &Arc<OpenFile>) {
        let (start, end) = (self.range.start, self.range.end);
        let first = line.mapping.file_offset_bytes;
        let address = |offset: u64| start.saturating_add(offset.saturating_sub(first)).min(end);
        let page_bytes = rustix::param::page_size() as u64;
        let is_shared = line.mapping.protection.shared;

        let data: Ranges = file
            .data(first..first.saturating_add(end - start))
            .into_iter()
            .map(|range| address(range.start)..address(range.end))
            .collect();
        let end_of_file = address(file.length_bytes);
        let end_of_pages =
            address(file.length_bytes.checked_next_multiple_of(page_bytes).unwrap_or(u64::MAX));
        let through_mapping = match is_shared {
            // Bytes after the end of the file, in its last page, are in no file.
            _ if file.may_be_newer() => pages.held.clone(),
            true => pages.held.within(end_of_file / page_bytes * page_bytes..end_of_pages).collect(),
            false => pages.own.clone(),
        };
        if line.flags.is_filled {
            let known = data.union(&pages.held).union(&pages.zeros).union(&pages.guards);
            self.leave_out(&whole_pages(&known).complement(start..end_of_pages), WhyLeftOut::Userfault);
        }
        self.leave_out(&Ranges::from(end_of_pages..end), WhyLeftOut::BehindFile);
        // A guard hides the data of the file.
        let data = data.difference(&pages.guards);
        self.populated = data.union(&through_mapping);
        if !file.is_memory() && is_shared {
            // Writes through the mapping have a place on the disk, unless the file system has not
            // reported it yet.
            self.populated = self.populated.union(&pages.held.within(start..end_of_file).collect());
        }
        self.through_mapping = through_mapping;
        self.file = Some((file.clone(), first));
    }
}

fn range_of(range: AddressRange) -> Range<u64> {
    range.start()..range.end()
}

/// The ranges, extended to whole pages.
fn whole_pages(ranges: &Ranges) -> Ranges {
    let page_bytes = rustix::param::page_size() as u64;
    ranges
        .iter()
        .map(|range| range.start / page_bytes * page_bytes..range.end.next_multiple_of(page_bytes))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source::maps;

    const MIB: u64 = 1 << 20;

    fn line(text: &str) -> MapsLine {
        maps::parse_smaps(text.as_bytes()).unwrap().remove(0)
    }

    fn pages(held: &[Range<u64>], zeros: &[Range<u64>], guards: &[Range<u64>]) -> Pages {
        let ranges = |list: &[Range<u64>]| list.iter().cloned().collect::<Ranges>();
        Pages { held: ranges(held), own: ranges(held), zeros: ranges(zeros), guards: ranges(guards) }
    }

    fn left_out(content: &Content) -> Vec<(u64, u64, WhyLeftOut)> {
        content.left_out.iter().map(|it| (it.range.start(), it.range.end(), it.why)).collect()
    }

    #[test]
    fn what_may_not_be_read_is_parted_where_there_is_nothing_for_long() {
        let line = line("10000000-20000000 ---p 00000000 00:00 0");
        let start = 0x1000_0000;
        let held = [
            start + MIB..start + MIB + 4096,
            start + 2 * MIB..start + 2 * MIB + 4096,
            start + 9 * MIB..start + 9 * MIB + 4096,
        ];
        let parts = parted(&line, &pages(&held, &[], &[]), &Backing::Nothing);
        let found: Vec<_> = parts
            .iter()
            .map(|(mapping, content)| (mapping.range.start(), mapping.captured, content.populated.len()))
            .collect();
        let expected = [
            (start, false, 0),
            (start + MIB, true, 2),
            (start + 2 * MIB + 4096, false, 0),
            (start + 9 * MIB, true, 1),
            (start + 9 * MIB + 4096, false, 0),
        ];
        assert_eq!(found, expected);
        assert!(parts.windows(2).all(|pair| pair[0].0.range.end() == pair[1].0.range.start()));
        assert_eq!(parted(&line, &Pages::default(), &Backing::Nothing).len(), 1);
    }

    #[test]
    fn what_a_userfaultfd_fills_is_no_zeros_but_what_it_was_given_as_such() {
        let plain = line("10000-20000 rw-p 00000000 00:00 0\nVmFlags: rd wr");
        let filled = line("10000-20000 rw-p 00000000 00:00 0\nVmFlags: rd wr um");
        let continued = line("10000-20000 rw-s 00000000 00:01 7 /memfd:x (deleted)\nVmFlags: rd wr ui");
        let [held, zeros, guards] = [0x11000..0x12000, 0x12000..0x13000, 0x1f000..0x20000];
        let one = std::slice::from_ref;
        let some = pages(one(&held), one(&zeros), one(&guards));
        let of = |line: &MapsLine, backing| content(line, &some, &backing, line.mapping.range);
        let guard = (0x1f000, 0x20000, WhyLeftOut::Guard);
        assert_eq!(left_out(&of(&plain, Backing::Nothing)), [guard]);
        let missing =
            [(0x10000, 0x11000, WhyLeftOut::Userfault), (0x13000, 0x1f000, WhyLeftOut::Userfault), guard];
        assert_eq!(left_out(&of(&filled, Backing::Nothing)), missing);
        let closed = Backing::Unknown(WhyLeftOut::FileClosed);
        assert_eq!(left_out(&of(&continued, closed.clone())), missing);
        assert_eq!(of(&continued, closed).populated, some.held);
        let closed = line("10000-20000 rw-s 00000000 00:01 7 /memfd:x (deleted)\nVmFlags: rd wr");
        let of_closed = of(&closed, Backing::Unknown(WhyLeftOut::FileClosed));
        assert_eq!(left_out(&of_closed)[0].2, WhyLeftOut::FileClosed);
        let secret = of(&closed, Backing::Unknown(WhyLeftOut::Secret));
        assert_eq!(
            (left_out(&secret), secret.populated),
            (vec![(0x10000, 0x20000, WhyLeftOut::Secret)], Ranges::new())
        );
    }
}
