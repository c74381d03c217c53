//! The state of one thread of a capture.

use crate::store::OpenStore;
use crate::store::packs::batch::Batch;
use crate::store::read::{Check, Reader};

/// The buffers of one thread that processes pieces.
pub(super) struct Worker<'a> {
    pub(super) reader: Reader<'a>,
    /// The objects of a piece that the store lacks.
    pub(super) batch: Batch,
    /// The regions of a piece.
    pub(super) regions: Vec<u8>,
    /// The plain bytes of the base of a delta.
    pub(super) base: Vec<u8>,
}

impl<'a> Worker<'a> {
    pub(super) fn new(shared: &'a OpenStore) -> Worker<'a> {
        let (batch, regions, base) = Default::default();
        Worker { reader: Reader::new(shared, Check::Full), batch, regions, base }
    }
}
