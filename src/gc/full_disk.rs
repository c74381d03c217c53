//! gc on a full disk: it needs space for copies before it can free any.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use crate::store::OpenStore;
use crate::store::error::StoreError;
use crate::store::packs::header::PackHeader;
use crate::store::packs::pack::Pack;
use crate::sys::file;

/// The state of a gc on a full disk: what it did to free space, and the packs that it could not
/// replace.
pub(super) struct FullDisk<'a> {
    pub(super) live_bytes: &'a BTreeMap<u32, u64>,
    /// Whether deleting the index to free space was tried.
    pub(super) room_made: bool,
    /// Packs whose live objects could not be copied.
    pub(super) left: Vec<Arc<Pack>>,
    pub(super) why: Option<StoreError>,
}

impl FullDisk<'_> {
    /// Handles packs for which there was no space to copy what is needed. The index is deleted once
    /// to free space, because it can be rebuilt. Then the packs are tried one at a time, those with
    /// the least to copy first, because each frees space for the next. A single pack that fails is
    /// left.
    pub(super) fn out_of_room(
        &mut self,
        shared: &OpenStore,
        packs: Vec<Arc<Pack>>,
        error: StoreError,
        waiting: &mut VecDeque<Vec<Arc<Pack>>>,
    ) -> Result<(), StoreError> {
        // Before anything else is replaced, the remains of the failed attempt must be removed.
        shared.log.clear_away(Vec::new())?;
        // If there is damage, the index may have what the packs have lost.
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

    /// Returns an error if nothing could be freed, and logs a warning if not everything could.
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
        // However small the need is, the free space was not enough.
        let missing_bytes = needed_bytes.saturating_sub(room_bytes).max(BLOCK_BYTES);
        Err(StoreError::DiskFull { path, missing_bytes: Some(missing_bytes), source })
    }
}

/// The unit in which file systems allocate space. A file may need one besides those for its bytes.
const BLOCK_BYTES: u64 = 4096;
