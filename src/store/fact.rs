//! What an object in a pack says to the catalog: records, notes and tombstones do, all others are for the index.

use super::catalog::{Entry, Fact};
use super::held::Held;
use super::packs::location::Location;
use super::packs::object::{Header, ObjectKind};
use crate::codec;
use crate::hash::Hash;
use crate::record::{self, Note, Record, SnapshotId, Tombstone};

/// What an object says to the catalog, if it is of a kind that does.
pub(crate) fn read(header: &Header, payload: &[u8], location: Location) -> Result<Option<Fact>, String> {
    if !matches!(header.kind, ObjectKind::Record | ObjectKind::Note | ObjectKind::Tombstone) {
        return Ok(None);
    }
    let mut plain = vec![0; header.plain_bytes as usize];
    codec::decode(header.encoding, payload, &mut plain).map_err(|error| error.to_string())?;
    if Hash::of(&plain) != header.hash {
        return Err("its bytes do not match its hash".to_owned());
    }
    let text = |error: record::RecordError| error.to_string();
    Ok(Some(match header.kind {
        ObjectKind::Record => {
            let held = Held::read(&plain).map_err(text)?;
            Fact::Snapshot(SnapshotId(header.hash), Box::new(Entry::new(held, location)))
        }
        ObjectKind::Note => Fact::Note(record::decode::<Note>(&plain).map_err(text)?, location),
        _ => Fact::Tombstone(record::decode::<Tombstone>(&plain).map_err(text)?.snapshot, location),
    }))
}

/// The snapshot that a record, note or tombstone is about; `None` for what says nothing of the kind.
pub(crate) fn subject(header: &Header, payload: &[u8]) -> Option<SnapshotId> {
    let plain = || {
        let mut plain = vec![0; header.plain_bytes as usize];
        codec::decode(header.encoding, payload, &mut plain).ok()?;
        Some(plain)
    };
    match header.kind {
        ObjectKind::Record => {
            record::decode::<Record>(&plain()?).ok()?;
            Some(SnapshotId(header.hash))
        }
        ObjectKind::Note => Some(record::decode::<Note>(&plain()?).ok()?.snapshot),
        ObjectKind::Tombstone => Some(record::decode::<Tombstone>(&plain()?).ok()?.snapshot),
        _ => None,
    }
}
