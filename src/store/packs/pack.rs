//! A pack: an append-only file of objects.
//!
//! ```text
//!  header (header.rs) | objects (object.rs), each at a multiple of 8 …
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
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use super::header::PackHeader;
use super::object::{self, ALIGNMENT_BYTES, HEADER_BYTES, ObjectKind, Place};
use super::scan::Scan;
use super::sealing::seal_bytes;
use super::watermark::Watermark;
use crate::codec::Codec;
use crate::hash::Hash;
use crate::store::error::StoreError;
use crate::store::format::Format;
use crate::store::id::{PackId, StoreId};
use crate::store::lock::Access;
use crate::store::names::UNFINISHED;
use crate::sync::{Mutex, RwLock};
use crate::sys::dir::Name;
use crate::sys::file::{self, File};
use crate::sys::map::{self, PackMap};
use crate::units::usize_of;

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

impl Pack {
    /// Creates an empty pack of this name.
    pub(crate) fn create(
        name: Name,
        format: &Format,
        number: u32,
        replaces: Vec<u32>,
    ) -> Result<Pack, StoreError> {
        let header = PackHeader::new(format, number, PackId::new(), replaces);
        let bytes = header.to_bytes();
        let file = file::create_new(&name).map_err(StoreError::io("create", &name))?;
        if let Err(error) = file.write_all_at(&bytes, 0) {
            // Leave no pack behind that has no header.
            let _ = file::remove(&name);
            return Err(StoreError::io("write", &name)(error));
        }
        Ok(Pack::with(name, header, file, true, bytes.len() as u64))
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
        let read = PackHeader::read(&file, length_bytes, number);
        Ok(read.map_err(StoreError::io("read", &name))?.and_then(|header| {
            if header.fits(format) {
                Ok(Pack::with(name, header, file, is_writable, length_bytes))
            } else {
                Err("it belongs to another store".to_owned())
            }
        }))
    }

    fn with(name: Name, header: PackHeader, file: File, is_writable: bool, length_bytes: u64) -> Pack {
        Pack {
            number: header.number,
            id: header.pack,
            name,
            header_bytes: header.length_bytes(),
            store: header.store,
            replaces: header.replaces,
            file: RwLock::new(Arc::new(file)),
            is_writable,
            length_bytes: AtomicU64::new(length_bytes),
            durable_bytes: AtomicU64::new(length_bytes),
            has_rest: AtomicBool::new(false),
            unfilled: Mutex::default(),
            map: Mutex::new(None),
        }
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
        let max_bytes = (HEADER_BYTES + ObjectKind::MAX_PLAIN_BYTES) as u64;
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
        object::write(ObjectKind::Attachment, Codec::None, Hash::of(&plain), &plain, &mut object);
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

#[cfg(test)]
#[allow(clippy::cast_possible_truncation)]
mod tests {
    use super::*;
    use crate::store::format::FORMAT_VERSION;
    use crate::store::packs::names::file_name;
    use crate::store::packs::scan::Scanned;
    use crate::store::packs::scan::tests::objects;

    fn format() -> Format {
        Format {
            version: FORMAT_VERSION,
            region_size: Default::default(),
            codec: Codec::Lz4,
            id: StoreId::new(),
        }
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
}
