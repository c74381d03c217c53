//! Ten instances of one program: the cost of each further one.

use std::path::Path;

use crate::contender::{Moment, size_of};
use crate::measure::Size;
use crate::python::Randomisation;
use crate::report::{count, row};
use crate::workload::{self, Workload};

const INSTANCES: usize = 10;

pub fn instances(dir: &Path, with_peers: bool) {
    for (randomisation, how) in [(Randomisation::Off, "off"), (Randomisation::On, "on")] {
        let dir = dir.join(how);
        std::fs::create_dir_all(&dir).unwrap();
        let mut contenders = crate::contenders(&dir, with_peers);
        let mut sizes: Vec<Vec<Size>> = vec![Vec::new(); contenders.len()];
        for at in 0..INSTANCES {
            let instance = workload::python(randomisation);
            let (state, source) = (instance.state(), instance.source());
            let process = format!("instance-{at}");
            for (contender, sizes) in contenders.iter_mut().zip(&mut sizes) {
                let moment = Moment { process: &process, state: &state, source: &*source };
                contender.prepare(moment);
                contender.snapshot(moment);
                contender.close();
                sizes.push(size_of(&**contender));
            }
        }
        println!("## {INSTANCES} instances of CPython, address randomisation {how}: bytes on the disk\n");
        row(&["", "the first", "the second", "each further one, mean", "÷ the first"]);
        println!("|---|---:|---:|---:|---:|");
        for (contender, sizes) in contenders.iter().zip(sizes) {
            let first = sizes[0].disk_bytes as f64;
            let further = sizes[INSTANCES - 1].growth_per(sizes[0], INSTANCES - 1).disk_bytes;
            let second = sizes[1].growth_per(sizes[0], 1).disk_bytes;
            let ratio = format!("{:.4}", further / first);
            row(&[&contender.name(), &count(first), &count(second), &count(further), &ratio]);
        }
        println!();
    }
}
