//! The two trees of the index: regions, and all other objects.

use super::packs::location::Location;
use super::packs::object::{Header, ObjectKind};
use crate::hash::Hash;

/// Which tree an object is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Tree {
    Regions = 0,
    Objects = 1,
}

impl Tree {
    pub(crate) const ALL: [Tree; 2] = [Tree::Regions, Tree::Objects];

    /// The one with objects of this kind.
    pub(crate) fn of(kind: ObjectKind) -> Tree {
        if kind == ObjectKind::Region { Tree::Regions } else { Tree::Objects }
    }
}

/// An object and where it is.
pub(crate) type IndexEntry = (Tree, Hash, Location);

/// Which tree and hash an object is indexed by; `None` for what the catalog has.
pub(crate) fn indexed(header: &Header) -> Option<(Tree, Hash)> {
    let in_catalog = matches!(header.kind, ObjectKind::Record | ObjectKind::Note | ObjectKind::Tombstone);
    (!in_catalog).then(|| (Tree::of(header.kind), header.hash))
}
