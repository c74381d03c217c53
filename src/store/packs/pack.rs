//! A pack: an append-only file of objects.
//!
//! ```text
//!  0          8        12       16         32        48       52        56        60     64
//!  +----------+--------+--------+----------+---------+--------+---------+---------+------+---- …
//!  |"STILLPAK"| format | number | store id | pack id | region | replaces|  check  | zero | numbers of
//!  |   8 B    |  u32   |  u32   |   16 B   |  16 B   | size   | count   | CRC32C  |      | replaced packs
//!  +----------+--------+--------+----------+---------+--------+---------+---------+------+---- …
//!  | objects, each at a multiple of 8 …
//! ```
//!
//! The pack id is drawn at random. Numbers come back when the pack with the highest is removed;
//! an id does not, so it names these bytes for ever.
//!
//! A pack that gc wrote names the packs it replaces. It gets its final name when it is complete and
//! durable; from then on the replaced packs are superfluous, also if a crash kept gc from removing
//! them. So an object never stays in two packs, and "it is in no pack any more" can be relied on.

use std::io;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use super::object::{self, ALIGNMENT_BYTES, HEADER_BYTES, Header, Kind, Place};
use super::watermark::Watermark;
use crate::codec::Codec;
use crate::hash::Hash;
use crate::store::error::StoreError;
use crate::store::format::{FORMAT_VERSION, Format};
use crate::store::id::{PackId, StoreId};
use crate::store::lock::Access;
use crate::store::names::UNFINISHED;
use crate::sync::{Mutex, RwLock};
use crate::sys::dir::{Dir, Name};
use crate::sys::file::{self, File};
use crate::sys::map::{self, PackMap, Since};
use crate::units::usize_of;

/// A pack is sealed when it has grown to this: large enough that a terabyte is a few thousand
/// files, small enough that gc rewrites one in about a second.
const SEAL_BYTES: u64 = 256 << 20;

const MAGIC: &[u8; 8] = b"STILLPAK";
const FIXED_HEADER_BYTES: usize = 64;
/// What is looked at of a file that may be a pack: a header of as many replaced packs as there are in a thousand
/// gigabytes.
pub(crate) const MAX_HEADER_BYTES: usize = 64 << 10;
/// Where the check is in it.
const CHECK: std::ops::Range<usize> = 56..60;

/// One open pack.
pub(crate) struct Pack {
    pub(crate) number: u32,
    pub(crate) id: PackId,
    pub(crate) name: Name,
    pub(crate) replaces: Vec<u32>,
    store: StoreId,
    header_bytes: u64,
    file: RwLock<Arc<File>>,
    /// Whether it could be opened for writing.
    is_writable: bool,
    /// How many bytes are written and may be read.
    length_bytes: AtomicU64,
    /// How many of them are known to be durable.
    durable_bytes: AtomicU64,
    has_rest: AtomicBool,
    /// Holes that are to be filled, and could not be yet.
    unfilled: Mutex<Vec<Range<u64>>>,
    map: Mutex<Option<Arc<PackMap>>>,
}

#[cfg(feature = "fault-injection")]
pub use sealing::{Sealing, seal_packs_at};

/// Packs that are sealed earlier, so that a test sees many of them.
#[cfg(feature = "fault-injection")]
mod sealing {
    use crate::sync::RwLock;
    use std::path::{Path, PathBuf};

    static SEALINGS: RwLock<Vec<(PathBuf, u64)>> = RwLock::new(Vec::new());

    /// Packs below a directory are sealed at another size until this is dropped.
    #[derive(Debug)]
    pub struct Sealing {
        root: PathBuf,
    }

    /// Has the packs of all stores below a directory sealed when they have grown to so many bytes.
    pub fn seal_packs_at(root: impl Into<PathBuf>, bytes: u64) -> Sealing {
        let root = root.into();
        let mut sealings = SEALINGS.write();
        sealings.push((root.clone(), bytes));
        Sealing { root }
    }

    impl Drop for Sealing {
        fn drop(&mut self) {
            let mut sealings = SEALINGS.write();
            if let Some(at) = sealings.iter().position(|(root, _)| *root == self.root) {
                sealings.swap_remove(at);
            }
        }
    }

    /// What is set for a file, if anything is.
    pub(super) fn of(path: &Path) -> Option<u64> {
        let sealings = SEALINGS.read();
        sealings.iter().find(|(root, _)| path.starts_with(root)).map(|(_, bytes)| *bytes)
    }
}

/// How large a pack at this path, or in this directory, grows before another one is begun.
pub(crate) fn seal_bytes(path: &Path) -> u64 {
    #[cfg(feature = "fault-injection")]
    if let Some(bytes) = sealing::of(path) {
        return bytes;
    }
    let _ = path;
    SEAL_BYTES
}

/// The file name of pack `number`.
pub(crate) fn file_name(number: u32) -> String {
    format!("{number:08}.pack")
}

/// The number of the pack with this file name.
pub(crate) fn number_of(name: &str) -> Option<u32> {
    name.strip_suffix(".pack")?.parse().ok().filter(|number| file_name(*number) == name)
}

/// How long the header of a pack is that replaces `replaced` others.
pub(crate) fn header_bytes(replaced: usize) -> u64 {
    (FIXED_HEADER_BYTES + 4 * replaced).next_multiple_of(ALIGNMENT_BYTES) as u64
}

pub(crate) fn header(format: &Format, number: u32, id: PackId, replaces: &[u32]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(FIXED_HEADER_BYTES);
    bytes.extend_from_slice(MAGIC);
    bytes.extend_from_slice(&format.version.to_le_bytes());
    bytes.extend_from_slice(&number.to_le_bytes());
    bytes.extend_from_slice(&format.id.0);
    bytes.extend_from_slice(&id.0);
    bytes.extend_from_slice(&u32::from(format.region_size).to_le_bytes());
    bytes.extend_from_slice(&u32::try_from(replaces.len()).unwrap_or(u32::MAX).to_le_bytes());
    bytes.extend_from_slice(&[0; 8]);
    bytes.extend(replaces.iter().flat_map(|number| number.to_le_bytes()));
    bytes.resize(bytes.len().next_multiple_of(ALIGNMENT_BYTES), 0);
    let check = crc32c::crc32c(&bytes);
    bytes[CHECK].copy_from_slice(&check.to_le_bytes());
    bytes
}

impl Pack {
    /// Creates an empty pack of this name.
    pub(crate) fn create(
        name: Name,
        format: &Format,
        number: u32,
        replaces: Vec<u32>,
    ) -> Result<Pack, StoreError> {
        let id = PackId::new();
        let bytes = header(format, number, id, &replaces);
        let file = file::create_new(&name).map_err(StoreError::io("create", &name))?;
        if let Err(error) = file.write_all_at(&bytes, 0) {
            // Leave no pack behind that has no header.
            let _ = file::remove(&name);
            return Err(StoreError::io("write", &name)(error));
        }
        let length_bytes = bytes.len() as u64;
        Ok(Pack {
            number,
            id,
            name,
            replaces,
            store: format.id,
            header_bytes: length_bytes,
            file: RwLock::new(Arc::new(file)),
            is_writable: true,
            length_bytes: AtomicU64::new(length_bytes),
            durable_bytes: AtomicU64::new(length_bytes),
            has_rest: AtomicBool::new(false),
            unfilled: Mutex::default(),
            map: Mutex::new(None),
        })
    }

    /// Opens a pack of the store and checks its header; what is wrong with it otherwise.
    pub(crate) fn open(
        name: Name,
        format: &Format,
        number: u32,
        access: Access,
    ) -> Result<Result<Pack, String>, StoreError> {
        if let Some(found) = name.look().map_err(StoreError::io("open", &name))?
            && !found.is_plain_file()
        {
            return Ok(Err(found.is_no("plain file").to_string()));
        }
        let to_read = || file::open_to_read(&name).map(|file| (file, false));
        let opened = match access {
            Access::Owner => match file::open_existing(&name) {
                // It can be read all the same, and another one be written to.
                Err(error) if error.kind() == io::ErrorKind::PermissionDenied => to_read(),
                other => other.map(|file| (file, true)),
            },
            Access::Reader => to_read(),
        };
        let (file, is_writable) = opened.map_err(StoreError::io("open", &name))?;
        let length_bytes = file.length_bytes().map_err(StoreError::io("read", &name))?;
        let read = read_header(&file, length_bytes, format, number).map_err(StoreError::io("read", &name))?;
        Ok(read.map(|(id, replaces)| Pack {
            number,
            id,
            name,
            header_bytes: header_bytes(replaces.len()),
            replaces,
            store: format.id,
            file: RwLock::new(Arc::new(file)),
            is_writable,
            length_bytes: AtomicU64::new(length_bytes),
            durable_bytes: AtomicU64::new(length_bytes),
            has_rest: AtomicBool::new(false),
            unfilled: Mutex::default(),
            map: Mutex::new(None),
        }))
    }

    /// How large it may grow before another one is begun.
    pub(crate) fn seal_bytes(&self) -> u64 {
        seal_bytes(self.name.path())
    }

    /// Gives a pack that was written under a temporary name its final one.
    pub(crate) fn rename(&mut self, name: Name) -> io::Result<()> {
        file::rename_new(&self.name, &name)?;
        self.name = name;
        Ok(())
    }

    fn file(&self) -> Arc<File> {
        self.file.read().clone()
    }

    /// Whether it may be written to: not where only reading it is allowed, nor where it has a name elsewhere as well,
    /// as in a backup of hard links, which would change with it.
    pub(crate) fn is_ours_alone(&self) -> bool {
        self.is_writable && self.file().has_other_names().is_ok_and(|others| !others)
    }

    /// Puts a copy of it in its place, durably, if it is not ours alone.
    fn make_ours(&self) -> io::Result<()> {
        if self.is_ours_alone() {
            return Ok(());
        }
        let copy = self.name.with_extension(UNFINISHED);
        file::remove_if_there(&copy)?;
        file::copy(&self.name, &copy)?;
        file::rename(&copy, &self.name)?;
        file::sync_dir(self.name.dir())?;
        *self.file.write() = Arc::new(file::open_existing(&self.name)?);
        Ok(())
    }

    /// How many bytes it has.
    pub(crate) fn length_bytes(&self) -> u64 {
        self.length_bytes.load(Ordering::Acquire)
    }

    /// Says of it that something is so up to this byte.
    pub(crate) fn watermark(&self, end_bytes: u64) -> Watermark {
        Watermark { pack: self.id, end_bytes }
    }

    /// Where its first object begins.
    pub(crate) fn header_bytes(&self) -> u64 {
        self.header_bytes
    }

    /// Appends whole objects. Only one thread at a time may do so.
    ///
    /// After an error the pack is as long as before. If what was written of the objects could not be
    /// cut off again either, [`Self::has_rest`] says so.
    pub(crate) fn append(&self, objects: &[u8]) -> Result<u64, StoreError> {
        let at_bytes = self.length_bytes();
        let file = self.file();
        if let Err(error) = file.write_all_at(objects, at_bytes) {
            let cut = file.set_length(at_bytes);
            self.has_rest.store(cut.is_err(), Ordering::Release);
            return Err(StoreError::io("write", &self.name)(error));
        }
        self.length_bytes.store(at_bytes + objects.len() as u64, Ordering::Release);
        Ok(at_bytes)
    }

    /// Whether there are bytes past the end that a failed append left behind.
    pub(crate) fn has_rest(&self) -> bool {
        self.has_rest.load(Ordering::Acquire)
    }

    /// The place of an object in it.
    pub(crate) fn place(&self, offset_bytes: u64) -> Place {
        Place::new(self.store, self.number, offset_bytes)
    }

    /// Walks the bytes of it from `from_bytes` on.
    pub(crate) fn scan<'a>(&self, bytes: &'a PackMap, from_bytes: u64) -> Scan<'a> {
        Scan::of_map(bytes, from_bytes, self.store, self.number)
    }

    /// Makes durable what is written.
    pub(crate) fn sync(&self) -> Result<(), StoreError> {
        self.file().sync().map_err(StoreError::io("make durable", &self.name))
    }

    /// What was appended before this byte was made durable.
    pub(crate) fn set_durable(&self, durable_bytes: u64) {
        self.durable_bytes.fetch_max(durable_bytes, Ordering::AcqRel);
    }

    /// Takes back what is not known to be durable: it is in the pack no more, whether or not it can be cut off.
    pub(crate) fn take_back(&self) -> Result<(), StoreError> {
        self.cut(self.durable_bytes.load(Ordering::Acquire), Access::Owner)
    }

    /// Cuts off, durably, what is past its end, and fills what could not be filled before.
    pub(crate) fn cut_rest(&self) -> Result<(), StoreError> {
        while let Some(hole) = self.unfilled().last().cloned() {
            self.fill(hole)?;
            self.unfilled().pop();
        }
        self.cut(self.length_bytes(), Access::Owner)
    }

    /// Cuts it, durably. From here on it has these bytes only, also if that fails. A reader only takes no notice of
    /// the rest.
    pub(crate) fn cut(&self, length_bytes: u64, access: Access) -> Result<(), StoreError> {
        *self.map.lock() = None;
        self.length_bytes.store(length_bytes, Ordering::Release);
        match access {
            Access::Reader => Ok(()),
            Access::Owner => self
                .make_ours()
                .and_then(|()| self.file().set_length(length_bytes))
                .and_then(|()| self.file().sync())
                .map_err(StoreError::io("cut off the end of", &self.name)),
        }
    }

    /// Whether an object fits in there.
    pub(crate) fn can_fill(hole: &std::ops::Range<u64>) -> bool {
        let max_bytes = (HEADER_BYTES + Kind::MAX_PLAIN_BYTES) as u64;
        let is_whole = |bytes: u64| bytes.is_multiple_of(ALIGNMENT_BYTES as u64);
        (HEADER_BYTES as u64..=max_bytes).contains(&(hole.end - hole.start))
            && is_whole(hole.start)
            && is_whole(hole.end)
    }

    fn unfilled(&self) -> std::sync::MutexGuard<'_, Vec<Range<u64>>> {
        self.unfilled.lock()
    }

    /// This hole is filled with [`Self::cut_rest`].
    pub(crate) fn fill_later(&self, hole: Range<u64>) {
        self.unfilled().push(hole);
    }

    /// Whether there are holes that are to be filled.
    pub(crate) fn has_holes(&self) -> bool {
        !self.unfilled().is_empty()
    }

    /// Puts an object that nothing refers to in the place of bytes that are none, durably.
    pub(crate) fn fill(&self, hole: std::ops::Range<u64>) -> Result<(), StoreError> {
        *self.map.lock() = None;
        let plain_bytes = usize_of(hole.end - hole.start) - HEADER_BYTES;
        let (plain, mut object) = (vec![0; plain_bytes], Vec::new());
        object::write(Kind::Attachment, Codec::None, Hash::of(&plain), &plain, &mut object);
        object::put(&mut object, self.place(hole.start));
        self.make_ours()
            .and_then(|()| self.file().write_all_at(&object, hole.start))
            .and_then(|()| self.file().sync())
            .map_err(StoreError::io("fill a hole in", &self.name))
    }

    /// The bytes of the pack up to `end_bytes` at least.
    pub(crate) fn bytes(&self, end_bytes: u64) -> Result<Arc<PackMap>, StoreError> {
        let mut map = self.map.lock();
        if let Some(map) = map.as_ref().filter(|map| map.len() as u64 >= end_bytes) {
            return Ok(map.clone());
        }
        let length_bytes = usize_of(self.length_bytes());
        let fresh = map::map_pack(&self.file(), length_bytes).map_err(StoreError::io("map", &self.name))?;
        let fresh = Arc::new(fresh);
        *map = Some(fresh.clone());
        Ok(fresh)
    }
}

/// The id of a pack and the numbers of those it replaces; what is wrong with its header otherwise.
fn read_header(
    file: &File,
    length_bytes: u64,
    format: &Format,
    number: u32,
) -> io::Result<Result<(PackId, Vec<u32>), String>> {
    let (fixed, numbers) = match read_header_bytes(file, length_bytes, number)? {
        Ok(both) => both,
        Err(why) => return Ok(Err(why)),
    };
    let (numbers, _padding) = numbers.as_chunks::<4>();
    let replaced = replaces_count(&fixed) as usize;
    let replaces: Vec<u32> =
        numbers.iter().take(replaced).map(|number| u32::from_le_bytes(*number)).collect();
    let version = u32::from_le_bytes([fixed[8], fixed[9], fixed[10], fixed[11]]).clamp(1, FORMAT_VERSION);
    let mut id = PackId([0; 16]);
    id.0.copy_from_slice(&fixed[32..48]);
    let expected = header(&Format { version, ..format.clone() }, number, id, &replaces);
    Ok(if expected[..FIXED_HEADER_BYTES] == fixed {
        Ok((id, replaces))
    } else {
        Err("its header is damaged, or it belongs to another store".to_owned())
    })
}

/// The fixed part of a header, and all that is behind it.
type HeaderBytes = ([u8; FIXED_HEADER_BYTES], Vec<u8>);

/// The header of pack `number` as bytes, of which only the length is checked; what is wrong otherwise.
fn read_header_bytes(file: &File, length_bytes: u64, number: u32) -> io::Result<Result<HeaderBytes, String>> {
    if length_bytes < FIXED_HEADER_BYTES as u64 {
        return Ok(Err(format!("it has {length_bytes} bytes, fewer than its header")));
    }
    let mut fixed = [0; FIXED_HEADER_BYTES];
    file.read_exact_at(&mut fixed, 0)?;
    if &fixed[..8] != MAGIC {
        return Ok(Err("it does not begin as a pack does".to_owned()));
    }
    let replaced = replaces_count(&fixed);
    let whole_bytes = header_bytes(replaced as usize);
    // All that it replaces have lower numbers.
    if replaced > number || whole_bytes > length_bytes {
        return Ok(Err("its header is damaged".to_owned()));
    }
    let mut rest = vec![0; usize_of(whole_bytes) - FIXED_HEADER_BYTES];
    file.read_exact_at(&mut rest, FIXED_HEADER_BYTES as u64)?;
    Ok(Ok((fixed, rest)))
}

/// What a pack says of the store that it belongs to: the same as the FORMAT file, but for the codec.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Home {
    pub(crate) version: u32,
    pub(crate) store: StoreId,
    pub(crate) region_bytes: u32,
}

/// What the header of pack `number` says of the store; `None` if it is not in order.
pub(crate) fn home(name: &Name, number: u32) -> io::Result<Option<Home>> {
    if name.look()?.is_some_and(|found| !found.is_plain_file()) {
        return Ok(None);
    }
    let file = file::open_to_read(name)?;
    let Ok((fixed, rest)) = read_header_bytes(&file, file.length_bytes()?, number)? else { return Ok(None) };
    let whole = [&fixed[..], &rest].concat();
    let u32_at = |at: usize| u32::from_le_bytes([fixed[at], fixed[at + 1], fixed[at + 2], fixed[at + 3]]);
    let store = store_of(&whole).filter(|_| u32_at(12) == number);
    Ok(store.map(|store| Home { version: u32_at(8), store, region_bytes: u32_at(48) }))
}

fn replaces_count(fixed: &[u8; FIXED_HEADER_BYTES]) -> u32 {
    u32::from_le_bytes([fixed[52], fixed[53], fixed[54], fixed[55]])
}

/// The store whose pack these bytes are, by a header that is in order.
pub(crate) fn store_of(bytes: &[u8]) -> Option<StoreId> {
    let fixed = bytes.first_chunk::<FIXED_HEADER_BYTES>()?;
    let whole_bytes = usize::try_from(header_bytes(replaces_count(fixed) as usize)).ok()?;
    if whole_bytes > MAX_HEADER_BYTES {
        return None;
    }
    let mut whole = bytes.get(..whole_bytes)?.to_vec();
    whole[CHECK].fill(0);
    let is_whole = fixed.starts_with(MAGIC) && fixed[CHECK] == crc32c::crc32c(&whole).to_le_bytes();
    let mut store = StoreId([0; 16]);
    store.0.copy_from_slice(&fixed[16..32]);
    is_whole.then_some(store)
}

/// What a scan of a pack comes upon.
pub(crate) enum Scanned<'a> {
    /// A whole object.
    Object {
        offset_bytes: u64,
        header: Header,
        /// Its payload, still encoded.
        payload: &'a [u8],
    },
    /// Bytes that are no object.
    Damaged {
        offset_bytes: u64,
        end_bytes: u64,
        /// The header, where at least that is in order.
        header: Option<Header>,
        why: &'static str,
    },
}

impl Scanned<'_> {
    /// Where it ends.
    pub(crate) fn end_bytes(&self) -> u64 {
        match self {
            Scanned::Object { offset_bytes, header, .. } => offset_bytes + header.object_bytes() as u64,
            Scanned::Damaged { end_bytes, .. } => *end_bytes,
        }
    }
}

/// The header, where at least that is in order, and what is wrong.
type Unreadable = (Option<Header>, &'static str);

/// Makes bytes of a pack ready to be touched.
pub(crate) fn ready(map: &PackMap, bytes: Range<usize>) -> Result<(), StoreError> {
    map.ready(bytes).map_err(StoreError::io("read", map.path()))
}

/// The same for who reads many objects: [`PackMap::ready_since`].
pub(crate) fn ready_since(map: &PackMap, bytes: Range<usize>, since: Since) -> Result<(), StoreError> {
    map.ready_since(bytes, since).map_err(StoreError::io("read", map.path()))
}

/// A scan has so much read ahead of it.
const AHEAD_BYTES: usize = 1 << 20;

/// Walks the objects of a pack from a byte on, checking each object's checksum. After damage it
/// goes on at the next whole object there is. After an error it is at its end.
pub(crate) struct Scan<'a> {
    bytes: &'a [u8],
    /// What the bytes are mapped from, if they are not in memory anyhow.
    map: Option<&'a PackMap>,
    /// Up to where they may be touched.
    ready: usize,
    at: usize,
    store: StoreId,
    pack: u32,
    /// How many bytes may still be checked in search of whole objects, so that bytes made to look
    /// like many long objects cannot keep us for ever.
    search_bytes: usize,
}

impl<'a> Scan<'a> {
    /// Scans a map of pack number `pack` of a store from `from_bytes` on.
    pub(crate) fn of_map(map: &'a PackMap, from_bytes: u64, store: StoreId, pack: u32) -> Scan<'a> {
        let scan = Scan::of_bytes(map, from_bytes, store, pack);
        Scan { map: Some(map), ready: scan.at, ..scan }
    }

    /// The same of bytes in memory.
    pub(crate) fn of_bytes(bytes: &'a [u8], from_bytes: u64, store: StoreId, pack: u32) -> Scan<'a> {
        let at = usize_of(from_bytes).min(bytes.len());
        let search_bytes = bytes.len().saturating_mul(16);
        Scan { bytes, map: None, ready: bytes.len(), at, store, pack, search_bytes }
    }

    /// Makes the bytes up to here ready.
    fn ready(&mut self, end: usize) -> Result<(), StoreError> {
        let end = end.min(self.bytes.len());
        if let Some(map) = self.map.filter(|_| end > self.ready) {
            let ahead = end.max(self.ready.saturating_add(AHEAD_BYTES)).min(self.bytes.len());
            // Where not all that lies ahead can be read, perhaps what is needed now can.
            match ready(map, self.ready..ahead) {
                Ok(()) => self.ready = ahead,
                Err(_) => {
                    ready(map, self.ready..end)?;
                    self.ready = end;
                }
            }
        }
        Ok(())
    }

    fn read(&mut self, at: usize) -> Result<Result<(Header, &'a [u8]), Unreadable>, StoreError> {
        self.ready(at.saturating_add(HEADER_BYTES))?;
        let rest = &self.bytes[at..];
        let place = Place::new(self.store, self.pack, at as u64);
        let header = match Header::read(rest, place) {
            Ok(header) => header,
            Err(why) => return Ok(Err((None, why))),
        };
        self.ready(at.saturating_add(header.object_bytes()))?;
        Ok(header.payload(rest).map(|payload| (header, payload)).map_err(|why| {
            self.search_bytes = self.search_bytes.saturating_sub(header.object_bytes());
            (Some(header), why)
        }))
    }

    /// Where the next whole object begins after `at`, or the end.
    fn next_whole_object(&mut self, at: usize) -> Result<usize, StoreError> {
        let mut next = at + ALIGNMENT_BYTES;
        while next + HEADER_BYTES <= self.bytes.len() && self.search_bytes > 0 {
            if self.read(next)?.is_ok() {
                return Ok(next);
            }
            next += ALIGNMENT_BYTES;
        }
        Ok(self.bytes.len())
    }

    fn scanned(&mut self) -> Result<Scanned<'a>, StoreError> {
        let offset_bytes = self.at as u64;
        Ok(match self.read(self.at)? {
            Ok((header, payload)) => {
                self.at += header.object_bytes();
                Scanned::Object { offset_bytes, header, payload }
            }
            Err((header, why)) => {
                self.at = self.next_whole_object(self.at)?;
                Scanned::Damaged { offset_bytes, end_bytes: self.at as u64, header, why }
            }
        })
    }
}

impl<'a> Iterator for Scan<'a> {
    type Item = Result<Scanned<'a>, StoreError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.at >= self.bytes.len() {
            return None;
        }
        let scanned = self.scanned();
        if scanned.is_err() {
            self.at = self.bytes.len();
        }
        Some(scanned)
    }
}

/// The packs in `dir`: number and name, in order. Other files are left alone.
pub(crate) fn list(dir: &Dir) -> Result<Vec<(u32, Name)>, StoreError> {
    let mut packs = Vec::new();
    for name in file::list(dir).map_err(StoreError::io("list", dir))? {
        if let Some(number) = name.name().to_str().and_then(number_of) {
            packs.push((number, name));
        }
    }
    packs.sort_unstable_by_key(|(number, _)| *number);
    Ok(packs)
}

#[cfg(test)]
#[allow(clippy::cast_possible_truncation)]
mod tests {
    use super::*;

    fn format() -> Format {
        Format {
            version: FORMAT_VERSION,
            region_size: Default::default(),
            codec: Codec::Lz4,
            id: StoreId::new(),
        }
    }

    /// Six objects for pack 7, as they are from byte `first` on, and where they begin.
    fn objects(store: StoreId, first: usize) -> (Vec<u8>, Vec<usize>) {
        let mut bytes = Vec::new();
        let mut starts = Vec::new();
        for byte in 0..6u8 {
            starts.push(bytes.len());
            let plain: Vec<u8> = (0..200).map(|at: u8| at.wrapping_mul(byte + 3)).collect();
            object::write(Kind::Region, Codec::None, Hash::of(&plain), &plain, &mut bytes);
            let start = starts[usize::from(byte)];
            object::put(&mut bytes[start..], Place::new(store, 7, (first + start) as u64));
        }
        (bytes, starts)
    }

    #[test]
    fn a_pack_opens_with_what_was_appended_and_not_in_another_store() {
        let dir = tempfile::tempdir().unwrap();
        let (format, path) = (format(), Name::at(&dir.path().join(file_name(7))).unwrap());
        let pack = Pack::create(path.clone(), &format, 7, vec![1, 2, 5]).unwrap();
        let first = pack.length_bytes() as usize;
        pack.append(&objects(format.id, first).0).unwrap();
        let open = Pack::open(path.clone(), &format, 7, Access::Owner).unwrap().unwrap();
        assert_eq!(open.replaces, [1, 2, 5]);
        let bytes = open.bytes(0).unwrap();
        let whole =
            open.scan(&bytes, open.header_bytes()).filter(|it| matches!(it, Ok(Scanned::Object { .. })));
        assert_eq!(whole.count(), 6);
        assert!(Pack::open(path.clone(), &format, 8, Access::Owner).unwrap().is_err());
        let other = Format { id: StoreId([0; 16]), ..format };
        assert!(Pack::open(path, &other, 7, Access::Reader).unwrap().is_err());
    }

    #[test]
    fn after_damage_a_scan_goes_on_at_the_next_whole_object() {
        let store = StoreId::new();
        let (bytes, starts) = objects(store, 0);
        for at in 0..bytes.len() {
            let mut damaged = bytes.clone();
            damaged[at] ^= 0x10;
            let hit = starts.iter().rposition(|start| *start <= at).unwrap();
            let mut whole = Vec::new();
            let mut holes = Vec::new();
            for scanned in Scan::of_bytes(&damaged, 0, store, 7) {
                match scanned.unwrap() {
                    Scanned::Object { offset_bytes, .. } => whole.push(offset_bytes as usize),
                    Scanned::Damaged { offset_bytes, .. } => holes.push(offset_bytes as usize),
                }
            }
            assert_eq!(holes, [starts[hit]], "byte {at}");
            assert_eq!(whole, [&starts[..hit], &starts[hit + 1..]].concat(), "byte {at}");
        }
    }
}
