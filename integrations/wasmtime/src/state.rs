//! The state of an instance outside its memory: an attachment with the module's hash, the globals,
//! and the sizes of tables.
//!
//! ```text
//! "SFWT" version u32 | module 32 bytes
//! count u32 | global index u32, kind u32, value 16 bytes | …
//! count u32 | table index u32, elements u64              | …       all little-endian
//! ```

use stillframe::Hash;
use wasmtime::{V128, Val};

use crate::error::Error;

/// The name of the attachment.
pub(crate) const ATTACHMENT: &str = "wasmtime";
const MAGIC: [u8; 4] = *b"SFWT";
const VERSION: u32 = 1;

/// The state of an instance outside its memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct State {
    /// The hash of the module.
    pub(crate) module: Hash,
    pub(crate) globals: Vec<(u32, Number)>,
    pub(crate) tables: Vec<(u32, u64)>,
}

/// The value of a global: its kind and its bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Number {
    kind: u32,
    bits: u128,
}

impl Number {
    /// The number in a value, if it holds one.
    pub(crate) fn of(value: &Val) -> Option<Number> {
        let (kind, bits) = match value {
            Val::I32(value) => (0, u128::from(value.cast_unsigned())),
            Val::I64(value) => (1, u128::from(value.cast_unsigned())),
            Val::F32(bits) => (2, u128::from(*bits)),
            Val::F64(bits) => (3, u128::from(*bits)),
            Val::V128(value) => (4, value.as_u128()),
            _ => return None,
        };
        Some(Number { kind, bits })
    }

    /// The kind, as a number.
    pub(crate) fn kind(self) -> u32 {
        self.kind
    }

    /// `None` if the kind is unknown, or if there are more bits than it has.
    pub(crate) fn value(self) -> Option<Val> {
        Some(match self.kind {
            0 => Val::I32(u32::try_from(self.bits).ok()?.cast_signed()),
            1 => Val::I64(u64::try_from(self.bits).ok()?.cast_signed()),
            2 => Val::F32(u32::try_from(self.bits).ok()?),
            3 => Val::F64(u64::try_from(self.bits).ok()?),
            4 => Val::V128(V128::from(self.bits)),
            _ => return None,
        })
    }
}

impl State {
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut bytes = MAGIC.to_vec();
        let count = |count: usize| u32::try_from(count).unwrap_or(u32::MAX).to_le_bytes();
        bytes.extend(VERSION.to_le_bytes());
        bytes.extend(self.module.0);
        bytes.extend(count(self.globals.len()));
        for (index, number) in &self.globals {
            bytes.extend(index.to_le_bytes());
            bytes.extend(number.kind.to_le_bytes());
            bytes.extend(number.bits.to_le_bytes());
        }
        bytes.extend(count(self.tables.len()));
        for (index, elements) in &self.tables {
            bytes.extend(index.to_le_bytes());
            bytes.extend(elements.to_le_bytes());
        }
        bytes
    }

    pub(crate) fn decode(bytes: &[u8]) -> Result<State, Error> {
        let mut reader = Reader(bytes);
        let state =
            reader.state().ok_or(Error::State { why: "it is cut short, or has a value of no kind" })??;
        if !reader.0.is_empty() {
            return Err(Error::State { why: "it is longer than what it holds" });
        }
        Ok(state)
    }
}

/// The bytes that are left to read.
struct Reader<'a>(&'a [u8]);

impl Reader<'_> {
    fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (first, rest) = self.0.split_first_chunk::<N>()?;
        self.0 = rest;
        Some(*first)
    }

    fn u32(&mut self) -> Option<u32> {
        self.take().map(u32::from_le_bytes)
    }

    fn state(&mut self) -> Option<Result<State, Error>> {
        if self.take()? != MAGIC {
            return Some(Err(Error::State { why: "it does not begin as one" }));
        }
        if self.u32()? != VERSION {
            return Some(Err(Error::State { why: "its version is another than 1" }));
        }
        let module = Hash(self.take()?);
        let mut globals = Vec::new();
        for _ in 0..self.u32()? {
            let index = self.u32()?;
            let number = Number { kind: self.u32()?, bits: u128::from_le_bytes(self.take()?) };
            number.value()?;
            globals.push((index, number));
        }
        let mut tables = Vec::new();
        for _ in 0..self.u32()? {
            tables.push((self.u32()?, u64::from_le_bytes(self.take()?)));
        }
        Some(Ok(State { module, globals, tables }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_state_comes_back_and_no_damage_is_a_panic() {
        let values = [
            Val::I32(-1),
            Val::I64(i64::MIN),
            Val::F32(f32::NAN.to_bits()),
            Val::F64((-0.0f64).to_bits()),
            Val::V128(V128::from(u128::MAX - 5)),
        ];
        let globals = (7u32..).zip(values.iter().map(|value| Number::of(value).unwrap())).collect();
        let state = State { module: Hash::of(b"m"), globals, tables: vec![(0, 5), (3, u64::MAX)] };
        let bytes = state.encode();
        assert_eq!(State::decode(&bytes).unwrap(), state);
        for length in 0..bytes.len() {
            assert!(State::decode(&bytes[..length]).is_err(), "{length}");
        }
        let mut longer = bytes.clone();
        longer.push(0);
        assert!(State::decode(&longer).unwrap_err().to_string().contains("longer"));
        for at in 0..bytes.len() {
            let mut damaged = bytes.clone();
            damaged[at] ^= 0xFF;
            let _ = State::decode(&damaged);
        }
    }
}
