//! The attachment `threads`: the registers of every thread of a process, taken while the process
//! was paused. They are used to write a core file and to roll the process back.
//!
//! It is one version byte followed by bincode (`config::standard()`): integers of more than one
//! byte are variable-length, signed ones are zigzag-encoded, and a list follows its length.
//!
//! ```text
//! 1 | machine | pid | parent_pid | process_group | session | thread count | thread | thread | …
//!
//! thread:       tid | name length, name | signal_mask | pending_signal
//!               | length, signal_information | count of register sets | register set | …
//! register set: note_type | length, bytes
//! ```
//!
//! The bytes of register sets and of signal information are in the kernel's layout for the machine,
//! which is also the layout of ELF core notes.

use serde::{Deserialize, Serialize};

use crate::record::{self, RecordError};

/// The threads of a Linux process, and the facts about the whole process that a core file holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Threads {
    /// The machine that the registers belong to, as in an ELF header (`e_machine`): 62 is x86-64,
    /// 183 is AArch64.
    pub machine: u16,
    /// The process id at that time.
    pub pid: u32,
    /// Its parent's process id.
    pub parent_pid: u32,
    /// Its process group.
    pub process_group: u32,
    /// Its session.
    pub session: u32,
    /// Every thread that had not ended: first the one with the process's own id, then the others by
    /// id. In a core dump's order if they come from one: there, the thread that got the signal is
    /// the first.
    pub threads: Vec<Thread>,
}

/// One thread while it was paused.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Thread {
    /// Its id.
    pub tid: u32,
    /// Its name, up to 15 bytes of any value. A core dump has only the name of the first thread.
    pub name: Vec<u8>,
    /// Its signal mask: bit `n - 1` for signal `n`.
    pub signal_mask: u64,
    /// The signal that was about to be delivered to it, or 0. It did get the signal when it was
    /// resumed. For a thread of a core dump: the signal that ended the process.
    pub pending_signal: i32,
    /// The raw `siginfo_t` of that signal; empty if there is none.
    pub signal_information: Vec<u8>,
    /// Its register sets: general, floating point, and the others that the machine has.
    ///
    /// For a thread in a system call they are as the kernel shows them to a debugger. On x86-64,
    /// `orig_rax` is the call's number, and `rax` is one of the kernel's restart codes (-512 to
    /// -516) if the call would be restarted.
    pub registers: Vec<RegisterSet>,
}

/// One register set of a thread.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RegisterSet {
    /// The ELF note type: 1 (`NT_PRSTATUS`, only the general registers), 2 (`NT_PRFPREG`), 0x202
    /// (`NT_X86_XSTATE`), 0x401 (`NT_ARM_TLS`).
    pub note_type: u32,
    /// The registers in the kernel's layout.
    pub bytes: Vec<u8>,
}

impl Threads {
    /// The name of the attachment.
    pub const ATTACHMENT: &'static str = "threads";

    /// Reads the attachment of that name.
    ///
    /// # Errors
    ///
    /// If the bytes are malformed, or were written by a newer program.
    pub fn from_attachment(bytes: &[u8]) -> Result<Self, RecordError> {
        record::decode(bytes)
    }

    /// The attachment's bytes.
    pub(crate) fn to_attachment(&self) -> Result<Vec<u8>, RecordError> {
        record::encode(self)
    }
}

impl Thread {
    /// The register set of an ELF note type, if it was captured.
    pub fn register_set(&self, note_type: u32) -> Option<&[u8]> {
        self.registers.iter().find(|set| set.note_type == note_type).map(|set| &*set.bytes)
    }
}

impl Threads {
    /// The extended registers in the register sets, as bits of XCR0: the kernel writes these bits
    /// there.
    pub(crate) fn extended_features(&self) -> Option<u64> {
        const FEATURES_AT: usize = 464;
        let registers = self.threads.iter().find_map(|thread| thread.register_set(NT_X86_XSTATE))?;
        registers.get(FEATURES_AT..)?.first_chunk().map(|bytes| u64::from_le_bytes(*bytes))
    }
}

/// The name of the attachment with the auxiliary vector, as in `/proc/PID/auxv`.
pub(crate) const AUXV: &str = "auxv";

/// The name of the attachment with the layout of extended registers in their register sets, as in
/// the note 0x205 (`NT_X86_XSAVE_LAYOUT`) of a core dump: for each part that this machine's
/// processor has, four 32-bit numbers: its number, its size, its offset, and 0.
pub(crate) const REGISTER_LAYOUT: &str = "xsave-layout";

/// x86-64, as in an ELF header.
pub(crate) const X86_64: u16 = 62;
/// AArch64, as in an ELF header.
pub(crate) const AARCH64: u16 = 183;

/// The machine that this program runs on, as in an ELF header; 0 if its registers are not
/// supported.
pub(crate) const MACHINE: u16 = if cfg!(target_arch = "x86_64") {
    X86_64
} else if cfg!(target_arch = "aarch64") {
    AARCH64
} else {
    0
};

/// The general registers; every machine has them.
pub(crate) const NT_PRSTATUS: u32 = 1;
pub(crate) const NT_PRFPREG: u32 = 2;
pub(crate) const NT_X86_XSTATE: u32 = 0x202;
const NT_ARM_TLS: u32 = 0x401;

/// The ELF note types of the register sets that are captured for each thread.
pub(crate) fn register_set_types() -> &'static [u32] {
    if cfg!(target_arch = "x86_64") {
        &[NT_PRSTATUS, NT_PRFPREG, NT_X86_XSTATE]
    } else if cfg!(target_arch = "aarch64") {
        &[NT_PRSTATUS, NT_PRFPREG, NT_ARM_TLS]
    } else {
        &[NT_PRSTATUS, NT_PRFPREG]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bytes_are_as_documented_and_come_back() {
        let threads = Threads {
            machine: 62,
            pid: 7,
            parent_pid: 1,
            process_group: 7,
            session: 3,
            threads: vec![Thread {
                tid: 7,
                name: b"a\xff".to_vec(),
                signal_mask: 5,
                pending_signal: 10,
                signal_information: vec![9; 3],
                registers: vec![RegisterSet { note_type: NT_PRSTATUS, bytes: vec![1, 2, 255] }],
            }],
        };
        let bytes = threads.to_attachment().unwrap();
        let expected = [1, 62, 7, 1, 7, 3, 1, 7, 2, b'a', 255, 5, 20, 3, 9, 9, 9, 1, 1, 3, 1, 2, 255];
        assert_eq!(bytes, expected);
        assert_eq!(Threads::from_attachment(&bytes).unwrap(), threads);
        assert!(Threads::from_attachment(&bytes[1..]).is_err());
    }
}
