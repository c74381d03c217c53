//! The FORMAT file: the properties of a store, as text. It is written once.
//!
//! ```text
//! stillframe store
//! format = 1
//! region_size = 16384
//! codec = lz4
//! id = 5f0c…  (32 hex digits)
//! check = 1a2b3c4d  (CRC32C of all lines above, in hex)
//! ```
//!
//! A store whose FORMAT is missing or damaged is not opened. Repair rewrites the file from the
//! packs (identity.rs).

use super::error::StoreError;
use super::id::StoreId;
use super::names::PACKS_DIR;
use super::packs::names;
use crate::codec::Codec;
use crate::sys::dir::{Dir, Name};
use crate::sys::file;
use crate::units::RegionSize;

/// The format that this program reads and writes.
pub(crate) const FORMAT_VERSION: u32 = 1;

/// The name of the file in the store's directory.
pub(crate) const FORMAT_FILE: &str = "FORMAT";

/// The greatest size of the file.
const MAX_BYTES: u64 = 64 * 1024;

const FIRST_LINE: &str = "stillframe store";

/// The content of the FORMAT file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Format {
    pub(crate) version: u32,
    pub(crate) region_size: RegionSize,
    pub(crate) codec: Codec,
    pub(crate) id: StoreId,
}

impl Format {
    /// The text of the file.
    pub(crate) fn text(&self) -> String {
        let lines = format!(
            "{FIRST_LINE}\nformat = {}\nregion_size = {}\ncodec = {}\nid = {}\n",
            self.version,
            self.region_size.bytes(),
            self.codec,
            self.id
        );
        format!("{lines}check = {:08x}\n", crc32c::crc32c(lines.as_bytes()))
    }

    /// Parses the text. The error says what is wrong with it.
    pub(crate) fn parse(text: &str) -> Result<Format, String> {
        let (lines, check) = text.rsplit_once("check = ").ok_or("it has no check line")?;
        let expected = format!("{:08x}\n", crc32c::crc32c(lines.as_bytes()));
        if check != expected {
            return Err(format!("its check is {:?}, expected {:?}", check.trim_end(), expected.trim_end()));
        }
        let field = |name: &str| field(lines, name).ok_or_else(|| format!("it has no {name} line"));
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

    /// Writes the file atomically and makes it durable.
    pub(crate) fn write(&self, store: &Dir) -> Result<(), StoreError> {
        let name = store.join(FORMAT_FILE);
        file::write_whole(&name, self.text().as_bytes()).map_err(StoreError::io("write", &name))
    }

    /// Reads the file of a store whose format is not newer than this program's.
    pub(crate) fn read(store: &Dir) -> Result<Format, StoreError> {
        let (name, text, found) = read_text(store)?;
        let path = (&name).into();
        // A newer format may change the rest, but never so that it is a valid rest of this format.
        let as_ours = format!("{FIRST_LINE}\nformat = {FORMAT_VERSION}\n");
        let rest = text.splitn(3, '\n').nth(2).unwrap_or_default();
        if found > FORMAT_VERSION && Format::parse(&format!("{as_ours}{rest}")).is_ok() {
            let detail = format!("it says format {found}, and its check was made of {FORMAT_VERSION}");
            return Err(StoreError::FormatFile { path, detail });
        }
        if found > FORMAT_VERSION {
            let supported = FORMAT_VERSION;
            return Err(StoreError::NewerFormat { path: store.into(), found, supported });
        }
        Format::parse(&text).map_err(|detail| StoreError::FormatFile { path, detail })
    }

    /// Reads the file, whatever its version.
    #[cfg(test)]
    pub(crate) fn read_any(store: &Dir) -> Result<Format, StoreError> {
        let (name, text, _) = read_text(store)?;
        Format::parse(&text).map_err(|detail| StoreError::FormatFile { path: (&name).into(), detail })
    }
}

/// The value in a line of the text.
pub(super) fn field<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(" = "))
}

/// The text of a file that may be damaged. Empty if there is no file.
pub(super) fn any_text(store: &Dir) -> String {
    let bytes = file::read_bounded(&store.join(FORMAT_FILE), MAX_BYTES).unwrap_or_default();
    String::from_utf8_lossy(&bytes).into_owned()
}

/// The version of the store at `store`, if it is one.
pub(crate) fn version(store: &Dir) -> Result<u32, StoreError> {
    Ok(read_text(store)?.2)
}

/// The store id in the file. It is read for every version, because another version of this program
/// uses the other fields.
pub(crate) fn id_line(store: &Dir) -> Result<String, StoreError> {
    let (name, text, _) = read_text(store)?;
    let detail = || "it has no id line".to_owned();
    let id = field(&text, "id").map(str::to_owned);
    id.ok_or_else(|| StoreError::FormatFile { path: (&name).into(), detail: detail() })
}

/// The file, its text and its version. The version is read before the check line is verified, so
/// that a newer format may change the rest.
fn read_text(store: &Dir) -> Result<(Name, String, u32), StoreError> {
    let not_a_store = |why: &str| StoreError::NotAStore { path: store.into(), why: why.to_owned() };
    let name = store.join(FORMAT_FILE);
    let damaged = |detail| StoreError::FormatFile { path: (&name).into(), detail };
    let text = match file::read_bounded(&name, MAX_BYTES) {
        Ok(bytes) => String::from_utf8_lossy(&bytes).into_owned(),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            let packs = store.join(PACKS_DIR).open_dir().map_err(StoreError::io("open", store));
            let has_packs = packs.and_then(|packs| names::list(&packs)).is_ok_and(|packs| !packs.is_empty());
            return Err(if has_packs {
                damaged("it is missing, and there are packs".to_owned())
            } else {
                not_a_store("the directory has no FORMAT file")
            });
        }
        Err(error) if error.kind() == std::io::ErrorKind::InvalidData => {
            return Err(damaged(format!("it has {error}")));
        }
        Err(error) => return Err(StoreError::io("read", &name)(error)),
    };
    let mut lines = text.lines();
    if lines.next() != Some(FIRST_LINE) {
        return Err(damaged(format!("its first line is not {FIRST_LINE:?}")));
    }
    let version = lines.next().and_then(|line| line.strip_prefix("format = ")?.parse::<u32>().ok());
    let version = version.ok_or_else(|| damaged("its second line does not give the format".to_owned()))?;
    Ok((name, text, version))
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
        let dir = tempfile::tempdir().unwrap();
        let store = &Dir::open(dir.path()).unwrap();
        format().write(store).unwrap();
        let read = Format::read(store).unwrap();
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
        let dir = tempfile::tempdir().unwrap();
        let store = &Dir::open(dir.path()).unwrap();
        std::fs::write(dir.path().join(FORMAT_FILE), "stillframe store\nformat = 99\nwhatever\n").unwrap();
        assert!(matches!(Format::read(store), Err(StoreError::NewerFormat { found: 99, .. })));
    }
}
