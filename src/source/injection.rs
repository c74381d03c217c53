//! System calls that another process makes for us: only the process itself can make some changes to
//! its state.
//!
//! One held thread gets other registers. It runs to a `syscall` instruction that the process has
//! mapped, into the call and out of it. Memory and registers are not restored afterwards. This is
//! for a rollback, which writes all of them. The promise of the rollback covers every step here:
//! *if this program dies, the process is unchanged or stopped* (state T), and the same rollback
//! completes it.
//!
//! ```text
//! all threads get a SIGSTOP; held, they do not take it      killed here: all stop
//! a frame is written into an empty page                     the same
//! the thread runs until it takes its SIGSTOP                the same, it takes it
//! ─> registers for the call, on to the call, out of it      killed here: `ret` leads to the frame,
//! └── next call                                             which makes it call kill(itself, SIGSTOP)
//! the thread gets a SIGSTOP, is held as before, the page is zeros again
//! ```
//!
//! The frame has the form of the kernel's frame for a signal handler. So one address on the stack,
//! the address of `sigreturn`, sets all registers of the thread. While the frame is in use the
//! thread has taken its only SIGSTOP, and it runs at most one instruction of the program: the
//! `syscall`.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use crate::sys::ptrace::{self, Stop};
use crate::threads::NT_PRSTATUS;

/// The parts of a process that are used to make it call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Foothold {
    /// The address of the instructions `syscall; ret`.
    pub(crate) call: u64,
    /// The address of `mov $15, %rax; syscall`: sigreturn.
    pub(crate) sigreturn: u64,
    /// A page of private memory that is absent, and which the process can read and write. It holds
    /// zeros.
    pub(crate) page: u64,
}

/// A system call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Call {
    pub(crate) number: u64,
    pub(crate) arguments: [u64; 6],
}

/// A call with what it is to return.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Step {
    pub(crate) call: Call,
    pub(crate) expected: i64,
    /// The call that takes it back, with what that returns; `None` where that is impossible.
    pub(crate) undo: Option<(Call, i64)>,
    /// What it is to do: "map memory again".
    pub(crate) what: &'static str,
}

impl Step {
    /// The undoing of what need not be undone.
    pub(crate) const NOTHING: (Call, i64) = (Call { number: SCHED_YIELD, arguments: [0; 6] }, 0);
}

/// Why calls were not made.
#[derive(Debug, thiserror::Error)]
pub(crate) enum InjectionError {
    /// None was made, or what they did was taken back. The process is as it was.
    #[error("the process cannot be made to call the kernel: {0}")]
    Impossible(String),
    /// Some may have been made.
    #[error("the process did not complete all of the requested system calls")]
    Failed(#[source] io::Error),
}

/// The machine code that is looked for.
pub(crate) const CALL_CODE: &[u8] = &[0x0f, 0x05, 0xc3];
/// The two ways in which sigreturn is called.
pub(crate) const SIGRETURN_CODES: [&[u8]; 2] =
    [&[0x48, 0xc7, 0xc0, 0x0f, 0, 0, 0, 0x0f, 0x05], &[0xb8, 0x0f, 0, 0, 0, 0x0f, 0x05]];

/// How long one call may take. Those that are made here wait for nobody.
const PATIENCE: Duration = Duration::from_secs(10);

/// How many stops a thread may have on its way: its own SIGSTOP, one of its process, an interrupt.
const MAX_STOPS: usize = 4;

/// Where the kernel's `user_regs_struct` of x86-64 has its registers, and how many there are.
mod register {
    pub(super) const COUNT: usize = 27;
    pub(super) const R10: usize = 7;
    pub(super) const R9: usize = 8;
    pub(super) const R8: usize = 9;
    pub(super) const RAX: usize = 10;
    pub(super) const RDX: usize = 12;
    pub(super) const RSI: usize = 13;
    pub(super) const RDI: usize = 14;
    pub(super) const ORIG_RAX: usize = 15;
    pub(super) const RIP: usize = 16;
    pub(super) const CS: usize = 17;
    pub(super) const FLAGS: usize = 18;
    pub(super) const RSP: usize = 19;
    pub(super) const SS: usize = 20;
}
use register::{COUNT, CS, FLAGS, ORIG_RAX, R8, R9, R10, RAX, RDI, RDX, RIP, RSI, RSP, SS};

/// Interrupts on, nothing else: no single steps, and string instructions go upwards.
const PLAIN_FLAGS: u64 = 0x202;
const GETPID: u64 = 39;
const SCHED_YIELD: u64 = 24;
const KILL: u64 = 62;
/// What `rax` is where a call begins: -ENOSYS.
const CALL_BEGINS: u64 = (-38i64).cast_unsigned();
const NO_CALL: u64 = u64::MAX;
const ALL_SIGNALS: u64 = u64::MAX;

/// A thread that is held and is to make calls.
pub(super) struct Caller<'a> {
    pub(super) pid: u32,
    /// The pid as the process itself knows it.
    pub(super) own_pid: u32,
    pub(super) tid: u32,
    /// All other threads, which are held.
    pub(super) others: &'a [u32],
    /// Whether the process stands still anyhow when it is let go.
    pub(super) is_stopped: bool,
    /// `/proc/PID/mem`.
    pub(super) memory: &'a File,
    pub(super) foothold: Foothold,
}

impl Caller<'_> {
    /// Makes the calls. Afterwards the thread is held as before, with other registers and another
    /// signal mask. All threads have a SIGSTOP that they have not taken, unless the process stays
    /// stopped anyway.
    ///
    /// If a call returns an unexpected result, the completed calls are undone, the last one first.
    pub(super) fn make(&self, steps: &[Step]) -> Result<(), InjectionError> {
        let impossible = |error: io::Error| InjectionError::Impossible(error.to_string());
        let general = general_registers(self.tid).map_err(impossible)?;
        let mask = ptrace::signal_mask(self.tid).map_err(impossible)?;
        let begin = || -> io::Result<()> {
            if !self.is_stopped {
                for tid in self.others.iter().chain([&self.tid]) {
                    ptrace::stop_when_let_go(self.pid, *tid)?;
                }
            }
            ptrace::set_signal_mask(self.tid, ALL_SIGNALS)?;
            self.memory.write_all_at(&self.frame(&general), self.foothold.page)?;
            if !self.is_stopped {
                self.resume_to_stop()?;
            }
            Ok(())
        };
        // A call without effect shows whether calls are possible.
        let rseq = self.rseq_pointer();
        let first = Call { number: GETPID, arguments: [0; 6] };
        let tried = begin().and_then(|()| self.call(&general, first));
        let put_back = || -> io::Result<()> {
            self.end(rseq)?;
            ptrace::set_register_set(self.tid, NT_PRSTATUS, &bytes_of(&general))?;
            ptrace::set_signal_mask(self.tid, mask)
        };
        match tried {
            Ok(pid) if pid == i64::from(self.own_pid) => {}
            tried => {
                let why = match tried {
                    Err(error) => error.to_string(),
                    Ok(answer) => format!("getpid() returned {answer} and not {}", self.own_pid),
                };
                put_back().map_err(InjectionError::Failed)?;
                return Err(InjectionError::Impossible(why));
            }
        }
        for (at, step) in steps.iter().enumerate() {
            let result = self.call(&general, step.call).map_err(InjectionError::Failed)?;
            if result == step.expected {
                continue;
            }
            let error = failure(result);
            let undo: Option<Vec<_>> = steps[..at].iter().rev().map(|step| step.undo).collect();
            let Some(undo) = undo else { return Err(InjectionError::Failed(error)) };
            for (call, expected) in undo {
                if self.call(&general, call).map_err(InjectionError::Failed)? != expected {
                    return Err(InjectionError::Failed(error));
                }
            }
            put_back().map_err(InjectionError::Failed)?;
            let why = format!("to {}, which is to be done first, failed ({error})", step.what);
            return Err(InjectionError::Impossible(why));
        }
        self.end(rseq).map_err(InjectionError::Failed)
    }

    /// Makes one call, wherever the thread is stopped in the kernel.
    fn call(&self, general: &[u64; COUNT], call: Call) -> io::Result<i64> {
        let mut registers = *general;
        let [a, b, c, d, e, f] = call.arguments;
        for (at, value) in [
            (RAX, call.number),
            (RDI, a),
            (RSI, b),
            (RDX, c),
            (R10, d),
            (R8, e),
            (R9, f),
            (ORIG_RAX, NO_CALL),
            (RIP, self.foothold.call),
            (RSP, self.foothold.page),
            (FLAGS, PLAIN_FLAGS),
        ] {
            registers[at] = value;
        }
        ptrace::set_register_set(self.tid, NT_PRSTATUS, &bytes_of(&registers))?;
        self.resume_to_call()?;
        let there = general_registers(self.tid)?;
        if there[ORIG_RAX] != call.number || there[RAX] != CALL_BEGINS {
            return Err(io::Error::other("it stopped in another call"));
        }
        self.resume_to_call()?;
        Ok(general_registers(self.tid)?[RAX].cast_signed())
    }

    /// Runs the thread until it takes its SIGSTOP.
    fn resume_to_stop(&self) -> io::Result<()> {
        for _ in 0..MAX_STOPS {
            ptrace::resume(self.tid)?;
            match self.next_stop()? {
                Stop::Signal { signal: libc::SIGSTOP, .. } => return Ok(()),
                Stop::Interrupted | Stop::WithProcess => {}
                other => return Err(unexpected(other)),
            }
        }
        Err(io::Error::other("a thread that was to make a call does not get its SIGSTOP"))
    }

    fn resume_to_call(&self) -> io::Result<()> {
        // The process may have had a pending SIGSTOP; `end` sends another one. A process that was
        // stopped when it was interrupted stops once more.
        for _ in 0..MAX_STOPS {
            ptrace::resume_to_call(self.tid)?;
            match self.next_stop()? {
                Stop::Call => return Ok(()),
                Stop::Signal { signal: libc::SIGSTOP, .. } | Stop::Interrupted | Stop::WithProcess => {}
                other => return Err(unexpected(other)),
            }
        }
        Err(io::Error::other("a thread that was to make a call is stopped over and over"))
    }

    /// Holds the thread as before, at a point where the kernel restarts calls, and clears the page.
    fn end(&self, rseq: Option<(u64, [u8; 8])>) -> io::Result<()> {
        if !self.is_stopped {
            ptrace::stop_when_let_go(self.pid, self.tid)?;
        }
        ptrace::interrupt(self.tid)?;
        ptrace::resume(self.tid)?;
        match self.next_stop()? {
            Stop::Interrupted | Stop::WithProcess => {}
            other => return Err(unexpected(other)),
        }
        self.memory.write_all_at(&[0; FRAME_BYTES], self.foothold.page)?;
        // The kernel clears it when the thread runs elsewhere.
        rseq.map_or(Ok(()), |(address, pointer)| self.memory.write_all_at(&pointer, address))
    }

    /// The address and value of the pointer, in the thread's area for restartable sequences, to its
    /// current sequence.
    fn rseq_pointer(&self) -> Option<(u64, [u8; 8])> {
        let address = ptrace::rseq_area(self.tid)?.0.checked_add(8)?;
        let mut pointer = [0; 8];
        self.memory.read_exact_at(&mut pointer, address).ok()?;
        Some((address, pointer))
    }

    fn next_stop(&self) -> io::Result<Stop> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(stop) = ptrace::stop(self.tid)? {
                return Ok(stop);
            }
            if Instant::now() > deadline {
                return Err(io::Error::other("a thread that was to make a call does not stop"));
            }
            std::thread::yield_now();
        }
    }

    /// The kernel's `struct rt_sigframe`, which begins with the address of sigreturn. It makes the
    /// thread stop its process repeatedly once no tracer holds the thread.
    fn frame(&self, general: &[u64; COUNT]) -> [u8; FRAME_BYTES] {
        /// The offsets, in words, of `struct ucontext` and of the `struct sigcontext` in it.
        const CONTEXT: usize = 1;
        const REGISTERS: usize = CONTEXT + 5;
        /// The frame contains the stack segment, and sigreturn must restore it.
        const CONTEXT_FLAGS: u64 = 2 | 4;
        const SIGNAL_MASK: usize = CONTEXT + 37;
        let mut words = [0u64; FRAME_BYTES / 8];
        words[0] = self.foothold.sigreturn;
        words[CONTEXT] = CONTEXT_FLAGS;
        // The order is r8 to r15, rdi, rsi, rbp, rbx, rdx, rax, rcx, rsp, rip, flags, segments.
        for (at, value) in [
            (8, u64::from(self.own_pid)),
            (9, u64::from(libc::SIGSTOP.cast_unsigned())),
            (13, KILL),
            (15, self.foothold.page),
            (16, self.foothold.call),
            (17, PLAIN_FLAGS),
            (18, (general[CS] & 0xffff) | (general[SS] & 0xffff) << 48),
        ] {
            words[REGISTERS + at] = value;
        }
        words[SIGNAL_MASK] = ALL_SIGNALS;
        let mut bytes = [0; FRAME_BYTES];
        bytes
            .as_chunks_mut::<8>()
            .0
            .iter_mut()
            .zip(words)
            .for_each(|(place, word)| *place = word.to_le_bytes());
        bytes
    }
}

/// Address, context and signal mask; the kernel does not read the signal's particulars behind them.
const FRAME_BYTES: usize = 512;

/// What a call returned that failed.
fn failure(result: i64) -> io::Error {
    match i32::try_from(-result) {
        Ok(errno @ 1..4096) => io::Error::from_raw_os_error(errno),
        _ => io::Error::other(format!("it returned {result:#x}")),
    }
}

fn unexpected(stop: Stop) -> io::Error {
    io::Error::other(match stop {
        Stop::Signal { signal, .. } => format!("a thread that was to make a call got signal {signal}"),
        other => format!(
            "a thread that should make a system call has stopped for another reason \
             ({other:?})"
        ),
    })
}

fn general_registers(tid: u32) -> io::Result<[u64; COUNT]> {
    let bytes = ptrace::register_set(tid, NT_PRSTATUS)?.unwrap_or_default();
    let mut registers = [0; COUNT];
    if bytes.len() != COUNT * 8 {
        return Err(io::Error::other("its registers are not those of a 64-bit x86 program"));
    }
    registers
        .iter_mut()
        .zip(bytes.as_chunks::<8>().0)
        .for_each(|(place, word)| *place = u64::from_le_bytes(*word));
    Ok(registers)
}

fn bytes_of(registers: &[u64; COUNT]) -> Vec<u8> {
    registers.iter().flat_map(|register| register.to_le_bytes()).collect()
}
