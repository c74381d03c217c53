//! Signals pending for a process, in the snapshot and now: what is done with each.
//!
//! | signal | pending now | pending in the snapshot |
//! |---|---|---|
//! | fault | dropped: another instruction runs next | raised again; SIGTRAP, SIGSYS: queued |
//! | sent by the process itself | removed: after the rollback it was not sent | queued |
//! | sent by others, timers, the kernel | stays | queued |
//! | SIGSTOP | stays | ignored |
//!
//! A fault, such as that of a null pointer read, is raised again because its instruction runs
//! again; SIGTRAP and SIGSYS are raised after their instruction, and are queued. A process sends a
//! signal to itself by `pthread_kill` or `sigqueue`.
//!
//! A signal that a thread was about to receive is treated like those in its queue. The details
//! (`siginfo_t`) and the order of several signals with one number are restored (`source/signals.rs`
//! says how). Signals that cannot be restored cause a refusal: a signal to the process as a whole
//! that all threads block, or that would have to pass a SIGSTOP; and signals that stop and continue
//! processes.
//!
//! The kernel keeps the handlers of a process, and they cannot be read. Which signals have a
//! handler and which are ignored can be read, and must be the same.

use std::collections::{BTreeSet, HashMap};

use super::attempt::Attempt;
use crate::error::RollbackError;
use crate::signals::{FIRST_REAL_TIME, Signal, Signals};
use crate::source::signals::{Change, Settlement};
use crate::threads::{Thread, Threads};

/// The changes to the signals of the process; an error if the signals cannot be made those of the
/// snapshot.
pub(super) fn check(attempt: &Attempt<'_>) -> Result<Settlement, RollbackError> {
    let now = Moment { threads: &attempt.held.threads(), signals: &attempt.held.signals() };
    // Older snapshots have only the signals that threads were about to receive.
    let signals = attempt.captured.signals.clone();
    let unknown = || Signals { shared: now.signals.shared.clone(), ..now.signals.clone() };
    let (is_old, signals) = (signals.is_none(), signals.unwrap_or_else(unknown));
    let then = Moment { threads: &attempt.captured.threads, signals: &signals };
    let differences = handled_otherwise(then.signals, now.signals);
    if !differences.is_empty() {
        return Err(attempt.misfit(differences));
    }
    settle(&then, &now, attempt.held.own_pid(), is_old).map_err(|why| attempt.refusal(why))
}

/// A process at one of the two moments.
struct Moment<'a> {
    threads: &'a Threads,
    signals: &'a Signals,
}

/// Signals that the C library handles for its own purposes, from the first time that it needs them.
const OF_THE_C_LIBRARY: [i32; 2] = [32, 33];
/// Signals that stop or continue a process: sending one of them removes the others from all queues.
const JOB_CONTROL: [i32; 4] = [libc::SIGCONT, libc::SIGTSTP, libc::SIGTTIN, libc::SIGTTOU];

fn handled_otherwise(then: &Signals, now: &Signals) -> Vec<String> {
    let mut differences = Vec::new();
    for signal in (1..=64).filter(|signal| !OF_THE_C_LIBRARY.contains(signal)) {
        let does = |signals: &Signals| match (has(signals.caught, signal), has(signals.ignored, signal)) {
            (true, _) => "handled",
            (_, true) => "ignored",
            _ => "left to the kernel",
        };
        let (before, after) = (does(then), does(now));
        if before != after {
            differences.push(format!(
                "signal {signal} was {before} and is {after} now; what is done on a signal cannot be rolled back"
            ));
        }
    }
    differences
}

fn settle(then: &Moment<'_>, now: &Moment<'_>, own_pid: u32, is_old: bool) -> Result<Settlement, String> {
    let is_known = |signal: &Signal| (1..=64).contains(&signal.number());
    let is_held_back = |signal: &Signal| signal.number() == libc::SIGSTOP || !is_known(signal);
    // Whether the rollback undoes the sending of this signal.
    let is_undone = |signal: &Signal| signal.is_of_instruction() || signal.is_sent_by(own_pid);
    check_job_control(then, now)?;

    let mut settlement = Settlement::default();
    let (shared_put_in, taken_out) = shared(then, now, is_undone)?;
    let now_threads: HashMap<u32, &Thread> = now.threads.threads.iter().map(|it| (it.tid, it)).collect();
    let mut takers = Vec::new();
    for thread in &then.threads.threads {
        let tid = thread.tid;
        let about_to_get = now_threads.get(&tid).and_then(|thread| about_to_receive(thread));
        let queue_now = now.signals.of_thread(tid);
        let before: Vec<Signal> = about_to_receive(thread)
            .into_iter()
            .chain(if is_old { queue_now } else { then.signals.of_thread(tid) }.iter().cloned())
            .filter(|signal| !signal.comes_again())
            .chain(shared_put_in.iter().filter(|(taker, _)| *taker == tid).map(|(_, signal)| signal.clone()))
            .filter(|signal| !is_held_back(signal))
            .collect();
        // Signals that stay although the snapshot does not have them.
        let stays =
            |signal: &&Signal| !is_held_back(signal) && !is_undone(signal) && !before.contains(signal);
        let kept_at_stop = about_to_get.as_ref().filter(stays).cloned();
        let mut numbers: BTreeSet<i32> = before.iter().map(Signal::number).collect();
        numbers.extend(queue_now.iter().filter(|it| !is_held_back(it)).map(Signal::number));
        let mut changes = Vec::new();
        let wanted = |number: i32, with_kept: bool| {
            let mut wanted: Vec<Signal> = before.iter().filter(|it| it.number() == number).cloned().collect();
            wanted.extend(queue_now.iter().filter(stays).filter(|it| it.number() == number).cloned());
            let kept = kept_at_stop.iter().filter(|it| with_kept && it.number() == number);
            wanted.extend(kept.cloned());
            if number < FIRST_REAL_TIME {
                wanted.truncate(1);
            }
            wanted
        };
        let there = |number: i32| -> Vec<Signal> {
            queue_now.iter().filter(|it| it.number() == number).cloned().collect()
        };
        let is_changed = numbers.iter().any(|number| wanted(*number, false) != there(*number));
        if is_changed {
            numbers.extend(kept_at_stop.iter().map(Signal::number));
            for signal in numbers {
                let (put_in, there) = (wanted(signal, true), there(signal));
                if put_in != there {
                    changes.push(Change { tid, signal, taken_out: there.len(), put_in });
                }
            }
        }
        let is_dropped = about_to_get
            .as_ref()
            .is_some_and(|signal| !is_held_back(signal) && (is_changed || kept_at_stop.is_none()));
        if is_dropped {
            settlement.dropped.push(tid);
        } else if about_to_get.is_some() && is_changed {
            return Err(format!("thread {tid} is about to be stopped by a signal; try again"));
        }
        if is_dropped || about_to_get.is_none() {
            takers.push(tid);
        }
        settlement.changes.append(&mut changes);
    }
    for (signal, taken_out) in taken_out {
        let taker = takers.iter().find(|tid| {
            now.signals.of_thread(**tid).iter().all(|it| it.number() != signal)
                && settlement.changes.iter().all(|it| it.tid != **tid || it.signal != signal)
        });
        let Some(tid) = taker else {
            return Err(format!(
                "signal {signal} is on its way to it, and no thread could take it; try again"
            ));
        };
        settlement.changes.push(Change { tid: *tid, signal, taken_out, put_in: Vec::new() });
    }
    Ok(settlement)
}

fn about_to_receive(thread: &Thread) -> Option<Signal> {
    (thread.pending_signal != 0).then(|| Signal(thread.signal_information.clone()))
}

/// Signals to the process as a whole: which thread receives which, and how many of each number are
/// removed.
type OfProcess = (Vec<(u32, Signal)>, Vec<(i32, usize)>);

fn shared(
    then: &Moment<'_>,
    now: &Moment<'_>,
    is_undone: impl Fn(&Signal) -> bool,
) -> Result<OfProcess, String> {
    let (before, there) = (&then.signals.shared, &now.signals.shared);
    let numbers: BTreeSet<i32> = before.iter().chain(there).map(Signal::number).collect();
    let (mut put_in, mut taken_out) = (Vec::new(), Vec::new());
    let mentioned = |number: &i32| *number != libc::SIGSTOP && (1..=64).contains(number);
    for number in numbers.into_iter().filter(mentioned) {
        let of = |all: &[Signal]| -> Vec<Signal> {
            all.iter().filter(|it| it.number() == number).cloned().collect()
        };
        let (before, there) = (of(before), of(there));
        if before == there {
            continue;
        }
        let undone = there.iter().filter(|signal| is_undone(signal) && !before.contains(signal)).count();
        if undone > 0 {
            // They come before the SIGSTOP that the process has during the write.
            if undone < there.len() || number > libc::SIGSTOP {
                return Err(format!(
                    "signal {number}, which it has sent to itself since, is on its way and cannot be taken back; \
                     try again"
                ));
            }
            taken_out.push((number, undone));
        }
        let missing: Vec<&Signal> = before.iter().filter(|signal| !there.contains(signal)).collect();
        if missing.is_empty() {
            continue;
        }
        // Any thread that does not block the signal may be the one that receives it.
        let taker = then.threads.threads.iter().find(|thread| !has(thread.signal_mask, number));
        let Some(taker) = taker.filter(|_| missing.len() == before.len()) else {
            return Err(format!(
                "signal {number} was on its way to it when it was captured, and cannot be sent in the same way \
                 again; roll back to another snapshot"
            ));
        };
        put_in.extend(missing.into_iter().map(|signal| (taker.tid, signal.clone())));
    }
    Ok((put_in, taken_out))
}

/// An error if a pending signal stops or continues the process and also has another effect.
fn check_job_control(then: &Moment<'_>, now: &Moment<'_>) -> Result<(), String> {
    for (moment, advice) in [(then, "roll back to another snapshot"), (now, "try again")] {
        let queued = moment.signals.shared.iter().chain(moment.signals.threads.iter().flat_map(|(_, it)| it));
        let about_to = moment.threads.threads.iter().filter_map(about_to_receive);
        for signal in queued.cloned().chain(about_to) {
            let number = signal.number();
            let blocked = moment.threads.threads.iter().any(|thread| has(thread.signal_mask, number));
            let is_plain = number == libc::SIGCONT && !has(moment.signals.caught, number) && !blocked;
            if JOB_CONTROL.contains(&number) && !is_plain {
                let when = if std::ptr::eq(moment, then) {
                    "was on its way when it was captured"
                } else {
                    "is on its way to it"
                };
                return Err(format!("signal {number}, which stops or continues processes, {when}; {advice}"));
            }
        }
    }
    Ok(())
}

fn has(mask: u64, signal: i32) -> bool {
    (1..=64).contains(&signal) && mask & 1 << (signal - 1) != 0
}

#[cfg(test)]
mod tests {
    use super::*;

    const OWN_PID: u32 = 70;

    fn signal(number: i32, code: i32, sender: i32, value: u8) -> Signal {
        let mut bytes = vec![0; 128];
        for (at, field) in [(0, number), (8, code), (16, sender)] {
            bytes[at..at + 4].copy_from_slice(&field.to_ne_bytes());
        }
        bytes[24] = value;
        Signal(bytes)
    }

    fn own(number: i32) -> Signal {
        signal(number, libc::SI_TKILL, 70, 0)
    }

    fn foreign(number: i32) -> Signal {
        signal(number, libc::SI_USER, 7, 0)
    }

    fn fault() -> Signal {
        signal(libc::SIGSEGV, 1, 0, 0)
    }

    /// Two threads. The first is about to receive a signal, and has a queue.
    fn moment(about_to: Option<Signal>, queue: Vec<Signal>, shared: Vec<Signal>) -> (Threads, Signals) {
        let thread = |tid, about_to: Option<Signal>| Thread {
            tid,
            name: Vec::new(),
            signal_mask: if tid == 71 { u64::MAX } else { 0 },
            pending_signal: about_to.as_ref().map_or(0, Signal::number),
            signal_information: about_to.map(|Signal(bytes)| bytes).unwrap_or_default(),
            registers: Vec::new(),
        };
        let threads = vec![thread(70, about_to), thread(71, None)];
        let threads =
            Threads { machine: 62, pid: 70, parent_pid: 1, process_group: 70, session: 70, threads };
        (threads, Signals { shared, threads: vec![(70, queue)], ..Signals::default() })
    }

    fn settled(then: (Threads, Signals), now: (Threads, Signals)) -> Result<Settlement, String> {
        let [then, now] = [&then, &now].map(|(threads, signals)| Moment { threads, signals });
        settle(&then, &now, OWN_PID, false)
    }

    fn put(signal: i32, taken_out: usize, put_in: Vec<Signal>) -> Change {
        Change { tid: 70, signal, taken_out, put_in }
    }

    #[test]
    fn nothing_is_done_where_nothing_differs() {
        let queue = || vec![foreign(10), own(34), own(34)];
        let found =
            settled(moment(None, queue(), vec![foreign(15)]), moment(None, queue(), vec![foreign(15)]));
        assert!(found.unwrap().is_empty());
        // A fault is raised again, and signals from others stay.
        let found = settled(
            moment(Some(fault()), vec![], vec![]),
            moment(None, vec![foreign(10)], vec![foreign(15)]),
        );
        assert!(found.unwrap().is_empty());
        let found = settled(moment(None, vec![], vec![]), moment(Some(foreign(15)), vec![], vec![]));
        assert!(found.unwrap().is_empty());
    }

    #[test]
    fn what_belongs_to_the_future_is_taken_out() {
        for about_to in [fault(), own(10)] {
            let found = settled(moment(None, vec![], vec![]), moment(Some(about_to), vec![], vec![]));
            assert_eq!(found.unwrap(), Settlement { dropped: vec![70], changes: vec![] });
        }
        let found =
            settled(moment(None, vec![], vec![]), moment(None, vec![fault(), own(34), own(34)], vec![]));
        assert_eq!(found.unwrap().changes, [put(11, 1, vec![]), put(34, 2, vec![])]);
        let found = settled(moment(None, vec![], vec![]), moment(None, vec![], vec![own(10)]));
        assert_eq!(found.unwrap().changes, [put(10, 1, vec![])]);
        assert!(settled(moment(None, vec![], vec![]), moment(None, vec![], vec![own(34)])).is_err());
    }

    #[test]
    fn what_was_on_its_way_is_put_in_in_order() {
        let values = |values: &[u8]| -> Vec<Signal> {
            values.iter().map(|value| signal(34, libc::SI_QUEUE, 70, *value)).collect()
        };
        let found =
            settled(moment(Some(own(12)), values(&[1, 2, 3]), vec![]), moment(None, values(&[3, 4]), vec![]));
        assert_eq!(found.unwrap().changes, [put(12, 0, vec![own(12)]), put(34, 2, values(&[1, 2, 3]))]);
        // Signals from others come behind.
        let mut both = values(&[1]);
        both.push(foreign(34));
        let found =
            settled(moment(None, values(&[1]), vec![]), moment(Some(foreign(15)), vec![foreign(34)], vec![]));
        let expected = vec![put(15, 0, vec![foreign(15)]), put(34, 1, both)];
        assert_eq!(found.unwrap(), Settlement { dropped: vec![70], changes: expected });
        // To the process as a whole: the thread that does not block it.
        let found = settled(moment(None, vec![], vec![foreign(14)]), moment(None, vec![], vec![]));
        assert_eq!(found.unwrap().changes, [put(14, 0, vec![foreign(14)])]);
        let (mut threads, signals) = moment(None, vec![], vec![foreign(14)]);
        threads.threads[0].signal_mask = u64::MAX;
        assert!(settled((threads, signals), moment(None, vec![], vec![])).is_err());
    }

    #[test]
    fn job_control_is_refused_unless_it_does_nothing() {
        let none = || moment(None, vec![], vec![]);
        assert!(settled(none(), moment(None, vec![], vec![foreign(libc::SIGTSTP)])).is_err());
        assert!(settled(moment(Some(foreign(libc::SIGCONT)), vec![], vec![]), none()).is_err());
        assert!(settled(none(), moment(Some(foreign(libc::SIGSTOP)), vec![], vec![])).unwrap().is_empty());
        assert!(settled(none(), moment(Some(foreign(libc::SIGSTOP)), vec![own(10)], vec![])).is_err());
    }

    #[test]
    fn other_handlers_are_told() {
        let then = Signals { caught: 1 << 9 | 1 << 31, ..Signals::default() };
        let now = Signals { ignored: 1 << 9, ..Signals::default() };
        let found = handled_otherwise(&then, &now);
        assert!(
            found.len() == 1 && found[0].starts_with("signal 10 was handled and is ignored now"),
            "{found:?}"
        );
    }
}
