//! ptrace: stops a thread of another process, reads and sets its registers, and releases it.
//!
//! Every call must come from the thread that seized the traced thread; the kernel returns `ESRCH`
//! to any other thread. When the tracing thread ends, the kernel releases all threads that it
//! traces.

use std::io;

use libc::{c_long, c_void};

// `libc` has these with differing types, or only for some targets. They are part of the kernel's
// ABI.
const CONTINUE: u32 = 7;
const DETACH: u32 = 17;
const CONTINUE_TO_CALL: u32 = 24;
const SET_OPTIONS: u32 = 0x4200;
const GETSIGINFO: u32 = 0x4202;
const SETSIGINFO: u32 = 0x4203;
const GETREGSET: u32 = 0x4204;
const SETREGSET: u32 = 0x4205;
const SEIZE: u32 = 0x4206;
const INTERRUPT: u32 = 0x4207;
const PEEKSIGINFO: u32 = 0x4209;
const GETSIGMASK: u32 = 0x420a;
const SETSIGMASK: u32 = 0x420b;
const GET_RSEQ_CONFIGURATION: u32 = 0x420f;
const EVENT_STOP: i32 = 128;
/// The option that makes stops at system calls distinguishable from other stops, and their
/// `si_code` then.
const OPTION_TELL_CALLS: usize = 1;
const CALL_CODE: i32 = libc::SIGTRAP | 0x80;

/// The size of the kernel's `siginfo_t`.
const SIGNAL_INFO_BYTES: usize = 128;

/// A raw `siginfo_t`.
pub(crate) type SignalInformation = [u8; SIGNAL_INFO_BYTES];

/// Larger than any known register set: AMX makes the extended state of x86-64 11,008 bytes long.
const FIRST_REGISTER_SET_BYTES: usize = 16 * 1024;

/// Why a thread is stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stop {
    /// By [`interrupt`].
    Interrupted,
    /// Its whole process was stopped independently, for example by SIGSTOP.
    WithProcess,
    /// At the entry to a system call or at the exit from it, after [`resume_to_call`].
    Call,
    /// A signal is about to be delivered to it; [`detach`] must give the signal back.
    Signal {
        /// The signal's number.
        signal: i32,
        /// The raw `siginfo_t`.
        information: SignalInformation,
    },
}

/// Begins to trace the thread without stopping it.
pub(crate) fn seize(tid: u32) -> io::Result<()> {
    request(SEIZE, tid, 0)
}

/// Asks a seized thread to stop; [`stop`] reports when it has.
pub(crate) fn interrupt(tid: u32) -> io::Result<()> {
    request(INTERRUPT, tid, 0)
}

/// Releases a stopped thread; `signal` is delivered to it unless that is 0. If its process was
/// stopped, for example by SIGSTOP, it stays stopped.
pub(crate) fn detach(tid: u32, signal: i32) -> io::Result<()> {
    request(DETACH, tid, usize::try_from(signal).unwrap_or(0))
}

/// Resumes a stopped thread, without a signal, until it stops for another reason.
pub(crate) fn resume(tid: u32) -> io::Result<()> {
    request(CONTINUE, tid, 0)
}

/// The same, and delivers the signal that the thread was about to receive, or none if `signal` is
/// 0.
pub(crate) fn resume_into(tid: u32, signal: i32) -> io::Result<()> {
    request(CONTINUE, tid, usize::try_from(signal).unwrap_or(0))
}

/// The same, until the thread enters its next system call or leaves the current one
/// ([`Stop::Call`]).
pub(crate) fn resume_to_call(tid: u32) -> io::Result<()> {
    request(SET_OPTIONS, tid, OPTION_TELL_CALLS)?;
    request(CONTINUE_TO_CALL, tid, 0)
}

/// Sends SIGSTOP to one thread of a process. A traced thread takes the signal when it is released,
/// before it continues.
pub(crate) fn stop_when_let_go(pid: u32, tid: u32) -> io::Result<()> {
    send_to_thread(pid, tid, libc::SIGSTOP)
}

/// Sends a signal to one thread of a process.
pub(crate) fn send_to_thread(pid: u32, tid: u32, signal: i32) -> io::Result<()> {
    let (pid, tid) = (libc::c_long::from(pid), libc::c_long::from(tid));
    // SAFETY: tgkill takes only numbers and accesses no memory of this process.
    match unsafe { libc::syscall(libc::SYS_tgkill, pid, tid, libc::c_long::from(signal)) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Why a seized thread is stopped, or `None` while it runs or after it has ended.
///
/// This asks the kernel instead of waiting for a notice with `waitpid`: other code in this program
/// that waits for any child would take the notice away. Also, the kernel keeps the signal of a
/// notice that nobody took, so the signal is not lost if this program is killed.
pub(crate) fn stop(tid: u32) -> io::Result<Option<Stop>> {
    #[repr(C, align(8))]
    struct SignalInfo([u8; SIGNAL_INFO_BYTES]);
    let mut information = SignalInfo([0; SIGNAL_INFO_BYTES]);
    // SAFETY: GETSIGINFO writes one `siginfo_t`, which is `SIGNAL_INFO_BYTES` long on Linux, to a
    // place of that length and alignment, which is borrowed mutably for the call.
    let answer = unsafe { request_at(GETSIGINFO, tid, 0, (&raw mut information).cast()) };
    match answer {
        Ok(()) => {}
        Err(error) if error.raw_os_error() == Some(libc::ESRCH) => return Ok(None),
        // A stop without information about a signal: the whole process was stopped.
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => return Ok(Some(Stop::WithProcess)),
        Err(error) => return Err(error),
    }
    let SignalInfo(information) = information;
    let [signal, _, code] = [0, 4, 8].map(|at| {
        let bytes = [0, 1, 2, 3].map(|byte| information[at + byte]);
        i32::from_ne_bytes(bytes)
    });
    Ok(Some(match (code >> 8 == EVENT_STOP, signal) {
        (true, libc::SIGTRAP) => Stop::Interrupted,
        (true, _) => Stop::WithProcess,
        (false, libc::SIGTRAP) if code == CALL_CODE => Stop::Call,
        (false, _) => Stop::Signal { signal, information },
    }))
}

/// The queued signals of a stopped thread, or of its whole process, in order. They stay queued.
pub(crate) fn queued_signals(tid: u32, of_process: bool) -> io::Result<Vec<SignalInformation>> {
    const AT_ONCE: u8 = 16;
    /// The kernel's `struct ptrace_peeksiginfo_args`.
    #[repr(C)]
    struct Arguments {
        offset: u64,
        flags: u32,
        count: i32,
    }
    #[repr(C, align(8))]
    #[derive(Clone, Copy)]
    struct SignalInfo(SignalInformation);
    let mut found: Vec<SignalInformation> = Vec::new();
    loop {
        let mut some = [SignalInfo([0; SIGNAL_INFO_BYTES]); AT_ONCE as usize];
        let mut arguments =
            Arguments { offset: found.len() as u64, flags: of_process.into(), count: AT_ONCE.into() };
        // SAFETY: PEEKSIGINFO reads `arguments`, which has the layout of its argument, and writes
        // at most `count` of the kernel's `siginfo_t` to `some`, which has room for as many; both
        // live until after the call.
        let count: c_long = unsafe {
            libc::ptrace(
                PEEKSIGINFO as _,
                tid.cast_signed(),
                (&raw mut arguments).cast::<c_void>(),
                some.as_mut_ptr().cast::<c_void>(),
            )
        };
        if count < 0 {
            return Err(io::Error::last_os_error());
        }
        let count = usize::try_from(count).unwrap_or(0).min(AT_ONCE.into());
        found.extend(some[..count].iter().map(|SignalInfo(information)| *information));
        if count < usize::from(AT_ONCE) {
            return Ok(found);
        }
    }
}

/// Sets the information of the signal that a stopped thread is about to receive.
pub(crate) fn set_signal_information(tid: u32, information: &SignalInformation) -> io::Result<()> {
    #[repr(C, align(8))]
    struct SignalInfo(SignalInformation);
    let mut information = SignalInfo(*information);
    // SAFETY: SETSIGINFO reads one `siginfo_t`, which is `SIGNAL_INFO_BYTES` long on Linux, from a
    // place of that length and alignment that lives until after the call.
    unsafe { request_at(SETSIGINFO, tid, 0, (&raw mut information).cast()) }
}

/// One register set of a stopped thread, identified by its ELF note type; `None` if the machine has
/// no such set.
pub(crate) fn register_set(tid: u32, note_type: u32) -> io::Result<Option<Vec<u8>>> {
    let mut bytes = vec![0u8; FIRST_REGISTER_SET_BYTES];
    loop {
        let mut place = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
        // SAFETY: GETREGSET writes at most `iov_len` bytes to `iov_base`, which are the length and
        // place of `bytes`, and then the number of bytes written to `place`; both live until after
        // the call.
        let answer = unsafe { request_at(GETREGSET, tid, note_type as usize, (&raw mut place).cast()) };
        match answer {
            Ok(()) if place.iov_len < bytes.len() => {
                bytes.truncate(place.iov_len);
                return Ok(Some(bytes));
            }
            // The buffer is full: there may be more.
            Ok(()) => bytes = vec![0; bytes.len() * 2],
            Err(error) if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::ENODEV | libc::EIO)) => {
                return Ok(None);
            }
            Err(error) => return Err(error),
        }
    }
}

/// Sets one register set of a stopped thread to bytes that [`register_set`] returned. `EINVAL` if
/// the machine does not accept them, or if their number is wrong.
pub(crate) fn set_register_set(tid: u32, note_type: u32, bytes: &[u8]) -> io::Result<()> {
    let mut place = libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
    // SAFETY: SETREGSET reads at most `iov_len` bytes from `iov_base`, which are the length and
    // place of `bytes`, and writes only the number of bytes it took, to `place`; both live until
    // after the call.
    unsafe { request_at(SETREGSET, tid, note_type as usize, (&raw mut place).cast()) }?;
    let taken_bytes = place.iov_len;
    if taken_bytes == bytes.len() { Ok(()) } else { Err(io::Error::from_raw_os_error(libc::EINVAL)) }
}

/// Sets the signal mask of a stopped thread.
pub(crate) fn set_signal_mask(tid: u32, mut mask: u64) -> io::Result<()> {
    // SAFETY: SETSIGMASK reads the number of bytes in its address argument, which is the size of
    // `mask`, from `mask`, which lives until after the call.
    unsafe { request_at(SETSIGMASK, tid, size_of::<u64>(), (&raw mut mask).cast()) }
}

/// The address and the length of a stopped thread's area for restartable sequences; `None` if it
/// has none, or if the kernel does not report it (before Linux 5.13).
pub(crate) fn rseq_area(tid: u32) -> Option<(u64, u32)> {
    /// The kernel's `struct ptrace_rseq_configuration`.
    #[repr(C)]
    #[derive(Default)]
    struct Configuration {
        address: u64,
        length_bytes: u32,
        signature: u32,
        flags: u32,
        padding: u32,
    }
    let mut found = Configuration::default();
    // SAFETY: GET_RSEQ_CONFIGURATION writes at most the number of bytes in its address argument,
    // which is the size of `found`, to `found`, which has the layout for them and is borrowed
    // mutably for the call.
    unsafe {
        request_at(GET_RSEQ_CONFIGURATION, tid, size_of::<Configuration>(), (&raw mut found).cast()).ok()?;
    }
    (found.address != 0).then_some((found.address, found.length_bytes))
}

/// The signal mask of a stopped thread: bit `n - 1` for signal `n`.
pub(crate) fn signal_mask(tid: u32) -> io::Result<u64> {
    let mut mask = 0u64;
    // SAFETY: GETSIGMASK writes the number of bytes in its address argument, which is the size of
    // `mask`, to `mask`, which is borrowed mutably for the call.
    unsafe { request_at(GETSIGMASK, tid, size_of::<u64>(), (&raw mut mask).cast()) }?;
    Ok(mask)
}

/// A request that passes only numbers.
fn request(request: u32, tid: u32, data: usize) -> io::Result<()> {
    debug_assert!(matches!(request, SEIZE | INTERRUPT | DETACH | CONTINUE | CONTINUE_TO_CALL | SET_OPTIONS));
    // SAFETY: these requests, one of which every caller passes, take `data` as a number (options,
    // nothing, a signal) and write no memory of this process.
    unsafe { request_at(request, tid, 0, std::ptr::without_provenance_mut(data)) }
}

/// Any request.
///
/// # Safety
///
/// If the request writes to `data`, that must be a place of the length that the request needs.
unsafe fn request_at(request: u32, tid: u32, address: usize, data: *mut c_void) -> io::Result<()> {
    let address: *mut c_void = std::ptr::without_provenance_mut(address);
    // SAFETY: the caller guarantees `data`; `address` is a number for every request used here.
    let answer: c_long = unsafe { libc::ptrace(request as _, tid.cast_signed(), address, data) };
    if answer == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
