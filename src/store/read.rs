//! Reads objects and verifies them.

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

/// How thoroughly regions are verified when they are read. The lengths and the checksum of the
/// stored bytes are always verified.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Check {
    /// Also the BLAKE3 hash of the plain bytes: the result is what was captured, bit for bit.
    #[default]
    Full,
    /// Only the CRC32C of the stored bytes.
    Checksum,
}

/// The greatest number of deltas between an object and bytes that are stored whole. There are at
/// most eight, or a few more if two captures stored the same bytes at the same time.
pub(crate) const MAX_DELTAS: usize = 16;

/// How much is decoded before it is hashed: sixteen regions of 16 KiB. That is how many are hashed
/// in parallel, and few enough to stay in the CPU's cache.
const BATCH_BYTES: usize = 256 << 10;

/// Reads objects of one store. It is fastest if objects that lie near one another are read one
/// after the other.
///
/// Regions are appended in address order, so the next region to read usually is the next object of
/// the pack. A reader looks there first, and asks the index only if it is not.
pub(crate) struct Reader<'a> {
    check: Check,
    objects: Cursor<'a>,
    /// A second cursor for the bases of deltas, which lie elsewhere, one after the other.
    bases: Cursor<'a>,
}

impl<'a> Reader<'a> {
    pub(crate) fn new(shared: &'a OpenStore, check: Check) -> Reader<'a> {
        let since = Since::now();
        Reader { check, objects: Cursor::new(shared, since), bases: Cursor::new(shared, since) }
    }

    /// Decodes a region into `plain`, all of which it fills.
    pub(crate) fn region(&mut self, hash: &Hash, plain: &mut [u8]) -> Result<(), StoreError> {
        let check = self.check;
        // If this object is damaged, another copy may have been stored since. Then the index refers
        // to that.
        if let Some(found) = self.objects.next_if_it_is(ObjectKind::Region, hash)
            && self.decode(&found, plain, check).is_ok()
        {
            return Ok(());
        }
        self.find_and(ObjectKind::Region, hash, |reader, found| reader.decode(found, plain, check))
    }

    /// Finds an object and reads it. If that fails and the index has the object elsewhere by then,
    /// it tries again: before gc drops a base, it stores the deltas that refer to it whole.
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

    /// Decodes consecutive regions into `plain`. Each has `region_bytes`; the last one may be
    /// shorter. Zeros are written only if `clear_zeros`: otherwise the target already has them.
    ///
    /// It decodes a batch at a time and hashes its regions in parallel while they are in the cache.
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
                // The region is read again alone: it may have been stored again elsewhere. If not,
                // this returns the error.
                self.region(&hashes[at], &mut plain[at * region_bytes..end])?;
            }
        }
        Ok(())
    }

    /// Decodes a region without comparing its plain bytes with the hash.
    fn region_unhashed(&mut self, hash: &Hash, plain: &mut [u8]) -> Result<(), StoreError> {
        let check = std::mem::replace(&mut self.check, Check::Checksum);
        let decoded = self.region(hash, plain);
        self.check = check;
        decoded
    }

    /// The plain bytes of an object. Empty for the all-zero hash.
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

    /// The attachment of a snapshot with this name.
    pub(crate) fn attachment(&mut self, record: &Record, name: &str) -> Result<Option<Vec<u8>>, StoreError> {
        let found = record.attachments.iter().find(|attachment| attachment.name == name);
        found.map(|attachment| self.object(ObjectKind::Attachment, &attachment.hash)).transpose()
    }

    /// The root of a snapshot that has `expected` tables.
    pub(crate) fn root(&mut self, hash: &Hash, expected: usize) -> Result<Root, StoreError> {
        let kind = ObjectKind::Root;
        let malformed = |detail| StoreError::Malformed { kind, hash: *hash, detail };
        if hash.is_zero() {
            // A damaged layout may claim any number of tables, all of zeros.
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

    /// The hashes in a table, which must have `expected` of them.
    pub(crate) fn hashes(
        &mut self,
        kind: ObjectKind,
        hash: &Hash,
        expected: usize,
    ) -> Result<Vec<Hash>, StoreError> {
        let malformed = |detail| StoreError::Malformed { kind, hash: *hash, detail };
        if hash.is_zero() {
            // No table has more.
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

    /// The base for a delta that replaces the object `like`: its hash, the number of the delta, and
    /// the stored size of the whole object under it. `plain` receives its bytes. `None` if the
    /// replacement should be stored whole.
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
            // Fresh zeros: they take no memory until they are accessed.
            false => *plain = vec![0; plain_bytes],
        }
        let whole_bytes = self.fill(&found, plain, 0)?;
        Ok(Some((found.header.hash, number, whole_bytes)))
    }

    /// Verifies the object at a known place, including its hash. Returns `false` if the object is
    /// not there: gc may have moved it.
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

    /// The hash of the delta at a known place and that of its base. `None` if it is damaged, or not
    /// a delta.
    pub(crate) fn delta_at(&mut self, at: Position) -> Result<Option<(Hash, Hash)>, StoreError> {
        let found = self.objects.whatever_is_at(at)?.filter(FoundObject::is_delta);
        Ok(found.and_then(|found| Some((found.header.hash, found.base().ok()?))))
    }

    /// Whether an object leads to bytes that are stored whole, through any number of deltas.
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

    /// Whether the object at a place passes its checks.
    pub(crate) fn is_whole_at(&mut self, location: Location) -> Result<bool, StoreError> {
        let pack = self.objects.shared.log.pack(location.pack);
        if pack.is_none_or(|pack| pack.length_bytes() < location.end_bytes()) {
            return Ok(false);
        }
        let found = self.objects.whatever_is_at(location.into())?;
        Ok(found.is_some_and(|found| found.payload().is_ok()))
    }

    /// The kind of the object at a place, according to its header.
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

    /// Decodes an object that was reached through this many deltas. Returns the stored size of the
    /// whole object under it.
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

    /// Fills `plain` with the bytes of a base, truncated or extended with zeros.
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

/// Sets bytes to zero without writing pages that are zeros already.
fn clear(bytes: &mut [u8]) {
    bytes.chunks_mut(4096).filter(|page| !region::is_zero(page)).for_each(|page| page.fill(0));
}
