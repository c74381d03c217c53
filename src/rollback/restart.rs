//! System calls in which a thread stood when it was captured.
//!
//! A thread that is stopped in a call which waits leaves it for the stop. On x86-64 the register `orig_rax` then has
//! the call's number, and `rax` one of the kernel's restart codes. When the thread is let go the kernel looks at
//! these two, whatever the thread did before they were set, and begins the call again with the
//! arguments that are in the other registers. So a thread goes back into its `read` or `futex` by itself.
//!
//! | `rax` | what the kernel does | what is set |
//! |---|---|---|
//! | -512 to -514 | begins the call again | the same |
//! | -516, a wait with a time limit | goes on with what is left of the *latest* such wait | -514: begins the call again, unless a signal is handled |
//! | -516 in `restart_syscall` | the same; which call it was nobody knows any more | -4 (`EINTR`), and no call |
//! | anything else | nothing: the call is done | the same |
//!
//! A wait that begins again waits for its whole time, unless it is one until a point in time. Where a signal that is on its
//! way is handled such a wait ends with `EINTR`, as it would have. The third case is
//! that of a thread which waits in the same call for the second capture in a row: its program sees a wait
//! that was interrupted.
//!
//! On AArch64 the kernel has moved a thread back to the call before anybody sees its registers, so there is
//! nothing to do.

use crate::threads::{MACHINE, NT_PRSTATUS, Thread};

const X86_64: u16 = 62;
/// How many registers the kernel's `user_regs_struct` of x86-64 has; where two of them are.
const REGISTERS: usize = 27;
const RAX: usize = 10;
const ORIG_RAX: usize = 15;

const RESTART_NO_HANDLER: i64 = -514;
const RESTART_BLOCK: i64 = -516;
const INTERRUPTED: i64 = -4;
const NO_CALL: i64 = -1;
const RESTART_SYSCALL: i64 = 219;

/// How long the general registers are, if that is known here; those of a 32-bit program are shorter.
pub(super) fn general_bytes() -> Option<usize> {
    (MACHINE == X86_64).then_some(REGISTERS * size_of::<i64>())
}

/// Prepares the registers of a captured thread to be given to it again.
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
        // A number that a program works with, and a call that is done.
        assert_eq!(settled(-516, -1), (-516, -1));
        assert_eq!(settled(-2, 2), (-2, 2));
    }
}
