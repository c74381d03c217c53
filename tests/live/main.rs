//! Live processes: stopped, read, captured while they work, rolled back, and seen by a debugger.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::cast_possible_truncation)]

mod absent;
mod core_forms;
mod cores;
mod firecracker_guest;
mod in_place;
mod kvm_guest;
mod many_threads;
mod processes;
mod rollback;
mod rollback_descriptors;
mod rollback_limits;
mod rollback_mappings;
mod rollback_signals;
mod rollback_states;
mod runtime_servers;
mod runtimes;
mod sources;
mod sparse;
mod stopping;

#[allow(dead_code)]
#[path = "../common/needs.rs"]
mod needs;
#[path = "../common/noise.rs"]
mod noise;
#[path = "../common/waiting.rs"]
mod waiting;
