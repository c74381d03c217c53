//! Snapshots of WebAssembly instances under [Wasmtime](wasmtime), kept in a [stillframe] store.
//!
//! stillframe provides the engine's linear memories. The writes of an instance are tracked, so that
//! the cost of a snapshot depends on what changed. A restored snapshot is the linear memory itself:
//! decoded in place, filled at page faults, or mapped from a template. A rollback writes only the
//! bytes that differ.
//!
//! ```
//! use stillframe::CaptureOptions;
//! use stillframe_wasmtime::{Guest, Template, prepare};
//! use wasmtime::{Config, Instance, Module, Store};
//!
//! # let dir = tempfile::tempdir()?;
//! # let wasm = wat::parse_str(r#"(module (memory 1)
//! #     (func (export "add") (param i32) (result i32)
//! #         (i32.store (i32.const 0) (i32.add (i32.load (i32.const 0)) (local.get 0)))
//! #         (i32.load (i32.const 0))))"#)?;
//! # let path = dir.path().join("vault");
//! let engine = stillframe_wasmtime::engine(Config::new())?;
//! let module = Module::new(&engine, prepare(&wasm)?.wasm)?; // exports the hidden state
//! let mut store = Store::new(&engine, ());
//! let instance = Instance::new(&mut store, &module, &[])?;
//! let mut guest = Guest::new(&mut store, instance)?;
//! let add = instance.get_typed_func::<i32, i32>(&mut store, "add")?;
//!
//! let vault = stillframe::Store::options().create(&path)?;
//! add.call(&mut store, 5)?;
//! let five = guest.capture(&mut store, &vault.process("sum"), &CaptureOptions::default())?.id;
//! assert_eq!(add.call(&mut store, 2)?, 7);
//! guest.rollback(&mut store, &vault, five)?; // or restore, restore_lazily
//! assert_eq!(add.call(&mut store, 1)?, 6);
//!
//! let template = Template::new(&vault, five)?; // restored once, for any number of copies
//! let mut other = Store::new(&engine, ());
//! let copy = Instance::new(&mut other, &module, &[])?;
//! Guest::new(&mut other, copy)?.instantiate(&mut other, &template)?; // microseconds
//! # assert_eq!(copy.get_typed_func::<i32, i32>(&mut other, "add")?.call(&mut other, 1)?, 6);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # Instantiation
//!
//! An instance is first made as usual: the engine writes active data segments into the instance's
//! memory and runs the start function. Then the snapshot replaces the content of that memory, at
//! the same address, so nothing of it remains. If the start function calls the host, it does so for
//! every instance.
//!
//! # Engine configuration
//!
//! [`engine`] and [`configure`] set Wasmtime's memory creator, disable its copy-on-write
//! initialisation (which custom memories do not support), and select the on-demand allocator.
//! Reservation, guards, and everything else stay as you configure them.
#![deny(missing_docs)]

/// The code of the README compiles, and runs.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

mod error;
mod guest;
mod prepare;
mod state;
mod sys;

use std::sync::Arc;

use wasmtime::{Config, Engine, InstanceAllocationStrategy};

pub use error::Error;
pub use guest::{Guest, Template};
pub use prepare::{LeftOut, PrepareError, Prepared, prepare};

/// Makes an engine whose memories can be captured: calls [`configure`], and then [`Engine::new`].
///
/// # Errors
///
/// If the engine rejects its configuration.
pub fn engine(mut config: Config) -> Result<Engine, Error> {
    Ok(Engine::new(configure(&mut config))?)
}

/// Configures an engine so that its memories can be captured. Call it last: if
/// [`Config::memory_init_cow`] is enabled again afterwards, Wasmtime panics when it makes an
/// instance.
pub fn configure(config: &mut Config) -> &mut Config {
    config
        .with_host_memory(Arc::new(sys::Memories))
        .memory_init_cow(false)
        .allocation_strategy(InstanceAllocationStrategy::OnDemand)
}

/// An error if the engine cannot make instances with memories of this crate.
///
/// # Errors
///
/// [`Error::Engine`], which says what is wrong.
pub fn check(engine: &Engine) -> Result<(), Error> {
    match engine.get_memory_init_cow() {
        true => Err(Error::Engine { what: "initialises memories copy-on-write" }),
        false => Ok(()),
    }
}
