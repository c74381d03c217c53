//! The two trees of the index: regions, and all other objects.

use super::packs::location::Location;
use super::packs::object::Kind;
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
    pub(crate) fn of(kind: Kind) -> Tree {
        if kind == Kind::Region { Tree::Regions } else { Tree::Objects }
    }
}

/// An object and where it is.
pub(crate) type IndexEntry = (Tree, Hash, Location);
