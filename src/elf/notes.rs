//! The notes of a core dump: registers, the auxiliary vector, and which files were mapped where.
//!
//! ```text
//! note:  length of the name (u32) | of the bytes (u32) | type (u32) | name, NUL | bytes
//!        both name and bytes are padded to a multiple of 4
//!
//! PRSTATUS  of the first thread; the notes up to the next one of this type belong to the thread
//! PRPSINFO  of the process: its name and command line
//! SIGINFO   the signal that the thread got
//! AUXV      as in /proc/PID/auxv
//! FILE      the files that are mapped
//! LAYOUT    the offsets of extended registers in their notes, which differ between processors
//! whole     this program's own: ranges that are captured whole; zeros where no segment has bytes
//! PRFPREG …  further register sets of the thread
//! PRSTATUS  of the next thread
//! …
//! ```
//!
//! This is the kernel's order; other orders are read too. The structures are those of the kernel's
//! 64-bit ABI. Between machines, only the number of general registers differs.

use std::ops::Range;

use super::numbers::Numbers;
use crate::threads::{NT_PRFPREG, NT_PRSTATUS, RegisterSet, Thread, Threads};

const NT_PRPSINFO: u32 = 3;
const NT_AUXV: u32 = 6;
const NT_FILE: u32 = 0x4649_4c45;
const NT_SIGINFO: u32 = 0x5349_4749;
/// The layout of the extended registers in their notes. There is one for the whole process,
/// although its name does not say so.
const NT_X86_XSAVE_LAYOUT: u32 = 0x205;

const CORE: &[u8] = b"CORE";
const LINUX: &[u8] = b"LINUX";
/// The name of this program's own notes. Debuggers skip them.
const OWN: &[u8] = b"stillframe";
/// Ranges of addresses, each of which is one memory, perhaps in several segments, with zeros where
/// no segment has its bytes. For each range: start and end, 64 bits each.
const OWN_WHOLE: u32 = 1;

/// Where the general registers begin in a PRSTATUS. After them come a flag for floating point
/// registers (i32) and padding.
const REGISTERS_AT: usize = 112;
const AFTER_REGISTERS_BYTES: usize = 8;

const PSINFO_BYTES: usize = 136;
const PSINFO_NAME_BYTES: usize = 16;
const PSINFO_COMMAND_BYTES: usize = 80;

/// Auxiliary vector: the program's entry point.
const AT_ENTRY: u64 = 9;
/// Auxiliary vector: some random bytes, which the kernel puts on the stack.
const AT_RANDOM: u64 = 25;
/// Auxiliary vector: the vDSO.
const AT_SYSINFO_EHDR: u64 = 33;

/// The content of a core dump's notes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Notes {
    /// The threads and the process, if there is a note about either.
    pub(crate) threads: Option<Threads>,
    /// The name of the process, which is the name of the thread with the same id; up to 15 bytes.
    pub(crate) name: Vec<u8>,
    /// The command line: its words joined by spaces, up to 79 bytes.
    pub(crate) command: String,
    /// The auxiliary vector.
    pub(crate) auxv: Vec<u8>,
    /// The files that were mapped, in the order of the note.
    pub(crate) files: Vec<MappedFile>,
    /// The layout of the extended registers in their notes, in the kernel's form; empty if there is
    /// no such note.
    pub(crate) register_layout: Vec<u8>,
    /// Addresses that are one memory, with zeros where no segment has their bytes.
    pub(crate) whole: Vec<Range<u64>>,
}

/// A range of addresses where a file was mapped.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct MappedFile {
    pub(crate) start: u64,
    pub(crate) end: u64,
    /// The offset in the file at which the range begins.
    pub(crate) offset_bytes: u64,
    pub(crate) name: Vec<u8>,
}

impl Notes {
    /// Adds the content of a segment of notes; the error says what is wrong with them.
    pub(crate) fn read(&mut self, machine: u16, segment: &[u8]) -> Result<(), String> {
        let mut rest = Numbers::new(segment);
        while !rest.rest().is_empty() {
            let at = segment.len() - rest.rest().len();
            let Some(note) = Note::next(&mut rest) else {
                return Err(format!("the note at byte {at} of its notes reaches beyond their end"));
            };
            self.add(machine, &note).ok_or_else(|| {
                format!(
                    "the note at byte {at} of its notes, of type {:#x}, is not what such a note is",
                    note.note_type
                )
            })?;
        }
        // The thread may come long after the note about the process.
        if let Some(threads) = &mut self.threads {
            let pid = threads.pid;
            let first = threads.threads.iter_mut().find(|thread| thread.tid == pid);
            first.into_iter().for_each(|first| first.name.clone_from(&self.name));
        }
        Ok(())
    }

    fn add(&mut self, machine: u16, note: &Note<'_>) -> Option<()> {
        match (note.name, note.note_type) {
            (CORE, NT_PRSTATUS) => {
                let status = Status::read(note.bytes)?;
                let process = self.process(machine);
                if process.threads.is_empty() && process.pid == 0 {
                    (process.pid, process.parent_pid) = (status.tid, status.parent_pid);
                    (process.process_group, process.session) = (status.process_group, status.session);
                }
                process.threads.push(Thread {
                    tid: status.tid,
                    name: Vec::new(),
                    signal_mask: status.signal_mask,
                    pending_signal: i32::from(status.signal),
                    signal_information: Vec::new(),
                    registers: vec![RegisterSet { note_type: NT_PRSTATUS, bytes: status.registers.to_vec() }],
                });
            }
            (CORE, NT_PRPSINFO) => {
                let information = ProcessInformation::read(note.bytes)?;
                (self.name, self.command) = (information.name, information.command);
                let process = self.process(machine);
                (process.pid, process.parent_pid) = (information.pid, information.parent_pid);
                (process.process_group, process.session) = (information.process_group, information.session);
            }
            (CORE, NT_AUXV) => self.auxv = note.bytes.to_vec(),
            (CORE, NT_FILE) => self.files.extend(read_files(note.bytes)?),
            (CORE, NT_SIGINFO) => {
                if let Some(thread) = self.last_thread() {
                    thread.signal_information = note.bytes.to_vec();
                }
            }
            (LINUX, NT_X86_XSAVE_LAYOUT) => self.register_layout = note.bytes.to_vec(),
            (OWN, OWN_WHOLE) => self.whole.extend(read_ranges(note.bytes)?),
            (CORE, NT_PRFPREG) | (LINUX, _) => {
                let bytes = note.bytes.to_vec();
                if let Some(thread) = self.last_thread() {
                    thread.registers.push(RegisterSet { note_type: note.note_type, bytes });
                }
            }
            _ => {}
        }
        Some(())
    }

    fn process(&mut self, machine: u16) -> &mut Threads {
        self.threads.get_or_insert_with(|| Threads {
            machine,
            pid: 0,
            parent_pid: 0,
            process_group: 0,
            session: 0,
            threads: Vec::new(),
        })
    }

    fn last_thread(&mut self) -> Option<&mut Thread> {
        self.threads.as_mut()?.threads.last_mut()
    }

    /// The bytes of a segment of notes.
    ///
    /// If a signal was about to be delivered to a thread, that thread comes first: debuggers show
    /// the first one.
    pub(crate) fn write(&self) -> Vec<u8> {
        let mut out = Vec::new();
        let threads = self.threads.as_ref();
        let mut in_order: Vec<&Thread> = threads.iter().flat_map(|it| &it.threads).collect();
        in_order.sort_by_key(|thread| thread.pending_signal == 0);
        let mut in_order = in_order.into_iter();
        let first = in_order.next();
        if let (Some(threads), Some(first)) = (threads, first) {
            put_note(&mut out, CORE, NT_PRSTATUS, &Status::of(threads, first).write());
        }
        if let Some(threads) = threads {
            let information = ProcessInformation::of(threads, &self.name, &self.command);
            put_note(&mut out, CORE, NT_PRPSINFO, &information.write());
        }
        put_signal_information(&mut out, first);
        if !self.auxv.is_empty() {
            put_note(&mut out, CORE, NT_AUXV, &self.auxv);
        }
        if !self.files.is_empty() {
            put_note(&mut out, CORE, NT_FILE, &write_files(&self.files));
        }
        put_further_registers(&mut out, first);
        // Once, after the first thread that has such registers, as the kernel does.
        if !self.register_layout.is_empty() {
            put_note(&mut out, LINUX, NT_X86_XSAVE_LAYOUT, &self.register_layout);
        }
        for thread in in_order {
            if let Some(threads) = threads {
                put_note(&mut out, CORE, NT_PRSTATUS, &Status::of(threads, thread).write());
            }
            put_signal_information(&mut out, Some(thread));
            put_further_registers(&mut out, Some(thread));
        }
        if !self.whole.is_empty() {
            put_note(&mut out, OWN, OWN_WHOLE, &write_ranges(&self.whole));
        }
        out
    }

    /// An address in the mapping of the executable.
    pub(crate) fn entry_address(&self) -> Option<u64> {
        self.auxiliary(AT_ENTRY)
    }

    /// An address in the stack of the first thread.
    pub(crate) fn stack_address(&self) -> Option<u64> {
        self.auxiliary(AT_RANDOM)
    }

    /// The address of the vDSO.
    pub(crate) fn vdso_address(&self) -> Option<u64> {
        self.auxiliary(AT_SYSINFO_EHDR)
    }

    fn auxiliary(&self, key: u64) -> Option<u64> {
        let (words, _) = self.auxv.as_chunks::<8>();
        let (pairs, _) = words.as_chunks::<2>();
        pairs.iter().find(|pair| u64::from_le_bytes(pair[0]) == key).map(|pair| u64::from_le_bytes(pair[1]))
    }
}

/// One note.
struct Note<'a> {
    /// Identifies the program that defined its type.
    name: &'a [u8],
    note_type: u32,
    bytes: &'a [u8],
}

impl<'a> Note<'a> {
    fn next(rest: &mut Numbers<'a>) -> Option<Note<'a>> {
        let (name_bytes, length_bytes, note_type) = (rest.u32()?, rest.u32()?, rest.u32()?);
        let mut padded = |length: u32| {
            let length = usize::try_from(length).ok()?;
            let bytes = rest.bytes(length)?;
            // At the very end, the padding may be missing.
            let filling = (length.next_multiple_of(4) - length).min(rest.rest().len());
            rest.skip(filling)?;
            Some(bytes)
        };
        let name = padded(name_bytes)?;
        let name = name.strip_suffix(b"\0").unwrap_or(name);
        Some(Note { name, note_type, bytes: padded(length_bytes)? })
    }
}

fn put_note(out: &mut Vec<u8>, name: &[u8], note_type: u32, bytes: &[u8]) {
    // The lengths are bounded: an attachment and a layout have at most 256 MiB.
    let length = |length: usize| u32::try_from(length).unwrap_or(u32::MAX).to_le_bytes();
    out.extend(length(name.len() + 1));
    out.extend(length(bytes.len()));
    out.extend(note_type.to_le_bytes());
    for part in [&[name, b"\0"].concat(), bytes] {
        out.extend(part);
        out.resize(out.len().next_multiple_of(4), 0);
    }
}

fn put_signal_information(out: &mut Vec<u8>, thread: Option<&Thread>) {
    if let Some(thread) = thread.filter(|thread| !thread.signal_information.is_empty()) {
        put_note(out, CORE, NT_SIGINFO, &thread.signal_information);
    }
}

/// All register sets except the general one.
fn put_further_registers(out: &mut Vec<u8>, thread: Option<&Thread>) {
    for set in thread.iter().flat_map(|thread| &thread.registers) {
        match set.note_type {
            NT_PRSTATUS => {}
            NT_PRFPREG => put_note(out, CORE, set.note_type, &set.bytes),
            _ => put_note(out, LINUX, set.note_type, &set.bytes),
        }
    }
}

/// The part of a PRSTATUS that is kept. Its times are not kept; they are written as zeros.
struct Status<'a> {
    signal: i16,
    signal_mask: u64,
    tid: u32,
    parent_pid: u32,
    process_group: u32,
    session: u32,
    registers: &'a [u8],
    has_floating_point: bool,
}

impl<'a> Status<'a> {
    fn read(bytes: &'a [u8]) -> Option<Status<'a>> {
        let mut numbers = Numbers::new(bytes);
        // The signal's information in short: number, code, error.
        numbers.skip(12)?;
        let signal = numbers.u16()?.cast_signed();
        // Padding, and the pending signals.
        numbers.skip(2 + 8)?;
        let signal_mask = numbers.u64()?;
        let (tid, parent_pid) = (numbers.u32()?, numbers.u32()?);
        let (process_group, session) = (numbers.u32()?, numbers.u32()?);
        // Four times.
        numbers.skip(4 * 16)?;
        let count = numbers.rest().len().checked_sub(AFTER_REGISTERS_BYTES).filter(|count| *count > 0)?;
        let registers = numbers.bytes(count)?;
        let has_floating_point = numbers.u32()? != 0;
        Some(Status {
            signal,
            signal_mask,
            tid,
            parent_pid,
            process_group,
            session,
            registers,
            has_floating_point,
        })
    }

    fn of(threads: &Threads, thread: &'a Thread) -> Status<'a> {
        Status {
            signal: i16::try_from(thread.pending_signal).unwrap_or(0),
            signal_mask: thread.signal_mask,
            tid: thread.tid,
            parent_pid: threads.parent_pid,
            process_group: threads.process_group,
            session: threads.session,
            registers: thread.register_set(NT_PRSTATUS).unwrap_or_default(),
            has_floating_point: thread.register_set(NT_PRFPREG).is_some(),
        }
    }

    fn write(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(REGISTERS_AT + self.registers.len() + AFTER_REGISTERS_BYTES);
        out.extend(i32::from(self.signal).to_le_bytes());
        out.resize(12, 0);
        out.extend(self.signal.to_le_bytes());
        out.resize(24, 0);
        out.extend(self.signal_mask.to_le_bytes());
        for id in [self.tid, self.parent_pid, self.process_group, self.session] {
            out.extend(id.to_le_bytes());
        }
        out.resize(REGISTERS_AT, 0);
        out.extend(self.registers);
        out.extend(u32::from(self.has_floating_point).to_le_bytes());
        out.extend([0; 4]);
        out
    }
}

/// The part of a PRPSINFO that is kept.
struct ProcessInformation {
    pid: u32,
    parent_pid: u32,
    process_group: u32,
    session: u32,
    name: Vec<u8>,
    command: String,
}

impl ProcessInformation {
    fn read(bytes: &[u8]) -> Option<ProcessInformation> {
        let mut numbers = Numbers::new(bytes);
        // State, niceness, flags, user and group.
        numbers.skip(24)?;
        let (pid, parent_pid) = (numbers.u32()?, numbers.u32()?);
        let (process_group, session) = (numbers.u32()?, numbers.u32()?);
        let text = |bytes: &'_ [u8]| bytes.split(|byte| *byte == 0).next().unwrap_or_default().to_vec();
        let name = text(numbers.bytes(PSINFO_NAME_BYTES)?);
        let command = text(numbers.bytes(PSINFO_COMMAND_BYTES)?);
        let command = String::from_utf8_lossy(&command).trim_end().to_owned();
        Some(ProcessInformation { pid, parent_pid, process_group, session, name, command })
    }

    fn of(threads: &Threads, name: &[u8], command: &str) -> ProcessInformation {
        let Threads { pid, parent_pid, process_group, session, .. } = *threads;
        let (name, command) = (name.to_owned(), command.to_owned());
        ProcessInformation { pid, parent_pid, process_group, session, name, command }
    }

    fn write(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(PSINFO_BYTES);
        // State 0 is R, running: the process ran when it was captured.
        out.extend([0, b'R']);
        out.resize(24, 0);
        for id in [self.pid, self.parent_pid, self.process_group, self.session] {
            out.extend(id.to_le_bytes());
        }
        // Both texts end with a NUL.
        for (text, length) in
            [(&*self.name, PSINFO_NAME_BYTES), (self.command.as_bytes(), PSINFO_COMMAND_BYTES)]
        {
            let end = out.len() + length;
            out.extend(text.iter().take(length - 1));
            out.resize(end, 0);
        }
        out
    }
}

/// The count and the unit of the offsets; start, end and offset of each file; then the names, one
/// after another.
fn read_files(bytes: &[u8]) -> Option<Vec<MappedFile>> {
    let mut numbers = Numbers::new(bytes);
    let (count, unit_bytes) = (numbers.u64()?, numbers.u64()?);
    let table = numbers.bytes(usize::try_from(count.checked_mul(24)?).ok()?)?;
    let mut names = numbers.rest().split(|byte| *byte == 0);
    let (words, _) = table.as_chunks::<8>();
    let (entries, _) = words.as_chunks::<3>();
    let mut read = |[start, end, offset]: &[[u8; 8]; 3]| {
        let offset_bytes = u64::from_le_bytes(*offset).checked_mul(unit_bytes)?;
        let (start, end) = (u64::from_le_bytes(*start), u64::from_le_bytes(*end));
        Some(MappedFile { start, end, offset_bytes, name: names.next()?.to_vec() })
    };
    entries.iter().map(&mut read).collect()
}

fn write_files(files: &[MappedFile]) -> Vec<u8> {
    let mut out = Vec::new();
    // The unit is one byte, as in gdb's core dumps, so that every offset can be expressed.
    for number in [files.len() as u64, 1] {
        out.extend(number.to_le_bytes());
    }
    for file in files {
        [file.start, file.end, file.offset_bytes].iter().for_each(|number| out.extend(number.to_le_bytes()));
    }
    for file in files {
        out.extend(file.name.iter().filter(|byte| **byte != 0));
        out.push(0);
    }
    out
}

fn read_ranges(bytes: &[u8]) -> Option<Vec<Range<u64>>> {
    let (words, rest) = bytes.as_chunks::<8>();
    let (pairs, odd) = words.as_chunks::<2>();
    let range = |[start, end]: &[[u8; 8]; 2]| u64::from_le_bytes(*start)..u64::from_le_bytes(*end);
    (rest.is_empty() && odd.is_empty()).then(|| pairs.iter().map(range).collect())
}

fn write_ranges(ranges: &[Range<u64>]) -> Vec<u8> {
    ranges.iter().flat_map(|range| [range.start, range.end]).flat_map(u64::to_le_bytes).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    prop_compose! {
        /// The process may have the id of any of its threads, or of none.
        fn threads()(
            ids in any::<[u32; 4]>(),
            threads in prop::collection::vec(thread(), 0..4),
            first in any::<prop::sample::Index>(),
        ) -> Threads {
            let [mut pid, parent_pid, process_group, session] = ids;
            if !threads.is_empty() && ids[1] % 4 > 0 {
                pid = first.get(&threads).tid;
            }
            let mut threads = Threads { machine: 62, pid, parent_pid, process_group, session, threads };
            threads.threads.sort_by_key(|thread| thread.pending_signal == 0);
            threads
        }
    }

    prop_compose! {
        fn thread()(
            tid in any::<u32>(),
            signal_mask in any::<u64>(),
            pending_signal in 0i32..65,
            signal_information in prop::collection::vec(any::<u8>(), 0..130),
            general in prop::collection::vec(any::<u64>(), 1..40),
            further in prop::collection::vec(
                (prop::sample::select(vec![2u32, 0x202, 0x401]), prop::collection::vec(any::<u8>(), 0..50)),
                0..3,
            ),
        ) -> Thread {
            let general = general.iter().flat_map(|word| word.to_le_bytes()).collect();
            let registers = std::iter::once((NT_PRSTATUS, general)).chain(further);
            let registers = registers.map(|(note_type, bytes)| RegisterSet { note_type, bytes }).collect();
            Thread { tid, name: Vec::new(), signal_mask, pending_signal, signal_information, registers }
        }
    }

    fn files() -> impl Strategy<Value = Vec<MappedFile>> {
        let file = (any::<[u64; 3]>(), prop::collection::vec(1u8.., 0..20));
        let file =
            file.prop_map(|([start, end, offset_bytes], name)| MappedFile { start, end, offset_bytes, name });
        prop::collection::vec(file, 0..5)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn notes_come_back_as_they_were(
            mut threads in prop::option::of(threads()),
            name in prop::collection::vec(1u8.., 0..=15),
            command in "[a-z /]{0,78}[a-z]",
            auxv in prop::collection::vec(any::<u8>(), 0..64),
            files in files(),
            register_layout in prop::collection::vec(any::<u8>(), 0..70),
            whole in prop::collection::vec(any::<Range<u64>>(), 0..4),
        ) {
            let (name, command) = if threads.is_some() { (name, command) } else { Default::default() };
            if let Some(threads) = &mut threads {
                let pid = threads.pid;
                let first = threads.threads.iter_mut().find(|thread| thread.tid == pid);
                first.into_iter().for_each(|first| first.name.clone_from(&name));
            }
            let notes = Notes { threads, name, command, auxv, files, register_layout, whole };
            let mut read = Notes::default();
            read.read(62, &notes.write()).unwrap();
            prop_assert_eq!(read, notes);
        }

        #[test]
        fn damaged_notes_are_refused_or_read_and_never_more(
            threads in threads(),
            files in files(),
            flips in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..6),
            keep in any::<prop::sample::Index>(),
        ) {
            let command = "a b".to_owned();
            let notes = Notes {
                threads: Some(threads),
                files,
                auxv: vec![1; 32],
                command,
                register_layout: vec![2; 32],
                whole: std::iter::once(0x1000..0x9000).collect(),
                ..Notes::default()
            };
            let mut bytes = notes.write();
            for (at, byte) in flips {
                let at = at.index(bytes.len());
                bytes[at] = byte;
            }
            bytes.truncate(keep.index(bytes.len() + 1));
            // It must not panic, and must not allocate more than the bytes that exist, which would
            // abort.
            let _ = Notes::default().read(62, &bytes);
            let _ = Notes::default().read(62, &bytes[bytes.len() / 2..]);
        }
    }

    #[test]
    fn lengths_that_lie_are_refused() {
        let note = |note_type, bytes: &[u8]| {
            let mut out = Vec::new();
            put_note(&mut out, CORE, note_type, bytes);
            out
        };
        let huge = u64::MAX.to_le_bytes();
        // A count of files that overflows, one that is too large, and a note that is too short.
        for bytes in [
            note(NT_FILE, &[huge, huge].concat()),
            note(NT_FILE, &[1000u64.to_le_bytes(), 1u64.to_le_bytes()].concat()),
            note(NT_PRSTATUS, &[0; 112]),
            note(NT_PRPSINFO, &[0; 135]),
        ] {
            let why = Notes::default().read(62, &bytes).unwrap_err();
            assert!(why.contains("is not what such a note is"), "{why}");
        }
        let mut beyond = note(NT_AUXV, &[0; 16]);
        beyond[4] = 17;
        let why = Notes::default().read(62, &beyond).unwrap_err();
        assert!(why.contains("beyond their end"), "{why}");
    }
}
