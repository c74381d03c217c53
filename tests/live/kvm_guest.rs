//! A process that runs a virtual machine. Its memory is half of the guest's state; the other half
//! are the processor's registers, which the kernel holds. So the process is not rolled back.
//! Instead the guest's memory file is rolled back, under a monitor that has stopped the processor
//! and restores its registers.

use std::fs::File;
use std::path::PathBuf;
use std::process::Command;
use std::sync::OnceLock;

use super::rollback::{Program, Vault};
use super::rollback_states::compiled;
use crate::needs::{needs, passed_over};

/// How many words the guest's table has.
const WORDS: usize = 0x2000;

/// A model of the guests of `kvm_guest.c` and `firecracker_guest.c` without a virtual machine.
pub(super) struct Model {
    steps: u32,
    drawn: u32,
    table: Vec<u32>,
}

impl Model {
    pub(super) fn new(words: usize) -> Model {
        Model { steps: 0, drawn: 0, table: vec![0; words] }
    }

    /// What the guest prints after this many further steps.
    pub(super) fn run(&mut self, steps: u32) -> String {
        for _ in 0..steps {
            self.drawn = self.drawn.wrapping_mul(1_103_515_245).wrapping_add(12345);
            let word = (self.drawn >> 18) as usize % self.table.len();
            self.table[word] = self.table[word].wrapping_add(self.drawn);
            self.steps += 1;
        }
        let sum = self.table.iter().fold(0u32, |sum, word| sum.wrapping_mul(31).wrapping_add(*word));
        format!("{} {} {sum}", self.steps, self.drawn)
    }
}

/// Whether this machine can run virtual machines with guests that `cc` compiles.
pub(super) fn has_kvm() -> bool {
    if !cfg!(target_arch = "x86_64") {
        passed_over("its guest is for x86-64");
        return false;
    }
    if File::options().read(true).write(true).open("/dev/kvm").is_err() {
        passed_over("it needs /dev/kvm, and the right to open it");
        return false;
    }
    needs(&["cc"])
}

/// The monitor with its guest, whose memory is in this file.
fn machine(memory: &str) -> Option<Program> {
    if !has_kvm() {
        return None;
    }
    static COMPILED: OnceLock<PathBuf> = OnceLock::new();
    let mut command = Command::new(COMPILED.get_or_init(|| compiled("kvm_guest")));
    command.arg(memory);
    Some(Program::start(command))
}

#[test]
fn a_process_with_a_virtual_machine_is_refused_by_name_and_its_guest_goes_on() {
    let vault = Vault::new();
    let memory = vault.directory.path().join("memory");
    let Some(mut machine) = machine(memory.to_str().unwrap()) else { return };
    let pid = machine.pid().to_string();
    let mut model = Model::new(WORDS);
    assert_eq!(machine.ask("run 1000"), model.run(1000));
    vault.json(&["capture", "--pid", &pid, "--process", "p"]);
    assert_eq!(machine.ask("run 1000"), model.run(1000), "after the capture");
    let others = ["--leave-new-memory", "--leave-shared-memory", "--leave-descriptors"];
    for options in [&[][..], &others[..]] {
        let output = vault.run(&[&["rollback", "p@latest", "--pid", &pid], options].concat());
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(6), "{stderr}");
        assert!(
            stderr.contains("virtual processors (KVM)") && stderr.contains("--leave-devices"),
            "{stderr}"
        );
        assert_eq!(machine.ask("run 1000"), model.run(1000), "after the refusal");
    }
}

#[test]
fn a_guest_whose_memory_file_is_restored_in_place_goes_on_when_it_gets_its_registers() {
    let vault = Vault::new();
    let path = vault.directory.path().join("memory");
    let memory = path.to_str().unwrap();
    let Some(mut machine) = machine(memory) else { return };
    let mut model = Model::new(WORDS);
    machine.ask("run 1000");
    let then = machine.ask("save");
    assert_eq!(then, model.run(1000));
    vault.json(&["capture", "--file", memory, "--process", "guest"]);
    for _ in 0..3 {
        assert_ne!(machine.ask("run 2000"), then);
        vault.json(&["restore", "guest@latest", "--to", memory, "--in-place"]);
        assert_eq!(machine.ask("load"), then);
    }
    assert_eq!(machine.ask("run 3000"), model.run(3000));
    // Without its registers the guest detects the mismatch.
    vault.json(&["restore", "guest@latest", "--to", memory, "--in-place"]);
    assert_eq!(machine.ask("run 1"), "WRONG: its memory and its registers");
}
