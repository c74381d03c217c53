//! The region hash: the full 32-byte BLAKE3 of plain bytes, by which every object is addressed.

use std::fmt;

use serde::{Deserialize, Serialize};

/// The full BLAKE3 hash of some plain bytes.
///
/// The all-zero value is never the hash of stored bytes; it stands for a region (or a table) of
/// zeros, which is recorded and not stored.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Hash(pub [u8; 32]);

impl Hash {
    /// Stands for zeros of whatever length.
    pub const ZERO: Hash = Hash([0; 32]);
    /// How long a hash is, in bytes.
    pub const BYTES: usize = 32;

    /// The hash of `plain`. Cost: about 2.4 GB/s a core for 4 KiB, 4.5 GB/s for 16 KiB and more.
    pub fn of(plain: &[u8]) -> Hash {
        Hash(*blake3::hash(plain).as_bytes())
    }

    /// Whether this stands for zeros.
    pub fn is_zero(&self) -> bool {
        *self == Hash::ZERO
    }

    /// The first 64 bits, big-endian, so that prefixes sort as hashes do.
    pub(crate) fn prefix(&self) -> u64 {
        let [a, b, c, d, e, f, g, h, ..] = self.0;
        u64::from_be_bytes([a, b, c, d, e, f, g, h])
    }
}

impl fmt::Display for Hash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for byte in self.0 {
            write!(f, "{byte:02x}")?;
        }
        Ok(())
    }
}

impl fmt::Debug for Hash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}
