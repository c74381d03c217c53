//! Wasmer's journal format, read without trusting its content.
//!
//! ```text
//! magic, 8 bytes │ record │ record │ …
//!
//! record:  kind, 2 bytes │ length, 6 bytes │ the entry, as rkyv archives it       (big-endian)
//! ```
//!
//! An entry is aligned to 8 bytes and its byte strings to 16, both counted from the beginning of
//! the file. Wasmer's own reader trusts every byte. This reader lets rkyv check each archive first,
//! and never allocates more than the file holds.

use std::io::{Read, Write};

use rkyv::rancor;
use rkyv::ser::Serializer;
use rkyv::ser::allocator::Arena;
use rkyv::ser::sharing::Share;
use rkyv::ser::writer::IoWriter;
use rkyv::util::AlignedVec;
use wasmer_journal::{
    ArchivedJournalEntry, JOURNAL_MAGIC_NUMBER_BYTES, JournalEntry, JournalEntryRecordType,
};

use crate::error::{Damage, Error};

const HEADER_BYTES: usize = 8;
const ALIGN_BYTES: usize = 16;

/// Writes a journal.
pub(crate) struct Encoder<W> {
    out: W,
    at_bytes: usize,
    record: Vec<u8>,
    arena: Arena,
}

impl<W: Write> Encoder<W> {
    pub(crate) fn new(mut out: W) -> Result<Encoder<W>, Error> {
        out.write_all(&JOURNAL_MAGIC_NUMBER_BYTES).map_err(unencodable)?;
        let at_bytes = JOURNAL_MAGIC_NUMBER_BYTES.len();
        Ok(Encoder { out, at_bytes, record: Vec::new(), arena: Arena::new() })
    }

    pub(crate) fn write(&mut self, entry: JournalEntry<'_>) -> Result<(), Error> {
        let kind = u16::from(entry.archive_record_type());
        self.record.clear();
        let writer = IoWriter::with_pos(&mut self.record, self.at_bytes + HEADER_BYTES);
        let mut serializer = Serializer::new(writer, self.arena.acquire(), Share::new());
        let strategy = rancor::Strategy::<_, rancor::Error>::wrap(&mut serializer);
        entry.serialize_archive(strategy).map_err(unencodable)?;
        let mut header = (self.record.len() as u64).to_be_bytes();
        header[..2].copy_from_slice(&kind.to_be_bytes());
        self.out.write_all(&header).and_then(|()| self.out.write_all(&self.record)).map_err(unencodable)?;
        self.at_bytes += HEADER_BYTES + self.record.len();
        Ok(())
    }

    pub(crate) fn into_inner(self) -> W {
        self.out
    }
}

fn unencodable(error: impl std::fmt::Display) -> Error {
    Error::Encode { why: error.to_string() }
}

/// Reads a journal of a known length.
pub(crate) struct Decoder<R> {
    input: R,
    at_bytes: u64,
    length_bytes: u64,
}

impl<R: Read> Decoder<R> {
    pub(crate) fn new(input: R, length_bytes: u64) -> Result<Decoder<R>, Damage> {
        let mut decoder = Decoder { input, at_bytes: 0, length_bytes };
        if length_bytes > 0 {
            let mut magic = [0; HEADER_BYTES];
            decoder.fill(&mut magic)?;
            if magic != JOURNAL_MAGIC_NUMBER_BYTES {
                return Err(Damage::NotAJournal);
            }
        }
        Ok(decoder)
    }

    /// Where the next record begins.
    pub(crate) fn at_bytes(&self) -> u64 {
        self.at_bytes
    }

    /// The next entry. After an error, further calls make no sense.
    pub(crate) fn read(&mut self) -> Result<Option<JournalEntry<'static>>, Damage> {
        let header = loop {
            if self.at_bytes == self.length_bytes {
                return Ok(None);
            }
            let mut header = [0; HEADER_BYTES];
            self.peek(HEADER_BYTES as u64)?;
            self.fill(&mut header)?;
            // Several journals may be concatenated.
            if header != JOURNAL_MAGIC_NUMBER_BYTES {
                break header;
            }
        };
        if header == [0; HEADER_BYTES] {
            self.at_bytes -= HEADER_BYTES as u64;
            return Err(Damage::Unfinished);
        }
        let [high, low, rest @ ..] = header;
        let kind = u16::from_be_bytes([high, low]);
        let length_bytes = rest.iter().fold(0, |length, byte| length << 8 | u64::from(*byte));
        let result = self.entry(kind, length_bytes);
        if result.is_err() {
            self.at_bytes -= HEADER_BYTES as u64;
        }
        result.map(Some)
    }

    fn entry(&mut self, kind: u16, length_bytes: u64) -> Result<JournalEntry<'static>, Damage> {
        let record_type = JournalEntryRecordType::try_from(kind).map_err(|_| Damage::Kind { kind })?;
        self.peek(length_bytes)?;
        let wrong = |why: String| Damage::Record { kind, length_bytes, why };
        let length = usize::try_from(length_bytes).map_err(|error| wrong(error.to_string()))?;
        // The record lies in the buffer with the same alignment as in the file, because its parts
        // would not be aligned otherwise. Even an empty record needs the buffer for that.
        let start_bytes = self.at_bytes;
        let padding = usize::try_from(start_bytes % ALIGN_BYTES as u64).unwrap_or_default();
        let mut buffer: AlignedVec<ALIGN_BYTES> = AlignedVec::with_capacity(ALIGN_BYTES + length);
        buffer.resize(padding + length, 0);
        self.fill(&mut buffer[padding..])?;
        let entry = decode(record_type, &buffer[padding..]).map_err(wrong);
        if entry.is_err() {
            self.at_bytes = start_bytes;
        }
        entry
    }

    /// An error unless this many bytes are left.
    fn peek(&self, expected_bytes: u64) -> Result<(), Damage> {
        let found_bytes = self.length_bytes - self.at_bytes;
        if expected_bytes > found_bytes { Err(Damage::Cut { expected_bytes, found_bytes }) } else { Ok(()) }
    }

    fn fill(&mut self, buffer: &mut [u8]) -> Result<(), Damage> {
        self.peek(buffer.len() as u64)?;
        self.input.read_exact(buffer)?;
        self.at_bytes += buffer.len() as u64;
        Ok(())
    }
}

/// Checks the archive of an entry and copies it out.
fn decode(record_type: JournalEntryRecordType, bytes: &[u8]) -> Result<JournalEntry<'static>, String> {
    macro_rules! checked {
        ($($name:ident)* ; $($empty:ident)*) => {
            match record_type {
                $(JournalEntryRecordType::$name => {
                    let archived = rkyv::access::<_, rancor::Error>(bytes).map_err(|error| error.to_string())?;
                    ArchivedJournalEntry::$name(archived)
                })*
                $(JournalEntryRecordType::$empty => ArchivedJournalEntry::$empty,)*
            }
        };
    }
    let archived = checked! {
        InitModuleV1 ClearEtherealV1 ProcessExitV1 SetThreadV1 CloseThreadV1 FileDescriptorSeekV1
        FileDescriptorWriteV1 UpdateMemoryRegionV1 SetClockTimeV1 OpenFileDescriptorV1 OpenFileDescriptorV2
        CloseFileDescriptorV1 RenumberFileDescriptorV1 DuplicateFileDescriptorV1 DuplicateFileDescriptorV2
        CreateDirectoryV1 RemoveDirectoryV1 PathSetTimesV1 FileDescriptorSetTimesV1 FileDescriptorSetSizeV1
        FileDescriptorSetFdFlagsV1 FileDescriptorSetFlagsV1 FileDescriptorSetRightsV1 FileDescriptorAdviseV1
        FileDescriptorAllocateV1 CreateHardLinkV1 CreateSymbolicLinkV1 UnlinkFileV1 PathRenameV1
        ChangeDirectoryV1 EpollCreateV1 EpollCtlV1 TtySetV1 CreatePipeV1 CreateEventV1 PortAddAddrV1
        PortDelAddrV1 PortBridgeV1 PortGatewaySetV1 PortRouteAddV1 PortRouteDelV1 SocketOpenV1 SocketPairV1
        SocketListenV1 SocketBindV1 SocketConnectedV1 SocketAcceptedV1 SocketJoinIpv4MulticastV1
        SocketJoinIpv6MulticastV1 SocketLeaveIpv4MulticastV1 SocketLeaveIpv6MulticastV1 SocketSendFileV1
        SocketSendToV1 SocketSendV1 SocketSetOptFlagV1 SocketSetOptSizeV1 SocketSetOptTimeV1 SocketShutdownV1
        SnapshotV1;
        PortAddrClearV1 PortUnbridgeV1 PortDhcpAcquireV1 PortRouteClearV1
    };
    JournalEntry::try_from(archived).map(JournalEntry::into_owned).map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::samples;

    fn encoded(entries: &[JournalEntry<'static>]) -> Vec<u8> {
        let mut encoder = Encoder::new(Vec::new()).unwrap();
        entries.iter().for_each(|entry| encoder.write(entry.clone()).unwrap());
        encoder.into_inner()
    }

    fn decoded(bytes: &[u8]) -> (Vec<JournalEntry<'static>>, Option<Damage>) {
        let mut entries = Vec::new();
        let mut decoder = match Decoder::new(bytes, bytes.len() as u64) {
            Ok(decoder) => decoder,
            Err(damage) => return (entries, Some(damage)),
        };
        loop {
            match decoder.read() {
                Ok(Some(entry)) => entries.push(entry),
                Ok(None) => return (entries, None),
                Err(damage) => return (entries, Some(damage)),
            }
        }
    }

    #[test]
    fn what_is_encoded_is_decoded_again() {
        let entries = samples::one_of_each();
        let (found, damage) = decoded(&encoded(&entries));
        assert!(damage.is_none(), "{damage:?}");
        assert_eq!(found, entries);
    }

    #[test]
    fn journals_one_behind_the_other_are_one() {
        let entries = samples::one_of_each();
        let (found, damage) = decoded(&[encoded(&entries), encoded(&entries)].concat());
        assert!(damage.is_none(), "{damage:?}");
        assert_eq!(found, [entries.clone(), entries].concat());
    }

    #[test]
    fn a_journal_that_was_cut_anywhere_gives_what_came_before_and_says_so() {
        let entries = samples::one_of_each();
        let whole = encoded(&entries);
        for end in 1..whole.len() {
            let (found, damage) = decoded(&whole[..end]);
            assert_eq!(found, entries[..found.len()]);
            let is_whole = damage.is_none();
            assert_eq!(is_whole, encoded(&found).len() == end, "cut at {end}: {damage:?}");
        }
    }

    #[test]
    fn a_journal_with_any_byte_changed_never_panics() {
        let whole = encoded(&samples::one_of_each());
        for at in 0..whole.len() {
            for change in [0x01, 0x80, 0xff] {
                let mut bytes = whole.clone();
                bytes[at] ^= change;
                decoded(&bytes);
            }
        }
    }

    #[test]
    fn a_record_whose_writer_was_killed_is_the_end() {
        let bytes = [encoded(&[JournalEntry::ClearEtherealV1]), vec![0; 40]].concat();
        assert!(matches!(decoded(&bytes), (found, Some(Damage::Unfinished)) if found.len() == 1));
    }
}
