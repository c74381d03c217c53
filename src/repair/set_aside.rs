//! Setting files aside: the directory `damaged/` and the report in it.
//!
//! A file gets a second name there before it loses its first one, and the report is written in
//! between. So if this is interrupted at any moment, no file is lost, and every file in the
//! directory is explained in the report.

use std::path::PathBuf;

use crate::store::error::StoreError;
use crate::store::names::DAMAGED_DIR;
use crate::sys::dir::{Dir, Name};
use crate::sys::file;

const REPORT_FILE: &str = "REPORT.txt";

const INTRODUCTION: &str = "\
What `stillframe repair` set aside, and why. Whatever was whole in a pack that lies here is in the store
again, so the store needs none of these files. They are kept for whoever wants to look for more in them, and
may be deleted.
";

/// The directory `damaged/` of a store, and the section of its report that a repair writes.
pub(crate) struct SetAside {
    dir: Name,
    title: Option<String>,
}

impl SetAside {
    /// Begins a section, which is written once there is something to report.
    pub(crate) fn begin(store: &Dir) -> SetAside {
        SetAside { dir: store.join(DAMAGED_DIR), title: Some(format!("\n{}\n", jiff::Timestamp::now())) }
    }

    /// Gives a file a second name in the directory and reports why. The file keeps its first name.
    pub(crate) fn put(&mut self, name: &Name, why: &[String]) -> Result<(), StoreError> {
        let dir = file::create_dir(&self.dir).map_err(StoreError::io("create", &self.dir))?;
        let second = file::link_into(name, &dir).map_err(StoreError::io("set aside", name))?;
        file::sync_dir(&dir).map_err(StoreError::io("make durable", &dir))?;
        let second = second.name().to_string_lossy();
        let mut lines = vec![format!("set aside: {} as {second}", name.display())];
        lines.extend(why.iter().map(|why| format!("    {why}")));
        self.tell(&lines)
    }

    /// Moves a directory, which cannot have a second name, and reports why.
    pub(crate) fn move_dir(&mut self, name: &Name, why: &[String]) -> Result<(), StoreError> {
        let dir = file::create_dir(&self.dir).map_err(StoreError::io("create", &self.dir))?;
        let free = (0u32..).map(|number| dir.join(format!("{}.{number}", name.name().to_string_lossy())));
        let Some(second) = free.into_iter().find(|second| !second.exists()) else { return Ok(()) };
        let mut lines = vec![format!("set aside: {} as {}", name.display(), second.name().to_string_lossy())];
        lines.extend(why.iter().map(|why| format!("    {why}")));
        self.tell(&lines)?;
        file::rename(name, &second).map_err(StoreError::io("set aside", name))?;
        for dir in [name.dir(), &dir] {
            file::sync_dir(dir).map_err(StoreError::io("make durable", dir))?;
        }
        Ok(())
    }

    /// Adds lines to the report. They are durable when this returns.
    pub(crate) fn tell(&mut self, lines: &[String]) -> Result<(), StoreError> {
        let dir = file::create_dir(&self.dir).map_err(StoreError::io("create", &self.dir))?;
        let name = dir.join(REPORT_FILE);
        let append = || {
            let mut file = file::open_or_create(&name)?;
            if file.has_other_names()? {
                // The earlier report stays under its other name.
                file::remove(&name)?;
                file = file::create_new(&name)?;
            }
            let length_bytes = file.length_bytes()?;
            let introduction = if length_bytes == 0 { INTRODUCTION } else { "" };
            let title = self.title.as_deref().unwrap_or_default();
            let text = format!("{introduction}{title}{}\n", lines.join("\n"));
            file.write_all_at(text.as_bytes(), length_bytes)?;
            file.sync()?;
            file::sync_dir(&dir)
        };
        append().map_err(StoreError::io("write", &name))?;
        self.title = None;
        Ok(())
    }

    /// Whether anything was reported in this section.
    pub(crate) fn has_told(&self) -> bool {
        self.title.is_none()
    }

    /// The path of the report.
    pub(crate) fn report(&self) -> PathBuf {
        self.dir.path().join(REPORT_FILE)
    }
}
