//! SQLite as a guest: the imports that its WebAssembly build needs, and SQL through its C
//! interface.
//!
//! The build is the one that the SQLite project publishes on npm, compiled with Emscripten. For a
//! database in memory it needs two things from the host: a clock, and memory that can grow. There
//! are no files: a call to a file function traps with a message that says so.

// Each file that includes this one uses only a part of it.
#![allow(dead_code)]

use std::path::PathBuf;
use std::process::Command;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail};
use stillframe_wasmtime::{Guest, prepare};
use wasmtime::{
    Caller, Engine, Instance, InstancePre, Linker, Memory, Module, Store, TypedFunc, WasmParams, WasmResults,
};

const OK: i32 = 0;
const ROW: i32 = 100;
const DONE: i32 = 101;
/// The errno value of Emscripten's C library.
const NO_SUCH_FILE: i32 = 44;
const WASM_PAGE_BYTES: u64 = 64 << 10;

/// Runs the script that fetches SQLite, and returns the path of the module.
pub(crate) fn fetch() -> Result<PathBuf> {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/guest/setup.sh");
    let output = Command::new("bash").arg(script).output().with_context(|| format!("cannot run {script}"))?;
    if !output.status.success() {
        bail!("{script} failed: {}", String::from_utf8_lossy(&output.stderr));
    }
    Ok(PathBuf::from(String::from_utf8(output.stdout)?.trim()))
}

/// SQLite, compiled and linked with its imports.
pub(crate) fn compile(engine: &Engine) -> Result<InstancePre<Host>> {
    let wasm = std::fs::read(fetch()?)?;
    let prepared = prepare(&wasm)?;
    assert!(prepared.left_out.is_empty(), "{:?}", prepared.left_out);
    let module = Module::new(engine, prepared.wasm)?;
    let mut linker = Linker::new(engine);
    let started = Instant::now();
    linker.func_wrap("env", "emscripten_date_now", milliseconds_since_1970)?;
    linker.func_wrap("env", "emscripten_get_now", move || started.elapsed().as_secs_f64() * 1000.0)?;
    linker.func_wrap("env", "emscripten_get_heap_max", || i32::MAX)?;
    linker.func_wrap("env", "emscripten_resize_heap", resize_heap)?;
    // SQLite tries to open /dev/urandom, and seeds from the clock if that fails.
    linker.func_wrap("env", "__syscall_openat", |_: i32, _: i32, _: i32, _: i32| -NO_SUCH_FILE)?;
    linker.func_wrap("wasi_snapshot_preview1", "environ_sizes_get", environ_sizes_get)?;
    linker.func_wrap("wasi_snapshot_preview1", "environ_get", |_: i32, _: i32| 0)?;
    linker.define_unknown_imports_as_traps(&module)?;
    Ok(linker.instantiate_pre(&module)?)
}

/// The state of the host's functions.
#[derive(Default)]
pub(crate) struct Host {
    memory: Option<Memory>,
}

/// An instance of SQLite with one database in its memory.
pub(crate) struct Sqlite {
    pub(crate) wasm: Store<Host>,
    pub(crate) guest: Guest,
    instance: Instance,
    /// SQLite's handle of the database: an address in its memory.
    database: i32,
}

impl Sqlite {
    /// A new instance with an empty database.
    pub(crate) fn new(compiled: &InstancePre<Host>) -> Result<Sqlite> {
        let mut sqlite = Sqlite::bare(compiled)?;
        sqlite.call::<(), ()>("__wasm_call_ctors", ())?;
        let name = sqlite.push_text(":memory:")?;
        let place = sqlite.call::<i32, i32>("sqlite3_malloc", 4)?;
        let opened = sqlite.call::<(i32, i32), i32>("sqlite3_open", (name, place))?;
        if opened != OK {
            bail!("sqlite3_open answers {opened}");
        }
        sqlite.database = sqlite.word(place)?;
        sqlite.free(place)?;
        sqlite.free(name)?;
        Ok(sqlite)
    }

    /// An instance that was not initialized, into which a snapshot of another instance is restored.
    /// The other instance's database handle is `database`.
    pub(crate) fn unborn(compiled: &InstancePre<Host>, database: i32) -> Result<Sqlite> {
        Ok(Sqlite { database, ..Sqlite::bare(compiled)? })
    }

    /// The handle of its database.
    pub(crate) fn database(&self) -> i32 {
        self.database
    }

    fn bare(compiled: &InstancePre<Host>) -> Result<Sqlite> {
        let mut wasm = Store::new(compiled.module().engine(), Host::default());
        let instance = compiled.instantiate(&mut wasm)?;
        let guest = Guest::new(&mut wasm, instance)?;
        wasm.data_mut().memory = Some(guest.memory());
        Ok(Sqlite { wasm, guest, instance, database: 0 })
    }

    /// Runs statements and returns the rows of all of them. A row is its columns joined by `|`.
    pub(crate) fn run(&mut self, sql: &str) -> Result<Vec<String>> {
        let text = self.push_text(sql)?;
        // A `sqlite3_stmt *`, and a pointer to the rest of the text.
        let places = self.call::<i32, i32>("sqlite3_malloc", 8)?;
        let (mut rest, mut rows) = (text, Vec::new());
        loop {
            let prepare = (self.database, rest, -1, places, places + 4);
            let prepared = self.call::<_, i32>("sqlite3_prepare_v2", prepare)?;
            let statement = self.word(places)?;
            rest = self.word(places + 4)?;
            if prepared == OK && statement == 0 {
                break;
            }
            let stepped = if prepared == OK { self.step(statement, &mut rows)? } else { prepared };
            if prepared == OK {
                self.call::<i32, i32>("sqlite3_finalize", statement)?;
            }
            if stepped != DONE {
                let why = self.call::<i32, i32>("sqlite3_errmsg", self.database)?;
                let why = self.text(why)?;
                self.free(text)?;
                self.free(places)?;
                bail!("SQLite says {why:?} of {sql:?}");
            }
        }
        self.free(text)?;
        self.free(places)?;
        Ok(rows)
    }

    fn step(&mut self, statement: i32, rows: &mut Vec<String>) -> Result<i32> {
        loop {
            let stepped = self.call::<i32, i32>("sqlite3_step", statement)?;
            if stepped != ROW {
                return Ok(stepped);
            }
            let count = self.call::<i32, i32>("sqlite3_column_count", statement)?;
            let mut columns = Vec::new();
            for column in 0..count {
                let text = self.call::<(i32, i32), i32>("sqlite3_column_text", (statement, column))?;
                columns.push(if text == 0 { "NULL".to_owned() } else { self.text(text)? });
            }
            rows.push(columns.join("|"));
        }
    }

    /// The length of its memory, in bytes.
    pub(crate) fn memory_bytes(&self) -> usize {
        self.guest.memory().data_size(&self.wasm)
    }

    fn call<P: WasmParams, R: WasmResults>(&mut self, name: &str, parameters: P) -> Result<R> {
        let function: TypedFunc<P, R> = self.instance.get_typed_func(&mut self.wasm, name)?;
        Ok(function.call(&mut self.wasm, parameters)?)
    }

    /// Copies text into its memory, with a terminating zero.
    fn push_text(&mut self, text: &str) -> Result<i32> {
        let at = self.call::<i32, i32>("sqlite3_malloc", i32::try_from(text.len() + 1)?)?;
        if at == 0 {
            bail!("SQLite has no memory for {} bytes", text.len());
        }
        let bytes = [text.as_bytes(), &[0]].concat();
        self.guest.memory().write(&mut self.wasm, usize::try_from(at.cast_unsigned())?, &bytes)?;
        Ok(at)
    }

    fn free(&mut self, at: i32) -> Result<()> {
        self.call("sqlite3_free", at)
    }

    fn word(&self, at: i32) -> Result<i32> {
        let mut word = [0; 4];
        self.guest.memory().read(&self.wasm, usize::try_from(at.cast_unsigned())?, &mut word)?;
        Ok(i32::from_le_bytes(word))
    }

    fn text(&self, at: i32) -> Result<String> {
        let bytes = self.guest.memory().data(&self.wasm);
        let bytes =
            bytes.get(usize::try_from(at.cast_unsigned())?..).context("an address outside the memory")?;
        let length = bytes.iter().position(|byte| *byte == 0).context("text without an end")?;
        Ok(String::from_utf8_lossy(&bytes[..length]).into_owned())
    }
}

fn milliseconds_since_1970() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |time| time.as_secs_f64() * 1000.0)
}

/// Grows the memory to `bytes`. Returns whether that succeeded.
fn resize_heap(mut caller: Caller<'_, Host>, bytes: i32) -> i32 {
    let Some(memory) = caller.data().memory else { return 0 };
    let wanted_pages = u64::from(bytes.cast_unsigned()).div_ceil(WASM_PAGE_BYTES);
    let more_pages = wanted_pages.saturating_sub(memory.size(&caller));
    i32::from(memory.grow(&mut caller, more_pages).is_ok())
}

/// Reports an empty environment: no variables and no bytes.
fn environ_sizes_get(mut caller: Caller<'_, Host>, count: u32, bytes: u32) -> Result<i32, wasmtime::Error> {
    if let Some(memory) = caller.data().memory {
        for at in [count, bytes] {
            memory.write(&mut caller, usize::try_from(at)?, &[0; 4])?;
        }
    }
    Ok(0)
}
