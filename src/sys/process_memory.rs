//! Reading the memory of another process.

use std::io;

use libc::c_void;

/// Copies memory of the process that thread `tid` belongs to, from `address` on. Answers how many
/// bytes it copied, which are fewer than asked for where a page further on cannot be read, and
/// an error (`EFAULT`) where the first one cannot.
pub(crate) fn read(tid: u32, address: u64, buffer: &mut [u8]) -> io::Result<usize> {
    let Ok(address) = usize::try_from(address) else {
        return Err(io::Error::from_raw_os_error(libc::EFAULT));
    };
    let local = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
    let remote =
        libc::iovec { iov_base: std::ptr::without_provenance_mut::<c_void>(address), iov_len: buffer.len() };
    // SAFETY: the kernel writes at most `iov_len` bytes to the local place, which are the length and
    // place of `buffer`, borrowed mutably for the call. The remote place is an address in the other
    // process, checked by the kernel.
    let copied =
        unsafe { libc::process_vm_readv(tid.cast_signed(), &raw const local, 1, &raw const remote, 1, 0) };
    usize::try_from(copied).map_err(|_| io::Error::last_os_error())
}

#[cfg(test)]
mod tests {
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
}
