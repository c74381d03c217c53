//! Migrate: an older store becomes one of this format.

use std::path::Path;
use std::time::Duration;

use crate::error::Error;
use crate::migrations;
use crate::store::directory;
use crate::store::format::{FORMAT_VERSION, Format};
use crate::store::lock::Lock;
use crate::store::{Store, StoreOptions};

/// What a migration did, or would do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[non_exhaustive]
pub struct MigrateReport {
    /// The format the store had.
    pub from: u32,
    /// The format it has now.
    pub to: u32,
}

impl Store {
    /// Brings the store at `path`, which must not be open, to this program's format. Does nothing
    /// to one that has it.
    ///
    /// The old store stays whole until the new one is complete, so there must be space for both.
    /// Interrupted at any moment, it goes on when it is called again.
    ///
    /// # Errors
    ///
    /// [`StoreError::NewerFormat`](crate::store::StoreError::NewerFormat),
    /// [`StoreError::Owned`](crate::store::StoreError::Owned); when something cannot be read or written.
    pub fn migrate(path: impl AsRef<Path>, dry_run: bool, wait: Duration) -> Result<MigrateReport, Error> {
        Store::options().wait(wait).migrate(path, dry_run)
    }
}

impl StoreOptions {
    /// The same as [`Store::migrate`], with these options for opening the store.
    ///
    /// # Errors
    ///
    /// As [`Store::migrate`].
    pub fn migrate(&self, path: impl AsRef<Path>, dry_run: bool) -> Result<MigrateReport, Error> {
        let dir = directory::open(path.as_ref(), self.trust_owner)?;
        Format::read(&dir)?;
        let lock = Lock::take(&dir, self.wait)?;
        let from = Format::read(&dir)?.version;
        if !dry_run {
            lock.check_writable()?;
            migrations::run(&dir, migrations::STEPS, FORMAT_VERSION)?;
        }
        Ok(MigrateReport { from, to: FORMAT_VERSION })
    }
}
