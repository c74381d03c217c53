//! A batch: whole objects, encoded and ready to be appended to the log together.

use super::object::{self, ObjectKind};
use crate::codec::{self, Codec, Encoding};
use crate::delta::{self, Base};
use crate::hash::Hash;
use crate::store::tree::Tree;

/// Whole objects, encoded and ready to be appended together.
#[derive(Default)]
pub(crate) struct Batch {
    pub(super) bytes: Vec<u8>,
    pub(super) objects: Vec<BatchObject>,
    /// The delta being tried, and what it is compared with.
    payload: Vec<u8>,
    whole: Vec<u8>,
}

/// One of them.
pub(super) struct BatchObject {
    pub(super) tree: Tree,
    pub(super) header: object::Header,
    /// Where it begins in the batch.
    pub(super) start: usize,
}

impl Batch {
    /// Encodes one object at the end of the batch; as the difference from `base` if that is under
    /// half of what it would take whole.
    pub(crate) fn push(
        &mut self,
        kind: ObjectKind,
        codec: Codec,
        hash: Hash,
        plain: &[u8],
        base: Option<Base<'_>>,
    ) {
        let start = self.bytes.len();
        let delta = match base {
            Some(base) => self.try_delta(kind, codec, hash, plain, base),
            None => None,
        };
        let header = match delta {
            Some(header) => header,
            None => object::write(kind, codec, hash, plain, &mut self.bytes),
        };
        self.objects.push(BatchObject { tree: Tree::of(kind), header, start });
    }

    /// Appends the delta, if it is short enough, and nothing otherwise.
    fn try_delta(
        &mut self,
        kind: ObjectKind,
        codec: Codec,
        hash: Hash,
        plain: &[u8],
        base: Base<'_>,
    ) -> Option<object::Header> {
        self.payload.clear();
        if base.hash == hash || !delta::encode(base, plain, plain.len() / 2, &mut self.payload) {
            return None;
        }
        // What was there before took about as much whole. Only where that leaves it open it is tried.
        if self.payload.len() > base.whole_bytes as usize / 4 {
            self.whole.clear();
            codec::encode(codec, plain, &mut self.whole);
            if self.payload.len() >= self.whole.len() / 2 {
                return None;
            }
        }
        let (encoding, length) = (Encoding::Delta, plain.len());
        Some(object::write_encoded(kind, encoding, hash, length, &self.payload, &mut self.bytes))
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.objects.is_empty()
    }

    /// Empties it and keeps its memory.
    pub(crate) fn clear(&mut self) {
        self.bytes.clear();
        self.objects.clear();
    }
}
