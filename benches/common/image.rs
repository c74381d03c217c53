//! The memory that the speed benches use: that of a real process, and a store for it.

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::sync::OnceLock;

use stillframe::source::LiveProcessSource;
use stillframe::{CaptureOptions, Store};

/// The file named by `STILLFRAME_IMAGE`, or the memory of a CPython process.
pub(crate) fn image() -> &'static [u8] {
    static IMAGE: OnceLock<Vec<u8>> = OnceLock::new();
    IMAGE.get_or_init(|| match std::env::var_os("STILLFRAME_IMAGE") {
        Some(path) => std::fs::read(path).expect("STILLFRAME_IMAGE can be read"),
        None => python_heap(),
    })
}

/// The memory of a CPython process with a few hundred thousand objects.
fn python_heap() -> Vec<u8> {
    let program = "import sys, json
data = [{'id': i, 'name': f'user {i}', 'tags': [str(i % 97), 'x' * (i % 40)], 'score': i / 7} for i in range(260000)]
text = json.dumps(data[:50000])
print('ready', flush=True)
sys.stdin.read()";
    let mut child = Command::new("python3")
        .args(["-c", program])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("python3 is installed");
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
    let (_dir, store) = new_store();
    let captured =
        store.process("python").capture(&LiveProcessSource::new(child.id()), &CaptureOptions::default());
    child.kill().unwrap();
    child.wait().unwrap();
    store.restore(captured.unwrap().id).unwrap().into_mapping().unwrap().to_vec()
}

pub(crate) fn new_store() -> (tempfile::TempDir, Store) {
    let dir = tempfile::tempdir_in(
        std::env::var_os("STILLFRAME_BENCH_DIR").unwrap_or_else(|| env!("CARGO_TARGET_TMPDIR").into()),
    );
    let dir = dir.expect("the bench directory can be written");
    let store = Store::options().create(dir.path().join("store")).unwrap();
    (dir, store)
}
