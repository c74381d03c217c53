//! The region hash: the full 32-byte
//! [BLAKE3](https://github.com/BLAKE3-team/BLAKE3-specs/blob/master/blake3.pdf) hash of the plain
//! bytes. It is the address of every object.

use std::fmt;
use std::str::FromStr;

use blake3::IncrementCounter;
use blake3::platform::Platform;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::units::UnitError;

/// The full BLAKE3 hash of some plain bytes.
///
/// The all-zero value is never the hash of stored bytes. It stands for a region (or a table) of
/// zeros, which is recorded but not stored.
///
/// As text, also in formats that people read, such as JSON, it is 64 hex digits:
///
/// ```
/// use stillframe::Hash;
/// let hash = Hash::of(b"memory");
/// assert_eq!(hash.to_string().parse::<Hash>()?, hash);
/// # Ok::<(), stillframe::units::UnitError>(())
/// ```
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Hash(pub [u8; 32]);

impl Hash {
    /// Stands for zeros of any length.
    pub const ZERO: Hash = Hash([0; 32]);
    /// The size of a hash, in bytes.
    pub const BYTES: usize = 32;

    /// The hash of `plain`. Cost: about 2.4 GB/s a core for 4 KiB, 4.5 GB/s for 16 KiB and more
    /// (AMD EPYC, 2 cores).
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

impl FromStr for Hash {
    type Err = UnitError;

    fn from_str(text: &str) -> Result<Hash, UnitError> {
        let unreadable = || UnitError::UnreadableHash { text: text.chars().take(SHOWN_LETTERS).collect() };
        let (pairs, rest) = text.as_bytes().as_chunks::<2>();
        if pairs.len() != Hash::BYTES || !rest.is_empty() {
            return Err(unreadable());
        }
        let digit = |letter: u8| char::from(letter).to_digit(16).and_then(|digit| u8::try_from(digit).ok());
        let mut hash = Hash::ZERO;
        for (byte, [high, low]) in hash.0.iter_mut().zip(pairs) {
            let (Some(high), Some(low)) = (digit(*high), digit(*low)) else { return Err(unreadable()) };
            *byte = high << 4 | low;
        }
        Ok(hash)
    }
}

impl Serialize for Hash {
    /// As text in formats that people read. On disk it is 32 bytes.
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        if to.is_human_readable() { to.collect_str(self) } else { self.0.serialize(to) }
    }
}

impl<'de> Deserialize<'de> for Hash {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Hash, D::Error> {
        if from.is_human_readable() {
            String::deserialize(from)?.parse().map_err(serde::de::Error::custom)
        } else {
            Ok(Hash(<[u8; Hash::BYTES]>::deserialize(from)?))
        }
    }
}

/// An error shows so much of a text that is no hash.
const SHOWN_LETTERS: usize = 80;

/// The size of a BLAKE3 chunk: the leaves of its tree.
const CHUNK_BYTES: usize = 1024;
/// Two hashes, which form a node of the tree above the leaves.
const NODE_BYTES: usize = 2 * Hash::BYTES;
/// How many regions are hashed in parallel: one in each lane of the widest registers.
const LANES: usize = blake3::platform::MAX_SIMD_DEGREE;

const CHUNK_START: u8 = 1;
const CHUNK_END: u8 = 2;
const PARENT: u8 = 4;
const ROOT: u8 = 8;
/// BLAKE3's initialization vector, the same as that of SHA-2: the first bits of the fractional
/// parts of the square roots of the first primes.
const BEGINNING: [u32; 8] =
    [0x6A09_E667, 0xBB67_AE85, 0x3C6E_F372, 0xA54F_F53A, 0x510E_527F, 0x9B05_688C, 0x1F83_D9AB, 0x5BE0_CD19];

/// The hashes of regions, each equal to the result of [`Hash::of`].
///
/// For one region, BLAKE3 works on all of its chunks in parallel, but 4 KiB have too few chunks to
/// fill the registers. This function hashes several regions of the same length in parallel instead:
/// 3.8 GB/s a core instead of 1.7 for 4 KiB, 5.2 instead of 4.4 for 16 KiB (AMD EPYC, AVX-512).
pub(crate) fn many(regions: &[&[u8]]) -> Vec<Hash> {
    let is_whole_tree = |length: usize| length >= 2 * CHUNK_BYTES && length.is_power_of_two();
    let platform = Platform::detect();
    let mut lanes = Lanes::default();
    let mut hashes = Vec::with_capacity(regions.len());
    for alike in regions.chunk_by(|one, other| one.len() == other.len()) {
        for group in alike.chunks(LANES) {
            // If there are fewer regions than chunks in one region, hashing one region at a time
            // fills more lanes.
            let is_wider = group.len() > (group[0].len() / CHUNK_BYTES).min(LANES - 1);
            if is_wider && is_whole_tree(group[0].len()) {
                lanes.hash(platform, group, &mut hashes);
            } else {
                hashes.extend(group.iter().map(|region| Hash::of(region)));
            }
        }
    }
    hashes
}

/// The trees of several regions of one length, a power of two.
#[derive(Default)]
struct Lanes {
    /// One level of all trees: the nodes of the first region, then those of the second …
    level: Vec<u8>,
    above: Vec<u8>,
}

impl Lanes {
    fn hash(&mut self, platform: Platform, regions: &[&[u8]], hashes: &mut Vec<Hash>) {
        let mut width = regions[0].len() / CHUNK_BYTES;
        self.level.resize(regions.len() * width * Hash::BYTES, 0);
        let mut leaves = [0; LANES * Hash::BYTES];
        let leaves = &mut leaves[..regions.len() * Hash::BYTES];
        for chunk in 0..width {
            let chunks = regions.iter().filter_map(|region| region.as_chunks::<CHUNK_BYTES>().0.get(chunk));
            let chunks: Vec<&[u8; CHUNK_BYTES]> = chunks.collect();
            let (number, same) = (chunk as u64, IncrementCounter::No);
            platform.hash_many(&chunks, &BEGINNING, number, same, 0, CHUNK_START, CHUNK_END, leaves);
            for (region, leaf) in leaves.chunks(Hash::BYTES).enumerate() {
                self.level[(region * width + chunk) * Hash::BYTES..][..Hash::BYTES].copy_from_slice(leaf);
            }
        }
        while width > 1 {
            width /= 2;
            let nodes: Vec<&[u8; NODE_BYTES]> = self.level.as_chunks().0.iter().collect();
            self.above.resize(regions.len() * width * Hash::BYTES, 0);
            let flags = if width == 1 { PARENT | ROOT } else { PARENT };
            platform.hash_many(&nodes, &BEGINNING, 0, IncrementCounter::No, flags, 0, 0, &mut self.above);
            std::mem::swap(&mut self.level, &mut self.above);
        }
        hashes.extend(self.level.as_chunks().0.iter().copied().map(Hash));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hash_as_text_is_64_hex_digits_and_nothing_else() {
        let hash = Hash::of(b"memory");
        let text = hash.to_string();
        assert_eq!(text.parse(), Ok(hash));
        assert_eq!(text.to_uppercase().parse(), Ok(hash));
        assert_eq!(serde_json::to_value(hash).unwrap(), serde_json::Value::from(text.clone()));
        assert_eq!(serde_json::from_str::<Hash>(&format!("{text:?}")).unwrap(), hash);
        let bytes = crate::record::encode(&hash).unwrap();
        assert_eq!(bytes[bytes.len() - Hash::BYTES..], hash.0);
        let no_digit = text.replacen(|_: char| true, "g", 1);
        let wide = format!("{}é", &text[..62]);
        let signed = format!("+{}", &text[1..]);
        for bad in
            ["", &text[1..], &format!("{text}0"), &no_digit, &wide, &signed, &format!(" {}", &text[1..])]
        {
            let error = bad.parse::<Hash>().unwrap_err();
            assert_eq!(error, UnitError::UnreadableHash { text: bad.to_owned() });
        }
    }

    #[test]
    fn hashing_side_by_side_gives_what_hashing_one_by_one_gives() {
        let bytes: Vec<u8> =
            (0..1 << 21).map(|at: u32| (at.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
        let lengths = [0, 1, 512, 1023, 1024, 2048, 3072, 4096, 4097, 8192, 16_384, 32_768, 65_536];
        for length in lengths {
            for count in [1, 2, 3, 15, 16, 17, 31] {
                let regions: Vec<&[u8]> = (0..count).map(|at| &bytes[at * 1000..][..length]).collect();
                let expected: Vec<Hash> = regions.iter().map(|region| Hash::of(region)).collect();
                assert_eq!(many(&regions), expected, "{count} of {length} bytes");
            }
        }
        // Different lengths, in any order.
        let mixed: Vec<&[u8]> =
            (0..60).map(|at| &bytes[at * 7000..][..lengths[at * at % lengths.len()]]).collect();
        let expected: Vec<Hash> = mixed.iter().map(|region| Hash::of(region)).collect();
        assert_eq!(many(&mixed), expected);
    }
}
