//! Memory of this process that is filled at its first access, by `userfaultfd` in missing mode. See
//! the kernel's [userfaultfd
//! documentation](https://docs.kernel.org/admin-guide/mm/userfaultfd.html).
//!
//! A thread that accesses a missing page sleeps until the handler answers: with bytes, with zeros,
//! or with the news that there are none. The thread that answers must never access the memory
//! itself.
//!
//! Every answer fills only pages that are missing. The kernel accepts no answer for a page that is
//! present, nor for memory that is not registered with this descriptor. So an answer cannot change
//! bytes that somebody has written, and after the memory is unmapped it has no effect.
//!
//! If a page is present before it was answered, nobody filled it: its zeros are not the snapshot's
//! bytes. So the memory is registered while nobody can access it, and is checked when it becomes
//! accessible (`pages.rs` describes what the kernel does with locked memory). Each answer also
//! returns how many bytes were already present.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec};

use super::pagemap;
use super::pages::Pages;
use super::userfault::{self, Faults};

/// `_IOR(0xAA, 0x02, struct uffdio_range)`, of 16 (0x10) bytes.
const WAKE: u32 = 0x8010_aa02;
/// `_IOWR(0xAA, 0x03, struct uffdio_copy)`, of 40 (0x28) bytes.
const COPY: u32 = 0xc028_aa03;
/// `_IOWR(0xAA, 0x04, struct uffdio_zeropage)`, of 32 (0x20) bytes.
const ZEROPAGE: u32 = 0xc020_aa04;
/// `_IOWR(0xAA, 0x08, struct uffdio_poison)`, of 32 (0x20) bytes. Linux 6.6.
const POISON: u32 = 0xc020_aa08;
const REGISTER_MODE_MISSING: u64 = 1;
/// The answer alone wakes no thread.
const MODE_DONT_WAKE: u64 = 1;

/// The size of a `struct uffd_msg`.
const MESSAGE_BYTES: usize = 32;
/// The first byte of a message about a page fault; the address is in the third of its four words.
const EVENT_PAGEFAULT: u8 = 0x12;

/// The kernel's `struct uffdio_copy`.
#[repr(C)]
struct CopyArgument {
    to: u64,
    from: u64,
    length_bytes: u64,
    mode: u64,
    done_bytes: i64,
}
const _: () = assert!(size_of::<CopyArgument>() == 0x28);

/// The kernel's `struct uffdio_zeropage` and `struct uffdio_poison`.
#[repr(C)]
struct RangeArgument {
    start: u64,
    length_bytes: u64,
    mode: u64,
    done_bytes: i64,
}
const _: () = assert!(size_of::<RangeArgument>() == 0x20);

/// The missing pages of one memory.
#[derive(Debug)]
pub(crate) struct Missing {
    descriptor: OwnedFd,
    /// Becomes readable when no thread needs to wait for page faults any more.
    ended: OwnedFd,
    start: u64,
    length_bytes: u64,
    kernel_waits: bool,
    made_by: u32,
    is_registered: AtomicBool,
}

/// What ended a wait for page faults.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Woken {
    /// There may be a page fault.
    Fault,
    /// The time is over and no page fault came.
    Time,
    /// There is nothing to wait for any more.
    End,
}

/// Fresh private memory in which every page is missing; a forked child does not get it.
///
/// `ENOSYS` where the kernel has no `userfaultfd`, `EPERM` where a sandbox forbids it, `ENOMEM` if
/// the address space is too small. Drop the second value before the first; then no thread keeps
/// waiting.
pub(crate) fn map_missing(length_bytes: usize) -> io::Result<(Pages, Missing)> {
    let missing = Missing::open()?;
    let (pages, missing) = Pages::zeros_with(length_bytes, |addresses| {
        missing.register(addresses.start, addresses.end - addresses.start)
    })?;
    pages.keep_from_children()?;
    missing.check_nothing_is_there()?;
    Ok((pages, missing))
}

impl Missing {
    /// Without any memory yet. `ENOSYS` where the kernel has no `userfaultfd`, `EPERM` where a
    /// sandbox forbids it.
    pub(crate) fn open() -> io::Result<Missing> {
        let (descriptor, kernel_waits) = match userfault::open(Faults::All) {
            Ok(descriptor) => (descriptor, true),
            // This is the answer to an unprivileged user.
            Err(error) if error.raw_os_error() == Some(libc::EPERM) => {
                (userfault::open(Faults::OfUserMode)?, false)
            }
            Err(error) => return Err(error),
        };
        userfault::agree(&descriptor, 0)?;
        let ended = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Missing {
            descriptor,
            ended,
            start: 0,
            length_bytes: 0,
            kernel_waits,
            made_by: std::process::id(),
            is_registered: AtomicBool::new(false),
        })
    }

    /// Registers the memory at these addresses, which must be private, fresh, and not yet
    /// accessible. Its owner keeps it mapped until this is dropped.
    pub(crate) fn register(mut self, start: u64, length_bytes: u64) -> io::Result<Missing> {
        let length_bytes = length_bytes.next_multiple_of(rustix::param::page_size() as u64);
        userfault::register_mode(&self.descriptor, start..start + length_bytes, REGISTER_MODE_MISSING)?;
        (self.start, self.length_bytes) = (start, length_bytes);
        self.is_registered = AtomicBool::new(true);
        Ok(self)
    }

    /// An error if a page is present, because nobody can have filled it. Call this when the memory
    /// has become accessible and before anybody accesses it.
    pub(crate) fn check_nothing_is_there(&self) -> io::Result<()> {
        let addresses = self.start..self.start + self.length_bytes;
        let found =
            File::open("/proc/self/pagemap").and_then(|it| pagemap::is_anything_there(&it, addresses));
        match found {
            Ok(true) => Err(io::Error::other(
                "the kernel has populated the memory before it could be filled; does this process lock all that it \
                 maps (mlockall with MCL_FUTURE)?",
            )),
            Ok(false) => Ok(()),
            // Where this cannot be checked, it must suffice that nobody could access the memory. A
            // page that is present nevertheless is found when it is to be filled.
            Err(error) => {
                tracing::debug!("whether fresh memory is empty cannot be seen: {error}");
                Ok(())
            }
        }
    }

    /// Whether the kernel waits for an answer too when a system call gets memory with a missing
    /// page. If not, such a call fails with `EFAULT`.
    pub(crate) fn kernel_waits(&self) -> bool {
        self.kernel_waits
    }

    /// The offset of a page that some thread waits for; `None` if there is none.
    pub(crate) fn next_fault(&self) -> io::Result<Option<u64>> {
        loop {
            let mut message = [0u8; MESSAGE_BYTES];
            match rustix::io::read(&self.descriptor, &mut message) {
                Ok(MESSAGE_BYTES) => {}
                Ok(_) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Err(rustix::io::Errno::AGAIN) => return Ok(None),
                Err(rustix::io::Errno::INTR) => continue,
                Err(error) => return Err(error.into()),
            }
            let words = message.as_chunks::<8>().0;
            let address = words.get(2).map_or(0, |word| u64::from_ne_bytes(*word));
            let offset_bytes = address.wrapping_sub(self.start);
            if message[0] == EVENT_PAGEFAULT && offset_bytes < self.length_bytes {
                return Ok(Some(offset_bytes));
            }
        }
    }

    /// Waits until a thread accesses a missing page, at most for this time.
    pub(crate) fn wait(&self, seconds: u32) -> io::Result<Woken> {
        let mut descriptors =
            [PollFd::new(&self.ended, PollFlags::IN), PollFd::new(&self.descriptor, PollFlags::IN)];
        let timeout = Timespec { tv_sec: i64::from(seconds), tv_nsec: 0 };
        match rustix::event::poll(&mut descriptors, Some(&timeout)) {
            Ok(0) => Ok(Woken::Time),
            Ok(_) if descriptors[0].revents().is_empty() => Ok(Woken::Fault),
            Ok(_) => Ok(Woken::End),
            Err(rustix::io::Errno::INTR) => Ok(Woken::Fault),
            Err(error) => Err(error.into()),
        }
    }

    /// From here on, every wait for page faults ends at once.
    pub(crate) fn end(&self) {
        // This fails only if the number in the eventfd overflows.
        let _ = rustix::io::write(&self.ended, &1u64.to_ne_bytes());
    }

    /// Fills those of these pages that are missing with `bytes`, which are whole pages. Wakes no
    /// thread. Returns how many bytes of the pages were already present.
    pub(crate) fn copy(&self, offset_bytes: u64, bytes: &[u8]) -> io::Result<u64> {
        let from = bytes.as_ptr().expose_provenance() as u64;
        self.answer(offset_bytes, bytes.len() as u64, |to, left_bytes| {
            let from = from + (bytes.len() as u64 - left_bytes);
            let mut argument =
                CopyArgument { to, from, length_bytes: left_bytes, mode: MODE_DONT_WAKE, done_bytes: 0 };
            // SAFETY: the ioctl reads and writes one `uffdio_copy`, whose layout and size
            // `CopyArgument` has. The kernel reads `length_bytes` bytes from `from` on, which are
            // inside `bytes`: `answer` never leaves more than their length. It writes only to pages
            // that are registered with this descriptor and missing, so no byte changes that anybody
            // has ever seen.
            let answer = unsafe { libc::ioctl(self.descriptor.as_raw_fd(), COPY as _, &raw mut argument) };
            (answer, argument.done_bytes)
        })
    }

    /// Fills those of these pages that are missing with zeros. Wakes no thread.
    pub(crate) fn zero(&self, pages: Range<u64>) -> io::Result<()> {
        self.answer_range(ZEROPAGE, pages).map(drop)
    }

    /// Poisons those of these pages that are missing, so that an access raises `SIGBUS`, or
    /// `SIGSEGV` before Linux 6.6. Wakes no thread. The memory must be mapped.
    pub(crate) fn spoil(&self, pages: Range<u64>) -> io::Result<()> {
        match self.answer_range(POISON, pages.clone()) {
            Err(error) if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::ENOTTY | libc::EPERM)) => {
            }
            answer => return answer.map(drop),
        }
        self.close_off(pages)
    }

    /// Makes all of these pages inaccessible (`SIGSEGV`), present ones too. The memory must be
    /// mapped.
    pub(crate) fn close_off(&self, pages: Range<u64>) -> io::Result<()> {
        let (address, length_bytes) = self.checked(pages.start, pages.end.saturating_sub(pages.start))?;
        let address = usize::try_from(address).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))?;
        let length_bytes = usize::try_from(length_bytes).map_err(|_| io::ErrorKind::InvalidInput)?;
        // SAFETY: the pages are inside the memory (`checked`), which the caller keeps mapped. An
        // access afterwards raises a signal, which is the purpose; nothing else changes.
        let answer = unsafe {
            libc::mprotect(std::ptr::without_provenance_mut(address), length_bytes, libc::PROT_NONE)
        };
        if answer < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    /// Wakes the threads that wait for these pages; they retry their access.
    pub(crate) fn wake(&self, pages: Range<u64>) {
        let Ok((start, length_bytes)) = self.checked(pages.start, pages.end - pages.start) else { return };
        let mut argument = [start, length_bytes];
        // SAFETY: the ioctl reads one `uffdio_range`, which is two 64-bit numbers: start and
        // length.
        let answer = unsafe { libc::ioctl(self.descriptor.as_raw_fd(), WAKE as _, argument.as_mut_ptr()) };
        debug_assert!(answer == 0, "{}", io::Error::last_os_error());
    }

    /// Turns all pages that are still missing into ordinary memory, which is zeros, and wakes the
    /// waiting threads.
    pub(crate) fn unregister(&self) -> io::Result<()> {
        userfault::unregister(&self.descriptor, self.start..self.start + self.length_bytes)?;
        self.is_registered.store(false, Ordering::Relaxed);
        // The kernel wakes before it locks the mapping, so a thread that begins to wait between the
        // two steps was not woken (seen on Linux 6.18). After this point no thread can begin to
        // wait.
        self.wake(0..self.length_bytes);
        Ok(())
    }

    fn answer_range(&self, request: u32, pages: Range<u64>) -> io::Result<u64> {
        self.answer(pages.start, pages.end.saturating_sub(pages.start), |start, length_bytes| {
            let mut argument = RangeArgument { start, length_bytes, mode: MODE_DONT_WAKE, done_bytes: 0 };
            // SAFETY: the ioctl reads and writes one `uffdio_zeropage` or `uffdio_poison`, whose
            // layout and size `RangeArgument` has. It concerns only pages that are registered with
            // this descriptor and missing, so no byte changes that anybody has ever seen.
            let answer = unsafe { libc::ioctl(self.descriptor.as_raw_fd(), request as _, &raw mut argument) };
            (answer, argument.done_bytes)
        })
    }

    /// Calls `ioctl` with an address and a length until all pages are present. `ioctl` returns the
    /// system call's result and the number of bytes done. This returns how many bytes of the pages
    /// were present before.
    fn answer(
        &self,
        offset_bytes: u64,
        length_bytes: u64,
        mut ioctl: impl FnMut(u64, u64) -> (libc::c_int, i64),
    ) -> io::Result<u64> {
        let page_bytes = rustix::param::page_size() as u64;
        let (mut at, mut left_bytes) = self.checked(offset_bytes, length_bytes)?;
        let mut there_bytes = 0;
        while left_bytes > 0 {
            let (answer, done_bytes) = ioctl(at, left_bytes);
            let error = io::Error::last_os_error();
            let done_bytes = match u64::try_from(done_bytes) {
                _ if answer == 0 => left_bytes,
                Ok(done_bytes) if done_bytes > 0 => done_bytes.min(left_bytes),
                _ => match error.raw_os_error() {
                    // That page is already present.
                    Some(libc::EEXIST) => {
                        there_bytes += page_bytes;
                        page_bytes
                    }
                    // Another thread of this process is changing its mappings.
                    Some(libc::EAGAIN | libc::EINTR) => 0,
                    _ => return Err(error),
                },
            };
            at += done_bytes;
            left_bytes = left_bytes.saturating_sub(done_bytes);
        }
        Ok(there_bytes)
    }

    /// The address and the length of this part of the memory; an error if it is not inside.
    fn checked(&self, offset_bytes: u64, length_bytes: u64) -> io::Result<(u64, u64)> {
        match offset_bytes.checked_add(length_bytes) {
            Some(end) if end <= self.length_bytes => Ok((self.start + offset_bytes, length_bytes)),
            _ => Err(io::ErrorKind::InvalidInput.into()),
        }
    }
}

impl Drop for Missing {
    /// This is not left to closing the descriptor. A child that was forked meanwhile has the
    /// descriptor too, and while it lives, a thread that accesses a missing page would wait for an
    /// answer that never comes. The memory is still mapped here.
    fn drop(&mut self) {
        if self.made_by == std::process::id()
            && self.is_registered.load(Ordering::Relaxed)
            && let Err(error) = self.unregister()
        {
            tracing::debug!("memory could not be unregistered: {error}");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::time::Duration;

    use super::*;

    #[test]
    fn nobody_waits_for_memory_that_is_let_go_in_the_moment_of_the_touch() {
        let (page_bytes, pages) = (rustix::param::page_size(), 64);
        for _ in 0..300 {
            let (map, missing) = match map_missing(pages * page_bytes) {
                Ok(both) => both,
                Err(error) => return eprintln!("not tested: {error}"),
            };
            let (touched, all_touched) = mpsc::channel();
            let toucher = std::thread::spawn(move || {
                let sum: u64 = (0..pages).map(|page| u64::from(map[page * page_bytes])).sum();
                // Together with the memory, which must not be unmapped before.
                touched.send((sum, map)).unwrap();
            });
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    while missing.wait(60).unwrap() == Woken::Fault {
                        if let Some(at) = missing.next_fault().unwrap() {
                            // An error if it was unregistered meanwhile.
                            let _ = missing.zero(at..at + page_bytes as u64);
                            missing.wake(at..at + page_bytes as u64);
                        }
                    }
                });
                // Each run takes some microseconds; this point is somewhere in the middle.
                std::thread::sleep(Duration::from_micros(100));
                missing.unregister().unwrap();
                missing.end();
            });
            let sum = all_touched.recv_timeout(Duration::from_secs(60)).map(|(sum, _)| sum);
            assert_eq!(sum, Ok(0), "a thread waits for ever");
            toucher.join().unwrap();
        }
    }

    #[test]
    fn a_touch_waits_for_its_answer_and_what_is_there_stays_as_it_is() {
        let page_bytes = rustix::param::page_size();
        let (mut map, missing) = match map_missing(4 * page_bytes) {
            Ok(both) => both,
            Err(error) => return eprintln!("not tested: {error}"),
        };
        assert_eq!(missing.copy(page_bytes as u64, &vec![7; page_bytes]).unwrap(), 0);
        map[page_bytes] = 8;
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while missing.next_fault().unwrap() != Some(2 * page_bytes as u64) {
                    assert_eq!(missing.wait(60).unwrap(), Woken::Fault);
                }
                // The second of these pages is present.
                assert_eq!(missing.copy(0, &vec![9; 3 * page_bytes]).unwrap(), page_bytes as u64);
                missing.wake(0..3 * page_bytes as u64);
            });
            assert_eq!(map[2 * page_bytes], 9);
        });
        assert_eq!((map[0], map[page_bytes], map[page_bytes + 1]), (9, 8, 7));
        missing.zero(0..4 * page_bytes as u64).unwrap();
        assert_eq!((map[0], map[3 * page_bytes]), (9, 0));
        assert!(missing.zero(0..5 * page_bytes as u64).is_err(), "outside");
        missing.end();
        assert_eq!(missing.wait(60).unwrap(), Woken::End);
        missing.unregister().unwrap();
    }
}
