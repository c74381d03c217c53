//! kcmp: whether two processes share kernel resources.

use std::io;

/// The kernel's `KCMP_VM`.
const VM: libc::c_long = 1;

/// Whether two threads, of the same or of different processes, use the same memory.
///
/// `EPERM` where this process may not inspect both, `ESRCH` where one has ended, `ENOSYS` where the
/// kernel has no such call. A sandbox may refuse the call with any of these. Two threads without
/// any memory (kernel threads, and threads that have ended) count as sharing it.
pub(crate) fn same_memory(one: u32, other: u32) -> io::Result<bool> {
    let (one, other) = (libc::c_long::from(one), libc::c_long::from(other));
    // SAFETY: with KCMP_VM, kcmp takes only numbers and accesses no memory of this process.
    match unsafe { libc::syscall(libc::SYS_kcmp, one, other, VM, 0, 0) } {
        -1 => Err(io::Error::last_os_error()),
        order => Ok(order == 0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_shares_its_memory_with_itself_and_not_with_a_child() {
        let me = std::process::id();
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let answers = (same_memory(me, me), same_memory(me, child.id()));
        child.kill().unwrap();
        child.wait().unwrap();
        match answers {
            (Ok(with_itself), Ok(with_child)) => assert_eq!((with_itself, with_child), (true, false)),
            (Err(error), _) | (_, Err(error)) => {
                eprintln!("passed over: needs the system call kcmp: {error}")
            }
        }
        assert!(same_memory(me, child.id()).is_err());
    }
}
