//! How large a pack grows before another one is begun.

use std::path::Path;

/// A pack is sealed when it has grown to this: large enough that a terabyte is a few thousand
/// files, small enough that gc rewrites one in about a second.
const SEAL_BYTES: u64 = 256 << 20;

/// How large a pack at this path, or in this directory, grows before another one is begun.
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

/// Packs that are sealed earlier, so that a test sees many of them.
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

    /// Has the packs of all stores below a directory sealed when they have grown to so many bytes.
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

    /// What is set for a file, if anything is.
    pub(super) fn of(path: &Path) -> Option<u64> {
        let sealings = SEALINGS.read();
        sealings.iter().find(|(root, _)| path.starts_with(root)).map(|(_, bytes)| *bytes)
    }
}
