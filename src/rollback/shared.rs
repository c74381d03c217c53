//! Memory that a process shares, or could share: which of it is rolled back, which is left, and
//! which makes the rollback impossible.
//!
//! | mapping that differs | action |
//! |---|---|
//! | memory without a name (memfd, `/dev/zero`), unshared | rolled back, once for all its views |
//! | the same, but others have it or may; `/dev/shm`, System V | refused, unless allowed |
//! | a file that another process maps too, writable here | refused, unless allowed |
//! | another file | left and reported: files are not rolled back |
//!
//! Memory without a name (an unlinked file in memory too) is *unshared* if no other process maps it
//! or has it open. This must be certain (`sys/mapped.rs`): either all processes can be examined, or
//! the kernel's counts show that none of its pages is mapped elsewhere.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::io;
use std::ops::Range;
use std::os::unix::fs::MetadataExt;

use super::attempt::Attempt;
use super::page_state::PageStates;
use super::plan::{Patch, Plan};
use super::remade::Remade;
use crate::address_space::{Mapping, MappingKind};
use crate::error::Error;
use crate::hash::Hash;
use crate::sys::mapped::{self, Holders, MappedFile};

/// The advice for the user.
const ADVICE: &str = "--leave-shared-memory rolls back the rest and leaves it as it is";

/// The name of the mapping that `io_setup` makes.
const KERNEL_RING: &str = "/[aio]";

/// Decides about shared memory that differs. Removes from the plan the mappings that are left, and
/// returns them. An error if a mapping can be neither left nor rolled back.
pub(super) fn settle(
    attempt: &Attempt<'_>,
    states: &PageStates,
    plan: &mut Plan<'_>,
) -> Result<Vec<Mapping>, Error> {
    let mappings = states.mappings();
    let is_shared = |patch: &&Patch| mapping_at(mappings, patch.at).is_some_and(|it| it.protection.shared);
    let mut objects: HashMap<Option<MappedFile>, Object<'_>> = HashMap::new();
    for patch in plan.patches.iter().filter(is_shared) {
        let Some(mapping) = mapping_at(mappings, patch.at) else { continue };
        let file = states.at(patch.at).and_then(|state| state.file);
        let object = objects.entry(file).or_default();
        if object.mappings.last() != Some(&mapping) {
            object.mappings.push(mapping);
        }
    }
    if objects.is_empty() {
        return Ok(Vec::new());
    }
    let names = objects
        .iter()
        .filter_map(|(file, object)| Some((*file.as_ref()?, object.mappings.first()?.name.clone())));
    // This process has some of its files open to read them.
    let holders = mapped::holders(names.collect(), vec![attempt.pid, std::process::id()], || {
        attempt.check_interrupt()
    })?;
    let mut differences = Vec::new();
    for (file, object) in &mut objects {
        object.fate = fate(attempt, states, *file, object, &holders);
        if let (Fate::Refused(why), false) = (&object.fate, attempt.rollback.leave_shared_memory) {
            let mapping = object.mappings[0];
            let range = mapping.range;
            differences.push(format!(
                "{range} ({} {}) differs, and {why}",
                mapping.protection,
                shown(mapping)
            ));
        }
    }
    differences.sort_unstable();
    if !differences.is_empty() {
        return Err(attempt.misfit_but_for(differences, ADVICE).into());
    }
    let mut left: Vec<&Mapping> = Vec::new();
    let mut written: HashSet<Written> = HashSet::new();
    plan.patches.retain(|patch| {
        let Some(mapping) = mapping_at(mappings, patch.at).filter(|it| it.protection.shared) else {
            return true;
        };
        let file = states.at(patch.at).and_then(|state| state.file);
        match objects.get(&file).map(|object| &object.fate) {
            Some(Fate::RolledBack) => {
                // A read-only view shows what is written through another view.
                let offset = patch.at - mapping.range.start() + mapping.file_offset_bytes;
                mapping.protection.write && written.insert((file, offset, patch.hash, patch.pieces.clone()))
            }
            _ => {
                left.push(mapping);
                false
            }
        }
    });
    left.dedup();
    Ok(left.into_iter().cloned().collect())
}

/// The writes already made through another view: the file, the offset of the region, its hash, and
/// the parts that are written.
type Written = (Option<MappedFile>, u64, Hash, Vec<Range<usize>>);

/// A file, on a disk or in memory, that differs in some part.
#[derive(Default)]
struct Object<'a> {
    mappings: Vec<&'a Mapping>,
    fate: Fate,
}

/// What is done with it.
#[derive(Default)]
enum Fate {
    RolledBack,
    #[default]
    Left,
    /// Unless it may be left. Has the reason.
    Refused(String),
}

fn fate(
    attempt: &Attempt<'_>,
    states: &PageStates,
    file: Option<MappedFile>,
    object: &Object<'_>,
    holders: &Holders,
) -> Fate {
    let first = object.mappings[0];
    let Some(file) = file else {
        return Fate::Refused("it cannot be known who else has it".to_owned());
    };
    let holder = holders.known.get(&file).map(|all| {
        let (pid, name) = &all[0];
        match all.len() - 1 {
            0 => format!("process {pid} ({name}) has it too"),
            more => format!("process {pid} ({name}) and {more} more have it too"),
        }
    });
    let views = || {
        let all = states.mappings().iter().filter(|it| it.protection.shared);
        all.filter(|it| states.at(it.range.start()).is_some_and(|state| state.file == Some(file)))
    };
    if first.name.starts_with(KERNEL_RING) {
        return Fate::Refused("the kernel works with it (asynchronous input and output)".to_owned());
    }
    if is_plain_file(first) {
        return match holder {
            Some(holder) if views().any(|it| it.protection.write) => Fate::Refused(holder),
            _ => Fate::Left,
        };
    }
    if let Some(holder) = holder {
        return Fate::Refused(holder);
    }
    match metadata(attempt, states, first, file) {
        Ok(metadata) if metadata.nlink() == 0 && !first.name.starts_with("/SYSV") => {}
        Ok(_) => return Fate::Refused("others can open it by its name".to_owned()),
        Err(error) => return Fate::Refused(format!("it cannot be known who else has it ({error})")),
    }
    if let Some(why) = &holders.unknown {
        let all: Vec<Range<u64>> = views().map(|it| it.range.start()..it.range.end()).collect();
        match attempt.held.is_mapped_elsewhere(&all) {
            Ok(false) => {}
            Ok(true) => return Fate::Refused(format!("others have it that cannot be seen: {why}")),
            Err(_) => return Fate::Refused(format!("others may have it: {why}")),
        }
    }
    // Each part that differs must be writable through some view.
    let span = |it: &Mapping| it.file_offset_bytes..it.file_offset_bytes + it.range.length_bytes();
    let is_writable = |wanted: &Mapping| {
        let wanted = span(wanted);
        views().any(|it| it.protection.write && span(it).start <= wanted.start && wanted.end <= span(it).end)
    };
    match object.mappings.iter().all(|it| is_writable(it)) {
        true => Fate::RolledBack,
        false => Fate::Refused("it is mapped so that it cannot be written".to_owned()),
    }
}

/// The metadata of a file, by a mapping or by the descriptor with which it is mapped again.
fn metadata(
    attempt: &Attempt<'_>,
    states: &PageStates,
    mapping: &Mapping,
    file: MappedFile,
) -> io::Result<fs::Metadata> {
    let is_of_it = |it: &&Remade| it.file.is_some_and(|(of, _)| of == file);
    match states.remade().iter().find(is_of_it).and_then(|it| it.file) {
        Some((_, number)) => attempt.held.open_descriptor(number)?.metadata(),
        None => {
            let range = states.range_at(mapping.range).unwrap_or(mapping.range);
            attempt.held.mapped_file(range)?.metadata()
        }
    }
}

/// A file with a name, for example on a disk. Files in `/dev/shm` count as memory that others can
/// open.
fn is_plain_file(mapping: &Mapping) -> bool {
    let name = &mapping.name;
    let is_memory = ["/dev/shm/", "/dev/zero", "/memfd:", "/SYSV", "/anon_hugepage"]
        .iter()
        .any(|start| name.starts_with(start));
    mapping.kind == MappingKind::File && !is_memory && !name.ends_with(" (deleted)")
}

fn shown(mapping: &Mapping) -> &str {
    if mapping.name.is_empty() { mapping.kind.name() } else { &mapping.name }
}

/// The mapping that has an address.
pub(super) fn mapping_at(mappings: &[Mapping], address: u64) -> Option<&Mapping> {
    let at = mappings.partition_point(|it| it.range.end() <= address);
    mappings.get(at).filter(|it| it.range.start() <= address)
}
