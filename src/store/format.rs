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
//!
//! The header of every pack says the same, but for the codec. So a store whose FORMAT is lost or damaged is not
//! opened, but repair writes the file anew from the packs.

use super::error::StoreError;
use super::id::StoreId;
use super::names::PACKS_DIR;
use super::packs::pack::{self, Home};
use crate::codec::Codec;
use crate::sys::dir::{Dir, Name};
use crate::sys::file;
use crate::units::RegionSize;

/// The format this program reads and writes.
pub(crate) const FORMAT_VERSION: u32 = 1;

/// The name of the file in the store's directory.
pub(crate) const FORMAT_FILE: &str = "FORMAT";

/// The file has no more bytes than this.
const MAX_BYTES: u64 = 64 * 1024;

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

    /// What the text says; what is wrong with it otherwise.
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

    /// Writes the file, whole and durable or not at all.
    pub(crate) fn write(&self, store: &Dir) -> Result<(), StoreError> {
        let name = store.join(FORMAT_FILE);
        file::write_whole(&name, self.text().as_bytes()).map_err(StoreError::io("write", &name))
    }

    /// Reads the file of a store that is not newer than this program.
    pub(crate) fn read(store: &Dir) -> Result<Format, StoreError> {
        let (name, text, found) = read_text(store)?;
        let path = (&name).into();
        // A newer format may change the rest, but not so that it fits this one.
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

    /// What the file should say, and what is wrong with it if it says something else or is not there: by
    /// the headers of the packs where they agree. An error where there is no store, or none can be made of it.
    pub(crate) fn found(store: &Dir) -> Result<(Format, Option<String>), StoreError> {
        let read = Format::read(store);
        let homes = homes(store)?;
        let wrong = match read {
            Ok(format) => match format.check_against(store, &homes) {
                Ok(()) => return Ok((format, None)),
                Err(wrong) => wrong,
            },
            Err(wrong) => wrong,
        };
        let StoreError::FormatFile { path, detail } = wrong else { return Err(wrong) };
        match Format::of_packs(store, &homes) {
            Ok(format) => Ok((format, Some(detail))),
            Err(why) => Err(StoreError::FormatLost { path, detail, why }),
        }
    }

    /// An error if there are packs in order and this is not the format of any.
    fn check_against(&self, store: &Dir, homes: &[Home]) -> Result<(), StoreError> {
        let fits = |home: &Home| home.store == self.id && home.region_bytes == u32::from(self.region_size);
        match homes.first() {
            Some(other) if !homes.iter().any(fits) => Err(StoreError::FormatFile {
                path: (&store.join(FORMAT_FILE)).into(),
                detail: format!("it is that of the store {}, and the packs are of {}", self.id, other.store),
            }),
            _ => Ok(()),
        }
    }

    /// The format that the packs tell; of the codec, which they do not, what is left of the file. Why
    /// there is none otherwise.
    fn of_packs(store: &Dir, homes: &[Home]) -> Result<Format, String> {
        let bytes = file::read_bounded(&store.join(FORMAT_FILE), MAX_BYTES).unwrap_or_default();
        let text = String::from_utf8_lossy(&bytes);
        let named = |home: &&Home| text.contains(&format!("id = {}", home.store));
        let home = homes.iter().find(named).or(homes.first()).ok_or("no pack has a header in order")?;
        let agrees = |other: &Home| (other.store, other.region_bytes) == (home.store, home.region_bytes);
        if !named(&home) && !homes.iter().all(agrees) {
            return Err("they are of several stores; leave those of one in packs/".to_owned());
        }
        let version = homes.iter().filter(|other| agrees(other)).map(|home| home.version).max().unwrap_or(0);
        if version > FORMAT_VERSION {
            return Err(format!("they have format {version}; use a newer stillframe"));
        }
        let region_size = RegionSize::new(home.region_bytes).map_err(|error| error.to_string())?;
        let codec = field(&text, "codec").and_then(|codec| codec.parse().ok()).unwrap_or_default();
        Ok(Format { version, region_size, codec, id: home.store })
    }

    /// Reads the file whatever version it is of.
    #[cfg(test)]
    pub(crate) fn read_any(store: &Dir) -> Result<Format, StoreError> {
        let (name, text, _) = read_text(store)?;
        Format::parse(&text).map_err(|detail| StoreError::FormatFile { path: (&name).into(), detail })
    }
}

/// The value in a line of the text.
fn field<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(" = "))
}

/// What those packs say of their store that have a header in order.
fn homes(store: &Dir) -> Result<Vec<Home>, StoreError> {
    let mut homes = Vec::new();
    let packs = store.join(PACKS_DIR);
    if packs.is_dir() {
        let packs = file::open_dir(&packs).map_err(StoreError::io("open", &packs))?;
        for (number, name) in pack::list(&packs)? {
            homes.extend(pack::home(&name, number).map_err(StoreError::io("read", &name))?);
        }
    }
    Ok(homes)
}

/// An error if there are packs in order and this is the format of none: then it is that of another store,
/// and what is in the packs would be taken for damaged.
pub(crate) fn check_packs(store: &Dir, format: &Format) -> Result<(), StoreError> {
    format.check_against(store, &homes(store)?)
}

/// The version of the store at `store`, if it is one.
pub(crate) fn version(store: &Dir) -> Result<u32, StoreError> {
    Ok(read_text(store)?.2)
}

/// Which store the file says it is of; whatever its version, as that is read by another program.
pub(crate) fn id_line(store: &Dir) -> Result<String, StoreError> {
    let (name, text, _) = read_text(store)?;
    let detail = || "it has no id line".to_owned();
    let id = field(&text, "id").map(str::to_owned);
    id.ok_or_else(|| StoreError::FormatFile { path: (&name).into(), detail: detail() })
}

/// The file, its text, and the version in it: which is read before the check, so that a newer
/// format may change the rest.
fn read_text(store: &Dir) -> Result<(Name, String, u32), StoreError> {
    let not_a_store = |why: &str| StoreError::NotAStore { path: store.into(), why: why.to_owned() };
    let name = store.join(FORMAT_FILE);
    let damaged = |detail| StoreError::FormatFile { path: (&name).into(), detail };
    let text = match file::read_bounded(&name, MAX_BYTES) {
        Ok(bytes) => String::from_utf8_lossy(&bytes).into_owned(),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            let packs = store.join(PACKS_DIR).open_dir().map_err(StoreError::io("open", store));
            let has_packs = packs.and_then(|packs| pack::list(&packs)).is_ok_and(|packs| !packs.is_empty());
            return Err(match has_packs {
                true => damaged("it is missing, and there are packs".to_owned()),
                false => not_a_store("the directory has no FORMAT file"),
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
