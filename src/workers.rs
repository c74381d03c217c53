//! Workers: one thread a core, each with a state of its own, that share out a list of work in order.

use crate::sync::Mutex;

/// How many workers there are at the most.
pub(crate) fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// Does `work` on every item, on all cores, with a state that `start` makes once a worker. The items
/// are begun in order. Ends soon after the first error, which it returns.
pub(crate) fn for_each<T: Send, S, E: Send>(
    items: Vec<T>,
    start: impl Fn() -> S + Sync,
    work: impl Fn(&mut S, T) -> Result<(), E> + Sync,
) -> Result<(), E> {
    let workers = items.len().min(cores());
    let items = Mutex::new(items.into_iter());
    let failure = Mutex::new(None);
    let run = || {
        let mut state = start();
        while failure.lock().is_none() {
            let Some(item) = items.lock().next() else { break };
            if let Err(error) = work(&mut state, item) {
                failure.lock().get_or_insert(error);
            }
        }
    };
    match workers {
        0 | 1 => run(),
        _ => std::thread::scope(|scope| (0..workers).for_each(|_| drop(scope.spawn(run)))),
    }
    let failed = failure.lock().take();
    failed.map_or(Ok(()), Err)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    #[test]
    fn every_item_is_worked_on_once_and_the_first_error_ends_it() {
        let sum = AtomicUsize::new(0);
        let add = |(): &mut (), item: usize| {
            sum.fetch_add(item, Ordering::Relaxed);
            if item == 7777 { Err(item) } else { Ok(()) }
        };
        assert_eq!(for_each((0..1000).collect(), || (), add), Ok(()));
        assert_eq!(sum.load(Ordering::Relaxed), 499_500);
        assert_eq!(for_each((0..100_000).collect(), || (), add), Err(7777));
        assert!(sum.load(Ordering::Relaxed) < 4_000_000_000);
    }
}
