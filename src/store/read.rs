//! Reading objects back, checked.

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::cursor::{Cursor, FoundObject, TRIES};
use super::error::StoreError;
use super::open_store::OpenStore;
use super::packs::location::{Location, Position};
use super::packs::object::ObjectKind;
use super::tree::Tree;
use crate::codec;
use crate::delta;
use crate::hash::{self, Hash};
use crate::record::{self, Record};
use crate::region;
use crate::root::Root;
use crate::sys::map::Since;
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

/// How many differences may lie between an object and bytes that are stored whole. There are eight at
/// most, or a few more where two captures have stored the same bytes at once.
pub(crate) const MAX_DELTAS: usize = 16;

/// How much is decoded before it is hashed: sixteen regions of 16 KiB, which is how many are hashed side by
/// side, and little enough to stay in the cache.
const BATCH_BYTES: usize = 256 << 10;

/// Reads objects of one store, best those that lie near one another one after the other.
///
/// Regions are appended in the order of their addresses, so the next one wanted is mostly the next
/// one in the pack. A reader looks there first, and asks the index only if it is not.
pub(crate) struct Reader<'a> {
    check: Check,
    objects: Cursor<'a>,
    /// The bases of deltas, which follow one another elsewhere.
    bases: Cursor<'a>,
}

impl<'a> Reader<'a> {
    pub(crate) fn new(shared: &'a OpenStore, check: Check) -> Reader<'a> {
        let since = Since::now();
        Reader { check, objects: Cursor::new(shared, since), bases: Cursor::new(shared, since) }
    }

    /// Decodes a region into the whole of `plain`.
    pub(crate) fn region(&mut self, hash: &Hash, plain: &mut [u8]) -> Result<(), StoreError> {
        let check = self.check;
        // What damage left there may have been stored anew elsewhere: then the index knows better.
        if let Some(found) = self.objects.next_if_it_is(ObjectKind::Region, hash)
            && self.decode(&found, plain, check).is_ok()
        {
            return Ok(());
        }
        self.find_and(ObjectKind::Region, hash, |reader, found| reader.decode(found, plain, check))
    }

    /// Finds an object and reads it. Should that fail it is tried again where the index has it elsewhere by then: gc
    /// stores what stood on a base whole before it drops the base.
    fn find_and<T>(
        &mut self,
        kind: ObjectKind,
        hash: &Hash,
        mut read: impl FnMut(&mut Self, &FoundObject) -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        let mut tries = 0;
        loop {
            let found = self.objects.find(kind, hash)?;
            let error = match read(self, &found) {
                Err(error) if error.is_damage() && found.is_delta() => error,
                other => return other,
            };
            let now = self.objects.shared.locate(Tree::of(kind), hash)?.map(Position::from);
            let seen = Position { pack: found.pack, offset_bytes: found.at as u64 };
            tries += 1;
            if now.is_none() || now == Some(seen) || tries == TRIES {
                return Err(error);
            }
        }
    }

    /// Decodes regions that lie one after the other into `plain`, `region_bytes` each and the last one perhaps
    /// shorter. Zeros are written only if `clear_zeros`: else the target has them already.
    ///
    /// They are decoded a batch at a time and hashed side by side while they are in the cache.
    pub(crate) fn regions(
        &mut self,
        hashes: &[Hash],
        plain: &mut [u8],
        region_bytes: usize,
        clear_zeros: bool,
    ) -> Result<(), StoreError> {
        let batch = (BATCH_BYTES / region_bytes).max(1);
        for (hashes, plain) in hashes.chunks(batch).zip(plain.chunks_mut(batch * region_bytes)) {
            for (hash, plain) in hashes.iter().zip(plain.chunks_mut(region_bytes)) {
                match hash.is_zero() {
                    true if clear_zeros => plain.fill(0),
                    true => {}
                    false => self.region_unhashed(hash, plain)?,
                }
            }
            if self.check == Check::Checksum {
                continue;
            }
            let stored: Vec<usize> = (0..hashes.len()).filter(|at| !hashes[*at].is_zero()).collect();
            let cells: Vec<&[u8]> = plain.chunks(region_bytes).collect();
            let found = hash::many(&stored.iter().map(|at| cells[*at]).collect::<Vec<_>>());
            let is_wrong = |(at, found): &(usize, Hash)| hashes[*at] != *found;
            let wrong: Vec<usize> =
                stored.into_iter().zip(found).filter(is_wrong).map(|(at, _)| at).collect();
            for at in wrong {
                let end = plain.len().min((at + 1) * region_bytes);
                // Once more, by itself: it may have been stored anew elsewhere, and if not the error is told there.
                self.region(&hashes[at], &mut plain[at * region_bytes..end])?;
            }
        }
        Ok(())
    }

    /// Decodes a region, whatever its plain bytes are.
    fn region_unhashed(&mut self, hash: &Hash, plain: &mut [u8]) -> Result<(), StoreError> {
        let check = std::mem::replace(&mut self.check, Check::Checksum);
        let decoded = self.region(hash, plain);
        self.check = check;
        decoded
    }

    /// The plain bytes of an object; none for the all-zero hash.
    pub(crate) fn object(&mut self, kind: ObjectKind, hash: &Hash) -> Result<Vec<u8>, StoreError> {
        if hash.is_zero() {
            return Ok(Vec::new());
        }
        self.find_and(kind, hash, |reader, found| {
            let mut plain = vec![0; found.header.plain_bytes as usize];
            reader.decode(found, &mut plain, Check::Full)?;
            Ok(plain)
        })
    }

    /// What is kept beside the memory of a snapshot under this name.
    pub(crate) fn attachment(&mut self, record: &Record, name: &str) -> Result<Option<Vec<u8>>, StoreError> {
        let found = record.attachments.iter().find(|attachment| attachment.name == name);
        found.map(|attachment| self.object(ObjectKind::Attachment, &attachment.hash)).transpose()
    }

    /// The root of a snapshot of `expected` tables.
    pub(crate) fn root(&mut self, hash: &Hash, expected: usize) -> Result<Root, StoreError> {
        let kind = ObjectKind::Root;
        let malformed = |detail| StoreError::Malformed { kind, hash: *hash, detail };
        if hash.is_zero() {
            // A layout may claim any number of bytes, all of them zeros.
            let most = ObjectKind::MAX_PLAIN_BYTES / Hash::BYTES;
            return if expected <= most {
                Ok(Root::zeros(expected))
            } else {
                Err(malformed(format!("expected {expected} hashes, there are never more than {most}")))
            };
        }
        let bytes = self.object(kind, hash)?;
        Root::decode(&bytes, expected)
            .ok_or_else(|| malformed(format!("expected {expected} hashes, found {} bytes", bytes.len())))
    }

    /// The hashes in a table, of which there must be `expected`.
    pub(crate) fn hashes(
        &mut self,
        kind: ObjectKind,
        hash: &Hash,
        expected: usize,
    ) -> Result<Vec<Hash>, StoreError> {
        let malformed = |detail| StoreError::Malformed { kind, hash: *hash, detail };
        if hash.is_zero() {
            // A place has never more.
            let most = table::REGIONS_PER_TABLE;
            return if expected <= most {
                Ok(vec![Hash::ZERO; expected])
            } else {
                Err(malformed(format!("expected {expected} hashes, there are never more than {most}")))
            };
        }
        let bytes = self.object(kind, hash)?;
        table::decode(&bytes, expected)
            .ok_or_else(|| malformed(format!("expected {expected} hashes, found {} bytes", bytes.len())))
    }

    /// The value in an object.
    pub(crate) fn value<T: DeserializeOwned>(
        &mut self,
        kind: ObjectKind,
        hash: &Hash,
    ) -> Result<T, StoreError> {
        let bytes = self.object(kind, hash)?;
        record::decode(&bytes).map_err(|source| StoreError::Record { kind, source })
    }

    /// What is to replace the object `like` may be stored as a difference from this: its hash, the
    /// number of the delta, and how many bytes what both go back to takes. `plain` gets the bytes.
    /// None if it should be stored whole.
    pub(crate) fn base(
        &mut self,
        kind: ObjectKind,
        like: &Hash,
        plain: &mut Vec<u8>,
    ) -> Result<Option<(Hash, u8, u32)>, StoreError> {
        let mut found = self.objects.next_or_find(kind, like)?;
        self.objects.next_bytes = found.at + found.header.object_bytes();
        let Some((number, base_number)) = delta::next_number(found.number()?) else { return Ok(None) };
        for _ in 0..MAX_DELTAS {
            if !found.is_delta() || found.number()? <= base_number {
                break;
            }
            let base = found.base()?;
            found = self.bases.next_or_find(kind, &base)?;
        }
        let plain_bytes = found.header.plain_bytes as usize;
        plain.clear();
        match plain_bytes <= plain.capacity() {
            true => plain.resize(plain_bytes, 0),
            // Fresh zeros, which are no memory until they are touched.
            false => *plain = vec![0; plain_bytes],
        }
        let whole_bytes = self.fill(&found, plain, 0)?;
        Ok(Some((found.header.hash, number, whole_bytes)))
    }

    /// Checks an object that is at a known place, and its plain bytes against its hash.
    /// Says whether it was there to be checked: gc may have moved it meanwhile.
    pub(crate) fn check_at(
        &mut self,
        kind: ObjectKind,
        hash: &Hash,
        location: Location,
    ) -> Result<bool, StoreError> {
        let Some(found) = self.objects.at(kind, hash, location)? else { return Ok(false) };
        let mut plain = vec![0; found.header.plain_bytes as usize];
        self.decode(&found, &mut plain, Check::Full)?;
        Ok(true)
    }

    /// The hash of the delta at a known place and that of its base; `None` if it is damaged, or no delta.
    pub(crate) fn delta_at(&mut self, at: Position) -> Result<Option<(Hash, Hash)>, StoreError> {
        let found = self.objects.whatever_is_at(at)?.filter(FoundObject::is_delta);
        Ok(found.and_then(|found| Some((found.header.hash, found.base().ok()?))))
    }

    /// Whether there are bytes stored whole behind an object, however many differences lie between.
    pub(crate) fn is_resolvable(&mut self, tree: Tree, hash: &Hash) -> Result<bool, StoreError> {
        let mut hash = *hash;
        for _ in 0..MAX_DELTAS {
            let Some(location) = self.objects.shared.locate(tree, &hash)? else { return Ok(false) };
            if !location.is_delta() {
                return Ok(true);
            }
            match self.delta_at(location.into())? {
                Some((delta, base)) if delta == hash => hash = base,
                _ => return Ok(false),
            }
        }
        Ok(false)
    }

    /// Whether an object at a place is in order as far as its checks say.
    pub(crate) fn is_whole_at(&mut self, location: Location) -> Result<bool, StoreError> {
        let pack = self.objects.shared.log.pack(location.pack);
        if pack.is_none_or(|pack| pack.length_bytes() < location.end_bytes()) {
            return Ok(false);
        }
        let found = self.objects.whatever_is_at(location.into())?;
        Ok(found.is_some_and(|found| found.payload().is_ok()))
    }

    /// What kind of object its header says is at a place.
    pub(crate) fn kind_at(&mut self, at: Position) -> Result<Option<ObjectKind>, StoreError> {
        Ok(self.objects.whatever_is_at(at)?.map(|found| found.header.kind))
    }

    fn decode(&mut self, found: &FoundObject, plain: &mut [u8], check: Check) -> Result<(), StoreError> {
        self.objects.next_bytes = found.at + found.header.object_bytes();
        self.fill(found, plain, 0)?;
        if check == Check::Full && Hash::of(plain) != found.header.hash {
            return Err(found.damaged("its bytes do not match its hash"));
        }
        Ok(())
    }

    /// Decodes an object to which so many differences have led. Returns how many bytes that takes
    /// which is stored whole.
    fn fill(&mut self, found: &FoundObject, plain: &mut [u8], deltas: usize) -> Result<u32, StoreError> {
        let whole_bytes = if found.is_delta() {
            self.fill_from_base(found.header.kind, &found.base()?, plain, deltas + 1)
                .map_err(|error| error.of_base(&found.header))?
        } else {
            found.header.stored_bytes
        };
        let payload = found.payload()?;
        codec::decode(found.header.encoding, payload, plain).map_err(|error| found.damaged(error))?;
        Ok(whole_bytes)
    }

    /// Fills `plain` with the bytes of a base, cut or lengthened by zeros.
    fn fill_from_base(
        &mut self,
        kind: ObjectKind,
        base: &Hash,
        plain: &mut [u8],
        deltas: usize,
    ) -> Result<u32, StoreError> {
        let found = self.bases.next_or_find(kind, base)?;
        if deltas > MAX_DELTAS {
            return Err(found.damaged("too many differences lead to it"));
        }
        self.bases.next_bytes = found.at + found.header.object_bytes();
        let base_bytes = found.header.plain_bytes as usize;
        if base_bytes <= plain.len() {
            let (same, rest) = plain.split_at_mut(base_bytes);
            clear(rest);
            return self.fill(&found, same, deltas);
        }
        let mut whole = vec![0; base_bytes];
        let whole_bytes = self.fill(&found, &mut whole, deltas)?;
        plain.copy_from_slice(&whole[..plain.len()]);
        Ok(whole_bytes)
    }
}

/// Makes zeros of bytes, without touching memory that is zeros already.
fn clear(bytes: &mut [u8]) {
    bytes.chunks_mut(4096).filter(|page| !region::is_zero(page)).for_each(|page| page.fill(0));
}
