//! Memory of this process: tracked, restored lazily, mapped as an instance, reserved, and rolled
//! back in place.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod conformance;
mod lazy;
mod locked;
mod reservation;
mod reservation_walk;
mod rollback;
mod templates;
mod tracking;
mod vault;

#[allow(dead_code)]
#[path = "../common/needs.rs"]
mod needs;
#[path = "../common/noise.rs"]
mod noise;
#[path = "../common/whole_error.rs"]
mod whole_error;
