//! The snapshot record: what one snapshot is. Together with its layout, root and tables it
//! describes the whole snapshot.
//!
//! Records, layouts, notes and tombstones are stored as one version byte followed by bincode
//! (`config::standard()`: little-endian, variable-length integers). The id of a snapshot is the
//! BLAKE3 hash of exactly these bytes, so a record can never change. The labels of a snapshot may
//! change later; they are stored in a separate *note*.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use jiff::Timestamp;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::hash::Hash;
use crate::units::RegionSize;

/// The id of a snapshot: the BLAKE3 of its encoded record, shown as 64 hex digits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct SnapshotId(pub Hash);

impl fmt::Display for SnapshotId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

impl fmt::Debug for SnapshotId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

/// Why a snapshot was taken. The names are those of Wasmer's WASIX journal.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub enum Trigger {
    /// The user asked for it.
    #[default]
    Explicit,
    /// An interval passed.
    Periodic,
    /// The process was idle.
    Idle,
    /// The process listened on a socket for the first time.
    FirstListen,
    /// The process read its standard input for the first time.
    FirstStdin,
    /// The process read its environment for the first time.
    FirstEnviron,
    /// The process got the signal of this name.
    Signal(String),
    /// The process was starting.
    Bootstrap,
    /// Anything else.
    Other(String),
}

impl fmt::Display for Trigger {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Trigger::Explicit => f.write_str("explicit"),
            Trigger::Periodic => f.write_str("periodic"),
            Trigger::Idle => f.write_str("idle"),
            Trigger::FirstListen => f.write_str("first-listen"),
            Trigger::FirstStdin => f.write_str("first-stdin"),
            Trigger::FirstEnviron => f.write_str("first-environ"),
            Trigger::Signal(name) => write!(f, "signal:{name}"),
            Trigger::Bootstrap => f.write_str("bootstrap"),
            Trigger::Other(text) => f.write_str(text),
        }
    }
}

impl FromStr for Trigger {
    type Err = std::convert::Infallible;
    /// The trigger of this name; an unknown name becomes [`Trigger::Other`].
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Ok(match text {
            "explicit" => Trigger::Explicit,
            "periodic" => Trigger::Periodic,
            "idle" => Trigger::Idle,
            "first-listen" => Trigger::FirstListen,
            "first-stdin" => Trigger::FirstStdin,
            "first-environ" => Trigger::FirstEnviron,
            "bootstrap" => Trigger::Bootstrap,
            other => match other.strip_prefix("signal:") {
                Some(name) => Trigger::Signal(name.to_owned()),
                None => Trigger::Other(other.to_owned()),
            },
        })
    }
}

/// Where the memory of a snapshot came from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub enum Origin {
    /// Bytes of the capturing process itself.
    Bytes,
    /// A raw memory file.
    File {
        /// Its path, absolute if the absolute path is known.
        #[serde(with = "path_bytes")]
        path: PathBuf,
    },
    /// A live Linux process.
    LiveProcess {
        /// Its process id at that time.
        pid: u32,
        /// Its executable, if it could be read.
        #[serde(with = "optional_path_bytes")]
        path: Option<PathBuf>,
        /// Its command line, if it could be read.
        command: Vec<String>,
    },
    /// An ELF core dump.
    Core {
        /// Its path, absolute if the absolute path is known.
        #[serde(with = "path_bytes")]
        path: PathBuf,
        /// The id of the dumped process, if the core dump has it.
        pid: Option<u32>,
        /// The executable of that process, if the core dump has it.
        #[serde(with = "optional_path_bytes")]
        executable: Option<PathBuf>,
        /// The command line of that process as far as the core dump has it: all words in one text,
        /// or nothing.
        command: Vec<String>,
    },
}

/// Data kept together with the memory: registers, the auxiliary vector, Wasm globals.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AttachmentRef {
    /// Its kind: `threads`, `auxv`, or a name chosen by the caller.
    pub name: String,
    /// The BLAKE3 hash of its bytes; the all-zero hash if it has none.
    pub hash: Hash,
    /// Its size.
    pub length_bytes: u64,
}

/// One snapshot of one process. Immutable: its id is the hash of its encoding.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// The process's name in the store.
    pub process: String,
    /// The snapshot before it, if any.
    pub parent: Option<SnapshotId>,
    /// When it was taken, by the machine's clock, which may have been wrong.
    /// [`moment`](Self::moment) gives its position among the other snapshots.
    #[serde(with = "nanoseconds")]
    pub time: Timestamp,
    /// Why it was taken.
    pub trigger: Trigger,
    /// Where the memory came from.
    pub origin: Origin,
    /// The region size of its tables.
    pub region_size: RegionSize,
    /// The total size of all captured mappings.
    pub memory_bytes: u64,
    /// How many of these bytes lie in all-zero regions.
    pub zero_bytes: u64,
    /// The number of regions.
    pub regions: u64,
    /// The data kept together with the memory.
    pub attachments: Vec<AttachmentRef>,
    /// The stored layout: the [`AddressSpace`](crate::address_space::AddressSpace).
    pub layout: Hash,
    /// The stored root: the hashes of all tables in layout order.
    pub root: Hash,
}

impl Record {
    /// The position of the snapshot in the order of all snapshots. This is its time; if the clock
    /// gave a time before the newest snapshot of the store, it is a moment just after that
    /// snapshot.
    pub fn moment(&self) -> Timestamp {
        moment(self.time, &self.attachments)
    }
}

impl AttachmentRef {
    /// Whether it has no bytes and only records the snapshot's [moment](Record::moment).
    pub fn is_moment(&self) -> bool {
        self.as_moment().is_some()
    }

    /// The attachment that records a snapshot's moment. It has no bytes: its name holds the moment,
    /// so that reading the records is enough to order the snapshots.
    pub(crate) fn of_moment(moment: Timestamp) -> AttachmentRef {
        let name = format!("{MOMENT_PREFIX}{}", moment.as_nanosecond());
        AttachmentRef { name, hash: Hash::ZERO, length_bytes: 0 }
    }

    fn as_moment(&self) -> Option<Timestamp> {
        moment_in(&self.name)
    }
}

/// The prefix of the name of the attachment that records a snapshot's moment.
pub(crate) const MOMENT_PREFIX: &str = "moment:";

/// The moment in the name of an attachment, if it has one.
pub(crate) fn moment_in(name: &str) -> Option<Timestamp> {
    Timestamp::from_nanosecond(name.strip_prefix(MOMENT_PREFIX)?.parse().ok()?).ok()
}

/// The position of a snapshot in the order of all snapshots.
pub(crate) fn moment(time: Timestamp, attachments: &[AttachmentRef]) -> Timestamp {
    attachments.iter().find_map(AttachmentRef::as_moment).unwrap_or(time)
}

/// A capture records at most this many bytes of a command line, including one byte after each word.
/// A process can make its own command line as long as its stack.
pub(crate) const MAX_COMMAND_BYTES: usize = 4096;

/// The last word of a command line that was truncated.
pub(crate) const CUT: &str = "… (cut)";

/// The first words of a command line that is too long, followed by [`CUT`].
pub(crate) fn cut_command(words: impl IntoIterator<Item = String>) -> Vec<String> {
    let mut left = MAX_COMMAND_BYTES;
    let mut kept = Vec::new();
    for mut word in words {
        if word.len() + 1 > left {
            word.truncate(word.floor_char_boundary(left.saturating_sub(1)));
            if !word.is_empty() {
                kept.push(word);
            }
            break;
        }
        left -= word.len() + 1;
        kept.push(word);
    }
    kept.push(CUT.to_owned());
    kept
}

impl Origin {
    /// The same origin with its command line truncated to the limit.
    pub(crate) fn cut(mut self) -> Origin {
        if let Origin::LiveProcess { command, .. } | Origin::Core { command, .. } = &mut self
            && command.last().is_none_or(|last| last != CUT)
            && command.iter().map(|word| word.len() + 1).sum::<usize>() > MAX_COMMAND_BYTES
        {
            *command = cut_command(std::mem::take(command));
        }
        self
    }
}

/// Labels of a snapshot. If there are several notes on one snapshot, the newest counts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Note {
    pub(crate) snapshot: SnapshotId,
    #[serde(with = "nanoseconds")]
    pub(crate) time: Timestamp,
    pub(crate) labels: BTreeMap<String, String>,
}

/// Records that a snapshot is forgotten.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Tombstone {
    pub(crate) snapshot: SnapshotId,
    #[serde(with = "nanoseconds")]
    pub(crate) time: Timestamp,
}

/// The version byte before every bincode value.
pub(crate) const ENCODING_VERSION: u8 = 1;

/// No decoded value may claim more bytes than this.
const DECODE_LIMIT_BYTES: usize = 256 << 20;

/// The limit for each stored byte: a 16-byte number takes at least one stored byte.
const CLAIM_PER_BYTE: usize = 16;

/// The limit for one part of a record; a part has at most a sixteenth as many stored bytes.
const FIRST_LIMIT_BYTES: usize = 1 << 20;

/// Values of up to this many stored bytes have a lower limit.
const SMALL_BYTES: usize = 4 << 10;
const MEDIUM_BYTES: usize = 256 << 10;

/// The stored bytes of a record, a layout, a note, a tombstone, or an attachment that this program
/// defines.
pub(crate) fn encode<T: Serialize>(value: &T) -> Result<Vec<u8>, RecordError> {
    let mut bytes = vec![ENCODING_VERSION];
    encode_onto(value, &mut bytes)?;
    Ok(bytes)
}

/// Appends a value without the version byte.
pub(crate) fn encode_onto<T: Serialize>(value: &T, bytes: &mut Vec<u8>) -> Result<(), RecordError> {
    bincode::serde::encode_into_std_write(value, bytes, bincode::config::standard())
        .map(drop)
        .map_err(|error| RecordError::Encode { detail: error.to_string() })
}

/// Decodes stored bytes; the value must use all of them.
pub(crate) fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, RecordError> {
    let decode_error = |detail: String| RecordError::Decode { detail };
    let rest = without_version(bytes)?;
    // Before the decoder checks how many bytes exist, it allocates what a length asks for, up to
    // its limit. A limit must be a constant.
    let decoded = match rest.len() {
        ..SMALL_BYTES => decode_within::<T, { SMALL_BYTES * CLAIM_PER_BYTE }>(rest),
        SMALL_BYTES..MEDIUM_BYTES => decode_within::<T, { MEDIUM_BYTES * CLAIM_PER_BYTE }>(rest),
        MEDIUM_BYTES.. => decode_within::<T, DECODE_LIMIT_BYTES>(rest),
    };
    let (value, used_bytes) = decoded.map_err(|error| decode_error(error.to_string()))?;
    if used_bytes != rest.len() {
        return Err(decode_error(format!("{} bytes are left over", rest.len() - used_bytes)));
    }
    Ok(value)
}

/// The bytes after the version byte; an error if that is not this program's version.
pub(crate) fn without_version(bytes: &[u8]) -> Result<&[u8], RecordError> {
    match bytes.split_first() {
        None => Err(RecordError::Decode { detail: "no bytes at all".to_owned() }),
        Some((&ENCODING_VERSION, rest)) => Ok(rest),
        Some((version, _)) => Err(RecordError::Version { found: *version }),
    }
}

/// The value at the start of bytes without a version byte, and how many bytes it takes. The value
/// may claim 1 MiB.
pub(crate) fn decode_first<T: DeserializeOwned>(bytes: &[u8]) -> Result<(T, usize), RecordError> {
    decode_within::<T, FIRST_LIMIT_BYTES>(bytes)
        .map_err(|error| RecordError::Decode { detail: error.to_string() })
}

/// The unsigned number at the start of bytes, and how many bytes it takes.
pub(crate) fn read_number(bytes: &[u8]) -> Option<(u64, usize)> {
    let (first, rest) = bytes.split_first()?;
    Some(match first {
        0..=250 => (u64::from(*first), 1),
        251 => (u64::from(u16::from_le_bytes(*rest.first_chunk()?)), 3),
        252 => (u64::from(u32::from_le_bytes(*rest.first_chunk()?)), 5),
        253 => (u64::from_le_bytes(*rest.first_chunk()?), 9),
        _ => return None,
    })
}

/// The value at the start of `bytes`, and how many bytes it takes.
fn decode_within<T: DeserializeOwned, const LIMIT_BYTES: usize>(
    bytes: &[u8],
) -> Result<(T, usize), bincode::error::DecodeError> {
    bincode::serde::decode_from_slice(bytes, bincode::config::standard().with_limit::<LIMIT_BYTES>())
}

/// Paths as bytes: they need not be UTF-8.
mod path_bytes {
    use std::ffi::OsString;
    use std::os::unix::ffi::{OsStrExt, OsStringExt};
    use std::path::{Path, PathBuf};

    use serde::{Deserialize, Serialize};

    pub(super) fn serialize<S: serde::Serializer>(path: &Path, to: S) -> Result<S::Ok, S::Error> {
        path.as_os_str().as_bytes().serialize(to)
    }

    pub(super) fn deserialize<'de, D: serde::Deserializer<'de>>(from: D) -> Result<PathBuf, D::Error> {
        Ok(OsString::from_vec(Vec::deserialize(from)?).into())
    }
}

/// The same for an optional path.
mod optional_path_bytes {
    use std::ffi::OsString;
    use std::os::unix::ffi::{OsStrExt, OsStringExt};
    use std::path::PathBuf;

    use serde::{Deserialize, Serialize};

    pub(super) fn serialize<S: serde::Serializer>(path: &Option<PathBuf>, to: S) -> Result<S::Ok, S::Error> {
        path.as_ref().map(|path| path.as_os_str().as_bytes()).serialize(to)
    }

    pub(super) fn deserialize<'de, D: serde::Deserializer<'de>>(
        from: D,
    ) -> Result<Option<PathBuf>, D::Error> {
        let bytes: Option<Vec<u8>> = Option::deserialize(from)?;
        Ok(bytes.map(|bytes| OsString::from_vec(bytes).into()))
    }
}

/// Times as signed nanoseconds since 1970-01-01 UTC.
pub(crate) mod nanoseconds {
    use super::{Deserialize, Timestamp};

    pub(crate) fn serialize<S: serde::Serializer>(time: &Timestamp, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_i128(time.as_nanosecond())
    }

    pub(crate) fn deserialize<'de, D: serde::Deserializer<'de>>(from: D) -> Result<Timestamp, D::Error> {
        Timestamp::from_nanosecond(i128::deserialize(from)?).map_err(serde::de::Error::custom)
    }
}

/// A record, layout, note or tombstone that cannot be written or read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RecordError {
    /// It cannot be encoded.
    #[error("cannot be encoded: {detail}")]
    Encode {
        /// The encoder's message.
        detail: String,
    },
    /// Its bytes are malformed.
    #[error("cannot be decoded: {detail}")]
    Decode {
        /// The decoder's message.
        detail: String,
    },
    /// It was written by a newer program.
    #[error("has encoding version {found}, this program reads version {ENCODING_VERSION}")]
    Version {
        /// The version byte found.
        found: u8,
    },
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::address_space::AddressSpace;

    fn record() -> Record {
        Record {
            process: "web-1".to_owned(),
            parent: None,
            time: Timestamp::from_second(1_790_000_000).unwrap(),
            trigger: Trigger::Signal("SIGINT".to_owned()),
            origin: Origin::Bytes,
            region_size: RegionSize::default(),
            memory_bytes: 1 << 20,
            zero_bytes: 1 << 19,
            regions: 64,
            attachments: Vec::new(),
            layout: Hash::of(b"layout"),
            root: Hash::of(b"root"),
        }
    }

    #[test]
    fn a_record_comes_back_as_it_was() {
        let bytes = encode(&record()).unwrap();
        assert_eq!(decode::<Record>(&bytes).unwrap(), record());
    }

    #[test]
    fn paths_come_back_whatever_bytes_they_have() {
        use std::os::unix::ffi::OsStringExt;
        let path = || PathBuf::from(std::ffi::OsString::from_vec(b"/a/\xff\xfe b".to_vec()));
        let process = |path| Origin::LiveProcess { pid: 7, path, command: vec!["a".to_owned()] };
        for origin in [Origin::File { path: path() }, process(Some(path())), process(None)] {
            let record = Record { origin, ..record() };
            assert_eq!(decode::<Record>(&encode(&record).unwrap()).unwrap(), record);
        }
    }

    #[test]
    fn a_record_that_is_cut_lengthened_or_of_another_version_is_refused() {
        let bytes = encode(&record()).unwrap();
        for length in 0..bytes.len() {
            assert!(decode::<Record>(&bytes[..length]).is_err(), "cut at {length}");
        }
        let longer = [&bytes[..], &[0]].concat();
        assert!(decode::<Record>(&longer).is_err());
        let newer = [&[ENCODING_VERSION + 1], &bytes[1..]].concat();
        assert_eq!(decode::<Record>(&newer), Err(RecordError::Version { found: ENCODING_VERSION + 1 }));
    }

    /// The limit rejects the length before the allocation; the decoder does not need to find that
    /// bytes are missing.
    #[test]
    fn a_length_far_beyond_the_stored_bytes_is_refused_before_it_is_allocated() {
        let limited = |bytes: &[u8]| match decode::<Record>(bytes) {
            Err(RecordError::Decode { detail }) => detail.contains("LimitExceeded"),
            _ => false,
        };
        let bytes = encode(&record()).unwrap();
        let process_at = 2;
        assert_eq!((bytes[1], &bytes[process_at..][..5]), (5, &b"web-1"[..]));
        // 252: the length follows as a u32.
        let with_length = |length: u32, padding: usize| {
            let rest = [&bytes[process_at..], &vec![0; padding]].concat();
            [&[ENCODING_VERSION, 252], &length.to_le_bytes()[..], &rest].concat()
        };
        assert!(limited(&with_length(70_000, 0)));
        assert!(!limited(&with_length(60_000, 0)));
        assert!(limited(&with_length(5_000_000, SMALL_BYTES)));
        assert!(!limited(&with_length(4_000_000, SMALL_BYTES)));
        assert!(limited(&with_length(300_000_000, MEDIUM_BYTES)));
    }

    /// Numbers that take one stored byte each come closest to the limits.
    #[test]
    fn values_of_every_length_come_back() {
        for count in [1, 100, 240, 250, 4_000, 20_000, 40_000] {
            let range = |at: u64| crate::units::AddressRange::new(at, at + 1).unwrap();
            let mut space = AddressSpace::default();
            space.set_unreadable((0..count).map(|at| range(2 * at)));
            space.exclude(&(0..count).map(|at| range(2 * at)).collect::<Vec<_>>());
            assert_eq!(decode::<AddressSpace>(&encode(&space).unwrap()).unwrap(), space);
            let numbers = vec![0i128; usize::try_from(count).unwrap() * 10];
            assert_eq!(decode::<Vec<i128>>(&encode(&numbers).unwrap()).unwrap(), numbers);
        }
    }

    #[test]
    fn a_range_that_is_backwards_in_stored_bytes_is_refused() {
        let mut bytes = encode(&AddressSpace::image("x", 100)).unwrap();
        assert_eq!(bytes[2..4], [0, 100]);
        bytes[2..4].copy_from_slice(&[100, 0]);
        assert!(decode::<AddressSpace>(&bytes).is_err());
    }

    #[test]
    fn every_trigger_reads_back_from_its_name() {
        for name in ["explicit", "periodic", "idle", "first-listen", "first-stdin", "first-environ"]
            .into_iter()
            .chain(["signal:SIGINT", "bootstrap", "nightly"])
        {
            assert_eq!(name.parse::<Trigger>().unwrap().to_string(), name);
        }
    }
}
