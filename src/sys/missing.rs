//! Memory of this process that is filled on first touch, by `userfaultfd` in missing mode.
//!
//! A thread that touches a page which is not there sleeps until somebody has answered: with bytes, with
//! zeros, or with the news that there are none. Who answers must never touch the memory itself.
//!
//! All answers go to pages of this memory that are not there; the kernel takes none for a page that is, nor
//! for memory that is not registered with this descriptor. So they cannot change what somebody has written,
//! and after the memory is unmapped they do nothing.
//!
//! A page that is there before it was answered is one that nobody filled: its zeros are not the snapshot's bytes. So the
//! memory is registered while nobody can touch it, and looked at when it can be touched (`pages.rs` tells what the
//! kernel does with memory that is locked); and an answer tells how much was there already.

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
/// Nobody is woken by the answer itself.
const MODE_DONT_WAKE: u64 = 1;

/// How long a `struct uffd_msg` is.
const MESSAGE_BYTES: usize = 32;
/// Its first byte when it is about a fault; the address is in the third of its four words.
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

/// The pages of one memory that are not there yet.
#[derive(Debug)]
pub(crate) struct Missing {
    descriptor: OwnedFd,
    /// Readable from when nobody need wait for faults any more.
    ended: OwnedFd,
    start: u64,
    length_bytes: u64,
    kernel_waits: bool,
    made_by: u32,
    is_registered: AtomicBool,
}

/// What woke whoever waits for faults.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Woken {
    /// There may be a fault.
    Fault,
    /// Nothing came.
    Time,
    /// There is nothing to wait for any more.
    End,
}

/// Fresh private memory in which every page is missing; a child that is forked does not get it.
///
/// `ENOSYS` where the kernel has no `userfaultfd`, `EPERM` where a sandbox forbids it, `ENOMEM` if there are
/// not so many addresses. Dropping the second before the first lets nobody wait.
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
    /// Of no memory yet. `ENOSYS` where the kernel has no `userfaultfd`, `EPERM` where a sandbox forbids it.
    pub(crate) fn open() -> io::Result<Missing> {
        let (descriptor, kernel_waits) = match userfault::open(Faults::All) {
            Ok(descriptor) => (descriptor, true),
            // What an unprivileged user gets.
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

    /// Of the memory at these addresses: private, fresh, and such as nobody can touch yet. Its owner keeps it
    /// mapped until this is dropped.
    pub(crate) fn register(mut self, start: u64, length_bytes: u64) -> io::Result<Missing> {
        let length_bytes = length_bytes.next_multiple_of(rustix::param::page_size() as u64);
        userfault::register_mode(&self.descriptor, start..start + length_bytes, REGISTER_MODE_MISSING)?;
        (self.start, self.length_bytes) = (start, length_bytes);
        self.is_registered = AtomicBool::new(true);
        Ok(self)
    }

    /// An error if a page is there, which nobody can have filled. To be called when the memory can be touched, and
    /// before anybody does.
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
            // Where it cannot be looked at, that nobody could touch it must do; and what is there all the same is met
            // when it is filled.
            Err(error) => {
                tracing::debug!("whether fresh memory is empty cannot be seen: {error}");
                Ok(())
            }
        }
    }

    /// Whether the kernel waits for an answer too, when a system call is given memory of a missing page.
    /// Else such a call fails with `EFAULT`.
    pub(crate) fn kernel_waits(&self) -> bool {
        self.kernel_waits
    }

    /// A page that somebody waits for, as its offset; none if nobody does.
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

    /// Waits until a thread touches a missing page, but not for longer than this.
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

    /// From here on whoever waits for faults is told that it is over.
    pub(crate) fn end(&self) {
        // The number in an eventfd would have to overflow before this failed.
        let _ = rustix::io::write(&self.ended, &1u64.to_ne_bytes());
    }

    /// The missing ones of these pages get `bytes`, which are whole pages. Nobody is woken. Answers how many bytes of
    /// pages were there already.
    pub(crate) fn copy(&self, offset_bytes: u64, bytes: &[u8]) -> io::Result<u64> {
        let from = bytes.as_ptr().expose_provenance() as u64;
        self.answer(offset_bytes, bytes.len() as u64, |to, left_bytes| {
            let from = from + (bytes.len() as u64 - left_bytes);
            let mut argument =
                CopyArgument { to, from, length_bytes: left_bytes, mode: MODE_DONT_WAKE, done_bytes: 0 };
            // SAFETY: the ioctl reads and writes one `uffdio_copy`, whose layout and size `CopyArgument` has.
            // The kernel reads `length_bytes` bytes from `from` on, which are inside `bytes`: `answer` never
            // leaves more than their length. It writes to pages that are registered with this descriptor and
            // not there, so no byte that anybody has ever seen changes.
            let answer = unsafe { libc::ioctl(self.descriptor.as_raw_fd(), COPY as _, &raw mut argument) };
            (answer, argument.done_bytes)
        })
    }

    /// The missing ones of these pages become zeros. Nobody is woken.
    pub(crate) fn zero(&self, pages: Range<u64>) -> io::Result<()> {
        self.answer_range(ZEROPAGE, pages).map(drop)
    }

    /// The missing ones of these pages become such as nobody can touch: `SIGBUS`, or `SIGSEGV` before
    /// Linux 6.6. Nobody is woken. To be called while the memory is mapped.
    pub(crate) fn spoil(&self, pages: Range<u64>) -> io::Result<()> {
        match self.answer_range(POISON, pages.clone()) {
            Err(error) if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::ENOTTY | libc::EPERM)) => {
            }
            answer => return answer.map(drop),
        }
        self.close_off(pages)
    }

    /// These pages become such as nobody can touch (`SIGSEGV`), also those that are there. To be called while the
    /// memory is mapped.
    pub(crate) fn close_off(&self, pages: Range<u64>) -> io::Result<()> {
        let (address, length_bytes) = self.checked(pages.start, pages.end.saturating_sub(pages.start))?;
        let address = usize::try_from(address).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))?;
        let length_bytes = usize::try_from(length_bytes).map_err(|_| io::ErrorKind::InvalidInput)?;
        // SAFETY: the pages are inside the memory (`checked`), which the caller keeps mapped. Whoever touches
        // them afterwards gets a signal, which is what is wanted; nothing else changes.
        let answer = unsafe {
            libc::mprotect(std::ptr::without_provenance_mut(address), length_bytes, libc::PROT_NONE)
        };
        if answer < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    /// Has the threads that wait for these pages look again.
    pub(crate) fn wake(&self, pages: Range<u64>) {
        let Ok((start, length_bytes)) = self.checked(pages.start, pages.end - pages.start) else { return };
        let mut argument = [start, length_bytes];
        // SAFETY: the ioctl reads one `uffdio_range`, which is two 64-bit numbers: start and length.
        let answer = unsafe { libc::ioctl(self.descriptor.as_raw_fd(), WAKE as _, argument.as_mut_ptr()) };
        debug_assert!(answer == 0, "{}", io::Error::last_os_error());
    }

    /// What is still missing becomes ordinary memory, which is zeros; threads that wait are woken.
    pub(crate) fn unregister(&self) -> io::Result<()> {
        userfault::unregister(&self.descriptor, self.start..self.start + self.length_bytes)?;
        self.is_registered.store(false, Ordering::Relaxed);
        // The kernel wakes before it locks the mapping, so a thread that begins to wait between the two
        // was not woken (seen on Linux 6.18). From here on none can begin.
        self.wake(0..self.length_bytes);
        Ok(())
    }

    fn answer_range(&self, request: u32, pages: Range<u64>) -> io::Result<u64> {
        self.answer(pages.start, pages.end.saturating_sub(pages.start), |start, length_bytes| {
            let mut argument = RangeArgument { start, length_bytes, mode: MODE_DONT_WAKE, done_bytes: 0 };
            // SAFETY: the ioctl reads and writes one `uffdio_zeropage` or `uffdio_poison`, whose layout and
            // size `RangeArgument` has. It concerns pages that are registered with this descriptor and not
            // there, so no byte that anybody has ever seen changes.
            let answer = unsafe { libc::ioctl(self.descriptor.as_raw_fd(), request as _, &raw mut argument) };
            (answer, argument.done_bytes)
        })
    }

    /// Calls `ioctl` with an address and a length until all pages are there. It answers what the system call
    /// returned and how many bytes were done. Answers how many bytes of pages were there before.
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
                    // That page is there already.
                    Some(libc::EEXIST) => {
                        there_bytes += page_bytes;
                        page_bytes
                    }
                    // The mappings are just being changed, elsewhere in this process.
                    Some(libc::EAGAIN | libc::EINTR) => 0,
                    _ => return Err(error),
                },
            };
            at += done_bytes;
            left_bytes = left_bytes.saturating_sub(done_bytes);
        }
        Ok(there_bytes)
    }

    /// The address of this part of the memory, and its length; an error if it is not inside.
    fn checked(&self, offset_bytes: u64, length_bytes: u64) -> io::Result<(u64, u64)> {
        match offset_bytes.checked_add(length_bytes) {
            Some(end) if end <= self.length_bytes => Ok((self.start + offset_bytes, length_bytes)),
            _ => Err(io::ErrorKind::InvalidInput.into()),
        }
    }
}

impl Drop for Missing {
    /// Not left to the closing of the descriptor: a child that was forked meanwhile has that too, and while it lives who
    /// touches a missing page would wait for an answer that nobody gives. The memory is still mapped.
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
                // With the memory, which must not be unmapped before.
                touched.send((sum, map)).unwrap();
            });
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    while missing.wait(60).unwrap() == Woken::Fault {
                        if let Some(at) = missing.next_fault().unwrap() {
                            // An error when it has been let go meanwhile.
                            let _ = missing.zero(at..at + page_bytes as u64);
                            missing.wake(at..at + page_bytes as u64);
                        }
                    }
                });
                // Each takes some microseconds; it is somewhere in the middle.
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
                // The second of these pages is there.
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
