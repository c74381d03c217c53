//! A cursor: a place in the packs, where the next object to be read mostly is.

use std::cell::Cell;
use std::ops::Range;
use std::sync::Arc;

use super::error::StoreError;
use super::open_store::OpenStore;
use super::packs::location::{Location, Position};
use super::packs::object::{HEADER_BYTES, Header, ObjectKind, Place};
use super::packs::ready::ready_since;
use super::tree::Tree;
use crate::codec::Encoding;
use crate::delta;
use crate::hash::Hash;
use crate::sys::map::{PackMap, Since};
use crate::units::usize_of;

/// How often an object is looked up anew when its pack is gone. Each time gc must have moved it.
pub(crate) const TRIES: usize = 100;

/// Where an object was found.
pub(super) struct FoundObject {
    pub(super) map: Arc<PackMap>,
    pub(super) pack: u32,
    /// Where in the pack it begins.
    pub(super) at: usize,
    pub(super) header: Header,
    /// Whether its checksum has been.
    is_checked: Cell<bool>,
}

impl FoundObject {
    pub(super) fn is_delta(&self) -> bool {
        self.header.encoding == Encoding::Delta
    }

    /// The base that a delta names.
    pub(super) fn base(&self) -> Result<Hash, StoreError> {
        delta::base_of(self.payload()?).ok_or_else(|| self.damaged("it names no base"))
    }

    /// Its number among those that were in its place.
    pub(super) fn number(&self) -> Result<u8, StoreError> {
        if self.is_delta() {
            delta::number_of(self.payload()?).ok_or_else(|| self.damaged("it has no number"))
        } else {
            Ok(0)
        }
    }

    /// Its payload, still encoded, its checksum checked.
    pub(super) fn payload(&self) -> Result<&[u8], StoreError> {
        if !self.is_checked.get() {
            self.header.payload(&self.map[self.at..]).map_err(|why| self.damaged(why))?;
            self.is_checked.set(true);
        }
        let start = self.at + HEADER_BYTES;
        Ok(&self.map[start..start + self.header.stored_bytes as usize])
    }

    pub(super) fn damaged(&self, detail: impl ToString) -> StoreError {
        StoreError::Damaged {
            kind: self.header.kind,
            hash: self.header.hash,
            pack: self.pack,
            offset_bytes: self.at as u64,
            detail: detail.to_string(),
        }
    }
}

/// A place in the packs, after the last object that was read there.
pub(super) struct Cursor<'a> {
    pub(super) shared: &'a OpenStore,
    open: Option<(u32, Arc<PackMap>)>,
    /// Where the object after the last one begins, in the open pack.
    pub(super) next_bytes: usize,
    /// What was made ready earlier may not be so any more.
    since: Since,
}

impl<'a> Cursor<'a> {
    /// A cursor at no place yet.
    pub(super) fn new(shared: &'a OpenStore, since: Since) -> Cursor<'a> {
        Cursor { shared, open: None, next_bytes: 0, since }
    }

    /// Makes bytes of the open pack ready to be touched.
    fn ready(&self, bytes: Range<usize>) -> Result<(), StoreError> {
        self.open.as_ref().map_or(Ok(()), |(_, map)| ready_since(map, bytes, self.since))
    }

    fn place(&self, pack: u32, at: usize) -> Place {
        Place::new(self.shared.format.id, pack, at as u64)
    }

    /// The object after the last one, if it is this.
    pub(super) fn next_if_it_is(&mut self, kind: ObjectKind, hash: &Hash) -> Option<FoundObject> {
        // What cannot be read is asked for again where it is looked up, and then it is an error.
        self.ready(self.next_bytes..self.next_bytes.saturating_add(HEADER_BYTES)).ok()?;
        let (pack, map) = self.open.as_ref()?;
        let rest = map.get(self.next_bytes..)?;
        // The hash first: mostly that tells, and costs nothing.
        if rest.get(16..HEADER_BYTES) != Some(&hash.0) {
            return None;
        }
        let (pack, map) = (*pack, map.clone());
        let place = self.place(pack, self.next_bytes);
        let header = Header::read(&map[self.next_bytes..], place).ok().filter(|it| fits(it.kind, kind))?;
        self.ready(self.next_bytes..self.next_bytes.saturating_add(header.object_bytes())).ok()?;
        Some(FoundObject { map, pack, at: self.next_bytes, header, is_checked: Cell::new(false) })
    }

    /// The object after the last one if it is this and whole, else the one that the index knows.
    pub(super) fn next_or_find(&mut self, kind: ObjectKind, hash: &Hash) -> Result<FoundObject, StoreError> {
        self.shared.check_fork()?;
        match self.next_if_it_is(kind, hash).filter(|found| found.payload().is_ok()) {
            Some(found) => Ok(found),
            None => self.find(kind, hash),
        }
    }

    pub(super) fn find(&mut self, kind: ObjectKind, hash: &Hash) -> Result<FoundObject, StoreError> {
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

    /// The object at a place, whatever it is, if its header is in order. An error is no damage.
    pub(super) fn whatever_is_at(
        &mut self,
        Position { pack, offset_bytes }: Position,
    ) -> Result<Option<FoundObject>, StoreError> {
        let end_bytes = offset_bytes + HEADER_BYTES as u64;
        let open =
            self.open.as_ref().filter(|(number, map)| *number == pack && map.len() as u64 >= end_bytes);
        let map = match open {
            Some((_, map)) => map.clone(),
            None => {
                let Some(found) = self.shared.log.pack(pack) else { return Ok(None) };
                let map = found.bytes(end_bytes)?;
                self.open = Some((pack, map.clone()));
                map
            }
        };
        let Ok(at) = usize::try_from(offset_bytes) else { return Ok(None) };
        self.ready(at..at.saturating_add(HEADER_BYTES))?;
        let header = Header::read(map.get(at..).unwrap_or_default(), self.place(pack, at)).ok();
        if let Some(header) = &header {
            self.ready(at..at.saturating_add(header.object_bytes()))?;
        }
        Ok(header.map(|header| FoundObject { map, pack, at, header, is_checked: Cell::new(false) }))
    }

    /// The object at a place; none if gc has removed the pack.
    pub(super) fn at(
        &mut self,
        kind: ObjectKind,
        hash: &Hash,
        location: Location,
    ) -> Result<Option<FoundObject>, StoreError> {
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
        self.ready(at..usize_of(location.end_bytes()))?;
        let place = self.place(location.pack, at);
        let header = Header::read(map.get(at..).unwrap_or_default(), place).map_err(damaged)?;
        if header.hash != *hash || !fits(header.kind, kind) {
            return Err(damaged("another object is in its place"));
        }
        // The index may be wrong about how long it is.
        self.ready(at..at.saturating_add(header.object_bytes()))?;
        Ok(Some(FoundObject { map, pack: location.pack, at, header, is_checked: Cell::new(false) }))
    }
}

/// Whether an object of the kind `found` may stand for one of the kind `wanted`: within a tree of the
/// index an object is known by its bytes alone, and two of different kinds may have the same.
fn fits(found: ObjectKind, wanted: ObjectKind) -> bool {
    (found == ObjectKind::Region) == (wanted == ObjectKind::Region)
}
