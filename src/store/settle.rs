//! The settler: a thread that brings the index up to date behind everybody's back.
//!
//! Nobody who captures waits for the index, unless it falls very far behind.

use std::path::Path;
use std::sync::Arc;
use std::thread::JoinHandle;

use crossbeam_channel::{Receiver, Sender};

use super::Shared;
use super::error::StoreError;
use super::index::{Index, Tree};
use super::location::Location;
use super::log::{Durable, Unsynced};
use super::open::{INDEX_DIR, UNFINISHED};
use crate::hash::Hash;
use crate::sys::file;

/// So many entries are inserted before look-ups turn to the index for them.
const RUN_ENTRIES: usize = 16 * 1024;

/// What the settler is asked to do, in order.
pub(crate) enum Task {
    /// Put into the index what became durable.
    Settle(Durable),
    /// Make durable what was appended meanwhile.
    SyncEarly,
    /// Write the index into a fresh database if it has bloated. Done here, where nobody else
    /// changes it.
    RewriteIndex(Sender<()>),
    /// Say when everything before this is done.
    Barrier(Sender<()>),
}

/// Starts the thread. It ends when the sender of its tasks is gone.
pub(crate) fn start(shared: Arc<Shared>, tasks: Receiver<Task>) -> std::io::Result<JoinHandle<()>> {
    std::thread::Builder::new().name("stillframe-settle".to_owned()).spawn(move || {
        let mut failed = false;
        for task in tasks {
            match task {
                Task::Settle(durable) if !failed => {
                    if let Err(error) = settle(&shared, durable) {
                        // Nothing is lost: the packs have it all, and what is not settled stays
                        // pending. The next open goes on from the last watermark.
                        tracing::warn!("the index is left behind until the store is opened again: {error}");
                        failed = true;
                    }
                }
                Task::Settle(_) => {}
                Task::SyncEarly => {
                    if let Err(error) = shared.sync_early() {
                        tracing::warn!("{error}");
                    }
                }
                Task::RewriteIndex(done) => {
                    if let Err(error) = rewrite(&shared) {
                        tracing::warn!("the index could not be rewritten: {error}");
                    }
                    let _ = done.send(());
                }
                Task::Barrier(done) => {
                    // Whoever waits may have gone.
                    let _ = done.send(());
                }
            }
        }
    })
}

fn settle(shared: &Shared, durable: Durable) -> Result<(), StoreError> {
    let index = shared.index()?;
    let mut objects: Vec<(Tree, Hash, Location)> = Vec::new();
    let mut snapshots = Vec::new();
    for entry in durable.entries {
        match entry {
            Unsynced::Object(tree, hash, location) => objects.push((tree, hash, location)),
            Unsynced::Fact(fact) => snapshots.push(fact.snapshot()),
        }
    }
    objects.sort_unstable_by_key(|(tree, hash, _)| (*tree, *hash));
    for run in objects.chunks(RUN_ENTRIES) {
        for (tree, hash, location) in run {
            index.insert(*tree, hash, *location)?;
        }
        shared.log.settled(run);
    }
    for id in snapshots {
        shared.store_catalog_entry(&index, id)?;
    }
    index.flush()?;
    for end in durable.ends {
        index.set_watermark(end.pack, Some(end.offset_bytes))?;
    }
    Ok(())
}

fn rewrite(shared: &Shared) -> Result<(), StoreError> {
    if !shared.index()?.is_bloated() {
        return Ok(());
    }
    let (path, new) = (shared.path.join(INDEX_DIR), shared.path.join(INDEX_DIR).with_extension(UNFINISHED));
    remove(&new)?;
    let fresh = Index::open(&new, shared.format.id)?;
    shared.index()?.copy_to(&fresh)?;
    drop(fresh);
    shared.replace_index(|old| {
        drop(old);
        // Should this end half-way there is no index, and the next open builds it from the packs.
        remove(&path)?;
        std::fs::rename(&new, &path).map_err(StoreError::io("give its name to", &path))?;
        Index::open(&path, shared.format.id)
    })?;
    // Still there only if the old index was in use for too long.
    remove(&new)
}

fn remove(dir: &Path) -> Result<(), StoreError> {
    file::remove_dir(dir).map_err(StoreError::io("remove", dir))
}
