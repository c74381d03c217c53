//! The tables of a snapshot: its mappings, and the hash of each table with the place of it.
//!
//! ```text
//! record ─ layout ─> mappings ─> places of the tables ┐
//!        └ root ───> hashes of the tables ────────────┴─> (hash, place), in the order of the addresses
//! ```

use super::error::StoreError;
use super::packs::object::ObjectKind;
use super::read::Reader;
use crate::address_space::AddressSpace;
use crate::hash::Hash;
use crate::record::Record;
use crate::root::Root;
use crate::table::{Place, Places};

/// The mappings of a snapshot, and where their tables are.
#[derive(Default)]
pub(crate) struct Layout {
    pub(crate) space: AddressSpace,
    pub(crate) places: Places,
}

impl Layout {
    /// Reads the layout that a record names.
    pub(crate) fn read(reader: &mut Reader<'_>, record: &Record) -> Result<Layout, StoreError> {
        let space: AddressSpace = reader.value(ObjectKind::Layout, &record.layout)?;
        let places = Places::new(&space, record.region_size);
        Ok(Layout { space, places })
    }

    /// Reads the root that a record with this layout names.
    pub(crate) fn root(&self, reader: &mut Reader<'_>, record: &Record) -> Result<Root, StoreError> {
        reader.root(&record.root, self.places.count())
    }
}

/// The tables of a snapshot. The default is none.
#[derive(Default)]
pub(crate) struct Tables {
    pub(crate) layout: Layout,
    pub(crate) root: Root,
}

impl Tables {
    /// Reads the layout and the root that a record names.
    pub(crate) fn read(reader: &mut Reader<'_>, record: &Record) -> Result<Tables, StoreError> {
        let layout = Layout::read(reader, record)?;
        let root = layout.root(reader, record)?;
        Ok(Tables { layout, root })
    }

    /// The mappings.
    pub(crate) fn space(&self) -> &AddressSpace {
        &self.layout.space
    }

    /// The hash and the place of each table, in the order of the addresses.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (Hash, Place)> + '_ {
        self.root.places(&self.layout.places)
    }
}
