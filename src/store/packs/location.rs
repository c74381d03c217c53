//! Where an object is: the 16-byte value of an index entry.
//!
//! ```text
//!  0                              4          8              12            16
//!  +------------------------------+----------+--------------+-------------+
//!  | pack number, encoding (4 bit)| offset/8 | stored bytes | plain bytes |   each a u32
//!  +------------------------------+----------+--------------+-------------+
//! ```

use super::object::{self, Header};
use crate::codec::Encoding;

/// The highest number that a pack can have.
pub(crate) const MAX_PACK: u32 = (1 << 28) - 1;

/// The place and the length of an object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Location {
    pub(crate) pack: u32,
    /// A multiple of 8 below 32 GiB.
    pub(crate) offset_bytes: u64,
    pub(crate) encoding: Encoding,
    pub(crate) stored_bytes: u32,
    pub(crate) plain_bytes: u32,
}

impl Location {
    pub(crate) const BYTES: usize = 16;

    /// The location of the object with this header.
    pub(crate) fn new(pack: u32, offset_bytes: u64, header: &Header) -> Location {
        Location {
            pack,
            offset_bytes,
            encoding: header.encoding,
            stored_bytes: header.stored_bytes,
            plain_bytes: header.plain_bytes,
        }
    }

    /// Header, payload and padding together.
    pub(crate) fn object_bytes(&self) -> u64 {
        object::object_bytes(self.stored_bytes) as u64
    }

    /// Where the object after it begins.
    pub(crate) fn end_bytes(&self) -> u64 {
        self.offset_bytes + self.object_bytes()
    }

    /// Its 16 bytes.
    pub(crate) fn to_bytes(self) -> [u8; Location::BYTES] {
        let pack = self.pack | (self.encoding as u32) << 28;
        let offset = u32::try_from(self.offset_bytes / 8).unwrap_or(u32::MAX);
        let mut bytes = [0; Location::BYTES];
        for (at, value) in [pack, offset, self.stored_bytes, self.plain_bytes].into_iter().enumerate() {
            bytes[4 * at..4 * at + 4].copy_from_slice(&value.to_le_bytes());
        }
        bytes
    }

    /// Whether the object is stored as a delta.
    pub(crate) fn is_delta(&self) -> bool {
        self.encoding == Encoding::Delta
    }

    /// Marks in the index an object that does not exist any more. No pack has the number 0.
    pub(crate) const GONE: [u8; Location::BYTES] = [0; Location::BYTES];

    /// The location that 16 bytes encode, if they encode one.
    pub(crate) fn from_bytes(bytes: &[u8]) -> Option<Location> {
        let ([pack, offset, stored, plain], []) = bytes.as_chunks::<4>() else { return None };
        let pack = u32::from_le_bytes(*pack);
        if pack & MAX_PACK == 0 {
            return None;
        }
        Some(Location {
            pack: pack & MAX_PACK,
            encoding: Encoding::from_byte((pack >> 28).to_le_bytes()[0])?,
            offset_bytes: u64::from(u32::from_le_bytes(*offset)) * 8,
            stored_bytes: u32::from_le_bytes(*stored),
            plain_bytes: u32::from_le_bytes(*plain),
        })
    }
}

/// A position in the order in which objects are appended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Position {
    pub(crate) pack: u32,
    pub(crate) offset_bytes: u64,
}

impl From<Location> for Position {
    fn from(location: Location) -> Position {
        Position { pack: location.pack, offset_bytes: location.offset_bytes }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_location_reads_back_from_its_bytes() {
        let location = Location {
            pack: MAX_PACK,
            offset_bytes: 8 * 0xFFFF_FFFE,
            encoding: Encoding::Lz4,
            stored_bytes: 5,
            plain_bytes: 4096,
        };
        assert_eq!(Location::from_bytes(&location.to_bytes()), Some(location));
        assert_eq!(Location::from_bytes(&Location::GONE), None);
        assert_eq!(Location::from_bytes(&[0xFF; 16]), None);
        assert_eq!(Location::from_bytes(&[0; 15]), None);
    }
}
