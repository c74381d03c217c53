//! A process with thousands of threads: to stop all of them may take longer than the limit for one
//! thread.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use stillframe::CaptureOptions;
use stillframe::source::LiveProcessSource;

use super::rollback::new_store;
use crate::needs::{needs, passed_over};

const THREADS: usize = 4000;

/// For each line of input it prints how many of its threads have counted to one and wait.
const PROGRAM: &str = r#"
    #include <pthread.h>
    #include <stdio.h>
    #include <stdlib.h>
    #include <unistd.h>
    static volatile long counted;
    static void *count(void *unused) {
        __sync_fetch_and_add(&counted, 1);
        for (;;) pause();
        return unused;
    }
    int main(int argc, char **argv) {
        long wanted = atol(argv[1]);
        pthread_attr_t attributes;
        pthread_t thread;
        pthread_attr_init(&attributes);
        pthread_attr_setstacksize(&attributes, 32768);
        for (long i = 0; i < wanted; i++)
            if (pthread_create(&thread, &attributes, count, 0)) { puts("too many"); return 1; }
        while (counted < wanted) usleep(1000);
        puts("ready"); fflush(stdout);
        for (;;) pause();
    }
"#;

fn start(dir: &Path) -> Option<Child> {
    let (source, binary) = (dir.join("program.c"), dir.join("program"));
    std::fs::write(&source, PROGRAM).unwrap();
    let mut cc = Command::new("cc");
    assert!(cc.args(["-O1", "-pthread", "-o"]).args([&binary, &source]).status().unwrap().success());
    let mut child = Command::new(&binary).arg(THREADS.to_string()).stdout(Stdio::piped()).spawn().unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
    if line.trim_end() == "ready" {
        return Some(child);
    }
    let _ = child.kill();
    child.wait().unwrap();
    passed_over(&format!("it needs {THREADS} threads (ulimit -u, pids.max, kernel.threads-max)"));
    None
}

#[test]
fn thousands_of_threads_are_captured_and_rolled_back_although_each_may_take_only_so_long() {
    if !needs(&["cc"]) {
        return;
    }
    let (dir, store) = new_store();
    let Some(mut child) = start(dir.path()) else { return };
    // All threads together take longer. The limit applies to each thread, however busy the machine
    // is.
    let timeout = Duration::from_millis(200);
    let source = LiveProcessSource::new(child.id()).stop_timeout(timeout);
    let captured = store.process("p").capture(&source, &CaptureOptions::default());
    let rolled_back = captured
        .and_then(|captured| store.rollback(captured.id)?.stop_timeout(timeout).live_process(child.id()));
    child.kill().unwrap();
    child.wait().unwrap();
    assert_eq!(rolled_back.unwrap().written_bytes, 0);
}
