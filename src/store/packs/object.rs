//! An object: what a pack holds, as bytes.
//!
//! ```text
//!  0     1         2             4            8             12       16      48
//!  +-----+---------+-------------+------------+-------------+--------+-------+---- … ----+-----+
//!  |kind |encoding |header check |plain length|stored length|checksum| hash  |  payload  | pad |
//!  | u8  |   u8    |    u16      |    u32     |     u32     |  u32   | 32 B  |           |     |
//!  +-----+---------+-------------+------------+-------------+--------+-------+---- … ----+-----+
//! ```
//!
//! Little-endian. The padding is zeros up to a multiple of 8. The payload of a delta begins with the
//! hash of its base.
//!
//! `checksum` is the CRC32C of everything from `kind` to the end of the padding; `header check` is the
//! lower half of the CRC32C of the 48 header bytes; both checks are taken as zero in both. So a damaged payload can be stepped over, and after a damaged header the next
//! object is found again by trying every multiple of 8.
//!
//! Both are then XORed with the *place* of the object: the CRC32C of the store's id, the number of the
//! pack and the offset in it. Captured memory may hold the bytes of objects, whole packs even;
//! without this the search for the next object could take them for the real thing.

use std::fmt;

use crate::codec::{self, Codec, Encoding};
use crate::hash::Hash;
use crate::store::id::StoreId;

/// How long an object's header is, in bytes.
pub(crate) const HEADER_BYTES: usize = 48;

/// Objects begin at multiples of this.
pub(crate) const ALIGNMENT_BYTES: usize = 8;

/// How much an object of so many plain bytes takes, at most.
pub(crate) fn most_bytes(plain_bytes: u32) -> u64 {
    object_bytes(plain_bytes) as u64
}

/// The place of an object, which its checks are bound to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Place(u32);

impl Place {
    /// What an object has until it is [`put`] somewhere.
    pub(crate) const NONE: Place = Place(0);

    /// The place at an offset of a pack of a store.
    pub(crate) fn new(store: StoreId, pack: u32, offset_bytes: u64) -> Place {
        let crc = crc32c::crc32c(&store.0);
        let crc = crc32c::crc32c_append(crc, &pack.to_le_bytes());
        Place(crc32c::crc32c_append(crc, &offset_bytes.to_le_bytes()))
    }
}

/// What an object is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u8)]
#[non_exhaustive]
pub enum ObjectKind {
    /// Memory.
    Region = 1,
    /// Hashes of regions.
    Table = 2,
    /// Hashes of tables.
    Root = 3,
    /// The mappings of an address space.
    Layout = 4,
    /// A snapshot.
    Record = 5,
    /// Something kept beside the memory.
    Attachment = 6,
    /// Labels.
    Note = 7,
    /// Says that a snapshot is forgotten.
    Tombstone = 8,
}

impl ObjectKind {
    /// No object has more plain bytes than this.
    pub const MAX_PLAIN_BYTES: usize = 256 << 20;

    pub(crate) fn from_byte(byte: u8) -> Option<ObjectKind> {
        use ObjectKind::*;
        [Region, Table, Root, Layout, Record, Attachment, Note, Tombstone]
            .into_iter()
            .find(|kind| *kind as u8 == byte)
    }

    /// Its name in lower case.
    pub fn name(self) -> &'static str {
        match self {
            ObjectKind::Region => "region",
            ObjectKind::Table => "table",
            ObjectKind::Root => "root",
            ObjectKind::Layout => "layout",
            ObjectKind::Record => "record",
            ObjectKind::Attachment => "attachment",
            ObjectKind::Note => "note",
            ObjectKind::Tombstone => "tombstone",
        }
    }

    fn max_plain_bytes(self) -> usize {
        match self {
            ObjectKind::Region => crate::units::RegionSize::MAX_BYTES as usize,
            ObjectKind::Table => crate::table::REGIONS_PER_TABLE * Hash::BYTES,
            _ => ObjectKind::MAX_PLAIN_BYTES,
        }
    }
}

impl fmt::Display for ObjectKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The header of one object, its lengths already checked against what its kind allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) kind: ObjectKind,
    pub(crate) encoding: Encoding,
    pub(crate) plain_bytes: u32,
    pub(crate) stored_bytes: u32,
    pub(crate) hash: Hash,
    checksum: u32,
}

impl Header {
    /// Header, payload and padding together.
    pub(crate) fn object_bytes(&self) -> usize {
        object_bytes(self.stored_bytes)
    }

    /// The header at the start of `bytes`, which are at `place`; what is wrong with it otherwise.
    ///
    /// The lengths are believed only so far as the kind allows them; whether the payload is all
    /// there and intact is for [`payload`](Self::payload) to say.
    pub(crate) fn read(bytes: &[u8], place: Place) -> Result<Header, &'static str> {
        let bytes: &[u8; HEADER_BYTES] = bytes.first_chunk().ok_or("the pack ends inside its header")?;
        let u32_at = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        if u16::from_le_bytes([bytes[2], bytes[3]]) != header_check(bytes, place) {
            return Err("its header does not match its header check");
        }
        let kind = ObjectKind::from_byte(bytes[0]).ok_or("it is of an unknown kind")?;
        let encoding = Encoding::from_byte(bytes[1]).ok_or("it has an unknown encoding")?;
        let (plain_bytes, stored_bytes) = (u32_at(4), u32_at(8));
        if plain_bytes as usize > kind.max_plain_bytes()
            || stored_bytes > plain_bytes
            || !codec::lengths_are_possible(encoding, stored_bytes as usize, plain_bytes as usize)
        {
            return Err("its lengths are impossible");
        }
        let mut hash = Hash::ZERO;
        hash.0.copy_from_slice(&bytes[16..48]);
        Ok(Header { kind, encoding, plain_bytes, stored_bytes, hash, checksum: u32_at(12) ^ place.0 })
    }

    /// The payload of the object that begins at the start of `bytes` and has this header, its
    /// checksum checked; what is wrong with it otherwise.
    pub(crate) fn payload<'a>(&self, bytes: &'a [u8]) -> Result<&'a [u8], &'static str> {
        let object = bytes.get(..self.object_bytes()).ok_or("the pack ends inside it")?;
        if checksum(object) != self.checksum {
            return Err("its bytes do not match its checksum");
        }
        Ok(&object[HEADER_BYTES..HEADER_BYTES + self.stored_bytes as usize])
    }
}

/// Header, payload and padding of an object with `stored_bytes` of payload.
pub(crate) fn object_bytes(stored_bytes: u32) -> usize {
    (HEADER_BYTES + stored_bytes as usize).next_multiple_of(ALIGNMENT_BYTES)
}

/// Appends one whole object to `out`, which must end at a multiple of 8, and returns its header.
///
/// It has no place yet: [`put`] binds it to the one where it comes to be.
pub(crate) fn write(kind: ObjectKind, codec: Codec, hash: Hash, plain: &[u8], out: &mut Vec<u8>) -> Header {
    let start = out.len();
    out.resize(start + HEADER_BYTES, 0);
    let encoding = codec::encode(codec, plain, out);
    finish(kind, encoding, hash, plain.len(), start, out)
}

/// Appends one whole object whose payload is encoded already.
pub(crate) fn write_encoded(
    kind: ObjectKind,
    encoding: Encoding,
    hash: Hash,
    plain_bytes: usize,
    payload: &[u8],
    out: &mut Vec<u8>,
) -> Header {
    let start = out.len();
    out.resize(start + HEADER_BYTES, 0);
    out.extend_from_slice(payload);
    finish(kind, encoding, hash, plain_bytes, start, out)
}

/// Writes the header of the object at `start` of `out`, which ends with its payload, and the padding.
fn finish(
    kind: ObjectKind,
    encoding: Encoding,
    hash: Hash,
    plain_bytes: usize,
    start: usize,
    out: &mut Vec<u8>,
) -> Header {
    let stored_bytes = length_u32(out.len() - start - HEADER_BYTES);
    let plain_bytes = length_u32(plain_bytes);
    out.resize(start + object_bytes(stored_bytes), 0);
    let object = &mut out[start..];
    object[0] = kind as u8;
    object[1] = encoding as u8;
    object[4..8].copy_from_slice(&plain_bytes.to_le_bytes());
    object[8..12].copy_from_slice(&stored_bytes.to_le_bytes());
    object[16..48].copy_from_slice(&hash.0);
    let checksum = write_checks(object);
    Header { kind, encoding, plain_bytes, stored_bytes, hash, checksum }
}

/// Writes the checks of an object that has no place yet. Returns its checksum.
pub(crate) fn write_checks(object: &mut [u8]) -> u32 {
    let check = header_check(object.first_chunk().unwrap_or(&[0; HEADER_BYTES]), Place::NONE);
    object[2..4].copy_from_slice(&check.to_le_bytes());
    let checksum = checksum(object);
    object[12..16].copy_from_slice(&checksum.to_le_bytes());
    checksum
}

/// Binds an object without a place to `place`.
pub(crate) fn put(object: &mut [u8], place: Place) {
    let place = place.0.to_le_bytes();
    for (at, byte) in [2, 3].into_iter().zip(place).chain((12..16).zip(place)) {
        object[at] ^= byte;
    }
}

/// Moves an object from one place to another.
pub(crate) fn move_to(object: &mut [u8], from: Place, to: Place) {
    put(object, from);
    put(object, to);
}

/// Callers keep to [`ObjectKind::MAX_PLAIN_BYTES`], far below 4 GiB.
#[allow(clippy::cast_possible_truncation)]
fn length_u32(length: usize) -> u32 {
    debug_assert!(length <= ObjectKind::MAX_PLAIN_BYTES);
    length as u32
}

#[allow(clippy::cast_possible_truncation)] // The lower half is what is wanted.
fn header_check(header: &[u8; HEADER_BYTES], place: Place) -> u16 {
    let crc = crc32c::crc32c(&header[..2]);
    let crc = crc32c::crc32c_append(crc, &[0, 0]);
    let crc = crc32c::crc32c_append(crc, &header[4..12]);
    let crc = crc32c::crc32c_append(crc, &[0; 4]);
    (crc32c::crc32c_append(crc, &header[16..]) ^ place.0) as u16
}

fn checksum(object: &[u8]) -> u32 {
    let crc = crc32c::crc32c(&object[..2]);
    let crc = crc32c::crc32c_append(crc, &[0; 2]);
    let crc = crc32c::crc32c_append(crc, &object[4..12]);
    let crc = crc32c::crc32c_append(crc, &[0; 4]);
    crc32c::crc32c_append(crc, &object[16..])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_object_reads_back_as_it_was_written() {
        for plain in [&b""[..], b"x", &[7; 4096]] {
            let mut bytes = vec![0; 8];
            let written = write(ObjectKind::Region, Codec::Lz4, Hash::of(plain), plain, &mut bytes);
            assert_eq!(bytes.len() % 8, 0);
            let read = Header::read(&bytes[8..], Place(0)).unwrap();
            assert_eq!(read, written);
            let mut back = vec![0; plain.len()];
            codec::decode(read.encoding, read.payload(&bytes[8..]).unwrap(), &mut back).unwrap();
            assert_eq!(back, plain);
        }
    }

    #[test]
    fn every_flipped_bit_and_every_cut_is_detected() {
        let plain: Vec<u8> = (0..101).collect();
        let mut bytes = Vec::new();
        write(ObjectKind::Attachment, Codec::Lz4, Hash::of(&plain), &plain, &mut bytes);
        let read = |bytes: &[u8]| {
            Header::read(bytes, Place(0)).and_then(|header| header.payload(bytes).map(<[u8]>::len))
        };
        assert!(read(&bytes).is_ok());
        for bit in 0..bytes.len() * 8 {
            let mut damaged = bytes.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert!(read(&damaged).is_err(), "bit {bit}");
        }
        for length in 0..bytes.len() {
            assert!(read(&bytes[..length]).is_err(), "cut at {length}");
        }
    }

    #[test]
    fn a_length_that_no_object_of_its_kind_can_have_is_refused() {
        let plain = vec![9; 70_000];
        let mut bytes = Vec::new();
        write(ObjectKind::Attachment, Codec::None, Hash::of(&plain), &plain, &mut bytes);
        assert!(Header::read(&bytes, Place(0)).is_ok());
        bytes[0] = ObjectKind::Region as u8;
        let check = header_check(bytes.first_chunk().unwrap(), Place(0));
        bytes[2..4].copy_from_slice(&check.to_le_bytes());
        assert_eq!(Header::read(&bytes, Place(0)), Err("its lengths are impossible"));
    }

    #[test]
    fn an_object_is_one_only_in_its_own_place() {
        let store = StoreId::new();
        let here = Place::new(store, 3, 48);
        let mut bytes = Vec::new();
        write(ObjectKind::Tombstone, Codec::None, Hash::of(b"x"), b"x", &mut bytes);
        put(&mut bytes, here);
        let read =
            |bytes: &[u8], place| Header::read(bytes, place).and_then(|it| it.payload(bytes).map(drop));
        assert_eq!(read(&bytes, here), Ok(()));
        let others =
            [Place::new(store, 3, 56), Place::new(store, 4, 48), Place::new(StoreId([1; 16]), 3, 48)];
        for other in others {
            assert!(read(&bytes, other).is_err());
        }
        move_to(&mut bytes, here, others[0]);
        assert_eq!(read(&bytes, others[0]), Ok(()));
    }
}
