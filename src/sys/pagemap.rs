//! Which pages of a process are there, and which were written: `/proc/PID/pagemap`.
//!
//! Since Linux 6.7 the `PAGEMAP_SCAN` ioctl walks the page tables and answers with ranges, so that
//! a terabyte of nothing costs microseconds. Before, there is one 64-bit word to read for every
//! page, present or not.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

/// `_IOWR('f', 16, struct pm_scan_arg)`, which says that the argument has 96 (0x60) bytes.
const PAGEMAP_SCAN: u32 = 0xc060_6610;
const _: () = assert!(size_of::<ScanArgument>() == 0x60);
const PAGE_IS_WRITTEN: u64 = 1 << 1;
const PAGE_IS_FILE: u64 = 1 << 2;
const PAGE_IS_PRESENT: u64 = 1 << 3;
const PAGE_IS_SWAPPED: u64 = 1 << 4;
const PAGE_IS_PFNZERO: u64 = 1 << 5;
const PAGE_IS_SOFT_DIRTY: u64 = 1 << 7;
/// `PM_SCAN_WP_MATCHING | PM_SCAN_CHECK_WPASYNC`: write-protects what it answers, in the same step,
/// and fails where that is impossible.
const PROTECT_MATCHING: u64 = 1 | 2;

/// Bits of a pagemap word: the page is in memory, or it is in swap.
const WORD_PRESENT_OR_SWAPPED: u64 = 1 << 63 | 1 << 62;
/// A pagemap word's bit: the page was written since somebody wrote 4 to `clear_refs`.
const WORD_SOFT_DIRTY: u64 = 1 << 55;
/// A pagemap word's bit: the page is one of a file.
const WORD_FILE: u64 = 1 << 61;

/// How many ranges one scan may answer: 24 KiB of them.
const RANGES_PER_SCAN: usize = 1024;
/// How many pagemap words one read takes: 512 KiB.
const WORDS_PER_READ: usize = 64 * 1024;

/// The kernel's `struct pm_scan_arg`.
#[repr(C)]
struct ScanArgument {
    size_bytes: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    ranges: u64,
    range_count: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

/// The kernel's `struct page_region`.
#[repr(C)]
#[derive(Clone, Copy)]
struct ScanRange {
    start: u64,
    end: u64,
    categories: u64,
}

/// The addresses in `range`, whole pages, whose pages are in memory or in swap: sorted and
/// coalesced. Only for private anonymous memory does absence mean zeros.
pub(crate) fn populated(pagemap: &File, range: Range<u64>) -> io::Result<Vec<Range<u64>>> {
    match scan(pagemap, range.clone()) {
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOTTY | libc::EINVAL)) => {
            read(pagemap, range)
        }
        answer => answer,
    }
}

/// Whether any page of `range`, whole pages, is in memory or in swap, be it one of zeros. `ENOTTY` where the kernel has no
/// `PAGEMAP_SCAN`: reading every word would take too long.
pub(crate) fn is_anything_there(pagemap: &File, range: Range<u64>) -> io::Result<bool> {
    let mut is_there = false;
    let query =
        Query { any_of: PAGE_IS_PRESENT | PAGE_IS_SWAPPED, told: PAGE_IS_PRESENT, ..Query::default() };
    walk(pagemap, range, query, |_, _| is_there = true)?;
    Ok(is_there)
}

/// What a scan asks of each page.
#[derive(Clone, Copy, Default)]
struct Query {
    flags: u64,
    /// Of these categories the opposite counts.
    inverted: u64,
    /// A page must be in all of these …
    all_of: u64,
    /// … and, unless this is empty, in one of these.
    any_of: u64,
    /// Which categories to tell.
    told: u64,
}

/// By `PAGEMAP_SCAN`. The shared page of zeros counts as absent.
fn scan(pagemap: &File, range: Range<u64>) -> io::Result<Vec<Range<u64>>> {
    let mut found = Vec::new();
    let query = Query {
        inverted: PAGE_IS_PFNZERO,
        all_of: PAGE_IS_PFNZERO,
        any_of: PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
        told: PAGE_IS_PRESENT,
        ..Query::default()
    };
    walk(pagemap, range, query, |pages, _| add(&mut found, pages))?;
    Ok(found)
}

/// What happened to write-protected memory since it was protected the last time.
#[derive(Debug, Default)]
pub(crate) struct Touched {
    /// The pages that may have been written: sorted and coalesced.
    pub(crate) written: Vec<Range<u64>>,
    /// The pages that went away, or were never there and not yet protected: zeros, if the memory is
    /// private and anonymous.
    pub(crate) absent: Vec<Range<u64>>,
}

/// Finds the pages that were touched since they were protected, and protects them again in the same
/// step. `range` is whole pages of this process, registered with a
/// [`Userfault`](super::userfault::Userfault); else `EPERM`.
///
/// A page that is thrown away (MADV_DONTNEED) loses its protection without being written. Linux 6.18
/// calls it written all the same, which no manual promises: so absent pages are asked for as well. A
/// page that was never there and is protected has a marker in its place, which looks like swap.
pub(crate) fn take_touched(pagemap: &File, range: Range<u64>) -> io::Result<Touched> {
    let mut touched = Touched::default();
    let query = Query {
        flags: PROTECT_MATCHING,
        inverted: PAGE_IS_PRESENT,
        any_of: PAGE_IS_WRITTEN | PAGE_IS_PRESENT,
        told: PAGE_IS_WRITTEN | PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
        ..Query::default()
    };
    walk(pagemap, range, query, |pages, categories| {
        if categories & (PAGE_IS_PRESENT | PAGE_IS_SWAPPED) == 0 {
            add(&mut touched.absent, pages);
        } else if categories & PAGE_IS_WRITTEN != 0 {
            add(&mut touched.written, pages);
        }
    })?;
    Ok(touched)
}

/// How many bytes of pages [`take_touched`] would call written. Changes nothing.
pub(crate) fn count_written(pagemap: &File, range: Range<u64>) -> io::Result<u64> {
    let query = Query { all_of: PAGE_IS_WRITTEN, told: PAGE_IS_WRITTEN, ..Query::default() };
    let mut written_bytes = 0;
    walk(pagemap, range, query, |pages, _| written_bytes += pages.end - pages.start)?;
    Ok(written_bytes)
}

/// The pages of `range` that the kernel has marked soft-dirty.
pub(crate) fn soft_dirty(pagemap: &File, range: Range<u64>) -> io::Result<Vec<Range<u64>>> {
    let mut found = Vec::new();
    let query = Query { all_of: PAGE_IS_SOFT_DIRTY, told: PAGE_IS_SOFT_DIRTY, ..Query::default() };
    match walk(pagemap, range.clone(), query, |pages, _| add(&mut found, pages)) {
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOTTY | libc::EINVAL)) => {
            found.clear();
            words(pagemap, range, |word| word & WORD_SOFT_DIRTY != 0, |page| add(&mut found, page))?;
        }
        answer => answer?,
    }
    Ok(found)
}

/// The pages of a private mapping of a file that are not the file's any more: they were written. In swap or
/// not; what is thrown away is the file's again.
pub(crate) fn copied(pagemap: &File, range: Range<u64>) -> io::Result<Vec<Range<u64>>> {
    let mut found = Vec::new();
    let query = Query {
        inverted: PAGE_IS_FILE,
        all_of: PAGE_IS_FILE,
        any_of: PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
        told: PAGE_IS_PRESENT,
        ..Query::default()
    };
    match walk(pagemap, range.clone(), query, |pages, _| add(&mut found, pages)) {
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOTTY | libc::EINVAL)) => {
            found.clear();
            copied_by_words(pagemap, range)
        }
        answer => answer.map(|()| found),
    }
}

fn copied_by_words(pagemap: &File, range: Range<u64>) -> io::Result<Vec<Range<u64>>> {
    let mut found = Vec::new();
    let is_copied = |word| word & WORD_PRESENT_OR_SWAPPED != 0 && word & WORD_FILE == 0;
    words(pagemap, range, is_copied, |page| add(&mut found, page))?;
    Ok(found)
}

/// Calls `found` with the pages of `range` that match and their categories, in order.
fn walk(
    pagemap: &File,
    range: Range<u64>,
    query: Query,
    mut found: impl FnMut(Range<u64>, u64),
) -> io::Result<()> {
    let mut answers = vec![ScanRange { start: 0, end: 0, categories: 0 }; RANGES_PER_SCAN];
    let mut start = range.start;
    while start < range.end {
        let mut argument = ScanArgument {
            size_bytes: size_of::<ScanArgument>() as u64,
            flags: query.flags,
            start,
            end: range.end,
            walk_end: 0,
            ranges: answers.as_mut_ptr().expose_provenance() as u64,
            range_count: RANGES_PER_SCAN as u64,
            max_pages: 0,
            category_inverted: query.inverted,
            category_mask: query.all_of,
            category_anyof_mask: query.any_of,
            return_mask: query.told,
        };
        // SAFETY: the ioctl reads and writes one `pm_scan_arg`, whose layout and size `ScanArgument`
        // has, and writes at most `range_count` `page_region`s, the length of `answers`, to
        // `ranges`, its place. On a file of another kind it fails with ENOTTY.
        let answered = unsafe { libc::ioctl(pagemap.as_raw_fd(), PAGEMAP_SCAN as _, &raw mut argument) };
        let answered = usize::try_from(answered).map_err(|_| io::Error::last_os_error())?;
        let mut walked_to = argument.walk_end;
        for answer in &answers[..answered.min(RANGES_PER_SCAN)] {
            found(answer.start.max(range.start)..answer.end.min(range.end), answer.categories);
            // Linux 6.18 answers with more ranges than `walk_end` admits when there are over 512.
            walked_to = walked_to.max(answer.end);
        }
        if walked_to <= start {
            return Err(io::Error::other("the kernel's scan of the page tables does not advance"));
        }
        start = walked_to;
    }
    Ok(())
}

/// Word by word.
fn read(pagemap: &File, range: Range<u64>) -> io::Result<Vec<Range<u64>>> {
    let mut found = Vec::new();
    words(pagemap, range, |word| word & WORD_PRESENT_OR_SWAPPED != 0, |page| add(&mut found, page))?;
    Ok(found)
}

/// Calls `found` with every page whose word is wanted.
fn words(
    pagemap: &File,
    range: Range<u64>,
    is_wanted: impl Fn(u64) -> bool,
    mut found: impl FnMut(Range<u64>),
) -> io::Result<()> {
    let page_bytes = rustix::param::page_size() as u64;
    let mut words = vec![0u8; WORDS_PER_READ * 8];
    let mut page = range.start / page_bytes;
    let end_page = range.end.div_ceil(page_bytes);
    while page < end_page {
        let wanted = usize::try_from(end_page - page).map_or(WORDS_PER_READ, |left| left.min(WORDS_PER_READ));
        let words = &mut words[..wanted * 8];
        pagemap.read_exact_at(words, page * 8)?;
        for word in words.as_chunks::<8>().0 {
            if is_wanted(u64::from_ne_bytes(*word)) {
                found(page * page_bytes..(page + 1) * page_bytes);
            }
            page += 1;
        }
    }
    Ok(())
}

/// Adds a range that comes after all others, joining it to the last one if they touch.
fn add(ranges: &mut Vec<Range<u64>>, next: Range<u64>) {
    match ranges.last_mut() {
        Some(last) if last.end == next.start => last.end = next.end,
        _ if next.is_empty() => {}
        _ => ranges.push(next),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_ways_find_the_pages_that_were_written() {
        let page_bytes = rustix::param::page_size();
        let pages = 5000;
        let mut memory = memmap2::MmapMut::map_anon(pages * page_bytes).unwrap();
        memory.advise(memmap2::Advice::NoHugePage).unwrap();
        let base = memory.as_ptr().addr() as u64;
        // Every other page, so that one scan cannot answer with all ranges; then a run.
        let written: Vec<usize> = (0..4000).step_by(2).chain(4500..4600).collect();
        for page in &written {
            memory[page * page_bytes] = 1;
        }
        let mut expected = Vec::new();
        for page in written {
            let start = base + (page * page_bytes) as u64;
            add(&mut expected, start..start + page_bytes as u64);
        }
        let pagemap = File::open("/proc/self/pagemap").unwrap();
        let whole = base..base + memory.len() as u64;
        // `assert!`: the lists are long.
        assert!(read(&pagemap, whole.clone()).unwrap() == expected);
        assert!(scan(&pagemap, whole.clone()).unwrap() == expected);
        // A page that was only read is the shared page of zeros.
        assert_eq!(std::hint::black_box(memory[4999 * page_bytes]), 0);
        assert!(populated(&pagemap, whole).unwrap() == expected);
    }

    #[test]
    fn both_ways_find_the_pages_of_a_file_that_were_written() {
        let page_bytes = rustix::param::page_size();
        let file = tempfile::tempfile().unwrap();
        file.set_len(64 * page_bytes as u64).unwrap();
        let mut memory = super::super::pages::Pages::copy_of(&file, 64 * page_bytes).unwrap();
        assert_eq!(memory[..8 * page_bytes], vec![0; 8 * page_bytes]);
        for page in [3, 4, 20, 63] {
            memory[page * page_bytes] = 1;
        }
        let base = memory.as_ptr().addr() as u64;
        let pages = |from: u64, to: u64| base + from * page_bytes as u64..base + to * page_bytes as u64;
        let expected = [pages(3, 5), pages(20, 21), pages(63, 64)];
        let pagemap = File::open("/proc/self/pagemap").unwrap();
        assert_eq!(copied(&pagemap, pages(0, 64)).unwrap(), expected);
        assert_eq!(copied_by_words(&pagemap, pages(0, 64)).unwrap(), expected);
    }

    #[test]
    fn an_old_kernel_is_told_from_a_new_one_by_the_answer_to_the_scan() {
        // A plain file has no scan either and answers as an old kernel's pagemap does.
        let file = File::open("/proc/self/stat").unwrap();
        assert_eq!(scan(&file, 0..4096).unwrap_err().raw_os_error(), Some(libc::ENOTTY));
    }
}
