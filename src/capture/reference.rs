//! The reference of a capture: the snapshot that memory is compared with.
//!
//! It is the parent or, for the first snapshot of a process, the newest snapshot of a similar
//! process. A region that equals the reference's region at the same place needs no look-up. A
//! region that differs is stored as the difference, if that is short.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use crate::address_space::{AddressSpace, Mapping, MappingKind, Protection};
use crate::hash::Hash;
use crate::record::{Origin, Record, SnapshotId};
use crate::root::{Root, RootPart};
use crate::source::{Attachment, OWNER_ATTACHMENT};
use crate::store::OpenStore;
use crate::store::error::StoreError;
use crate::store::held::Held;
use crate::store::pinned::Pinned;
use crate::store::read::{Check, Reader};
use crate::store::tables::Tables;
use crate::table;
use crate::track::RescanReason;

/// A snapshot that memory is compared with. gc leaves it alone so long.
pub(crate) struct Reference {
    pub(crate) id: SnapshotId,
    pub(crate) record: Arc<Record>,
    /// Its mappings and the hashes of their tables, if they can be read and compared.
    content: Option<(AddressSpace, Root)>,
    _pinned: Pinned,
}

/// A mapping of the reference; an empty one where it has none.
#[derive(Clone, Copy, Default)]
pub(crate) struct ReferenceMapping<'a> {
    /// The hashes of its tables.
    pub(crate) tables: RootPart<'a>,
    pub(crate) length_bytes: u64,
}

impl Reference {
    /// The newest snapshot of a process.
    pub(crate) fn newest_of(shared: &OpenStore, process: &str) -> Option<Reference> {
        loop {
            let id = shared.catalog().of_process(process).next_back()?;
            // If it was forgotten before it was pinned, another snapshot is now the newest.
            if let Ok(reference) = Reference::of(shared, id) {
                return Some(reference);
            }
        }
    }

    /// The newest snapshot whose memory came from the same executable, or from a file of the same
    /// name, and which has the same owner. The owner matters: bytes that one user forgets must not
    /// remain as the base of another user's delta.
    pub(crate) fn newest_like(
        shared: &OpenStore,
        origin: &Origin,
        attachments: &[Attachment],
    ) -> Option<Reference> {
        let owner = attachments.iter().find(|it| it.name == OWNER_ATTACHMENT).map(|it| Hash::of(&it.bytes));
        if owner.is_none() && matches!(origin, Origin::Core { .. }) {
            return None;
        }
        let has_same_owner = |record: &Record| {
            let theirs = record.attachments.iter().find(|it| it.name == OWNER_ATTACHMENT);
            theirs.map(|it| it.hash) == owner
        };
        let like = {
            let catalog = shared.catalog();
            // Snapshots that share the same bytes of origin have the same origin. So for 100,000
            // snapshots few origins are decoded.
            let mut looked_at: HashMap<*const [u8], bool> = HashMap::new();
            let mut is_like = |held: &Held| {
                let text = Arc::as_ptr(held.text());
                *looked_at.entry(text).or_insert_with(|| are_alike(&held.origin(), origin))
            };
            let like = catalog
                .all_live()
                .filter(|(_, entry)| is_like(entry.held()) && has_same_owner(&entry.record()));
            like.max_by_key(|(id, entry)| (entry.held().moment(), **id)).map(|(id, _)| *id)
        };
        Reference::of(shared, like?).ok()
    }

    /// The snapshot `id`. Fails with [`StoreError::NoSuchSnapshot`].
    pub(crate) fn of(shared: &OpenStore, id: SnapshotId) -> Result<Reference, StoreError> {
        let pinned = shared.pin(id)?;
        let record = pinned.record().clone();
        let content = match Reference::read(shared, &record) {
            Ok(content) => content,
            Err(error) => {
                tracing::warn!("{id} cannot be compared with, all is looked up: {}", error.whole_story());
                None
            }
        };
        Ok(Reference { id, record, content, _pinned: pinned })
    }

    fn read(shared: &OpenStore, record: &Record) -> Result<Option<(AddressSpace, Root)>, StoreError> {
        if record.region_size != shared.format.region_size || shared.damage_known() {
            return Ok(None);
        }
        let tables = Tables::read(&mut Reader::new(shared, Check::Full), record)?;
        Ok(Some((tables.layout.space, tables.root)))
    }

    /// Its mappings and the hashes of their tables, if they can be read and compared.
    pub(crate) fn content(&self) -> Option<(&AddressSpace, &Root)> {
        self.content.as_ref().map(|(space, root)| (space, root))
    }

    /// For each mapping of `space` the reference's mapping in its place.
    ///
    /// That is the one that begins at the same address or, where the kernel puts them elsewhere
    /// each time, the one with the same number among those that are alike otherwise. With
    /// `at_same_address` it is the former alone.
    pub(crate) fn mappings_for<'s>(
        &'s self,
        space: &'s AddressSpace,
        at_same_address: bool,
    ) -> Vec<ReferenceMapping<'s>> {
        let mut by_start: HashMap<u64, (Traits<'_>, ReferenceMapping<'_>)> = HashMap::new();
        let mut by_traits: HashMap<Traits<'_>, Vec<ReferenceMapping<'_>>> = HashMap::new();
        for (own, mapping) in self.mappings() {
            by_start.insert(own.range.start(), (traits(own), mapping));
            by_traits.entry(traits(own)).or_default().push(mapping);
        }
        let mut seen: HashMap<Traits<'_>, usize> = HashMap::new();
        let mut in_its_place = |mapping: &'s Mapping| {
            let there = by_start.get(&mapping.range.start()).copied();
            if at_same_address {
                return there.map(|(_, there)| there);
            }
            let number = seen.entry(traits(mapping)).or_default();
            let alike = by_traits.get(&traits(mapping)).and_then(|alike| alike.get(*number).copied());
            *number += 1;
            match there {
                Some((theirs, there)) if theirs == traits(mapping) => Some(there),
                _ => alike.or(there.map(|(_, there)| there)),
            }
        };
        let mappings = space.mappings().iter();
        mappings.map(|it| it.captured.then(|| in_its_place(it)).flatten().unwrap_or_default()).collect()
    }

    /// Its captured mappings, if they can be read and compared.
    fn mappings(&self) -> impl Iterator<Item = (&Mapping, ReferenceMapping<'_>)> {
        let mut first = 0usize;
        self.content.iter().flat_map(|(space, root)| space.captured().map(move |(_, it)| (it, root))).map(
            move |(mapping, root)| {
                let length_bytes = mapping.range.length_bytes();
                let end = first.saturating_add(table::count_in(length_bytes, self.record.region_size));
                let tables = root.part(first..end);
                first = end;
                (mapping, ReferenceMapping { tables, length_bytes })
            },
        )
    }

    /// An error unless what is known to have changed since this snapshot is all that can differ
    /// from it.
    pub(crate) fn check_it_fits(&self, space: &AddressSpace, shared: &OpenStore) -> Result<(), RescanReason> {
        let Some((before, _)) = self.content.as_ref().filter(|_| !shared.damage_known()) else {
            return Err(RescanReason::ParentUnusable);
        };
        // What could not be read is zeros there, whatever it was.
        let unchanged = before.excluded() == space.excluded() && before.unreadable() == space.unreadable();
        // A mapping that became shorter may have cut a region; one that is gone is not missed.
        let lengths: HashMap<u64, u64> =
            space.captured().map(|(_, it)| (it.range.start(), it.range.length_bytes())).collect();
        let goes_on = |before: &Mapping| {
            lengths.get(&before.range.start()).is_some_and(|now| *now >= before.range.length_bytes())
        };
        match unchanged && before.captured().all(|(_, mapping)| goes_on(mapping)) {
            true => Ok(()),
            false => Err(RescanReason::OtherLayout),
        }
    }

    /// The hash of its layout, its root or its attachment with this name. The same object of the
    /// next snapshot may be stored as a difference from it.
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

    /// An upper limit of the bytes that were copied for it during the pause.
    pub(crate) fn copied_bytes(&self) -> usize {
        match self.record.origin {
            Origin::LiveProcess { .. } => {
                usize::try_from(self.record.memory_bytes.saturating_sub(self.record.zero_bytes))
                    .unwrap_or(usize::MAX)
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

/// Whether the memory of two origins is probably similar.
fn are_alike(a: &Origin, b: &Origin) -> bool {
    match (a, b) {
        (Origin::File { path: a }, Origin::File { path: b }) => a.file_name() == b.file_name(),
        _ => executable(a).is_some_and(|path| executable(b) == Some(path)),
    }
}

fn executable(origin: &Origin) -> Option<&Path> {
    match origin {
        Origin::LiveProcess { path: executable, .. } | Origin::Core { executable, .. } => {
            executable.as_deref()
        }
        _ => None,
    }
}
