//! A progress bar on standard error for long verbs.

use std::sync::OnceLock;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use stillframe::Progress;

use crate::context::Context;

/// A verb that ends sooner shows no bar.
const BAR_AFTER: Duration = Duration::from_millis(500);

/// Progress for a verb that ctrl-C ends. If the verb takes long and standard error is a terminal, a
/// bar with the name `verb` is shown; it disappears when the progress is dropped.
pub(crate) fn progress(context: &Context, verb: &'static str) -> Progress {
    let progress = Progress::new().cancel_when(context.interrupted());
    if context.output.quiet {
        return progress;
    }
    let started = Instant::now();
    let bar = Bar(OnceLock::new());
    progress.on_advance(move |done_bytes, total_bytes| {
        if started.elapsed() > BAR_AFTER {
            let bar = bar.0.get_or_init(|| new_bar(verb));
            bar.set_length(total_bytes);
            bar.set_position(done_bytes);
        }
    })
}

/// Removes its bar from the terminal when it is dropped.
struct Bar(OnceLock<ProgressBar>);

impl Drop for Bar {
    fn drop(&mut self) {
        if let Some(bar) = self.0.get() {
            bar.finish_and_clear();
        }
    }
}

fn new_bar(verb: &'static str) -> ProgressBar {
    // It draws nothing unless standard error is a terminal.
    let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
    // Not the whole width: the terminal prints ^C after it, which must not start a new line.
    let template = "{msg}  {bar:24}  {binary_bytes} of {binary_total_bytes}, {eta} left";
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style);
    }
    bar.with_message(verb)
}
