//! The functions that the fuzz targets of `fuzz/` call: one for each kind of bytes that an attacker
//! may have written.
//!
//! Each takes any bytes and panics if a promise is broken. The promises: malformed bytes lead to an
//! error and nothing else, encoded values decode to the same values, and accepted bytes are
//! well-formed. `tests/store/fuzz_corpus.rs` replays the corpora through the same functions.
//!
//! Only this crate's tests use this module; no release contains it.

mod elf;
mod store;

pub use elf::elf;
pub use store::store;

use std::collections::BTreeMap;

use crate::address_space::{AddressSpace, Mapping};
use crate::codec::{self, Codec, Encoding};
use crate::delta::{self, Base};
use crate::hash::Hash;
use crate::record::{self, Note, Record, Tombstone};
use crate::root::Root;
use crate::source::maps;
use crate::store::catalog::{Catalog, Entry};
use crate::store::fact;
use crate::store::format::Format;
use crate::store::held::Texts;
use crate::store::id::StoreId;
use crate::store::index::block::{self, Block};
use crate::store::index::closing;
use crate::store::packs::location::Location;
use crate::store::packs::object::{self, Header, Place};
use crate::store::packs::scan::{Scan, Scanned};
use crate::table::{self, Places};
use crate::threads::Threads;
use crate::units::RegionSize;

/// Longer plain bytes are not decoded: finding faults does not need them.
const MAX_PLAIN_BYTES: usize = 1 << 20;

const STORE: StoreId = StoreId([7; 16]);
const PACK: u32 = 1;

/// The pack reader. If the first byte is odd, the checksums of all objects are corrected, so that
/// the code behind the checks is reached too.
pub fn pack(data: &[u8]) {
    let Some((mode, bytes)) = data.split_first() else { return };
    let mut bytes = bytes.to_vec();
    if mode & 1 == 1 {
        mend(&mut bytes);
    }
    let mut end_bytes = 0;
    for scanned in Scan::of_bytes(&bytes, 0, STORE, PACK) {
        let Ok(scanned) = scanned else { panic!("bytes in memory can be read") };
        match scanned {
            Scanned::Object { offset_bytes, header, payload } => {
                assert_eq!(offset_bytes, end_bytes, "a scan leaves nothing out");
                assert_eq!(payload.len(), header.stored_bytes as usize);
                end_bytes += header.object_bytes() as u64;
                object_in_order(&header, payload, Location::new(PACK, offset_bytes, &header));
            }
            Scanned::Damaged { offset_bytes, end_bytes: after, .. } => {
                assert_eq!(offset_bytes, end_bytes, "a scan leaves nothing out");
                assert!(after > offset_bytes, "a scan goes on");
                end_bytes = after;
            }
        }
    }
    assert_eq!(end_bytes, bytes.len() as u64, "a scan ends where the pack does");
}

/// Corrects the checksums of everything that may be an object, one after another.
fn mend(bytes: &mut [u8]) {
    let mut at = 0;
    while let Some([_, _, _, _, _, _, _, _, stored @ ..]) =
        bytes.get(at..).and_then(|it| it.first_chunk::<12>())
    {
        let whole_bytes = object::object_bytes(u32::from_le_bytes(*stored));
        let Some(object) = bytes[at..].get_mut(..whole_bytes) else { return };
        object::write_checks(object);
        object::put(object, Place::new(STORE, PACK, at as u64));
        at += whole_bytes;
    }
}

/// An object with correct checksums: reading it returns bytes or an error, and writing it again
/// gives the same bytes.
fn object_in_order(header: &Header, payload: &[u8], location: Location) {
    assert_eq!(Location::from_bytes(&location.to_bytes()), Some(location));
    let plain_bytes = header.plain_bytes as usize;
    let mut again = Vec::new();
    let written =
        object::write_encoded(header.kind, header.encoding, header.hash, plain_bytes, payload, &mut again);
    let read = Header::read(&again, Place::NONE);
    assert_eq!(read, Ok(written), "what is accepted is what is written");
    assert_eq!(read.and_then(|read| read.payload(&again)), Ok(payload));
    if plain_bytes <= MAX_PLAIN_BYTES {
        let _ = fact::read(header, payload, location);
        let _ = codec::decode(header.encoding, payload, &mut vec![0; plain_bytes]);
    }
}

/// Records, layouts, notes, tombstones, threads, and the text of the FORMAT file; the first byte
/// selects one.
pub fn record(data: &[u8]) {
    let Some((what, bytes)) = data.split_first() else { return };
    match what % 6 {
        0 => {
            if let Some(record) = comes_back::<Record>(bytes) {
                let text = record.trigger.to_string();
                assert_eq!(text.parse().map(|it: crate::record::Trigger| it.to_string()), Ok(text));
            }
        }
        1 => {
            if let Some(space) = comes_back::<AddressSpace>(bytes) {
                layout_in_order(&space);
            }
        }
        2 => drop(comes_back::<Note>(bytes)),
        3 => drop(comes_back::<Tombstone>(bytes)),
        4 => drop(comes_back::<Threads>(bytes)),
        _ => {
            let text = String::from_utf8_lossy(bytes);
            let checked = format!("{text}check = {:08x}\n", crc32c::crc32c(text.as_bytes()));
            for text in [&*text, &checked] {
                if let Ok(format) = Format::parse(text) {
                    assert_eq!(Format::parse(&format.text()), Ok(format));
                }
            }
        }
    }
}

/// The value in these bytes, if they hold one. The value must be the same after it is encoded and
/// decoded again.
fn comes_back<T>(bytes: &[u8]) -> Option<T>
where
    T: serde::Serialize + serde::de::DeserializeOwned + PartialEq + std::fmt::Debug,
{
    let value: T = record::decode(bytes).ok()?;
    let Ok(again) = record::encode(&value) else { panic!("{value:?} was decoded and cannot be encoded") };
    assert!(again.len() <= bytes.len(), "the encoding is the shortest");
    assert_eq!(record::decode::<T>(&again).as_ref(), Ok(&value));
    Some(value)
}

fn layout_in_order(space: &AddressSpace) {
    assert_eq!(AddressSpace::new(space.mappings().to_vec()).err(), None, "in address order and apart");
    let size = RegionSize::default();
    let mut regions = 0u64;
    for mapping in space.mappings().iter().filter(|mapping| mapping.captured) {
        regions += size.regions_in(mapping.range.length_bytes());
    }
    assert_eq!(regions, space.regions(size));
}

/// Tables and roots, and the tables of a layout. The data begins with the region size and the
/// layout; hashes follow.
pub fn table(data: &[u8]) {
    let Some((size, rest)) = data.split_first() else { return };
    let count = rest.len() / Hash::BYTES;
    for expected in [count, count + 1, count.saturating_sub(1)] {
        if let Some(hashes) = table::decode(rest, expected) {
            assert_eq!((hashes.len(), table::encode(&hashes)), (expected, rest.to_vec()));
            let root = Root::decode(rest, expected).map(|root| (root.tables(), root.encode()));
            assert_eq!(root, Some((expected, rest.to_vec())));
        }
    }
    let Ok(size) = RegionSize::new(RegionSize::MIN_BYTES << (size % 8)) else { return };
    let Ok(space) = record::decode::<AddressSpace>(rest) else { return };
    let count = table::count(&space, size);
    let (mut image_bytes, mut regions, mut tables) = (0, 0, 0);
    // This many are enough to show that they are consecutive.
    for place in Places::new(&space, size).iter().take(10_000) {
        assert_eq!(place.image_bytes, image_bytes, "the tables are the image, without gaps");
        let mapping = &space.mappings()[place.mapping_index];
        assert!(mapping.captured && place.offset_bytes < mapping.range.length_bytes());
        assert_eq!(place.regions as u64, size.regions_in(place.length_bytes as u64));
        assert!((1..=table::REGIONS_PER_TABLE).contains(&place.regions));
        image_bytes += place.length_bytes as u64;
        regions += place.regions as u64;
        tables += 1;
    }
    if tables < 10_000 {
        assert_eq!((tables, image_bytes, regions), (count, space.image_bytes(), space.regions(size)));
    }
}

/// Deltas. The data is a byte that selects the operation, the length of a base (u16), the base, and
/// the payload or the plain bytes.
pub fn delta(data: &[u8]) {
    let Some(([what, low, high], rest)) = data.split_first_chunk() else { return };
    let base_bytes = usize::from(u16::from_le_bytes([*low, *high])).min(rest.len());
    let (base_plain, rest) = rest.split_at(base_bytes);
    if what & 1 == 0 {
        // The data has no hash of the base, which comes first in a payload.
        let payload = [&Hash::of(base_plain).0[..], rest].concat();
        let mut plain = base_plain.to_vec();
        let _ = delta::apply(&payload, &mut plain);
        assert_eq!(plain.len(), base_plain.len());
        return;
    }
    let plain = rest;
    let number = what >> 1;
    let base = Base { hash: Hash::of(base_plain), plain: base_plain, whole_bytes: 0, number };
    let mut payload = vec![1, 2, 3];
    for max_bytes in [plain.len(), plain.len() / 2] {
        payload.truncate(3);
        if !delta::encode(base, plain, max_bytes, &mut payload) {
            assert_eq!(payload, [1, 2, 3], "what is not kept leaves nothing behind");
            continue;
        }
        let payload = &payload[3..];
        assert!(payload.len() < max_bytes);
        assert!(codec::lengths_are_possible(Encoding::Delta, payload.len(), plain.len()));
        assert_eq!((delta::base_of(payload), delta::number_of(payload)), (Some(base.hash), Some(number)));
        let mut back = base_plain.to_vec();
        back.resize(plain.len(), 0);
        assert_eq!(delta::apply(payload, &mut back), Ok(()));
        assert!(back == plain, "a delta leads back to the plain bytes");
    }
}

/// The codecs. The data is a byte that selects the encoding, the plain length that it claims (u32),
/// and the stored bytes. Every codec also encodes and decodes the rest.
pub fn codec(data: &[u8]) {
    let Some(([encoding, length @ ..], bytes)) = data.split_first_chunk::<5>() else { return };
    let plain_bytes = u32::from_le_bytes(*length) as usize % (MAX_PLAIN_BYTES + 1);
    if let Some(encoding) = Encoding::from_byte(encoding % 4) {
        let possible = codec::lengths_are_possible(encoding, bytes.len(), plain_bytes);
        let mut plain = vec![0; plain_bytes];
        let decoded = codec::decode(encoding, bytes, &mut plain);
        // `lengths_are_possible` rejects impossible lengths before decoding, so it must not reject
        // anything that decodes.
        if decoded.is_ok() && bytes.len() < plain_bytes && encoding != Encoding::Delta {
            assert!(possible, "{encoding:?} made {plain_bytes} of {} bytes", bytes.len());
        }
    }
    for codec in [Codec::None, Codec::Lz4, Codec::Zstd] {
        let mut stored = vec![1, 2, 3];
        let encoding = codec::encode(codec, bytes, &mut stored);
        let stored = &stored[3..];
        assert!(codec::lengths_are_possible(encoding, stored.len(), bytes.len()));
        let mut back = vec![0xAA; bytes.len()];
        assert_eq!(codec::decode(encoding, stored, &mut back), Ok(()));
        assert!(back == bytes, "{codec} gives back what it was given");
        for wrong_bytes in [bytes.len() + 1, bytes.len().saturating_sub(1)] {
            let decoded = codec::decode(encoding, stored, &mut vec![0; wrong_bytes]);
            assert!(decoded.is_err() || wrong_bytes == bytes.len(), "{codec}: a wrong length is an error");
        }
    }
}

/// The lines of `/proc/PID/maps`. Accepted lines stay the same when they are written and read
/// again.
pub fn maps(data: &[u8]) {
    let Ok(lines) = maps::parse(data) else { return };
    let given = data.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()).count();
    assert_eq!(lines.len(), given, "each line is a mapping");
    let text: String = lines
        .iter()
        .map(|line| {
            let Mapping { range, protection, name, file_offset_bytes, .. } = &line.mapping;
            let (start, end, name) = (range.start(), range.end(), name.replace('\n', "\\012"));
            let ((major, minor), inode) = (line.device, line.inode);
            format!(
                "{start:x}-{end:x} {protection} {file_offset_bytes:08x} {major:02x}:{minor:02x} {inode} {name}\n"
            )
        })
        .collect();
    assert_eq!(maps::parse(text.as_bytes()), Ok(lines));
}

/// The content of the index: its blocks, its values of snapshots, and the file `durable`; the first
/// byte selects one.
pub fn index(data: &[u8]) {
    let Some((what, bytes)) = data.split_first() else { return };
    match what % 3 {
        0 => index_block(bytes),
        1 => {
            let (key, value) = bytes.split_at(bytes.len().min(1 + Hash::BYTES));
            let read = |bytes: &[u8]| Entry::from_bytes(bytes, &Texts::default());
            if Catalog::default().load(key, value)
                && let Some(entry) = read(value)
            {
                let again = entry.to_bytes().and_then(|bytes| read(&bytes));
                assert_eq!(again.map(|it| it.record()), Some(entry.record()));
            }
        }
        _ => {
            let checked = [bytes, &crc32c::crc32c(bytes).to_le_bytes()].concat();
            for bytes in [bytes, &checked] {
                let found = closing::decode(bytes);
                assert_eq!(closing::decode(&closing::encode(&found)), found);
            }
        }
    }
}

fn index_block(bytes: &[u8]) {
    let Some(block) = Block::parse(bytes) else { return };
    let entries: Vec<_> = block.entries().collect();
    assert!(entries.len() <= bytes.len(), "entries take bytes");
    let hashes = entries.iter().map(|(hash, _)| *hash);
    let in_order = hashes.clone().is_sorted_by(|one, next| one < next);
    for (hash, place) in entries.iter().take(64) {
        let found = block.find(hash);
        assert!(found == Some(*place) || !in_order, "what is in a block is found");
    }
    for other in [Hash::ZERO, Hash([0xFF; 32]), Hash::of(bytes)] {
        let held = entries.iter().any(|(hash, _)| *hash == other);
        assert!(block.find(&other).is_some() == held || !in_order, "and nothing else is");
    }
    let sorted: Vec<_> = entries.into_iter().collect::<BTreeMap<_, _>>().into_iter().collect();
    let mut again = Vec::new();
    block::write(&sorted, &mut again);
    assert_eq!(Block::parse(&again).map(|block| block.entries().collect()), Some(sorted));
}
