//! The settler: a thread that brings the index up to date in the background.
//!
//! Captures do not wait for the index, unless it falls very far behind.

use std::sync::Arc;
use std::thread::JoinHandle;

use crossbeam_channel::Receiver;

use super::error::StoreError;
use super::open_store::{OpenStore, Task};
use super::packs::log::{Synced, Unsynced};
use super::tree::IndexEntry;

/// How many entries are inserted at a time; look-ups wait for that long.
const BATCH_ENTRIES: usize = 1024;

/// Starts the thread. It ends when the sender of its tasks is dropped.
pub(crate) fn start(shared: Arc<OpenStore>, tasks: Receiver<Task>) -> std::io::Result<JoinHandle<()>> {
    std::thread::Builder::new().name("stillframe-settle".to_owned()).spawn(move || {
        let mut failed = false;
        for task in tasks {
            match task {
                Task::Settle(synced) => {
                    let settled = settle(&shared, synced);
                    if let Err(error) =
                        settled.and_then(|()| if failed { Ok(()) } else { shared.index().save_if_much() })
                    {
                        // No data is lost: the packs hold all of it, and the open index does too.
                        // The next opening continues from the last saved watermark.
                        tracing::warn!("the index is not saved until the store is opened again: {error}");
                        failed = true;
                    }
                }
                Task::SyncEarly => {
                    if let Err(error) = shared.sync_early() {
                        tracing::warn!("{error}");
                    }
                }
                Task::Barrier(done) => {
                    // The waiting thread may have ended.
                    let _ = done.send(());
                }
            }
        }
        if let Err(error) = shared.index().close() {
            tracing::warn!("{error}");
        }
    })
}

fn settle(shared: &OpenStore, synced: Synced) -> Result<(), StoreError> {
    let index = shared.index();
    let mut objects: Vec<IndexEntry> = Vec::new();
    let mut snapshots = Vec::new();
    for entry in synced.entries {
        match entry {
            Unsynced::Object(tree, hash, location) => objects.push((tree, hash, location)),
            Unsynced::Fact(fact) => snapshots.push(fact.snapshot()),
        }
    }
    objects.sort_unstable_by_key(|(tree, hash, _)| (*tree, *hash));
    for batch in objects.chunks(BATCH_ENTRIES) {
        index.insert(batch);
        shared.log.settled(batch);
    }
    for id in snapshots {
        shared.store_catalog_entry(id);
    }
    for (pack, watermark) in synced.ends {
        index.set_watermark(pack, Some(watermark));
    }
    Ok(())
}
