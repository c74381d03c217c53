//! A gc on a full disk: it needs room to copy before it can give room back.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use crate::store::OpenStore;
use crate::store::error::StoreError;
use crate::store::packs::header::PackHeader;
use crate::store::packs::pack::Pack;
use crate::sys::file;

/// A gc on a disk that is full: what it does about it, and what it had to leave.
pub(super) struct FullDisk<'a> {
    pub(super) live_bytes: &'a BTreeMap<u32, u64>,
    /// Whether the index was asked for its room.
    pub(super) room_made: bool,
    /// Packs of which what is needed could not be copied.
    pub(super) left: Vec<Arc<Pack>>,
    pub(super) why: Option<StoreError>,
}

impl FullDisk<'_> {
    /// There was no room to copy what is needed of these. The index gives its room, once: it can be built anew.
    /// Then they are tried one by one, those with the least to copy first, as each gives room for the next. One that is
    /// alone is left.
    pub(super) fn out_of_room(
        &mut self,
        shared: &OpenStore,
        packs: Vec<Arc<Pack>>,
        error: StoreError,
        waiting: &mut VecDeque<Vec<Arc<Pack>>>,
    ) -> Result<(), StoreError> {
        // Of what could not be finished nothing may stay before anything else is replaced.
        shared.log.clear_away(Vec::new())?;
        // Where there is damage the index may have what the packs have lost.
        if !std::mem::replace(&mut self.room_made, true)
            && !shared.damage_known()
            && shared.index().make_room()?
        {
            waiting.push_front(packs);
        } else if packs.len() > 1 {
            packs.into_iter().rev().for_each(|pack| waiting.push_front(vec![pack]));
        } else {
            self.left.extend(packs);
            self.why.get_or_insert(error);
        }
        Ok(())
    }

    /// An error if nothing could be freed, and a warning if not all.
    pub(super) fn end(
        self,
        shared: &OpenStore,
        freed_bytes: u64,
        is_erasing: bool,
    ) -> Result<(), StoreError> {
        let Some(StoreError::DiskFull { path, source, .. }) = self.why else { return Ok(()) };
        let live_bytes = |pack: &Arc<Pack>| self.live_bytes.get(&pack.number).copied().unwrap_or(0);
        if freed_bytes > 0 && !is_erasing {
            let unused_bytes: u64 = self
                .left
                .iter()
                .map(|pack| (pack.length_bytes() - pack.header_bytes()).saturating_sub(live_bytes(pack)))
                .sum();
            tracing::warn!(
                "the disk is too full to copy what is still needed of {} packs, in which {unused_bytes} bytes are \
                 unused; what was freed so far stays free, run gc again",
                self.left.len()
            );
            return Ok(());
        }
        let least_bytes = self.left.iter().map(live_bytes).min().unwrap_or(0);
        let room_bytes = file::room_bytes(shared.log.dir()).unwrap_or(0);
        let needed_bytes =
            (PackHeader::bytes_for(1) + least_bytes).next_multiple_of(BLOCK_BYTES) + BLOCK_BYTES;
        // However little it is, it was not enough.
        let missing_bytes = needed_bytes.saturating_sub(room_bytes).max(BLOCK_BYTES);
        Err(StoreError::DiskFull { path, missing_bytes: Some(missing_bytes), source })
    }
}

/// What file systems give room by. A file may need one besides its bytes.
const BLOCK_BYTES: u64 = 4096;
