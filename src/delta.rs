//! A delta: an object's bytes, stored as their difference from those of another object, its *base*.
//!
//! ```text
//!  0         32       33     34
//!  +---------+--------+------+---------+--------------------------------------------------+
//!  |hash of  | number | form | shifts, | runs, or                                         |
//!  |the base |   u8   |  u8  | or none | length of the runs (u32), the LZ4 block of them  |
//!  +---------+--------+------+---------+--------------------------------------------------+
//!
//!  form:    bit 0: the runs are an LZ4 block, bit 1: there are shifts
//!  shifts:  count (u8), and of each: first (u64)  last (u64)  by (u64)
//!  run:     skip (varint)  count (varint)  `count` bytes
//! ```
//!
//! The plain bytes are those of the base, truncated or extended with zeros to the right length;
//! then the words are shifted, and then each run is written over them, `skip` bytes after the end
//! of the run before. Varints are LEB128.
//!
//! A *shift* adds `by` to each word of 8 bytes whose value is from `first` to `last`. Such words
//! are pointers: two processes of one program have the same memory except for their pointers,
//! because the kernel places their mappings elsewhere each time. Without shifts, a second CPython
//! process of 66 MB needed 15 MB of further storage.
//!
//! Why runs, and not an LZ4 block of the XOR of both: LZ4 spends one byte on every 255 equal bytes.
//! With a CPython heap of which 1 % of the records changed, a difference took 52 bytes at 4 KiB,
//! 119 at 16 KiB and 380 at 64 KiB as XOR, and 17, 31 and 85 bytes as runs. Runs hold the new bytes
//! and not their XOR, so that LZ4 can still find repetitions where a whole region was overwritten.
//!
//! **Which base.** The successive contents of one place are numbered: 0 is stored whole, and each
//! further one has the number after the one that it replaces. The base of number *n* is the number
//! that results from clearing the lowest one bit of *n*: 1, 2, 4 and 8 refer to 0, 3 to 2, 5 and 6
//! to 4, 7 to 6. It is always among the bases of number *n* - 1. So at most eight deltas lead to
//! the last number, 255, and three or four to most; a delta spans four changes of the place on
//! average. Subversion calls this scheme
//! [skip-deltas](https://svn.apache.org/repos/asf/subversion/trunk/notes/skip-deltas). If 0 were
//! the only base, a delta would span more and more changes. In the same heap, with one random
//! record changed each time, it would then be cheapest to store a region of 16 KiB whole after
//! every 17 changes, at 535 bytes a change; with this scheme it is 142.

use std::collections::HashMap;

use crate::hash::Hash;

/// Changed bytes with fewer equal bytes between them form one run: a new run costs two bytes.
const MIN_GAP_BYTES: usize = 4;

/// From this many bytes of runs on, LZ4 is tried.
const MIN_LZ4_BYTES: usize = 64;

const NUMBER_AT: usize = Hash::BYTES;

/// The size of the part before the runs or their length.
const FORM_AT: usize = NUMBER_AT + 1;

/// No delta is shorter.
pub(crate) const MIN_BYTES: usize = FORM_AT + 1;

const FORM_LZ4: u8 = 1;
const FORM_SHIFTS: u8 = 2;

/// A payload that is longer than this may be shorter with shifts.
const TRY_SHIFTS_BYTES: usize = 256;

/// The greatest number of shifts: a program's pointers point into a few mappings.
const MAX_SHIFTS: usize = 8;

/// A shift must be right for this many more words than it is wrong for: it takes 24 bytes, and a
/// wrong pointer takes about six.
const MIN_SHIFTED_WORDS: usize = 6;

/// The number of the content that replaces number `before`, and the number of its base. `None` if
/// it must be stored whole.
pub(crate) fn next_number(before: u8) -> Option<(u8, u8)> {
    let number = before.checked_add(1)?;
    Some((number, number & (number - 1)))
}

/// The base of a delta that is to be made.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Base<'a> {
    pub(crate) hash: Hash,
    pub(crate) plain: &'a [u8],
    /// How many bytes number 0 takes, encoded.
    pub(crate) whole_bytes: u32,
    /// The number of the delta.
    pub(crate) number: u8,
}

/// Adds `by` to the words from `first` to `last`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Shift {
    first: u64,
    last: u64,
    by: u64,
}

impl Shift {
    const BYTES: usize = 24;

    fn applies_to(&self, word: u64) -> bool {
        (self.first..=self.last).contains(&word)
    }
}

/// Appends the payload of a delta, unless that takes `max_bytes` or more. Returns whether it did.
///
/// Cost: 10 GB/s where both are equal (AMD EPYC, 2 cores).
pub(crate) fn encode(base: Base<'_>, plain: &[u8], max_bytes: usize, out: &mut Vec<u8>) -> bool {
    let start = out.len();
    let is_short = append(base, &[], base.plain, plain, max_bytes, out);
    if is_short && out.len() - start <= TRY_SHIFTS_BYTES {
        return true;
    }
    let shifts = find_shifts(base.plain, plain);
    if shifts.is_empty() {
        return is_short;
    }
    let mut shifted = base.plain.to_vec();
    shifted.resize(plain.len(), 0);
    apply_shifts(&shifts, &mut shifted);
    let without = out.split_off(start);
    let max_bytes = if is_short { without.len() } else { max_bytes };
    if append(base, &shifts, &shifted, plain, max_bytes, out) {
        return true;
    }
    out.extend_from_slice(&without);
    is_short
}

/// Appends the payload with these shifts, which led to `from`, unless it takes `max_bytes` or more.
fn append(
    base: Base<'_>,
    shifts: &[Shift],
    from: &[u8],
    plain: &[u8],
    max_bytes: usize,
    out: &mut Vec<u8>,
) -> bool {
    let start = out.len();
    out.extend_from_slice(&base.hash.0);
    out.push(base.number);
    let form_at = out.len();
    out.push(0);
    if !shifts.is_empty() {
        out[form_at] |= FORM_SHIFTS;
        out.push(shifts.len().to_le_bytes()[0]);
        out.extend(shifts.iter().flat_map(|it| [it.first, it.last, it.by]).flat_map(u64::to_le_bytes));
    }
    let runs_at = out.len();
    // On typical memory, LZ4 halves runs at best.
    if !write_runs(from, plain, start + 2 * max_bytes, out) {
        out.truncate(start);
        return false;
    }
    let runs = &out[runs_at..];
    if runs.len() >= MIN_LZ4_BYTES {
        let block = lz4_flex::block::compress_prepend_size(runs);
        if block.len() < runs.len() {
            out.truncate(runs_at);
            out[form_at] |= FORM_LZ4;
            out.extend_from_slice(&block);
        }
    }
    if out.len() - start >= max_bytes {
        out.truncate(start);
        return false;
    }
    true
}

/// The whole words in a slice of bytes.
fn words(bytes: &[u8]) -> impl Iterator<Item = u64> {
    bytes.as_chunks::<8>().0.iter().map(|word| u64::from_le_bytes(*word))
}

/// The shifts that turn many words of the base into those of `plain`.
fn find_shifts(base: &[u8], plain: &[u8]) -> Vec<Shift> {
    let mut seen: HashMap<u64, (usize, Shift)> = HashMap::new();
    for (old, new) in words(base).zip(words(plain)).filter(|(old, new)| old != new && *old != 0 && *new != 0)
    {
        let by = new.wrapping_sub(old);
        let (count, shift) = seen.entry(by).or_insert((0, Shift { first: old, last: old, by }));
        *count += 1;
        (shift.first, shift.last) = (shift.first.min(old), shift.last.max(old));
    }
    let mut often: Vec<(usize, Shift)> =
        seen.into_values().filter(|(count, _)| *count >= MIN_SHIFTED_WORDS).collect();
    // If two are equally frequent, the choice must not depend on the map's order.
    often.sort_unstable_by_key(|(count, shift)| (std::cmp::Reverse(*count), shift.by));
    often.truncate(2 * MAX_SHIFTS);
    let mut shifts: Vec<Shift> = Vec::new();
    for (_, shift) in often {
        let (mut right, mut wrong) = (0, 0);
        for (old, new) in words(base).zip(words(plain)).filter(|(old, _)| shift.applies_to(*old)) {
            if shifts.iter().any(|earlier| earlier.applies_to(old)) {
                continue;
            }
            right += usize::from(old.wrapping_add(shift.by) == new);
            wrong += usize::from(old == new);
        }
        if right >= wrong + MIN_SHIFTED_WORDS && shifts.len() < MAX_SHIFTS {
            shifts.push(shift);
        }
    }
    shifts
}

/// Shifts each word by the first shift that applies to it.
fn apply_shifts(shifts: &[Shift], plain: &mut [u8]) {
    for bytes in plain.as_chunks_mut::<8>().0 {
        let word = u64::from_le_bytes(*bytes);
        if let Some(shift) = shifts.iter().find(|shift| shift.applies_to(word)) {
            *bytes = word.wrapping_add(shift.by).to_le_bytes();
        }
    }
}

/// Appends the runs; gives up when `out` would get longer than `limit_bytes`.
fn write_runs(base: &[u8], plain: &[u8], limit_bytes: usize, out: &mut Vec<u8>) -> bool {
    let base_at = |at: usize| base.get(at).copied().unwrap_or(0);
    let mut written = 0;
    let mut at = 0;
    loop {
        at += equal_bytes(base, plain, at);
        if at >= plain.len() {
            return true;
        }
        let start = at;
        let mut end = at + 1;
        while end < plain.len() {
            let gap = (end..plain.len().min(end + MIN_GAP_BYTES)).position(|at| base_at(at) != plain[at]);
            match gap {
                Some(equal) => end += equal + 1,
                None => break,
            }
        }
        write_varint(start - written, out);
        write_varint(end - start, out);
        out.extend_from_slice(&plain[start..end]);
        if out.len() > limit_bytes {
            return false;
        }
        written = end;
        at = end;
    }
}

/// How many bytes from `at` on are the same in both.
pub(crate) fn equal_bytes(base: &[u8], plain: &[u8], at: usize) -> usize {
    let rest = &plain[at..];
    let same = base.get(at..).unwrap_or_default();
    let both = rest.len().min(same.len());
    let (blocks, _) = rest[..both].as_chunks::<64>();
    let (base_blocks, _) = same[..both].as_chunks::<64>();
    let whole = 64 * blocks.iter().zip(base_blocks).take_while(|(a, b)| a == b).count();
    let mut equal =
        whole + rest[whole..both].iter().zip(&same[whole..both]).take_while(|(a, b)| a == b).count();
    if equal == both {
        equal += rest[both..].iter().take_while(|byte| **byte == 0).count();
    }
    equal
}

fn write_varint(mut value: usize, out: &mut Vec<u8>) {
    while value >= 0x80 {
        out.push(value.to_le_bytes()[0] | 0x80);
        value >>= 7;
    }
    out.push(value.to_le_bytes()[0]);
}

/// The hash of the base that a payload names.
pub(crate) fn base_of(payload: &[u8]) -> Option<Hash> {
    payload.first_chunk().copied().map(Hash)
}

/// The number in a payload.
pub(crate) fn number_of(payload: &[u8]) -> Option<u8> {
    payload.get(NUMBER_AT).copied()
}

/// Turns the bytes of the base into the plain bytes. `plain` holds the base's bytes, truncated or
/// extended to the plain length. If the payload is malformed, the error says what is wrong, and
/// `plain` then holds unspecified bytes.
pub(crate) fn apply(payload: &[u8], plain: &mut [u8]) -> Result<(), String> {
    let (form, mut rest) = payload.get(FORM_AT..).and_then(<[u8]>::split_first).ok_or("it is too short")?;
    if form & !(FORM_LZ4 | FORM_SHIFTS) != 0 {
        return Err(format!("its form is {form}, expected 0 to 3"));
    }
    if form & FORM_SHIFTS != 0 {
        let (count, shifts) = rest.split_first().ok_or("it is too short")?;
        let count = usize::from(*count);
        if count > MAX_SHIFTS {
            return Err(format!("it has {count} shifts, {MAX_SHIFTS} is the most"));
        }
        let (shifts, runs) = shifts.split_at_checked(count * Shift::BYTES).ok_or("it is too short")?;
        let (shifts, _) = shifts.as_chunks::<{ Shift::BYTES }>();
        let read = |shift: &[u8; Shift::BYTES]| {
            let mut words = words(shift);
            let mut next = || words.next().unwrap_or_default();
            Shift { first: next(), last: next(), by: next() }
        };
        apply_shifts(&shifts.iter().map(read).collect::<Vec<_>>(), plain);
        rest = runs;
    }
    if form & FORM_LZ4 == 0 {
        return apply_runs(rest, plain);
    }
    let (length, block) = rest.split_first_chunk().ok_or("it is too short")?;
    let length = u32::from_le_bytes(*length) as usize;
    // `encode` never writes longer runs.
    if length > 2 * plain.len() + MIN_LZ4_BYTES {
        return Err(format!("its runs have {length} bytes, more than there can be"));
    }
    let mut runs = vec![0; length];
    match lz4_flex::block::decompress_into(block, &mut runs) {
        Ok(found) if found == length => apply_runs(&runs, plain),
        Ok(found) => Err(format!("expected {length} bytes of runs, found {found}")),
        Err(error) => Err(format!("its runs are no LZ4 block: {error}")),
    }
}

fn apply_runs(mut runs: &[u8], plain: &mut [u8]) -> Result<(), String> {
    let mut at = 0usize;
    while !runs.is_empty() {
        let skip = read_varint(&mut runs).ok_or("it ends inside a run")?;
        let count = read_varint(&mut runs).ok_or("it ends inside a run")?;
        let (bytes, rest) = runs.split_at_checked(count).ok_or("it ends inside a run")?;
        let start = at.checked_add(skip).ok_or("a run lies outside")?;
        at = start.checked_add(count).ok_or("a run lies outside")?;
        plain.get_mut(start..at).ok_or("a run lies outside")?.copy_from_slice(bytes);
        runs = rest;
    }
    Ok(())
}

fn read_varint(bytes: &mut &[u8]) -> Option<usize> {
    let mut value = 0;
    for shift in (0..28).step_by(7) {
        let (byte, rest) = bytes.split_first()?;
        *bytes = rest;
        value |= usize::from(byte & 0x7F) << shift;
        if byte & 0x80 == 0 {
            return Some(value);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A base, and bytes that differ from it in some places; their lengths differ too.
    fn base_and_plain() -> impl Strategy<Value = (Vec<u8>, Vec<u8>)> {
        let base = proptest::collection::vec(prop_oneof![Just(0u8), any::<u8>()], 0..3000);
        let edits = proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>(), 1usize..60), 0..40);
        (base, edits, 0usize..3000).prop_map(|(base, edits, length)| {
            let mut plain = base.clone();
            plain.resize(length, 0);
            for (at, byte, count) in edits {
                if length > 0 {
                    let at = at.index(length);
                    let end = length.min(at + count);
                    plain[at..end].iter_mut().step_by(1 + usize::from(byte % 7)).for_each(|it| *it = byte);
                }
            }
            (base, plain)
        })
    }

    fn restored(base: &[u8], payload: &[u8], length: usize) -> Result<Vec<u8>, String> {
        let mut plain = base.to_vec();
        plain.resize(length, 0);
        apply(payload, &mut plain).map(|()| plain)
    }

    fn encoded(base: &[u8], plain: &[u8], max_bytes: usize) -> Option<Vec<u8>> {
        let mut out = vec![7];
        let base = Base { hash: Hash::of(base), plain: base, whole_bytes: 0, number: 5 };
        let kept = encode(base, plain, max_bytes, &mut out);
        let payload = out.split_off(1);
        assert_eq!((out, payload.is_empty()), (vec![7], !kept));
        kept.then_some(payload)
    }

    proptest! {
        #[test]
        fn what_differs_from_a_base_comes_back((base, plain) in base_and_plain()) {
            let payload = encoded(&base, &plain, usize::MAX / 4).unwrap();
            prop_assert_eq!(base_of(&payload), Some(Hash::of(&base)));
            prop_assert_eq!(number_of(&payload), Some(5));
            prop_assert_eq!(restored(&base, &payload, plain.len()).unwrap(), plain);
        }

        #[test]
        fn a_payload_that_would_get_too_long_is_given_up((base, plain) in base_and_plain(), max in 0usize..300) {
            let whole = encoded(&base, &plain, usize::MAX / 4).unwrap();
            // `encode` may reject a payload that LZ4 would have made short enough, but never
            // accepts one that is too long.
            if let Some(payload) = encoded(&base, &plain, max) {
                prop_assert!(whole.len() < max);
                prop_assert_eq!(payload, whole);
            }
        }

        #[test]
        fn damaged_payloads_are_errors_or_wrong_bytes_but_never_panic(
            mut payload in proptest::collection::vec(any::<u8>(), 0..200),
            form in 0u8..5,
            length in 0usize..500,
        ) {
            if let Some(at) = payload.get_mut(FORM_AT) {
                *at = form;
            }
            let _ = restored(&[1; 100], &payload, length);
        }
    }

    #[test]
    fn equal_bytes_take_nothing_and_one_byte_takes_three() {
        let base = vec![9; 16_384];
        let mut plain = base.clone();
        assert_eq!(encoded(&base, &plain, 100).unwrap().len(), MIN_BYTES);
        plain[100] = 8;
        assert_eq!(encoded(&base, &plain, 100).unwrap()[FORM_AT..], [0, 100, 1, 8]);
    }

    #[test]
    fn a_run_that_lies_outside_is_refused() {
        let payload = [&[0; 33][..], &[0, 3, 2, 1, 1]].concat();
        assert!(restored(&[], &payload, 5).is_ok());
        assert!(restored(&[], &payload, 4).is_err());
        let endless = [&[0; 33][..], &[0, 0xFF, 0xFF, 0xFF, 0xFF, 0x7F, 1, 1]].concat();
        assert!(restored(&[], &endless, 5).is_err());
    }

    /// Memory of two processes: the same except for pointers into two mappings and a few other
    /// words.
    fn two_processes(words: usize) -> (Vec<u8>, Vec<u8>) {
        let word = |at: usize, heap: u64, library: u64| match at % 5 {
            0 => heap + (at as u64 * 7919) % 0x10_0000 * 16,
            1 => library + (at as u64 * 31) % 0x1000,
            2 => at as u64,
            3 if at % 50 == 3 => heap ^ 0x5555,
            _ => 0,
        };
        let memory =
            |heap, library| (0..words).flat_map(|at| word(at, heap, library).to_le_bytes()).collect();
        (memory(0x5555_1234_5000, 0x7F12_3456_7000), memory(0x55AA_8765_4000, 0x7FBC_DEF0_1000))
    }

    #[test]
    fn pointers_that_moved_together_take_hardly_anything() {
        let (base, plain) = two_processes(2048);
        let payload = encoded(&base, &plain, 8192).unwrap();
        // 41 words are no pointers and have changed.
        assert!(payload.len() < MIN_BYTES + 2 * Shift::BYTES + 41 * 10, "{}", payload.len());
        assert_eq!(payload[FORM_AT] & FORM_SHIFTS, FORM_SHIFTS);
        assert_eq!(restored(&base, &payload, plain.len()).unwrap(), plain);
    }

    proptest! {
        #[test]
        fn memory_with_moved_pointers_comes_back_whatever_else_changed(
            length in 100usize..5000,
            edits in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..50),
        ) {
            let (base, mut plain) = two_processes(600);
            plain.resize(length, 3);
            edits.iter().for_each(|(at, byte)| plain[at.index(length)] = *byte);
            let payload = encoded(&base, &plain, usize::MAX / 4).unwrap();
            prop_assert_eq!(restored(&base, &payload, length).unwrap(), plain);
        }
    }

    #[test]
    fn every_base_is_among_the_bases_of_the_number_before() {
        let mut before = 0;
        let mut bases: Vec<Vec<u8>> = vec![vec![]];
        while let Some((number, base)) = next_number(before) {
            let known = [&[before][..], &bases[usize::from(before)]].concat();
            assert!(known.contains(&base), "{number} has the base {base}, known are {known:?}");
            bases.push([&[base][..], &bases[usize::from(base)]].concat());
            before = number;
        }
        assert_eq!((before, bases.iter().map(Vec::len).max()), (255, Some(8)));
    }

    /// A program may have pointers to more mappings than the number of shifts allows.
    #[test]
    fn there_are_never_more_shifts_than_can_be_read_back() {
        for mappings in [MAX_SHIFTS - 1, MAX_SHIFTS, MAX_SHIFTS + 2] {
            let pointers = |moved: u64| -> Vec<u8> {
                let of_mapping = |mapping: u64| {
                    let start = 0x7f00_0000_0000 + (mapping << 32) + moved * (mapping + 1) * 0x0123_4567_1000;
                    // Irregular values, because LZ4 would compress regular ones as well as shifts
                    // do.
                    (0..40u64).map(move |at| start + at.wrapping_mul(0x9E37_79B9_7F4A_7C15) % (1 << 31))
                };
                (0..mappings as u64).flat_map(of_mapping).flat_map(u64::to_le_bytes).collect()
            };
            let (base, plain) = (pointers(0), pointers(1));
            let hash = Hash::of(&base);
            let mut payload = Vec::new();
            assert!(encode(
                Base { hash, plain: &base, whole_bytes: 0, number: 1 },
                &plain,
                plain.len(),
                &mut payload
            ));
            let shifts = usize::from(payload[FORM_AT + 1]);
            assert_eq!((payload[FORM_AT] & FORM_SHIFTS, shifts), (FORM_SHIFTS, MAX_SHIFTS.min(mappings)));
            let mut back = base.clone();
            apply(&payload, &mut back).unwrap();
            assert!(back == plain);
        }
    }
}
