//! Descriptors that refer to another file, or to another position, than they did in the snapshot.
//! If such a file was open for writing, the program would write to the wrong file.
//!
//! | descriptor | action |
//! |---|---|
//! | refers to another file, was open for writing | refused, unless allowed |
//! | refers to another file, was open for reading | reported |
//! | was closed since, or opened since | reported |
//! | same file, other position | reported; reset by `lseek` on request |
//! | a TCP connection that the other end has closed | reported |

use std::collections::{HashMap, HashSet};

use super::attempt::Attempt;
use crate::descriptors::Descriptor;
use crate::error::RollbackError;
use crate::source::injection::{Call, Step};

/// The advice for the user.
const ADVICE: &str = "--leave-descriptors rolls back the rest and leaves them as they are";

/// The number of `lseek` on x86-64.
const LSEEK: u64 = 8;

/// The differences that stay, and those that are undone.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Found {
    /// The differences that stay, as sentences for the user.
    pub(super) left: Vec<String>,
    /// Positions to reset: descriptor, position.
    pub(super) seeks: Vec<(u32, u64)>,
}

/// Finds the differences. An error if the program would write to another file than in the snapshot.
pub(super) fn check(attempt: &Attempt<'_>) -> Result<Found, RollbackError> {
    let (Some(then), Some(now)) = (&attempt.captured.descriptors, attempt.held.descriptors()) else {
        return Ok(Found::default());
    };
    let (mut found, mut differences) = compare(&then.0, &now.0, attempt.rollback.seek_files);
    if !differences.is_empty() && !attempt.rollback.leave_descriptors {
        return Err(attempt.misfit_but_for(differences, ADVICE));
    }
    differences.append(&mut found.left);
    let closed = attempt.held.closed_connections(&now.0);
    let then_open: HashSet<u32> = then.0.iter().map(|it| it.number).collect();
    let gone = closed.into_iter().filter(|number| then_open.contains(number));
    differences
        .extend(gone.map(|number| format!("descriptor {number}: its other end has closed the connection")));
    Ok(Found { left: differences, seeks: found.seeks })
}

/// The calls that reset the positions.
pub(super) fn seek_calls(seeks: &[(u32, u64)]) -> impl Iterator<Item = Step> {
    seeks.iter().map(|(number, position)| Step {
        call: Call {
            number: LSEEK,
            arguments: [(*number).into(), *position, libc::SEEK_SET as u64, 0, 0, 0],
        },
        expected: position.cast_signed(),
        undo: None,
        what: "set the position of a file",
    })
}

/// The differences that may stay, and those that may not. Both lists are in order.
fn compare(then: &[Descriptor], now: &[Descriptor], seek_files: bool) -> (Found, Vec<String>) {
    let now_by_number: HashMap<u32, &Descriptor> = now.iter().map(|it| (it.number, it)).collect();
    let then_numbers: HashSet<u32> = then.iter().map(|it| it.number).collect();
    let (mut found, mut dangerous) = (Found::default(), Vec::new());
    for before in then {
        let number = before.number;
        let Some(after) = now_by_number.get(&number) else {
            found.left.push(format!("descriptor {number} was {} and is closed now", shown(before)));
            continue;
        };
        if !before.is_same(after) {
            let line = format!("descriptor {number} was {} and is {} now", shown(before), shown(after));
            if before.is_for_writing() { &mut dangerous } else { &mut found.left }.push(line);
        } else if before.is_for_writing() != after.is_for_writing() {
            let line = format!("descriptor {number} ({}) was opened again, in another mode", shown(after));
            if before.is_for_writing() { &mut found.left } else { &mut dangerous }.push(line);
        } else if before.is_file && before.position != after.position {
            if seek_files {
                found.seeks.push((number, before.position));
            } else {
                found.left.push(format!(
                    "descriptor {number} ({}) was at byte {} and is at byte {} now; --seek-files sets it back",
                    shown(after),
                    before.position,
                    after.position
                ));
            }
        }
    }
    for after in now.iter().filter(|it| !then_numbers.contains(&it.number)) {
        found.left.push(format!(
            "descriptor {} ({}) was opened since, and stays open",
            after.number,
            shown(after)
        ));
    }
    (found, dangerous)
}

fn shown(descriptor: &Descriptor) -> String {
    String::from_utf8_lossy(&descriptor.target).chars().filter(|letter| !letter.is_control()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(number: u32, target: &str, flags: u32, position: u64) -> Descriptor {
        let target = target.as_bytes().to_vec();
        let inode = target.iter().map(|byte| u64::from(*byte)).sum();
        Descriptor { number, target, flags, mount: 1, inode, born_ns: 9, is_file: true, position }
    }

    #[test]
    fn each_kind_of_difference_is_told_or_refused() {
        let then = [
            file(1, "/a", 1, 0),
            file(2, "/b", 0, 5),
            file(3, "/c", 2, 5),
            file(4, "/d", 2, 0),
            file(5, "/e", 0, 0),
        ];
        let now = [
            file(1, "/a", 1, 0),
            file(2, "/x", 0, 5),
            file(3, "/c", 2, 7),
            file(4, "/y", 2, 0),
            file(6, "/f", 0, 0),
        ];
        let (found, dangerous) = compare(&then, &now, false);
        assert_eq!(dangerous, ["descriptor 4 was /d and is /y now"]);
        assert_eq!(
            found.left,
            [
                "descriptor 2 was /b and is /x now",
                "descriptor 3 (/c) was at byte 5 and is at byte 7 now; --seek-files sets it back",
                "descriptor 5 was /e and is closed now",
                "descriptor 6 (/f) was opened since, and stays open",
            ]
        );
        let (found, _) = compare(&then, &now, true);
        assert_eq!((found.seeks, found.left.len()), (vec![(3, 5)], 3));
        assert_eq!(compare(&then, &then, true), (Found::default(), Vec::new()));
    }
}
