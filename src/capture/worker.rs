//! What one thread of a capture keeps to itself.

use crate::store::Shared;
use crate::store::packs::batch::Batch;
use crate::store::packs::read::{Check, Reader};

/// The buffers of one thread that works on pieces.
pub(super) struct Worker<'a> {
    pub(super) reader: Reader<'a>,
    /// What the store lacks of a piece.
    pub(super) batch: Batch,
    /// The regions of a piece.
    pub(super) regions: Vec<u8>,
    /// The plain bytes of the object that another one is stored as the difference from.
    pub(super) base: Vec<u8>,
}

impl<'a> Worker<'a> {
    pub(super) fn new(shared: &'a Shared) -> Worker<'a> {
        let (batch, regions, base) = Default::default();
        Worker { reader: Reader::new(shared, Check::Full), batch, regions, base }
    }
}
