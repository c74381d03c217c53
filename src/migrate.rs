//! Migrate: converts an older store to this program's format.

use std::path::Path;
use std::time::Duration;

use crate::error::Error;
use crate::migrations;
use crate::store::Store;
use crate::store::directory;
use crate::store::format::{FORMAT_VERSION, Format};
use crate::store::lock::Lock;

/// What a migration did, or would do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[non_exhaustive]
pub struct MigrateReport {
    /// The format that the store had.
    pub from: u32,
    /// The format that it has now.
    pub to: u32,
}

/// How to migrate a store.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct MigrateOptions {
    /// Only find out what would be done.
    pub dry_run: bool,
    /// How long to wait for another process that has the store open.
    pub wait: Duration,
    /// Migrate a store that belongs to another user also as root, as
    /// [`StoreOptions::trust_owner`](crate::StoreOptions::trust_owner).
    pub trust_owner: bool,
}

impl MigrateOptions {
    /// The default.
    pub fn new() -> Self {
        MigrateOptions::default()
    }

    /// With `true`, finds out what would be done and changes nothing.
    pub fn dry_run(mut self, dry_run: bool) -> Self {
        self.dry_run = dry_run;
        self
    }

    /// Sets how long to wait for another process that has the store open.
    pub fn wait(mut self, wait: Duration) -> Self {
        self.wait = wait;
        self
    }

    /// With `true`, root may migrate a store of [another user](Self::trust_owner).
    pub fn trust_owner(mut self, trust: bool) -> Self {
        self.trust_owner = trust;
        self
    }
}

impl Store {
    /// Converts the store at `path`, which must not be open, to this program's format. Does nothing
    /// if the store already has it.
    ///
    /// The old store stays whole until the new one is complete, so there must be space for both. If
    /// this is interrupted at any moment, the next call continues.
    ///
    /// ```
    /// use stillframe::Store;
    /// use stillframe::migrate::MigrateOptions;
    /// # let dir = tempfile::tempdir()?;
    /// # let path = dir.path().join("vault");
    /// # Store::options().create(&path)?;
    /// let report = Store::migrate(&path, &MigrateOptions::new().dry_run(true))?;
    /// assert_eq!(report.from, report.to);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`StoreError::NewerFormat`](crate::store::StoreError::NewerFormat),
    /// [`StoreError::Owned`](crate::store::StoreError::Owned), or an error if something cannot be
    /// read or written.
    pub fn migrate(path: impl AsRef<Path>, options: &MigrateOptions) -> Result<MigrateReport, Error> {
        let dir = directory::open(path.as_ref(), options.trust_owner)?;
        Format::read(&dir)?;
        let lock = Lock::take(&dir, options.wait)?;
        let from = Format::read(&dir)?.version;
        if !options.dry_run {
            lock.check_writable()?;
            migrations::run(&dir, migrations::STEPS, FORMAT_VERSION)?;
        }
        Ok(MigrateReport { from, to: FORMAT_VERSION })
    }
}
