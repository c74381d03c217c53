//! The header of a pack: its number and id, its store, and the packs that it replaces.
//!
//! ```text
//!  0          8        12       16         32        48       52        56        60     64
//!  +----------+--------+--------+----------+---------+--------+---------+---------+------+-- …
//!  |"STILLPAK"| format | number | store id | pack id | region | replaces|  check  | zero | replaced
//!  |   8 B    |  u32   |  u32   |   16 B   |  16 B   | size   | count   | CRC32C  |      | numbers
//!  +----------+--------+--------+----------+---------+--------+---------+---------+------+-- …
//! ```
//!
//! Little-endian, with zeros up to a multiple of 8. The check covers the whole header, with zeros
//! in its own place.

use std::io;
use std::ops::Range;

use super::object::ALIGNMENT_BYTES;
use crate::store::format::{FORMAT_VERSION, Format};
use crate::store::id::{PackId, StoreId};
use crate::sys::file::File;
use crate::units::usize_of;

const MAGIC: &[u8; 8] = b"STILLPAK";
const VERSION: usize = 8;
const NUMBER: usize = 12;
const STORE: Range<usize> = 16..32;
const PACK: Range<usize> = 32..48;
const REGION_BYTES: usize = 48;
const REPLACED_COUNT: usize = 52;
const CHECK: Range<usize> = 56..60;
const RESERVED_BYTES: usize = 4;
const FIXED_BYTES: usize = 64;

/// How much of a file that may be a pack is read for its header. It is enough to list as many
/// replaced packs as a terabyte has.
pub(crate) const MAX_BYTES: usize = 64 << 10;

const DAMAGED: &str = "its header is damaged";

/// The content of a pack's header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct PackHeader {
    /// The format of the store when the pack was written.
    pub(crate) version: u32,
    pub(crate) number: u32,
    pub(crate) store: StoreId,
    pub(crate) pack: PackId,
    pub(crate) region_bytes: u32,
    pub(crate) replaces: Vec<u32>,
}

impl PackHeader {
    /// The header of a pack of the store with this format.
    pub(crate) fn new(format: &Format, number: u32, pack: PackId, replaces: Vec<u32>) -> PackHeader {
        let region_bytes = u32::from(format.region_size);
        PackHeader { version: format.version, number, store: format.id, pack, region_bytes, replaces }
    }

    /// Whether the pack belongs to the store with this format. The store's format may be newer than
    /// the pack's.
    pub(crate) fn fits(&self, format: &Format) -> bool {
        (1..=FORMAT_VERSION).contains(&self.version)
            && self.store == format.id
            && self.region_bytes == u32::from(format.region_size)
    }

    /// The length of the header of a pack that replaces `replaced` others.
    pub(crate) fn bytes_for(replaced: usize) -> u64 {
        (FIXED_BYTES + 4 * replaced).next_multiple_of(ALIGNMENT_BYTES) as u64
    }

    /// Its length.
    pub(crate) fn length_bytes(&self) -> u64 {
        PackHeader::bytes_for(self.replaces.len())
    }

    /// The bytes at the start of the pack.
    pub(crate) fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(usize_of(self.length_bytes()));
        bytes.extend_from_slice(MAGIC);
        bytes.extend_from_slice(&self.version.to_le_bytes());
        bytes.extend_from_slice(&self.number.to_le_bytes());
        bytes.extend_from_slice(&self.store.0);
        bytes.extend_from_slice(&self.pack.0);
        bytes.extend_from_slice(&self.region_bytes.to_le_bytes());
        bytes.extend_from_slice(&u32::try_from(self.replaces.len()).unwrap_or(u32::MAX).to_le_bytes());
        bytes.extend_from_slice(&[0; CHECK.end - CHECK.start + RESERVED_BYTES]);
        bytes.extend(self.replaces.iter().flat_map(|number| number.to_le_bytes()));
        bytes.resize(bytes.len().next_multiple_of(ALIGNMENT_BYTES), 0);
        let check = crc32c::crc32c(&bytes);
        bytes[CHECK].copy_from_slice(&check.to_le_bytes());
        bytes
    }

    /// Parses the header at the start of `bytes`, which may be longer. The error says what is wrong
    /// with it.
    pub(crate) fn parse(bytes: &[u8]) -> Result<PackHeader, &'static str> {
        let fixed: &[u8; FIXED_BYTES] = bytes.first_chunk().ok_or(DAMAGED)?;
        if !fixed.starts_with(MAGIC) {
            return Err("it does not begin as a pack does");
        }
        let u32_at = |at: usize| u32::from_le_bytes([fixed[at], fixed[at + 1], fixed[at + 2], fixed[at + 3]]);
        let id = |at: Range<usize>| {
            let mut id = [0; 16];
            id.copy_from_slice(&fixed[at]);
            id
        };
        let replaced = u32_at(REPLACED_COUNT) as usize;
        let numbers = bytes.get(FIXED_BYTES..FIXED_BYTES + 4 * replaced).ok_or(DAMAGED)?;
        let (numbers, _) = numbers.as_chunks::<4>();
        let header = PackHeader {
            version: u32_at(VERSION),
            number: u32_at(NUMBER),
            store: StoreId(id(STORE)),
            pack: PackId(id(PACK)),
            region_bytes: u32_at(REGION_BYTES),
            replaces: numbers.iter().map(|number| u32::from_le_bytes(*number)).collect(),
        };
        // This compares the check too.
        if header.to_bytes()[..FIXED_BYTES] == *fixed { Ok(header) } else { Err(DAMAGED) }
    }

    /// Reads the header of pack `number` from its file, which is `length_bytes` long. The error
    /// says what is wrong with it.
    pub(crate) fn read(
        file: &File,
        length_bytes: u64,
        number: u32,
    ) -> io::Result<Result<PackHeader, String>> {
        if length_bytes < FIXED_BYTES as u64 {
            return Ok(Err(format!("it has {length_bytes} bytes, fewer than its header")));
        }
        let mut bytes = vec![0; FIXED_BYTES];
        file.read_exact_at(&mut bytes, 0)?;
        let mut replaced = [0; 4];
        replaced.copy_from_slice(&bytes[REPLACED_COUNT..REPLACED_COUNT + 4]);
        let replaced = u32::from_le_bytes(replaced);
        let whole_bytes = PackHeader::bytes_for(replaced as usize);
        // A pack replaces only packs with lower numbers. The count is checked before memory for it
        // is allocated.
        if bytes.starts_with(MAGIC) && replaced <= number && whole_bytes <= length_bytes {
            bytes.resize(usize_of(whole_bytes), 0);
            file.read_exact_at(&mut bytes[FIXED_BYTES..], FIXED_BYTES as u64)?;
        }
        let header = PackHeader::parse(&bytes).map_err(str::to_owned);
        Ok(header.and_then(|header| {
            if header.number == number {
                Ok(header)
            } else {
                Err(format!("its header says that it is pack {}", header.number))
            }
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(replaces: &[u32]) -> PackHeader {
        PackHeader {
            version: 1,
            number: 7,
            store: StoreId([0xAB; 16]),
            pack: PackId([9; 16]),
            region_bytes: 16384,
            replaces: replaces.to_vec(),
        }
    }

    #[test]
    fn a_header_reads_back_as_it_was_written_whatever_comes_behind_it() {
        for replaces in [&[][..], &[1], &[1, 2, 5]] {
            let mut bytes = header(replaces).to_bytes();
            assert_eq!(bytes.len() as u64, header(replaces).length_bytes());
            assert_eq!(bytes.len() % 8, 0);
            bytes.extend([0xFF; 100]);
            assert_eq!(PackHeader::parse(&bytes), Ok(header(replaces)));
        }
    }

    #[test]
    fn every_flipped_bit_and_every_cut_is_detected() {
        let bytes = header(&[3, 4]).to_bytes();
        for bit in 0..bytes.len() * 8 {
            let mut damaged = bytes.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert!(PackHeader::parse(&damaged).is_err(), "bit {bit}");
        }
        for length in 0..bytes.len() {
            assert!(PackHeader::parse(&bytes[..length]).is_err(), "cut at {length}");
        }
    }

    #[test]
    fn a_header_that_claims_to_replace_many_packs_is_refused_without_memory_for_them() {
        let mut bytes = header(&[]).to_bytes();
        bytes[REPLACED_COUNT..REPLACED_COUNT + 4].copy_from_slice(&u32::MAX.to_le_bytes());
        assert_eq!(PackHeader::parse(&bytes), Err(DAMAGED));
    }
}
