//! What is set aside: the folder `damaged/` and the report in it.
//!
//! A file gets a second name there before it loses its first one, and the report tells of it in between. So
//! whenever this is interrupted, nothing is gone and nothing lies there unexplained.

use std::path::{Path, PathBuf};

use super::error::StoreError;
use super::names::DAMAGED_DIR;
use crate::sys::file;

const REPORT_FILE: &str = "REPORT.txt";

const INTRODUCTION: &str = "\
What `stillframe repair` set aside, and why. Whatever was whole in a pack that lies here is in the store
again, so the store needs none of these files. They are kept for whoever wants to look for more in them, and
may be deleted.
";

/// The folder for damaged things of a store, and the section of its report that a repair writes.
pub(crate) struct Aside {
    dir: PathBuf,
    title: Option<String>,
}

impl Aside {
    /// Begins a section, which is written when there is something to tell.
    pub(crate) fn begin(store: &Path) -> Aside {
        Aside { dir: store.join(DAMAGED_DIR), title: Some(format!("\n{}\n", jiff::Timestamp::now())) }
    }

    /// Gives a file a second name in the folder and tells why. It keeps the first one.
    pub(crate) fn put(&mut self, path: &Path, why: &[String]) -> Result<(), StoreError> {
        file::create_dir(&self.dir).map_err(StoreError::io("create", &self.dir))?;
        let second = file::link_into(path, &self.dir).map_err(StoreError::io("set aside", path))?;
        file::sync_dir(&self.dir).map_err(StoreError::io("make durable", &self.dir))?;
        let name = second.file_name().unwrap_or_default().to_string_lossy();
        let mut lines = vec![format!("set aside: {} as {name}", path.display())];
        lines.extend(why.iter().map(|why| format!("    {why}")));
        self.tell(&lines)
    }

    /// Adds lines to the report: durable when this returns.
    pub(crate) fn tell(&mut self, lines: &[String]) -> Result<(), StoreError> {
        file::create_dir(&self.dir).map_err(StoreError::io("create", &self.dir))?;
        let path = self.report();
        let append = || {
            let file = file::open_or_create(&path)?;
            let length_bytes = file.length_bytes()?;
            let introduction = if length_bytes == 0 { INTRODUCTION } else { "" };
            let title = self.title.as_deref().unwrap_or_default();
            let text = format!("{introduction}{title}{}\n", lines.join("\n"));
            file.write_all_at(text.as_bytes(), length_bytes)?;
            file.sync()?;
            file::sync_dir(&self.dir)
        };
        append().map_err(StoreError::io("write", &path))?;
        self.title = None;
        Ok(())
    }

    /// Whether this section has anything in it.
    pub(crate) fn has_told(&self) -> bool {
        self.title.is_none()
    }

    /// Where the report is.
    pub(crate) fn report(&self) -> PathBuf {
        self.dir.join(REPORT_FILE)
    }
}
