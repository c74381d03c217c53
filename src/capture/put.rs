//! Put: stores an object, unless the store has it.

use super::reference::Reference;
use crate::codec::{self, Codec};
use crate::delta::Base;
use crate::hash::Hash;
use crate::region;
use crate::root::Root;
use crate::store::OpenStore;
use crate::store::commit::check_length;
use crate::store::error::StoreError;
use crate::store::gate::CaptureGuard;
use crate::store::packs::batch::Batch;
use crate::store::packs::object::ObjectKind;
use crate::store::read::Reader;
use crate::store::tree::Tree;

/// How new objects are stored.
#[derive(Clone, Copy)]
pub(crate) struct StoreAs {
    pub(crate) codec: Codec,
    /// Whether an object may be stored as the difference from the reference's object in its place,
    /// where that is short.
    pub(crate) deltas: bool,
}

/// The store, the pins and the encoding for the objects of one capture.
#[derive(Clone, Copy)]
pub(crate) struct Put<'a> {
    pub(crate) shared: &'a OpenStore,
    pub(crate) guard: &'a CaptureGuard,
    pub(crate) store_as: StoreAs,
}

impl Put<'_> {
    /// Appends an object unless the store has it. It may be stored as the difference from the
    /// object `like`. Returns how many bytes were added.
    pub(crate) fn object(
        &self,
        reader: &mut Reader<'_>,
        kind: ObjectKind,
        hash: Hash,
        bytes: &[u8],
        like: Option<Hash>,
    ) -> Result<u64, StoreError> {
        check_length(kind, bytes.len())?;
        if self.known(reader, Tree::of(kind), &[hash])?[0] {
            return Ok(0);
        }
        let like = like.filter(|_| self.store_as.deltas && !self.shared.damage_known());
        let mut plain = Vec::new();
        let base = base(reader, kind, &like.unwrap_or(Hash::ZERO), &mut plain)?;
        let mut batch = Batch::default();
        batch.push(kind, self.store_as.codec, hash, bytes, base);
        Ok(self.shared.append(&mut batch)?.bytes)
    }

    /// Appends a root unless the store has it. Returns its hash and how many bytes were added.
    ///
    /// A root that equals the reference's is not encoded. The root of a sparse process has tens of
    /// megabytes, nearly all zeros. LZ4 needs one byte for each 255 of these, Zstandard almost
    /// none.
    pub(crate) fn root(
        &self,
        reader: &mut Reader<'_>,
        root: &Root,
        reference: Option<&Reference>,
    ) -> Result<(Hash, u64), StoreError> {
        if root.is_zero() {
            return Ok((Hash::ZERO, 0));
        }
        let like = reference.and_then(Reference::root);
        let same = like.filter(|_| reference.and_then(Reference::content).is_some_and(|it| it.1 == root));
        if let Some(hash) = same
            && self.known(reader, Tree::of(ObjectKind::Root), &[hash])?[0]
        {
            return Ok((hash, 0));
        }
        let bytes = root.encode();
        let hash = Hash::of(&bytes);
        let codec = codec_for(self.store_as.codec, &bytes);
        let put = Put { store_as: StoreAs { codec, ..self.store_as }, ..*self };
        Ok((hash, put.object(reader, ObjectKind::Root, hash, &bytes, like)?))
    }

    /// Pins the hashes and returns which of them the store has.
    pub(crate) fn known(
        &self,
        reader: &mut Reader<'_>,
        tree: Tree,
        hashes: &[Hash],
    ) -> Result<Vec<bool>, StoreError> {
        let shared = self.shared;
        self.guard.pin_and(hashes, |condemned| {
            let is_known = |hash: &Hash| {
                let Some(location) = shared.locate(tree, hash)? else { return Ok(false) };
                if condemned.is_some_and(|condemned| condemned.contains(tree, hash, location)) {
                    return Ok(false);
                }
                // The base of a delta is in the store too, unless there is damage.
                if location.is_delta() && shared.damage_known() {
                    return reader.is_resolvable(tree, hash);
                }
                Ok(true)
            };
            hashes.iter().map(is_known).collect()
        })
    }
}

/// The codec for an object: the wanted one, unless the object is large and mostly zeros.
pub(crate) fn codec_for(wanted: Codec, plain: &[u8]) -> Codec {
    const PAGE_BYTES: usize = 4096;
    let is_sparse = || {
        let pages = plain.chunks(PAGE_BYTES);
        4 * pages.filter(|page| !region::is_zero(page)).count() < plain.len() / PAGE_BYTES
    };
    if plain.len() >= codec::LARGE_BYTES && is_sparse() { Codec::Zstd } else { wanted }
}

/// The object that a replacement of `like` may be stored as a difference from, if it can be read.
/// Its bytes are written to `plain`.
pub(crate) fn base<'p>(
    reader: &mut Reader<'_>,
    kind: ObjectKind,
    like: &Hash,
    plain: &'p mut Vec<u8>,
) -> Result<Option<Base<'p>>, StoreError> {
    if like.is_zero() {
        return Ok(None);
    }
    match reader.base(kind, like, plain) {
        Ok(found) => Ok(found.map(|(hash, number, whole_bytes)| Base { hash, plain, whole_bytes, number })),
        Err(error) if error.is_damage() => {
            tracing::warn!("{}", error.whole_story());
            Ok(None)
        }
        Err(error) => Err(error),
    }
}
