//! Restarts the system calls in which threads were captured.
//!
//! A thread that is stopped in a waiting call leaves the call for the stop. On x86-64 the register
//! `orig_rax` then has the call's number, and `rax` has one of the kernel's restart codes. When the
//! thread is resumed, the kernel looks at these two registers, whatever the thread did before they
//! were set. It restarts the call with the arguments that are in the other registers. So the kernel
//! itself returns a thread to its `read` or `futex`.
//!
//! | `rax` | what the kernel does | what is set |
//! |---|---|---|
//! | -512 to -514 | restarts the call | the same |
//! | -516, a wait with a limit | waits for the rest of the *latest* such wait | -514 |
//! | -516 in `restart_syscall` | the same; the original call is lost | -4 (`EINTR`), and no call |
//! | anything else | nothing: the call is complete | the same |
//!
//! With -514 the kernel restarts the call unless a signal is handled. A restarted wait waits for
//! its whole time, unless its limit is a point in time. If a pending signal is handled, such a wait
//! ends with `EINTR`, as it would have without the rollback. The third case is a thread that waits
//! in the same call at two captures in a row: its program sees an interrupted wait.
//!
//! On AArch64 the kernel moves a thread back to the call before its registers can be read, so
//! nothing needs to be done.

use crate::threads::{MACHINE, NT_PRSTATUS, Thread};

const X86_64: u16 = 62;
/// The number of registers in the kernel's `user_regs_struct` of x86-64, and the positions of two
/// of them.
const REGISTERS: usize = 27;
const RAX: usize = 10;
const ORIG_RAX: usize = 15;

const RESTART_NO_HANDLER: i64 = -514;
const RESTART_BLOCK: i64 = -516;
const INTERRUPTED: i64 = -4;
const NO_CALL: i64 = -1;
const RESTART_SYSCALL: i64 = 219;

/// The length of the general registers, if known here; those of a 32-bit program are shorter.
pub(super) fn general_bytes() -> Option<usize> {
    (MACHINE == X86_64).then_some(REGISTERS * size_of::<i64>())
}

/// Prepares the registers of a captured thread so that they can be set again.
pub(super) fn prepare(thread: &mut Thread) {
    let general = thread.registers.iter_mut().find(|set| set.note_type == NT_PRSTATUS);
    if let Some(set) = general.filter(|set| Some(set.bytes.len()) == general_bytes()) {
        settle(&mut set.bytes);
    }
}

fn settle(general: &mut [u8]) {
    let (registers, _) = general.as_chunks_mut::<{ size_of::<i64>() }>();
    let [rax, orig_rax] = [RAX, ORIG_RAX].map(|at| i64::from_le_bytes(registers[at]));
    if rax != RESTART_BLOCK || orig_rax < 0 {
        return;
    }
    if orig_rax == RESTART_SYSCALL {
        registers[RAX] = INTERRUPTED.to_le_bytes();
        registers[ORIG_RAX] = NO_CALL.to_le_bytes();
    } else {
        registers[RAX] = RESTART_NO_HANDLER.to_le_bytes();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settled(rax: i64, orig_rax: i64) -> (i64, i64) {
        let mut general = vec![0; REGISTERS * 8];
        general[RAX * 8..][..8].copy_from_slice(&rax.to_le_bytes());
        general[ORIG_RAX * 8..][..8].copy_from_slice(&orig_rax.to_le_bytes());
        settle(&mut general);
        let register = |at: usize| i64::from_le_bytes(general[at * 8..][..8].try_into().unwrap());
        (register(RAX), register(ORIG_RAX))
    }

    #[test]
    fn a_wait_with_a_time_limit_begins_again_or_is_interrupted() {
        assert_eq!(settled(-512, 0), (-512, 0));
        assert_eq!(settled(-514, 34), (-514, 34));
        assert_eq!(settled(-516, 35), (-514, 35));
        assert_eq!(settled(-516, 219), (-4, -1));
        // An ordinary value of the program, and a call that is complete.
        assert_eq!(settled(-516, -1), (-516, -1));
        assert_eq!(settled(-2, 2), (-2, 2));
    }
}
