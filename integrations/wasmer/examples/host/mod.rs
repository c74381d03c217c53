//! A host that runs a guest with a journal, as a program would: one life at a time, each with a
//! runtime of its own.

// Each program that has this module uses a part of it.
#![allow(dead_code, unreachable_pub)]

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use wasmer::{Engine, Module};
use wasmer_types::ModuleHash;
use wasmer_wasix::bin_factory::spawn_exec_module;
use wasmer_wasix::journal::{DynJournal, SnapshotTrigger};
use wasmer_wasix::os::task::process::WasiProcess;
use wasmer_wasix::os::task::{TaskJoinHandle, TaskStatus};
use wasmer_wasix::runtime::PluggableRuntime;
use wasmer_wasix::runtime::task_manager::tokio::TokioTaskManager;
use wasmer_wasix::{Pipe, Runtime, WasiEnv, WasiEnvBuilder};

/// No guest here thinks for longer.
const PATIENCE: Duration = Duration::from_secs(30);

/// A compiled guest.
#[derive(Clone)]
pub struct Guest {
    name: String,
    engine: Engine,
    module: Module,
    hash: ModuleHash,
}

impl Guest {
    /// The guest of this name, built by `guest/setup`, which fetches what that takes.
    pub fn build(name: &str) -> Result<Guest> {
        let here = Path::new(env!("CARGO_MANIFEST_DIR"));
        let folder = here.join("../../target/wasmer-guest");
        let built = Command::new(here.join("guest/setup")).arg(&folder).status().context("guest/setup")?;
        ensure!(
            built.success(),
            "guest/setup failed: it needs python3 with pip, node with npm, and the network"
        );
        Guest::load(name, &folder.join(format!("{name}.wasm")))
    }

    /// The guest in a file.
    pub fn load(name: &str, path: &PathBuf) -> Result<Guest> {
        let wasm = std::fs::read(path).with_context(|| path.display().to_string())?;
        let engine = Engine::default();
        let module = Module::new(&engine, &wasm)?;
        // Without this the hash is random, and the next life begins anew.
        let hash = ModuleHash::sha256(&wasm);
        Ok(Guest { name: name.to_owned(), engine, module, hash })
    }
}

/// One life of a guest: from its start, or from where its journal goes on, until the host stops it.
pub struct Life {
    process: WasiProcess,
    task: TaskJoinHandle,
    input: Pipe,
    output: Pipe,
    read: Vec<u8>,
    // Ended last.
    _runtime: Arc<dyn Runtime + Send + Sync>,
    tokio: Option<tokio::runtime::Runtime>,
}

impl Life {
    /// Starts a guest with this journal.
    pub fn start(guest: &Guest, journal: Arc<DynJournal>, args: &[&str]) -> Result<Life> {
        Life::start_with(guest, journal, args, |_| Ok(()))
    }

    /// The same, with something more to say about its environment.
    pub fn start_with(
        guest: &Guest,
        journal: Arc<DynJournal>,
        args: &[&str],
        more: impl FnOnce(&mut WasiEnvBuilder) -> Result<()>,
    ) -> Result<Life> {
        let tokio = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
        let entered = tokio.enter();
        let mut runtime = PluggableRuntime::new(Arc::new(TokioTaskManager::new(tokio.handle().clone())));
        runtime.set_engine(guest.engine.clone());
        runtime.add_writable_journal(journal);
        let runtime: Arc<dyn Runtime + Send + Sync> = Arc::new(runtime);

        let (input, guest_input) = Pipe::channel();
        let (guest_output, output) = Pipe::channel();
        let mut builder = WasiEnv::builder(&guest.name)
            .args(args)
            .stdin(Box::new(guest_input))
            .stdout(Box::new(guest_output))
            .runtime(runtime.clone());
        builder.set_module_hash(guest.hash);
        builder.add_snapshot_trigger(SnapshotTrigger::Explicit);
        more(&mut builder)?;
        let env = builder.build()?;
        let process = env.process.clone();
        let task = spawn_exec_module(guest.module.clone(), env, &runtime)?;
        drop(entered);
        Ok(Life { process, task, input, output, read: Vec::new(), _runtime: runtime, tokio: Some(tokio) })
    }

    /// The process, to ask more of it.
    pub fn process(&self) -> &WasiProcess {
        &self.process
    }

    /// Says a line to the guest, and gives the line that it answers.
    pub fn ask(&mut self, line: &str) -> Result<String> {
        self.say(line)?;
        self.line()
    }

    /// Says a line that has the guest ask for a snapshot.
    pub fn snapshot(&mut self, line: &str) -> Result<String> {
        // An explicit trigger goes off once.
        self.process.lock().snapshot_on.insert(SnapshotTrigger::Explicit);
        self.ask(line)
    }

    /// Says a line to the guest.
    pub fn say(&mut self, line: &str) -> Result<()> {
        Ok(writeln!(self.input, "{line}")?)
    }

    /// The next line of the guest.
    pub fn line(&mut self) -> Result<String> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(end) = self.read.iter().position(|byte| *byte == b'\n') {
                let line = self.read.drain(..=end).collect::<Vec<_>>();
                return Ok(String::from_utf8_lossy(&line[..end]).into_owned());
            }
            let mut buffer = [0; 4096];
            match self.output.try_read(&mut buffer) {
                Some(length) if length > 0 => self.read.extend_from_slice(&buffer[..length]),
                _ => match self.task.status() {
                    TaskStatus::Finished(ended) => bail!("the guest ended: {ended:?}"),
                    _ if Instant::now() > deadline => {
                        bail!("the guest is silent, after {:?}", String::from_utf8_lossy(&self.read))
                    }
                    _ => std::thread::sleep(Duration::from_micros(100)),
                },
            }
        }
    }

    /// Ends its input, and waits until it has ended for that; gives its exit code.
    pub fn end(mut self) -> Result<i32> {
        self.input.close();
        let deadline = Instant::now() + PATIENCE;
        loop {
            match self.task.status() {
                TaskStatus::Finished(Ok(code)) => return Ok(code.raw()),
                TaskStatus::Finished(Err(error)) => bail!("{error}"),
                _ if Instant::now() > deadline => bail!("the guest does not end"),
                _ => std::thread::sleep(Duration::from_millis(1)),
            }
        }
    }
}

impl Drop for Life {
    fn drop(&mut self) {
        self.input.close();
        if let Some(tokio) = self.tokio.take() {
            // A guest that still waits for something is left behind.
            tokio.shutdown_timeout(Duration::from_millis(100));
        }
    }
}
