//! A watermark: the byte up to which a pack is indexed, or durable.
//!
//! It identifies the pack by its id, and not only by its number: a number is used again after the
//! pack with the highest number is removed, and a statement about the old pack must not be applied
//! to the new one.
//!
//! ```text
//!  0         16       24
//!  +---------+--------+
//!  | pack id | bytes  |
//!  | 16 B    | u64    |
//!  +---------+--------+
//! ```

use crate::store::id::PackId;

/// The byte up to which a pack is indexed, or durable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Watermark {
    pub(crate) pack: PackId,
    pub(crate) end_bytes: u64,
}

impl Watermark {
    pub(crate) const BYTES: usize = 24;

    /// Its 24 bytes.
    pub(crate) fn to_bytes(self) -> [u8; Watermark::BYTES] {
        let mut bytes = [0; Watermark::BYTES];
        bytes[..16].copy_from_slice(&self.pack.0);
        bytes[16..].copy_from_slice(&self.end_bytes.to_le_bytes());
        bytes
    }

    /// The watermark that 24 bytes encode.
    pub(crate) fn from_bytes(bytes: &[u8; Watermark::BYTES]) -> Watermark {
        let (pack, end_bytes) = bytes.split_at(16);
        Watermark {
            pack: PackId(pack.try_into().unwrap_or_default()),
            end_bytes: u64::from_le_bytes(end_bytes.try_into().unwrap_or_default()),
        }
    }
}
