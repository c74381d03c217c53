//! The operating system: all `unsafe` code and all Linux calls that no library wraps safely.

#[cfg_attr(not(feature = "fault-injection"), allow(dead_code, unreachable_pub))]
pub(crate) mod call;
pub(crate) mod cpu;
pub(crate) mod dir;
pub(crate) mod file;
pub(crate) mod fork;
pub(crate) mod heap;
pub(crate) mod kcmp;
pub(crate) mod lesser;
pub(crate) mod map;
pub(crate) mod mapped;
pub(crate) mod memory_limit;
pub(crate) mod missing;
pub(crate) mod pagemap;
pub(crate) mod pages;
pub(crate) mod process_memory;
pub(crate) mod ptrace;
pub(crate) mod reserve;
pub(crate) mod shared_map;
pub(crate) mod unix_sockets;
pub(crate) mod userfault;
