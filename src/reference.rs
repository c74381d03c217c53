//! The reference of a capture: the snapshot that memory is compared with.
//!
//! That is the parent, or for the first snapshot of a process the newest one of a process like it.
//! A region equal to the reference's at the same place is not looked up; one that differs is stored as
//! the difference, if that is short.

use std::collections::HashMap;
use std::sync::Arc;

use crate::address_space::{AddressSpace, Mapping, MappingKind, Protection};
use crate::hash::Hash;
use crate::record::{Origin, Record, SnapshotId};
use crate::store::Shared;
use crate::store::error::StoreError;
use crate::store::gate::SnapshotGuard;
use crate::store::object::Kind;
use crate::store::read::{Check, Reader};
use crate::table;

/// A snapshot that memory is compared with. gc leaves it alone so long.
pub(crate) struct Reference {
    pub(crate) id: SnapshotId,
    pub(crate) record: Arc<Record>,
    /// Its mappings and the hashes of their tables, if they can be read and compared.
    content: Option<(AddressSpace, Vec<Hash>)>,
    _pin: SnapshotGuard,
}

impl Reference {
    /// The newest snapshot of a process.
    pub(crate) fn newest_of(shared: &Shared, process: &str) -> Option<Reference> {
        loop {
            let id = shared.catalog().of_process(process).next_back()?;
            // Forgotten before it was pinned? Then there is another newest one.
            if let Some(reference) = Reference::pin(shared, id) {
                return Some(reference);
            }
        }
    }

    /// The newest snapshot whose memory came from the same executable or from a file of the same name.
    pub(crate) fn newest_like(shared: &Shared, origin: &Origin) -> Option<Reference> {
        let like = {
            let catalog = shared.catalog();
            let like = catalog.all_live().filter(|(_, entry)| are_alike(&entry.record.origin, origin));
            like.max_by_key(|(_, entry)| entry.record.time).map(|(id, _)| *id)
        };
        Reference::pin(shared, like?)
    }

    fn pin(shared: &Shared, id: SnapshotId) -> Option<Reference> {
        let (record, pin) = shared.pin(id).ok()?;
        let content = match Reference::content(shared, &record) {
            Ok(content) => content,
            Err(error) => {
                tracing::warn!("{id} cannot be compared with, all is looked up: {}", error.whole_story());
                None
            }
        };
        Some(Reference { id, record, content, _pin: pin })
    }

    fn content(shared: &Shared, record: &Record) -> Result<Option<(AddressSpace, Vec<Hash>)>, StoreError> {
        if record.region_size != shared.format.region_size || shared.damage_known() {
            return Ok(None);
        }
        let mut reader = Reader::new(shared, Check::Full);
        let space: AddressSpace = reader.value(Kind::Layout, &record.layout)?;
        let tables = table::count(&space, record.region_size);
        let root = reader.hashes(Kind::Root, &record.root, tables)?;
        Ok(Some((space, root)))
    }

    /// For each mapping of `space` the hashes of the tables of the reference's mapping in its place.
    ///
    /// That is the one that begins at the same address or, where the kernel puts them elsewhere each
    /// time, the one with the same number among those that are alike otherwise.
    pub(crate) fn tables_for(&self, space: &AddressSpace) -> Vec<&[Hash]> {
        let Some((own, root)) = &self.content else { return vec![&[]; space.mappings().len()] };
        let mut by_start: HashMap<u64, (Traits<'_>, &[Hash])> = HashMap::new();
        let mut by_traits: HashMap<Traits<'_>, Vec<&[Hash]>> = HashMap::new();
        let mut rest = &root[..];
        for (_, mapping) in own.captured() {
            let count = table::count_in(mapping.range.length_bytes(), self.record.region_size);
            let (tables, after) = rest.split_at(count.min(rest.len()));
            rest = after;
            by_start.insert(mapping.range.start(), (traits(mapping), tables));
            by_traits.entry(traits(mapping)).or_default().push(tables);
        }
        let mut seen: HashMap<Traits<'_>, usize> = HashMap::new();
        let tables = space.mappings().iter().map(|mapping| {
            if !mapping.captured {
                return &[][..];
            }
            let traits = traits(mapping);
            let nth = seen.entry(traits).or_default();
            *nth += 1;
            let alike = by_traits.get(&traits).and_then(|alike| alike.get(*nth - 1));
            match by_start.get(&mapping.range.start()) {
                Some((theirs, tables)) if *theirs == traits || alike.is_none() => tables,
                _ => alike.copied().unwrap_or_default(),
            }
        });
        tables.collect()
    }

    /// The hash of its layout, its root and its attachment of this name: what those of the next
    /// snapshot may be stored as a difference from.
    pub(crate) fn attachment(&self, name: &str) -> Option<Hash> {
        self.content.as_ref()?;
        let attachments = &self.record.attachments;
        attachments.iter().find(|it| it.name == name && !it.hash.is_zero()).map(|it| it.hash)
    }

    pub(crate) fn layout(&self) -> Option<Hash> {
        self.content.as_ref().map(|_| self.record.layout)
    }

    pub(crate) fn root(&self) -> Option<Hash> {
        self.content.as_ref().map(|_| self.record.root).filter(|root| !root.is_zero())
    }

    /// How much had to be copied for it while its source stood still, at most.
    pub(crate) fn copied_bytes(&self) -> usize {
        match self.record.origin {
            Origin::Process { .. } => {
                usize::try_from(self.record.memory_bytes - self.record.zero_bytes).unwrap_or(usize::MAX)
            }
            _ => 0,
        }
    }
}

/// What a mapping is, apart from where it is and how long.
type Traits<'a> = (MappingKind, &'a str, Protection, u64);

fn traits(mapping: &Mapping) -> Traits<'_> {
    (mapping.kind, &mapping.name, mapping.protection, mapping.file_offset_bytes)
}

/// Whether memory of one origin is likely to be like that of the other.
fn are_alike(a: &Origin, b: &Origin) -> bool {
    match (a, b) {
        (Origin::Process { path: Some(a), .. }, Origin::Process { path: Some(b), .. }) => a == b,
        (Origin::File { path: a }, Origin::File { path: b }) => a.file_name() == b.file_name(),
        _ => false,
    }
}
