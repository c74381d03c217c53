//! A record as the catalog holds it: encoded, and what many snapshots have in common only once.
//!
//! ```text
//! record:  process │ parent, time │ trigger, origin │ region size … root
//!
//! text:    length of the process, process │ trigger, origin: once for all snapshots that have the same
//! own:     parent, time │ region size … root
//! ```
//!
//! A snapshot of 16 KiB of bytes takes some 130 bytes so, where a decoded [`Record`] takes a kilobyte. It is decoded when
//! somebody looks at it, which takes a microsecond.
//!
//! Who wrote the record may have meant harm, and stored bytes compress well. So each part has a limit, and a command line that is
//! longer than what a capture records is cut while it is read, before its words become strings.

use std::collections::HashSet;
use std::sync::Arc;

use jiff::Timestamp;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::hash::Hash;
use crate::record::{self, AttachmentRef, Origin, Record, RecordError, SnapshotId, Trigger};
use crate::units::{RegionSize, usize_of};

/// Trigger and origin take at most this many, after a long command line was cut.
const MAX_SOURCE_BYTES: usize = 64 << 10;

/// All the rest takes at most this many: a thousand attachments.
const MAX_OWN_BYTES: usize = 64 << 10;

/// The triggers that have a text, and all origins, as they are numbered.
const SIGNAL: u64 = 6;
const OTHER: u64 = 8;
const BYTES: u64 = 0;
const FILE: u64 = 1;
const PROCESS: u64 = 2;
const CORE: u64 = 3;

/// A record with its shared parts. What is in them was read once, and can be read.
#[derive(Clone)]
pub(crate) struct Held {
    text: Arc<[u8]>,
    own: Arc<[u8]>,
}

/// All texts that are held, each once.
#[derive(Default)]
pub(crate) struct Texts {
    known: HashSet<Arc<[u8]>>,
    bytes: usize,
}

#[derive(Serialize, Deserialize)]
struct Descent {
    parent: Option<SnapshotId>,
    #[serde(with = "record::nanoseconds")]
    time: Timestamp,
}

#[derive(Deserialize)]
struct Time(#[serde(with = "record::nanoseconds")] Timestamp);

#[derive(Serialize, Deserialize)]
struct Source {
    trigger: Trigger,
    origin: Origin,
}

#[derive(Serialize, Deserialize)]
struct Content {
    region_size: RegionSize,
    memory_bytes: u64,
    zero_bytes: u64,
    regions: u64,
    attachments: Vec<AttachmentRef>,
    layout: Hash,
    root: Hash,
}

impl Held {
    /// The record in stored bytes, all of which it must use.
    pub(crate) fn read(stored: &[u8]) -> Result<Held, RecordError> {
        let bytes = record::without_version(stored)?;
        let (held, used_bytes) = Held::read_first(bytes, &Texts::default())?;
        match bytes.len() - used_bytes {
            0 => Ok(held),
            left => Err(failed(format!("{left} bytes are left over"))),
        }
    }

    /// The record at the start of `bytes`, which have no version byte, and how many of them it takes. A text that is
    /// among the `known` is not looked through again.
    pub(crate) fn read_first(bytes: &[u8], known: &Texts) -> Result<(Held, usize), RecordError> {
        let mut walk = Walk { rest: bytes };
        let process = walk.bytes()?;
        let process_bytes = u8::try_from(process.len())
            .map_err(|_| failed(format!("a process name has {} bytes, 255 at most", process.len())))?;
        let start = walk.rest;
        walk.descent()?;
        let descent = &start[..start.len() - walk.rest.len()];
        let mut text = [&[process_bytes], process].concat();
        let source_at = text.len();
        walk.source(&mut text)?;
        if text.len() - source_at > MAX_SOURCE_BYTES {
            let found = text.len() - source_at;
            return Err(failed(format!("trigger and origin have {found} bytes, {MAX_SOURCE_BYTES} at most")));
        }
        let text = match known.known.get(&text[..]) {
            Some(text) => text.clone(),
            None => {
                str::from_utf8(process).map_err(|error| failed(error.to_string()))?;
                record::decode_first::<Source>(&text[source_at..])?;
                text.into()
            }
        };
        let start = walk.rest;
        walk.content(|_| ())?;
        let content = &start[..start.len() - walk.rest.len()];
        if descent.len() + content.len() > MAX_OWN_BYTES {
            let found = descent.len() + content.len();
            return Err(failed(format!("{found} bytes beside its origin, {MAX_OWN_BYTES} at most")));
        }
        let own = [descent, content].concat().into();
        Ok((Held { text, own }, bytes.len() - walk.rest.len()))
    }

    /// The record. Cost: a microsecond.
    pub(crate) fn record(&self) -> Arc<Record> {
        let (Descent { parent, time }, content) = self.descent();
        let (Source { trigger, origin }, _) = first(self.source());
        let (content, _) = first(content);
        let Content { region_size, memory_bytes, zero_bytes, regions, attachments, layout, root } = content;
        let process = self.process().to_owned();
        Arc::new(Record {
            process,
            parent,
            time,
            trigger,
            origin,
            region_size,
            memory_bytes,
            zero_bytes,
            regions,
            attachments,
            layout,
            root,
        })
    }

    /// The record without the version byte: as it was stored, but for a command line that was cut.
    pub(crate) fn write(&self, out: &mut Vec<u8>) {
        let (_, content) = self.descent();
        // Writing to memory cannot fail.
        let _ = record::encode_onto(&self.process(), out);
        out.extend(&self.own[..self.own.len() - content.len()]);
        out.extend(self.source());
        out.extend(content);
    }

    pub(crate) fn process(&self) -> &str {
        // It was UTF-8 when it was read.
        str::from_utf8(&self.text[1..1 + usize::from(self.text[0])]).unwrap_or_default()
    }

    pub(crate) fn parent(&self) -> Option<SnapshotId> {
        Walk { rest: &self.own }.descent().ok()?.0
    }

    pub(crate) fn time(&self) -> Timestamp {
        Walk { rest: &self.own }.descent().map(|(_, time)| time).unwrap_or_default()
    }

    /// Where the snapshot stands in the order of all.
    pub(crate) fn moment(&self) -> Timestamp {
        let mut walk = Walk { rest: &self.own };
        let mut moment = None;
        // Both were there when it was read.
        let time = walk.descent().map(|(_, time)| time).unwrap_or_default();
        let _ = walk.content(|name| moment = moment.or_else(|| record::moment_in(name)));
        moment.unwrap_or(time)
    }

    /// Process, trigger and origin: the same for all that have the same.
    pub(crate) fn text(&self) -> &Arc<[u8]> {
        &self.text
    }

    /// Where the memory came from.
    pub(crate) fn origin(&self) -> Origin {
        first::<Source>(self.source()).0.origin
    }

    /// How many bytes it has for itself.
    pub(crate) fn own_bytes(&self) -> usize {
        self.own.len()
    }

    /// How many bytes its text has, but for a command line, which has a bound of its own.
    pub(crate) fn text_bytes_without_command(&self) -> usize {
        self.text.len().saturating_sub(2 * record::MAX_COMMAND_BYTES)
    }

    fn source(&self) -> &[u8] {
        &self.text[1 + usize::from(self.text[0])..]
    }

    fn descent(&self) -> (Descent, &[u8]) {
        let (descent, used_bytes) = first(&self.own);
        (descent, &self.own[used_bytes..])
    }
}

impl std::fmt::Debug for Held {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.record().fmt(f)
    }
}

impl Texts {
    /// Exchanges the text for the same one that is held already, or holds it from now on. Where all of them would have more
    /// than `most_bytes`, the command line is left out.
    pub(crate) fn share(&mut self, held: &mut Held, most_bytes: usize) {
        if !self.known.contains(&held.text) && self.bytes + held.text.len() > most_bytes {
            held.text = without_command(held);
        }
        match self.known.get(&held.text) {
            Some(known) => held.text = known.clone(),
            None => {
                self.bytes += held.text.len();
                self.known.insert(held.text.clone());
            }
        }
    }

    /// The record is held no more.
    pub(crate) fn let_go(&mut self, held: &Held) {
        // By that record, and here.
        if Arc::strong_count(&held.text) <= 2 && self.known.remove(&held.text) {
            self.bytes -= held.text.len();
        }
    }
}

/// The text with a mark in the place of the command line, if there is one.
fn without_command(held: &Held) -> Arc<[u8]> {
    let (mut source, _) = first::<Source>(held.source());
    match &mut source.origin {
        Origin::LiveProcess { command, .. } | Origin::Core { command, .. } if !command.is_empty() => {
            *command = vec![record::CUT.to_owned()];
        }
        _ => return held.text.clone(),
    }
    let mut text = held.text[..1 + usize::from(held.text[0])].to_vec();
    match record::encode_onto(&source, &mut text) {
        Ok(()) => text.into(),
        Err(_) => held.text.clone(),
    }
}

/// The value at the start of bytes in which it was found before.
fn first<T: DeserializeOwned>(bytes: &[u8]) -> (T, usize) {
    #[expect(
        clippy::expect_used,
        reason = "`read_first` makes no `Held` of bytes of which it could not read each part"
    )]
    record::decode_first(bytes).expect("it was read before")
}

fn failed(detail: String) -> RecordError {
    RecordError::Decode { detail }
}

/// Steps over the values of a record without making anything of them.
struct Walk<'a> {
    rest: &'a [u8],
}

impl<'a> Walk<'a> {
    fn take(&mut self, bytes: usize) -> Result<&'a [u8], RecordError> {
        let (taken, rest) =
            self.rest.split_at_checked(bytes).ok_or_else(|| failed("it ends too early".to_owned()))?;
        self.rest = rest;
        Ok(taken)
    }

    fn number(&mut self) -> Result<u64, RecordError> {
        let (number, used_bytes) =
            record::read_number(self.rest).ok_or_else(|| failed("a number is not in order".to_owned()))?;
        self.take(used_bytes)?;
        Ok(number)
    }

    /// A text, or a list of bytes.
    fn bytes(&mut self) -> Result<&'a [u8], RecordError> {
        let length = self.number()?;
        self.take(usize_of(length))
    }

    fn optional(
        &mut self,
        value: impl FnOnce(&mut Self) -> Result<(), RecordError>,
    ) -> Result<(), RecordError> {
        match self.number()? {
            0 => Ok(()),
            _ => value(self),
        }
    }

    fn hash(&mut self) -> Result<Hash, RecordError> {
        let mut hash = Hash::ZERO;
        hash.0.copy_from_slice(self.take(Hash::BYTES)?);
        Ok(hash)
    }

    /// Parent and time.
    fn descent(&mut self) -> Result<(Option<SnapshotId>, Timestamp), RecordError> {
        let parent = match self.take(1)? {
            [0] => None,
            [1] => Some(SnapshotId(self.hash()?)),
            _ => return Err(failed("neither a parent nor none".to_owned())),
        };
        let (time, used_bytes) = record::decode_first::<Time>(self.rest)?;
        self.take(used_bytes)?;
        Ok((parent, time.0))
    }

    /// What comes after the origin; `attachment` gets the name of each.
    fn content(&mut self, mut attachment: impl FnMut(&str)) -> Result<(), RecordError> {
        let (_, used_bytes) = record::decode_first::<RegionSize>(self.rest)?;
        self.take(used_bytes)?;
        for _ in 0..3 {
            self.number()?;
        }
        for _ in 0..self.number()? {
            let name = str::from_utf8(self.bytes()?).map_err(|error| failed(error.to_string()))?;
            attachment(name);
            self.hash()?;
            self.number()?;
        }
        self.hash()?;
        self.hash()?;
        Ok(())
    }

    /// Trigger and origin, which are added to `out`; of the command line as much as is held.
    fn source(&mut self, out: &mut Vec<u8>) -> Result<(), RecordError> {
        let start = self.rest;
        if matches!(self.number()?, SIGNAL | OTHER) {
            self.bytes()?;
        }
        let has_command = match self.number()? {
            BYTES => false,
            FILE => {
                self.bytes()?;
                false
            }
            PROCESS => {
                self.number()?;
                self.optional(|walk| walk.bytes().map(drop))?;
                true
            }
            CORE => {
                self.bytes()?;
                self.optional(|walk| walk.number().map(drop))?;
                self.optional(|walk| walk.bytes().map(drop))?;
                true
            }
            _ => return Err(failed("an unknown origin".to_owned())),
        };
        let before_command = start.len() - self.rest.len();
        if !has_command {
            out.extend(&start[..before_command]);
            return Ok(());
        }
        let words = self.number()?;
        let mut command_bytes = 0usize;
        let mut first_words = Vec::new();
        for _ in 0..words {
            let word = self.bytes()?;
            if command_bytes <= record::MAX_COMMAND_BYTES {
                first_words.push(word);
            }
            command_bytes = command_bytes.saturating_add(word.len() + 1);
        }
        if command_bytes <= record::MAX_COMMAND_BYTES + record::CUT.len() + 1 {
            out.extend(&start[..start.len() - self.rest.len()]);
            return Ok(());
        }
        out.extend(&start[..before_command]);
        let words = first_words.into_iter().map(|word| String::from_utf8_lossy(word).into_owned());
        record::encode_onto(&record::cut_command(words), out)
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;

    fn record(trigger: Trigger, origin: Origin) -> Record {
        Record {
            process: "web-1".to_owned(),
            parent: Some(SnapshotId(Hash::of(b"parent"))),
            time: Timestamp::from_second(1_790_000_000).unwrap(),
            trigger,
            origin,
            region_size: RegionSize::default(),
            memory_bytes: 1 << 40,
            zero_bytes: 300,
            regions: 64,
            attachments: vec![AttachmentRef { name: "a".to_owned(), hash: Hash::of(b"a"), length_bytes: 1 }],
            layout: Hash::of(b"layout"),
            root: Hash::of(b"root"),
        }
    }

    fn process(command: Vec<String>) -> Origin {
        Origin::LiveProcess { pid: 70_000, path: Some(PathBuf::from("/bin/a")), command }
    }

    #[test]
    fn every_trigger_and_every_origin_comes_back_and_is_written_as_it_was() {
        let triggers = ["explicit", "periodic", "idle", "first-listen", "first-stdin", "first-environ"];
        let triggers = triggers.into_iter().chain(["bootstrap", "signal:SIGINT", "nightly", ""]);
        let path = || PathBuf::from("/core");
        let words = || vec!["a".to_owned(), String::new()];
        let origins = [
            Origin::Bytes,
            Origin::File { path: path() },
            process(words()),
            Origin::LiveProcess { pid: 1, path: None, command: Vec::new() },
            Origin::Core { path: path(), pid: Some(7), executable: Some(path()), command: words() },
            Origin::Core { path: path(), pid: None, executable: None, command: Vec::new() },
        ];
        for trigger in triggers {
            for origin in origins.clone() {
                let record = record(trigger.parse().unwrap(), origin);
                let stored = record::encode(&record).unwrap();
                let held = Held::read(&stored).unwrap();
                assert_eq!(*held.record(), record);
                assert_eq!((held.process(), held.parent()), ("web-1", record.parent));
                assert_eq!((held.time(), held.moment()), (record.time, record.time));
                let mut written = stored[..1].to_vec();
                held.write(&mut written);
                assert_eq!(written, stored);
                for length in 0..stored.len() {
                    assert!(Held::read(&stored[..length]).is_err(), "cut at {length}");
                }
            }
        }
    }

    #[test]
    fn what_many_have_in_common_is_held_once() {
        let mut texts = Texts::default();
        let mut held: Vec<Held> = (0..3)
            .map(|at| {
                let stored = Record { regions: at, ..record(Trigger::Idle, process(vec!["a".to_owned()])) };
                Held::read(&record::encode(&stored).unwrap()).unwrap()
            })
            .collect();
        held.iter_mut().for_each(|held| texts.share(held, 1 << 20));
        assert!(Arc::ptr_eq(held[0].text(), held[2].text()));
        assert_eq!((texts.known.len(), texts.bytes), (1, held[0].text.len()));
        while let Some(last) = held.pop() {
            assert_eq!(texts.known.len(), 1);
            texts.let_go(&last);
        }
        assert_eq!((texts.known.len(), texts.bytes), (0, 0));
    }

    /// A command line of sixteen million empty words took 24 bytes of memory for each of them.
    #[test]
    fn a_command_line_that_is_too_long_is_cut_while_it_is_read() {
        for words in [vec![String::new(); 2_000_000], vec!["é".repeat(100_000)], vec!["x".repeat(50); 1000]]
        {
            let stored = record::encode(&record(Trigger::Explicit, process(words.clone()))).unwrap();
            let held = Held::read(&stored).unwrap();
            assert!(held.text.len() < record::MAX_COMMAND_BYTES + 100, "{}", held.text.len());
            let Origin::LiveProcess { command, .. } = held.origin() else { panic!() };
            let (last, kept) = command.split_last().unwrap();
            assert_eq!(last, record::CUT);
            let whole = |(kept, word): (&String, &String)| word.starts_with(&**kept);
            assert!(!kept.is_empty() && kept.iter().zip(&words).all(whole));
            let again = record::encode(&*held.record()).unwrap();
            assert_eq!(*Held::read(&again).unwrap().record(), *held.record(), "it is cut once");
        }
        let words = vec!["x".repeat(1023); 4];
        let stored = record::encode(&record(Trigger::Explicit, process(words.clone()))).unwrap();
        assert_eq!(Held::read(&stored).unwrap().origin(), process(words), "4,096 bytes are not too long");
    }

    #[test]
    fn what_cannot_be_held_is_refused_by_name() {
        let refused = |record: &Record| Held::read(&record::encode(record).unwrap()).unwrap_err().to_string();
        let usual = || record(Trigger::Explicit, Origin::Bytes);
        let long = refused(&record(Trigger::Other("x".repeat(70_000)), Origin::Bytes));
        assert!(long.contains("trigger and origin"), "{long}");
        let long = refused(&Record { process: "x".repeat(256), ..usual() });
        assert!(long.contains("process name"), "{long}");
        let attachments = vec![usual().attachments[0].clone(); 3_000];
        let long = refused(&Record { attachments, ..usual() });
        assert!(long.contains("beside its origin"), "{long}");
    }

    #[test]
    fn where_texts_take_too_much_together_command_lines_are_left_out() {
        let mut texts = Texts::default();
        for at in 0..100 {
            let words = vec![format!("{at}"), "x".repeat(3_000)];
            let stored = record::encode(&record(Trigger::Explicit, process(words.clone()))).unwrap();
            let mut held = Held::read(&stored).unwrap();
            texts.share(&mut held, 20_000);
            let expected = if at < 6 { words } else { vec![record::CUT.to_owned()] };
            assert_eq!(held.origin(), process(expected));
        }
        assert!(texts.bytes < 21_000);
    }
}
