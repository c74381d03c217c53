#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::cast_precision_loss)]
mod arena;
mod python;
mod state;
mod wasm;
mod workload;
use std::io::Write;

fn main() {
    for (name, _) in workload::NAMES {
        let mut workload = workload::start(name);
        let mut tape = state::Tape::default();
        let dir = std::path::Path::new("/tmp/states").join(name);
        std::fs::create_dir_all(&dir).unwrap();
        for at in 0..5 {
            if at > 0 { workload.step(); }
            let state = workload.state();
            let mut file = std::fs::File::create(dir.join(format!("{at:02}.raw"))).unwrap();
            for piece in state.pieces() { file.write_all(piece).unwrap(); }
            tape.record(state);
        }
        let mut state = tape.first().clone();
        for change in tape.changes() { state.apply(change); }
        assert!(state == *tape.last());
        println!("{name} {}", state.length_bytes());
    }
}
