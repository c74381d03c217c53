//! Entries for the tests.

use std::net::{Ipv4Addr, SocketAddr};
use std::time::{Duration, SystemTime};

use wasmer_journal::{JournalEntry, SnapshotTrigger, SocketShutdownHow};
use wasmer_wasix_types::wasi::{Fdflags, Fdflagsext, Oflags, Rights, Sockoption, Whence};
use wasmer_wasix_types::wasix::{ThreadStartType, WasiMemoryLayout};

pub(crate) fn mark() -> JournalEntry<'static> {
    JournalEntry::SnapshotV1 {
        when: SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000),
        trigger: SnapshotTrigger::Explicit,
    }
}

pub(crate) fn thread(id: u32, start: ThreadStartType) -> JournalEntry<'static> {
    JournalEntry::SetThreadV1 {
        id,
        call_stack: vec![1; 100].into(),
        memory_stack: vec![2; 17].into(),
        store_data: vec![3; 33].into(),
        start,
        layout: WasiMemoryLayout {
            stack_upper: 65536,
            stack_lower: 1024,
            guard_size: 0,
            stack_size: 64512,
            tls_base: None,
        },
        is_64bit: false,
    }
}

pub(crate) fn open(fd: u32, path: &str, o_flags: Oflags) -> JournalEntry<'static> {
    JournalEntry::OpenFileDescriptorV2 {
        fd,
        dirfd: 3,
        dirflags: 0,
        path: path.to_owned().into(),
        o_flags,
        fs_rights_base: Rights::all(),
        fs_rights_inheriting: Rights::all(),
        fs_flags: Fdflags::empty(),
        fd_flags: Fdflagsext::empty(),
    }
}

pub(crate) fn write(fd: u32, offset: u64, text: &str) -> JournalEntry<'static> {
    JournalEntry::FileDescriptorWriteV1 { fd, offset, data: text.as_bytes().to_vec().into(), is_64bit: false }
}

pub(crate) fn close(fd: u32) -> JournalEntry<'static> {
    JournalEntry::CloseFileDescriptorV1 { fd }
}

pub(crate) fn seek(fd: u32, offset: i64, whence: Whence) -> JournalEntry<'static> {
    JournalEntry::FileDescriptorSeekV1 { fd, offset, whence }
}

/// One entry of each shape that the encoding has.
pub(crate) fn one_of_each() -> Vec<JournalEntry<'static>> {
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, 8080));
    vec![
        JournalEntry::InitModuleV1 { wasm_hash: vec![7; 32].into() },
        JournalEntry::ClearEtherealV1,
        open(4, "a/b", Oflags::CREATE),
        write(4, 12, "some text"),
        seek(4, -3, Whence::End),
        JournalEntry::PortAddrClearV1,
        JournalEntry::CreatePipeV1 { read_fd: 5, write_fd: 6 },
        JournalEntry::CreateEventV1 { initial_val: 9, flags: 0, fd: 7 },
        JournalEntry::SocketConnectedV1 { fd: 8, local_addr: address, peer_addr: address },
        JournalEntry::SocketSetOptFlagV1 { fd: 8, opt: Sockoption::ReuseAddr, flag: true },
        JournalEntry::SocketShutdownV1 { fd: 8, how: SocketShutdownHow::Both },
        JournalEntry::PathRenameV1 { old_fd: 3, old_path: "a".into(), new_fd: 3, new_path: "b".into() },
        close(4),
        thread(1, ThreadStartType::MainThread),
        thread(2, ThreadStartType::ThreadSpawn { start_ptr: 4096 }),
        JournalEntry::UpdateMemoryRegionV1 {
            region: 0..512,
            compressed_data: lz4_flex::compress_prepend_size(&[7; 512]).into(),
        },
        mark(),
        JournalEntry::CloseThreadV1 { id: 2, exit_code: None },
        JournalEntry::ProcessExitV1 { exit_code: None },
    ]
}
