//! Open files, rings and devices of a process that is rolled back: the rollback checks what the
//! descriptors refer to, and reports differences.

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::OnceLock;

use super::rollback::{Program, Vault};
use super::rollback_states::compiled;
use crate::needs::{needs, passed_over};

/// `open_files.c`.
fn open_files() -> Program {
    static COMPILED: OnceLock<PathBuf> = OnceLock::new();
    let mut command = Command::new(COMPILED.get_or_init(|| compiled("open_files")));
    // Standard error of the tests may be a file, whose position changes.
    command.stderr(Stdio::null());
    Program::start(command)
}

/// Exit code and standard error of a rollback.
fn rollback(vault: &Vault, pid: &str, options: &[&str]) -> (Option<i32>, String) {
    let output = vault.run(&[&["--quiet", "rollback", "p@latest", "--pid", pid], options].concat());
    (output.status.code(), String::from_utf8(output.stderr).unwrap())
}

#[test]
fn a_number_that_stands_for_another_file_now_is_refused_where_the_program_would_write_to_it() {
    if !needs(&["cc"]) {
        return;
    }
    let vault = Vault::new();
    let mut program = open_files();
    let pid = program.pid().to_string();
    let path = |name: &str| vault.directory.path().join(name).display().to_string();
    let created = libc::O_CREAT;
    program.ask(&format!("open 10 {} {}", libc::O_RDWR | created, path("scratch")));
    program.ask(&format!("open 11 {} {}", libc::O_RDONLY | created, path("read")));
    vault.json(&["capture", "--pid", &pid, "--process", "p"]);
    // A renamed file is the same file.
    fs::rename(path("scratch"), path("scratch.1")).unwrap();
    assert_eq!(rollback(&vault, &pid, &[]), (Some(0), String::new()));
    // A new file of the same name is not.
    fs::remove_file(path("scratch.1")).unwrap();
    program.ask("close 10");
    for name in ["scratch", "database"] {
        program.ask(&format!("open 10 {} {}", libc::O_RDWR | created, path(name)));
        let (code, stderr) = rollback(&vault, &pid, &[]);
        assert_eq!(code, Some(6), "{stderr}");
        assert!(stderr.contains("descriptor 10 was ") && stderr.contains("--leave-descriptors"), "{stderr}");
        let (code, stderr) = rollback(&vault, &pid, &["--leave-descriptors"]);
        assert!(code == Some(0) && stderr.contains("descriptor 10 was "), "{stderr}");
    }
    // A file that is only read, and was closed and opened since, is reported.
    program.ask("close 10");
    program.ask(&format!("open 11 {} {}", libc::O_RDONLY, path("database")));
    program.ask(&format!("open 12 {} {}", libc::O_RDONLY, path("database")));
    let done = vault.json(&["rollback", "p@latest", "--pid", &pid]);
    let left: Vec<&str> =
        done["left_descriptors"].as_array().unwrap().iter().map(|it| it.as_str().unwrap()).collect();
    assert!(left.len() == 3, "{left:?}");
    assert!(left[0].starts_with("descriptor 10 was ") && left[0].ends_with("is closed now"), "{left:?}");
    assert!(left[1].starts_with("descriptor 11 was ") && left[1].ends_with("/database now"), "{left:?}");
    assert!(left[2].starts_with("descriptor 12 ") && left[2].contains("opened since"), "{left:?}");
}

#[test]
fn positions_of_files_that_differ_are_said_and_set_back_where_that_is_asked_for() {
    if !needs(&["cc"]) {
        return;
    }
    let vault = Vault::new();
    let mut program = open_files();
    let pid = program.pid().to_string();
    let paths = ["a", "b"].map(|name| vault.directory.path().join(name));
    for (number, path) in [10, 11].into_iter().zip(&paths) {
        program.ask(&format!("open {number} {} {}", libc::O_RDWR | libc::O_CREAT, path.display()));
        program.ask(&format!("write {number} first"));
    }
    vault.json(&["capture", "--pid", &pid, "--process", "p"]);
    program.ask("write 10 second");
    program.ask("write 11 second");
    let (code, stderr) = rollback(&vault, &pid, &[]);
    assert_eq!(code, Some(0), "{stderr}");
    assert!(
        stderr.contains("was at byte 5 and is at byte 11 now") && stderr.matches("--seek-files").count() == 2,
        "{stderr}"
    );
    assert_eq!(program.ask("where 10"), "11");
    if !cfg!(target_arch = "x86_64") {
        return;
    }
    let (code, stderr) = rollback(&vault, &pid, &["--seek-files"]);
    assert_eq!((code, stderr.as_str()), (Some(0), ""));
    assert_eq!((program.ask("where 10"), program.ask("where 11")), ("5".to_owned(), "5".to_owned()));
    program.ask("write 10 third");
    assert_eq!(fs::read_to_string(&paths[0]).unwrap(), "firstthirdd");
    assert_eq!(rollback(&vault, &pid, &["--seek-files"]).0, Some(0));
    assert_eq!(program.ask("where 10"), "5");
}

#[test]
fn rings_of_io_uring_are_refused_by_name_unless_they_may_be_left() {
    if !needs(&["cc"]) {
        return;
    }
    // If there are many differences, the error shows some of them and still says what to do.
    for (mapped, rings) in [("1", 1), ("0", 1), ("1", 8)] {
        let vault = Vault::new();
        let mut program = open_files();
        let pid = program.pid().to_string();
        for _ in 0..rings {
            if program.ask(&format!("ring {mapped}")) == "none" {
                return passed_over("it needs io_uring, which this kernel does not have or does not allow");
            }
        }
        vault.json(&["capture", "--pid", &pid, "--process", "p"]);
        let (code, stderr) = rollback(&vault, &pid, &[]);
        assert!(
            code == Some(6) && stderr.contains("io_uring") && stderr.contains("--leave-devices"),
            "{stderr}"
        );
        assert_eq!(rollback(&vault, &pid, &["--leave-devices"]).0, Some(0));
        assert_eq!(program.ask("where 0"), "-1");
    }
}
