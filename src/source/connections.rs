//! Connections of a process that the other end has closed: those in `/proc/PID/net/tcp` and `tcp6`,
//! and Unix sockets. The kernel lists Unix sockets for programs in the same network namespace.

use std::collections::HashSet;
use std::path::PathBuf;

use super::proc_directory::ProcDirectory;
use crate::descriptors::Descriptor;
use crate::sys::unix_sockets;

/// The kernel's states in which the other end sends no more data: CLOSE_WAIT, LAST_ACK, CLOSING,
/// CLOSE.
const CLOSED: [&[u8]; 4] = [b"08", b"09", b"0B", b"07"];

/// The descriptors that are such connections. There are none if the kernel does not report
/// connections.
pub(super) fn closed(process: &ProcDirectory, descriptors: &[Descriptor]) -> Vec<u32> {
    if !descriptors.iter().any(|it| it.target.starts_with(b"socket:")) {
        return Vec::new();
    }
    let mut names = HashSet::new();
    for table in ["net/tcp", "net/tcp6"] {
        let table = process.read(table).unwrap_or_default();
        let inodes = table.split(|byte| *byte == b'\n').skip(1).filter_map(closed_inode);
        names.extend(inodes.map(|inode| format!("socket:[{inode}]").into_bytes()));
    }
    let is_here =
        |namespace: PathBuf| std::fs::read_link("/proc/self/ns/net").is_ok_and(|own| own == namespace);
    if process.link("ns/net").is_ok_and(is_here) {
        let inodes = unix_sockets::without_peer().unwrap_or_default();
        names.extend(inodes.into_iter().map(|inode| format!("socket:[{inode}]").into_bytes()));
    }
    descriptors.iter().filter(|it| names.contains(&it.target)).map(|it| it.number).collect()
}

/// The inode in a line: `sl local remote st tx:rx tr:when retrnsmt uid timeout inode …`. `None` for
/// a socket that was never connected, which has no other end.
fn closed_inode(line: &[u8]) -> Option<&str> {
    let mut fields = line.split(|byte| *byte == b' ').filter(|field| !field.is_empty());
    let remote = fields.nth(2)?;
    let state = fields.next()?;
    let inode = str::from_utf8(fields.nth(5)?).ok()?;
    let is_connected = remote.iter().any(|byte| !matches!(byte, b'0' | b':'));
    (CLOSED.contains(&state) && is_connected && inode != "0").then_some(inode)
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};
    use std::os::fd::AsRawFd;

    use super::*;
    use crate::source::descriptors;

    #[test]
    fn a_connection_is_closed_when_its_other_end_has_closed_it() {
        let Ok(listener) = TcpListener::bind("127.0.0.1:0") else {
            eprintln!("passed over: needs a network");
            return;
        };
        let stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (other, _) = listener.accept().unwrap();
        let me = ProcDirectory::open(std::process::id()).unwrap();
        let number = stream.as_raw_fd().cast_unsigned();
        let is_closed = || closed(&me, &descriptors::look(&me).unwrap().0).contains(&number);
        assert!(!is_closed());
        let (one, end) = std::os::unix::net::UnixStream::pair().unwrap();
        let is_one_closed = || {
            let all = descriptors::look(&me).unwrap().0;
            closed(&me, &all).contains(&one.as_raw_fd().cast_unsigned())
        };
        assert!(!is_one_closed());
        drop(end);
        if unix_sockets::without_peer().is_ok() {
            assert!(is_one_closed());
        }
        drop(other);
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
        while !is_closed() {
            assert!(std::time::Instant::now() < deadline);
        }
    }
}
