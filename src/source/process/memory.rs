//! Reads the memory of a paused process, in the way that fits each mapping.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use super::content::Content;
use super::refusal::process_error;
use crate::source::SourceError;
use crate::sys::process_memory;
use crate::units::AddressRange;

/// The memory of a process, accessed through a living thread of it. Any thread may read it.
#[derive(Clone)]
pub(crate) struct ProcessMemory {
    pid: u32,
    tid: u32,
    /// Invariant: in the order of their addresses.
    contents: Arc<Vec<Content>>,
    /// `/proc/PID/mem`, if it could be opened.
    memory: Option<Arc<File>>,
}

/// The way in which bytes are read.
enum Way<'a> {
    Mapping,
    /// Through a file. The number is the file offset of address 0.
    File(&'a File, u64),
    Forbidden,
}

impl ProcessMemory {
    pub(super) fn new(pid: u32, tid: u32, contents: Vec<Content>, memory: Option<File>) -> ProcessMemory {
        ProcessMemory { pid, tid, contents: Arc::new(contents), memory: memory.map(Arc::new) }
    }

    pub(super) fn pid(&self) -> u32 {
        self.pid
    }

    pub(super) fn tid(&self) -> u32 {
        self.tid
    }

    pub(super) fn contents(&self) -> &[Content] {
        &self.contents
    }

    /// Fills `buffer` from `address` on, with zeros where nothing can be read. If only populated
    /// addresses are requested, the process gets no new pages.
    pub(crate) fn copy(
        &self,
        address: u64,
        buffer: &mut [u8],
        unreadable: &mut Vec<AddressRange>,
    ) -> Result<(), SourceError> {
        let end = address.saturating_add(buffer.len() as u64);
        let mut rest = buffer;
        let mut at = address;
        let mut read = |to: u64, way: Way<'_>| -> Result<(), SourceError> {
            let length = usize::try_from(to.saturating_sub(at)).unwrap_or(usize::MAX).min(rest.len());
            let (part, after) = std::mem::take(&mut rest).split_at_mut(length);
            (rest, at) = (after, to.max(at));
            if part.is_empty() {
                return Ok(());
            }
            self.read(to - part.len() as u64, part, &way, unreadable)
        };
        let first = self.contents.partition_point(|content| content.range.end <= address);
        for content in self.contents[first..].iter().take_while(|content| content.range.start < end) {
            // Addresses between mappings cannot be read. The read fails and reports them.
            read(content.range.start, Way::Mapping)?;
            let here = content.range.start.max(address)..content.range.end.min(end);
            match &content.file {
                _ if content.is_forbidden => read(here.end, Way::Forbidden)?,
                None => read(here.end, Way::Mapping)?,
                Some((file, first)) => {
                    let place = first.wrapping_sub(content.range.start);
                    for (range, is_mapped) in content.through_mapping.alternating(here) {
                        let way = if is_mapped { Way::Mapping } else { Way::File(&file.file, place) };
                        read(range.end, way)?;
                    }
                }
            }
        }
        read(end, Way::Mapping)
    }

    /// Reads in one way; after a failure page by page.
    fn read(
        &self,
        mut address: u64,
        mut buffer: &mut [u8],
        way: &Way<'_>,
        unreadable: &mut Vec<AddressRange>,
    ) -> Result<(), SourceError> {
        let page_bytes = rustix::param::page_size();
        while !buffer.is_empty() {
            let read = match way {
                Way::Mapping => process_memory::read(self.tid, address, buffer),
                Way::File(file, place) => file.read_at(buffer, address.wrapping_add(*place)),
                Way::Forbidden => match &self.memory {
                    Some(memory) => memory.read_at(buffer, address),
                    None => Err(io::Error::from_raw_os_error(libc::EFAULT)),
                },
            };
            let done_bytes = match read {
                Ok(copied_bytes) if copied_bytes > 0 => copied_bytes,
                Err(error) if error.raw_os_error() == Some(libc::EINTR) => continue,
                // The file was truncated meanwhile: it ends here.
                Ok(_) if matches!(way, Way::File(..)) => {
                    buffer.fill(0);
                    let start = address / page_bytes as u64 * page_bytes as u64;
                    unreadable.extend(AddressRange::new(start, address + buffer.len() as u64));
                    return Ok(());
                }
                Err(error) if matches!(way, Way::Mapping) && !is_about_a_page(&error) => {
                    return Err(process_error(self.pid, "read the memory of", error));
                }
                // The page at `address` cannot be read; the next page may be readable.
                _ => {
                    let into_page = usize::try_from(address % page_bytes as u64).unwrap_or(0);
                    let skipped = (page_bytes - into_page).min(buffer.len());
                    buffer[..skipped].fill(0);
                    unreadable.extend(AddressRange::with_length(address, skipped as u64));
                    skipped
                }
            };
            buffer = &mut buffer[done_bytes..];
            address = address.saturating_add(done_bytes as u64);
        }
        Ok(())
    }
}

fn is_about_a_page(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EFAULT | libc::EIO | libc::ENOMEM | libc::EHWPOISON))
}
