//! The speed of captures and restores, compared with the limits of this machine.
//!
//! `cargo bench -p throughput`. The memory is that of real processes: a file named by
//! `STILLFRAME_IMAGE` (`benches/peers/image.py` makes one), or 256 MiB of the heap of a CPython
//! process with a large data structure, captured with stillframe.
//!
//! The limit of a capture is hashing and compressing every region on all cores, and nothing else.
//! The limit of a restore is decoding every region from memory into populated pages. The difference
//! is the cost of the store: look-ups, appending, fsync, index.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used)]

use divan::counter::BytesCount;
use divan::{Bencher, black_box};
use rayon::prelude::*;
use stillframe::store::Check;
use stillframe::{CaptureOptions, SnapshotId, Store};

#[path = "../../common/image.rs"]
mod image;

use image::{image, new_store};

const REGION_BYTES: usize = 16 * 1024;

fn main() {
    let bytes = image().len();
    println!("memory image: {} MiB, region size {REGION_BYTES}", bytes >> 20);
    divan::main();
}

fn capture(store: &Store) -> SnapshotId {
    store.process("p").capture(image(), &CaptureOptions::default()).unwrap().id
}

fn is_zero(region: &[u8]) -> bool {
    region.iter().all(|byte| *byte == 0)
}

#[divan::bench(sample_count = 5, sample_size = 1)]
fn limit_of_capture(bencher: Bencher<'_, '_>) {
    bencher.counter(BytesCount::new(image().len())).bench_local(|| {
        image()
            .par_chunks(REGION_BYTES)
            .filter(|region| !is_zero(region))
            .map_init(
                || vec![0; lz4_flex::block::get_maximum_output_size(REGION_BYTES)],
                |out, region| {
                    black_box(blake3::hash(region));
                    lz4_flex::block::compress_into(region, out).unwrap()
                },
            )
            .sum::<usize>()
    });
}

#[divan::bench(sample_count = 5, sample_size = 1)]
fn first_capture(bencher: Bencher<'_, '_>) {
    bencher
        .counter(BytesCount::new(image().len()))
        .with_inputs(new_store)
        .bench_local_refs(|(_, store)| capture(store));
}

#[divan::bench(sample_count = 5, sample_size = 1)]
fn first_capture_and_close(bencher: Bencher<'_, '_>) {
    bencher.counter(BytesCount::new(image().len())).with_inputs(new_store).bench_local_values(
        |(dir, store)| {
            capture(&store);
            drop(store);
            dir
        },
    );
}

#[divan::bench(sample_count = 10, sample_size = 1)]
fn limit_of_unchanged_capture(bencher: Bencher<'_, '_>) {
    bencher.counter(BytesCount::new(image().len())).bench_local(|| {
        image().par_chunks(REGION_BYTES).for_each(|region| {
            if !is_zero(region) {
                black_box(blake3::hash(region));
            }
        });
    });
}

#[divan::bench(sample_count = 10, sample_size = 1)]
fn unchanged_capture(bencher: Bencher<'_, '_>) {
    let (_dir, store) = new_store();
    capture(&store);
    bencher.counter(BytesCount::new(image().len())).bench_local(|| capture(&store));
}

#[divan::bench(sample_count = 10, sample_size = 1)]
fn limit_of_restore(bencher: Bencher<'_, '_>) {
    let blocks: Vec<Vec<u8>> = image().par_chunks(REGION_BYTES).map(lz4_flex::block::compress).collect();
    let mut target = vec![1u8; image().len()];
    bencher.counter(BytesCount::new(image().len())).bench_local(|| {
        target.par_chunks_mut(REGION_BYTES).zip(&blocks).for_each(|(region, block)| {
            lz4_flex::block::decompress_into(block, region).unwrap();
        });
    });
}

#[divan::bench(sample_count = 10, sample_size = 1, args = [Check::Full, Check::Checksum])]
fn restore_into_mapping(bencher: Bencher<'_, '_>, check: Check) {
    let (_dir, store) = new_store();
    let id = capture(&store);
    bencher
        .counter(BytesCount::new(image().len()))
        .bench_local(|| store.restore(id).unwrap().check(check).into_mapping().unwrap());
}

#[divan::bench(sample_count = 5, sample_size = 1)]
fn restore_into_file(bencher: Bencher<'_, '_>) {
    let (dir, store) = new_store();
    let id = capture(&store);
    let path = dir.path().join("image");
    bencher
        .counter(BytesCount::new(image().len()))
        .bench_local(|| store.restore(id).unwrap().overwrite(true).into_file(&path).unwrap());
}
