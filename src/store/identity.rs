//! Which store a directory is: the FORMAT file, compared with the headers of the packs.
//!
//! Each pack's header repeats what the file says, except for the codec. This detects a FORMAT file
//! that is missing, damaged or from another store, and repair rewrites it from the packs.

use super::error::StoreError;
use super::format::{self, FORMAT_FILE, FORMAT_VERSION, Format};
use super::names::PACKS_DIR;
use super::packs::header::PackHeader;
use super::packs::names;
use crate::sys::dir::{Dir, Name};
use crate::sys::file;
use crate::units::RegionSize;

/// The correct content of the FORMAT file, according to the pack headers if they agree, and what is
/// wrong with the present file, if anything. An error if there is no store, or if its identity
/// cannot be determined.
pub(crate) fn of(store: &Dir) -> Result<(Format, Option<String>), StoreError> {
    let read = Format::read(store);
    let headers = headers(store)?;
    let wrong = match read {
        Ok(format) => match check_against(&format, store, &headers) {
            Ok(()) => return Ok((format, None)),
            Err(wrong) => wrong,
        },
        Err(wrong) => wrong,
    };
    let StoreError::FormatFile { path, detail } = wrong else { return Err(wrong) };
    match of_packs(store, &headers) {
        Ok(format) => Ok((format, Some(detail))),
        Err(why) => Err(StoreError::FormatLost { path, detail, why }),
    }
}

/// Returns an error if there are valid packs and none of them has this format. The format is then
/// that of another store, and the packs' content would look damaged.
pub(crate) fn check_packs(store: &Dir, format: &Format) -> Result<(), StoreError> {
    check_against(format, store, &headers(store)?)
}

fn check_against(format: &Format, store: &Dir, headers: &[PackHeader]) -> Result<(), StoreError> {
    let is_of = |header: &PackHeader| {
        header.store == format.id && header.region_bytes == u32::from(format.region_size)
    };
    match headers.first() {
        Some(other) if !headers.iter().any(is_of) => Err(StoreError::FormatFile {
            path: (&store.join(FORMAT_FILE)).into(),
            detail: format!("it is that of the store {}, and the packs are of {}", format.id, other.store),
        }),
        _ => Ok(()),
    }
}

/// The format according to the packs. They do not record the codec, which is taken from what is
/// left of the file. The error says why there is none.
fn of_packs(store: &Dir, headers: &[PackHeader]) -> Result<Format, String> {
    let text = format::any_text(store);
    let named = |header: &&PackHeader| text.contains(&format!("id = {}", header.store));
    let header = headers.iter().find(named).or(headers.first()).ok_or("no pack has a header in order")?;
    let agrees =
        |other: &PackHeader| (other.store, other.region_bytes) == (header.store, header.region_bytes);
    if !named(&header) && !headers.iter().all(agrees) {
        return Err("they are of several stores; leave those of one in packs/".to_owned());
    }
    let versions = headers.iter().filter(|other| agrees(other)).map(|header| header.version);
    let version = versions.max().unwrap_or(0);
    if version > FORMAT_VERSION {
        return Err(format!("they have format {version}; use a newer stillframe"));
    }
    let region_size = RegionSize::new(header.region_bytes).map_err(|error| error.to_string())?;
    let codec = format::field(&text, "codec").and_then(|codec| codec.parse().ok()).unwrap_or_default();
    Ok(Format { version, region_size, codec, id: header.store })
}

/// The valid headers of all packs.
fn headers(store: &Dir) -> Result<Vec<PackHeader>, StoreError> {
    let packs = store.join(PACKS_DIR);
    if !packs.is_dir() {
        return Ok(Vec::new());
    }
    let packs = file::open_dir(&packs).map_err(StoreError::io("open", &packs))?;
    let mut headers = Vec::new();
    for (number, name) in names::list(&packs)? {
        headers.extend(header(&name, number).map_err(StoreError::io("read", &name))?);
    }
    Ok(headers)
}

fn header(name: &Name, number: u32) -> std::io::Result<Option<PackHeader>> {
    if name.look()?.is_some_and(|found| !found.is_plain_file()) {
        return Ok(None);
    }
    let file = file::open_to_read(name)?;
    Ok(PackHeader::read(&file, file.length_bytes()?, number)?.ok())
}
