//! An address space: the ordered mappings of a process, which are also its stored layout.
//!
//! The *image* of an address space is what a restore writes: the bytes of all captured mappings,
//! one after another in address order, without the gaps between them. A memory file or a byte slice
//! is one mapping from address 0; there, image and source are the same bytes.

use serde::de::{Deserializer, Error, SeqAccess, Visitor};
use serde::{Deserialize, Serialize};

use crate::ranges::Ranges;
use crate::units::{AddressRange, RegionSize};

/// The permissions of a mapping's memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Protection {
    /// It can be read.
    pub read: bool,
    /// It can be written.
    pub write: bool,
    /// It can be executed.
    pub execute: bool,
    /// Writes are shared with other mappings of the same object.
    pub shared: bool,
}

impl Protection {
    /// Readable, writable, private: ordinary memory.
    pub const READ_WRITE: Protection = Protection { read: true, write: true, execute: false, shared: false };
}

impl std::fmt::Display for Protection {
    /// As in `/proc/PID/maps`: `rw-p`.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let flag = |set, letter| if set { letter } else { '-' };
        write!(
            f,
            "{}{}{}{}",
            flag(self.read, 'r'),
            flag(self.write, 'w'),
            flag(self.execute, 'x'),
            if self.shared { 's' } else { 'p' }
        )
    }
}

/// The kind of a mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[non_exhaustive]
pub enum MappingKind {
    /// Memory without a file behind it.
    Anonymous,
    /// A file, including libraries and executables.
    File,
    /// The heap of a Linux process.
    Heap,
    /// The stack of a Linux process.
    Stack,
    /// A mapping that the kernel provides: `[vdso]`, `[vvar]`, `[vsyscall]`.
    Kernel,
    /// A device's memory.
    Device,
    /// The whole memory of one object: a memory file, a byte slice, a Wasm linear memory.
    Image,
}

impl MappingKind {
    /// Its name in lower case, as the command prints it.
    pub fn name(self) -> &'static str {
        match self {
            MappingKind::Anonymous => "anonymous",
            MappingKind::File => "file",
            MappingKind::Heap => "heap",
            MappingKind::Stack => "stack",
            MappingKind::Kernel => "kernel",
            MappingKind::Device => "device",
            MappingKind::Image => "image",
        }
    }
}

/// One mapping of an address space.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mapping {
    /// The addresses that it covers.
    pub range: AddressRange,
    /// Its permissions.
    pub protection: Protection,
    /// Its kind.
    pub kind: MappingKind,
    /// The file behind it, or the kernel's name for it; empty if it has none.
    pub name: String,
    /// The offset in the file at which it begins, in bytes.
    pub file_offset_bytes: u64,
    /// Whether its bytes are part of the snapshot. A mapping that cannot be read (a device) is
    /// recorded but not captured. The same applies to the unpopulated parts of a private mapping
    /// without read permission: such a mapping is split.
    pub captured: bool,
}

/// The ordered mappings of a process, and the ranges whose bytes were left out.
///
/// ```
/// use stillframe::address_space::AddressSpace;
/// let space = AddressSpace::image("linear memory", 65_536);
/// assert_eq!(space.mappings()[0].range, "0..65536".parse()?);
/// assert_eq!(space.image_bytes(), 65_536);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "StoredAddressSpace")]
pub struct AddressSpace {
    mappings: Vec<Mapping>,
    excluded: Vec<AddressRange>,
    unreadable: Vec<AddressRange>,
}

/// What may be an address space. It must be checked, because stored bytes can hold anything.
#[derive(Deserialize)]
struct StoredAddressSpace {
    #[serde(deserialize_with = "mappings")]
    mappings: Vec<Mapping>,
    excluded: Vec<AddressRange>,
    unreadable: Vec<AddressRange>,
}

/// The stored mappings, if there are not too many: a mapping without a name takes a tenth of its
/// memory size on the disk, and far less where it is compressed.
fn mappings<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<Mapping>, D::Error> {
    struct Mappings;

    impl<'de> Visitor<'de> for Mappings {
        type Value = Vec<Mapping>;

        fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            write!(f, "at most {} mappings", AddressSpace::MAX_MAPPINGS)
        }

        fn visit_seq<A: SeqAccess<'de>>(self, mut stored: A) -> Result<Self::Value, A::Error> {
            let mut mappings = Vec::new();
            if let Some(found) = stored.size_hint().filter(|found| *found > AddressSpace::MAX_MAPPINGS) {
                return Err(Error::invalid_length(found, &self));
            }
            while let Some(mapping) = stored.next_element()? {
                if mappings.len() == AddressSpace::MAX_MAPPINGS {
                    return Err(Error::invalid_length(mappings.len() + 1, &self));
                }
                mappings.push(mapping);
            }
            Ok(mappings)
        }
    }
    from.deserialize_seq(Mappings)
}

impl TryFrom<StoredAddressSpace> for AddressSpace {
    type Error = AddressSpaceError;
    fn try_from(stored: StoredAddressSpace) -> Result<Self, AddressSpaceError> {
        let StoredAddressSpace { mappings, excluded, unreadable } = stored;
        Ok(AddressSpace { excluded, unreadable, ..AddressSpace::new(mappings)? })
    }
}

impl AddressSpace {
    /// The greatest number of mappings in a snapshot. The kernel's default limit for a process is
    /// 65,530.
    pub const MAX_MAPPINGS: usize = 1 << 20;

    /// The address space of these mappings; an error unless they are in address order and disjoint.
    pub fn new(mappings: Vec<Mapping>) -> Result<Self, AddressSpaceError> {
        for pair in mappings.windows(2) {
            if pair[0].range.end() > pair[1].range.start() {
                return Err(AddressSpaceError { first: pair[0].range, second: pair[1].range });
            }
        }
        Ok(AddressSpace { mappings, excluded: Vec::new(), unreadable: Vec::new() })
    }

    /// One mapping of `length_bytes` from address 0; no mapping at all if the length is 0.
    pub fn image(name: impl Into<String>, length_bytes: u64) -> Self {
        let mappings = AddressRange::with_length(0, length_bytes).ok().map(|range| Mapping {
            range,
            protection: Protection::READ_WRITE,
            kind: MappingKind::Image,
            name: name.into(),
            file_offset_bytes: 0,
            captured: true,
        });
        AddressSpace { mappings: mappings.into_iter().collect(), ..Self::default() }
    }

    /// The mappings, in address order.
    pub fn mappings(&self) -> &[Mapping] {
        &self.mappings
    }

    /// The ranges that the caller excluded, sorted and merged. These bytes read as zeros.
    pub fn excluded(&self) -> &[AddressRange] {
        &self.excluded
    }

    /// The ranges inside captured mappings that could not be read, sorted and merged. These bytes
    /// read as zeros.
    pub fn unreadable(&self) -> &[AddressRange] {
        &self.unreadable
    }

    /// Excludes `ranges`; those outside every mapping have no effect.
    pub(crate) fn exclude(&mut self, ranges: &[AddressRange]) {
        let all: Ranges = self.excluded.iter().chain(ranges).copied().collect();
        self.excluded = all.addresses().collect();
    }

    /// Records that `ranges` could not be read.
    pub(crate) fn set_unreadable(&mut self, ranges: impl IntoIterator<Item = AddressRange>) {
        let all: Ranges = ranges.into_iter().collect();
        self.unreadable = all.addresses().collect();
    }

    /// The captured mappings, each with the position of its first byte in the image.
    pub fn captured(&self) -> impl Iterator<Item = (u64, &Mapping)> {
        self.mappings.iter().filter(|mapping| mapping.captured).scan(0u64, |next_bytes, mapping| {
            let offset_bytes = *next_bytes;
            *next_bytes += mapping.range.length_bytes();
            Some((offset_bytes, mapping))
        })
    }

    /// The size of the image: all captured mappings together.
    pub fn image_bytes(&self) -> u64 {
        self.captured().map(|(_, mapping)| mapping.range.length_bytes()).sum()
    }

    /// How many regions of `region_size` cover the captured mappings.
    pub fn regions(&self, region_size: RegionSize) -> u64 {
        self.captured().map(|(_, mapping)| region_size.regions_in(mapping.range.length_bytes())).sum()
    }
}

/// Two mappings that overlap or are in the wrong order.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("mappings must be in address order and apart, found {first} before {second}")]
pub struct AddressSpaceError {
    /// The mapping that comes first in the list.
    pub first: AddressRange,
    /// The one after it.
    pub second: AddressRange,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(start: u64, end: u64) -> AddressRange {
        AddressRange::new(start, end).unwrap()
    }

    #[test]
    fn mappings_that_overlap_are_refused() {
        let mut mappings = AddressSpace::image("a", 100).mappings;
        mappings.push(Mapping { range: range(99, 200), ..mappings[0].clone() });
        assert!(AddressSpace::new(mappings).is_err());
    }

    #[test]
    fn mappings_that_overlap_in_stored_bytes_are_refused() {
        let stored = |second: AddressRange| {
            let mut space = AddressSpace::image("a", 1 << 63);
            space.mappings.push(Mapping { range: second, ..space.mappings[0].clone() });
            crate::record::encode(&space).unwrap()
        };
        let apart = stored(range(1 << 63, u64::MAX));
        assert_eq!(crate::record::decode::<AddressSpace>(&apart).unwrap().image_bytes(), u64::MAX);
        // The sum of their lengths overflows.
        for overlapping in [range(0, u64::MAX), range((1 << 63) - 1, u64::MAX), range(0, 1)] {
            let error = crate::record::decode::<AddressSpace>(&stored(overlapping)).unwrap_err();
            assert!(error.to_string().contains("in address order and apart"), "{error}");
        }
    }

    #[test]
    fn a_layout_of_too_many_mappings_is_refused_by_name() {
        let stored = |count: u64| {
            let one = AddressSpace::image("", 1).mappings.remove(0);
            let mappings = (0..count).map(|at| Mapping { range: range(at, at + 1), ..one.clone() }).collect();
            crate::record::encode(&AddressSpace::new(mappings).unwrap()).unwrap()
        };
        let most = AddressSpace::MAX_MAPPINGS as u64;
        assert!(crate::record::decode::<AddressSpace>(&stored(most)).is_ok());
        let error = crate::record::decode::<AddressSpace>(&stored(most + 1)).unwrap_err().to_string();
        assert!(error.contains("at most 1048576 mappings"), "{error}");
    }

    #[test]
    fn the_image_skips_what_is_not_captured() {
        let all = AddressSpace::image("a", 100).mappings.remove(0);
        let space = AddressSpace::new(vec![
            Mapping { range: range(10, 20), ..all.clone() },
            Mapping { range: range(20, 50), captured: false, ..all.clone() },
            Mapping { range: range(60, 65), ..all },
        ])
        .unwrap();
        let placed: Vec<_> = space.captured().map(|(offset, mapping)| (offset, mapping.range)).collect();
        assert_eq!(placed, [(0, range(10, 20)), (10, range(60, 65))]);
        assert_eq!(space.image_bytes(), 15);
    }

    #[test]
    fn excluded_ranges_are_sorted_and_merged() {
        let mut space = AddressSpace::image("a", 100);
        space.exclude(&[range(50, 60), range(10, 20), range(20, 30), range(55, 58)]);
        assert_eq!(space.excluded(), [range(10, 30), range(50, 60)]);
    }
}
