//! A scan: the objects of a pack one after the other, each checked by its checksum.

use super::object::{ALIGNMENT_BYTES, HEADER_BYTES, Header, Place};
use super::ready::ready;
use crate::store::error::StoreError;
use crate::store::id::StoreId;
use crate::sys::map::PackMap;
use crate::units::usize_of;

/// What a scan of a pack comes upon.
pub(crate) enum Scanned<'a> {
    /// A whole object.
    Object {
        offset_bytes: u64,
        header: Header,
        /// Its payload, still encoded.
        payload: &'a [u8],
    },
    /// Bytes that are no object.
    Damaged {
        offset_bytes: u64,
        end_bytes: u64,
        /// The header, where at least that is in order.
        header: Option<Header>,
        why: &'static str,
    },
}

impl Scanned<'_> {
    /// Where it ends.
    pub(crate) fn end_bytes(&self) -> u64 {
        match self {
            Scanned::Object { offset_bytes, header, .. } => offset_bytes + header.object_bytes() as u64,
            Scanned::Damaged { end_bytes, .. } => *end_bytes,
        }
    }
}

/// The header, where at least that is in order, and what is wrong.
type Unreadable = (Option<Header>, &'static str);

/// A scan has so much read ahead of it.
const AHEAD_BYTES: usize = 1 << 20;

/// Walks the objects of a pack from a byte on, checking each object's checksum. After damage it
/// goes on at the next whole object there is. After an error it is at its end.
pub(crate) struct Scan<'a> {
    bytes: &'a [u8],
    /// What the bytes are mapped from, if they are not in memory anyhow.
    map: Option<&'a PackMap>,
    /// Up to where they may be touched.
    ready: usize,
    at: usize,
    store: StoreId,
    pack: u32,
    /// How many bytes may still be checked in search of whole objects, so that bytes made to look
    /// like many long objects cannot keep us for ever.
    search_bytes: usize,
}

impl<'a> Scan<'a> {
    /// Scans a map of pack number `pack` of a store from `from_bytes` on.
    pub(crate) fn of_map(map: &'a PackMap, from_bytes: u64, store: StoreId, pack: u32) -> Scan<'a> {
        let scan = Scan::of_bytes(map, from_bytes, store, pack);
        Scan { map: Some(map), ready: scan.at, ..scan }
    }

    /// The same of bytes in memory.
    pub(crate) fn of_bytes(bytes: &'a [u8], from_bytes: u64, store: StoreId, pack: u32) -> Scan<'a> {
        let at = usize_of(from_bytes).min(bytes.len());
        let search_bytes = bytes.len().saturating_mul(16);
        Scan { bytes, map: None, ready: bytes.len(), at, store, pack, search_bytes }
    }

    /// Makes the bytes up to here ready.
    fn ready(&mut self, end: usize) -> Result<(), StoreError> {
        let end = end.min(self.bytes.len());
        if let Some(map) = self.map.filter(|_| end > self.ready) {
            let ahead = end.max(self.ready.saturating_add(AHEAD_BYTES)).min(self.bytes.len());
            // Where not all that lies ahead can be read, perhaps what is needed now can.
            match ready(map, self.ready..ahead) {
                Ok(()) => self.ready = ahead,
                Err(_) => {
                    ready(map, self.ready..end)?;
                    self.ready = end;
                }
            }
        }
        Ok(())
    }

    fn read(&mut self, at: usize) -> Result<Result<(Header, &'a [u8]), Unreadable>, StoreError> {
        self.ready(at.saturating_add(HEADER_BYTES))?;
        let rest = &self.bytes[at..];
        let place = Place::new(self.store, self.pack, at as u64);
        let header = match Header::read(rest, place) {
            Ok(header) => header,
            Err(why) => return Ok(Err((None, why))),
        };
        self.ready(at.saturating_add(header.object_bytes()))?;
        Ok(header.payload(rest).map(|payload| (header, payload)).map_err(|why| {
            self.search_bytes = self.search_bytes.saturating_sub(header.object_bytes());
            (Some(header), why)
        }))
    }

    /// Where the next whole object begins after `at`, or the end.
    fn next_whole_object(&mut self, at: usize) -> Result<usize, StoreError> {
        let mut next = at + ALIGNMENT_BYTES;
        while next + HEADER_BYTES <= self.bytes.len() && self.search_bytes > 0 {
            if self.read(next)?.is_ok() {
                return Ok(next);
            }
            next += ALIGNMENT_BYTES;
        }
        Ok(self.bytes.len())
    }

    fn scanned(&mut self) -> Result<Scanned<'a>, StoreError> {
        let offset_bytes = self.at as u64;
        Ok(match self.read(self.at)? {
            Ok((header, payload)) => {
                self.at += header.object_bytes();
                Scanned::Object { offset_bytes, header, payload }
            }
            Err((header, why)) => {
                self.at = self.next_whole_object(self.at)?;
                Scanned::Damaged { offset_bytes, end_bytes: self.at as u64, header, why }
            }
        })
    }
}

impl<'a> Iterator for Scan<'a> {
    type Item = Result<Scanned<'a>, StoreError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.at >= self.bytes.len() {
            return None;
        }
        let scanned = self.scanned();
        if scanned.is_err() {
            self.at = self.bytes.len();
        }
        Some(scanned)
    }
}

#[cfg(test)]
#[allow(clippy::cast_possible_truncation)]
pub(super) mod tests {
    use super::*;
    use crate::codec::Codec;
    use crate::hash::Hash;
    use crate::store::packs::object::{self, ObjectKind};

    /// Six objects for pack 7, as they are from byte `first` on, and where they begin.
    pub(crate) fn objects(store: StoreId, first: usize) -> (Vec<u8>, Vec<usize>) {
        let mut bytes = Vec::new();
        let mut starts = Vec::new();
        for byte in 0..6u8 {
            starts.push(bytes.len());
            let plain: Vec<u8> = (0..200).map(|at: u8| at.wrapping_mul(byte + 3)).collect();
            object::write(ObjectKind::Region, Codec::None, Hash::of(&plain), &plain, &mut bytes);
            let start = starts[usize::from(byte)];
            object::put(&mut bytes[start..], Place::new(store, 7, (first + start) as u64));
        }
        (bytes, starts)
    }

    #[test]
    fn after_damage_a_scan_goes_on_at_the_next_whole_object() {
        let store = StoreId::new();
        let (bytes, starts) = objects(store, 0);
        for at in 0..bytes.len() {
            let mut damaged = bytes.clone();
            damaged[at] ^= 0x10;
            let hit = starts.iter().rposition(|start| *start <= at).unwrap();
            let mut whole = Vec::new();
            let mut holes = Vec::new();
            for scanned in Scan::of_bytes(&damaged, 0, store, 7) {
                match scanned.unwrap() {
                    Scanned::Object { offset_bytes, .. } => whole.push(offset_bytes as usize),
                    Scanned::Damaged { offset_bytes, .. } => holes.push(offset_bytes as usize),
                }
            }
            assert_eq!(holes, [starts[hit]], "byte {at}");
            assert_eq!(whole, [&starts[..hit], &starts[hit + 1..]].concat(), "byte {at}");
        }
    }
}
