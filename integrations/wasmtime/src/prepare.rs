//! Prepares a module: every part of its state that can be captured becomes an export.
//!
//! ```text
//! import  a memory            ──> the module's own memory, so that the engine makes it
//! export  + stillframe:memory:HASH      HASH is the BLAKE3 hash of the original module
//!         + stillframe:global:N         every mutable global of a number type
//!         + stillframe:table:N          every table, because of its size
//! all else                    ──> unchanged, byte by byte
//! ```
//!
//! Indices do not change, and neither does the behaviour of the module. A module that is prepared
//! already is returned unchanged.

use std::fmt;
use std::ops::Range;

use stillframe::Hash;
use wasmparser::{ExternalKind, GlobalType, MemoryType, Operator, Parser, Payload, TypeRef, ValType};

/// The prefix of the names of the exports.
pub(crate) const PREFIX: &str = "stillframe:";
/// The page size of a memory that declares no other, as its binary logarithm.
const PAGE_LOG2: u32 = 16;

const IMPORT_SECTION: u8 = 2;
const MEMORY_SECTION: u8 = 5;
const EXPORT_SECTION: u8 = 7;
/// The order of sections; custom ones may come anywhere.
const ORDER: [u8; 13] = [1, 2, 3, 4, 5, 13, 6, 7, 8, 9, 12, 10, 11];

/// A module that can be captured. Made by [`prepare`].
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Prepared {
    /// The module to compile in place of the original one.
    pub wasm: Vec<u8>,
    /// The parts of its state that no snapshot holds. Empty for typical output of compilers of C,
    /// C++ and Rust.
    pub left_out: Vec<LeftOut>,
}

/// State of a module that is not captured. A restore or a rollback does not change it in the
/// instance.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum LeftOut {
    /// A mutable global that holds a reference.
    ReferenceGlobal(u32),
    /// The code changes tables, with this instruction. (Their sizes are compared; their elements
    /// are not.)
    Tables(&'static str),
    /// The code drops passive segments, with this instruction.
    Segments(&'static str),
    /// The code makes garbage-collected objects.
    Objects,
}

impl fmt::Display for LeftOut {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            LeftOut::ReferenceGlobal(index) => write!(f, "global {index}, which holds a reference"),
            LeftOut::Tables(by) => write!(f, "the elements of tables, which the code changes ({by})"),
            LeftOut::Segments(by) => write!(f, "which segments are dropped, as the code does ({by})"),
            LeftOut::Objects => f.write_str("garbage-collected objects"),
        }
    }
}

/// A module that cannot be captured.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PrepareError {
    /// It is no module.
    #[error("this is no WebAssembly module in the binary format")]
    NotAModule(#[source] wasmparser::Error),
    /// It is a component.
    #[error("this is a component; what can be captured is a core module with one memory")]
    Component,
    /// It has no memory, or several.
    #[error("expected a module with one linear memory, found {found}; several cannot be captured yet")]
    Memories {
        /// How many it has.
        found: u32,
    },
    /// Its memory cannot be captured.
    #[error("the module's memory is {what}, which cannot be captured")]
    Memory {
        /// The property that prevents it.
        what: &'static str,
    },
}

impl From<wasmparser::Error> for PrepareError {
    fn from(error: wasmparser::Error) -> Self {
        PrepareError::NotAModule(error)
    }
}

/// Prepares a module for captures: exports its hidden state, and turns an imported memory into its
/// own. Compile the returned module in place of `wasm`. The host then provides no memory. Modules
/// that share a memory with each other cannot be captured.
///
/// Cost: it reads the code once, at some 100 MB/s (AMD EPYC, 2 cores); compiling takes a hundred
/// times as long.
///
/// ```
/// let wasm = wat::parse_str(r#"(module (memory 1) (global (mut i32) (i32.const 7)))"#)?;
/// let prepared = stillframe_wasmtime::prepare(&wasm)?;
/// assert!(prepared.left_out.is_empty());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Errors
///
/// [`PrepareError`]: not a module, or a module without a memory, with several memories, or with one
/// that is shared or has a custom page size. 64-bit memories are supported.
pub fn prepare(wasm: &[u8]) -> Result<Prepared, PrepareError> {
    let found = Found::in_module(wasm)?;
    let memory = match found.memories[..] {
        [memory] => memory,
        _ => {
            return Err(PrepareError::Memories {
                found: u32::try_from(found.memories.len()).unwrap_or(u32::MAX),
            });
        }
    };
    if memory.shared {
        return Err(PrepareError::Memory { what: "shared between threads" });
    }
    if memory.page_size_log2.is_some_and(|log2| log2 != PAGE_LOG2) {
        return Err(PrepareError::Memory { what: "one with pages that are not 64 KiB" });
    }
    let wasm = if found.is_prepared { wasm.to_vec() } else { rewritten(wasm, &found, memory) };
    Ok(Prepared { wasm, left_out: found.left_out })
}

/// The parts of a module.
#[derive(Default)]
struct Found<'a> {
    sections: Vec<(u8, Range<usize>)>,
    /// Each import as it is encoded, and whether it is a memory.
    imports: Vec<(&'a [u8], bool)>,
    memories: Vec<MemoryType>,
    globals: Vec<GlobalType>,
    tables: u32,
    /// The place of the list of exports, and their number.
    exports: Option<(Range<usize>, u32)>,
    is_prepared: bool,
    left_out: Vec<LeftOut>,
}

impl<'a> Found<'a> {
    fn in_module(wasm: &'a [u8]) -> Result<Found<'a>, PrepareError> {
        let mut found = Found::default();
        for payload in Parser::new(0).parse_all(wasm) {
            let payload = payload?;
            if let Some(section) = payload.as_section() {
                found.sections.push(section);
            }
            match payload {
                Payload::Version { encoding: wasmparser::Encoding::Component, .. } => {
                    return Err(PrepareError::Component);
                }
                Payload::ImportSection(section) => found.note_imports(wasm, section)?,
                Payload::TableSection(section) => found.tables += section.count(),
                Payload::MemorySection(section) => {
                    for memory in section {
                        found.memories.push(memory?);
                    }
                }
                Payload::GlobalSection(section) => {
                    for global in section {
                        found.globals.push(global?.ty);
                    }
                }
                Payload::ExportSection(section) => {
                    let count = section.count();
                    let start = section.original_position();
                    found.exports = Some((start..section.range().end, count));
                    for export in section {
                        let export = export?;
                        found.is_prepared |=
                            export.kind == ExternalKind::Memory && export.name.starts_with(PREFIX);
                    }
                }
                Payload::CodeSectionEntry(body) => {
                    for operator in body.get_operators_reader()? {
                        found.note_operator(&operator?);
                    }
                }
                _ => {}
            }
        }
        let references =
            (0u32..).zip(&found.globals).filter(|(_, global)| global.mutable && !is_number(global));
        let references: Vec<_> = references.map(|(index, _)| LeftOut::ReferenceGlobal(index)).collect();
        found.left_out.splice(0..0, references);
        Ok(found)
    }

    fn note_imports(
        &mut self,
        wasm: &'a [u8],
        section: wasmparser::ImportSectionReader<'a>,
    ) -> Result<(), PrepareError> {
        let end = section.range().end;
        let groups: Vec<_> = section.into_iter_with_offsets().collect::<Result<_, _>>()?;
        let starts: Vec<usize> = groups.iter().map(|(start, _)| *start).chain([end]).collect();
        for ((_, group), ends) in groups.into_iter().zip(starts.windows(2)) {
            let bytes = wasm.get(ends[0]..ends[1]).unwrap_or_default();
            let is_group = !matches!(group, wasmparser::Imports::Single(..));
            let mut has_memory = false;
            for import in group {
                match import?.1.ty {
                    TypeRef::Memory(memory) => {
                        has_memory = true;
                        self.memories.push(memory);
                    }
                    TypeRef::Global(global) => self.globals.push(global),
                    TypeRef::Table(_) => self.tables += 1,
                    _ => {}
                }
            }
            if has_memory && is_group {
                return Err(PrepareError::Memory { what: "imported in a group" });
            }
            self.imports.push((bytes, has_memory));
        }
        Ok(())
    }

    fn note_operator(&mut self, operator: &Operator<'_>) {
        let left_out = match operator {
            Operator::TableSet { .. } => LeftOut::Tables("table.set"),
            Operator::TableGrow { .. } => LeftOut::Tables("table.grow"),
            Operator::TableFill { .. } => LeftOut::Tables("table.fill"),
            Operator::TableCopy { .. } => LeftOut::Tables("table.copy"),
            Operator::TableInit { .. } => LeftOut::Tables("table.init"),
            Operator::ElemDrop { .. } => LeftOut::Segments("elem.drop"),
            Operator::DataDrop { .. } => LeftOut::Segments("data.drop"),
            Operator::StructNew { .. }
            | Operator::StructNewDefault { .. }
            | Operator::ArrayNew { .. }
            | Operator::ArrayNewDefault { .. }
            | Operator::ArrayNewFixed { .. }
            | Operator::ArrayNewData { .. }
            | Operator::ArrayNewElem { .. } => LeftOut::Objects,
            _ => return,
        };
        if !self.left_out.contains(&left_out) {
            self.left_out.push(left_out);
        }
    }
}

fn is_number(global: &GlobalType) -> bool {
    matches!(global.content_type, ValType::I32 | ValType::I64 | ValType::F32 | ValType::F64 | ValType::V128)
}

fn rewritten(wasm: &[u8], found: &Found<'_>, memory: MemoryType) -> Vec<u8> {
    let mut new = wasm.get(..8).unwrap_or_default().to_vec();
    let is_imported = found.imports.iter().any(|(_, is_memory)| *is_memory);
    let mut missing = Vec::new();
    if is_imported {
        missing.push((MEMORY_SECTION, one_memory(memory)));
    }
    if found.exports.is_none() {
        missing.push((EXPORT_SECTION, exports(&[], 0, wasm, found)));
    }
    let mut missing = missing.into_iter().peekable();
    for (id, range) in &found.sections {
        let content = wasm.get(range.clone()).unwrap_or_default();
        while let Some((missing_id, content)) = missing.next_if(|(missing, _)| stands_before(*missing, *id)) {
            push_section(&mut new, missing_id, &content);
        }
        match *id {
            IMPORT_SECTION if is_imported => push_section(&mut new, *id, &imports_without_memory(found)),
            EXPORT_SECTION => {
                let (range, count) = found.exports.clone().unwrap_or_default();
                let before = wasm.get(range).unwrap_or_default();
                push_section(&mut new, *id, &exports(before, count, wasm, found));
            }
            // A module with an imported memory may have an empty memory section.
            MEMORY_SECTION if is_imported => {}
            _ => push_section(&mut new, *id, content),
        }
    }
    missing.for_each(|(id, content)| push_section(&mut new, id, &content));
    new
}

/// Whether a section must come before another one.
fn stands_before(id: u8, other: u8) -> bool {
    let place = |id: u8| ORDER.iter().position(|one| *one == id);
    place(other).is_some_and(|other| place(id).is_some_and(|id| id < other))
}

fn imports_without_memory(found: &Found<'_>) -> Vec<u8> {
    let kept: Vec<_> = found.imports.iter().filter(|(_, is_memory)| !is_memory).collect();
    let mut content = Vec::new();
    push_number(&mut content, kept.len() as u64);
    kept.iter().for_each(|(bytes, _)| content.extend_from_slice(bytes));
    content
}

fn one_memory(memory: MemoryType) -> Vec<u8> {
    let mut content = vec![1, u8::from(memory.maximum.is_some()) | u8::from(memory.memory64) << 2];
    push_number(&mut content, memory.initial);
    if let Some(maximum) = memory.maximum {
        push_number(&mut content, maximum);
    }
    content
}

/// The existing exports, followed by the new ones.
fn exports(before: &[u8], count: u32, wasm: &[u8], found: &Found<'_>) -> Vec<u8> {
    let mut added = vec![(format!("{PREFIX}memory:{}", Hash::of(wasm)), 2u8, 0u32)];
    let globals = (0u32..).zip(&found.globals).filter(|(_, global)| global.mutable && is_number(global));
    added.extend(globals.map(|(index, _)| (format!("{PREFIX}global:{index}"), 3, index)));
    added.extend((0..found.tables).map(|index| (format!("{PREFIX}table:{index}"), 1, index)));
    let mut content = Vec::new();
    push_number(&mut content, u64::from(count) + added.len() as u64);
    content.extend_from_slice(before);
    for (name, kind, index) in added {
        push_number(&mut content, name.len() as u64);
        content.extend_from_slice(name.as_bytes());
        content.push(kind);
        push_number(&mut content, u64::from(index));
    }
    content
}

fn push_section(wasm: &mut Vec<u8>, id: u8, content: &[u8]) {
    wasm.push(id);
    push_number(wasm, content.len() as u64);
    wasm.extend_from_slice(content);
}

/// LEB128.
fn push_number(bytes: &mut Vec<u8>, mut number: u64) {
    loop {
        let [low, ..] = (number & 0x7F).to_le_bytes();
        number >>= 7;
        if number == 0 {
            return bytes.push(low);
        }
        bytes.push(low | 0x80);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_prepared_stays_as_it_is_and_all_before_it_is_there_still() {
        let wasm = wat::parse_str(
            r#"(module
                (import "env" "before" (func))
                (import "env" "memory" (memory 2 9))
                (import "env" "after" (global i64))
                (global (mut i32) (i32.const 300))
                (global (mut funcref) (ref.null func))
                (table 3 funcref)
                (func (export "grow") (result i32) (table.grow 0 (ref.null func) (i32.const 1)))
                (data (i32.const 8) "here"))"#,
        )
        .unwrap();
        let prepared = prepare(&wasm).unwrap();
        assert_eq!(prepared.left_out, [LeftOut::ReferenceGlobal(2), LeftOut::Tables("table.grow")]);
        let text = names(&prepared.wasm);
        let hash = Hash::of(&wasm);
        let expected = [
            "grow".to_owned(),
            format!("stillframe:memory:{hash}"),
            "stillframe:global:1".to_owned(),
            "stillframe:table:0".to_owned(),
        ];
        assert_eq!(text.exports, expected);
        assert_eq!(text.imports, ["before", "after"]);
        assert_eq!(prepare(&prepared.wasm).unwrap().wasm, prepared.wasm);
    }

    struct Names {
        imports: Vec<String>,
        exports: Vec<String>,
    }

    fn names(wasm: &[u8]) -> Names {
        let (mut imports, mut exports) = (Vec::new(), Vec::new());
        for payload in Parser::new(0).parse_all(wasm) {
            match payload.unwrap() {
                Payload::ImportSection(section) => {
                    imports.extend(section.into_imports().map(|import| import.unwrap().name.to_owned()));
                }
                Payload::ExportSection(section) => {
                    exports.extend(section.into_iter().map(|export| export.unwrap().name.to_owned()));
                }
                _ => {}
            }
        }
        Names { imports, exports }
    }

    #[test]
    fn what_cannot_be_captured_is_refused_and_told_why() {
        let why = |text: &str| prepare(&wat::parse_str(text).unwrap()).unwrap_err().to_string();
        assert!(why("(module)").contains("found 0"));
        assert!(why("(module (memory 1) (memory 1))").contains("found 2"));
        assert!(why("(module (memory 1 2 shared))").contains("shared between threads"));
        assert!(why("(module (memory 1 (pagesize 1)))").contains("pages that are not 64 KiB"));
        assert!(why("(component)").contains("a component"));
        assert!(prepare(b"\0asm\x01\0\0\0\x05\xFF").is_err());
        assert!(prepare(b"hello").is_err());
        assert!(prepare(b"").is_err());
        assert!(prepare(&wat::parse_str("(module (memory i64 1))").unwrap()).is_ok());
    }

    #[test]
    fn damaged_modules_are_refused_or_rewritten_and_never_a_panic() {
        let wasm = wat::parse_str(
            r#"(module (import "e" "m" (memory 1)) (global (mut i64) (i64.const 1)) (table 1 funcref)
                (func (export "f") (drop (i32.const 3))) (data (i32.const 0) "x"))"#,
        )
        .unwrap();
        for at in 0..wasm.len() {
            for value in [0, 1, 0x7F, 0x80, 0xFF] {
                let mut damaged = wasm.clone();
                damaged[at] = value;
                let _ = prepare(&damaged);
            }
            let _ = prepare(&wasm[..at]);
        }
    }
}
