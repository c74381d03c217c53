//! Memory that a process shares with others.

use super::plan::Plan;
use crate::address_space::Mapping;

/// Takes what is shared out of the plan. Answers which mappings are left although they differ.
pub(super) fn leave(plan: &mut Plan<'_>, mappings: &[Mapping]) -> Vec<Mapping> {
    let mut left: Vec<Mapping> = Vec::new();
    plan.patches.retain(|patch| match mapping_at(mappings, patch.at) {
        Some(mapping) if mapping.protection.shared => {
            if left.last() != Some(mapping) {
                left.push(mapping.clone());
            }
            false
        }
        _ => true,
    });
    left
}

/// The mapping that an address is in.
pub(super) fn mapping_at(mappings: &[Mapping], address: u64) -> Option<&Mapping> {
    let at = mappings.partition_point(|it| it.range.end() <= address);
    mappings.get(at).filter(|it| it.range.start() <= address)
}
