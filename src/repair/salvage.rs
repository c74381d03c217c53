//! Salvage: whole objects are copied out of a file that should be a pack and has no header in order.

use std::sync::Arc;

use crate::gc::compact::{FactMove, KeepAll, objects_of, write};
use crate::store::OpenStore;
use crate::store::error::StoreError;
use crate::store::fact;
use crate::store::packs::header::{self, PackHeader};
use crate::store::packs::names;
use crate::store::packs::object::{self, ObjectKind};
use crate::store::packs::ready::ready;
use crate::store::tree::IndexEntry;
use crate::sys::dir::Name;
use crate::sys::file;
use crate::sys::map;
use crate::units::usize_of;

/// Copies the whole objects out of a file that should be a pack and has no usable header, and
/// takes them into the index. A file of another store has nothing to give. Returns the deltas that
/// [`OpenStore::resolve_with`] is to be told of.
pub(crate) fn salvage(shared: &OpenStore, name: &Name) -> Result<Vec<IndexEntry>, StoreError> {
    let failed = || StoreError::io("read", name);
    if name.look().map_err(failed())?.is_some_and(|found| !found.is_plain_file()) {
        return Ok(Vec::new());
    }
    let file = file::open_to_read(name).map_err(failed())?;
    let length_bytes = usize_of(file.length_bytes().map_err(failed())?);
    if length_bytes == 0 {
        return Ok(Vec::new());
    }
    let bytes = Arc::new(map::map_pack(&file, length_bytes).map_err(failed())?);
    ready(&bytes, 0..header::MAX_BYTES)?;
    let first = &bytes[..bytes.len().min(header::MAX_BYTES)];
    if PackHeader::parse(first).is_ok_and(|header| header.store != shared.format.id) {
        return Ok(Vec::new());
    }
    let number = name.name().to_str().and_then(names::number_of).unwrap_or(0);
    let Some(written) = write(shared, &[(number, bytes, 0)], Vec::new(), &KeepAll)? else {
        return Ok(Vec::new());
    };
    let pack = written.pack;
    shared.log.add(pack.clone());
    let index = shared.index();
    let bytes = pack.bytes(pack.length_bytes())?;
    let other_deltas = index.insert_found(objects_of(&pack, &bytes).collect::<Result<_, _>>()?)?;
    // Records first: notes and tombstones are about them.
    let (records, others): (Vec<_>, Vec<_>) =
        written.facts.into_iter().partition(|it| it.header.kind == ObjectKind::Record);
    for FactMove { header, snapshot, new, .. } in records.into_iter().chain(others) {
        let object =
            usize::try_from(new.offset_bytes).ok().and_then(|at| bytes.get(at..)).unwrap_or_default();
        // The header keeps the checksum of the old place, which the payload does not depend on.
        let payload =
            object.get(object::HEADER_BYTES..).and_then(|rest| rest.get(..header.stored_bytes as usize));
        let payload = payload.unwrap_or_default();
        if let Ok(Some(fact)) = fact::read(&header, payload, new) {
            shared.change_catalog(|catalog| catalog.apply(fact));
            shared.store_catalog_entry(snapshot);
        }
    }
    index.set_watermark(pack.number, Some(pack.watermark(pack.length_bytes())));
    index.save()?;
    Ok(other_deltas)
}
