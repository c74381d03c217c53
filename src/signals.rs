//! The attachment `signals`: the signals that were on their way to a process and not yet taken, and
//! which ones it caught and ignored.
//!
//! It is one version byte and then bincode (`config::standard()`), as in `threads.rs`:
//!
//! ```text
//! 1 | ignored | caught | count | signal, … of the process | count | tid, count | signal, … of a thread | …
//!
//! signal: length, siginfo_t
//! ```
//!
//! A signal that a thread was just about to receive is in the attachment `threads`, and not in this
//! one.

use serde::{Deserialize, Serialize};

use crate::record::{self, RecordError};

/// The signals of a process that it has not taken.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Signals {
    /// Which ones it ignores: bit `n - 1` for signal `n`.
    pub(crate) ignored: u64,
    /// Which ones it has handlers for.
    pub(crate) caught: u64,
    /// Those sent to the process as a whole, in their order.
    pub(crate) shared: Vec<Signal>,
    /// Those sent to single threads, by thread id: only threads that have any.
    pub(crate) threads: Vec<(u32, Vec<Signal>)>,
}

/// A signal: the raw `siginfo_t`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Signal(pub(crate) Vec<u8>);

/// The first signal of which a queue may hold several.
pub(crate) const FIRST_REAL_TIME: i32 = 32;

impl Signals {
    /// The name of the attachment.
    pub(crate) const ATTACHMENT: &'static str = "signals";

    /// Reads the attachment of that name.
    pub(crate) fn from_attachment(bytes: &[u8]) -> Result<Self, RecordError> {
        record::decode(bytes)
    }

    /// The attachment's bytes.
    pub(crate) fn to_attachment(&self) -> Result<Vec<u8>, RecordError> {
        record::encode(self)
    }

    /// Those of one thread.
    pub(crate) fn of_thread(&self, tid: u32) -> &[Signal] {
        self.threads.iter().find(|(other, _)| *other == tid).map_or(&[], |(_, signals)| signals)
    }
}

impl Signal {
    /// Its number.
    pub(crate) fn number(&self) -> i32 {
        self.field(0)
    }

    /// Whether the kernel raised it for an instruction of the thread, such as a read through a null
    /// pointer.
    pub(crate) fn is_of_instruction(&self) -> bool {
        let numbers = [libc::SIGSEGV, libc::SIGBUS, libc::SIGFPE, libc::SIGILL, libc::SIGTRAP, libc::SIGSYS];
        numbers.contains(&self.number()) && self.code() > 0
    }

    /// Whether the same instruction raises it again when the thread goes on there. The others stand
    /// behind it.
    pub(crate) fn comes_again(&self) -> bool {
        self.is_of_instruction() && !matches!(self.number(), libc::SIGTRAP | libc::SIGSYS)
    }

    /// Whether process `pid`, by its own number, sent it: by `kill`, `pthread_kill` or `sigqueue`.
    pub(crate) fn is_sent_by(&self, pid: u32) -> bool {
        const SENDER_AT: usize = 16;
        matches!(self.code(), libc::SI_USER | libc::SI_TKILL | libc::SI_QUEUE)
            && self.field(SENDER_AT).cast_unsigned() == pid
    }

    fn code(&self) -> i32 {
        const CODE_AT: usize = 8;
        self.field(CODE_AT)
    }

    fn field(&self, at: usize) -> i32 {
        let bytes = self.0.get(at..).and_then(|bytes| bytes.first_chunk());
        bytes.map_or(0, |bytes| i32::from_ne_bytes(*bytes))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bytes_are_as_documented_and_come_back() {
        let signal = |byte| Signal(vec![byte; 2]);
        let signals = Signals {
            ignored: 1,
            caught: 300,
            shared: vec![signal(5)],
            threads: vec![(7, vec![signal(8), signal(9)])],
        };
        let bytes = signals.to_attachment().unwrap();
        assert_eq!(bytes, [1, 1, 251, 44, 1, 1, 2, 5, 5, 1, 7, 2, 2, 8, 8, 2, 9, 9]);
        assert_eq!(Signals::from_attachment(&bytes).unwrap(), signals);
        assert!(Signals::from_attachment(&bytes[..5]).is_err());
        assert_eq!((signals.of_thread(7).len(), signals.of_thread(8).len()), (2, 0));
    }

    #[test]
    fn what_an_instruction_raised_is_told_from_what_was_sent() {
        let signal = |number: i32, code: i32, pid: i32| {
            let mut bytes = vec![0; 128];
            for (at, value) in [(0, number), (8, code), (16, pid)] {
                bytes[at..at + 4].copy_from_slice(&value.to_ne_bytes());
            }
            Signal(bytes)
        };
        let fault = signal(libc::SIGSEGV, 1, 0);
        assert!(fault.is_of_instruction() && fault.comes_again() && !fault.is_sent_by(0));
        let trap = signal(libc::SIGTRAP, libc::SI_KERNEL, 0);
        assert!(trap.is_of_instruction() && !trap.comes_again());
        let sent = signal(libc::SIGSEGV, libc::SI_TKILL, 7);
        assert!(!sent.is_of_instruction() && sent.is_sent_by(7) && !sent.is_sent_by(8));
        // A child's end tells its pid, and not who sent it.
        assert!(!signal(libc::SIGCHLD, libc::CLD_EXITED, 7).is_sent_by(7));
        assert_eq!(Signal(vec![1]).number(), 0);
    }
}
