//! Workers: one thread a core, each with its own state, that process a list of work in order.

use crate::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

/// The greatest number of workers.
pub(crate) fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// Calls `work` for every item, on all cores, with a state that `start` makes once for each worker.
/// The items are started in order; a free worker takes the next one. After the first error or panic
/// the workers end soon; the error is returned, and the panic is resumed. The calling thread
/// processes a single item.
pub(crate) fn for_each<T: Send, S, E: Send>(
    items: impl IntoIterator<Item = T, IntoIter: Send>,
    start: impl Fn() -> S + Sync,
    work: impl Fn(&mut S, T) -> Result<(), E> + Sync,
) -> Result<(), E> {
    let mut items = items.into_iter();
    let first: Vec<T> = items.by_ref().take(2).collect();
    let most = items.size_hint().1.map_or(usize::MAX, |rest| rest.saturating_add(first.len()));
    let workers = if first.len() < 2 { first.len() } else { cores().min(most) };
    let items = Mutex::new(first.into_iter().chain(items));
    let failure = Mutex::new(None);
    let has_ended = AtomicBool::new(false);
    let run = || {
        let _on_panic = EndOnPanic(&has_ended);
        let mut state = start();
        while !has_ended.load(Ordering::Relaxed) {
            let Some(item) = items.lock().next() else { break };
            if let Err(error) = work(&mut state, item) {
                failure.lock().get_or_insert(error);
                has_ended.store(true, Ordering::Relaxed);
            }
        }
    };
    match workers {
        0 => {}
        1 => run(),
        _ => std::thread::scope(|scope| {
            (1..workers).for_each(|_| drop(scope.spawn(run)));
            run();
        }),
    }
    let failed = failure.lock().take();
    failed.map_or(Ok(()), Err)
}

/// Ends the other workers when one panics. The scope in which they run then panics.
struct EndOnPanic<'a>(&'a AtomicBool);

impl Drop for EndOnPanic<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.store(true, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicUsize;

    #[test]
    fn every_item_is_worked_on_once_and_the_first_error_ends_it() {
        let sum = AtomicUsize::new(0);
        let add = |(): &mut (), item: usize| {
            sum.fetch_add(item, Ordering::Relaxed);
            if item == 7777 { Err(item) } else { Ok(()) }
        };
        assert_eq!(for_each(0..1000, || (), add), Ok(()));
        assert_eq!(sum.load(Ordering::Relaxed), 499_500);
        assert_eq!(for_each(0..100_000, || (), add), Err(7777));
        assert!(sum.load(Ordering::Relaxed) < 4_000_000_000);
    }

    #[test]
    fn a_panic_ends_the_work_and_is_passed_on() {
        let count = AtomicUsize::new(0);
        let work = |(): &mut (), item: usize| -> Result<(), ()> {
            count.fetch_add(1, Ordering::Relaxed);
            assert!(item != 3, "the third item");
            Ok(())
        };
        // Endless work: the other workers must not continue it.
        let all = std::panic::AssertUnwindSafe(|| for_each(0.., || (), work));
        assert!(std::panic::catch_unwind(all).is_err());
        assert!(count.load(Ordering::Relaxed) > 3);
    }
}
