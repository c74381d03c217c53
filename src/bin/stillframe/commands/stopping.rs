//! How a live process is stopped: the option of `capture`, `watch`, `restore` and `rollback`.

use std::time::Duration;

use clap::Args;

use crate::values::interval;

#[derive(Debug, Args)]
pub(super) struct Stopping {
    /// Limit for stopping the threads [default: 1s]
    ///
    /// If a thread does not stop in this time, all threads are resumed, and the error names the
    /// thread. The time counts from the last thread that stopped, so thousands of threads may take
    /// longer in all.
    #[arg(long, value_name = "DURATION", default_value = "1s", value_parser = interval, hide_default_value = true)]
    pub(super) stop_timeout: Duration,
}
