//! A region: one cell of a mapping, the unit of deduplication.
//!
//! Regions are counted from the start of their mapping, not from address zero, so that a library
//! loaded at another address is still the same regions.

/// Whether all bytes are zero. Cost: stops at the first 64 bytes that are not.
pub(crate) fn is_zero(plain: &[u8]) -> bool {
    let (blocks, rest) = plain.as_chunks::<64>();
    let or = |bytes: &[u8]| bytes.iter().fold(0, |seen, byte| seen | byte);
    blocks.iter().all(|block| or(block) == 0) && or(rest) == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_single_set_bit_anywhere_is_seen() {
        for length in [0, 1, 63, 64, 65, 512, 777] {
            let mut plain = vec![0; length];
            assert!(is_zero(&plain));
            for at in 0..length {
                plain[at] = 0x80;
                assert!(!is_zero(&plain), "{at} of {length}");
                plain[at] = 0;
            }
        }
    }
}
