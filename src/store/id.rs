//! The identities of stores and of packs.

/// Identifies one store: a pack of another store has another id and is not mistaken for one of this
/// store.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct StoreId(pub(crate) [u8; 16]);

impl StoreId {
    /// A new id: a hash of the time, the pid and the address of a local variable.
    pub(crate) fn new() -> StoreId {
        let here = 0u8;
        let seed = format!("{} {} {:p}", jiff::Timestamp::now(), std::process::id(), &here);
        let mut id = [0; 16];
        id.copy_from_slice(&blake3::hash(seed.as_bytes()).as_bytes()[..16]);
        StoreId(id)
    }
}

/// Identifies the bytes of one pack. A pack's number may be used again after the pack is deleted;
/// its id is not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PackId(pub(crate) [u8; 16]);

impl PackId {
    /// A new id.
    pub(crate) fn new() -> PackId {
        PackId(StoreId::new().0)
    }
}

impl std::fmt::Display for StoreId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl std::fmt::Debug for StoreId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        std::fmt::Display::fmt(self, f)
    }
}
