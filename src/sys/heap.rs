//! The heap of this process.

/// Gives memory back to the kernel that is free and that the allocator keeps. glibc does so by itself only at the top
/// of the heap of each thread, and what a database leaves of its cache, in heaps of many threads, comes to tens of
/// megabytes. Cost: some milliseconds for a hundred megabytes.
pub(crate) fn give_back() {
    #[cfg(target_env = "gnu")]
    // SAFETY: it takes no pointer, and any thread may call it at any time.
    unsafe {
        libc::malloc_trim(0);
    }
}
