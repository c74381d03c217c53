//! The JSON objects that several verbs print. Their keys are a promise to scripts.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::Serialize;
use stillframe::{AddressRange, AddressSpace, Capture, LeftOut, Origin, Snapshot, SnapshotId};

/// A duration in milliseconds, to the microsecond.
pub(crate) fn milliseconds(duration: Duration) -> f64 {
    duration.as_micros() as f64 / 1e3
}

/// Ids in full.
pub(crate) fn ids(ids: &[SnapshotId]) -> Vec<String> {
    ids.iter().map(SnapshotId::to_string).collect()
}

/// What one capture did.
#[derive(Debug, Serialize)]
pub(crate) struct CaptureObject {
    id: String,
    process: String,
    parent: Option<String>,
    time: String,
    memory_bytes: u64,
    zero_bytes: u64,
    changed_regions: u64,
    new_regions: u64,
    delta_regions: u64,
    shared_regions: u64,
    added_bytes: u64,
    elapsed_ms: f64,
    paused_ms: f64,
    staging_full: bool,
    tracking: &'static str,
    unreadable_bytes: u64,
    left_out: Vec<LeftOutSum>,
}

/// How many bytes are not in a snapshot for one reason.
#[derive(Debug, Serialize)]
struct LeftOutSum {
    why: &'static str,
    bytes: u64,
}

impl From<&Capture> for CaptureObject {
    fn from(capture: &Capture) -> CaptureObject {
        CaptureObject {
            id: capture.id.to_string(),
            process: capture.process.clone(),
            parent: capture.parent.map(|id| id.to_string()),
            time: capture.time.to_string(),
            memory_bytes: capture.memory_bytes,
            zero_bytes: capture.zero_bytes,
            changed_regions: capture.changed_regions,
            new_regions: capture.new_regions,
            delta_regions: capture.delta_regions,
            shared_regions: capture.shared_regions,
            added_bytes: capture.added_bytes,
            elapsed_ms: milliseconds(capture.elapsed),
            paused_ms: milliseconds(capture.paused),
            staging_full: capture.staging_full,
            tracking: capture.tracking.name(),
            unreadable_bytes: capture.unreadable_bytes(),
            left_out: left_out_sums(&capture.left_out),
        }
    }
}

fn left_out_sums(all: &[LeftOut]) -> Vec<LeftOutSum> {
    LeftOut::sums(all).into_iter().map(|(why, bytes)| LeftOutSum { why: why.name(), bytes }).collect()
}

/// A snapshot, and if asked for its mappings.
#[derive(Debug, Serialize)]
pub(crate) struct SnapshotObject {
    id: String,
    process: String,
    parent: Option<String>,
    time: String,
    trigger: String,
    labels: BTreeMap<String, String>,
    memory_bytes: u64,
    regions: u64,
    source: SourceObject,
    #[serde(skip_serializing_if = "Option::is_none")]
    mappings: Option<Vec<MappingObject>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    excluded: Option<Vec<RangeObject>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    unreadable: Option<Vec<RangeObject>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    unreadable_bytes: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    left_out: Option<Vec<LeftOutSum>>,
}

#[derive(Debug, Serialize)]
struct SourceObject {
    kind: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pid: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    command: Option<Vec<String>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    path: Option<String>,
}

#[derive(Debug, Serialize)]
struct MappingObject {
    start: u64,
    end: u64,
    protection: String,
    kind: &'static str,
    name: String,
    captured: bool,
    offset: u64,
}

/// A range of addresses.
#[derive(Debug, Serialize)]
pub(crate) struct RangeObject {
    start: u64,
    end: u64,
}

impl From<&AddressRange> for RangeObject {
    fn from(range: &AddressRange) -> RangeObject {
        RangeObject { start: range.start(), end: range.end() }
    }
}

impl From<&Snapshot<'_>> for SnapshotObject {
    fn from(snapshot: &Snapshot<'_>) -> SnapshotObject {
        let record = snapshot.record();
        SnapshotObject {
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
}

impl SnapshotObject {
    /// The object with the mappings of its address space, and the ranges whose bytes were left out; the reasons
    /// for that where they are known.
    pub(crate) fn with_mappings(self, space: &AddressSpace, left_out: &[LeftOut]) -> SnapshotObject {
        let mapping = |mapping: &stillframe::Mapping| MappingObject {
            start: mapping.range.start(),
            end: mapping.range.end(),
            protection: mapping.protection.to_string(),
            kind: mapping.kind.name(),
            name: mapping.name.clone(),
            captured: mapping.captured,
            offset: mapping.file_offset_bytes,
        };
        let ranges = |ranges: &[AddressRange]| Some(ranges.iter().map(RangeObject::from).collect());
        SnapshotObject {
            mappings: Some(space.mappings().iter().map(mapping).collect()),
            excluded: ranges(space.excluded()),
            unreadable: ranges(space.unreadable()),
            unreadable_bytes: Some(space.unreadable().iter().map(|range| range.length_bytes()).sum()),
            left_out: Some(left_out_sums(left_out)),
            ..self
        }
    }
}

impl From<&Origin> for SourceObject {
    fn from(origin: &Origin) -> SourceObject {
        let none = SourceObject { kind: "bytes", pid: None, command: None, path: None };
        match origin {
            Origin::File { path } => {
                SourceObject { kind: "file", path: Some(path.to_string_lossy().into_owned()), ..none }
            }
            Origin::Process { pid, path, command } => SourceObject {
                kind: "process",
                pid: Some(*pid),
                command: (!command.is_empty()).then(|| command.clone()),
                path: path.as_ref().map(|path| path.to_string_lossy().into_owned()),
            },
            Origin::Core { path, pid, command, .. } => SourceObject {
                kind: "core",
                pid: *pid,
                command: (!command.is_empty()).then(|| command.clone()),
                path: Some(path.to_string_lossy().into_owned()),
            },
            _ => none,
        }
    }
}
