//! What a process has that the kernel or a device works with meanwhile: virtual processors, rings, memory of devices.
//!
//! Its state is half in the process, where it goes back, and half in the kernel, where it stays. After that the two
//! do not fit: a guest's processor runs on in memory of another moment, a ring's entries are taken twice or never.

use super::attempt::Attempt;
use crate::address_space::{Mapping, MappingKind};
use crate::error::RollbackError;
use crate::source::Frozen as _;

/// What the user is told to do.
const ADVICE: &str = "--leave-devices rolls back the rest and leaves it as it is";

/// Open files of the kernel with a state that belongs to the memory, and what they are. Their names begin so.
const OPEN_FILES: [(&[u8], &str); 3] = [
    (b"anon_inode:kvm-vcpu", "virtual processors (KVM), whose registers the kernel has"),
    (b"anon_inode:[io_uring]", "an io_uring, whose rings the kernel works with"),
    (b"/dev/vfio/", "a device of its own (VFIO), which writes to its memory"),
];

/// An error that names them, unless they may be left.
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
