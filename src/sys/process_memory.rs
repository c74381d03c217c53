//! Memory accessed through the kernel: reads the memory of another process, and reads and writes
//! memory of this process that other threads may write at the same time, so that no plain reference
//! may point to it.

use std::io;
use std::ops::Range;
use std::sync::atomic::AtomicU8;

use libc::c_void;

/// Copies memory of the process that thread `tid` belongs to, starting at `address`. Returns how
/// many bytes it copied. These are fewer than requested if a later page cannot be read; if the
/// first page cannot be read, the result is an error (`EFAULT`).
pub(crate) fn read(tid: u32, address: u64, buffer: &mut [u8]) -> io::Result<usize> {
    let Ok(address) = usize::try_from(address) else {
        return Err(io::Error::from_raw_os_error(libc::EFAULT));
    };
    let local = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
    let remote =
        libc::iovec { iov_base: std::ptr::without_provenance_mut::<c_void>(address), iov_len: buffer.len() };
    // SAFETY: the kernel writes at most `iov_len` bytes to the local place; these are the length
    // and place of `buffer`, which is borrowed mutably for the call. The remote place is an address
    // in the other process, which the kernel checks.
    let copied =
        unsafe { libc::process_vm_readv(tid.cast_signed(), &raw const local, 1, &raw const remote, 1, 0) };
    usize::try_from(copied).map_err(|_| io::Error::last_os_error())
}

/// The number of ranges in one call: the kernel's limit, `UIO_MAXIOV`.
const RANGES_PER_CALL: usize = 1024;

/// Copies the memory of this process at `ranges` into `buffer`, one range after another; the buffer
/// is as long as all ranges together. `EFAULT` if any byte cannot be read.
///
/// The kernel reads the bytes. If another thread writes them at the same time, the copy may be
/// torn, but no address can do harm. This uses `process_vm_writev`, which reads its local side
/// directly. `process_vm_readv` would look up every page separately (twice the time, measured on
/// scattered pages).
pub(crate) fn copy_own(ranges: &[Range<u64>], mut buffer: &mut [u8]) -> io::Result<()> {
    let fault = || io::Error::from_raw_os_error(libc::EFAULT);
    let own_pid = std::process::id().cast_signed();
    for ranges in ranges.chunks(RANGES_PER_CALL) {
        let mut from = Vec::with_capacity(ranges.len());
        let mut length_bytes = 0;
        for range in ranges {
            let start = usize::try_from(range.start).map_err(|_| fault())?;
            let iov_len = usize::try_from(range.end - range.start).map_err(|_| fault())?;
            from.push(libc::iovec { iov_base: std::ptr::without_provenance_mut::<c_void>(start), iov_len });
            length_bytes += iov_len;
        }
        let (part, rest) = buffer.split_at_mut_checked(length_bytes).ok_or_else(fault)?;
        let to = libc::iovec { iov_base: part.as_mut_ptr().cast(), iov_len: length_bytes };
        // SAFETY: the kernel writes at most `iov_len` bytes to `to`, which are the place and length
        // of `part`, borrowed mutably for the call. It reads at most `from.len()` ranges of `from`,
        // and checks their addresses as in any system call.
        let copied =
            unsafe { libc::process_vm_writev(own_pid, from.as_ptr(), from.len() as _, &raw const to, 1, 0) };
        match usize::try_from(copied) {
            Err(_) => return Err(io::Error::last_os_error()),
            Ok(copied) if copied == length_bytes => buffer = rest,
            Ok(_) => return Err(fault()),
        }
    }
    Ok(())
}

/// Copies `bytes` to the memory of this process at `address`. `EFAULT` if any byte cannot be
/// written; the bytes before it may have been written then.
///
/// `target` is atomic because other code may write this memory at the same time.
pub(crate) fn write_own(target: &[AtomicU8], bytes: &[u8]) -> io::Result<()> {
    let own_pid = std::process::id().cast_signed();
    let Some(target) = target.get(..bytes.len()) else {
        return Err(io::Error::from_raw_os_error(libc::EFAULT));
    };
    let from = libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
    let to = libc::iovec { iov_base: target.as_ptr().cast_mut().cast(), iov_len: target.len() };
    // SAFETY: the kernel reads `iov_len` bytes at `from`, which are those of `bytes`, and writes at
    // most as many to `to`: the place of `target`, which has the same length, lives for the call,
    // and, being atomic, may be written through a shared reference.
    let copied = unsafe { libc::process_vm_readv(own_pid, &raw const to, 1, &raw const from, 1, 0) };
    match usize::try_from(copied) {
        Err(_) => Err(io::Error::last_os_error()),
        Ok(copied) if copied == bytes.len() => Ok(()),
        Ok(_) => Err(io::Error::from_raw_os_error(libc::EFAULT)),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering;

    use super::*;

    #[test]
    fn reading_stops_before_a_page_that_is_not_there() {
        let page_bytes = rustix::param::page_size();
        let memory = vec![7u8; 3 * page_bytes];
        let mut copy = vec![0; memory.len()];
        let me = std::process::id();
        assert_eq!(read(me, memory.as_ptr().addr() as u64, &mut copy).unwrap(), memory.len());
        assert_eq!(copy, memory);
        assert_eq!(read(me, 16, &mut copy).unwrap_err().raw_os_error(), Some(libc::EFAULT));
        assert_eq!(read(me, u64::MAX, &mut copy).unwrap_err().raw_os_error(), Some(libc::EFAULT));
    }

    #[test]
    fn own_memory_is_written_while_others_may_see_it() {
        let memory: Vec<AtomicU8> = (0..10_000).map(|_| AtomicU8::new(1)).collect();
        write_own(&memory[5000..], &[7; 5000]).unwrap();
        let sum: usize = memory.iter().map(|byte| usize::from(byte.load(Ordering::Relaxed))).sum();
        assert_eq!(sum, 5000 + 7 * 5000);
        assert!(write_own(&memory[5001..], &[7; 5000]).is_err());
    }

    #[test]
    fn own_memory_is_gathered_and_what_is_not_there_is_an_error() {
        let memory: Vec<u8> = (0..=255).cycle().take(100_000).collect();
        let base = memory.as_ptr().addr() as u64;
        // More ranges than one call accepts.
        let ranges: Vec<_> = (0..3000u64).map(|at| base + at * 33..base + at * 33 + 1 + at % 20).collect();
        let expected: Vec<u8> = (0..3000).flat_map(|at| memory[at * 33..][..1 + at % 20].to_vec()).collect();
        let mut copy = vec![0; expected.len()];
        copy_own(&ranges, &mut copy).unwrap();
        assert!(copy == expected);
        let error = copy_own(&[base..base + 8, 16..24], &mut [0; 16]).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EFAULT));
        assert!(copy_own(&ranges[..1], &mut []).is_err());
    }
}
