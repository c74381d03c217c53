//! Core dumps: the file as a whole, and its notes.

use std::path::Path;

use super::layout_in_order;
use crate::elf::Notes;
use crate::source::{Access, CoreSource, Source};

/// A core dump, which is written to `dir`. If it is accepted, it can be read whole, and its memory
/// is not more than the file holds. The bytes are also read as notes: accepted notes stay the same
/// when they are written and read again.
pub fn elf(data: &[u8], dir: &Path) {
    notes(data);
    let path = dir.join("core");
    let Ok(()) = std::fs::write(&path, data) else { panic!("{} can be written", path.display()) };
    let source = CoreSource::new(&path);
    let Ok(frozen) = source.open() else { return };
    let space = frozen.address_space();
    layout_in_order(space);
    let Access::Shared(copy) = frozen.access() else { panic!("a file can be read by many threads") };
    let mut populated_bytes = 0;
    for (at, mapping) in space.mappings().iter().enumerate() {
        let Ok(populated) = frozen.populated(at) else { panic!("nobody cuts the file") };
        for range in populated {
            assert!(mapping.captured && range.start < range.end && range.end <= mapping.range.length_bytes());
            populated_bytes += range.end - range.start;
            let Ok(length) = usize::try_from(range.end - range.start) else { panic!("the file is small") };
            let copied = copy.copy_out(at, range.start, &mut vec![0; length], &mut Vec::new());
            assert!(copied.is_ok(), "what is in the file can be read");
        }
    }
    // Otherwise it was compressed.
    if data.starts_with(b"\x7fELF") {
        assert!(populated_bytes <= data.len() as u64, "no byte of the file is memory twice");
    }
    assert!(frozen.attachments().iter().all(|attachment| attachment.bytes.len() <= 2 * data.len()));
}

fn notes(data: &[u8]) {
    let again = |notes: &Notes| {
        let mut again = Notes::default();
        assert_eq!(again.read(62, &notes.write()), Ok(()), "what is written can be read");
        again
    };
    let mut found = Notes::default();
    if found.read(62, data).is_ok() {
        // The first pass puts the threads in order and truncates the names.
        let once = again(&found);
        assert_eq!(again(&once), once);
    }
}
