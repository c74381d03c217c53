//! The JSON of a snapshot, which `list`, `show` and `label` print.

use std::collections::BTreeMap;

use serde::Serialize;
use stillframe::address_space::AddressSpace;
use stillframe::record::Origin;
use stillframe::source::LeftOut;
use stillframe::{AddressRange, Snapshot};

/// A snapshot; for `show` with its mappings.
#[derive(Debug, Serialize)]
pub(super) struct SnapshotJson {
    id: String,
    process: String,
    parent: Option<String>,
    time: String,
    trigger: String,
    labels: BTreeMap<String, String>,
    memory_bytes: u64,
    regions: u64,
    source: SourceJson,
    #[serde(skip_serializing_if = "Option::is_none")]
    mappings: Option<Vec<MappingJson>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    excluded: Option<Vec<RangeJson>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    unreadable: Option<Vec<RangeJson>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    unreadable_bytes: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    left_out: Option<Vec<LeftOutJson>>,
}

#[derive(Debug, Serialize)]
struct SourceJson {
    kind: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pid: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    command: Option<Vec<String>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    path: Option<String>,
}

#[derive(Debug, Serialize)]
struct MappingJson {
    start: u64,
    end: u64,
    protection: String,
    kind: &'static str,
    name: String,
    captured: bool,
    offset: u64,
}

/// How many bytes one reason left out.
#[derive(Debug, Serialize)]
struct LeftOutJson {
    why: &'static str,
    bytes: u64,
}

/// An address range.
#[derive(Debug, Serialize)]
struct RangeJson {
    start: u64,
    end: u64,
}

impl From<&AddressRange> for RangeJson {
    fn from(range: &AddressRange) -> RangeJson {
        RangeJson { start: range.start(), end: range.end() }
    }
}

impl SnapshotJson {
    /// The object without mappings.
    pub(super) fn new(snapshot: &Snapshot<'_>) -> SnapshotJson {
        let record = snapshot.record();
        SnapshotJson {
            id: snapshot.id().to_string(),
            process: record.process.clone(),
            parent: record.parent.map(|id| id.to_string()),
            time: record.time.to_string(),
            trigger: record.trigger.to_string(),
            labels: snapshot.labels().clone(),
            memory_bytes: record.memory_bytes,
            regions: record.regions,
            source: (&record.origin).into(),
            mappings: None,
            excluded: None,
            unreadable: None,
            unreadable_bytes: None,
            left_out: None,
        }
    }

    /// The object with the mappings of its address space, and with the ranges that were left out and why.
    pub(super) fn with_mappings(self, space: &AddressSpace, left_out: &[LeftOut]) -> SnapshotJson {
        let mapping = |mapping: &stillframe::address_space::Mapping| MappingJson {
            start: mapping.range.start(),
            end: mapping.range.end(),
            protection: mapping.protection.to_string(),
            kind: mapping.kind.name(),
            name: mapping.name.clone(),
            captured: mapping.captured,
            offset: mapping.file_offset_bytes,
        };
        let sums = LeftOut::sums(left_out);
        let ranges = |ranges: &[AddressRange]| Some(ranges.iter().map(RangeJson::from).collect());
        SnapshotJson {
            mappings: Some(space.mappings().iter().map(mapping).collect()),
            excluded: ranges(space.excluded()),
            unreadable: ranges(space.unreadable()),
            unreadable_bytes: Some(space.unreadable().iter().map(|range| range.length_bytes()).sum()),
            left_out: Some(
                sums.into_iter().map(|(why, bytes)| LeftOutJson { why: why.name(), bytes }).collect(),
            ),
            ..self
        }
    }
}

impl From<&Origin> for SourceJson {
    fn from(origin: &Origin) -> SourceJson {
        let none = SourceJson { kind: "bytes", pid: None, command: None, path: None };
        match origin {
            Origin::File { path } => {
                SourceJson { kind: "file", path: Some(path.to_string_lossy().into_owned()), ..none }
            }
            Origin::LiveProcess { pid, path, command } => SourceJson {
                kind: "process",
                pid: Some(*pid),
                command: (!command.is_empty()).then(|| command.clone()),
                path: path.as_ref().map(|path| path.to_string_lossy().into_owned()),
            },
            Origin::Core { path, pid, command, .. } => SourceJson {
                kind: "core",
                pid: *pid,
                command: (!command.is_empty()).then(|| command.clone()),
                path: Some(path.to_string_lossy().into_owned()),
            },
            _ => none,
        }
    }
}
