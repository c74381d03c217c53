//! What the processor says about itself.

/// How the extended registers of `features` lie in the notes of cores and of ptrace (`NT_X86_XSTATE`), as the kernel writes
/// it into its cores as the note 0x205: for each feature but the first two, whose place never changes, four
/// little-endian numbers of 32 bits: its number, its size, where it begins, and 0. Empty on other machines than x86-64.
///
/// `features` are the bits of XCR0 that the registers were taken with, which stand at byte 464 of them.
#[cfg(target_arch = "x86_64")]
pub(crate) fn register_layout(features: u64) -> Vec<u8> {
    use std::arch::x86_64::{__cpuid_count, __get_cpuid_max};
    const XSTATE_LEAF: u32 = 0xd;
    // Without this leaf there are no such registers.
    if __get_cpuid_max(0).0 < XSTATE_LEAF {
        return Vec::new();
    }
    let of_feature = |feature: u32| {
        let answer = __cpuid_count(XSTATE_LEAF, feature);
        // Bit 0 of the third: a feature of the kernel's alone, which is in no such note.
        let is_there = answer.eax != 0 && answer.ecx & 1 == 0;
        is_there.then_some([feature, answer.eax, answer.ebx, 0])
    };
    let features = (2..63).filter(|feature| features & (1 << feature) != 0);
    features.filter_map(of_feature).flatten().flat_map(u32::to_le_bytes).collect()
}

/// As above.
#[cfg(not(target_arch = "x86_64"))]
pub(crate) fn register_layout(_features: u64) -> Vec<u8> {
    Vec::new()
}
