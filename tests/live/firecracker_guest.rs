//! A real Firecracker with its own guest, if Firecracker is in the path. No Debian package has it.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::kvm_guest::{Model, has_kvm};
use super::rollback::{Program, Vault};
use crate::needs::{is_there, passed_over};

/// As in `firecracker_guest.c`.
const WORDS: usize = 0x4000;

/// How many steps the guest makes for each request.
const STEPS: u32 = 1000;

/// Linker flags for an ELF file that needs no operating system and is loaded at 16 MiB.
const FREESTANDING: [&str; 11] = [
    "-O1",
    "-ffreestanding",
    "-fno-pic",
    "-no-pie",
    "-fno-stack-protector",
    "-mno-red-zone",
    "-mgeneral-regs-only",
    "-ffixed-r15",
    "-nostdlib",
    "-static",
    "-Wl,-Ttext-segment=0x1000000,--build-id=none,-z,norelro",
];

/// A Firecracker process.
struct Firecracker {
    program: Program,
    socket: PathBuf,
}

impl Firecracker {
    fn start(directory: &Path, name: &str) -> Firecracker {
        let (socket, log) = (directory.join(name), directory.join(format!("{name}.log")));
        File::create(&log).unwrap();
        let mut command = Command::new("firecracker");
        command
            .args(["--id", name, "--level", "Error", "--log-path"])
            .arg(log)
            .arg("--api-sock")
            .arg(&socket);
        let program = Program::silent(command);
        let begun = Instant::now();
        while UnixStream::connect(&socket).is_err() {
            assert!(begun.elapsed() < Duration::from_secs(60), "Firecracker does not answer");
            std::thread::sleep(Duration::from_millis(5));
        }
        Firecracker { program, socket }
    }

    /// A request to its API, which must succeed.
    #[track_caller]
    fn request(&self, method: &str, path: &str, body: &Value) {
        let mut stream = UnixStream::connect(&self.socket).unwrap();
        let body = body.to_string();
        let head = format!("{method} {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {}\r\n", body.len());
        write!(stream, "{head}Content-Type: application/json\r\n\r\n{body}").unwrap();
        let mut answer = BufReader::new(stream);
        let mut status = String::new();
        answer.read_line(&mut status).unwrap();
        if !status.starts_with("HTTP/1.1 2") {
            let mut why = [0; 1000];
            let length = answer.read(&mut why).unwrap();
            panic!("{method} {path}: {status}{}", String::from_utf8_lossy(&why[..length]));
        }
    }

    fn boot(&mut self, guest: &Path) {
        let memory = json!({"vcpu_count": 1, "mem_size_mib": 96, "track_dirty_pages": true});
        self.request("PUT", "/boot-source", &json!({"kernel_image_path": guest, "boot_args": "x"}));
        self.request("PUT", "/machine-config", &memory);
        self.request("PUT", "/actions", &json!({"action_type": "InstanceStart"}));
        assert_eq!(self.program.line(), "ready");
    }

    /// Pauses the guest, and writes its state and its memory into files.
    fn save(&self, state: &Path, memory: &Path) {
        self.request("PATCH", "/vm", &json!({"state": "Paused"}));
        let files = json!({"snapshot_type": "Full", "snapshot_path": state, "mem_file_path": memory});
        self.request("PUT", "/snapshot/create", &files);
    }

    fn load(&self, state: &Path, memory: &Path) {
        let backend = json!({"backend_type": "File", "backend_path": memory});
        let files = json!({"snapshot_path": state, "mem_backend": backend, "resume_vm": false});
        self.request("PUT", "/snapshot/load", &files);
    }

    fn resume(&self) {
        self.request("PATCH", "/vm", &json!({"state": "Resumed"}));
    }

    fn step(&mut self) -> String {
        let input = self.program.child.stdin.as_mut().unwrap();
        input.write_all(b"s").unwrap();
        input.flush().unwrap();
        self.program.line()
    }
}

#[test]
fn a_firecracker_is_refused_by_name_and_its_memory_file_goes_back_under_a_stopped_one() {
    if !has_kvm() {
        return;
    }
    if !is_there("firecracker") {
        return passed_over("it needs firecracker (a binary of its releases on GitHub, in the path)");
    }
    let vault = Vault::new();
    let directory = vault.directory.path();
    let [guest, state, memory, later] =
        ["guest", "state", "memory", "later"].map(|name| directory.join(name));
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/live/firecracker_guest.c");
    let compiled = Command::new("cc").args(FREESTANDING).arg("-o").arg(&guest).arg(source).status();
    assert!(compiled.unwrap().success(), "cc cannot compile it");
    let memory_name = memory.to_str().unwrap();

    // A process with a running guest is captured, but not rolled back.
    let mut model = Model::new(WORDS);
    let mut first = Firecracker::start(directory, "first");
    first.boot(&guest);
    assert_eq!(first.step(), model.run(STEPS));
    let pid = first.program.pid().to_string();
    vault.json(&["capture", "--pid", &pid, "--process", "p"]);
    assert_eq!(first.step(), model.run(STEPS), "after the capture");
    let output = vault.run(&["rollback", "p@latest", "--pid", &pid, "--leave-new-memory"]);
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(6), "{stderr}");
    assert!(stderr.contains("virtual processors (KVM)") && stderr.contains("--leave-devices"), "{stderr}");
    assert_eq!(first.step(), model.run(STEPS), "after the refusal");

    // The file holds one moment, then a later one, and then the first again while a stopped
    // Firecracker has it mapped.
    first.save(&state, &memory);
    vault.json(&["capture", "--file", memory_name, "--process", "memory"]);
    first.resume();
    assert_ne!(first.step(), first.step());
    first.save(&later, &memory);
    drop(first);
    let mut second = Firecracker::start(directory, "second");
    second.load(&state, &memory);
    let done = vault.json(&["restore", "memory@latest", "--to", memory_name, "--in-place"]);
    assert!(done["written_bytes"].as_u64().unwrap() > 0);
    second.resume();
    for _ in 0..3 {
        assert_eq!(second.step(), model.run(STEPS), "after the restore");
    }
}
