//! A block: some dozens of index entries in order of their hashes, in one value of the database.
//!
//! The common prefix of the hashes is stored once. A location has four numbers: the pack number
//! with the encoding in its lower 4 bits, the offset, the stored length and the plain length. For
//! each of the four, the block stores its least value once, and for each entry the difference from
//! it, in as many bytes as the block needs. So an entry of a large store takes 38 to 41 bytes, and
//! can still be found by binary search.
//!
//! ```text
//!  0       4        5        9         25
//!  +-------+--------+--------+---------+---------------+-------------+-------------+
//!  | count | shared | widths | least   | the common    | the rest of | the rest of |
//!  | u32   | u8     | 4 x u8 | 4 x u32 | prefix        | each hash   | each place  |
//!  +-------+--------+--------+---------+---------------+-------------+-------------+
//! ```
//!
//! An empty value is a block without entries.

use crate::hash::Hash;
use crate::store::packs::location::Location;

/// A location in bytes, or [`Location::GONE`].
pub(crate) type PackedLocation = [u8; Location::BYTES];

/// An entry as it is stored.
pub(crate) type Stored = (Hash, PackedLocation);

const HEAD_BYTES: usize = 25;

/// The four numbers of a location.
type Numbers = [u32; 4];

/// The encoding moves to the lower bits, so that close pack numbers stay close.
fn numbers(place: &PackedLocation) -> Numbers {
    let (words, _) = place.as_chunks::<4>();
    let mut numbers = [0; 4];
    for (number, word) in numbers.iter_mut().zip(words) {
        *number = u32::from_le_bytes(*word);
    }
    numbers[0] = numbers[0].rotate_left(4);
    numbers
}

fn place(mut numbers: Numbers) -> PackedLocation {
    numbers[0] = numbers[0].rotate_right(4);
    let mut place = [0; Location::BYTES];
    for (bytes, number) in place.as_chunks_mut::<4>().0.iter_mut().zip(numbers) {
        *bytes = number.to_le_bytes();
    }
    place
}

/// Writes entries, which are in order, to `out`, and replaces what it contained.
pub(crate) fn write(entries: &[Stored], out: &mut Vec<u8>) {
    out.clear();
    let ([(first, first_place), ..], [.., (last, _)]) = (entries, entries) else { return };
    let shared = first.0.iter().zip(&last.0).take_while(|(one, other)| one == other).count();
    let (mut least, mut most) = (numbers(first_place), numbers(first_place));
    for (_, place) in entries {
        for (at, number) in numbers(place).into_iter().enumerate() {
            least[at] = least[at].min(number);
            most[at] = most[at].max(number);
        }
    }
    let mut widths = [0u8; 4];
    for (at, width) in widths.iter_mut().enumerate() {
        let bits = u32::BITS - (most[at] - least[at]).leading_zeros();
        *width = bits.div_ceil(8).to_le_bytes()[0];
    }
    out.extend(u32::try_from(entries.len()).unwrap_or(u32::MAX).to_le_bytes());
    out.push(shared.to_le_bytes()[0]);
    out.extend(widths);
    out.extend(least.iter().flat_map(|number| number.to_le_bytes()));
    out.extend(&first.0[..shared]);
    entries.iter().for_each(|(hash, _)| out.extend(&hash.0[shared..]));
    for (_, place) in entries {
        for (at, number) in numbers(place).into_iter().enumerate() {
            out.extend(&(number - least[at]).to_le_bytes()[..usize::from(widths[at])]);
        }
    }
}

/// The bytes of a block. Their lengths are consistent.
pub(crate) struct Block<'a> {
    widths: [usize; 4],
    least: Numbers,
    shared: &'a [u8],
    /// For each of the `count` entries, the hash without the common prefix.
    hashes: &'a [u8],
    places: &'a [u8],
    count: usize,
}

impl<'a> Block<'a> {
    /// Parses these bytes. `None` if they are not a block.
    pub(crate) fn parse(bytes: &'a [u8]) -> Option<Block<'a>> {
        if bytes.is_empty() {
            let (widths, least) = ([0; 4], [0; 4]);
            return Some(Block { widths, least, shared: &[], hashes: &[], places: &[], count: 0 });
        }
        let (head, rest) = bytes.split_at_checked(HEAD_BYTES)?;
        let count = usize::try_from(u32::from_le_bytes([head[0], head[1], head[2], head[3]])).ok()?;
        let shared = usize::from(head[4]);
        let widths = [head[5], head[6], head[7], head[8]].map(usize::from);
        // Otherwise any number of entries would take no bytes at all.
        let are_apart = shared < Hash::BYTES || count == 1;
        if shared > Hash::BYTES || !are_apart || widths.iter().any(|width| *width > 4) {
            return None;
        }
        let mut least = [0; 4];
        for (number, bytes) in least.iter_mut().zip(head[9..].as_chunks::<4>().0) {
            *number = u32::from_le_bytes(*bytes);
        }
        let (shared, rest) = rest.split_at_checked(shared)?;
        let (hashes, places) = rest.split_at_checked(count * (Hash::BYTES - shared.len()))?;
        let whole = places.len() == count * widths.iter().sum::<usize>();
        whole.then_some(Block { widths, least, shared, hashes, places, count })
    }

    /// The hash of entry `at`, which exists, without the common prefix.
    fn rest(&self, at: usize) -> &'a [u8] {
        let width = Hash::BYTES - self.shared.len();
        &self.hashes[at * width..(at + 1) * width]
    }

    fn place(&self, at: usize) -> PackedLocation {
        let mut from = at * self.widths.iter().sum::<usize>();
        let mut numbers = self.least;
        for (number, width) in numbers.iter_mut().zip(self.widths) {
            let mut bytes = [0; 4];
            bytes[..width].copy_from_slice(&self.places[from..from + width]);
            *number = number.wrapping_add(u32::from_le_bytes(bytes));
            from += width;
        }
        place(numbers)
    }

    /// The location of an object, if it is in the block.
    pub(crate) fn find(&self, hash: &Hash) -> Option<PackedLocation> {
        let wanted = hash.0.strip_prefix(self.shared)?;
        let (mut low, mut high) = (0, self.count);
        while low < high {
            let middle = low.midpoint(high);
            match self.rest(middle).cmp(wanted) {
                std::cmp::Ordering::Less => low = middle + 1,
                std::cmp::Ordering::Equal => return Some(self.place(middle)),
                std::cmp::Ordering::Greater => high = middle,
            }
        }
        None
    }

    /// How many entries it has.
    pub(crate) fn entry_count(&self) -> u64 {
        self.count as u64
    }

    /// All entries in order.
    pub(crate) fn entries(&self) -> impl Iterator<Item = Stored> + '_ {
        (0..self.count).map(|at| {
            let mut hash = [0; Hash::BYTES];
            let (shared, rest) = hash.split_at_mut(self.shared.len());
            shared.copy_from_slice(self.shared);
            rest.copy_from_slice(self.rest(at));
            (Hash(hash), self.place(at))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn entries() -> impl Strategy<Value = Vec<Stored>> {
        let hash = (any::<[u8; 32]>(), 0usize..33).prop_map(|(mut bytes, same)| {
            bytes[..same].fill(7);
            Hash(bytes)
        });
        let place = prop_oneof![
            Just(Location::GONE),
            any::<PackedLocation>(),
            (0u8..9).prop_map(|low| [1, 0, 0, 0x10, low, 2, 0, 0, low, 0, 0, 0, 0, 0x40, 0, 0]),
        ];
        proptest::collection::btree_map(hash, place, 0..200).prop_map(|map| map.into_iter().collect())
    }

    proptest! {
        #[test]
        fn entries_read_back_and_are_found(entries in entries(), others: [[u8; 32]; 4]) {
            let mut bytes = Vec::new();
            write(&entries, &mut bytes);
            let block = Block::parse(&bytes).unwrap();
            prop_assert_eq!(block.entries().collect::<Vec<_>>(), entries.clone());
            for (hash, place) in &entries {
                prop_assert_eq!(block.find(hash), Some(*place));
            }
            for other in others.map(Hash) {
                let known = entries.iter().find(|(hash, _)| *hash == other).map(|(_, place)| *place);
                prop_assert_eq!(block.find(&other), known);
            }
        }

        #[test]
        fn no_bytes_make_it_panic(mut entries in entries(), at: prop::sample::Index, byte: u8, cut: bool) {
            let mut bytes = Vec::new();
            write(&entries, &mut bytes);
            if bytes.is_empty() {
                entries.clear();
            } else if cut {
                bytes.truncate(at.index(bytes.len()));
            } else {
                let at = at.index(bytes.len());
                bytes[at] = byte;
            }
            if let Some(block) = Block::parse(&bytes) {
                for (hash, _) in block.entries() {
                    block.find(&hash);
                }
            }
        }
    }

    #[test]
    fn a_damaged_count_does_not_make_one_entry_billions() {
        let mut bytes = Vec::new();
        write(&[(Hash([7; 32]), Location::GONE)], &mut bytes);
        assert_eq!(Block::parse(&bytes).unwrap().entries().count(), 1);
        bytes[3] = 0xFF;
        assert!(Block::parse(&bytes).is_none());
    }

    #[test]
    fn an_entry_of_a_large_store_takes_about_40_bytes() {
        let entry = |at: u32| {
            let mut hash = Hash::of(&at.to_le_bytes());
            hash.0[..2].copy_from_slice(&[3, 5]);
            let location = Location {
                pack: 1 + at % 4,
                offset_bytes: u64::from(at.wrapping_mul(0x9E37_79B9) >> 7) * 8,
                encoding: crate::codec::Encoding::Lz4,
                stored_bytes: 3000 + at * 7,
                plain_bytes: 16384,
            };
            (hash, location.to_bytes())
        };
        let mut entries: Vec<Stored> = (0..64).map(entry).collect();
        entries.sort_unstable();
        let mut bytes = Vec::new();
        write(&entries, &mut bytes);
        assert!(bytes.len() < 64 * 38, "{} bytes", bytes.len());
    }
}
