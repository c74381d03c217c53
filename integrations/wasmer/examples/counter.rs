//! A guest that counts, and keeps a table of 8 MiB. Each run goes on where the last one ended, or
//! from any snapshot that is named.
//!
//! ```text
//! cargo run -p stillframe-wasmer --example counter -- target/counter-vault              # again and again
//! cargo run -p stillframe-wasmer --example counter -- target/counter-vault counter~4    # from four before the latest
//! ```

mod host;

use std::sync::Arc;

use anyhow::{Context, Result};
use host::{Guest, Life};
use stillframe::Store;
use stillframe_wasmer::{Resume, StoreJournal};

fn main() -> Result<()> {
    let mut args = std::env::args().skip(1);
    let path = args.next().context("usage: counter STORE [SNAPSHOT]")?;
    let guest = Guest::build("counter")?;

    let store = Arc::new(Store::options().open_or_create(&path)?);
    let resume = match args.next() {
        Some(name) => Resume::At(store.find(&name)?),
        None => Resume::Latest,
    };
    let journal = Arc::new(StoreJournal::open(&store, "counter", resume)?);

    let resumed = journal.tip();
    let mut life = Life::start(&guest, journal.clone(), &[])?;
    if let Some(id) = resumed {
        println!("resumed  {:.12}  the guest says: {}", id.to_string(), life.line()?);
    }
    for _ in 0..3 {
        let said = life.snapshot("step")?;
        let id = journal.tip().context("a step takes a snapshot")?;
        let parent = store.snapshot(id)?.record().parent;
        let parent = parent.map_or("nothing".to_owned(), |parent| format!("{:.12}", parent.to_string()));
        println!("snapshot {:.12}  after {parent:12}  the guest says: {said}", id.to_string());
    }
    life.end()?;

    let stats = store.stats()?;
    println!("{} snapshots in {} bytes", store.process("counter").snapshots().len(), stats.disk_bytes);
    Ok(())
}
