//! Reading objects back, checked.

use std::sync::Arc;

use memmap2::Mmap;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::Shared;
use super::error::StoreError;
use super::index::Tree;
use super::location::Location;
use super::object::{HEADER_BYTES, Header, Kind, Place};
use crate::codec;
use crate::hash::Hash;
use crate::record;
use crate::table;

/// How thoroughly regions are checked when they are read. The lengths and the checksum of the
/// stored bytes always are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Check {
    /// The BLAKE3 of the plain bytes too: what comes back is what was captured, bit for bit.
    #[default]
    Full,
    /// Only the CRC32C of the stored bytes.
    Checksum,
}

/// How often an object is looked up anew when its pack is gone. Each time gc must have moved it.
pub(crate) const TRIES: usize = 100;

/// The mapped bytes of a pack, where in them an object begins, and its header.
type Found = (Arc<Mmap>, usize, Header);

/// Reads objects of one store, best those that lie near one another one after the other.
///
/// Regions are appended in the order of their addresses, so the next one wanted is mostly the next
/// one in the pack. A reader looks there first, and asks the index only if it is not.
pub(crate) struct Reader<'a> {
    shared: &'a Shared,
    check: Check,
    open: Option<(u32, Arc<Mmap>)>,
    /// Where the object after the last one begins, in the open pack.
    next_bytes: usize,
}

impl<'a> Reader<'a> {
    pub(crate) fn new(shared: &'a Shared, check: Check) -> Reader<'a> {
        Reader { shared, check, open: None, next_bytes: 0 }
    }

    /// Decodes a region into the whole of `plain`.
    pub(crate) fn region(&mut self, hash: &Hash, plain: &mut [u8]) -> Result<(), StoreError> {
        let check = self.check;
        // What damage left there may have been stored anew elsewhere: then the index knows better.
        if let Some((map, at, header)) = self.next_if_it_is(Kind::Region, hash)
            && self.decode(&map, at, &header, plain, check).is_ok()
        {
            return Ok(());
        }
        let (map, at, header) = self.find(Kind::Region, hash)?;
        self.decode(&map, at, &header, plain, check)
    }

    /// The plain bytes of an object; none for the all-zero hash.
    pub(crate) fn object(&mut self, kind: Kind, hash: &Hash) -> Result<Vec<u8>, StoreError> {
        if hash.is_zero() {
            return Ok(Vec::new());
        }
        let (map, at, header) = self.find(kind, hash)?;
        let mut plain = vec![0; header.plain_bytes as usize];
        self.decode(&map, at, &header, &mut plain, Check::Full)?;
        Ok(plain)
    }

    /// The hashes in a table or root, of which there must be `expected`.
    pub(crate) fn hashes(
        &mut self,
        kind: Kind,
        hash: &Hash,
        expected: usize,
    ) -> Result<Vec<Hash>, StoreError> {
        if hash.is_zero() {
            return Ok(vec![Hash::ZERO; expected]);
        }
        let bytes = self.object(kind, hash)?;
        table::decode(&bytes, expected).ok_or_else(|| StoreError::Malformed {
            kind,
            hash: *hash,
            detail: format!("expected {expected} hashes, found {} bytes", bytes.len()),
        })
    }

    /// The value in an object.
    pub(crate) fn value<T: DeserializeOwned>(&mut self, kind: Kind, hash: &Hash) -> Result<T, StoreError> {
        let bytes = self.object(kind, hash)?;
        record::decode(&bytes).map_err(|source| StoreError::Record { kind, source })
    }

    /// Checks an object that is at a known place, and its plain bytes against its hash.
    /// Says whether it was there to be checked: gc may have moved it meanwhile.
    pub(crate) fn check_at(
        &mut self,
        kind: Kind,
        hash: &Hash,
        location: Location,
    ) -> Result<bool, StoreError> {
        let Some((map, at, header)) = self.at(kind, hash, location)? else { return Ok(false) };
        let mut plain = vec![0; header.plain_bytes as usize];
        self.decode(&map, at, &header, &mut plain, Check::Full)?;
        Ok(true)
    }

    /// What kind of object its header says is at a place.
    pub(crate) fn kind_at(&mut self, location: Location) -> Option<Kind> {
        let map = self.shared.log.pack(location.pack)?.bytes(location.end_bytes()).ok()?;
        let at = usize::try_from(location.offset_bytes).ok()?;
        Header::read(map.get(at..)?, self.place(location.pack, at)).ok().map(|header| header.kind)
    }

    fn place(&self, pack: u32, at: usize) -> Place {
        Place::new(self.shared.format.id, pack, at as u64)
    }

    /// The object after the last one, if it is this.
    fn next_if_it_is(&self, kind: Kind, hash: &Hash) -> Option<Found> {
        let (number, map) = self.open.as_ref()?;
        let rest = map.get(self.next_bytes..)?;
        // The hash first: mostly that tells, and costs nothing.
        if rest.get(16..HEADER_BYTES) != Some(&hash.0) {
            return None;
        }
        let place = self.place(*number, self.next_bytes);
        let header = Header::read(rest, place).ok().filter(|header| fits(header.kind, kind))?;
        Some((map.clone(), self.next_bytes, header))
    }

    fn find(&mut self, kind: Kind, hash: &Hash) -> Result<Found, StoreError> {
        let tree = Tree::of(kind);
        let missing = || StoreError::Missing { kind, hash: *hash };
        // gc may move the object between the look-up and the reading: then it is elsewhere now.
        for _ in 0..TRIES {
            let location = self.shared.locate(tree, hash)?.ok_or_else(missing)?;
            if let Some(found) = self.at(kind, hash, location)? {
                return Ok(found);
            }
        }
        Err(missing())
    }

    /// The object at a place; none if gc has removed the pack.
    fn at(&mut self, kind: Kind, hash: &Hash, location: Location) -> Result<Option<Found>, StoreError> {
        let damaged = |why: &str| StoreError::Damaged {
            kind,
            hash: *hash,
            pack: location.pack,
            offset_bytes: location.offset_bytes,
            detail: why.to_owned(),
        };
        let map = match &self.open {
            Some((number, map)) if *number == location.pack && map.len() as u64 >= location.end_bytes() => {
                map.clone()
            }
            _ => {
                let Some(pack) = self.shared.log.pack(location.pack) else { return Ok(None) };
                if pack.length_bytes() < location.end_bytes() {
                    return Err(damaged("the pack ends before it"));
                }
                let map = pack.bytes(location.end_bytes())?;
                self.open = Some((location.pack, map.clone()));
                map
            }
        };
        let at = usize::try_from(location.offset_bytes).map_err(|_| damaged("it is out of reach"))?;
        let place = self.place(location.pack, at);
        let header = Header::read(map.get(at..).unwrap_or_default(), place).map_err(damaged)?;
        if header.hash != *hash || !fits(header.kind, kind) {
            return Err(damaged("another object is in its place"));
        }
        Ok(Some((map, at, header)))
    }

    fn decode(
        &mut self,
        map: &[u8],
        at: usize,
        header: &Header,
        plain: &mut [u8],
        check: Check,
    ) -> Result<(), StoreError> {
        self.next_bytes = at + header.object_bytes();
        let damaged = |detail: String| StoreError::Damaged {
            kind: header.kind,
            hash: header.hash,
            pack: self.open.as_ref().map_or(0, |(number, _)| *number),
            offset_bytes: at as u64,
            detail,
        };
        let payload = header.payload(&map[at..]).map_err(|why| damaged(why.to_owned()))?;
        codec::decode(header.encoding, payload, plain).map_err(|error| damaged(error.to_string()))?;
        if check == Check::Full && Hash::of(plain) != header.hash {
            return Err(damaged("its bytes do not match its hash".to_owned()));
        }
        Ok(())
    }
}

/// Whether an object of the kind `found` may stand for one of the kind `wanted`: within a tree of the
/// index an object is known by its bytes alone, and two of different kinds may have the same.
fn fits(found: Kind, wanted: Kind) -> bool {
    (found == Kind::Region) == (wanted == Kind::Region)
}
