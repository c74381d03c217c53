//! The size at which a pack is sealed and another one is begun.

use std::path::Path;

/// The size at which a pack is sealed. It is large enough that a terabyte takes a few thousand
/// files, and small enough that gc rewrites a pack in about a second.
const SEAL_BYTES: u64 = 256 << 20;

/// The size at which a pack at this path, or in this directory, is sealed.
pub(crate) fn seal_bytes(path: &Path) -> u64 {
    #[cfg(feature = "fault-injection")]
    if let Some(bytes) = earlier::of(path) {
        return bytes;
    }
    let _ = path;
    SEAL_BYTES
}

#[cfg(feature = "fault-injection")]
pub use earlier::{Sealing, seal_packs_at};

/// Seals packs earlier, so that a test has many of them.
#[cfg(feature = "fault-injection")]
mod earlier {
    use crate::sync::RwLock;
    use std::path::{Path, PathBuf};

    static SEALINGS: RwLock<Vec<(PathBuf, u64)>> = RwLock::new(Vec::new());

    /// Packs below a directory are sealed at another size until this is dropped.
    #[derive(Debug)]
    pub struct Sealing {
        root: PathBuf,
    }

    /// Seals the packs of all stores below a directory at this size.
    pub fn seal_packs_at(root: impl Into<PathBuf>, bytes: u64) -> Sealing {
        let root = root.into();
        let mut sealings = SEALINGS.write();
        sealings.push((root.clone(), bytes));
        Sealing { root }
    }

    impl Drop for Sealing {
        fn drop(&mut self) {
            let mut sealings = SEALINGS.write();
            if let Some(at) = sealings.iter().position(|(root, _)| *root == self.root) {
                sealings.swap_remove(at);
            }
        }
    }

    /// The size that is set for a file, if any.
    pub(super) fn of(path: &Path) -> Option<u64> {
        let sealings = SEALINGS.read();
        sealings.iter().find(|(root, _)| path.starts_with(root)).map(|(_, bytes)| *bytes)
    }
}
