//! The command through its binary: its verbs, who may use a store, and what it does when system
//! calls fail.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::cast_possible_truncation)]

mod bad_input;
mod bounds;
mod contract;
mod order;
mod owners;
mod traced;
mod verbs;
mod watching;

#[path = "../common/ended.rs"]
mod ended;
#[path = "../common/folder.rs"]
mod folder;
mod forger;
mod helper;
#[path = "../common/mount.rs"]
mod mount;
#[allow(dead_code)]
#[path = "../common/needs.rs"]
mod needs;
#[path = "../common/noise.rs"]
mod noise;
#[path = "../common/waiting.rs"]
mod waiting;
