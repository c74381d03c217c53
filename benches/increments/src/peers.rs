//! borg and restic, if they are installed: backup tools that store a raw file of the memory.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::contender::{Contender, Moment, Taken};
use crate::workload::is_installed;

#[derive(Clone, Copy, PartialEq)]
enum Tool {
    Borg,
    Restic,
}

pub struct Peer {
    tool: Tool,
    dir: PathBuf,
    repository: PathBuf,
    snapshots: usize,
}

/// The installed ones; prints a line for each one that is not installed.
pub fn installed(dir: &Path) -> Vec<Peer> {
    let tools = [(Tool::Borg, "borg", "--version"), (Tool::Restic, "restic", "version")];
    let there = tools.into_iter().filter(|(_, program, version)| {
        let there = is_installed(program, version);
        if !there {
            println!("{program} is not installed: left out");
        }
        there
    });
    there.map(|(tool, program, _)| Peer::new(tool, &dir.join(program))).collect()
}

impl Peer {
    fn new(tool: Tool, dir: &Path) -> Self {
        std::fs::create_dir(dir).unwrap();
        std::fs::write(dir.join("password"), "increments\n").unwrap();
        let peer = Peer { tool, dir: dir.to_owned(), repository: dir.join("repository"), snapshots: 0 };
        match tool {
            Tool::Borg => peer.run(&["init", "--encryption", "none", "repository"]),
            Tool::Restic => peer.run(&["init"]),
        }
        peer
    }

    fn run(&self, arguments: &[&str]) {
        let mut command = Command::new(if self.tool == Tool::Borg { "borg" } else { "restic" });
        command
            .args(arguments)
            .current_dir(&self.dir)
            .env("BORG_BASE_DIR", &self.dir)
            .env("BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK", "yes")
            .env("RESTIC_REPOSITORY", &self.repository)
            .env("RESTIC_PASSWORD_FILE", self.dir.join("password"))
            .env("RESTIC_CACHE_DIR", self.dir.join("cache"))
            .stdin(Stdio::null());
        let output = command.output().unwrap();
        assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    }
}

impl Contender for Peer {
    fn name(&self) -> String {
        if self.tool == Tool::Borg { "borg" } else { "restic" }.to_owned()
    }

    fn prepare(&mut self, moment: Moment<'_>) {
        let mut image = BufWriter::new(File::create(self.dir.join("memory.raw")).unwrap());
        moment.state.pieces().for_each(|piece| image.write_all(piece).unwrap());
        image.flush().unwrap();
    }

    fn snapshot(&mut self, _moment: Moment<'_>) -> Taken {
        self.snapshots += 1;
        let archive = format!("repository::{}", self.snapshots);
        match self.tool {
            Tool::Borg => {
                self.run(&["create", "--chunker-params", "fixed,4096", "-C", "lz4", &archive, "memory.raw"]);
            }
            Tool::Restic => self.run(&["backup", "memory.raw"]),
        }
        Taken::default()
    }

    fn path(&self) -> &Path {
        &self.repository
    }
}
