//! `watch` never disturbs the process: whatever happens to a snapshot, to the store or to
//! stillframe, the process keeps running, and so does the watch. Also what `capture` reports when a
//! process cannot be captured, or is not the process that it was.

use crate::waiting::{state, until};
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::Signal;
use stillframe::Store;
use stillframe::source::{LiveProcessSource, Source};

use crate::helper::{Running, Vault, noise};
use crate::mount::mounting;

fn passed_over(needs: &str) {
    crate::needs::passed_over(&format!("it needs {needs}"));
}

/// A shell command that runs until the file `go` exists, and then prints that it reached its end.
fn until_told(vault: &Vault) -> String {
    let path = |name: &str| vault.path(name).display().to_string();
    format!(
        "trap 'touch {}' INT TERM; echo $$ > {}; until [ -e {} ]; do sleep 0.02; done; touch {}",
        path("was-interrupted"),
        path("pid"),
        path("go"),
        path("reached-its-end")
    )
}

fn pid_of_command(vault: &Vault) -> u32 {
    let read = || fs::read_to_string(vault.path("pid")).ok()?.trim().parse().ok();
    until("it has started", || read().is_some());
    read().unwrap()
}

fn assert_reached_its_end(vault: &Vault) {
    assert!(!vault.path("was-interrupted").exists(), "the watch has ended its command");
    assert!(vault.path("reached-its-end").exists());
}

#[test]
fn a_command_lives_on_while_a_debugger_looks_at_it_and_is_watched_again_afterwards() {
    let vault = Vault::new();
    let watch =
        ["watch", "--every", "50ms", "--stop-timeout", "100ms", "--", "sh", "-c", &until_told(&vault)];
    let mut watch = vault.start(&[&["--json"], &watch[..]].concat());
    let first = watch.line();
    assert!(first.contains("\"id\""), "{first}");
    let held = LiveProcessSource::new(pid_of_command(&vault)).stop_timeout(Duration::from_secs(60));
    let held = held.open().unwrap();
    std::thread::sleep(Duration::from_millis(700));
    drop(held);
    let after = jiff_now();
    // The watch takes snapshots again.
    until("a snapshot after it", || {
        let line: serde_json::Value = serde_json::from_str(&watch.line()).unwrap();
        line["time"].as_str().unwrap() > &*after
    });
    fs::write(vault.path("go"), "").unwrap();
    let done = watch.wait();
    assert_eq!(done.code, Some(6), "some failed: {}", done.stderr);
    assert!(done.stderr.contains("another capture of it is not done"), "{}", done.stderr);
    assert!(done.stderr.contains("snapshots are taken again"), "{}", done.stderr);
    assert!(done.text().lines().all(|line| line.starts_with('{')), "{}", done.text());
    assert_reached_its_end(&vault);
}

fn jiff_now() -> String {
    let output = Command::new("date").args(["-u", "+%Y-%m-%dT%H:%M:%S.%NZ"]).output().unwrap();
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

#[test]
fn a_command_lives_on_while_the_store_is_full_and_snapshots_are_taken_when_there_is_room_again() {
    // The disk fills up while the watch runs. Space is freed after the first failure was reported.
    let script = r#"
        mount -t tmpfs -o size=24m tmpfs "$2"
        "$1" --store "$2/store" --json watch --every 50ms -- sh -c '
            echo $$ > "$0/pid"; until [ -e "$0/go" ]; do sleep 0.02; done; echo end > "$0/end"' "$3" > "$3/out" 2> "$3/err" &
        watch=$!
        until [ -s "$3/out" ]; do sleep 0.02; done
        dd if=/dev/zero of="$2/filler" bs=64k 2> /dev/null || :
        until grep -q "no space" "$3/err"; do sleep 0.02; [ -e "$3/end" ] && exit 9; kill -0 $watch; done
        "$1" --store "$2/store" --wait 20 list > /dev/null || echo "others cannot use it" >> "$3/err"
        rm "$2/filler"
        lines=$(wc -l < "$3/out")
        until [ $(wc -l < "$3/out") -gt $((lines + 1)) ]; do sleep 0.02; kill -0 $watch; done
        touch "$3/go"
        code=0; wait $watch || code=$?
        echo $code > "$3/code"
        "$1" --store "$2/store" verify > "$3/verified"
    "#;
    let vault = Vault::new();
    for name in ["disk", "beside"] {
        fs::create_dir(vault.path(name)).unwrap();
    }
    let binary = env!("CARGO_BIN_EXE_stillframe").to_owned();
    let path = |name: &str| vault.path(name).to_str().unwrap().to_owned();
    let arguments = ["sh".to_owned(), binary, path("disk"), path("beside")];
    let Some(output) = mounting(script, &arguments) else { return passed_over("mounting") };
    let read = |name: &str| fs::read_to_string(vault.path("beside").join(name)).unwrap_or_default();
    assert!(output.status.success(), "{output:?} {} {}", read("err"), read("out"));
    assert_eq!((read("end").trim(), read("code").trim()), ("end", "1"), "{}", read("err"));
    assert!(read("verified").contains("all in order"), "{}", read("verified"));
    assert!(!read("err").contains("others cannot use it"), "{}", read("err"));
}

#[test]
fn a_command_lives_on_when_stillframe_is_killed() {
    for signal in [Signal::KILL, Signal::HUP] {
        let vault = Vault::new();
        let mut watch =
            vault.start(&["--quiet", "watch", "--every", "1ms", "--", "sh", "-c", &until_told(&vault)]);
        watch.line();
        let pid = pid_of_command(&vault);
        watch.signal(signal);
        until("stillframe is dead", || state(watch.pid()) == 'Z');
        until("nothing holds it", || state(pid) == 'S');
        fs::write(vault.path("go"), "").unwrap();
        until("its end", || vault.path("reached-its-end").exists());
        assert_eq!(watch.wait().code, None);
        assert_reached_its_end(&vault);
    }
}

#[test]
fn a_watch_goes_on_when_nobody_reads_what_it_prints() {
    let vault = Vault::new();
    let mut command = Command::new("sh");
    // Standard error is closed too.
    let script = "\"$0\" --store \"$1\" --quiet watch --every 20ms -- sh -c \"$2\" 2>&1 | head -n 1; wait";
    let arguments = [env!("CARGO_BIN_EXE_stillframe"), vault.store().to_str().unwrap(), &until_told(&vault)]
        .map(str::to_owned);
    command.args(["-c", script]).args(arguments).stdout(Stdio::null()).stderr(Stdio::null());
    let running = std::thread::spawn(move || command.status().unwrap());
    pid_of_command(&vault);
    let pack_bytes = || -> Option<u64> {
        let entries = fs::read_dir(vault.store().join("packs")).ok()?;
        Some(entries.flatten().filter_map(|entry| entry.metadata().ok()).map(|it| it.len()).sum())
    };
    // Each snapshot adds something; the first one may need several writes.
    let (mut last, mut times_grown) = (pack_bytes(), 0);
    until("snapshots that nobody reads", || {
        let now = pack_bytes();
        times_grown += u32::from(now > last);
        last = now;
        times_grown > 60
    });
    fs::write(vault.path("go"), "").unwrap();
    running.join().unwrap();
    assert_reached_its_end(&vault);
    assert!(Store::open(vault.store()).unwrap().snapshots().len() > 2);
}

#[test]
fn a_watch_without_any_snapshot_does_not_succeed() {
    let vault = Vault::new();
    let done = vault.run(&["watch", "--", "true"]);
    assert_eq!(done.code, Some(6), "{}", done.stderr);
    assert!(done.stderr.contains("ended before the first snapshot"), "{}", done.stderr);
}

#[test]
fn what_is_wrong_from_the_beginning_is_told_before_the_command_is_started() {
    let vault = Vault::new();
    let begun = vault.path("begun");
    let touch = begun.to_str().unwrap();
    vault.fails(3, "snapshots of a process", &["watch", "--like", "nobody", "--", "touch", touch]);
    vault.fails(2, "slash", &["watch", "--process", "a/b", "--", "touch", touch]);
    vault.fails(6, "thread", &["capture", "--pid", &kernel_thread_or_own_thread()]);
    assert!(!begun.exists());
}

/// A pid that can never be captured: a kernel thread, or a thread of this program.
fn kernel_thread_or_own_thread() -> String {
    let own = std::process::id();
    let tid = fs::read_dir("/proc/self/task")
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap());
    tid.filter(|tid| *tid != own.to_string()).max().unwrap()
}

#[test]
fn two_watches_of_one_process_do_not_get_into_one_anothers_way() {
    let sleep = Running::sleep();
    let vaults = [Vault::new(), Vault::new()];
    let start = |vault: &Vault| {
        let watch = ["--quiet", "watch", "--every", "5ms", "--count", "30", "--stop-timeout", "60s", "--pid"];
        vault.start(&[&watch[..], &[&sleep.pid_text()]].concat())
    };
    for watch in vaults.each_ref().map(start) {
        let done = watch.wait();
        assert_eq!((done.code, done.text().lines().count()), (Some(0), 30), "{}", done.stderr);
    }
    assert_eq!(state(sleep.pid()), 'S');
}

#[test]
fn a_process_whose_first_thread_has_ended_is_watched_until_the_last_one_has() {
    let program = "import ctypes, threading, time\n\
        threading.Thread(target=lambda: (print('ready', flush=True), time.sleep(600))).start()\n\
        ctypes.CDLL(None).pthread_exit(None)";
    let vault = Vault::new();
    let mut python = Running::python(program);
    assert_eq!(python.line(), "ready");
    until("the first thread has ended", || state(python.pid()) == 'Z');
    let watch = ["--quiet", "watch", "--every", "20ms", "--count", "3", "--pid", &python.pid_text()];
    assert_eq!(vault.text(&watch).lines().count(), 3);
    let mut watch = vault.start(&["--quiet", "watch", "--every", "20ms", "--pid", &python.pid_text()]);
    watch.line();
    python.kill();
    assert_eq!(watch.wait().code, Some(0));
}

#[test]
fn an_interrupted_capture_that_waits_for_a_thread_ends_at_once_with_130() {
    let vault = Vault::new();
    let source = vault.file(
        "p.c",
        b"#include <signal.h>\n#include <sys/prctl.h>\n#include <unistd.h>\n\
          int main(void) { if (vfork() == 0) { prctl(PR_SET_PDEATHSIG, SIGKILL); for (;;) pause(); } return 0; }",
    );
    let binary = vault.path("p");
    if !Command::new("cc").arg("-o").arg(&binary).arg(&source).status().is_ok_and(|status| status.success()) {
        return passed_over("cc (Debian package gcc)");
    }
    let waiting = Running::start(Command::new(&binary));
    until("it waits in vfork", || state(waiting.pid()) == 'D');
    for signal in [Signal::INT, Signal::TERM] {
        let capture = vault.start(&["capture", "--stop-timeout", "100s", "--pid", &waiting.pid_text()]);
        capture.wait_until_it_handles(signal);
        std::thread::sleep(Duration::from_millis(200));
        let begun = Instant::now();
        capture.signal(signal);
        assert_eq!(capture.wait().code, Some(130));
        assert!(begun.elapsed() < Duration::from_secs(60));
    }
    let text = ["capture", "--stop-timeout", "50ms", "--pid", &waiting.pid_text()];
    vault.fails(6, "waits in vfork for process", &text);
}

#[test]
fn another_program_with_the_same_pid_gets_a_line_of_its_own() {
    let vault = Vault::new();
    let go = vault.path("go");
    let mut command = Command::new("sh");
    command.args(["-c", &format!("until [ -e {} ]; do sleep 0.02; done; exec sleep 600", go.display())]);
    let running = Running::start(command);
    let pid = running.pid_text();
    let capture = || vault.json(&["capture", "--pid", &pid])["process"].as_str().unwrap().to_owned();
    assert_eq!([capture(), capture()], [format!("pid:{pid}"), format!("pid:{pid}")]);
    fs::write(&go, "").unwrap();
    until("the other program", || {
        fs::read_to_string(format!("/proc/{pid}/comm")).unwrap().trim() == "sleep"
            && fs::read_link(format!("/proc/{pid}/exe")).unwrap().ends_with("sleep")
    });
    assert_eq!([capture(), capture()], [format!("pid:{pid}.2"), format!("pid:{pid}.2")]);
    let table = vault.text(&["watch", "--every", "10ms", "--count", "1", "--pid", &pid]);
    assert!(table.contains("1 snapshot"), "{table}");
    let named = vault.json(&["show", "latest"])["process"].clone();
    assert_eq!(named, format!("pid:{pid}.2"));
}

#[test]
fn a_limit_of_file_sizes_is_an_error_and_the_store_stays_whole() {
    let vault = Vault::new();
    let file = vault.file("image", &noise(4 << 20, 7));
    vault.text(&["init"]);
    let small = vault.file("small", &noise(100_000, 8));
    vault.capture_file(&small, "small");
    let limited = |arguments: &[&str]| {
        // The shell counts blocks of 512 or of 1024 bytes.
        let mut command = Command::new("sh");
        let script = "ulimit -f 1000; exec \"$0\" --store \"$@\"";
        command.args(["-c", script, env!("CARGO_BIN_EXE_stillframe"), vault.store().to_str().unwrap()]);
        command.args(arguments).output().unwrap()
    };
    let captured = limited(&["capture", "--file", &file, "--process", "large"]);
    assert_eq!(captured.status.code(), Some(1), "{captured:?}");
    assert!(String::from_utf8_lossy(&captured.stderr).contains("File too large"), "{captured:?}");
    assert!(vault.text(&["verify"]).contains("all in order"));
    assert_eq!(vault.json(&["list"]).as_array().unwrap().len(), 1);

    vault.capture_file(&file, "large");
    let out = vault.path("out");
    let restored = limited(&["restore", "large@latest", "--to", out.to_str().unwrap()]);
    assert!(matches!(restored.status.code(), Some(1 | 6)), "{restored:?}");
    let left: Vec<_> =
        fs::read_dir(out.parent().unwrap()).unwrap().map(|it| it.unwrap().file_name()).collect();
    assert!(left.iter().all(|name| !name.to_string_lossy().contains("out")), "{left:?}");
}

#[test]
fn a_process_of_ones_own_that_is_undumpable_gets_advice_that_helps() {
    if !rustix::process::geteuid().is_root() {
        return passed_over("root, to become another user");
    }
    let vault = Vault::new();
    let as_nobody = |program: &Path| {
        let mut command = Command::new("setpriv");
        command
            .args(["--reuid", "65534", "--regid", "65534", "--clear-groups", "--inh-caps=-all"])
            .arg(program);
        command
    };
    let source = vault.file(
        "p.c",
        b"#include <stdio.h>\n#include <sys/prctl.h>\n#include <unistd.h>\n\
          int main(void) { prctl(PR_SET_DUMPABLE, 0); puts(\"ready\"); fflush(stdout); for (;;) pause(); }",
    );
    let binary = vault.path("p");
    if !Command::new("cc").arg("-o").arg(&binary).arg(&source).status().is_ok_and(|status| status.success()) {
        return passed_over("cc (Debian package gcc)");
    }
    // Every user must be able to reach both files.
    let open = std::os::unix::fs::PermissionsExt::from_mode(0o777);
    fs::set_permissions(binary.parent().unwrap(), open).unwrap();
    let stillframe = Path::new(env!("CARGO_BIN_EXE_stillframe"));
    if !as_nobody(stillframe).arg("--version").output().is_ok_and(|output| output.status.success()) {
        return passed_over("setpriv (Debian package util-linux), and a binary that every user may run");
    }
    let mut running = Running::start(as_nobody(&binary));
    assert_eq!(running.line(), "ready");
    let store = vault.path("of-nobody");
    let captured = as_nobody(stillframe)
        .arg("--store")
        .arg(store)
        .args(["capture", "--pid", &running.pid_text()])
        .output()
        .unwrap();
    let text = String::from_utf8(captured.stderr).unwrap();
    assert_eq!(captured.status.code(), Some(6), "{text}");
    assert!(text.contains("has made itself undumpable") && !text.contains("as the user that"), "{text}");
}
