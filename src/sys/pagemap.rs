//! Which pages of a process are present, and which were written: `/proc/PID/pagemap`.
//!
//! Since Linux 6.7 the `PAGEMAP_SCAN` ioctl walks the page tables and returns ranges, so a terabyte
//! of unpopulated memory costs microseconds. Older kernels have only one 64-bit word for every
//! page, present or not. See the kernel's [pagemap
//! documentation](https://docs.kernel.org/admin-guide/mm/pagemap.html).
//!
//! To the scan, two kinds of entries that are no pages look like swap: guards
//! (`MADV_GUARD_INSTALL`) and the markers of write protection. Since Linux 6.15 the scan reports
//! guards. A marker has its own swap type in the page's word, which the kernel shows only to
//! processes with `CAP_SYS_ADMIN`. For other processes markers count as pages, which read as zeros.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::ranges::Ranges;

/// `_IOWR('f', 16, struct pm_scan_arg)`; the number says that the argument has 96 (0x60) bytes.
const PAGEMAP_SCAN: u32 = 0xc060_6610;
const _: () = assert!(size_of::<ScanArgument>() == 0x60);
const PAGE_IS_WRITTEN: u64 = 1 << 1;
const PAGE_IS_FILE: u64 = 1 << 2;
const PAGE_IS_PRESENT: u64 = 1 << 3;
const PAGE_IS_SWAPPED: u64 = 1 << 4;
const PAGE_IS_PFNZERO: u64 = 1 << 5;
const PAGE_IS_SOFT_DIRTY: u64 = 1 << 7;
/// Linux 6.15.
const PAGE_IS_GUARD: u64 = 1 << 8;
/// `PM_SCAN_WP_MATCHING | PM_SCAN_CHECK_WPASYNC`: write-protects the pages that it reports, in the
/// same step, and fails where that is impossible.
const PROTECT_MATCHING: u64 = 1 | 2;

/// Bits of a pagemap word: the page is in memory, or it is in swap.
const WORD_PRESENT_OR_SWAPPED: u64 = 1 << 63 | 1 << 62;
/// A bit of a pagemap word: the page was written since a process wrote 4 to `clear_refs`.
const WORD_SOFT_DIRTY: u64 = 1 << 55;
/// A bit of a pagemap word: the page belongs to a file.
const WORD_FILE: u64 = 1 << 61;

/// A bit of a pagemap word: the page is in swap, or the entry is no page.
const WORD_SWAPPED: u64 = 1 << 62;
/// A bit of a pagemap word: the page is a guard. Linux 6.15.
const WORD_GUARD: u64 = 1 << 58;
/// The type of a swapped page: all ones for a marker; 0 also where the kernel does not show it.
const WORD_SWAP_TYPE: u64 = 31;

/// The greatest number of ranges that one scan returns: 24 KiB of them.
const RANGES_PER_SCAN: usize = 1024;
/// The same for the first scan of a range: most scans find only a few ranges, and the buffer is
/// cleared first.
const RANGES_PER_FIRST_SCAN: usize = 64;
/// The number of pagemap words in one read: 512 KiB.
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

/// The pages of a mapping.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Pages {
    /// Pages in memory or in swap, without the shared page of zeros.
    pub(crate) held: Ranges,
    /// Those of `held` that do not, or no longer, belong to a file: they were written.
    pub(crate) own: Ranges,
    /// The shared page of zeros.
    pub(crate) zeros: Ranges,
    /// Guards: there is no page, and an access raises a fatal signal.
    pub(crate) guards: Ranges,
}

/// What the page tables hold for `range`, which is whole pages. An absent page means zeros only in
/// private memory without a file, and only where no userfaultfd fills it.
pub(crate) fn pages(pagemap: &File, range: Range<u64>) -> io::Result<Pages> {
    /// Whether the kernel proved to know no guards.
    static KNOWS_NO_GUARDS: AtomicBool = AtomicBool::new(false);
    if !KNOWS_NO_GUARDS.load(Ordering::Relaxed) {
        match scan_pages(pagemap, range.clone(), PAGE_IS_GUARD) {
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {}
            Err(error) if error.raw_os_error() == Some(libc::ENOTTY) => {
                return pages_by_words(pagemap, range);
            }
            answer => return answer,
        }
    }
    match scan_pages(pagemap, range.clone(), 0) {
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOTTY | libc::EINVAL)) => {
            pages_by_words(pagemap, range)
        }
        answer => {
            KNOWS_NO_GUARDS.store(answer.is_ok(), Ordering::Relaxed);
            answer
        }
    }
}

/// With `PAGEMAP_SCAN`, which reports guards by the category `guard`; 0 where it cannot.
fn scan_pages(pagemap: &File, range: Range<u64>, guard: u64) -> io::Result<Pages> {
    let mut pages = Pages::default();
    // Entries that may be no pages; only their words can decide.
    let mut doubtful = Ranges::new();
    let query = Query {
        any_of: PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
        told: PAGE_IS_PRESENT | PAGE_IS_SWAPPED | PAGE_IS_FILE | PAGE_IS_PFNZERO | PAGE_IS_WRITTEN | guard,
        ..Query::default()
    };
    walk(pagemap, range, query, |found, categories| {
        if categories & guard != 0 {
            pages.guards.insert(found);
        } else if categories & PAGE_IS_PFNZERO != 0 {
            pages.zeros.insert(found);
        } else {
            // The scan reports a marker of write protection as not written, and, where it cannot
            // report guards, a guard as written.
            if categories & PAGE_IS_PRESENT == 0 && (guard == 0 || categories & PAGE_IS_WRITTEN == 0) {
                doubtful.insert(found.clone());
            }
            pages.held.insert(found.clone());
            if categories & PAGE_IS_FILE == 0 {
                pages.own.insert(found);
            }
        }
    })?;
    let mut markers = Ranges::new();
    for range in doubtful {
        words(pagemap, range, is_marker, |page, _| markers.insert(page))?;
    }
    if !markers.is_empty() {
        pages.held = pages.held.difference(&markers);
        pages.own = pages.own.difference(&markers);
    }
    Ok(pages)
}

/// Word by word. This cannot distinguish the shared page of zeros from other pages.
fn pages_by_words(pagemap: &File, range: Range<u64>) -> io::Result<Pages> {
    let mut pages = Pages::default();
    let is_wanted = |word| word & WORD_PRESENT_OR_SWAPPED != 0;
    words(pagemap, range, is_wanted, |page, word| {
        if word & WORD_GUARD != 0 {
            pages.guards.insert(page);
        } else {
            if word & WORD_FILE == 0 {
                pages.own.insert(page.clone());
            }
            pages.held.insert(page);
        }
    })?;
    Ok(pages)
}

/// Whether a word is that of a marker. Kernels without the scan used the type for something else.
fn is_marker(word: u64) -> bool {
    word & WORD_SWAPPED != 0 && word & WORD_SWAP_TYPE == WORD_SWAP_TYPE
}

/// The addresses in `range`, whole pages, whose pages are in memory or in swap.
pub(crate) fn populated(pagemap: &File, range: Range<u64>) -> io::Result<Ranges> {
    Ok(pages(pagemap, range)?.held)
}

/// Whether any page of `range`, which is whole pages, is in memory or in swap; the page of zeros
/// counts. `ENOTTY` where the kernel has no `PAGEMAP_SCAN`: reading every word would take too long.
pub(crate) fn is_anything_there(pagemap: &File, range: Range<u64>) -> io::Result<bool> {
    let mut is_there = false;
    let query =
        Query { any_of: PAGE_IS_PRESENT | PAGE_IS_SWAPPED, told: PAGE_IS_PRESENT, ..Query::default() };
    walk(pagemap, range, query, |_, _| is_there = true)?;
    Ok(is_there)
}

/// What a scan requires of each page.
#[derive(Clone, Copy, Default)]
struct Query {
    flags: u64,
    /// The categories that a page must not be in.
    inverted: u64,
    /// A page must be in all of these categories …
    all_of: u64,
    /// … and, unless this is empty, in one of these.
    any_of: u64,
    /// The categories to report.
    told: u64,
}

/// The changes of write-protected memory since it was last protected.
#[derive(Debug, Default)]
pub(crate) struct Touched {
    /// The pages that may have been written.
    pub(crate) written: Ranges,
    /// The absent pages: discarded, or never present and not yet protected. They are zeros if the
    /// memory is private and anonymous.
    pub(crate) absent: Ranges,
    /// Guards, whether or not they were there before. Before Linux 6.15 they are among the other
    /// two.
    pub(crate) guards: Ranges,
}

/// Finds the pages that changed since they were protected, and protects them again in the same
/// step. `range` is whole pages of this process that are registered with a
/// [`Userfault`](super::userfault::Userfault); otherwise `EPERM`.
///
/// A page that is discarded (MADV_DONTNEED) loses its protection without being written. Linux 6.18
/// reports it as written nevertheless, but no manual promises that, so this asks for absent pages
/// too. A page that was never present and is protected has a marker in its place, which looks like
/// swap.
pub(crate) fn take_touched(pagemap: &File, range: Range<u64>) -> io::Result<Touched> {
    match take_touched_and_guards(pagemap, range.clone(), PAGE_IS_GUARD) {
        // Such a kernel returns the error before it scans.
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
            take_touched_and_guards(pagemap, range, 0)
        }
        answer => answer,
    }
}

fn take_touched_and_guards(pagemap: &File, range: Range<u64>, guard: u64) -> io::Result<Touched> {
    let mut touched = Touched::default();
    let query = Query {
        flags: PROTECT_MATCHING,
        inverted: PAGE_IS_PRESENT,
        any_of: PAGE_IS_WRITTEN | PAGE_IS_PRESENT,
        told: PAGE_IS_WRITTEN | PAGE_IS_PRESENT | PAGE_IS_SWAPPED | guard,
        ..Query::default()
    };
    walk(pagemap, range, query, |pages, categories| {
        if categories & guard != 0 {
            touched.guards.insert(pages);
        } else if categories & (PAGE_IS_PRESENT | PAGE_IS_SWAPPED) == 0 {
            touched.absent.insert(pages);
        } else if categories & PAGE_IS_WRITTEN != 0 {
            touched.written.insert(pages);
        }
    })?;
    Ok(touched)
}

/// The guards in `range`, whole pages. Before Linux 6.15 none are found.
pub(crate) fn guards(pagemap: &File, range: Range<u64>) -> io::Result<Ranges> {
    let mut found = Ranges::new();
    let query = Query { all_of: PAGE_IS_GUARD, told: PAGE_IS_GUARD, ..Query::default() };
    match walk(pagemap, range, query, |pages, _| found.insert(pages)) {
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOTTY | libc::EINVAL)) => Ok(Ranges::new()),
        answer => answer.map(|()| found),
    }
}

/// How many bytes of pages [`take_touched`] would report as written. Changes nothing.
pub(crate) fn count_written(pagemap: &File, range: Range<u64>) -> io::Result<u64> {
    let count = |guard: u64| {
        let query = Query {
            inverted: guard,
            all_of: PAGE_IS_WRITTEN | guard,
            told: PAGE_IS_WRITTEN,
            ..Query::default()
        };
        let mut written_bytes = 0;
        walk(pagemap, range.clone(), query, |pages, _| written_bytes += pages.end - pages.start)?;
        Ok(written_bytes)
    };
    match count(PAGE_IS_GUARD) {
        Err(error) if io::Error::raw_os_error(&error) == Some(libc::EINVAL) => count(0),
        answer => answer,
    }
}

/// The pages of `range` that the kernel has marked soft-dirty.
pub(crate) fn soft_dirty(pagemap: &File, range: Range<u64>) -> io::Result<Ranges> {
    let mut found = Ranges::new();
    let query = Query { all_of: PAGE_IS_SOFT_DIRTY, told: PAGE_IS_SOFT_DIRTY, ..Query::default() };
    match walk(pagemap, range.clone(), query, |pages, _| found.insert(pages)) {
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOTTY | libc::EINVAL)) => {
            found = Ranges::new();
            words(pagemap, range, |word| word & WORD_SOFT_DIRTY != 0, |page, _| found.insert(page))?;
        }
        answer => answer?,
    }
    Ok(found)
}

/// The pages of a private mapping of a file that no longer belong to the file, because they were
/// written. They may be in swap. A page that is discarded belongs to the file again.
pub(crate) fn copied(pagemap: &File, range: Range<u64>) -> io::Result<Ranges> {
    let mut found = Ranges::new();
    let query = Query {
        inverted: PAGE_IS_FILE,
        all_of: PAGE_IS_FILE,
        any_of: PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
        told: PAGE_IS_PRESENT,
        ..Query::default()
    };
    match walk(pagemap, range.clone(), query, |pages, _| found.insert(pages)) {
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOTTY | libc::EINVAL)) => {
            copied_by_words(pagemap, range)
        }
        answer => answer.map(|()| found),
    }
}

fn copied_by_words(pagemap: &File, range: Range<u64>) -> io::Result<Ranges> {
    let mut found = Ranges::new();
    let is_copied = |word| word & WORD_PRESENT_OR_SWAPPED != 0 && word & WORD_FILE == 0;
    words(pagemap, range, is_copied, |page, _| found.insert(page))?;
    Ok(found)
}

/// Calls `found` with the matching pages of `range` and their categories, in order.
fn walk(
    pagemap: &File,
    range: Range<u64>,
    query: Query,
    mut found: impl FnMut(Range<u64>, u64),
) -> io::Result<()> {
    let nothing = ScanRange { start: 0, end: 0, categories: 0 };
    let mut answers = vec![nothing; RANGES_PER_FIRST_SCAN];
    let mut start = range.start;
    while start < range.end {
        let mut argument = ScanArgument {
            size_bytes: size_of::<ScanArgument>() as u64,
            flags: query.flags,
            start,
            end: range.end,
            walk_end: 0,
            ranges: answers.as_mut_ptr().expose_provenance() as u64,
            range_count: answers.len() as u64,
            max_pages: 0,
            category_inverted: query.inverted,
            category_mask: query.all_of,
            category_anyof_mask: query.any_of,
            return_mask: query.told,
        };
        // SAFETY: the ioctl reads and writes one `pm_scan_arg`, whose layout and size
        // `ScanArgument` has. It writes at most `range_count` `page_region`s to `ranges`; these are
        // the length and the place of `answers`. On a file of another kind it fails with ENOTTY.
        let answered = unsafe { libc::ioctl(pagemap.as_raw_fd(), PAGEMAP_SCAN as _, &raw mut argument) };
        let answered = usize::try_from(answered).map_err(|_| io::Error::last_os_error())?;
        let mut walked_to = argument.walk_end;
        for answer in &answers[..answered.min(answers.len())] {
            found(answer.start.max(range.start)..answer.end.min(range.end), answer.categories);
            // If there are over 512 ranges, Linux 6.18 returns ranges beyond the `walk_end` that it
            // reports.
            walked_to = walked_to.max(answer.end);
        }
        if walked_to <= start {
            return Err(io::Error::other("the kernel's scan of the page tables does not advance"));
        }
        start = walked_to;
        answers.resize(RANGES_PER_SCAN, nothing);
    }
    Ok(())
}

/// Calls `found` with every wanted page and its word.
fn words(
    pagemap: &File,
    range: Range<u64>,
    is_wanted: impl Fn(u64) -> bool,
    mut found: impl FnMut(Range<u64>, u64),
) -> io::Result<()> {
    let page_bytes = rustix::param::page_size() as u64;
    let mut page = range.start / page_bytes;
    let end_page = range.end.div_ceil(page_bytes);
    let most = usize::try_from(end_page - page).map_or(WORDS_PER_READ, |pages| pages.min(WORDS_PER_READ));
    let mut words = vec![0u8; most * 8];
    while page < end_page {
        let wanted = usize::try_from(end_page - page).map_or(WORDS_PER_READ, |left| left.min(WORDS_PER_READ));
        let words = &mut words[..wanted * 8];
        pagemap.read_exact_at(words, page * 8)?;
        for word in words.as_chunks::<8>().0 {
            let word = u64::from_ne_bytes(*word);
            if is_wanted(word) {
                found(page * page_bytes..(page + 1) * page_bytes, word);
            }
            page += 1;
        }
    }
    Ok(())
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
        // Every other page, so that one scan cannot return all ranges; then a run.
        let written: Vec<usize> = (0..4000).step_by(2).chain(4500..4600).collect();
        for page in &written {
            memory[page * page_bytes] = 1;
        }
        let mut expected = Ranges::new();
        for page in written {
            let start = base + (page * page_bytes) as u64;
            expected.insert(start..start + page_bytes as u64);
        }
        let pagemap = File::open("/proc/self/pagemap").unwrap();
        let whole = base..base + memory.len() as u64;
        // `assert!`, because the lists are long.
        assert!(pages_by_words(&pagemap, whole.clone()).unwrap().held == expected);
        let scanned = scan_pages(&pagemap, whole.clone(), 0).unwrap();
        assert!(scanned.held == expected && scanned.own == expected);
        // A page that was only read is the shared page of zeros.
        assert_eq!(std::hint::black_box(memory[4999 * page_bytes]), 0);
        let found = super::pages(&pagemap, whole).unwrap();
        assert!(found.held == expected && found.guards.is_empty());
        let last = base + 4999 * page_bytes as u64;
        assert_eq!(found.zeros, std::slice::from_ref(&(last..last + page_bytes as u64)));
    }

    #[test]
    fn markers_are_taken_out_of_the_pages() {
        let without = |ranges: &[Range<u64>], others: &[Range<u64>]| {
            let (ranges, others): (Ranges, Ranges) =
                (ranges.iter().cloned().collect(), others.iter().cloned().collect());
            ranges.difference(&others)
        };
        assert_eq!(without(&[0..10, 20..30], &[2..4, 8..10, 25..26]), [0..2, 4..8, 20..25, 26..30]);
        assert_eq!(without(&[0..10, 20..30], std::slice::from_ref(&(0..30))), []);
        assert_eq!(without(&[0..10, 20..30], &[5..22, 40..50]), [0..5, 22..30]);
        assert_eq!(without(std::slice::from_ref(&(5..10)), &[]), std::slice::from_ref(&(5..10)));
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
        // A plain file has no scan either and answers as the pagemap of an old kernel does.
        let file = File::open("/proc/self/stat").unwrap();
        assert_eq!(scan_pages(&file, 0..4096, 0).unwrap_err().raw_os_error(), Some(libc::ENOTTY));
    }
}
