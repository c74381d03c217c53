//! What every verb needs: where the store is, how to print, and whether ctrl-C was pressed.

use std::io::{self, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::Context as _;
use clap::{ArgAction, Args, ValueHint};
use rustix::fs::Mode;
use signal_hook::consts::{SIGINT, SIGTERM, SIGXFSZ};
use signal_hook::flag;
use stillframe::{Store, StoreOptions};
use tracing::level_filters::LevelFilter;
use tracing_subscriber::filter::Targets;
use tracing_subscriber::prelude::*;

use crate::errors::{Exit, wrong_usage};
use crate::output::Output;
use crate::values::seconds;

/// The options of every verb.
#[derive(Debug, Args)]
#[command(next_help_heading = "Global options")]
pub(crate) struct Global {
    /// Directory of the store [env: STILLFRAME_STORE]
    ///
    /// Default: $XDG_DATA_HOME/stillframe, else ~/.local/share/stillframe. The first capture creates it.
    #[arg(long, global = true, value_name = "DIR", env = "STILLFRAME_STORE", hide_env = true)]
    #[arg(value_hint = ValueHint::DirPath)]
    pub(crate) store: Option<PathBuf>,
    /// Print JSON for scripts
    ///
    /// Sizes are in bytes, times in UTC (RFC 3339) and durations in milliseconds. `watch` prints one object per line.
    #[arg(long, global = true)]
    pub(crate) json: bool,
    /// Print less: no progress and no hints
    ///
    /// `capture`, `watch` and `list` then print ids only.
    #[arg(long, short, global = true)]
    pub(crate) quiet: bool,
    /// Log to standard error; -vv logs more
    #[arg(long, short, global = true, action = ArgAction::Count, conflicts_with = "quiet")]
    pub(crate) verbose: u8,
    /// Wait for a store that another process owns
    ///
    /// The command fails with exit code 4 if the store is not free after this time. Default: 0.
    #[arg(long, global = true, value_name = "SECONDS", default_value = "0", value_parser = seconds)]
    #[arg(allow_negative_numbers = true, hide_default_value = true)]
    pub(crate) wait: Duration,
    /// As root, accept a store that another user owns
    ///
    /// The owner of the store can make this command change files outside the store.
    #[arg(long, global = true)]
    pub(crate) trust_owner: bool,
}

/// What every verb needs.
#[derive(Debug)]
pub(crate) struct Context {
    pub(crate) output: Output,
    /// How long to wait for a store that another process owns.
    pub(crate) wait: Duration,
    /// Whether root uses a store that another user owns.
    pub(crate) trust_owner: bool,
    /// The umask that the command was started with. Programs that it starts get it.
    pub(crate) inherited_umask: Mode,
    store: Option<PathBuf>,
    interrupted: Arc<AtomicBool>,
    ends_at_once: Arc<AtomicBool>,
}

impl Context {
    /// Prepares the process: a private umask, the tracing, the signals.
    pub(crate) fn new(global: &Global) -> anyhow::Result<Context> {
        // Memory holds secrets: every file is private from its first byte.
        let inherited_umask = rustix::process::umask(Mode::from_raw_mode(0o077));
        trace(global);
        let interrupted = Arc::new(AtomicBool::new(false));
        let ends_at_once = Arc::new(AtomicBool::new(true));
        for signal in [SIGINT, SIGTERM] {
            let code = Exit::Interrupted as i32;
            flag::register_conditional_shutdown(signal, code, ends_at_once.clone())
                .and_then(|_| flag::register(signal, interrupted.clone()))
                .context("cannot listen for ctrl-C")?;
        }
        // At the limit of file sizes (`ulimit -f`) a write then fails with an error, and the signal does not end the
        // program. A command that `watch` starts has the default action.
        flag::register(SIGXFSZ, Arc::default()).context("cannot handle SIGXFSZ")?;
        Ok(Context {
            output: Output::new(global.json, global.quiet),
            wait: global.wait,
            trust_owner: global.trust_owner,
            inherited_umask,
            store: global.store.clone(),
            interrupted,
            ends_at_once,
        })
    }

    /// Where the store is.
    pub(crate) fn store_path(&self) -> anyhow::Result<PathBuf> {
        if let Some(path) = &self.store {
            return Ok(path.clone());
        }
        // The specification of these directories wants relative paths to be ignored.
        let absolute = |name| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
        absolute("XDG_DATA_HOME")
            .or_else(|| absolute("HOME").map(|home| home.join(".local/share")))
            .map(|data| data.join("stillframe"))
            .ok_or_else(|| {
                wrong_usage(
                    "no directory for the store: HOME and XDG_DATA_HOME are not set; pass --store DIR, or set \
                     STILLFRAME_STORE",
                )
            })
    }

    /// Opens the store, which must exist.
    pub(crate) fn open(&self) -> anyhow::Result<Store> {
        Ok(self.options().open(self.store_path()?)?)
    }

    /// Opens the store to capture into it, or creates it if nothing is there.
    pub(crate) fn open_or_create(&self) -> anyhow::Result<Store> {
        let path = self.store_path()?;
        let is_new = !path.exists();
        let store = self.options().open_or_create(&path)?;
        store.check_writable()?;
        if is_new {
            self.output.hint(&format!("created the store {}", display(&path)));
        }
        Ok(store)
    }

    /// Opens the store again, without waiting for another process that owns it.
    pub(crate) fn reopen(&self) -> Result<Store, stillframe::Error> {
        let path = self.store_path().unwrap_or_default();
        Ok(Store::options().open(path)?)
    }

    /// How to open stores.
    pub(crate) fn options(&self) -> StoreOptions {
        Store::options().wait(self.wait).trust_owner(self.trust_owner)
    }

    /// Whether ctrl-C was pressed, or SIGTERM came.
    pub(crate) fn is_interrupted(&self) -> bool {
        self.interrupted.load(Ordering::Relaxed)
    }

    /// Forgets that ctrl-C was pressed, so that the next time can be noticed.
    pub(crate) fn clear_interrupt(&self) {
        self.interrupted.store(false, Ordering::Relaxed);
    }

    /// The flag that ctrl-C sets from here on. Until this is called ctrl-C ends the program at once, which a store
    /// survives.
    pub(crate) fn interrupted(&self) -> Arc<AtomicBool> {
        self.ends_at_once.store(false, Ordering::Relaxed);
        self.interrupted.clone()
    }
}

/// A path as people read it.
pub(crate) fn display(path: &Path) -> String {
    crate::human::plain(&path.to_string_lossy())
}

/// Standard error without control characters from names.
struct Plain(io::Stderr);

impl Write for Plain {
    /// Gets a whole line, colours included.
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let line = String::from_utf8_lossy(bytes);
        // The layer escapes control characters, but not those that set the direction of writing; it writes colours.
        let is_hidden = |letter: char| !letter.is_control() && stillframe::text::is_control(letter);
        self.0.write_all(line.replace(is_hidden, "\u{fffd}").as_bytes())?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

/// Sends the library's log to standard error: warnings, and more with `-v` and `-vv`.
fn trace(global: &Global) {
    let level = match (global.quiet, global.verbose) {
        (true, _) => LevelFilter::ERROR,
        (false, 0) => LevelFilter::WARN,
        (false, 1) => LevelFilter::INFO,
        (false, _) => LevelFilter::TRACE,
    };
    let targets = Targets::new().with_target("stillframe", level).with_default(LevelFilter::ERROR);
    let colour =
        io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
    let lines = tracing_subscriber::fmt::layer()
        .with_writer(|| Plain(io::stderr()))
        .with_ansi(colour)
        .with_target(global.verbose > 1)
        // It would panic if standard error were closed.
        .log_internal_errors(false)
        .without_time();
    tracing_subscriber::registry().with(lines.with_filter(targets)).init();
}
