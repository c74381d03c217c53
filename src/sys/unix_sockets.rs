//! The Unix sockets of this network namespace whose other end is gone: netlink, `sock_diag(7)`.
//!
//! `/proc/net/unix` does not tell: a connection whose other end was closed is shown as connected.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// `struct nlmsghdr` and `struct unix_diag_req`.
const HEADER_BYTES: usize = 16;
const REQUEST_BYTES: usize = HEADER_BYTES + 24;
/// `struct unix_diag_msg`: family, type, state, padding, inode, cookie.
const ANSWER_BYTES: usize = HEADER_BYTES + 16;
const INODE: usize = HEADER_BYTES + 4;

const SOCK_DIAG_BY_FAMILY: u16 = 20;
const ALL_STATES: u32 = u32::MAX;
/// The inode of the other end is to be told. It is 0 when that is closed, and until it is accepted.
const SHOW_PEER: u32 = 4;
const PEER: u16 = 2;
/// Always told: bit 0, nothing more comes; bit 1, nothing more can be sent.
const SHUTDOWN: u16 = 6;
const BOTH_WAYS: u8 = 3;

/// The inodes of those whose other end is closed. `EPERM` or the like where a sandbox does not
/// allow to ask.
pub(crate) fn without_peer() -> io::Result<Vec<u32>> {
    let netlink = open()?;
    send(&netlink, &request())?;
    let mut found = Vec::new();
    let mut answer = vec![0; 32 * 1024];
    loop {
        let length = receive(&netlink, &mut answer)?;
        let mut rest = &answer[..length];
        while let Some((kind, message, after)) = next(rest) {
            rest = after;
            match i32::from(kind) {
                libc::NLMSG_DONE => return Ok(found),
                libc::NLMSG_ERROR => return Err(error_in(message)),
                _ => found.extend(inode_without_peer(message)),
            }
        }
        if length == 0 {
            return Ok(found);
        }
    }
}

fn request() -> [u8; REQUEST_BYTES] {
    let mut request = [0; REQUEST_BYTES];
    let flags = u16::try_from(libc::NLM_F_REQUEST | libc::NLM_F_DUMP).unwrap_or_default();
    let family = u8::try_from(libc::AF_UNIX).unwrap_or_default();
    request[..4].copy_from_slice(&u32::try_from(REQUEST_BYTES).unwrap_or_default().to_ne_bytes());
    request[4..6].copy_from_slice(&SOCK_DIAG_BY_FAMILY.to_ne_bytes());
    request[6..8].copy_from_slice(&flags.to_ne_bytes());
    request[HEADER_BYTES] = family;
    request[HEADER_BYTES + 4..][..4].copy_from_slice(&ALL_STATES.to_ne_bytes());
    request[HEADER_BYTES + 12..][..4].copy_from_slice(&SHOW_PEER.to_ne_bytes());
    request
}

/// The kind of the first message, all of it, and what comes after it.
fn next(messages: &[u8]) -> Option<(u16, &[u8], &[u8])> {
    let length = usize::try_from(u32_at(messages, 0)?).ok()?;
    let kind = u16::from_ne_bytes(messages.get(4..6)?.try_into().ok()?);
    let message = messages.get(..length).filter(|it| it.len() >= HEADER_BYTES)?;
    let after = messages.get(length.next_multiple_of(4)..).unwrap_or_default();
    Some((kind, message, after))
}

fn inode_without_peer(message: &[u8]) -> Option<u32> {
    let (mut peer, mut shutdown) = (None, 0);
    let mut attributes = message.get(ANSWER_BYTES..)?;
    while let Some(header) = attributes.first_chunk::<4>() {
        let length = usize::from(u16::from_ne_bytes([header[0], header[1]]));
        let value = attributes.get(4..length)?;
        match u16::from_ne_bytes([header[2], header[3]]) {
            PEER => peer = u32_at(value, 0),
            SHUTDOWN => shutdown = *value.first()?,
            _ => {}
        }
        attributes = attributes.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    (peer == Some(0) && shutdown == BOTH_WAYS).then(|| u32_at(message, INODE)).flatten()
}

fn error_in(message: &[u8]) -> io::Error {
    let errno = message.get(HEADER_BYTES..HEADER_BYTES + 4).and_then(|it| it.try_into().ok());
    io::Error::from_raw_os_error(errno.map_or(libc::EIO, |it| -i32::from_ne_bytes(it)))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

fn open() -> io::Result<OwnedFd> {
    let kind = libc::SOCK_DGRAM | libc::SOCK_CLOEXEC;
    // SAFETY: socket takes numbers only and accesses no memory of this process.
    match unsafe { libc::socket(libc::AF_NETLINK, kind, libc::NETLINK_SOCK_DIAG) } {
        -1 => Err(io::Error::last_os_error()),
        // SAFETY: the kernel has just given this number to us, and nobody else has it.
        number => Ok(unsafe { OwnedFd::from_raw_fd(number) }),
    }
}

fn send(netlink: &OwnedFd, request: &[u8]) -> io::Result<()> {
    // SAFETY: the kernel reads as many bytes as the slice has.
    let sent = unsafe { libc::send(netlink.as_raw_fd(), request.as_ptr().cast(), request.len(), 0) };
    if sent == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn receive(netlink: &OwnedFd, answer: &mut [u8]) -> io::Result<usize> {
    loop {
        // SAFETY: the kernel writes at most as many bytes as the slice has, which nobody else uses
        // meanwhile.
        let received =
            unsafe { libc::recv(netlink.as_raw_fd(), answer.as_mut_ptr().cast(), answer.len(), 0) };
        match usize::try_from(received) {
            Ok(length) => return Ok(length.min(answer.len())),
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;
    use std::os::unix::net::{UnixListener, UnixStream};

    use super::*;

    fn inode(socket: &impl AsRawFd) -> u32 {
        let path = format!("/proc/self/fd/{}", socket.as_raw_fd());
        u32::try_from(std::fs::metadata(path).unwrap().ino()).unwrap()
    }

    #[test]
    fn a_socket_whose_other_end_is_closed_is_found_and_one_that_waits_to_be_accepted_is_not() {
        if let Err(error) = without_peer() {
            return eprintln!("passed over: needs the kernel's unix_diag: {error}");
        }
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let listener = UnixListener::bind(&path).unwrap();
        let waiting = UnixStream::connect(&path).unwrap();
        let (one, other) = UnixStream::pair().unwrap();
        let is_found = |socket: &UnixStream| without_peer().unwrap().contains(&inode(socket));
        assert!(!is_found(&one) && !is_found(&other) && !is_found(&waiting));
        drop(other);
        assert!(is_found(&one) && !is_found(&waiting));
        let (accepted, _) = listener.accept().unwrap();
        assert!(!is_found(&waiting) && !is_found(&accepted));
        drop(accepted);
        assert!(is_found(&waiting));
        // Thousands of sockets are told in several answers.
        let many: Vec<_> = (0..400).map(|_| UnixStream::pair().unwrap()).collect();
        let (last, closed) = UnixStream::pair().unwrap();
        drop(closed);
        assert!(is_found(&last) && many.iter().all(|(one, _)| !is_found(one)));
    }
}
