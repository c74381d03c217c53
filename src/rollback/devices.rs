//! Resources of a process that the kernel or a device uses concurrently: virtual processors, rings,
//! device memory.
//!
//! Half of their state is in the memory of the process, which is rolled back; the other half is in
//! the kernel, which is not. Afterwards the halves do not match: a guest's processor continues in
//! memory of another moment, and a ring's entries are consumed twice or never.

use super::attempt::Attempt;
use crate::address_space::{Mapping, MappingKind};
use crate::error::RollbackError;
use crate::source::Frozen as _;

/// The advice for the user.
const ADVICE: &str = "--leave-devices rolls back the rest and leaves it as it is";

/// Kernel objects behind descriptors whose state belongs to the memory: the beginnings of their
/// names, and what they are.
const OPEN_FILES: [(&[u8], &str); 3] = [
    (b"anon_inode:kvm-vcpu", "virtual processors (KVM), whose registers the kernel has"),
    (b"anon_inode:[io_uring]", "an io_uring, whose rings the kernel works with"),
    (b"/dev/vfio/", "a device of its own (VFIO), which writes to its memory"),
];

/// An error that names such resources, unless the user allows them to stay as they are.
pub(super) fn check(attempt: &Attempt<'_>) -> Result<(), RollbackError> {
    if attempt.rollback.leave_devices {
        return Ok(());
    }
    let now = attempt.held.address_space().mappings().iter();
    let mapped = now.filter(|it| is_written_by_others(it)).map(|it| {
        format!(
            "it has mapped {} ({} {}), which the kernel or a device writes too",
            it.range, it.protection, it.name
        )
    });
    let mut differences: Vec<String> = mapped.collect();
    for descriptor in attempt.held.descriptors().map_or(&[][..], |it| &it.0) {
        let known = OPEN_FILES.iter().find(|(name, _)| descriptor.target.starts_with(name));
        if let Some((_, what)) = known {
            differences.push(format!("descriptor {} is {what}", descriptor.number));
        }
    }
    match differences.is_empty() {
        true => Ok(()),
        false => Err(attempt.misfit_but_for(differences, ADVICE)),
    }
}

fn is_written_by_others(mapping: &Mapping) -> bool {
    mapping.kind == MappingKind::Device && mapping.protection.shared && mapping.protection.write
}
