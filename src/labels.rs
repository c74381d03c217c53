//! The labels of a snapshot: setting them, and what they may be.

use std::collections::BTreeMap;

use crate::error::Error;
use crate::record::SnapshotId;
use crate::snapshot::Snapshot;
use crate::store::Store;
use crate::store::catalog::Labels;
use crate::store::error::StoreError;
use crate::text::{is_control, shorten};

/// Keys are at most this long.
const MAX_KEY_BYTES: usize = 255;

/// Values are at most this long.
const MAX_VALUE_BYTES: usize = 4096;

impl Store {
    /// Sets one label of a snapshot.
    ///
    /// # Errors
    ///
    /// As [`change_labels`](Self::change_labels).
    pub fn set_label(
        &self,
        id: SnapshotId,
        key: impl Into<String>,
        value: impl Into<String>,
    ) -> Result<Snapshot<'_>, Error> {
        self.change_labels(id, &[(key.into(), Some(value.into()))])
    }

    /// Removes one label of a snapshot, if it has it.
    ///
    /// # Errors
    ///
    /// As [`change_labels`](Self::change_labels).
    pub fn remove_label(&self, id: SnapshotId, key: impl Into<String>) -> Result<Snapshot<'_>, Error> {
        self.change_labels(id, &[(key.into(), None)])
    }

    /// Sets and removes labels of a snapshot in one step; a value of `None` removes the label.
    ///
    /// # Errors
    ///
    /// [`StoreError::NoSuchSnapshot`], [`StoreError::BadLabel`], or that the store cannot be written.
    pub fn change_labels(
        &self,
        id: SnapshotId,
        changes: &[(String, Option<String>)],
    ) -> Result<Snapshot<'_>, Error> {
        self.shared().check_writable()?;
        // Held over reading and writing, so that two calls do not undo one another.
        let _lane = self.shared().lane("\0labels");
        let mut labels = self.snapshot(id)?.labels().clone();
        let (set, removed): (BTreeMap<_, _>, Vec<_>) =
            changes.iter().fold((BTreeMap::new(), Vec::new()), |(mut set, mut removed), (key, value)| {
                match value {
                    Some(value) => drop(set.insert(key.clone(), value.clone())),
                    None => removed.push(key),
                }
                (set, removed)
            });
        check_labels(&set)?;
        labels.retain(|key, _| !removed.contains(&key));
        labels.extend(set);
        self.shared().commit_labels(id, labels)?;
        self.snapshot(id)
    }
}

/// An error unless a snapshot can have these labels.
pub(crate) fn check_labels(labels: &Labels) -> Result<(), StoreError> {
    for (key, value) in labels {
        let why = if key.is_empty() {
            "its key is empty"
        } else if key.contains('=') {
            "its key has a = in it"
        } else if key.len() > MAX_KEY_BYTES || value.len() > MAX_VALUE_BYTES {
            "its key is longer than 255 bytes or its value than 4096"
        } else if key.contains(is_control) || value.contains(is_control) {
            "it has a line break or another control character in it"
        } else {
            continue;
        };
        return Err(StoreError::BadLabel { shown: shorten(&format!("{key}={value}")), why });
    }
    Ok(())
}
