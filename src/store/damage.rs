//! What is known of damage in a store. The index remembers it beyond the closing.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use super::index::Index;

/// What is known of damage in an open store.
pub(super) struct Damage {
    /// Whether some was found. Then captures look up also what their parent has.
    known: AtomicBool,
    /// How often some was found since the store was opened.
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

    /// Some was found.
    pub(super) fn found(&self, index: &Index) {
        self.findings.fetch_add(1, Ordering::Relaxed);
        self.set_known(true, index);
    }

    /// There is none, unless some was found after `findings_before`.
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
