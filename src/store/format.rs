//! The FORMAT file: what a store is, as text, written once.
//!
//! ```text
//! stillframe store
//! format = 1
//! region_size = 16384
//! codec = lz4
//! id = 5f0c…  (32 hex digits)
//! check = 1a2b3c4d  (CRC32C of all lines above, in hex)
//! ```

use std::fs;
use std::path::{Path, PathBuf};

use super::error::StoreError;
use super::id::StoreId;
use crate::codec::Codec;
use crate::sys::file;
use crate::units::RegionSize;

/// The format this program reads and writes.
pub(crate) const FORMAT_VERSION: u32 = 1;

/// The name of the file in the store's directory.
pub(crate) const FORMAT_FILE: &str = "FORMAT";

const FIRST_LINE: &str = "stillframe store";

/// What the FORMAT file says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Format {
    pub(crate) version: u32,
    pub(crate) region_size: RegionSize,
    pub(crate) codec: Codec,
    pub(crate) id: StoreId,
}

impl Format {
    /// The text of the file.
    fn text(&self) -> String {
        let lines = format!(
            "{FIRST_LINE}\nformat = {}\nregion_size = {}\ncodec = {}\nid = {}\n",
            self.version,
            self.region_size.bytes(),
            self.codec,
            self.id
        );
        format!("{lines}check = {:08x}\n", crc32c::crc32c(lines.as_bytes()))
    }

    /// What the text says; what is wrong with it otherwise.
    fn parse(text: &str) -> Result<Format, String> {
        let (lines, check) = text.rsplit_once("check = ").ok_or("it has no check line")?;
        let expected = format!("{:08x}\n", crc32c::crc32c(lines.as_bytes()));
        if check != expected {
            return Err(format!("its check is {:?}, expected {:?}", check.trim_end(), expected.trim_end()));
        }
        let field = |name: &str| {
            lines
                .lines()
                .find_map(|line| line.strip_prefix(name)?.strip_prefix(" = "))
                .ok_or_else(|| format!("it has no {name} line"))
        };
        let number = |name: &str| {
            field(name)?.parse::<u32>().map_err(|_| format!("its {name} is not a number that fits"))
        };
        let id = field("id")?;
        let mut bytes = [0; 16];
        if id.len() != 32 || !id.is_ascii() {
            return Err("its id is not 32 hex digits".to_owned());
        }
        for (at, byte) in bytes.iter_mut().enumerate() {
            *byte = u8::from_str_radix(&id[2 * at..2 * at + 2], 16)
                .map_err(|_| "its id is not hex".to_owned())?;
        }
        Ok(Format {
            version: number("format")?,
            region_size: RegionSize::new(number("region_size")?).map_err(|error| error.to_string())?,
            codec: field("codec")?.parse().map_err(|error: crate::codec::CodecError| error.to_string())?,
            id: StoreId(bytes),
        })
    }

    /// Writes the file, whole and durable or not at all.
    pub(crate) fn write(&self, store: &Path) -> Result<(), StoreError> {
        let path = store.join(FORMAT_FILE);
        file::write_whole(&path, self.text().as_bytes()).map_err(StoreError::io("write", path))
    }

    /// Reads the file of a store that is not newer than this program.
    pub(crate) fn read(store: &Path) -> Result<Format, StoreError> {
        let (path, text, found) = read_text(store)?;
        if found > FORMAT_VERSION {
            let supported = FORMAT_VERSION;
            return Err(StoreError::NewerFormat { path: store.to_owned(), found, supported });
        }
        Format::parse(&text).map_err(|detail| StoreError::FormatFile { path, detail })
    }

    /// Reads the file whatever version it is of.
    #[cfg(test)]
    pub(crate) fn read_any(store: &Path) -> Result<Format, StoreError> {
        let (path, text, _) = read_text(store)?;
        Format::parse(&text).map_err(|detail| StoreError::FormatFile { path, detail })
    }
}

/// The version of the store at `store`, if it is one.
pub(crate) fn version(store: &Path) -> Result<u32, StoreError> {
    Ok(read_text(store)?.2)
}

/// The file's path, its text, and the version in it: which is read before the check, so that a newer
/// format may change the rest.
fn read_text(store: &Path) -> Result<(PathBuf, String, u32), StoreError> {
    let not_a_store = |why: &str| StoreError::NotAStore { path: store.to_owned(), why: why.to_owned() };
    let path = store.join(FORMAT_FILE);
    let metadata = fs::metadata(store).map_err(|error| match error.kind() {
        std::io::ErrorKind::NotFound => {
            not_a_store("there is nothing; `stillframe init` or the first capture creates one")
        }
        _ => StoreError::io("open", store)(error),
    })?;
    if !metadata.is_dir() {
        return Err(not_a_store("it is a file; a store is a directory"));
    }
    let text = match file::read_bounded(&path, 64 * 1024) {
        Ok(bytes) => String::from_utf8_lossy(&bytes).into_owned(),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            return Err(not_a_store("the directory has no FORMAT file"));
        }
        Err(error) => return Err(StoreError::io("read", path)(error)),
    };
    let damaged = |detail| StoreError::FormatFile { path: path.clone(), detail };
    let mut lines = text.lines();
    if lines.next() != Some(FIRST_LINE) {
        return Err(damaged(format!("its first line is not {FIRST_LINE:?}")));
    }
    let version = lines.next().and_then(|line| line.strip_prefix("format = ")?.parse::<u32>().ok());
    let version = version.ok_or_else(|| damaged("its second line does not give the format".to_owned()))?;
    Ok((path, text, version))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn format() -> Format {
        Format {
            version: FORMAT_VERSION,
            region_size: RegionSize::default(),
            codec: Codec::Lz4,
            id: StoreId::new(),
        }
    }

    #[test]
    fn the_file_reads_back_as_it_was_written() {
        let store = tempfile::tempdir().unwrap();
        format().write(store.path()).unwrap();
        let read = Format::read(store.path()).unwrap();
        assert_eq!((read.version, read.codec), (FORMAT_VERSION, Codec::Lz4));
    }

    #[test]
    fn every_changed_byte_is_detected() {
        let text = format().text();
        for at in 0..text.len() {
            let mut bytes = text.clone().into_bytes();
            bytes[at] ^= 1;
            assert!(Format::parse(&String::from_utf8_lossy(&bytes)).is_err(), "byte {at}");
        }
    }

    #[test]
    fn a_newer_format_is_told_apart_from_a_damaged_one() {
        let store = tempfile::tempdir().unwrap();
        fs::write(store.path().join(FORMAT_FILE), "stillframe store\nformat = 99\nwhatever\n").unwrap();
        assert!(matches!(Format::read(store.path()), Err(StoreError::NewerFormat { found: 99, .. })));
    }
}
