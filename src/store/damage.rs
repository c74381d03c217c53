//! What is known about damage in a store. The index keeps it when the store is closed.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use super::index::Index;

/// What is known about damage in an open store.
pub(super) struct Damage {
    /// Whether damage was found. If so, captures also look up objects that their parent has.
    known: AtomicBool,
    /// How often damage was found since the store was opened.
    findings: AtomicU64,
}

impl Damage {
    pub(super) fn new(known: bool) -> Damage {
        Damage { known: AtomicBool::new(known), findings: AtomicU64::new(0) }
    }

    pub(super) fn is_known(&self) -> bool {
        self.known.load(Ordering::Relaxed)
    }

    pub(super) fn findings(&self) -> u64 {
        self.findings.load(Ordering::Relaxed)
    }

    /// Records that damage was found.
    pub(super) fn found(&self, index: &Index) {
        self.findings.fetch_add(1, Ordering::Relaxed);
        self.set_known(true, index);
    }

    /// Records that there is none, unless some was found after `findings_before`.
    pub(super) fn none_since(&self, findings_before: u64, index: &Index) {
        self.set_known(false, index);
        if self.findings() != findings_before {
            self.set_known(true, index);
        }
    }

    fn set_known(&self, known: bool, index: &Index) {
        self.known.store(known, Ordering::Relaxed);
        if let Err(error) = index.set_damage_known(known) {
            tracing::warn!("{error}");
        }
    }
}
