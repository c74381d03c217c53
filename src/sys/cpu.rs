//! What the processor reports about itself.

/// The layout of the extended registers of `features` in the notes of core dumps and of ptrace
/// (`NT_X86_XSTATE`), in the form that the kernel writes into its core dumps as note 0x205. For
/// each feature except the first two, whose place never changes, it holds four little-endian 32-bit
/// numbers: the feature's number, its size, its offset, and 0. It is empty on machines other than
/// x86-64.
///
/// `features` are the bits of XCR0 under which the registers were saved; byte 464 of the registers
/// holds them.
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
        // Bit 0 of the third number marks a feature that only the kernel uses; no such note has it.
        let is_there = answer.eax != 0 && answer.ecx & 1 == 0;
        is_there.then_some([feature, answer.eax, answer.ebx, 0])
    };
    let features = (2..63).filter(|feature| features & (1 << feature) != 0);
    features.filter_map(of_feature).flatten().flat_map(u32::to_le_bytes).collect()
}

/// See above.
#[cfg(not(target_arch = "x86_64"))]
pub(crate) fn register_layout(_features: u64) -> Vec<u8> {
    Vec::new()
}
