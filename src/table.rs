//! A table: the hashes of up to 512 consecutive regions of one mapping, itself stored by hash.
//!
//! ```text
//!  0        32        64                       32 × n
//!  +---------+---------+--- … ---+---------+
//!  | region 0| region 1|         | region n-1    n = 512, fewer at the end of a mapping
//!  +---------+---------+--- … ---+---------+
//! ```
//!
//! A region of zeros has the all-zero hash, and a table of nothing but zeros is itself named by the
//! all-zero hash and not stored. Two tables with the same hash are 512 equal regions, which is how
//! comparing snapshots, marking and restoring skip what they need not read.
//!
//! The *root* of a snapshot has the same form: the hashes of its tables, in layout order.

use crate::hash::Hash;

/// How many regions one table covers. A power of two: at 16 KiB a table stands for 8 MiB.
pub const REGIONS_PER_TABLE: usize = 512;

/// The bytes of a list of hashes, as tables and roots are stored.
pub(crate) fn encode(hashes: &[Hash]) -> Vec<u8> {
    hashes.iter().flat_map(|hash| hash.0).collect()
}

/// The hashes in a stored list, or `None` if its length is not that of `expected` hashes.
pub(crate) fn decode(bytes: &[u8], expected: usize) -> Option<Vec<Hash>> {
    let (hashes, rest) = bytes.as_chunks::<{ Hash::BYTES }>();
    (rest.is_empty() && hashes.len() == expected).then(|| hashes.iter().copied().map(Hash).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hashes_come_back_and_a_wrong_length_does_not() {
        let hashes: Vec<Hash> = (0..5u8).map(|byte| Hash::of(&[byte])).collect();
        let bytes = encode(&hashes);
        assert_eq!(decode(&bytes, 5), Some(hashes));
        assert_eq!(decode(&bytes, 4), None);
        assert_eq!(decode(&bytes[1..], 5), None);
    }
}
